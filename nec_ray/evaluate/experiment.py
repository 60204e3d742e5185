"""What `nec evaluate` is told: a task on labelled tiles, and the methods that are compared on it, as TOML."""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import Field, field_validator, model_validator

from nec_ray.config import Section, Text, check, read_toml, schema
from nec_ray.evaluate.baselines.quantised import Precision, Ranges
from nec_ray.evaluate.baselines.scaling import Depth
from nec_ray.models.segmentation import SegmentationDecoder

_WHAT = "evaluation"


class Embeddings(Section):
    """NEC: embeddings pulled from an archive, at the bytes that were fetched."""

    kind: Literal["nec"]
    name: str = Field(min_length=1)
    """What the method is called in results and pictures."""
    curve: str | None = None
    """Methods of one curve are joined by a line, such as the rates of one encoder."""
    archive: Text
    """The archive: a path or URL."""
    version: int | None = Field(default=None, ge=0)
    """Of the archive; the newest where not given."""
    layers: int | None = Field(default=None, ge=1)
    """Only the first layers of each payload; all where not given."""
    decoder_layer: Literal["none", "frozen", "trained"] = "none"
    """What becomes of the codec's first decoder layer at the consumer; only the head is trained behind it."""
    catalog: Text | None = None
    """Tile catalog of the pixels, a path or URL: distortion and retrieval need the embeddings before compression."""


class _OfPixels(Section):
    """What all methods have in common that start from the tiles' pixels and one frozen encoder."""

    name: str = Field(min_length=1)
    """What the method is called in results and pictures."""
    curve: str | None = None
    """Methods of one curve are joined by a line."""
    archive: Text
    """Archive whose tiles, and unless `codec` is given whose encoder, are used: a path or URL."""
    catalog: Text
    """Tile catalog of the pixels: a path or URL."""
    codec: Text | None = None
    """Codec directory of another encoder, such as the one that NEC's training began from: a path or URL."""


class Uncompressed(_OfPixels):
    """The embeddings before they were rounded, as float32: what compression is measured against."""

    kind: Literal["uncompressed"]


class _Ranged(_OfPixels):
    """What methods have in common that quantise uniformly."""

    precision: Precision
    """Of a value: floats, or affine integers."""
    ranges: Ranges
    """Integers' range, of the training tiles."""
    percentile: float = Field(default=100, gt=50, le=100)
    """That ranges end at on both sides; 100 is from the least to the greatest value."""

    @model_validator(mode="after")
    def _integers_only(self) -> Self:
        if self.precision.startswith("float") and self.model_fields_set & {"ranges", "percentile"}:
            raise ValueError("floats have no ranges: leave out ranges and percentile")
        return self


class Quantised(_Ranged):
    """Embeddings quantised uniformly, with zstd (NEC, "UQE")."""

    kind: Literal["quantised"]
    ranges: Ranges = "tensor"
    """Integers' range: one for all values, as the paper has it, or one a channel; of the training tiles."""


class PrincipalComponents(_Ranged):
    """The tokens' first principal components, fitted on the training tiles and quantised, with zstd."""

    kind: Literal["pca"]
    components: int = Field(ge=1)
    """That are kept."""
    precision: Precision = "int8"
    """Of a component."""
    ranges: Ranges = "channel"
    """Integers' range: one a component, or one for all, which gives components that vary little fewer bits."""


class Binary(_OfPixels):
    """A bit a value: on which side of its channel's median it lies; with zstd."""

    kind: Literal["binary"]


class _CodedPixels(_OfPixels):
    """What methods have in common that send pixels: the encoder runs at the consumer."""

    encoder: Literal["frozen", "trained"] = "frozen"
    """Whether the consumer trains the encoder with the head, end to end, as the paper does with raw data; only heads'
    tasks are done then."""


class Raw(_CodedPixels):
    """Pixels as large as the source has them, with zstd (NEC, "RDC")."""

    kind: Literal["raw"]
    bits: Depth
    """Of a pixel's value; sources of more are scaled."""


class SourceFiles(_CodedPixels):
    """The source files as they are, a tile's share of its file by its pixels."""

    kind: Literal["files"]


class Jpeg2000(_CodedPixels):
    """JPEG 2000 of the pixels."""

    kind: Literal["jpeg2000"]
    bits_per_pixel: float = Field(gt=0)
    """Aimed at, all bands together."""
    bits: Depth = 8
    """Of a value before it is coded; sources of more are scaled."""


Method = Annotated[
    Embeddings | Uncompressed | Quantised | PrincipalComponents | Binary | Raw | SourceFiles | Jpeg2000,
    Field(discriminator="kind"),
]
Task = Literal["head", "linear", "knn", "retrieval", "segmentation", "unet"]
OF_MASKS: dict[Task, SegmentationDecoder] = {"segmentation": "nec", "unet": "unet"}
"""Tasks on masks, and the decoder of their head."""
OF_HEADS: frozenset[Task] = frozenset({"head", *OF_MASKS})
"""Tasks that train a head on all tokens."""
_OF_LABELS: frozenset[Task] = frozenset({"head", "linear", "knn"})
Share = Annotated[float, Field(gt=0, le=1)]


class Experiment(Section):
    """One task, and the methods compared on it: the same tiles, split, head and seeds for all."""

    title: str = Field(min_length=1)
    """Of the pictures."""
    labels: Text | None = None
    """Labels of the tiles, as `nec head` takes them; the archives' own where not given. For segmentation the masks."""
    classes: Text | None = None
    """List of the masks' classes, a path or URL; the classes.json beside them where not given."""
    where: Text | None = None
    """SQL condition over `embeddings`: only these tiles are trained on and tested."""
    test: Text | None = None
    """SQL condition over `embeddings`: these tiles are tested, all others are trained on; where not given the labels'
    own split, and where they have none a hash of the tile id."""
    label_shares: list[Share] = Field(default=[1.0], min_length=1)
    """Shares of the training tiles whose labels are used, each in turn, of every class alike; the smaller are part of
    the larger. Methods are fitted to all training tiles, which needs no labels."""
    reference: str | None = None
    """Curve whose bytes the other curves' are compared with at equal accuracy; the first of an archive's embeddings
    where not given."""
    seeds: list[int] = Field(default=[0, 1, 2], min_length=1)
    """Of the heads: each method is trained once with each."""
    epochs: int | None = Field(default=None, ge=1)
    """Of the heads; as many as the number of tiles needs where not given."""
    tasks: list[Task] = Field(default=["head"], min_length=1)
    """What is done with the embeddings: `head` trains attention pooling and a linear layer, as the paper; `linear` and
    `knn` classify mean tokens by logistic regression and by neighbours; `retrieval` finds test tiles' neighbours among
    the training tiles, by mean tokens; `segmentation` trains the paper's decoder on masks, which reads several grid
    scales on the finest one, `unet` a U-Net, which reads each as it is."""
    retrieval_k: int = Field(default=10, ge=1)
    """Neighbours that are looked for: recall is the share of the uncompressed embeddings' that are found."""
    methods: list[Method] = Field(min_length=1)
    """What is compared."""

    @field_validator("seeds")
    @classmethod
    def _different(cls, seeds: list[int]) -> list[int]:
        if len(set(seeds)) < len(seeds):
            raise ValueError("a seed stands twice")
        return seeds

    @field_validator("label_shares")
    @classmethod
    def _shares(cls, shares: list[float]) -> list[float]:
        if len(set(shares)) < len(shares):
            raise ValueError("a share stands twice")
        return shares

    @field_validator("tasks")
    @classmethod
    def _once(cls, tasks: list[Task]) -> list[Task]:
        if len(set(tasks)) < len(tasks):
            raise ValueError("a task stands twice")
        return tasks

    @model_validator(mode="after")
    def _names(self) -> "Experiment":
        if of_masks := [task for task in self.tasks if task in OF_MASKS]:
            if self.labels is None:
                raise ValueError(f"{of_masks[0]} needs masks: give labels, a folder of masks or a label GeoTIFF")
            if other := [task for task in self.tasks if task in _OF_LABELS]:
                raise ValueError(f"{of_masks[0]} has masks, {other[0]} needs a label a tile; make two evaluations")
        elif self.classes is not None:
            raise ValueError("classes are for masks: ask for the task segmentation or unet, or leave them out")
        if self.reference is not None and self.reference not in curves(self):
            raise ValueError(f"reference {self.reference!r}: no method has this curve")
        names = [method.name for method in self.methods]
        for name in names:
            if names.count(name) > 1:
                raise ValueError(f"two methods are named {name!r}")
        for method in self.methods:
            if "retrieval" in tasks_of(method, self.tasks) and method.catalog is None:
                raise ValueError(f"method {method.name!r} needs a catalog: retrieval looks for uncompressed neighbours")
        return self


def read_experiment(path: Path) -> Experiment:
    """The experiment of a TOML file.

    Raises:
        NotFound: no such file.
        BadRecipe: it is no TOML, or a key is unknown or its value impossible; the message names the key.
    """
    return check(Experiment, read_toml(path, _WHAT), path, _WHAT)


def experiment_schema() -> dict[str, Any]:
    """JSON Schema of the file, as schemas/evaluation.schema.json holds it."""
    return schema(Experiment)


def trains_encoder(method: Method) -> bool:
    """Whether the encoder is trained with the head, on pixels."""
    return isinstance(method, Raw | SourceFiles | Jpeg2000) and method.encoder == "trained"


def tasks_of(method: Method, tasks: Sequence[Task]) -> list[Task]:
    """The tasks that a method is asked to do: behind a layer or encoder that is trained there are only the heads.

    A decoder layer puts all tokens on one grid, and has no U-Net behind it.
    """
    if isinstance(method, Embeddings) and method.decoder_layer != "none":
        return [task for task in tasks if task in OF_HEADS and task != "unet"]
    return [task for task in tasks if task in OF_HEADS] if trains_encoder(method) else list(tasks)


def curves(experiment: Experiment) -> dict[str, list[str]]:
    """Names of the methods of each curve, in the order of the file."""
    found: dict[str, list[str]] = {}
    for method in experiment.methods:
        found.setdefault(method.curve or method.name, []).append(method.name)
    return found


def reference_curve(experiment: Experiment) -> str | None:
    """The curve that others are compared with; None where none is named and no archive's embeddings are compared."""
    if experiment.reference is not None:
        return experiment.reference
    return next((m.curve or m.name for m in experiment.methods if isinstance(m, Embeddings)), None)

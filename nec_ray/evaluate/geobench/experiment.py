"""What `nec evaluate` is told of GEO-Bench: data sets, encoders, and protocols with their settings, as TOML.

A protocol is done where its section stands in the file; what a section leaves out is the paper's. Sources of the
settings: MMEarth, section 5.2 and supplement B, and, where these are silent, the settings of its released code.
"""

from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from nec_ray.config import Section, Text, schema

Protocol = Literal["fine_tuning", "linear", "linear_first_layer", "knn", "segmentation", "segmentation_frozen"]
PROTOCOLS: tuple[Protocol, ...] = (
    "fine_tuning",
    "linear",
    "linear_first_layer",
    "knn",
    "segmentation",
    "segmentation_frozen",
)
OF_MASKS: frozenset[Protocol] = frozenset({"segmentation", "segmentation_frozen"})
OF_EMBEDDINGS: frozenset[Protocol] = frozenset({"linear", "knn", "segmentation_frozen"})
"""What can be done where the encoder is not at hand, as with an archive's embeddings."""


EVERY_SAMPLE = "every sample"


class Dataset(Section):
    """A data set of GEO-Bench, and which of it is used."""

    folder: Text
    """Its folder, a path or URL; below `root` where that is given."""
    paper: str | None = None
    """What the paper's tables call it; known of the folders m-bigearthnet, m-so2sat, m-eurosat, m-cashew-plant(ation)
    and m-SA-crop-type."""
    partition: str = "default"
    """GEO-Bench's own choice of training samples, such as `0.10x`; `every sample` trains on and tests all that are
    there, which only shows that things run."""
    samples: list[Annotated[int, Field(ge=1)] | Literal["all"]] = Field(default=["all"], min_length=1)
    """Numbers of training samples, each in turn: all classes alike, the smaller choices part of the larger."""
    statistics: Literal["data set", "l1c", "l2a"] = "data set"
    """Mean and deviation that encoders of pixels get: the data set's own, or of the pretraining's L1C or L2A images
    (MMEarth, Table A4). Codecs keep their own."""
    band_statistics: str | None = None
    """MMEarth's `*_band_stats.json`, a path or URL, for `l1c` and `l2a`."""
    band_names: Literal["corrected", "published"] = "corrected"
    """Of EuroSAT and Brick Kiln: those of what the bands hold, or GEO-Bench's own, some of which are wrong; MMEarth's
    released code reads the bands by these. Codecs and archives know the corrected ones alone."""

    @field_validator("samples")
    @classmethod
    def _once(cls, samples: list[int | Literal["all"]]) -> list[int | Literal["all"]]:
        if len(set(samples)) < len(samples):
            raise ValueError("a number of samples stands twice")
        return samples

    @model_validator(mode="after")
    def _statistics(self) -> "Dataset":
        if (self.statistics == "data set") != (self.band_statistics is None):
            raise ValueError("band_statistics are for statistics of l1c or l2a: give both, or neither")
        return self


class _Encoder(Section):
    name: str = Field(min_length=1)
    """What the encoder is called in results and pictures."""
    curve: str | None = None
    """Encoders of one curve are joined by a line, such as the rates of one archive's."""


class _OfPixels(_Encoder):
    paper: str | None = None
    """The row of the papers' tables that this is, such as `MMEarth`: a key of nec_ray/data/geobench/papers.toml."""
    weights: str | None = None
    """Pretrained weights, a path or URL; random ones where not given."""


class MpMae(_OfPixels):
    """MP-MAE's ConvNeXt V2, of MMEarth's published checkpoints."""

    kind: Literal["mp_mae"]
    size: Literal["atto", "femto", "pico", "nano", "tiny"] = "atto"
    patch: Literal[8, 16, 32] = 16
    """Pixels a side: 16 for images of 112 pixels in pretraining, 8 for 56."""
    inputs: Literal["s2", "rgb"] = "s2"
    """Twelve bands of Sentinel-2, or blue, green and red."""
    pixels: int | None = Field(default=None, ge=16)
    """A side that images are resized to; as large as they are where not given, as in the released code."""


class MaeVit(_OfPixels):
    """A MAE ViT, of the weights that `nec train` begins from."""

    kind: Literal["mae_vit"]
    size: Literal["micro", "tiny", "small", "base", "large"] = "base"
    patch: int = Field(default=16, ge=1)
    """Pixels a side."""
    pixels: int = Field(default=224, ge=16)
    """A side that images are resized to."""
    bands: list[str] = Field(default=["B4", "B3", "B2"], min_length=1)
    """Of the input, in the weights' order."""


class Timm(_OfPixels):
    """Any model of timm that has feature maps."""

    kind: Literal["timm"]
    model: str
    """timm's name of it, such as resnet50."""
    pixels: int | None = Field(default=None, ge=16)
    """A side that images are resized to; as large as they are where not given."""
    bands: list[str] = Field(default=["B4", "B3", "B2"], min_length=1)
    """Of the input, in the weights' order."""


class CodecEncoder(_Encoder):
    """The encoder of a codec, its embeddings not compressed."""

    kind: Literal["codec"]
    codec: Text
    """Codec directory, a path or URL."""


class ArchiveEmbeddings(_Encoder):
    """Embeddings pulled from an archive, at the bytes that were fetched; tiles are those of `nec tiles build`."""

    kind: Literal["archive"]
    archive: Text
    """The archive, a path or URL."""
    version: int | None = Field(default=None, ge=0)
    """Of the archive; the newest where not given."""
    layers: int | None = Field(default=None, ge=1)
    """Only the first layers of each payload; all where not given."""


Encoder = Annotated[MpMae | MaeVit | Timm | CodecEncoder | ArchiveEmbeddings, Field(discriminator="kind")]
Share = Annotated[float, Field(ge=0, lt=1)]


class Training(Section):
    """How AdamW is run; the learning rate falls by half a cosine, step by step, and the last weights are tested."""

    epochs: int = Field(default=100, ge=1)
    """Passes over the training samples (section 5.2)."""
    batch: int = Field(default=1024, ge=1)
    """Samples a step (section 5.2); fewer where there are fewer."""
    part: int = Field(default=64, ge=1)
    """Samples that are computed at a time; gradients of a batch's parts add up."""
    base_lr: float = Field(default=2e-4, gt=0)
    """Learning rate for 256 samples a step (section 5.2)."""
    min_lr: float = Field(default=1e-6, ge=0)
    """That the learning rate ends at (released code)."""
    warmup_epochs: int = Field(default=0, ge=0)
    """In which it rises from 0 (released code)."""
    weight_decay: float = Field(default=0.3, ge=0)
    """Of matrices; biases and norms do not decay (released code)."""

    @property
    def lr(self) -> float:
        """The highest learning rate."""
        return self.base_lr * self.batch / 256


class _Classified(Training):
    label_smoothing: Share = 0.2
    """Of one class: the share that all classes have alike; of several: what is taken off 1 and put to 0 (released
    code)."""


class FineTuning(_Classified):
    """Encoder and classifier are trained together."""

    layer_decay: float = Field(default=0.9, gt=0, le=1)
    """The learning rate of a layer by that of the one behind it (released code)."""
    drop_path: Share = 0.1
    """Of the last block; it rises from 0 (released code)."""


class Linear(_Classified):
    """Only the last linear layer is trained, on a frozen encoder without drop path (section 5)."""


class LinearFirstLayer(_Classified):
    """The first convolution is trained with the last linear layer, without drop path (supplement B)."""


class Knn(Section):
    """The nearest training samples vote, by the cosine of their mean features (not in the paper)."""

    neighbours: int = Field(default=20, ge=1)
    """That vote."""


class SegmentationFrozen(Training):
    """Only the U-Net is trained, on a frozen encoder (the first phase of section 5.2)."""

    epochs: int = Field(default=50, ge=1)
    batch: int = Field(default=32, ge=1)
    base_lr: float = Field(default=1e-2, gt=0)


class Segmentation(SegmentationFrozen):
    """The U-Net is trained on a frozen encoder first, then both are (section 5.2)."""

    epochs: int = Field(default=200, ge=1)
    """Of both phases."""
    frozen_epochs: int = Field(default=50, ge=0)
    """Of the first phase."""
    layer_decay: float = Field(default=1.0, gt=0, le=1)
    """See fine_tuning; the released code trains the encoder at the U-Net's rate."""
    drop_path: Share = 0.1
    """See fine_tuning."""

    @model_validator(mode="after")
    def _phases(self) -> "Segmentation":
        if self.frozen_epochs > self.epochs:
            raise ValueError("frozen_epochs are more than the epochs, of which they are a part")
        return self


class GeobenchExperiment(Section):
    """Data sets, encoders, and what is done with them."""

    title: str = Field(min_length=1)
    """Of the page."""
    root: str | None = None
    """Folder that the data sets' folders are in, a path or URL."""
    geobench: list[Dataset] = Field(min_length=1)
    """The data sets."""
    encoders: list[Encoder] = Field(min_length=1)
    """What is evaluated."""
    seeds: list[int] = Field(default=[0, 1, 2], min_length=1)
    """Of first weights, order and choice of samples: each run is done once with each."""
    fine_tuning: FineTuning | None = None
    linear: Linear | None = None
    linear_first_layer: LinearFirstLayer | None = None
    knn: Knn | None = None
    segmentation: Segmentation | None = None
    segmentation_frozen: SegmentationFrozen | None = None

    @field_validator("seeds")
    @classmethod
    def _different(cls, seeds: list[int]) -> list[int]:
        if len(set(seeds)) < len(seeds):
            raise ValueError("a seed stands twice")
        return seeds

    @model_validator(mode="after")
    def _whole(self) -> "GeobenchExperiment":
        if not self.protocols:
            raise ValueError(f"no protocol: add a section, one of {', '.join(PROTOCOLS)}")
        names = [encoder.name for encoder in self.encoders]
        for name in names:
            if names.count(name) > 1:
                raise ValueError(f"two encoders are named {name!r}")
        asked = [dataset.model_dump_json(exclude={"paper", "samples"}) for dataset in self.geobench]
        if len(set(asked)) < len(asked):
            raise ValueError("a data set stands twice; list its numbers of samples together")
        published = any(dataset.band_names == "published" for dataset in self.geobench)
        if published and not all(isinstance(encoder, _OfPixels) for encoder in self.encoders):
            raise ValueError("band_names published: codecs and archives know the corrected ones; evaluate them apart")
        return self

    @property
    def protocols(self) -> dict[Protocol, Section]:
        """Settings of those that are to be done."""
        found: dict[Protocol, Section | None] = {name: getattr(self, name) for name in PROTOCOLS}
        return {name: settings for name, settings in found.items() if settings is not None}

    def curves(self) -> dict[str, list[str]]:
        """Names of the encoders of each curve, in the order of the file."""
        found: dict[str, list[str]] = {}
        for encoder in self.encoders:
            found.setdefault(encoder.curve or encoder.name, []).append(encoder.name)
        return found


def protocols_of(experiment: GeobenchExperiment, encoder: Encoder, *, of_masks: bool) -> list[Protocol]:
    """What is done with an encoder on a data set of masks, or of classes."""
    able = OF_EMBEDDINGS if isinstance(encoder, ArchiveEmbeddings) else frozenset(PROTOCOLS)
    return [name for name in experiment.protocols if (name in OF_MASKS) == of_masks and name in able]


def is_random(encoder: Encoder) -> bool:
    """Whether its weights are of the seed."""
    return isinstance(encoder, _OfPixels) and encoder.weights is None


def geobench_schema() -> dict[str, Any]:
    """JSON Schema of the file, as schemas/geobench.schema.json holds it."""
    return schema(GeobenchExperiment)

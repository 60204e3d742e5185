"""What `nec evaluate` is told: a task on labelled tiles, and the methods that are compared on it, as TOML."""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from nec_ray.config import Section, check, read_toml, schema

_WHAT = "evaluation"


class Embeddings(Section):
    """NEC: embeddings pulled from an archive, at the bytes that were fetched."""

    kind: Literal["nec"]
    name: str = Field(min_length=1)
    """What the method is called in results and pictures."""
    curve: str | None = None
    """Methods of one curve are joined by a line, such as the rates of one encoder."""
    archive: str
    """The archive: a path or URL."""
    version: int | None = Field(default=None, ge=0)
    """Of the archive; the newest where not given."""
    layers: int | None = Field(default=None, ge=1)
    """Only the first layers of each payload; all where not given."""
    decoder_layer: Literal["none", "frozen", "trained"] = "none"
    """What becomes of the codec's first decoder layer at the consumer."""


class Uncompressed(Section):
    """The embeddings before they were rounded, as float32: what compression is measured against."""

    kind: Literal["uncompressed"]
    name: str = Field(min_length=1)
    """What the method is called in results and pictures."""
    curve: str | None = None
    """Methods of one curve are joined by a line."""
    archive: str
    """Archive whose tiles and codec's encoder are used: a path or URL."""
    catalog: str
    """Tile catalog of the pixels: a path or URL."""


Method = Annotated[Embeddings | Uncompressed, Field(discriminator="kind")]


class Experiment(Section):
    """One task, and the methods compared on it: the same tiles, split, head and seeds for all."""

    title: str = Field(min_length=1)
    """Of the pictures."""
    labels: str | None = None
    """Labels of the tiles, as `nec head` takes them; the archives' own where not given."""
    where: str | None = None
    """SQL condition over `embeddings`: only these tiles are trained on and tested."""
    seeds: list[int] = Field(default=[0, 1, 2], min_length=1)
    """Of the heads: each method is trained once with each."""
    epochs: int | None = Field(default=None, ge=1)
    """Of the heads; as many as the number of tiles needs where not given."""
    methods: list[Method] = Field(min_length=1)
    """What is compared."""

    @field_validator("seeds")
    @classmethod
    def _different(cls, seeds: list[int]) -> list[int]:
        if len(set(seeds)) < len(seeds):
            raise ValueError("a seed stands twice")
        return seeds

    @model_validator(mode="after")
    def _names(self) -> "Experiment":
        names = [method.name for method in self.methods]
        for name in names:
            if names.count(name) > 1:
                raise ValueError(f"two methods are named {name!r}")
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


def curves(experiment: Experiment) -> dict[str, Sequence[str]]:
    """Names of the methods of each curve, in the order of the file."""
    found: dict[str, list[str]] = {}
    for method in experiment.methods:
        found.setdefault(method.curve or method.name, []).append(method.name)
    return dict(found)

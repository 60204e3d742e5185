"""Recipes: what to train, as TOML; closed, so that a misspelt key is an error and not a default."""

import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from nec_ray.errors import BadRecipe, NotFound


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)


class DataSection(_Section):
    """What is trained on."""

    catalog: str
    """Tile catalog: a path or URL."""
    bands: list[str] | None = Field(default=None, min_length=1)
    """Bands by name; all of the catalog's where not given."""
    size: int = Field(ge=8, le=1024)
    """Pixels a side that every tile is resized to."""
    max_tiles: int = Field(default=100_000, ge=8)
    """Tiles kept in memory; an even sample of a larger catalog."""


class ModelSection(_Section):
    """Which masked autoencoder."""

    size: Literal["micro", "tiny", "small", "base", "large"] = "tiny"
    patch: int = Field(default=16, ge=1, le=64)
    depth: int | None = Field(default=None, ge=2, le=48)
    """Encoder blocks; that of the size where not given."""


class TrainSection(_Section):
    """How it is trained: MAE pretraining, then adaptation with the entropy model."""

    pretrain_epochs: int = Field(default=100, ge=0)
    adapt_epochs: int = Field(default=20, ge=1)
    beta: float = Field(default=0.01, ge=0, le=100)
    """Weight of the rate: the loss is MSE + beta * bits per element."""
    trainable: Literal["paper", "all"] = "paper"
    """What adaptation trains."""
    mask_ratio: float = Field(default=0.75, ge=0, lt=1)
    batch_size: int = Field(default=256, ge=1)
    """Tiles a step, over all workers."""
    lr: float = Field(default=1e-3, gt=0, le=1)
    """Peak learning rate of pretraining."""
    adapt_lr: float = Field(default=5e-4, gt=0, le=1)
    """Peak learning rate of adaptation."""
    weight_decay: float = Field(default=0.05, ge=0)
    warmup: float = Field(default=0.05, ge=0, lt=1)
    """Share of each phase's steps over which the learning rate rises."""
    seed: int = 0
    workers: int = Field(default=1, ge=1, le=1024)
    """Ray Train workers."""
    checkpoint_every: int = Field(default=10, ge=1)
    """Epochs between checkpoints."""


class Recipe(_Section):
    """A whole recipe."""

    data: DataSection
    model: ModelSection = ModelSection()
    train: TrainSection = TrainSection()

    @model_validator(mode="after")
    def _sections_fit(self) -> "Recipe":
        size, patch, how = self.data.size, self.model.patch, self.train
        if size % patch:
            raise ValueError(f"data.size {size} is no multiple of model.patch {patch}")
        if how.batch_size % how.workers:
            raise ValueError(f"train.batch_size {how.batch_size} is no multiple of train.workers {how.workers}")
        if how.trainable == "paper" and not how.pretrain_epochs:
            raise ValueError("train.pretrain_epochs 0 with train.trainable paper would freeze random weights")
        return self


def read_recipe(path: Path, overrides: Sequence[str] = ()) -> Recipe:
    """Recipe of a TOML file.

    Args:
        path: the file.
        overrides: `section.key=value`, each value as TOML (a bare word is a string).

    Raises:
        NotFound: no such file.
        BadRecipe: it is no TOML, or a key is unknown or its value impossible; the message names the key.
    """
    try:
        document = tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise NotFound(f"{path}: no recipe there; check the path") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise BadRecipe(f"{path}: no TOML ({error})") from None
    except OSError as error:
        raise BadRecipe(f"{path}: cannot be read ({error.strerror})") from None
    for override in overrides:
        _apply(document, override)
    try:
        return Recipe.model_validate(document)
    except ValidationError as error:
        first = error.errors()[0]
        key = "".join(f"{part}: " for part in [".".join(str(part) for part in first["loc"])] if part)
        what = {"extra_forbidden": "no key of a recipe", "missing": "must be given"}.get(first["type"], first["msg"])
        what = what.removeprefix("Value error, ")
        raise BadRecipe(f"{path}: {key}{what}; the keys are in schemas/recipe.schema.json") from None


def recipe_schema() -> dict[str, Any]:
    """JSON Schema of a recipe, as schemas/recipe.schema.json holds it."""
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **Recipe.model_json_schema()}


def _apply(document: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    parts = key.strip().split(".")
    if not equals or len(parts) != 2 or not all(parts):
        raise BadRecipe(f"--set {override}: write it as section.key=value, such as train.beta=0.02")
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        value = text
    section = document.setdefault(parts[0], {})
    if not isinstance(section, dict):
        raise BadRecipe(f"--set {override}: {parts[0]} is no section")
    section[parts[1]] = value

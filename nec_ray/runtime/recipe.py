"""Recipes: what to train, as TOML; closed, so that a misspelt key is an error and not a default."""

from collections.abc import Sequence
from itertools import accumulate
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from nec_ray.config import Section, Text, check, override, read_toml, schema
from nec_ray.errors import BadRecipe


class DataSection(Section):
    """What is trained on."""

    catalog: Text
    """Tile catalog: a path or URL."""
    title: str | None = Field(default=None, min_length=1)
    """What the data is called in the codec's lineage; the catalog's title or address where not given."""
    bands: list[Annotated[str, Field(min_length=1)]] | None = Field(default=None, min_length=1)
    """Bands by name; all of the catalog's where not given, or those of `model.inputs` where mp_mae is pretrained."""
    size: int = Field(ge=8, le=1024)
    """Pixels a side that every tile is resized to; mp_mae's pretraining takes a random window of that size instead."""
    normalise: Literal["tiles", "imagenet"] = "tiles"
    """Whose mean and deviation scale the pixels: the tiles' own, or ImageNet's, which published weights expect. Where
    mp_mae is pretrained, MMEarth's of Sentinel-2 L2A scale them for the adaptation, too."""
    mean: list[float] | None = Field(default=None, min_length=1)
    """Of each band, in the pixels' units, with `std` in place of `normalise`: what given weights were trained with."""
    std: list[Annotated[float, Field(gt=0)]] | None = Field(default=None, min_length=1)
    """Standard deviation of each band; see `mean`."""
    augment: list[Literal["flip", "turn", "crop"]] = Field(default=["flip", "turn"])
    """What is done to a tile each time it is seen: mirrored, turned by quarters, or a random part of 0.2 to 1 of its
    area resized to the whole; overhead imagery has no upright. Pretraining of mp_mae has its window alone."""
    max_tiles: int = Field(default=100_000, ge=8)
    """Tiles read, once; an even sample of a larger catalog. Each worker keeps its share in a temporary file."""

    @field_validator("bands")
    @classmethod
    def _each_once(cls, bands: list[str] | None) -> list[str] | None:
        twice = [name for name in bands or [] if (bands or []).count(name) > 1]
        if twice:
            raise ValueError(f"{twice[0]} is there twice; give each band once")
        return bands


_MP_MAE_MASK = 0.6


class ModelSection(Section):
    """Which masked autoencoder."""

    family: str = "mae_vit"
    """mae_vit, a vision transformer, or mp_mae, MP-MAE's ConvNeXt V2, which is pretrained on catalogs of MMEarth; or
    another module of `nec_ray.models.families`."""
    size: str = "tiny"
    """mae_vit: micro to large; mp_mae: atto, femto, pico, nano, tiny."""
    patch: int = Field(default=16, ge=1, le=64)
    """mp_mae: 8, 16 or 32."""
    stages: list[Annotated[int, Field(ge=1, le=4)]] | None = Field(default=None, min_length=1, max_length=4)
    """mp_mae: the stages whose feature maps are compressed, coarse first, such as [4, 3]; [4], the last, has a token a
    patch, each earlier stage four times as many of half the channels. A layer of a payload is of one stage."""
    depth: int | None = Field(default=None, ge=2, le=48)
    """mae_vit: encoder blocks; those of the size where not given."""
    init: str | None = Field(default=None, min_length=1)
    """Weights to begin from: a .pth or .safetensors file, path or URL, of a published MAE or ViT (mp_mae: of MMEarth)
    or of an earlier run's OUT/weights.safetensors; random weights where not given."""
    layers: list[Annotated[int, Field(ge=1)]] | None = Field(default=None, min_length=1, max_length=64)
    """Channels of each layer of a payload, trained so that every prefix of the layers is an embedding; one layer, or
    one a stage, where not given."""
    step: float | None = Field(default=None, ge=1e-3, le=100)
    """Round the latent's coordinates along its principal axes (transform coding), in steps of as many standard
    deviations of its channels; the decoder and consumers see the latent's own channels. Where not given, the channels
    themselves are rounded to integers, as in the paper, whose encoder is trained to that."""
    entropy: str = "factorized"
    """Densities of the channels: factorized, as in the paper, or another module of `nec_ray.models.entropy_models`."""
    inputs: Literal["rgb", "s2"] | None = None
    """Pretraining of mp_mae: the encoder's bands, B2, B3 and B4 of Sentinel-2 or its 12 without B10; s2 where not
    given."""
    targets: Literal["s2", "pixel", "image", "all"] | None = None
    """Pretraining of mp_mae: what is predicted, Sentinel-2 alone, or with MMEarth's pixel modalities, its image
    modalities, or all; all where not given."""
    weighting: Literal["uncertainty", "equal"] | None = None
    """Pretraining of mp_mae: how the tasks' losses are weighted; by learned uncertainty where not given."""
    weights: Literal["float32", "float16"] = "float32"
    """Type in which the codec keeps its weights; the encoder computes in float32."""


class TrainSection(Section):
    """How it is trained: MAE pretraining, then adaptation with the entropy model."""

    pretrain_epochs: int = Field(default=100, ge=0)
    adapt_epochs: int = Field(default=20, ge=0)
    """0 ends with the pretrained weights, OUT/weights.safetensors, and no codec."""
    beta: float = Field(default=0.01, ge=0, le=100)
    """Weight of the rate: the loss is MSE + beta * bits per element. The paper's lambdas of 1e7, 1e8, 1e9 and 1e10 are
    0.98, 0.098, 0.0098 and 0.00098: its loss sums the bits of 256 tiles of 50 tokens of 768 channels."""
    trainable: Literal["entropy", "entropy+patch", "paper", "all"] = "paper"
    """What adaptation trains: the entropy model alone, the patch embedding too, the paper's set, or everything."""
    mask_ratio: float = Field(default=0.75, ge=0, lt=1)
    """Share of masked patches; of mp_mae 0.6 where not given."""
    adapt_mask_ratio: float | None = Field(default=None, ge=0, lt=1)
    """Share in adaptation; `mask_ratio` where not given. Whole tiles, 0, are what will be encoded."""
    batch_size: int = Field(default=256, ge=1)
    """Tiles a step, over all workers."""
    accumulate: int = Field(default=1, ge=1)
    """Parts that a worker computes its tiles of a step in, one after the other: less memory, the same gradients."""
    precision: Literal["float32", "bfloat16"] = "float32"
    """Of activations (autocast); weights and the entropy model stay float32."""
    lr: float = Field(default=1e-3, gt=0, le=1)
    """Peak learning rate of pretraining."""
    adapt_lr: float = Field(default=5e-4, gt=0, le=1)
    """Peak learning rate of adaptation; of the entropy model's densities, which start far too wide, 10 times that."""
    weight_decay: float = Field(default=0.05, ge=0)
    warmup: float = Field(default=0.05, ge=0, lt=1)
    """Share of each phase's steps over which the learning rate rises."""
    seed: int = Field(default=0, ge=0, lt=2**63)
    workers: int = Field(default=1, ge=1, le=1024)
    """Ray Train workers."""
    checkpoint_every: int = Field(default=10, ge=1)
    """Epochs between checkpoints."""


class Recipe(Section):
    """A whole recipe."""

    data: DataSection
    model: ModelSection = ModelSection()
    train: TrainSection = TrainSection()

    @property
    def pretrains_mp_mae(self) -> bool:
        """Whether modalities are predicted, before the adaptation if there is one."""
        return self.model.family == "mp_mae" and self.train.pretrain_epochs > 0

    @model_validator(mode="before")
    @classmethod
    def _mask_of_its_family(cls, document: Any) -> Any:
        """A recipe as TOML or JSON has it, with the mask that MMEarth's masked autoencoder was trained with."""
        if not isinstance(document, dict) or not isinstance(document.get("model"), dict):
            return document
        train = document.get("train", {})
        if document["model"].get("family") != "mp_mae" or not isinstance(train, dict):
            return document
        return {**document, "train": {"mask_ratio": _MP_MAE_MASK, **train}}

    @model_validator(mode="after")
    def _model_is_of_its_family(self) -> "Recipe":
        model = self.model
        from nec_ray.models.entropy_models import names as entropies
        from nec_ray.models.families import family, names  # which load torch

        if model.family not in names():
            raise ValueError(f"model.family {model.family} is none of {', '.join(names())}")
        of = family(model.family)
        if model.size not in of.sizes:
            raise ValueError(f"model.size {model.size} is none of {model.family}: {', '.join(of.sizes)}")
        of.check(model)
        if model.layers and of.widths:
            _check_layers(model.layers, of.widths(model))
        if model.entropy not in entropies():
            raise ValueError(f"model.entropy {model.entropy} is none of {', '.join(entropies())}")
        if model.family == "mp_mae" and not self.train.pretrain_epochs and not model.init:
            raise ValueError(
                "model.family mp_mae is adapted from pretrained weights; "
                "give them as model.init, or train.pretrain_epochs"
            )
        for key in ("inputs", "targets", "weighting"):
            if getattr(model, key) and not self.pretrains_mp_mae:
                raise ValueError(f"model.{key} is for the pretraining of model.family mp_mae")
        given = self.data.bands or self.data.normalise != "tiles" or self.data.mean or self.data.std
        if self.pretrains_mp_mae and given:
            raise ValueError(
                "mp_mae is pretrained on the bands of model.inputs by MMEarth's statistics; "
                "leave data.bands, data.normalise, data.mean and data.std out"
            )
        return self

    @model_validator(mode="after")
    def _sections_fit(self) -> "Recipe":
        size, patch, how = self.data.size, self.model.patch, self.train
        if size % patch:
            raise ValueError(f"data.size {size} is no multiple of model.patch {patch}")
        if how.batch_size % how.workers:
            raise ValueError(f"train.batch_size {how.batch_size} is no multiple of train.workers {how.workers}")
        if how.batch_size < how.workers * how.accumulate:
            raise ValueError(f"train.batch_size {how.batch_size} is less than train.workers x train.accumulate")
        if not how.pretrain_epochs + how.adapt_epochs:
            raise ValueError("train.pretrain_epochs and train.adapt_epochs are both 0; nothing would be trained")
        if how.trainable != "all" and not how.pretrain_epochs and not self.model.init:
            raise ValueError(f"train.pretrain_epochs 0 and train.trainable {how.trainable} would freeze random weights")
        if self.data.normalise == "imagenet" and self.data.bands and len(self.data.bands) != 3:
            raise ValueError("data.normalise imagenet is for data.bands of red, green and blue")
        mean, std = self.data.mean or [], self.data.std or []
        if len(mean) != len(std) or (mean and self.data.bands and len(mean) != len(self.data.bands)):
            raise ValueError("data.mean and data.std go together, a number a band each")
        if mean and self.data.normalise != "tiles":
            raise ValueError(f"data.normalise {self.data.normalise} or data.mean and data.std, not both")
        return self


def _check_layers(layers: Sequence[int], widths: Sequence[int]) -> None:
    """Refuse layers that `nec.NeuralEmbeddingCompressor` cannot be made of.

    Args:
        layers: channels of each.
        widths: channels of each grid scale of the latent.

    Raises:
        ValueError: they are not the latent's channels, or one has channels of two scales.
    """
    if sum(layers) != sum(widths):
        raise ValueError(f"model.layers {layers} are {sum(layers)} channels, the model has {sum(widths)}")
    if not set(accumulate(widths)) <= set(accumulate(layers)):
        raise ValueError(f"model.layers {layers}: one would hold channels of two stages, which have {list(widths)}")


def read_recipe(path: Path, overrides: Sequence[str] = ()) -> Recipe:
    """Recipe of a TOML file.

    Args:
        path: the file.
        overrides: `section.key=value`, each value as TOML (a bare word is a string).

    Raises:
        NotFound: no such file.
        BadRecipe: it is no TOML, or a key is unknown or its value impossible; the message names the key.
    """
    document = read_toml(path, "recipe")
    for text in overrides:
        _apply(document, text)
    return check(Recipe, document, path, "recipe")


def recipe_schema() -> dict[str, Any]:
    """JSON Schema of a recipe, as schemas/recipe.schema.json holds it."""
    return schema(Recipe)


def _apply(document: dict[str, Any], text: str) -> None:
    key, equals, _ = text.partition("=")
    if not equals or len(key.split(".")) != 2:
        raise BadRecipe(f"--set {text}: write it as section.key=value, such as train.beta=0.02")
    override(document, text)

"""What codec.json declares: the model, its input, the latent's shape and layers, where it came from."""

import math
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

MAX_CHANNELS = 16_384
"""A dense channel's decoding table takes 4 KiB, whatever the tile's size."""
MAX_TOKENS = 65_536
MAX_SYMBOLS = 1 << 28  # of one tile: bounds what a hostile codec can make a reader allocate
MAX_WIDTH = 4096

Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
FileName = Annotated[str, Field(pattern=r"^[a-z0-9_]+\.safetensors$")]


class _Closed(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class InputSpec(_Closed):
    """What the encoder is fed: bands by name, scaled `(value - mean) / std`, resized to `size` x `size` pixels."""

    bands: list[str] = Field(min_length=1, max_length=256)
    mean: list[float]
    std: list[Annotated[float, Field(gt=0)]]
    size: int = Field(ge=1, le=8192)

    @model_validator(mode="after")
    def _one_number_a_band(self) -> "InputSpec":
        if not len(self.bands) == len(self.mean) == len(self.std):
            raise ValueError("bands, mean and std must be of one length")
        return self


class LayerSpec(_Closed):
    """A group of consecutive channels with its own bytes in the payload, in order of importance."""

    channels: int = Field(ge=1, le=MAX_CHANNELS)
    tokens: int = Field(ge=1, le=MAX_TOKENS)
    """Tokens of a tile at this layer's grid scale; the most there can be, where tiles differ in size."""
    scale: int = Field(default=1, ge=1, le=64)
    """Grid scale: the layer's token grid is the codec's grid divided by this, rounded up."""
    table_sets: int = Field(default=1, ge=1, le=256)
    """Sets of tables among which a selector stream picks for each token; 1 where there is no such stream."""


class Lineage(_Closed):
    """Where a codec came from."""

    parent: str | None = None
    """Checkpoint or codec that training began from; null where it began from random weights."""
    data: str
    """What it was trained on."""
    licence: str
    """Terms of the training data."""
    beta: float = Field(ge=0)
    """Weight of the rate: the loss is MSE + beta * bits per element."""
    bits_per_symbol: float = Field(ge=0)
    """Measured on real payloads when the codec was made."""


class CodecSpec(_Closed):
    """The whole of codec.json; its canonical bytes name the codec."""

    format_version: Literal[1] = 1
    family: str = Field(pattern="^[a-z][a-z0-9_]{0,31}$")
    """Of the model; readers decode without knowing it."""
    architecture: dict[str, int]
    encoder_id: Sha256
    input: InputSpec
    grid: tuple[int, int]
    """Token rows and columns, at scale 1."""
    channels: int = Field(ge=1, le=MAX_CHANNELS)
    layers: list[LayerSpec] = Field(min_length=1, max_length=64)
    width: int | None = Field(default=None, ge=1, le=MAX_WIDTH)
    """Channels of an embedding, where the codec's own are coordinates along some axes of it (`transform`); None where
    they are the embedding's."""
    lineage: Lineage
    files: dict[FileName, Sha256]

    @model_validator(mode="after")
    def _shapes_fit(self) -> "CodecSpec":
        if min(self.grid) < 1 or self.tokens > MAX_TOKENS:
            raise ValueError(f"grid {self.grid} has {self.tokens} tokens, 1 to {MAX_TOKENS} are allowed")
        if sum(layer.channels for layer in self.layers) != self.channels:
            raise ValueError("the layers' channels must add up to the codec's")
        if any(layer.tokens != math.prod(scaled_grid(self.grid, layer.scale)) for layer in self.layers):
            raise ValueError("a layer's tokens are not those of the grid at its scale")
        if self.width is not None and (self.width < self.channels or len({layer.scale for layer in self.layers}) > 1):
            raise ValueError("width is for layers of one scale, and at least as many as their channels")
        if self.symbols > MAX_SYMBOLS or self.tokens * (self.width or 0) > MAX_SYMBOLS:
            raise ValueError(f"a tile of {self.symbols} symbols is over the limit of {MAX_SYMBOLS}")
        return self

    @property
    def tokens(self) -> int:
        """Tokens of the grid: the most that a layer has."""
        return self.grid[0] * self.grid[1]

    @property
    def token_grid(self) -> tuple[int, int]:
        """Token rows and columns of the finest layers: the grid, unless the layers of scale 1 were cut off."""
        return scaled_grid(self.grid, min(layer.scale for layer in self.layers))

    @property
    def symbols(self) -> int:
        """Symbols of a tile, of all layers."""
        return sum(layer.tokens * layer.channels for layer in self.layers)

    @property
    def values(self) -> int:
        """Numbers of a tile's embedding: as many as symbols, or more where the codec's channels are coordinates."""
        return sum(tokens * channels for tokens, channels in self.embedding_shapes())

    def embedding_shapes(self, count: int | None = None) -> list[tuple[int, int]]:
        """Tokens and channels of what the first `count` layers, all where it is None, decode to, of each grid scale.

        Raises:
            ValueError: the codec has not that many.
        """
        shapes: dict[int, list[int]] = {}
        for layer in self.first_layers(count):
            shapes.setdefault(layer.scale, [layer.tokens, 0])[1] += layer.channels
        return [(tokens, self.width or channels) for tokens, channels in shapes.values()]

    def document(self) -> dict[str, Any]:
        """What codec.json holds; without `width` where there is none, as codecs had it before there was one."""
        document = self.model_dump(mode="json")
        if self.width is None:
            del document["width"]
        return document

    def first_layers(self, count: int | None = None) -> list[LayerSpec]:
        """The first `count` layers, all where it is None.

        Raises:
            ValueError: the codec has not that many.
        """
        if count is not None and not 1 <= count <= len(self.layers):
            raise ValueError(f"the codec has {len(self.layers)} layers, not {count}")
        return self.layers[:count]


def scaled_grid(grid: tuple[int, int], scale: int) -> tuple[int, int]:
    """Rows and columns of a grid at a scale: divided by it, rounded up."""
    return -(-grid[0] // scale), -(-grid[1] // scale)


def canonical_json(value: Any) -> bytes:
    """The one way a JSON document is written where its hash names it: sorted keys, no spaces, UTF-8."""
    import json

    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False).encode()

"""A trained head's two files: its tensors, and head.json, which says what it was trained for."""

import hashlib
import json
import math
import struct
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import nn

from nec_ray.codec import Arrays, parts_of
from nec_ray.codec.spec import Sha256, canonical_json
from nec_ray.errors import CodecMismatch, DataError, InputError, UnsupportedFormat
from nec_ray.models.dataset import PulledTiles, on_finest
from nec_ray.models.heads import ClassificationHead, TokenHead
from nec_ray.models.segmentation import IGNORED, PixelHead, SegmentationHead
from nec_ray.models.unet import UNetHead
from nec_ray.storage import Store

FORMAT_VERSION = 3
"""Version 1 had classification heads on whole embeddings or a prefix, not padded; version 2 had no U-Nets. Both are
read too."""
HEAD_TENSORS = "head.safetensors"
HEAD_JSON = "head.json"
DecoderLayer = Literal["none", "frozen", "trained"]
Task = Literal["classification", "multi-label", "segmentation"]
"""Of a tile one class, any number of them, or a class a pixel."""

_FIRST_LAYER = "first_layer."
_Side = Annotated[int, Field(ge=1, le=65_536)]
_Byte = Annotated[int, Field(ge=0, le=255)]


class HeadScale(BaseModel):
    """One of the grid scales that a U-Net reads."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    grid: tuple[_Side, _Side]
    """Token rows and columns."""
    channels: int = Field(ge=1, le=16_384)


class HeadSpec(BaseModel):
    """The whole of head.json: what a head was trained for."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    format_version: Literal[1, 2, 3] = 3
    task: Task = "classification"
    encoder_id: Sha256
    """Encoder whose embeddings it reads; others are refused."""
    layers: Annotated[int, Field(ge=1)] | None
    """First layers of a payload that it reads; null for all."""
    decoder_layer: DecoderLayer
    tokens: int = Field(ge=1, le=65_536)
    """Of the finest grid."""
    channels: int = Field(ge=1, le=16_384)
    """Channels of the embeddings, of all grid scales together."""
    coded_channels: Annotated[int, Field(ge=1, le=16_384)] | None = None
    """Channels that they were coded in: with a transform, embeddings of any layers have all channels. Null in heads of
    older versions, which are not checked for it."""
    padding: int = Field(default=0, ge=0, le=16_384)
    """Channels that `layers` leaves out and the head fills in before the decoder layer."""
    features: int = Field(ge=1, le=65_536)
    """Channels that are standardised and scored: those of the embeddings, or of the decoder layer."""
    heads: Annotated[int, Field(ge=1, le=1024)] | None = None
    """Attention heads; not of segmentation."""
    grid: tuple[_Side, _Side] | None = None
    """Token rows and columns of the finest grid; segmentation only, like all that follow."""
    width: Annotated[int, Field(ge=1, le=65_536)] | None = None
    """Channels of the paper's decoder; null for a U-Net."""
    scales: Annotated[list[HeadScale], Field(min_length=1, max_length=16)] | None = None
    """What a U-Net reads, in the order in which the embeddings' layers come to them; null for the paper's decoder."""
    colours: list[tuple[_Byte, _Byte, _Byte]] | None = None
    """Red, green and blue of each class."""
    classes: list[str] = Field(min_length=2, max_length=65_536)
    sha256: Sha256
    """Of head.safetensors."""

    @model_validator(mode="after")
    def _holds_together(self) -> "HeadSpec":
        if self.padding and self.decoder_layer == "none":
            raise ValueError("padding without a decoder layer")
        if self.task != "segmentation":
            self._check_classification()
        else:
            self._check_segmentation()
        return self

    def _check_classification(self) -> None:
        if self.grid or self.width or self.scales or self.colours or not self.heads:
            raise ValueError("a classification head has attention heads, and neither grid, width, scales nor colours")
        if self.features % self.heads:
            raise ValueError(f"{self.heads} heads do not divide {self.features} channels")

    def _check_segmentation(self) -> None:
        if self.heads or not self.grid or not self.colours or bool(self.width) == bool(self.scales):
            raise ValueError("a segmentation head has grid, colours, width or scales, and no attention heads")
        if self.scales:
            self._check_scales(self.scales)
        if math.prod(self.grid) != self.tokens:
            raise ValueError(f"a grid of {self.grid} does not have {self.tokens} tokens")
        if len(self.classes) > IGNORED or len(self.colours) != len(self.classes):
            raise ValueError(f"{len(self.classes)} classes and {len(self.colours)} colours")

    def _check_scales(self, scales: list[HeadScale]) -> None:
        if sum(scale.channels for scale in scales) != self.channels or self.features != self.channels:
            raise ValueError(f"{self.channels} channels, {self.features} standardised, are not those of the scales")
        if self.decoder_layer != "none" or max((scale.grid for scale in scales), key=math.prod) != self.grid:
            raise ValueError("a U-Net reads the scales as they are, the finest of which is the grid")

    def shapes(self) -> list[tuple[int, int]]:
        """Tokens and channels of the embeddings as the head reads them, of each grid scale for a U-Net."""
        if self.scales is None:
            return [(self.tokens, self.channels)]
        return [(math.prod(scale.grid), scale.channels) for scale in self.scales]


@dataclass(frozen=True)
class TrainedHead:
    """A head and what it was trained for."""

    module: TokenHead
    spec: HeadSpec

    def embeddings(self, where: str, pull: PulledTiles) -> Arrays:
        """A pull's embeddings `as_read`.

        Raises:
            CodecMismatch: see `check_fits`.
        """
        found = self.as_read(pull.embeddings, pull.grids)
        self.check_fits(where, pull.encoder_id, *((part.shape[1], part.shape[2]) for part in parts_of(found)))
        if self.spec.coded_channels not in {None, pull.coded_channels}:
            raise CodecMismatch(
                f"{where}: embeddings coded in {pull.coded_channels} channels, the head was trained for "
                f"{self.spec.coded_channels}; pull the same layers, or train a head on these"
            )
        return found

    def as_read(self, embeddings: Arrays, grids: Sequence[tuple[int, int]]) -> Arrays:
        """Embeddings of grid scales as the head reads them: on the finest of the grids, or as they are for a U-Net."""
        return embeddings if self.spec.scales else on_finest(embeddings, grids)

    def check_fits(self, where: str, encoder_id: str, *shapes: tuple[int, int]) -> None:
        """Refuse embeddings that this head was not trained for.

        Args:
            where: names them.
            encoder_id: of the encoder that made them.
            shapes: tokens and channels, of each grid scale for a U-Net.

        Raises:
            CodecMismatch: another encoder, or another shape.
        """
        if encoder_id != self.spec.encoder_id:
            raise CodecMismatch(
                f"{where}: embeddings of encoder {encoder_id[:12]}, the head was trained for encoder "
                f"{self.spec.encoder_id[:12]}; train a head on these"
            )
        if list(shapes) != self.spec.shapes():
            found, wanted = (" and ".join(f"{t} x {c}" for t, c in some) for some in (shapes, self.spec.shapes()))
            raise CodecMismatch(
                f"{where}: embeddings of {found} (tokens x channels), the head reads {wanted}; pull the same layers, "
                "or train a head on these"
            )


def save_head(
    folder: Path,
    module: TokenHead,
    *,
    classes: list[str],
    encoder_id: str,
    layers: int | None,
    decoder_layer: DecoderLayer,
    tokens: int,
    channels: int,
    coded_channels: int | None = None,
    colours: list[tuple[int, int, int]] | None = None,
    task: Task = "classification",
) -> HeadSpec:
    """Write head.safetensors and head.json to `folder`; the keywords are fields of `HeadSpec`.

    A `PixelHead` is of its own task, whatever `task` says.
    """
    data = save_tensors({name: t.detach().cpu().contiguous() for name, t in module.state_dict().items()})
    own: dict[str, Any]
    if isinstance(module, SegmentationHead):
        own = {"width": module.width}
    elif isinstance(module, UNetHead):
        own = {"scales": [{"grid": g, "channels": c} for g, c in zip(module.grids, module.channels, strict=True)]}
    elif isinstance(module, ClassificationHead):
        own = {"task": task, "heads": module.pool.num_heads}
    else:
        raise TypeError(f"{type(module).__name__} is no head that has files")
    if isinstance(module, PixelHead):
        own |= {"task": "segmentation", "grid": module.grid, "colours": colours}
    spec = HeadSpec(
        encoder_id=encoder_id,
        layers=layers,
        decoder_layer=decoder_layer,
        tokens=tokens,
        channels=channels,
        coded_channels=coded_channels,
        padding=0 if module.padding is None else len(module.padding),
        features=len(module.mean),
        classes=classes,
        sha256=hashlib.sha256(data).hexdigest(),
        **own,
    )
    folder.mkdir(parents=True, exist_ok=True)
    (folder / HEAD_TENSORS).write_bytes(data)
    (folder / HEAD_JSON).write_bytes(canonical_json(spec.model_dump(mode="json")))
    return spec


def load_head(folder: str | Path, first_layer: Callable[[], nn.Module] | None = None) -> TrainedHead:
    """Read a head that `save_head` wrote: a `ClassificationHead`, `SegmentationHead` or `UNetHead`, as the spec says.

    Args:
        folder: path or URL of the folder.
        first_layer: makes the codec's first decoder layer; called for a head that was trained with one, whose
            weights then take the place of the layer's own.

    Raises:
        NotFound: head.json or head.safetensors is not there.
        DataError: either is damaged.
        UnsupportedFormat: written by a later release.
        InputError: the head needs the decoder layer and none was given.
        CodecMismatch: `first_layer` is not of the shape the head was trained with.
    """
    store = Store(folder)
    spec = _read_spec(store)
    data = store.read(HEAD_TENSORS)
    if hashlib.sha256(data).hexdigest() != spec.sha256:
        raise DataError(f"{store.url}/{HEAD_TENSORS}: not the bytes that {HEAD_JSON} names; train the head again")
    if spec.decoder_layer == "none":
        return TrainedHead(_build(store, spec, data, None), spec)
    if first_layer is None:
        raise InputError(f"{store.url}: the head reads the first decoder layer; give its codec's")
    return TrainedHead(_build(store, spec, data, first_layer()), spec)


def _read_spec(store: Store) -> HeadSpec:
    where = f"{store.url}/{HEAD_JSON}"
    raw = store.read(HEAD_JSON)
    try:
        version = json.loads(raw)["format_version"]
        if isinstance(version, int) and version > FORMAT_VERSION:
            raise UnsupportedFormat(
                f"{where}: head format {version}, this release reads up to {FORMAT_VERSION}; update nec_ray"
            )
        return HeadSpec.model_validate_json(raw)
    except (ValueError, KeyError, TypeError, RecursionError, ValidationError):
        raise DataError(f"{where}: not a head's description; train the head again") from None


def _build(store: Store, spec: HeadSpec, data: bytes, first_layer: nn.Module | None) -> TokenHead:
    where = f"{store.url}/{HEAD_TENSORS}"
    try:
        tensors = load_tensors(data)
    except (SafetensorError, ValueError, struct.error):
        raise DataError(f"{where}: not a safetensors file; train the head again") from None
    module = _empty(spec)
    own = {name: t for name, t in tensors.items() if not name.startswith(_FIRST_LAYER)}
    _load(
        module,
        own,
        DataError(f"{where}: its tensors do not fit {HEAD_JSON}; train the head again"),
        assign=True,
    )
    if first_layer is not None:
        theirs = {name.removeprefix(_FIRST_LAYER): t for name, t in tensors.items() if name not in own}
        _load(
            first_layer,
            theirs,
            CodecMismatch(f"{where}: trained with a decoder layer of another shape; train a head"),
        )
        module.first_layer = first_layer
    return module.eval()


def _empty(spec: HeadSpec) -> TokenHead:
    """A head without storage: sizes that a hostile head.json names cost no memory before the tensors match them."""
    with torch.device("meta"):
        padding = torch.empty(spec.padding) if spec.padding else None
        if spec.scales:
            channels, grids = zip(*((scale.channels, scale.grid) for scale in spec.scales), strict=True)
            return UNetHead(channels, len(spec.classes), grids)
        if spec.grid is None:
            return ClassificationHead(spec.features, len(spec.classes), spec.heads, padding=padding)
        return SegmentationHead(spec.features, len(spec.classes), spec.grid, spec.width, padding=padding)


def _load(module: nn.Module, tensors: Mapping[str, torch.Tensor], refusal: Exception, *, assign: bool = False) -> None:
    wanted = module.state_dict()
    if {n: (t.shape, t.dtype) for n, t in tensors.items()} != {n: (t.shape, t.dtype) for n, t in wanted.items()}:
        raise refusal
    module.load_state_dict(dict(tensors), assign=assign)

"""The classification head: standardised tokens, attention pooling, one linear layer; and its two files.

Source: NEC, section 4 "Scene Classification": timm's AttentionPoolLatent followed by a single linear layer.
"""

import hashlib
import json
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from timm.layers import AttentionPoolLatent
from torch import nn

from nec_ray.codec.spec import Sha256, canonical_json
from nec_ray.errors import CodecMismatch, DataError, InputError, UnsupportedFormat
from nec_ray.storage import Store

FORMAT_VERSION = 1
HEAD_TENSORS = "head.safetensors"
HEAD_JSON = "head.json"
DecoderLayer = Literal["none", "frozen", "trained"]

_CHANNELS_PER_HEAD = 64  # 768 channels have 12 heads in the paper
_STD_FLOOR = 0.05  # of the root mean square over channels: a nearly dead channel must not be blown up into noise
_FIRST_LAYER = "first_layer."


class LatentQueryPool(AttentionPoolLatent):
    """timm's AttentionPoolLatent, computed for its one query without the keys and values of every token.

    With a single learned query, `q . (W_k x)` is `(W_k^T q) . x` and `sum a (W_v x)` is `W_v (sum a x)`: the
    same function and the same parameters at a fraction of the work, which is what trains a head on a CPU.
    """

    def forward(self, x: torch.Tensor, attn_mask: torch.Tensor | None = None) -> torch.Tensor:
        """Pool `x` float (tiles, tokens, channels) to (tiles, channels); no mask is taken."""
        if attn_mask is not None:
            raise NotImplementedError("LatentQueryPool pools every token")
        heads, channels = self.num_heads, x.shape[-1]
        query = self.q(self.latent[0, 0]).reshape(heads, -1) * self.scale
        key, value = self.kv.weight.reshape(2, heads, -1, channels)
        # The key's bias adds one number to all of a query's scores, which softmax takes out again.
        scores = x @ torch.einsum("hd,hdc->ch", query, key)
        pooled = scores.softmax(dim=1).transpose(1, 2) @ x
        out = torch.einsum("nhc,hdc->nhd", pooled, value).flatten(1) + self.kv.bias[channels:]
        out = self.proj(out)
        return out + self.mlp(self.norm(out))


class ClassificationHead(nn.Module):
    """Scores of classes from a tile's tokens.

    Args:
        channels: channels of a token as it comes from the archive, or from `first_layer` where there is one.
        classes: number of classes.
        heads: attention heads; they must divide the channels. `default_heads` where it is None.
        first_layer: the codec's first decoder layer, put before the pooling.

    Attributes:
        mean, std: (channels,) buffers that standardise tokens before the pooling; see `fit_scale`.
    """

    mean: torch.Tensor
    std: torch.Tensor

    def __init__(
        self, channels: int, classes: int, heads: int | None = None, first_layer: nn.Module | None = None
    ) -> None:
        super().__init__()
        self.first_layer = first_layer
        self.register_buffer("mean", torch.zeros(channels))
        self.register_buffer("std", torch.ones(channels))
        self.pool = LatentQueryPool(channels, num_heads=heads or default_heads(channels))
        self.classify = nn.Linear(channels, classes)

    def features(self, embeddings: torch.Tensor) -> torch.Tensor:
        """Tokens as the pooling gets them, before standardisation: (tiles, tokens, channels)."""
        return embeddings if self.first_layer is None else self.first_layer(embeddings)

    def score(self, features: torch.Tensor) -> torch.Tensor:
        """Logits (tiles, classes) of what `features` gave."""
        return self.classify(self.pool((features - self.mean) / self.std))

    def forward(self, embeddings: torch.Tensor) -> torch.Tensor:
        """Logits (tiles, classes) of embeddings float32 (tiles, tokens, channels)."""
        return self.score(self.features(embeddings))

    @torch.no_grad()
    def fit_scale(self, features: torch.Tensor) -> None:
        """Set `mean` and `std` to those of `features` (tiles, tokens, channels), over tiles and tokens."""
        var, mean = torch.var_mean(features, dim=(0, 1), correction=0)
        floor = _STD_FLOOR * var.mean().sqrt()
        self.mean.copy_(mean)
        self.std.copy_(var.sqrt().clamp_min(floor if floor > 0 else torch.ones_like(floor)))


def default_heads(channels: int) -> int:
    """The most attention heads that divide the channels and leave each at least 64 of them."""
    return max(h for h in range(1, max(1, channels // _CHANNELS_PER_HEAD) + 1) if channels % h == 0)


class HeadSpec(BaseModel):
    """The whole of head.json: what a head was trained for."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    format_version: Literal[1] = 1
    task: Literal["classification"] = "classification"
    encoder_id: Sha256
    """Encoder whose embeddings it reads; others are refused."""
    layers: Annotated[int, Field(ge=1)] | None
    """First layers of a payload that it reads; null for all."""
    decoder_layer: DecoderLayer
    tokens: int = Field(ge=1, le=65_536)
    channels: int = Field(ge=1, le=65_536)
    """Channels of the embeddings."""
    features: int = Field(ge=1, le=65_536)
    """Channels that are pooled: those of the embeddings, or of the decoder layer."""
    heads: int = Field(ge=1, le=1024)
    classes: list[str] = Field(min_length=2, max_length=65_536)
    sha256: Sha256
    """Of head.safetensors."""

    @model_validator(mode="after")
    def _heads_divide(self) -> "HeadSpec":
        if self.features % self.heads:
            raise ValueError(f"{self.heads} heads do not divide {self.features} channels")
        return self


@dataclass(frozen=True)
class TrainedHead:
    """A head and what it was trained for."""

    module: ClassificationHead
    spec: HeadSpec

    def check_fits(self, where: str, encoder_id: str, tokens: int, channels: int) -> None:
        """Refuse embeddings that this head was not trained for; `where` names them.

        Raises:
            CodecMismatch: another encoder, or another shape.
        """
        if encoder_id != self.spec.encoder_id:
            raise CodecMismatch(
                f"{where}: embeddings of encoder {encoder_id[:12]}, the head was trained for encoder "
                f"{self.spec.encoder_id[:12]}; train a head on these"
            )
        if (tokens, channels) != (self.spec.tokens, self.spec.channels):
            raise CodecMismatch(
                f"{where}: embeddings of {tokens} tokens x {channels} channels, the head reads "
                f"{self.spec.tokens} x {self.spec.channels}; pull the same layers, or train a head on these"
            )


def save_head(
    folder: Path,
    module: ClassificationHead,
    *,
    classes: list[str],
    encoder_id: str,
    layers: int | None,
    decoder_layer: DecoderLayer,
    tokens: int,
    channels: int,
) -> HeadSpec:
    """Write head.safetensors and head.json to `folder`; the keywords are fields of `HeadSpec`."""
    data = save_tensors({name: t.detach().cpu().contiguous() for name, t in module.state_dict().items()})
    spec = HeadSpec(
        encoder_id=encoder_id,
        layers=layers,
        decoder_layer=decoder_layer,
        tokens=tokens,
        channels=channels,
        features=len(module.mean),
        heads=module.pool.num_heads,
        classes=classes,
        sha256=hashlib.sha256(data).hexdigest(),
    )
    folder.mkdir(parents=True, exist_ok=True)
    (folder / HEAD_TENSORS).write_bytes(data)
    (folder / HEAD_JSON).write_bytes(canonical_json(spec.model_dump()))
    return spec


def load_head(folder: str | Path, first_layer: Callable[[], nn.Module] | None = None) -> TrainedHead:
    """Read a head that `save_head` wrote.

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
    except (ValueError, KeyError, TypeError, ValidationError):
        raise DataError(f"{where}: not a head's description; train the head again") from None


def _build(store: Store, spec: HeadSpec, data: bytes, first_layer: nn.Module | None) -> ClassificationHead:
    where = f"{store.url}/{HEAD_TENSORS}"
    try:
        tensors = load_tensors(data)
    except (SafetensorError, ValueError, struct.error):
        raise DataError(f"{where}: not a safetensors file; train the head again") from None
    with torch.device("meta"):
        module = ClassificationHead(spec.features, len(spec.classes), spec.heads)
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


def _load(module: nn.Module, tensors: Mapping[str, torch.Tensor], refusal: Exception, *, assign: bool = False) -> None:
    wanted = module.state_dict()
    if {n: (t.shape, t.dtype) for n, t in tensors.items()} != {n: (t.shape, t.dtype) for n, t in wanted.items()}:
        raise refusal
    module.load_state_dict(dict(tensors), assign=assign)

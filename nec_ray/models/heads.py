"""What heads have in common, and the classification head: attention pooling, one linear layer.

Source: NEC, section 4 "Scene Classification": timm's AttentionPoolLatent followed by a single linear layer.
"""

from typing import Any

import torch
from timm.layers import AttentionPoolLatent
from torch import nn

Tokens = Any
"""A tensor (tiles, tokens, channels); for a head that reads several grid scales, a tuple of one such tensor a scale."""

_CHANNELS_PER_HEAD = 64  # 768 channels have 12 heads in the paper
_RELEASED = {512: 16}  # with the decoder layer, in the paper's code: as many as the decoder's blocks have
_STD_FLOOR = 0.05  # of the root mean square over channels: a nearly dead channel must not be blown up into noise


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


class TokenHead(nn.Module):
    """What every head does with tokens first: the codec's first decoder layer, where wanted, then standardising.

    Args:
        channels: channels of a token as it comes from the archive, or from `first_layer` where there is one.
        first_layer: the codec's first decoder layer.
        padding: (missing channels,) float32 that stand for the channels that a prefix of layers leaves out:
            `first_layer` reads whole embeddings.

    Attributes:
        mean, std: (channels,) buffers that standardise tokens; see `fit_scale`.
        padding: the buffer of that name; None where nothing is missing.
    """

    mean: torch.Tensor
    std: torch.Tensor
    padding: torch.Tensor | None

    def __init__(
        self, channels: int, first_layer: nn.Module | None = None, padding: torch.Tensor | None = None
    ) -> None:
        super().__init__()
        self.first_layer = first_layer
        self.register_buffer("padding", padding)  # None is no part of the state
        self.register_buffer("mean", torch.zeros(channels))
        self.register_buffer("std", torch.ones(channels))

    def features(self, embeddings: torch.Tensor) -> torch.Tensor:
        """Tokens before standardisation, (tiles, tokens, channels), of embeddings as they come from the archive."""
        if self.first_layer is None:
            return embeddings
        if self.padding is not None:
            missing = self.padding.expand(*embeddings.shape[:2], -1)
            embeddings = torch.cat([embeddings, missing], dim=2)
        features: torch.Tensor = self.first_layer(embeddings)
        return features

    def score(self, features: torch.Tensor) -> torch.Tensor:
        """Logits of what `features` gave."""
        raise NotImplementedError

    def forward(self, embeddings: torch.Tensor) -> torch.Tensor:
        """Logits of embeddings float32 (tiles, tokens, channels)."""
        return self.score(self.features(embeddings))

    def standardised(self, features: torch.Tensor) -> torch.Tensor:
        """`features` with mean 0 and standard deviation 1 in every channel."""
        return (features - self.mean) / self.std

    @torch.no_grad()
    def fit_scale(self, features: torch.Tensor) -> None:
        """Set `mean` and `std` to those of `features` (tiles, tokens, channels), over tiles and tokens."""
        mean, std = mean_and_std(features)
        self.mean.copy_(mean)
        self.std.copy_(std)


def mean_and_std(features: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """What standardises each channel (channels,) of features (tiles, tokens, channels), over tiles and tokens."""
    var, mean = torch.var_mean(features, dim=(0, 1), correction=0)
    floor = _STD_FLOOR * var.mean().sqrt()
    return mean, var.sqrt().clamp_min(floor if floor > 0 else torch.ones_like(floor))


class ClassificationHead(TokenHead):
    """Scores of classes from a tile's tokens: logits (tiles, classes).

    Args:
        channels: see `TokenHead`.
        classes: number of classes.
        heads: attention heads; they must divide the channels. `default_heads` where it is None.
        first_layer: see `TokenHead`.
        padding: see `TokenHead`.
    """

    def __init__(
        self,
        channels: int,
        classes: int,
        heads: int | None = None,
        first_layer: nn.Module | None = None,
        padding: torch.Tensor | None = None,
    ) -> None:
        super().__init__(channels, first_layer, padding)
        self.pool = LatentQueryPool(channels, num_heads=heads or default_heads(channels))
        self.classify = nn.Linear(channels, classes)

    def score(self, features: torch.Tensor) -> torch.Tensor:
        """Logits (tiles, classes) of what `features` gave."""
        logits: torch.Tensor = self.classify(self.pool(self.standardised(features)))
        return logits


def default_heads(channels: int) -> int:
    """The most attention heads that divide the channels and leave each at least 64 of them; of 512, the paper's 16."""
    if channels in _RELEASED:
        return _RELEASED[channels]
    return max(h for h in range(1, max(1, channels // _CHANNELS_PER_HEAD) + 1) if channels % h == 0)

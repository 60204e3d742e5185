"""U-Net decoder over features of several scales: classes for every pixel; and the head that is one, on embeddings.

Source: MMEarth, section 5.2; `convnextv2_unet.py` of MMEarth-train, whose decoder this is, for any number of scales.
There the features are those of the first convolution, the stem, and the second to the fourth stage. The head reads the
grid scales of a payload; NEC leaves multi-scale embeddings open.
"""

import math
from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import nn

from nec_ray.codec import joined, parts_of
from nec_ray.errors import InputError
from nec_ray.models.heads import Tokens, mean_and_std
from nec_ray.models.segmentation import UPSAMPLING, PixelHead

_EPS = 1e-6
_DOUBLINGS = int(math.log2(UPSAMPLING))
_LEAST = 16
Grid = tuple[int, int]
"""Token rows and columns."""


class UNetDecoder(nn.Module):
    """Logits of the finest features' size; `to_size` of `models.segmentation` brings them to a mask's.

    From the coarsest scale on: nearest neighbours to the next finer size, a convolution to its channels, and the
    features of that scale beside the result.

    Args:
        channels: of the features of each scale, the finest first.
        classes: number of classes.
        doublings: how often the result is doubled in size behind the finest scale, as at the other scales but with
            nothing to put beside it, and half of the channels.
        least: channels of any step; a scale of few would leave no room for the coarser ones, as a LayerNorm of one
            channel leaves nothing of it.

    Raises:
        InputError: no scales, or a size below 1.
    """

    def __init__(self, channels: Sequence[int], classes: int, doublings: int = 0, least: int = 1) -> None:
        super().__init__()
        if not channels or min(channels) < 1 or classes < 1:
            raise InputError(f"channels {tuple(channels)} and {classes} classes: give 1 or more of each")
        self.channels = tuple(channels)
        self.up, given = nn.ModuleList(), channels[-1]
        for finer in reversed(channels[:-1]):
            self.up.append(ConvNormGelu(given, max(least, finer)))
            given = max(least, finer) + finer
        wide = [max(least, (channels[0] // 2) >> n) for n in range(doublings + 1)]
        self.last = ConvNormGelu(given, wide[0])
        self.beyond = nn.ModuleList(ConvNormGelu(a, b) for a, b in pairwise(wide))
        self.head = nn.Conv2d(wide[-1], classes, 1)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.trunc_normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)  # type: ignore[arg-type]

    def forward(self, features: Sequence[torch.Tensor]) -> torch.Tensor:
        """Logits (tiles, classes, rows, columns) of features (tiles, channels, rows, columns), the finest first.

        They have the rows and columns of the finest features, times 2 to the number of doublings.

        Raises:
            InputError: the features have other channels.
        """
        given = tuple(feature.shape[1] for feature in features)
        if given != self.channels:
            raise InputError(f"features of {given} channels; the decoder is for {self.channels}")
        x = features[-1]
        for step, finer in zip(self.up, reversed(features[:-1]), strict=True):
            x = step(nn.functional.interpolate(x, size=finer.shape[2:], mode="nearest"))
            x = torch.cat([x, finer], dim=1)
        x = self.last(x)
        for step in self.beyond:
            x = step(nn.functional.interpolate(x, scale_factor=2, mode="nearest"))
        logits: torch.Tensor = self.head(x)
        return logits


class UNetHead(PixelHead):
    """A U-Net over the grid scales of embeddings: logits (tiles, classes, `UPSAMPLING` * token rows and columns).

    The coarsest scale is brought to the finer ones step by step, each of which joins it as it was pulled (a skip
    connection); behind the finest one there is nothing to join up to `UPSAMPLING` pixels a token. One scale alone is
    decoded likewise, without skip connections.

    Args:
        channels: of each scale, in the order in which embeddings have them: coarse first in the codecs made here.
        classes: number of classes.
        grids: token rows and columns of each scale.
        first_layer: the encoder, where the head is trained on pixels; a codec's first decoder layer has one scale.

    Raises:
        InputError: no scales, not as many channels as grids, or a size below 1.
    """

    def __init__(
        self, channels: Sequence[int], classes: int, grids: Sequence[Grid], first_layer: nn.Module | None = None
    ) -> None:
        if not channels or len(channels) != len(grids):
            raise InputError(f"{len(channels)} numbers of channels and {len(grids)} grids: give both of each scale")
        super().__init__(sum(channels), classes, max(grids, key=math.prod), first_layer)
        self.channels = tuple(channels)
        self.grids = tuple(grids)
        self._finest_first = sorted(range(len(grids)), key=lambda scale: -math.prod(grids[scale]))
        self.decoder = UNetDecoder([channels[i] for i in self._finest_first], classes, _DOUBLINGS, _LEAST)

    def features(self, embeddings: Tokens) -> Tokens:
        """Tokens before standardisation: those of embeddings as they come from the archive, of each scale."""
        return embeddings if self.first_layer is None else self.first_layer(embeddings)

    def score(self, features: Tokens) -> torch.Tensor:
        """Logits (tiles, classes, rows, columns) of what `features` gave.

        Raises:
            InputError: tokens of other scales.
        """
        parts = parts_of(features)
        shapes = [tuple(part.shape[1:]) for part in parts]
        wanted = [(math.prod(grid), width) for grid, width in zip(self.grids, self.channels, strict=True)]
        if shapes != wanted:
            raise InputError(f"tokens x channels {shapes} of the grid scales; the head reads {wanted}")
        maps = [
            part.transpose(1, 2).reshape(len(part), part.shape[2], *grid)
            for part, grid in zip(parts_of(self.standardised(features)), self.grids, strict=True)
        ]
        logits: torch.Tensor = self.decoder([maps[i] for i in self._finest_first])
        return logits

    def standardised(self, features: Tokens) -> Tokens:
        """`features` with mean 0 and standard deviation 1 in every channel."""
        widths = list(self.channels)
        scales = zip(parts_of(features), torch.split(self.mean, widths), torch.split(self.std, widths), strict=True)
        return joined((part - mean) / std for part, mean, std in scales)

    def fit_scale(self, features: Tokens) -> None:
        """Set `mean` and `std` to those of `features`, of each scale over its own tokens."""
        with torch.no_grad():
            found = [mean_and_std(part) for part in parts_of(features)]
            self.mean.copy_(torch.cat([mean for mean, _ in found]))
            self.std.copy_(torch.cat([std for _, std in found]))


class ConvNormGelu(nn.Module):
    """A 3x3 convolution, LayerNorm over the channels of each place, GELU; (tiles, channels, rows, columns)."""

    def __init__(self, channels: int, width: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, width, 3, padding=1)
        self.norm = nn.LayerNorm(width, eps=_EPS)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Of the size of `x`, with the block's width."""
        y = self.norm(self.conv(x).permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        return nn.functional.gelu(y)

"""U-Net decoder over an encoder's features of several scales: classes for every pixel.

Source: MMEarth, section 5.2; `convnextv2_unet.py` of MMEarth-train, whose decoder this is, for any number of scales.
There the features are those of the first convolution, the stem, and the second to the fourth stage.
"""

from collections.abc import Sequence

import torch
from torch import nn

from nec_ray.errors import InputError

_EPS = 1e-6


class UNetDecoder(nn.Module):
    """Logits of the finest features' size; `to_size` of `models.segmentation` brings them to a mask's.

    From the coarsest scale on: nearest neighbours to the next finer size, a convolution to its channels, and the
    features of that scale beside the result.

    Args:
        channels: of the features of each scale, the finest first.
        classes: number of classes.

    Raises:
        InputError: no scales, or a size below 1.
    """

    def __init__(self, channels: Sequence[int], classes: int) -> None:
        super().__init__()
        if not channels or min(channels) < 1 or classes < 1:
            raise InputError(f"channels {tuple(channels)} and {classes} classes: give 1 or more of each")
        self.channels = tuple(channels)
        widths = [channels[-1], *(2 * width for width in reversed(channels[:-1]))]  # of what each step gets
        self.up = nn.ModuleList(
            ConvNormGelu(width, finer) for width, finer in zip(widths[:-1], reversed(channels[:-1]), strict=True)
        )
        last = max(1, channels[0] // 2)
        self.last = ConvNormGelu(widths[-1], last)
        self.head = nn.Conv2d(last, classes, 1)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.trunc_normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)  # type: ignore[arg-type]

    def forward(self, features: Sequence[torch.Tensor]) -> torch.Tensor:
        """Logits (tiles, classes, rows, columns) of features (tiles, channels, rows, columns), the finest first.

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
        logits: torch.Tensor = self.head(self.last(x))
        return logits


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

"""Segmentation heads: what they have in common, and the NEC paper's, a convolutional decoder of a tile's tokens.

Source: NEC, section 4 "Semantic Segmentation", and its released code (IBM/neural-embedding-compression). That code's
block applies its first convolution twice and never its second; here both are used, as the paper says.
"""

from typing import Literal

import torch
from torch import nn

from nec_ray.models.heads import TokenHead, Tokens

UPSAMPLING = 4
"""Pixels of the logits a side of a token; of several grid scales, a token of the finest one."""
SegmentationDecoder = Literal["nec", "unet"]
"""The NEC paper's decoder, `SegmentationHead`, or a U-Net, `unet.UNetHead`."""
AUXILIARY_WEIGHT = 0.4
IGNORED = 255
"""Target of pixels that count neither for training nor for the score."""

_BLOCKS = 6
_MAIN_WIDTH = 128
_AUXILIARY_WIDTH = 64


class PixelHead(TokenHead):
    """A head that says a class for every pixel: logits (tiles, classes, `UPSAMPLING` * token rows and columns).

    Args:
        channels: see `TokenHead`.
        classes: number of classes.
        grid: token rows and columns of a tile; the finest where it reads several.
        first_layer: see `TokenHead`.
        padding: see `TokenHead`.
    """

    def __init__(
        self,
        channels: int,
        classes: int,
        grid: tuple[int, int],
        first_layer: nn.Module | None = None,
        padding: torch.Tensor | None = None,
    ) -> None:
        super().__init__(channels, first_layer, padding)
        self.classes = classes
        self.grid = grid

    @property
    def size(self) -> tuple[int, int]:
        """Rows and columns of the logits."""
        return UPSAMPLING * self.grid[0], UPSAMPLING * self.grid[1]

    def loss(self, features: Tokens, mask: torch.Tensor) -> torch.Tensor:
        """What training brings down, for a mask int64 (tiles, rows, columns) of any size."""
        return mask_loss(self.score(features), mask)


class SegmentationHead(PixelHead):
    """The paper's decoder, of one grid: logits (tiles, classes, `UPSAMPLING` * token rows and columns).

    Args:
        channels: see `PixelHead`, like all that is not named here.
        classes: see `PixelHead`.
        grid: see `PixelHead`.
        width: channels of the decoder; half of `channels`, as in the paper, where it is None.
        first_layer: see `PixelHead`.
        padding: see `PixelHead`.
    """

    def __init__(
        self,
        channels: int,
        classes: int,
        grid: tuple[int, int],
        width: int | None = None,
        first_layer: nn.Module | None = None,
        padding: torch.Tensor | None = None,
    ) -> None:
        super().__init__(channels, classes, grid, first_layer, padding)
        self.width = width or default_width(channels)
        self.reduce = nn.Conv2d(channels, self.width, 3, padding=1)
        self.blocks = nn.Sequential(*(ConvBlock(self.width) for _ in range(_BLOCKS)))
        self.upsample = nn.Sequential(_upsample(self.width), _upsample(self.width))
        self.main = nn.Sequential(
            _conv_norm_relu(self.width, _MAIN_WIDTH),
            _conv_norm_relu(_MAIN_WIDTH, _MAIN_WIDTH),
            nn.Conv2d(_MAIN_WIDTH, classes, 1),
        )
        self.auxiliary = nn.Sequential(
            _conv_norm_relu(self.width, _AUXILIARY_WIDTH), nn.Conv2d(_AUXILIARY_WIDTH, classes, 1)
        )

    def score(self, features: torch.Tensor) -> torch.Tensor:
        """Logits (tiles, classes, 4 * token rows, 4 * token columns) of what `features` gave."""
        logits: torch.Tensor = self.main(self._decode(features))
        return logits

    def score_both(self, features: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """What `score` gives, and the auxiliary branch's logits of the same shape."""
        decoded = self._decode(features)
        return self.main(decoded), self.auxiliary(decoded)

    def loss(self, features: Tokens, mask: torch.Tensor) -> torch.Tensor:
        """See `segmentation_loss`."""
        return segmentation_loss(*self.score_both(features), mask)

    def _decode(self, features: torch.Tensor) -> torch.Tensor:
        x = self.standardised(features)
        x = self.reduce(x.transpose(1, 2).reshape(len(x), x.shape[2], *self.grid))
        decoded: torch.Tensor = self.upsample(x + self.blocks(x))
        return decoded


class ConvBlock(nn.Module):
    """Twice a 3x3 convolution, batch normalisation and GELU, added to what came in; (tiles, width, rows, columns)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(width, width, 3, padding=1, bias=False)  # the normalisation has a bias
        self.norm1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Of the shape of `x`."""
        y = nn.functional.gelu(self.norm1(self.conv1(x)))
        return x + nn.functional.gelu(self.norm2(self.conv2(y)))


def default_width(channels: int) -> int:
    """Channels of the decoder over tokens of so many: 384 for 768, 256 for 512."""
    return max(1, channels // 2)


def segmentation_loss(main: torch.Tensor, auxiliary: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Cross entropy of both branches' logits (tiles, classes, any size) against a mask int64 (tiles, rows, columns).

    Logits are brought to the mask's size bilinearly; pixels that are `IGNORED` do not count.
    """
    return mask_loss(main, mask) + AUXILIARY_WEIGHT * mask_loss(auxiliary, mask)


def mask_loss(logits: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Cross entropy of all pixels that are not `IGNORED`; logits of another size are brought to the mask's."""
    return nn.functional.cross_entropy(to_size(logits, mask.shape[1:]), mask.long(), ignore_index=IGNORED)


def to_size(logits: torch.Tensor, size: tuple[int, ...]) -> torch.Tensor:
    """Logits (tiles, classes, rows, columns) brought to `size`, (rows, columns), bilinearly."""
    if tuple(logits.shape[2:]) == tuple(size):
        return logits
    return nn.functional.interpolate(logits, size=tuple(size), mode="bilinear", align_corners=False)


def _upsample(width: int) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(width, 4 * width, 3, padding=1), nn.PixelShuffle(2), nn.BatchNorm2d(width), nn.ReLU()
    )


def _conv_norm_relu(channels: int, width: int) -> nn.Module:
    return nn.Sequential(nn.Conv2d(channels, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU())

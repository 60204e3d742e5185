"""ConvNeXt V2 encoder with MMEarth's stem, dense and masked (Woo et al. 2023, arXiv 2301.00808; MMEarth, section 4.1).

The masked encoder sees the visible patches alone, as a sparse convolution does, on dense tensors: what is masked is set
to zero again before every operation that mixes places (convolutions, GRN). Masks are whole patches, and the last
stage's stride is the patch, so no place is ever visible in part, and a convolution whose stride is its kernel mixes no
visible place with a masked one. What mixes no places is computed for the visible ones alone: gathered, multiplied,
and put back.
"""

from dataclasses import asdict, dataclass
from typing import Literal

import torch
from timm.layers import drop_path
from torch import Tensor, nn
from torch.nn import functional

from nec_ray.errors import InputError

STAGES = 4
PATCHES = (8, 16, 32)
_EPS = 1e-6
"""Of LayerNorm and GRN, as in ConvNeXt V2; MMEarth's dense GRN has 1e-4."""

Reach = Literal["sample", "batch"]


@dataclass(frozen=True)
class ConvNextConfig:
    """Sizes of an encoder.

    Raises:
        InputError: sizes that are out of range or do not divide.
    """

    size: int
    """Pixels a side of the input."""
    patch: int
    """Pixels a side of what is masked, which the last stage makes one place of."""
    bands: int
    dim: int
    """Channels of the first stage; each further stage has twice as many."""
    depth_1: int
    """Blocks of each stage."""
    depth_2: int
    depth_3: int
    depth_4: int

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():  # bounds what a hostile codec can make a reader build
            if not 1 <= value <= _LARGEST[name]:
                raise InputError(f"{name} {value} is out of range, 1 to {_LARGEST[name]} are allowed; change it")
        if self.patch not in PATCHES:
            raise InputError(f"patch {self.patch} is none of {', '.join(map(str, PATCHES))}; change it")
        if self.size % self.patch:
            raise InputError(
                f"input size {self.size} is no multiple of the patch size {self.patch}; change one of them"
            )

    @property
    def side(self) -> int:
        """Patches a side."""
        return self.size // self.patch

    @property
    def tokens(self) -> int:
        """Patches of a tile."""
        return self.side**2

    @property
    def dims(self) -> tuple[int, ...]:
        """Channels of each stage."""
        return tuple(self.dim << stage for stage in range(STAGES))

    @property
    def depths(self) -> tuple[int, ...]:
        """Blocks of each stage."""
        return self.depth_1, self.depth_2, self.depth_3, self.depth_4

    def side_of(self, stage: int) -> int:
        """Places a side of a stage's features; stages are counted from 1."""
        return self.side << (STAGES - stage)

    def to_architecture(self) -> dict[str, int]:
        """As codec.json keeps it."""
        return asdict(self)


_LARGEST = {"size": 8192, "patch": 32, "bands": 256, "dim": 352} | {f"depth_{i + 1}": 32 for i in range(STAGES)}


def _size(dim: int, *depths: int) -> dict[str, int]:
    return {"dim": dim, **{f"depth_{number}": depth for number, depth in enumerate(depths, 1)}}


SIZES: dict[str, dict[str, int]] = {
    "atto": _size(40, 2, 2, 6, 2),
    "femto": _size(48, 2, 2, 6, 2),
    "pico": _size(64, 2, 2, 6, 2),
    "nano": _size(80, 2, 2, 8, 2),
    "tiny": _size(96, 3, 3, 9, 3),
}
"""Of ConvNeXt V2, appendix A; MMEarth published weights of `atto` and `tiny`."""


class ConvNextEncoder(nn.Module):
    """Pixels -> feature maps of four stages. Parameter names are those of MMEarth's dense `ConvNeXtV2`.

    The stem keeps the input's resolution for one 3x3 convolution, then reduces it by patch / 8 (a depthwise
    convolution); each further stage halves it, so that stage 4 has one place a patch.
    The released model's norm behind the last stage is no part of it: it was never pretrained.

    Args:
        config: sizes.
        reach: over what a masked GRN takes its norm. `sample` is what the dense model does; `batch` takes all visible
            places of the batch together, as the released sparse one did. A dense forward always takes samples.
        last: the last stage, 1 to 4; those behind it are left out.
        skip: whether the blocks leave masked places out of what mixes no places: the same features, in less time.
    """

    def __init__(
        self, config: ConvNextConfig, reach: Reach = "sample", last: int = STAGES, *, skip: bool = True
    ) -> None:
        super().__init__()
        self.config = config
        self.reach = reach
        self.skip = skip
        dims, first = config.dims, config.patch // 8
        self.initial_conv = nn.Sequential(
            nn.Conv2d(config.bands, dims[0], 3, padding=1), ChannelNorm(dims[0]), nn.GELU()
        )
        self.stem = nn.Sequential(nn.Conv2d(dims[0], dims[0], first, first, groups=dims[0]), ChannelNorm(dims[0]))
        self.downsample_layers = nn.ModuleList(
            nn.Sequential(ChannelNorm(dims[i]), nn.Conv2d(dims[i], dims[i + 1], 2, 2)) for i in range(last - 1)
        )
        self.stages = nn.ModuleList(nn.ModuleList(Block(dims[i]) for _ in range(config.depths[i])) for i in range(last))
        self.apply(initialise)

    def forward(self, pixels: Tensor, keep: Tensor | None = None) -> list[Tensor]:
        """Feature maps (batch, dims[i], side * 8 / 2**i, side * 8 / 2**i) of the stages.

        Args:
            pixels: normalised pixels (batch, bands, size, size), without NaN.
            keep: (batch, kept) indexes of the visible patches, row by row; all are visible where it is None. Features
                of masked places are 0.
        """
        visible = None if keep is None else visible_map(keep, self.config.side).to(pixels.dtype)
        over_batch = self.reach == "batch"

        def masked(x: Tensor) -> Tensor:
            return x if visible is None else x * enlarged(visible, x.shape[2])

        x = masked(self.stem(self.initial_conv(masked(pixels))))
        features = []
        for number, stage in enumerate(self.stages):
            if number:
                x = masked(self.downsample_layers[number - 1](x))
            there = None if visible is None else enlarged(visible, x.shape[2])
            places = None if keep is None or not self.skip else visible_places(keep, self.config.side, x.shape[2])
            for block in stage.children():
                x = block(x, there, places, over_batch=over_batch)
            features.append(x)
        return features

    def unet_features(self, pixels: Tensor) -> list[Tensor]:
        """What MMEarth's U-Net reads, the finest first: the first convolution, the stem, and the stages but the first.

        Args:
            pixels: normalised pixels (batch, bands, rows, columns), of any size, without NaN.
        """
        first = self.initial_conv(pixels)
        x = self.stem(first)
        features = [first, x]
        for number, stage in enumerate(self.stages):
            if number:
                x = self.downsample_layers[number - 1](x)
            for block in stage.children():
                x = block(x)
            if number:
                features.append(x)
        return features

    def set_drop_path(self, rate: float) -> None:
        """Leave blocks out at random in training (Huang et al. 2016): the last one at this rate, the first never."""
        blocks = [block for stage in self.stages for block in stage.children()]
        for number, block in enumerate(blocks):
            assert isinstance(block, Block)
            block.drop_path = rate * number / max(1, len(blocks) - 1)


class Block(nn.Module):
    """ConvNeXt V2's block: depthwise 7x7 convolution, LayerNorm, GELU, GRN, between a shortcut.

    Attributes:
        drop_path: share of the samples of a batch that have the shortcut alone in training; 0 where nobody sets it.
    """

    drop_path = 0.0

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.dwconv = nn.Conv2d(dim, dim, 7, padding=3, groups=dim)
        self.norm = nn.LayerNorm(dim, eps=_EPS)
        self.pwconv1 = nn.Linear(dim, 4 * dim)
        self.grn = Grn(4 * dim)
        self.pwconv2 = nn.Linear(4 * dim, dim)

    def forward(
        self, x: Tensor, visible: Tensor | None = None, places: Tensor | None = None, *, over_batch: bool = False
    ) -> Tensor:
        """Features (batch, dim, rows, columns), of the same shape.

        Args:
            x: features, 0 where masked.
            visible: (batch, 1, rows, columns), 1 where visible and 0 where masked.
            places: (batch, places) int64, the same as numbers of the visible places; then only these are computed.
            over_batch: whether GRN's norm is over the whole batch's visible places.
        """
        if places is not None:
            y = self._of_places(self.dwconv(x), places, over_batch=over_batch)
            return x + drop_path(y, self.drop_path, self.training)
        y = self.norm(self.dwconv(x).permute(0, 2, 3, 1))
        y = functional.gelu(self.pwconv1(y))
        if visible is not None:
            y = y * visible.permute(0, 2, 3, 1)
        y = self.pwconv2(self.grn(y, over_batch=over_batch and visible is not None)).permute(0, 3, 1, 2)
        y = drop_path(y, self.drop_path, self.training)
        return x + (y if visible is None else y * visible)

    def _of_places(self, x: Tensor, places: Tensor, *, over_batch: bool) -> Tensor:
        """What follows the convolution, at some places; 0 elsewhere."""
        batch, dim, rows, columns = x.shape
        first = torch.arange(batch, device=x.device)[:, None] * (rows * columns)
        chosen = (first + places).flatten()
        y = x.permute(0, 2, 3, 1).reshape(-1, dim).index_select(0, chosen).reshape(batch, 1, -1, dim)
        y = functional.gelu(self.pwconv1(self.norm(y)))
        y = self.pwconv2(self.grn(y, over_batch=over_batch)).reshape(-1, dim)
        y = y.new_zeros(batch * rows * columns, dim).index_copy(0, chosen, y)
        return y.reshape(batch, rows, columns, dim).permute(0, 3, 1, 2)


class Grn(nn.Module):
    """Global response normalisation (ConvNeXt V2, section 3.2), channels last."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.zeros(1, 1, 1, dim))
        self.beta = nn.Parameter(torch.zeros(1, 1, 1, dim))

    def forward(self, x: Tensor, *, over_batch: bool = False) -> Tensor:
        """(batch, rows, columns, dim), of the same shape; the norm is over a sample's places, or all of the batch's."""
        norm = torch.linalg.vector_norm(x, dim=(0, 1, 2) if over_batch else (1, 2), keepdim=True)
        return self.gamma * (x * (norm / (norm.mean(dim=3, keepdim=True) + _EPS))) + self.beta + x


class ChannelNorm(nn.LayerNorm):
    """LayerNorm over the channels of (batch, channels, rows, columns)."""

    def __init__(self, dim: int) -> None:
        super().__init__(dim, eps=_EPS)

    def forward(self, x: Tensor) -> Tensor:
        """Features of the same shape."""
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


def visible_map(keep: Tensor, side: int) -> Tensor:
    """Bool (batch, 1, side, side), true at the places `keep` (batch, kept) of a grid, counted row by row."""
    flat = torch.zeros(len(keep), side * side, dtype=torch.bool, device=keep.device)
    return flat.scatter(1, keep, True).reshape(-1, 1, side, side)


def enlarged(grid: Tensor, side: int) -> Tensor:
    """A map (batch, 1, n, n) with every place repeated, to (batch, 1, side, side); `side` is a multiple of n."""
    times = side // grid.shape[2]
    return grid.repeat_interleave(times, 2).repeat_interleave(times, 3)


def visible_places(keep: Tensor, side: int, larger: int) -> Tensor:
    """Numbers (batch, places) of the places that patches `keep` (batch, kept) of a grid cover in a larger one.

    Args:
        keep: numbers of patches, row by row.
        side: patches a side.
        larger: places a side, a multiple of it.
    """
    times = larger // side
    steps = torch.arange(times, device=keep.device)
    corner = (keep // side) * times * larger + keep % side * times
    return (corner[:, :, None, None] + steps[:, None] * larger + steps).flatten(1)


def initialise(module: nn.Module) -> None:
    """ConvNeXt V2's first weights: truncated normal of 0.02, biases 0."""
    if isinstance(module, nn.Conv2d | nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)

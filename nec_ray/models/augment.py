"""Augmentations of training tiles, by the names that recipes use."""

import math
from collections.abc import Collection

import torch
from torch import Tensor
from torch.nn import functional

_AREA = (0.2, 1.0)
_ASPECT = (3 / 4, 4 / 3)


def augment(pixels: Tensor, names: Collection[str], generator: torch.Generator) -> Tensor:
    """Each tile changed in a way of its own, the same for all its bands.

    Args:
        pixels: (batch, bands, size, size).
        names: `flip` mirrors every other tile; `turn` turns by 0 to 3 quarters; `crop` takes a random part of 0.2 to
            1 of the area, of aspect 3:4 to 4:3, resized bilinearly to the whole (RandomResizedCrop of He et al.
            2022, appendix A.1).
        generator: on the pixels' device.
    """
    if "crop" in names:
        pixels = _crop(pixels, generator)
    turns = torch.randint(0, 8, (len(pixels),), generator=generator, device=generator.device)
    quarters = turns % 4 if "turn" in names else torch.zeros_like(turns)
    mirrored = turns >= 4 if "flip" in names else torch.zeros_like(turns, dtype=torch.bool)
    out = torch.empty_like(pixels)
    for quarter in range(4):
        mine = quarters == quarter
        out[mine] = pixels[mine].rot90(quarter, dims=(2, 3))
    return torch.where(mirrored[:, None, None, None], out.flip(3), out)


def _crop(pixels: Tensor, generator: torch.Generator) -> Tensor:
    batch, device = len(pixels), generator.device

    def uniform(low: float, high: float) -> Tensor:
        return low + (high - low) * torch.rand(batch, generator=generator, device=device)

    area, aspect = uniform(*_AREA), uniform(*map(math.log, _ASPECT)).exp()
    width, height = (area * aspect).sqrt().clamp(max=1), (area / aspect).sqrt().clamp(max=1)
    left, top = (1 - width) * uniform(-1, 1), (1 - height) * uniform(-1, 1)
    zero = torch.zeros_like(width)
    theta = torch.stack([torch.stack([width, zero, left], 1), torch.stack([zero, height, top], 1)], 1)
    grid = functional.affine_grid(theta, list(pixels.shape), align_corners=False)
    return functional.grid_sample(pixels, grid, mode="bilinear", padding_mode="border", align_corners=False)

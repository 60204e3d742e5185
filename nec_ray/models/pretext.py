"""What MP-MAE predicts, how far off that is, and how the tasks' losses are weighted (MMEarth, sections 4.1 and 4.2).

Targets are float32 with NaN where something is missing, or int64 with -1: pixel modalities (batch, channels, size,
size), image modalities (batch, channels). What is missing contributes nothing to a loss, and a task of which a whole
batch has nothing contributes nothing to the sum, nor to what its weight learns. (The released code trains missing
radar, elevation and canopy height towards 0.)
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from nec_ray.errors import InputError
from nec_ray.models.mae import patchify
from nec_ray.tiles.modalities import MODALITIES

Weighting = Literal["uncertainty", "equal"]
Targets = Literal["s2", "pixel", "image", "all"]
Inputs = Literal["rgb", "s2"]


@dataclass(frozen=True)
class Output:
    """One modality that is predicted: a task.

    Raises:
        InputError: classes of what is continuous, or none of what is categorical.
    """

    name: str
    level: Literal["pixel", "image"]
    """One prediction a pixel, or one an image."""
    kind: Literal["continuous", "categorical"]
    channels: int
    classes: int = 0
    """Of every channel, where it is categorical."""
    patch_normalised: bool = False
    """Whether the target is brought to mean 0 and variance 1 within each patch (He et al. 2022, section 4.1)."""

    def __post_init__(self) -> None:
        if self.channels < 1 or (self.classes > 1) != (self.kind == "categorical"):
            raise InputError(f"{self.name}: {self.channels} {self.kind} channels of {self.classes} classes cannot be")

    @property
    def width(self) -> int:
        """Numbers that are predicted for a pixel or an image: values, or logits."""
        return self.channels * max(1, self.classes)


BANDS: dict[Inputs, tuple[str, ...]] = {
    "rgb": ("B2", "B3", "B4"),  # in the released weights' order
    "s2": MODALITIES["sentinel2"].bands,
}
"""Bands of the inputs, in MMEarth's order (B8A before B8)."""


def mmearth_outputs(targets: Targets, inputs: Inputs = "s2") -> tuple[Output, ...]:
    """The tasks of the paper's Tables 3 and 4: the optical image, always, and pixel or image modalities or both.

    They stand in the order of `MODALITIES`, which the released log variances follow.
    """
    optical, *others = MODALITIES.values()
    wanted = {"s2": (), "pixel": ("pixel",), "image": ("image",), "all": ("pixel", "image")}[targets]
    return (
        Output(optical.name, optical.level, optical.kind, len(BANDS[inputs]), patch_normalised=True),
        *(Output(one.name, one.level, one.kind, len(one.bands), one.classes) for one in others if one.level in wanted),
    )


def task_loss(output: Output, predicted: Tensor, target: Tensor, masked: Tensor, patch: int) -> tuple[Tensor, Tensor]:
    """Loss of one task, and whether there was anything to compare with (bool).

    Continuous: mean squared error; categorical: cross entropy; over all present values of masked patches (of the
    image where the modality has no pixels). 0 where nothing is there.

    Args:
        output: the task.
        predicted: (batch, patches, patch * patch * width), pixels row by row, each with its channels, each with its
            classes; (batch, width) of an image.
        target: see the module.
        masked: bool (batch, patches), true where the encoder saw nothing.
        patch: pixels a side.

    Raises:
        InputError: the target is not of the task's shape or type.
    """
    check_target(output, target, len(predicted))
    if output.level == "pixel":
        target = patchify(target, patch)
        if output.patch_normalised:
            target = normalise_patches(target)
        counts = masked[:, :, None].expand_as(target)
    else:
        counts = torch.ones_like(target, dtype=torch.bool)
    if output.kind == "continuous":
        there = counts & ~target.isnan()
        error = (predicted.float() - torch.where(there, target, 0)).square()
    else:
        there = counts & (target >= 0)
        logits = predicted.float().reshape(-1, output.classes)
        error = functional.cross_entropy(logits, torch.where(there, target, 0).flatten(), reduction="none")
        error = error.reshape(target.shape)
    found = there.sum()
    return (error * there).sum() / found.clamp(min=1), found > 0


def normalise_patches(patches: Tensor) -> Tensor:
    """Patches (batch, patches, values) with mean 0 and variance 1 each, over the values that are not NaN.

    The variance is unbiased and has 1e-6 added, as in the MAE release.
    """
    there = ~patches.isnan()
    count = there.sum(2, keepdim=True)
    centred = patches - patches.nansum(2, keepdim=True) / count.clamp(min=1)
    variance = centred.square().nansum(2, keepdim=True) / (count - 1).clamp(min=1)
    return centred / (variance + 1e-6).sqrt()


def check_target(output: Output, target: Tensor, batch: int) -> None:
    """Refuse a target that is not of the task's batch, channels, kind or classes.

    Raises:
        InputError: it is not.
    """
    dims = 4 if output.level == "pixel" else 2
    wanted = torch.int64 if output.kind == "categorical" else torch.float32
    if target.ndim != dims or tuple(target.shape[:2]) != (batch, output.channels) or target.dtype != wanted:
        raise InputError(
            f"{output.name}: targets of shape {tuple(target.shape)} and {target.dtype}; a batch of {batch} with "
            f"{output.channels} channels, {dims} dimensions, {wanted} is wanted"
        )


class TaskWeighting(nn.Module):
    """One loss of many (MMEarth, equation 1).

    `uncertainty`: exp(-s) L + s for each task, with s = log variance, learned from 0 on (Kendall et al. 2018, as
    released; the paper has s / 2, which only scales the variance). `equal`: the sum.
    """

    def __init__(self, tasks: int, weighting: Weighting) -> None:
        super().__init__()
        self.log_vars = nn.Parameter(torch.zeros(tasks)) if weighting == "uncertainty" else None

    def forward(self, losses: Sequence[Tensor], there: Sequence[Tensor]) -> Tensor:
        """The whole loss, of the tasks of which something was there."""
        stacked, present = torch.stack(list(losses)), torch.stack(list(there))
        if self.log_vars is not None:
            stacked = torch.exp(-self.log_vars) * stacked + self.log_vars
        return (stacked * present).sum()


def random_crop(
    modalities: Mapping[str, Tensor], size: int, generator: torch.Generator | None = None
) -> dict[str, Tensor]:
    """The same random window of every pixel modality: the paper's only augmentation, 128 -> 112 or 64 -> 56.

    Args:
        modalities: (batch, channels, side, side) of pixels, all of one side, and (batch, channels) of images, which
            are left as they are. Each sample has a window of its own.
        size: the window's side.
        generator: on the tensors' device.

    Raises:
        InputError: the pixels are of several sizes, or of fewer than `size`.
    """
    shapes = {(len(value), *value.shape[2:]) for value in modalities.values() if value.ndim == 4}
    if len(shapes) != 1 or min(*next(iter(shapes))[1:]) < size:
        raise InputError(f"pixel modalities of sizes {sorted(shapes)} cannot be cropped to {size}")
    batch, height, width = shapes.pop()
    device = next(value.device for value in modalities.values() if value.ndim == 4)

    def starts(length: int) -> Tensor:
        return torch.randint(0, length - size + 1, (batch, 1), generator=generator, device=device)

    steps = torch.arange(size, device=device)
    rows, columns = starts(height) + steps, starts(width) + steps
    sample = torch.arange(batch, device=device)[:, None, None]
    return {
        name: value[sample, :, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2) if value.ndim == 4 else value
        for name, value in modalities.items()
    }

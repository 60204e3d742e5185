"""What a pretrained MP-MAE makes of some samples, as pictures and words (MMEarth, Fig. A5)."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from nec_ray.errors import InputError
from nec_ray.evaluate.modality_pictures import class_image, words
from nec_ray.evaluate.pictures import new_figure
from nec_ray.models.convnext import enlarged, visible_map
from nec_ray.models.mae import patchify, random_keep
from nec_ray.models.mp_mae import MpMae
from nec_ray.models.pretext import Output
from nec_ray.tiles.mmearth_reader import BandStatistics
from nec_ray.tiles.modalities import MODALITIES

Values = npt.NDArray[Any]

_SIDE = 1.3  # inches of an image
_STRETCH = (2, 98)
_MISSING = (0.89, 0.89, 0.89)
_MASKED = (0.75, 0.75, 0.75)
_COLOURS = ("B4", "B3", "B2")
_BANDS = (
    ("sentinel1", ("asc_VV", "asc_HH", "desc_VV"), "gray", "Sentinel-1, co-pol."),
    ("aster", ("elevation",), "cividis", "elevation"),
    ("aster", ("slope",), "magma", "slope"),
    ("canopy_height_eth", ("height",), "viridis", "canopy height"),
)
"""Modality, the band that is shown: the first of which the sample has values; colours; title."""
_CLASSES = (("dynamic_world", "Dynamic World"), ("esa_worldcover", "WorldCover"))


@dataclass(frozen=True)
class Reconstruction:
    """Some samples, and what a model predicts of them; standardised, NaN or -1 where missing."""

    visible: npt.NDArray[np.bool_]
    """(samples, size, size), true where the encoder saw the pixels."""
    targets: dict[str, Values]
    """(samples, channels, size, size), or (samples, channels) of an image."""
    predicted: dict[str, Values]
    """Of the same shapes; class numbers where classes are predicted. Patch-normalised predictions have the mean and
    the deviation of their target's patch."""


def reconstruct(
    model: MpMae, pixels: Tensor, targets: Mapping[str, Tensor], mask_ratio: float, generator: torch.Generator
) -> Reconstruction:
    """Predict every task of some samples under a random mask.

    Args:
        model: in evaluation, on the tensors' device.
        pixels: as `MpMae.forward` takes them.
        targets: see there.
        mask_ratio: share of masked patches.
        generator: of the mask.
    """
    config = model.config
    keep = random_keep(len(pixels), config.encoder.tokens, mask_ratio, generator, pixels.device)
    with torch.inference_mode():
        found = model.decoder(model.encoder(pixels.nan_to_num(nan=0.0), keep)[-1], keep)
    predicted = {
        output.name: _as_target(output, found[output.name].float(), targets[output.name], model.decoder.patch).numpy()
        for output in config.outputs
    }
    visible = enlarged(visible_map(keep, config.encoder.side), config.encoder.size)[:, 0].numpy()
    return Reconstruction(visible, {name: targets[name].numpy() for name in predicted}, predicted)


def reconstructions(
    found: Reconstruction, bands: Sequence[str], statistics: Mapping[str, BandStatistics], out: Path
) -> Path:
    """Draw samples, two rows each: input and targets above, what the encoder saw of it and predictions below.

    Predictions are drawn whole; those of visible patches are random, since no loss reaches them. The six modalities of
    the image stand in words, where all of them are there. Missing pixels are light grey, masked ones darker.

    Args:
        found: samples and predictions.
        bands: of Sentinel-2, in order; B4, B3 and B2 are among them.
        statistics: what continuous modalities were standardised by, by name.
        out: PNG file to write.

    Raises:
        InputError: no samples.
    """
    count = len(found.visible)
    if not count:
        raise InputError("no picture of no samples")
    in_words = all(name in found.targets for name, one in MODALITIES.items() if one.level == "image")
    titles = [
        "input",
        "Sentinel-2",
        *(title for name, _, _, title in _BANDS if name in found.targets),
        *(title for name, title in _CLASSES if name in found.targets),
        *["image modalities"] * in_words,
    ]
    widths = [1.0] * (len(titles) - in_words) + [1.7] * in_words
    with new_figure(out, figsize=(_SIDE * 1.06 * sum(widths) + 0.4, 2 * _SIDE * 1.1 * count + 0.3)) as figure:
        panels = figure.subplots(2 * count, len(titles), squeeze=False, gridspec_kw={"width_ratios": widths})
        for title, panel in zip(titles, panels[0], strict=True):
            panel.set_title(title, fontsize=8)
        for sample in range(count):
            above, below = panels[2 * sample], panels[2 * sample + 1]
            for column, pair in enumerate(_pairs(found, sample, bands)):
                above[column].imshow(pair[0], interpolation="nearest")
                below[column].imshow(pair[1], interpolation="nearest")
            if in_words:
                for panel, values in ((above[-1], found.targets), (below[-1], found.predicted)):
                    said = words({name: _in_units(name, value[sample], statistics) for name, value in values.items()})
                    panel.text(0, 0.5, said, fontsize=6, va="center", linespacing=1.3, transform=panel.transAxes)
            for panel, name in ((above[0], "target"), (below[0], "masked, prediction")):
                panel.text(
                    -0.06, 0.5, name, fontsize=7, rotation=90, ha="right", va="center", transform=panel.transAxes
                )
        for panel in panels.ravel():
            panel.axis("off")
    return out


def _as_target(output: Output, predicted: Tensor, target: Tensor, patch: int) -> Tensor:
    """Predictions in a target's shape and scale."""
    if output.kind == "categorical":
        predicted = predicted.reshape(*predicted.shape[:-1], -1, output.classes).argmax(-1)
    if output.level == "image":
        return predicted
    if output.patch_normalised:
        patches = patchify(target, patch)
        mean = patches.nanmean(2, keepdim=True)
        count = (~patches.isnan()).sum(2, keepdim=True)
        variance = (patches - mean).square().nansum(2, keepdim=True) / (count - 1).clamp(min=1)
        predicted = predicted * (variance + 1e-6).sqrt() + mean
    side = target.shape[2] // patch
    x = predicted.reshape(len(target), side, side, patch, patch, output.channels)
    return x.permute(0, 5, 1, 3, 2, 4).reshape(target.shape)


def _pairs(found: Reconstruction, sample: int, bands: Sequence[str]) -> list[tuple[Values, Values]]:
    """The panels of pixels: upper and lower picture (size, size, 3)."""
    target = {name: value[sample] for name, value in found.targets.items()}
    predicted = {name: value[sample] for name, value in found.predicted.items()}
    chosen = [list(bands).index(band) for band in _COLOURS]
    optical, made = target["sentinel2"][chosen], predicted["sentinel2"][chosen]
    seen = _colours(optical, optical)
    pairs = [
        (seen, np.where(found.visible[sample][..., None], seen, _MASKED)),
        (seen, _colours(made, optical)),
    ]
    for name, candidates, cmap, _ in _BANDS:
        if name in target:
            numbers = [MODALITIES[name].bands.index(band) for band in candidates]
            number = next((n for n in numbers if np.isfinite(target[name][n]).any()), numbers[0])
            mine = target[name][number]
            pairs.append((_shaded(mine, mine, cmap), _shaded(predicted[name][number], mine, cmap)))
    for name, _ in _CLASSES:
        if name in target:
            pairs.append((class_image(name, target[name][0]), class_image(name, predicted[name][0])))
    return pairs


def _colours(values: Values, like: Values) -> Values:
    """Three bands (3, rows, columns) as colours, stretched as others are."""
    low, high = _bounds(like)
    scaled = np.nan_to_num(np.clip((values - low) / (high - low), 0, 1)).transpose(1, 2, 0)
    return np.where(np.isnan(values).any(axis=0)[..., None], _MISSING, scaled)


def _shaded(values: Values, like: Values, cmap: str) -> Values:
    """One band (rows, columns) as colours, stretched as another is."""
    from matplotlib import colormaps

    low, high = _bounds(like)
    scaled = np.nan_to_num(np.clip((values - low) / (high - low), 0, 1))
    return np.where(np.isnan(values)[..., None], _MISSING, np.asarray(colormaps[cmap](scaled))[..., :3])


def _bounds(values: Values) -> tuple[float, float]:
    there = values[np.isfinite(values)].astype(np.float64)
    low, high = np.percentile(there, _STRETCH) if there.size else (0.0, 1.0)
    return float(low), float(max(high, low + 1e-6))


def _in_units(name: str, values: Values, statistics: Mapping[str, BandStatistics]) -> Values:
    """One sample's values as its file has them."""
    modality = MODALITIES[name]
    if modality.level == "pixel":
        return values
    if modality.kind == "categorical":
        return values[0]
    spread = np.where(statistics[name].std == 0, 1, statistics[name].std)
    return values * spread + statistics[name].mean

"""Masks side by side: what methods of about equal bytes say of the same test tiles."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from nec_ray.evaluate.class_list import class_colour
from nec_ray.evaluate.mask_pictures import palette
from nec_ray.evaluate.masks import Masks
from nec_ray.evaluate.pictures import new_figure
from nec_ray.models.segmentation import IGNORED

_TILES = 4
_REACH = 2.0  # times the bytes, up or down, that still count as equal
_SIDE = 1.5  # inches of a mask
_NAME = 22
ClassMap = npt.NDArray[np.uint8]
Rows = Sequence[Mapping[str, Any]]


def sample_tiles(test_tiles: int) -> npt.NDArray[np.int64]:
    """Which of the test tiles are drawn: a few, evenly spaced."""
    return np.unique(np.linspace(0, test_tiles - 1, min(_TILES, test_tiles)).round().astype(np.int64))


def write_sample(path: Path, predicted: ClassMap) -> None:
    """Keep class maps uint8 (tiles, rows, columns) of the `sample_tiles`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    np.savez_compressed(path, masks=predicted)


def at_equal_bytes(summary: Rows, curves: Mapping[str, Sequence[str]], reference: str | None) -> list[str]:
    """Methods of about equal bytes, the reference curve's first, at most one a curve.

    Of the reference curve's methods the one is taken that most curves come near to (within a factor of 2), of each
    curve the method that is nearest.

    Args:
        summary: a row a method with its `bytes_per_tile`.
        curves: names of each curve's methods.
        reference: the name of a curve.
    """
    logs = {row["method"]: math.log(row["bytes_per_tile"]) for row in summary}
    best: list[str] = []
    for start in (name for name in curves.get(reference or "", []) if name in logs):
        near = [start]
        for curve, names in curves.items():
            apart = {name: abs(logs[name] - logs[start]) for name in names if name in logs}
            if curve != reference and apart and min(apart.values()) <= math.log(_REACH):
                near.append(min(apart, key=apart.__getitem__))
        if len(near) > len(best):
            best = near
    return best


def draw_equal_bytes(
    summary: Rows,
    curves: Mapping[str, Sequence[str]],
    reference: str | None,
    masks: Masks,
    files: Mapping[str, Path],
    out: Path,
) -> Path | None:
    """Draw test tiles' masks beside what methods `at_equal_bytes` say; ignored pixels are white.

    Args:
        summary: a row a method with `bytes_per_tile` and `mean_iou`.
        curves: names of each curve's methods.
        reference: the name of a curve.
        masks: of all tiles.
        files: what `write_sample` kept of each method; those whose file is gone are left out.
        out: PNG file to write.

    Returns:
        `out`, or None where there is nothing to draw.
    """
    from matplotlib.patches import Patch

    found = {row["method"]: row for row in summary}
    names = [name for name in at_equal_bytes(summary, curves, reference) if files[name].exists()]
    if not names:
        return None
    test = masks.masks[masks.is_test]
    truth = test[sample_tiles(len(test))]
    columns = [("truth", truth)]
    for name in names:
        with np.load(files[name], allow_pickle=False) as kept:
            said = kept["masks"]
        row = found[name]
        title = f"{_short(name)}\n{row['bytes_per_tile']:,.0f} bytes\nmIoU {row['mean_iou']:.1%}"
        columns.append((title, np.where(truth == IGNORED, np.uint8(IGNORED), said)))
    # Not the masks' own colours: red beside green is common among them, and white.
    table = palette([class_colour(i) for i in range(len(masks.classes))])
    shown = [i for i in range(len(masks.classes)) if any((maps == i).any() for _, maps in columns)]
    height = len(truth) * _SIDE * 1.05 + 0.9 + 0.25 * -(-len(shown) // 3)
    with new_figure(out, figsize=(len(columns) * _SIDE * 1.08, height)) as figure:
        panels = figure.subplots(len(truth), len(columns), squeeze=False)
        for number, (title, maps) in enumerate(columns):
            panels[0, number].set_title(title, fontsize=8)
            for panel, classes in zip(panels[:, number], maps, strict=True):
                panel.imshow(table[classes], interpolation="nearest")
                panel.set_xticks([])
                panel.set_yticks([])
        handles = [Patch(facecolor=table[i] / 255, edgecolor="black", label=masks.classes[i][:24]) for i in shown]
        figure.legend(handles=handles, loc="outside lower center", ncols=min(3, len(shown)), frameon=False)
    return out


def _short(name: str) -> str:
    return name if len(name) <= _NAME else f"{name[: _NAME - 1]}…"

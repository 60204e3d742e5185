"""Pictures of masks: some test tiles, what is true beside what was predicted."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from nec_ray.evaluate.class_list import Colour
from nec_ray.evaluate.pictures import new_figure
from nec_ray.models.segmentation import IGNORED

_PAIRS_A_ROW = 4
_SIDE = 1.3  # inches of a mask
_IGNORED_COLOUR = (255, 255, 255)


def mask_samples(
    truth: npt.NDArray[np.uint8],
    predicted: npt.NDArray[np.uint8],
    classes: Sequence[str],
    colours: Sequence[Colour],
    out: Path,
) -> Path:
    """Draw masks beside predictions, in the classes' colours; ignored pixels are white.

    Args:
        truth: uint8 (tiles, rows, columns) class numbers or `IGNORED`.
        predicted: of the same shape.
        classes: names.
        colours: of each class.
        out: PNG file to write.
    """
    from matplotlib.patches import Patch

    table = palette(colours)
    columns = min(_PAIRS_A_ROW, len(truth))
    rows = -(-len(truth) // columns)
    shown = [i for i in range(len(classes)) if (truth == i).any() or (predicted == i).any()]
    legend_rows = -(-len(shown) // 4)
    size = (2 * columns * _SIDE * 1.08, rows * _SIDE * 1.12 + 0.35 + 0.25 * legend_rows)
    with new_figure(out, figsize=size) as figure:
        panels = figure.subplots(rows, 2 * columns, squeeze=False).ravel()
        for panel in panels:
            panel.axis("off")
        for i, (mask, said) in enumerate(zip(truth, predicted, strict=True)):
            panels[2 * i].imshow(table[mask], interpolation="nearest")
            panels[2 * i + 1].imshow(table[said], interpolation="nearest")
            if i < columns:
                panels[2 * i].set_title("mask", fontsize=9)
                panels[2 * i + 1].set_title("predicted", fontsize=9)
        handles = [Patch(color=table[i] / 255, label=classes[i][:24]) for i in shown]
        figure.legend(handles=handles, loc="outside lower center", ncols=min(4, len(shown)), frameon=False)
    return out


def palette(colours: Sequence[Colour]) -> npt.NDArray[np.uint8]:
    """(256, 3) colours by class number."""
    table = np.zeros((256, 3), np.uint8)
    table[: len(colours)] = colours
    table[IGNORED] = _IGNORED_COLOUR
    return table

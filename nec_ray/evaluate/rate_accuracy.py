"""Draws accuracy against bytes a tile (NEC, Fig. 3)."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from nec_ray.evaluate.pictures import PALETTE, new_figure

_MARKERS = "osD^vP*X"


def draw_rate_accuracy(
    summary: Sequence[Mapping[str, Any]], curves: Mapping[str, Sequence[str]], title: str, out: Path
) -> Path:
    """Draw a picture: a curve's methods are joined, bars are the spread over seeds.

    Args:
        summary: rows with `method`, `bytes_per_tile`, `accuracy`, `accuracy_std` (None for a single seed), `majority`.
        curves: names of each curve's methods.
        title: of the picture.
        out: PNG file to write.
    """
    rows = {row["method"]: row for row in summary}
    with new_figure(out, figsize=(8.0, 5.2)) as figure:
        axes = figure.add_subplot()
        for number, (curve, names) in enumerate(curves.items()):
            mine = sorted((rows[name] for name in names if name in rows), key=lambda row: row["bytes_per_tile"])
            if not mine:
                continue
            axes.errorbar(
                [row["bytes_per_tile"] for row in mine],
                [row["accuracy"] for row in mine],
                [row["accuracy_std"] or 0 for row in mine],
                label=curve,
                color=PALETTE[number % len(PALETTE)],
                marker=_MARKERS[number % len(_MARKERS)],
                capsize=3,
                linewidth=1.4,
            )
        axes.axhline(summary[0]["majority"], color="#9A9A9A", linestyle=":", linewidth=1, label="most frequent class")
        axes.set_xscale("log")
        axes.xaxis.set_major_formatter("{x:,.0f}")
        axes.set_xlabel("bytes a tile, as fetched")
        axes.set_ylabel("accuracy on test tiles")
        axes.set_title(title)
        axes.grid(alpha=0.25)
        figure.legend(loc="outside lower center", ncols=min(3, len(curves) + 1), frameon=False)
    return out

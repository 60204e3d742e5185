"""Draws accuracy against bytes a tile (NEC, Fig. 3), and distortion against bits."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from nec_ray.evaluate.pictures import PALETTE, new_figure

_COLOURS = [colour for colour in PALETTE if colour != "#F0E442"]  # a yellow line on white is hard to see
_MARKERS = "osD^vP*X<>hpd"  # 13 shapes and 7 colours: no pair of them comes again
_LINES = ("-", "--", ":")
"""For each round of the colours."""
_TASKS = {
    "head": "accuracy, attention pooling",
    "linear": "accuracy, linear probe",
    "knn": "accuracy, nearest neighbours",
    "retrieval": "recall of neighbours",
}
"""Names of the vertical axes, in the order of the panels."""

Rows = Sequence[Mapping[str, Any]]
Curves = Mapping[str, Sequence[str]]


def draw_rate_accuracy(summary: Rows, curves: Curves, title: str, out: Path) -> Path:
    """Draw a picture, a panel a task: a curve's methods are joined, bars are the spread over seeds.

    Args:
        summary: rows with `method`, `task`, `bytes_per_tile`, `majority`, `accuracy` and `accuracy_std` (None for a
            single seed), or `recall`.
        curves: names of each curve's methods.
        title: of the picture.
        out: PNG file to write.
    """
    tasks = [task for task in _TASKS if any(row["task"] == task for row in summary)]
    columns = min(2, len(tasks))
    lines = -(-len(tasks) // columns)
    with new_figure(out, figsize=(8.0 if columns == 1 else 12.0, 1.2 + 4.4 * lines)) as figure:
        for number, task in enumerate(tasks):
            axes = figure.add_subplot(lines, columns, number + 1)
            mine = [row for row in summary if row["task"] == task]
            measure = "recall" if task == "retrieval" else "accuracy"
            _draw(axes, mine, curves, "bytes_per_tile", measure)
            majority = mine[0]["majority"]
            if majority is not None:
                seen = axes.get_ylim()
                label = f"most frequent class ({majority:.1%})"
                axes.axhline(majority, color="#6E6E6E", linestyle=(0, (1, 3)), label=label)
                axes.set_ylim(seen)  # methods that are all far above it must not shrink into one line
            axes.set_xscale("log")
            axes.xaxis.set_major_formatter("{x:,.0f}")
            axes.set_xlabel("bytes a tile, as fetched")
            axes.set_ylabel(f"{_TASKS[task]}, test tiles")
        _finish(figure, curves, title)
    return out


def draw_rate_distortion(summary: Rows, curves: Curves, title: str, out: Path) -> Path:
    """Draw a picture of signal to noise against bits a channel; a curve's methods are joined.

    Args:
        summary: rows with `method`, `bits_per_channel` and `snr_db`, which is None where nothing was lost or measured.
        curves: names of each curve's methods.
        title: of the picture.
        out: PNG file to write.
    """
    rows = [row for row in summary if row["snr_db"] is not None]
    names = {row["method"] for row in rows}
    shown = {curve: mine for curve, mine in curves.items() if names & set(mine)}
    with new_figure(out, figsize=(8.0, 5.6)) as figure:
        axes = figure.add_subplot()
        _draw(axes, rows, curves, "bits_per_channel", "snr_db")
        axes.set_xscale("log")
        axes.xaxis.set_major_formatter("{x:g}")
        axes.set_xlabel("bits fetched for each number of the embedding")
        axes.set_ylabel("signal to noise of the embedding, dB")
        _finish(figure, shown, title)
    return out


def _draw(axes: Any, rows: Rows, curves: Curves, across: str, up: str) -> None:
    found = {row["method"]: row for row in rows}
    for number, (curve, names) in enumerate(curves.items()):
        mine = sorted((found[name] for name in names if name in found), key=lambda row: row[across])
        if not mine:
            continue
        axes.errorbar(
            [row[across] for row in mine],
            [row[up] for row in mine],
            [row.get(f"{up}_std") or 0 for row in mine],
            label=curve,
            color=_COLOURS[number % len(_COLOURS)],
            marker=_MARKERS[number % len(_MARKERS)],
            linestyle=_LINES[number // len(_COLOURS) % len(_LINES)],
            markeredgecolor="black",
            markeredgewidth=0.5,
            capsize=3,
            linewidth=1.6,
        )
    axes.grid(alpha=0.25)


def _finish(figure: Any, curves: Curves, title: str) -> None:
    """Title, and one legend for all panels."""
    known: dict[str, Any] = {}
    for axes in figure.axes:
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True):
            known.setdefault(label, handle)
    ordered = [name for name in [*curves, *known] if name in known]
    figure.suptitle(title)
    figure.legend(
        [known[name] for name in dict.fromkeys(ordered)],
        list(dict.fromkeys(ordered)),
        loc="outside lower center",
        ncols=min(3, len(known)),
        frameon=False,
    )

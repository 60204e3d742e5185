"""Draws accuracy against bytes a tile (NEC, Fig. 3), and distortion against bits."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from nec_ray.evaluate.pictures import PALETTE, new_figure

_COLOURS = [colour for colour in PALETTE if colour != "#F0E442"]  # a yellow line on white is hard to see
_MARKERS = "osD^vP*X<>hpd"  # 13 shapes and 7 colours: no pair of them comes again
_LETTERS = 12  # of a legend on an inch
_SMALL = (5.2, 4.8)  # inches: its letters are as large as a page's on a phone
_LINES = ("-", "--", ":")
"""For each round of the colours."""
NAMES = {
    ("head", "accuracy"): "accuracy, attention pooling",
    ("linear", "accuracy"): "accuracy, linear probe",
    ("knn", "accuracy"): "accuracy, nearest neighbours",
    ("retrieval", "recall"): "recall of neighbours",
    ("segmentation", "mean_iou"): "mean IoU, segmentation",
    ("segmentation", "accuracy"): "pixel accuracy, segmentation",
    ("unet", "mean_iou"): "mean IoU, U-Net",
    ("unet", "accuracy"): "pixel accuracy, U-Net",
    ("fine_tuning", "accuracy"): "accuracy, fine-tuning",
    ("linear_first_layer", "accuracy"): "accuracy, linear probe and first layer",
    ("fine_tuning", "map"): "mAP, fine-tuning",
    ("linear", "map"): "mAP, linear probe",
    ("linear_first_layer", "map"): "mAP, linear probe and first layer",
    ("knn", "map"): "mAP, nearest neighbours",
    ("segmentation_frozen", "mean_iou"): "mean IoU, segmentation, encoder frozen",
}
"""What a task's measure is called, in the order of the panels."""
Panel = tuple[str, str]
"""A task and what it is measured by."""

Rows = Sequence[Mapping[str, Any]]
Curves = Mapping[str, Sequence[str]]


def panels_of(summary: Rows) -> list[Panel]:
    """Tasks and measures that have scores."""
    return [
        (task, measure)
        for task, measure in NAMES
        if any(row["task"] == task and row.get(measure) is not None for row in summary)
    ]


def draw_rate_accuracy(
    summary: Rows, curves: Curves, title: str, out: Path, panels: Sequence[Panel] | None = None
) -> Path:
    """Draw a picture, a panel a task and measure: a curve's methods are joined, bars are the spread over seeds.

    Args:
        summary: rows of one share of labels with `method`, `task`, `bytes_per_tile` (None where pixels are encoded and
            nothing is fetched: a level line), `majority`, and measures with their `_std` (None for a single seed).
        curves: names of each curve's methods.
        title: of the picture; none where it is empty.
        out: PNG file to write.
        panels: what to draw; all that have scores where it is None. A single one is drawn so small that it can be read
            on a phone.
    """
    wanted = panels_of(summary) if panels is None else panels
    columns = min(2, len(wanted))
    lines = -(-len(wanted) // columns)
    size = _SMALL if panels and len(panels) == 1 else (8.0 if columns == 1 else 12.0, 1.2 + 4.4 * lines)
    with new_figure(out, figsize=size) as figure:
        for number, (task, measure) in enumerate(wanted):
            axes = figure.add_subplot(lines, columns, number + 1)
            mine = [row for row in summary if row["task"] == task]
            _draw(axes, mine, curves, "bytes_per_tile", measure)
            majority = mine[0]["majority"]
            if majority is not None and measure == "accuracy":
                seen = axes.get_ylim()
                label = f"most frequent class ({majority:.1%})"
                axes.axhline(majority, color="#6E6E6E", linestyle=(0, (1, 3)), label=label)
                axes.set_ylim(seen)  # methods that are all far above it must not shrink into one line
            axes.set_xscale("log")
            axes.xaxis.set_major_formatter("{x:,.0f}")
            axes.set_xlabel("bytes a tile, as fetched")
            axes.set_ylabel(f"{NAMES[task, measure]}, test tiles")
        _finish(figure, curves, title)
    return out


def draw_label_efficiency(
    summary: Rows, curves: Curves, trained: int, title: str, out: Path, panels: Sequence[Panel] | None = None
) -> Path:
    """Draw scores against the number of labelled training tiles, a line a method.

    Args:
        summary: rows of several shares of labels: `label_share`, and see `draw_rate_accuracy`.
        curves: names of each curve's methods; their colours tell methods apart, too.
        trained: training tiles, of which shares are taken.
        title: see `draw_rate_accuracy`, like `out` and `panels`.
        out: PNG file to write.
        panels: what to draw.
    """
    wanted = panels_of(summary) if panels is None else panels
    wanted = [(task, measure) for task, measure in wanted if task != "retrieval"]
    columns = min(2, len(wanted))
    lines = -(-len(wanted) // columns)
    size = _SMALL if panels and len(panels) == 1 else (8.0 if columns == 1 else 12.0, 1.2 + 4.4 * lines)
    methods = {name: [name] for names in curves.values() for name in names}
    with new_figure(out, figsize=size) as figure:
        for number, (task, measure) in enumerate(wanted):
            axes = figure.add_subplot(lines, columns, number + 1)
            mine = [
                {**row, "labelled": max(1, round(row["label_share"] * trained))}
                for row in summary
                if row["task"] == task
            ]
            _draw(axes, mine, methods, "labelled", measure)
            axes.set_xscale("log")
            axes.set_xticks(sorted({row["labelled"] for row in mine}))
            axes.set_xticks([], minor=True)
            axes.xaxis.set_major_formatter("{x:,.0f}")
            axes.set_xlabel("labelled training tiles")
            axes.set_ylabel(f"{NAMES[task, measure]}, test tiles")
        _finish(figure, methods, title)
    return out


def draw_bits_by_channel(bits: Mapping[str, Sequence[float]], out: Path) -> Path:
    """Draw what each channel's symbols cost, channels in falling order, a line a codec.

    Args:
        bits: entropy of a symbol of each channel, by the codec's name.
        out: PNG file to write.
    """
    with new_figure(out, figsize=_SMALL) as figure:
        axes = figure.add_subplot()
        for number, (name, values) in enumerate(bits.items()):
            axes.step(
                range(1, len(values) + 1),
                sorted(values, reverse=True),
                where="mid",
                label=name,
                color=_COLOURS[number % len(_COLOURS)],
                linestyle=_LINES[number % len(_LINES)],
            )
        axes.grid(alpha=0.25)
        axes.set_xlabel("channels, the dearest first")
        axes.set_ylabel("entropy of a symbol, bits")
        _finish(figure, {name: [] for name in bits}, "")
    return out


def draw_rate_distortion(summary: Rows, curves: Curves, title: str, out: Path, *, small: bool = False) -> Path:
    """Draw a picture of signal to noise against bits a channel; a curve's methods are joined.

    Args:
        summary: rows with `method`, `bits_per_channel` and `snr_db`, which is None where nothing was lost or measured.
        curves: names of each curve's methods.
        title: of the picture.
        out: PNG file to write.
        small: whether it is to be read on a phone.
    """
    rows = [row for row in summary if row["snr_db"] is not None]
    names = {row["method"] for row in rows}
    shown = {curve: mine for curve, mine in curves.items() if names & set(mine)}
    with new_figure(out, figsize=_SMALL if small else (8.0, 5.6)) as figure:
        axes = figure.add_subplot()
        _draw(axes, rows, curves, "bits_per_channel", "snr_db")
        axes.set_xscale("log")
        axes.xaxis.set_major_formatter("{x:g}")
        axes.set_xlabel("bits fetched for each number of the embedding")
        axes.set_ylabel("signal to noise of the embedding, dB")
        _finish(figure, shown, title)
    return out


def _draw(axes: Any, rows: Rows, curves: Curves, across: str, up: str) -> None:
    for number, (curve, names) in enumerate(curves.items()):
        colour = _COLOURS[number % len(_COLOURS)]
        there = [row for row in rows if row["method"] in names]
        for row in there:
            if row[across] is None:
                axes.axhline(row[up], label=curve, color=colour, linestyle=(0, (6, 3)), linewidth=1.6)
        mine = sorted((row for row in there if row[across] is not None), key=lambda row: row[across])
        if not mine:
            continue
        axes.errorbar(
            [row[across] for row in mine],
            [row[up] for row in mine],
            [row.get(f"{up}_std") or 0 for row in mine],
            label=curve,
            color=colour,
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
    ordered = list(dict.fromkeys(name for name in [*curves, *known] if name in known))
    if title:
        figure.suptitle(_plain(title))
    widest = max(map(len, ordered), default=1)
    figure.legend(
        [known[name] for name in ordered],
        [_plain(name) for name in ordered],
        loc="outside lower center",
        ncols=max(1, min(3, len(known), int(figure.get_figwidth() * _LETTERS / (widest + 8)))),
        frameon=False,
    )


def _plain(text: str) -> str:
    """Text that matplotlib does not take for a formula."""
    return text.replace("$", r"\$")

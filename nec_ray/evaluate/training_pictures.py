"""Pictures of a training run's metrics: distortion and rate, the tasks' losses, their uncertainties over time."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from nec_ray.errors import InputError
from nec_ray.evaluate.pictures import PALETTE, new_figure
from nec_ray.tiles.modalities import MODALITIES

Rows = Sequence[Mapping[str, str]]

_DISTORTION, _RATE = "#0072B2", "#D55E00"
_COLUMNS = 4
_GROUPS = (("pixel", "continuous"), ("image", "continuous"), ("pixel", "categorical"), ("image", "categorical"))


def distortion_and_rate(rows: Rows, out: Path) -> Path:
    """Draw the distortion by epoch, and the rate by epoch of the adaptation.

    Args:
        rows: of `read_metrics`.
        out: PNG file to write.
    """
    adapted = np.array([row["phase"] == "adapt" for row in rows])
    with new_figure(out, figsize=(9, 3.4)) as figure:
        left, right = figure.subplots(1, 2)
        left.plot(*_of(rows, "mse"), color=_DISTORTION)
        left.set(xlabel="epoch", ylabel="MSE on masked patches", title="Distortion")
        if adapted.any() and not adapted.all():
            start = float(np.flatnonzero(adapted)[0]) + 0.5
            left.axvline(start, color="0.6", linestyle="--")
            left.annotate(
                "entropy model added",
                (start, 1),
                (-4, -4),
                ("data", "axes fraction"),
                "offset points",
                ha="right",
                va="top",
                color="0.35",
            )
        _draw_rate(right, rows)
    return out


def task_losses(rows: Rows, out: Path) -> Path:
    """Draw MP-MAE's pretraining: the weighted loss and each task's by epoch, each on a scale of its own.

    Distortion and rate of the adaptation follow where the run has one.

    Args:
        rows: of `read_metrics`, of a run that pretrained MP-MAE.
        out: PNG file to write.
    """
    pretrained = [row for row in rows if row["phase"] == "pretrain"]
    adapted = [row for row in rows if row["phase"] == "adapt"]
    tasks = _tasks(rows, "loss_")
    panels = 1 + len(tasks) + 2 * bool(adapted)
    columns = min(_COLUMNS, panels)
    lines = -(-panels // columns)
    with new_figure(out, figsize=(2.7 * columns, 1.9 * lines)) as figure:
        axes = figure.subplots(lines, columns, squeeze=False).ravel()
        axes[0].plot(*_of(pretrained, "loss"), color="black", marker=_marker(pretrained))
        axes[0].set_title("weighted sum of all tasks", fontsize=9)
        for name, panel in zip(tasks, axes[1:], strict=False):
            categorical = MODALITIES[name].kind == "categorical"
            colour = _RATE if categorical else _DISTORTION
            panel.plot(*_of(pretrained, f"loss_{name}"), color=colour, marker=_marker(pretrained))
            panel.set_title(f"{_title(name)}: {'cross entropy' if categorical else 'MSE'}", fontsize=9)
        if adapted:
            panel, rate = axes[1 + len(tasks) : panels]
            panel.plot(*_of(adapted, "mse"), color=_DISTORTION, marker=_marker(adapted))
            panel.set_title("adaptation: MSE on masked patches", fontsize=9)
            _draw_rate(rate, rows)
            rate.set_title("adaptation: rate (noise proxy)", fontsize=9)
        for panel in axes[panels:]:
            panel.axis("off")
        for panel in axes[max(0, panels - columns) : panels]:
            panel.set_xlabel("epoch")
        for panel in axes:
            panel.tick_params(labelsize=7)
            _whole_epochs(panel)
    return out


def task_uncertainties(rows: Rows, out: Path) -> Path:
    """Draw the tasks' log variances by epoch, in the paper's four groups (MMEarth, Fig. A4).

    Args:
        rows: of `read_metrics`, of a run that pretrained MP-MAE with learned weights.
        out: PNG file to write.

    Raises:
        InputError: no epoch has a log variance.
    """
    rows = [row for row in rows if row["phase"] == "pretrain"]
    tasks = [name for name in _tasks(rows, "log_var_") if any(row[f"log_var_{name}"] for row in rows)]
    groups = [
        (f"{level}, {kind}", [n for n in tasks if (MODALITIES[n].level, MODALITIES[n].kind) == (level, kind)])
        for level, kind in _GROUPS
    ]
    groups = [(title, names) for title, names in groups if names]
    if not groups:
        raise InputError("no task has a log variance; only learned weights have (model.weighting uncertainty)")
    with new_figure(out, figsize=(3.1 * len(groups) + 0.4, 3.0)) as figure:
        axes = figure.subplots(1, len(groups), squeeze=False)[0]
        for (title, names), panel in zip(groups, axes, strict=True):
            for name, colour in zip(names, PALETTE, strict=False):
                epochs, values = _of(rows, f"log_var_{name}")
                panel.plot(epochs, values, color=colour, label=_title(name), marker=_marker(rows))
            panel.set(xlabel="epoch", title=title)
            panel.legend(frameon=False, fontsize=8)
            _whole_epochs(panel)
        axes[0].set_ylabel("log variance of the task")
    return out


def _whole_epochs(panel: Any) -> None:
    panel.xaxis.get_major_locator().set_params(integer=True)


def _draw_rate(panel: Any, rows: Rows) -> None:
    epochs, bits = _of(rows, "bits")
    adapted = np.array([row["phase"] == "adapt" for row in rows])
    panel.plot(epochs[adapted], bits[adapted], color=_RATE)
    panel.set(xlabel="epoch", ylabel="bits per element", title="Rate (noise proxy)", ylim=(0, None))


def _of(rows: Rows, name: str) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    """Epochs and a column's values."""
    return np.array([float(row["epoch"]) for row in rows]), np.array([float(row[name] or "nan") for row in rows])


def _tasks(rows: Rows, prefix: str) -> list[str]:
    return [name.removeprefix(prefix) for name in (rows[0] if rows else {}) if name.startswith(prefix)]


def _marker(rows: Rows) -> str | None:
    """So few points make no line."""
    return "o" if len(rows) < 3 else None


def _title(name: str) -> str:
    return name.replace("_", " ")

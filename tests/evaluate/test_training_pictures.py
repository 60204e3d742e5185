"""What the pictures of a training run draw: each task's column in the panel or line that bears its name."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from nec_ray.errors import InputError
from nec_ray.evaluate import pictures, training_pictures
from nec_ray.evaluate.training_pictures import Rows, task_losses, task_uncertainties

PIXEL = {"sentinel2", "sentinel1", "aster", "canopy_height_eth"}
IMAGE = {"era5", "lat", "lon", "month"}
CLASSES = {"pixel": {"dynamic_world", "esa_worldcover"}, "image": {"biome", "eco_region"}}
TASKS = sorted(PIXEL | IMAGE | CLASSES["pixel"] | CLASSES["image"])
EPOCHS = 5


def loss(task: str, epoch: int) -> float:
    return TASKS.index(task) + 1 / (1 + epoch)


def log_var(task: str, epoch: int) -> float:
    return -0.1 * epoch - TASKS.index(task)


def rows(adapted: int = 0) -> Rows:
    """As `metrics.csv` has them: text, empty where a column says nothing of a phase."""
    pretrained = [
        {"phase": "pretrain", "epoch": str(epoch), "loss": str(100.0 - epoch), "mse": "", "bits": ""}
        | {f"loss_{task}": str(loss(task, epoch)) for task in TASKS}
        | {f"log_var_{task}": str(log_var(task, epoch)) for task in TASKS}
        for epoch in range(EPOCHS)
    ]
    empty = dict.fromkeys(pretrained[0], "")
    return pretrained + [
        empty | {"phase": "adapt", "epoch": str(EPOCHS + i), "loss": "7", "mse": str(0.5 + i), "bits": str(3.0 - i)}
        for i in range(adapted)
    ]


@pytest.fixture
def figures(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The figures that are drawn, in order."""
    drawn: list[Any] = []

    @contextmanager
    def kept(out: Path, figsize: tuple[float, float]) -> Iterator[Any]:
        with pictures.new_figure(out, figsize) as figure:
            drawn.append(figure)
            yield figure

    monkeypatch.setattr(training_pictures, "new_figure", kept)
    return drawn


def lines_of(figure: Any) -> dict[str, tuple[list[float], list[float]]]:
    """Epochs and values by the panel's title."""
    return {
        panel.get_title(): tuple(values.tolist() for values in map(np.asarray, panel.get_lines()[0].get_data()))
        for panel in figure.axes
        if panel.get_lines()
    }


@pytest.mark.parametrize("adapted", [0, 3])
def test_each_tasks_loss_is_in_the_panel_of_its_name(figures: list[Any], tmp_path: Path, adapted: int) -> None:
    assert task_losses(rows(adapted), tmp_path / "loss.png").is_file()
    found = lines_of(figures[0])
    epochs = [float(epoch) for epoch in range(EPOCHS)]
    assert found.pop("weighted sum of all tasks") == (epochs, [100.0 - epoch for epoch in range(EPOCHS)])
    if adapted:
        later = [float(EPOCHS + i) for i in range(adapted)]
        assert found.pop("adaptation: MSE on masked patches") == (later, [0.5 + i for i in range(adapted)])
        assert found.pop("adaptation: rate (noise proxy)") == (later, [3.0 - i for i in range(adapted)])
    cross_entropies = CLASSES["pixel"] | CLASSES["image"]
    assert found == {
        f"{task.replace('_', ' ')}: {'cross entropy' if task in cross_entropies else 'MSE'}": (
            epochs,
            [loss(task, epoch) for epoch in range(EPOCHS)],
        )
        for task in TASKS
    }


def test_log_variances_stand_in_the_papers_four_groups(figures: list[Any], tmp_path: Path) -> None:
    """Fig. A4 plots log(var), not the variance."""
    assert task_uncertainties(rows(2), tmp_path / "uncertainties.png").is_file()
    found = {
        panel.get_title(): {line.get_label(): np.asarray(line.get_ydata()).tolist() for line in panel.get_lines()}
        for panel in figures[0].axes
    }
    assert found == {
        title: {task.replace("_", " "): [log_var(task, epoch) for epoch in range(EPOCHS)] for task in tasks}
        for title, tasks in {
            "pixel, continuous": PIXEL,
            "image, continuous": IMAGE,
            "pixel, categorical": CLASSES["pixel"],
            "image, categorical": CLASSES["image"],
        }.items()
    }
    assert figures[0].axes[0].get_ylabel() == "log variance of the task"
    for panel in figures[0].axes:
        shown = {text.get_text() for text in panel.get_legend().get_texts()}
        assert shown == set(found[panel.get_title()])
        assert len({line.get_color() for line in panel.get_lines()}) == len(shown)


def test_tasks_without_a_log_variance_are_left_out(figures: list[Any], tmp_path: Path) -> None:
    some = [{name: "" if name == "log_var_lat" else value for name, value in row.items()} for row in rows()]
    task_uncertainties(some, tmp_path / "x.png")
    labels = [line.get_label() for panel in figures[0].axes for line in panel.get_lines()]
    assert len(labels) == len(TASKS) - 1
    assert "lat" not in labels
    none = [{name: "" if name.startswith("log_var_") else value for name, value in row.items()} for row in rows()]
    with pytest.raises(InputError, match="no task has a log variance"):
        task_uncertainties(none, tmp_path / "y.png")
    assert not (tmp_path / "y.png").exists()
    gap = [dict(row) | ({"loss_lon": ""} if row["epoch"] == "2" else {}) for row in rows()]
    task_losses(gap, tmp_path / "z.png")
    assert math.isnan(lines_of(figures[-1])["lon: MSE"][1][2])

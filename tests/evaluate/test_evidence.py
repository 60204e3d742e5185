"""The evidence that is kept: its evaluations are ones that `nec evaluate` takes, and what pages say of it is in it."""

import json
import re
from pathlib import Path
from typing import Any

import pytest

import nec_ray
from nec_ray.evaluate.evaluation import read_evaluation
from nec_ray.evaluate.experiment import Experiment
from nec_ray.runtime.recipe import read_recipe

EVIDENCE = Path(__file__).parents[1] / "evidence"
CARD = Path(nec_ray.__file__).parent / "data" / "rgb_codec.md"
RESULTS = sorted(EVIDENCE.glob("*.results.json"))


def summary(task: str) -> dict[str, dict[str, Any]]:
    """Of the first task, with all labels, by method."""
    document = json.loads((EVIDENCE / f"{task}.results.json").read_text())
    first = document["experiment"]["tasks"][0]
    return {row["method"]: row for row in document["summary"] if (row["task"], row["label_share"]) == (first, 1.0)}


@pytest.mark.parametrize("path", sorted(EVIDENCE.glob("*.toml")), ids=lambda path: path.stem)
def test_configs_are_what_the_commands_take(path: Path) -> None:
    if path.stem.endswith("recipe"):
        read_recipe(path)
    else:
        read_evaluation(path)


@pytest.mark.parametrize("path", RESULTS, ids=lambda path: path.name)
def test_results_are_those_of_the_config(path: Path) -> None:
    experiment = read_evaluation(path.with_name(path.name.replace("results.json", "toml")))
    assert isinstance(experiment, Experiment)
    rows = json.loads(path.read_text())["results"]
    done = {(row["method"], row["task"], row["seed"]) for row in rows}
    head = experiment.tasks[0]
    assert {(m.name, head, seed) for m in experiment.methods for seed in experiment.seeds} <= done


@pytest.mark.parametrize("page", [CARD, EVIDENCE / "README.md"], ids=["card", "evidence"])
def test_pages_say_what_was_measured(page: Path) -> None:
    """Rows of tables that name a method, `| method | bytes | accuracy +- spread |`, of the results named above them."""
    found, task = 0, "aid"
    for line in page.read_text(encoding="utf-8").splitlines():
        named = re.search(r"\((\w+)\.results\.json\)", line)
        task = named[1] if named else task
        row = re.fullmatch(r"\| ([^|]+) \| ([\d,]+) \| ([\d.]+) ± ([\d.]+) \|.*", line)
        if row:
            measured = summary(task)[row[1]]
            metric = "mean_iou" if measured["task"] == "segmentation" else "accuracy"
            score, spread = measured[metric], measured[f"{metric}_std"]
            shown = f"{measured['bytes_per_tile']:,.0f}", f"{100 * score:.1f}", f"{100 * spread:.1f}"
            assert (row[2], row[3], row[4]) == shown, line
            found += 1
    assert found > 5

"""The papers' numbers, typed a second time where it matters, and which results stand beside them."""

from pathlib import Path
from typing import Any

import pytest

import nec_ray
from nec_ray.evaluate.evaluation import read_evaluation
from nec_ray.evaluate.geobench.experiment import GeobenchExperiment, MpMae, Protocol
from nec_ray.evaluate.geobench.papers import PaperRow, measured, papers
from nec_ray.models.mmearth_weights import parse_folder
from nec_ray.runtime.recipe import read_recipe

FOLDER = Path(nec_ray.__file__).parent / "data" / "geobench"
RECIPES = ("classification", "first_layer", "few_shot", "segmentation", "statistics", "compressed")

CELLS = """
3 MMEarth-S2rgb_128/32 71.4/57.6 37.8/27.6 79.6 26.5
3 MMEarth-S2rgb_128/16 78.2/62.5 46.3/31.0 80.3 29.6
3 MMEarth-S2rgb 77.8/62.2 44.7/34.1 81.0 29.1
4 ImageNet 72.9/57.2 44.5/34.9 77.5 27.4
4 MMEarth-S2 78.6/64.5 46.2/28.6 84.5 33.3
4 MMEarth-PixelM 79.3/66.4 49.5/37.0 80.4 34.1
4 MMEarth-ImageM 81.3/68.1 54.6/42.9 81.0 34.0
4 MMEarth 80.0/68.2 55.9/44.2 81.4 34.5
5 GASSL 70.3/64.3 44.7/38.2 79.3 21.5
5 SeCO 77.6/71.8 47.6/40.8 78.9 24.4
5 SatlasPretrain 72.3/61.1 38.5/27.5 65.5 19.6
A3 MMEarth100k 75.5/63.3 42.9/31.4 68.4 30.6
A3 MMEarth64 82.8/67.4 56.9/42.3 81.6 35.8
A5 MMEarth_equal_weights 80.9/69.3 58.8/41.5 80.1 34.2
"""


def rows(number: str) -> dict[str, PaperRow]:
    [table] = [table for table in papers().tables if table.number == number]
    return {f"{row.encoder}, {row.statistics}": row for row in table.rows}


@pytest.mark.parametrize("line", CELLS.strip().splitlines())
def test_the_numbers_are_the_paper_s(line: str) -> None:
    number, name, big_earth, so2sat, cashew, crop = line.split()
    row = rows(number)[f"{name.replace('_', ' ')}, data set"]
    first = dict(zip(("fine_tuning", "linear"), map(float, big_earth.split("/")), strict=True))
    second = dict(zip(("fine_tuning", "linear"), map(float, so2sat.split("/")), strict=True))
    assert row.numbers() == {
        **{("BigEarth20k", protocol): score for protocol, score in first.items()},
        **{("So2Sat20k", protocol): score for protocol, score in second.items()},
        ("Cashew1k", "segmentation"): float(cashew),
        ("SAcrop3k", "segmentation"): float(crop),
    }


def test_the_tables_agree_where_they_say_the_same() -> None:
    assert [table.number for table in papers().tables] == ["3", "4", "5", "A2", "A3", "A4", "A5"]
    known: dict[Any, float] = {}
    for table in papers().tables:
        for row in table.rows:
            for key, score in row.numbers().items():
                assert known.setdefault((row.encoder, row.statistics, *key), score) == score
    assert rows("A2")["MMEarth, data set"].linear_first_layer == {"So2Sat20k": 49.8}
    assert rows("A2")["MMEarth-S2, data set"].linear_first_layer == {"So2Sat20k": 37.0}
    l2a, l1c = rows("A4")["MMEarth, l2a"], rows("A4")["MMEarth, l1c"]
    assert (l2a.fine_tuning, l2a.linear, l2a.segmentation) == (
        {"BigEarth20k": 82.3},
        {"BigEarth20k": 71.3},
        {"Cashew1k": 79.3},
    )
    assert (l1c.fine_tuning, l1c.linear) == ({"So2Sat20k": 55.6}, {"So2Sat20k": 43.4})


@pytest.mark.parametrize(
    ("change", "counts"),
    [
        ({}, True),
        ({"train_samples": 19_992, "samples": 19_992, "test_samples": 986}, True),
        ({"samples": 1000}, False),
        ({"test_samples": 100}, False),
        ({"overlap": 3}, False),
        ({"statistics": "l2a"}, False),
        ({"protocol": "knn"}, False),
        ({"paper": None}, False),
        ({"paper_dataset": "BigEarth20k"}, False),
    ],
)
def test_only_a_run_on_the_whole_data_set_stands_beside_a_number(change: dict[str, Any], counts: bool) -> None:
    row = {
        "paper": "MMEarth",
        "paper_dataset": "So2Sat20k",
        "protocol": "linear",
        "statistics": "data set",
        "samples": 20_000,
        "train_samples": 20_000,
        "test_samples": 1000,
        "overlap": 0,
        **change,
    }
    found = measured([row], rows("4")["MMEarth, data set"], "So2Sat20k", "linear")
    assert (found is row) == counts


@pytest.mark.parametrize("name", RECIPES)
def test_the_packaged_evaluations_have_the_paper_s_settings(name: str) -> None:
    experiment = read_evaluation(FOLDER / f"{name}.toml")
    assert isinstance(experiment, GeobenchExperiment)
    assert len(experiment.seeds) == 3
    for protocol in ("fine_tuning", "linear", "linear_first_layer"):
        settings = getattr(experiment, protocol)
        if settings is not None:
            assert (settings.epochs, settings.weight_decay, settings.label_smoothing) == (100, 0.3, 0.2)
            assert settings.warmup_epochs == 0
            assert settings.base_lr == pytest.approx(2e-4)
            if name != "few_shot":
                assert settings.lr == pytest.approx(8e-4)
    if tuning := experiment.fine_tuning:
        assert (tuning.layer_decay, tuning.drop_path) == (0.9, 0.1)
    if masks := experiment.segmentation:
        assert (masks.frozen_epochs, masks.epochs, masks.batch) == (50, 200, 32)
        assert masks.lr == pytest.approx(1.25e-3)
    for encoder in experiment.encoders:
        if isinstance(encoder, MpMae):
            assert encoder.paper in papers().encoders()
            published = parse_folder(str(encoder.weights).split("/")[1])
            assert (published.size, published.patch, published.inputs) == (encoder.size, encoder.patch, encoder.inputs)
    small = ["seeds=[0]", f"{next(iter(experiment.protocols))}.epochs=60", "encoders.0.weights=elsewhere.pth"]
    changed = read_evaluation(FOLDER / f"{name}.toml", small)
    assert isinstance(changed, GeobenchExperiment)
    assert changed.seeds == [0]
    assert getattr(changed.encoders[0], "weights", None) == "elsewhere.pth"


def test_the_recipes_together_do_every_protocol_of_the_tables() -> None:
    done: set[Protocol] = set()
    for name in RECIPES:
        experiment = read_evaluation(FOLDER / f"{name}.toml")
        assert isinstance(experiment, GeobenchExperiment)
        done |= set(experiment.protocols)
    assert done == {"fine_tuning", "linear", "linear_first_layer", "knn", "segmentation"}
    few = read_evaluation(FOLDER / "few_shot.toml")
    assert isinstance(few, GeobenchExperiment)
    assert all(dataset.samples[0] == 100 and dataset.samples[-1] == "all" for dataset in few.geobench)
    recipe = read_recipe(FOLDER / "compressed_recipe.toml", ["train.beta=0.98"])
    assert (recipe.data.size, recipe.model.family, recipe.model.patch, recipe.train.beta) == (32, "mp_mae", 8, 0.98)

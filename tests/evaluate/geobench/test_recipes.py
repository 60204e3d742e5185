"""The packaged evaluations, each run as small as it says, on generated data sets in the place of the published ones.

compressed.toml, which needs codecs and archives, has `test_compressed.py`.
"""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch

import nec_ray
from nec_ray.config import read_toml
from nec_ray.models.mmearth_weights import mmearth_tensors, parse_folder
from nec_ray.models.mp_mae import MpMae
from nec_ray.tiles.modalities import SENTINEL2_BANDS
from tests.command import nec_here
from tests.evaluate.geobench.test_geobench_report import tables
from tests.tiles.geobench_files import S2_NAMES, SO2SAT_NAMES, write_dataset

FOLDER = Path(nec_ray.__file__).parent / "data" / "geobench"
RECIPES = ("classification", "first_layer", "few_shot", "segmentation", "statistics")
TASKS = {
    "m-bigearthnet": "multi-label",
    "m-so2sat": "classification",
    "m-eurosat": "classification",
    "m-cashew-plant": "segmentation",
    "m-SA-crop-type": "segmentation",
}
OF_TASKS = {
    "multi-label": {"fine_tuning", "linear", "linear_first_layer", "knn"},
    "classification": {"fine_tuning", "linear", "linear_first_layer", "knn"},
    "segmentation": {"segmentation"},
}


def document(recipe: str) -> dict[str, Any]:
    return read_toml(FOLDER / f"{recipe}.toml", "evaluation")


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with all that the recipes name: data sets, statistics and, of random numbers, published weights."""
    folder = tmp_path_factory.mktemp("geobench")
    for number, (name, task) in enumerate(TASKS.items()):
        at = folder / "geobench" / ("segmentation_v1.0" if task == "segmentation" else "classification_v1.0") / name
        at.parent.mkdir(parents=True, exist_ok=True)
        bands = SO2SAT_NAMES if name == "m-so2sat" else S2_NAMES
        samples = 204 if name == "m-eurosat" else 12  # half of them to train on
        write_dataset(at, task, samples=samples, classes=3, size=32, names=bands, seed=number)
    count = len(SENTINEL2_BANDS)
    plain = {f"sentinel2_{kind}": {"mean": [4500.0] * count, "std": [2600.0] * count} for kind in ("l1c", "l2a")}
    (folder / "data_1M_v001_band_stats.json").write_text(json.dumps(plain))
    torch.manual_seed(0)
    made: dict[Any, dict[str, torch.Tensor]] = {}
    for path in {encoder["weights"] for recipe in RECIPES for encoder in document(recipe)["encoders"]}:
        said = parse_folder(path.split("/")[1])
        if (said.inputs, said.patch) not in made:
            whole = mmearth_tensors(MpMae(said.config()))
            made[said.inputs, said.patch] = {name: one for name, one in whole.items() if name.startswith("encoder.")}
        (folder / path).parent.mkdir(parents=True)
        torch.save({"model": made[said.inputs, said.patch]}, folder / path)
    return folder


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_recipe_is_run_as_small_as_it_says(recipe: str, work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(work)
    text = (FOLDER / f"{recipe}.toml").read_text()
    small = re.findall(r"--set \S+", text.split('\ntitle = "')[0])
    assert small[0] == "--set seeds=[0]"
    done = nec_here("evaluate", FOLDER / f"{recipe}.toml", "--out", recipe, *" ".join(small).split())
    assert done.returncode == 0, done.stderr
    asked = document(recipe)
    expected = set()
    for dataset in asked["geobench"]:
        name = dataset["folder"].split("/")[1]
        of = dataset.get("statistics", "data set")
        counts = {min(one, 102) if isinstance(one, int) else 102 for one in dataset.get("samples", ["all"])}
        for encoder in asked["encoders"]:
            for protocol in OF_TASKS[TASKS[name]] & set(asked):
                for count in counts if name == "m-eurosat" else {6}:
                    expected.add((name, of, encoder["name"], protocol, count))
    found = json.loads((work / recipe / "results.json").read_text())["summary"]
    assert expected == {
        (one["task_name"].split(",")[0], one["statistics"], one["method"], one["protocol"], one["samples"])
        for one in found
    }
    lines = [line for some in tables(work / recipe / "report.html").values() for line in some]
    assert len(lines) == 25
    assert not any("training samples" in line for line in lines), "generated samples stand beside no number of a paper"
    assert (work / recipe / "label_efficiency-3.png").exists() == (recipe == "few_shot")

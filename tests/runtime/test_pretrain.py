"""MP-MAE's pretraining on invented samples of MMEarth's format: what workers read, learn and leave, and on Ray."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from nec_ray.codec import load_codec
from nec_ray.errors import BadRecipe, BadSource
from nec_ray.evaluate.reconstructions import Reconstruction, reconstruct, reconstructions
from nec_ray.models.mmearth_weights import import_pretraining
from nec_ray.models.mp_mae import MpMae, MpMaeConfig
from nec_ray.models.optimise import parameter_groups, pretext_gradients
from nec_ray.models.pretext import normalise_patches, random_crop
from nec_ray.runtime.pretrain_data import (
    check_modalities,
    compact,
    local_modalities,
    modalities_of,
    statistics_of,
)
from nec_ray.runtime.pretrain_loop import Pretrainer, batch_of, initial_pretraining
from nec_ray.runtime.recipe import Recipe
from nec_ray.runtime.train import read_metrics, train
from nec_ray.runtime.train_data import bands_of
from nec_ray.runtime.train_files import FIELDS
from nec_ray.tiles import build_catalog, builtin_scene, read_catalog, write_catalog
from nec_ray.tiles.invented import generate

ROOT = Path(__file__).parents[2]
SAMPLES, SIDE, SIZE = 16, 24, 16
_TRAIN = """
import sys
from pathlib import Path
from nec_ray.runtime.recipe import Recipe
from nec_ray.runtime.train import train
train(Recipe.model_validate_json(Path(sys.argv[1]).read_text()), sys.argv[2])
"""


@pytest.fixture(scope="module")
def catalog(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("mmearth")
    file = generate(folder / "files", samples=SAMPLES, side=SIDE, seed=3)
    write_catalog(build_catalog(file), str(folder / "catalog.parquet"))
    return folder / "catalog.parquet"


def recipe(catalog: Path, model: dict[str, object] | None = None, **train_section: object) -> Recipe:
    return Recipe.model_validate(
        {
            "data": {"catalog": str(catalog), "size": SIZE, "max_tiles": SAMPLES},
            "model": {"family": "mp_mae", "size": "atto", "patch": 8, "targets": "pixel", **(model or {})},
            "train": {
                "pretrain_epochs": 2,
                "adapt_epochs": 0,
                "batch_size": 8,
                "checkpoint_every": 1,
                "lr": 2e-4,
                **train_section,
            },
        }
    )


def shares(given: Recipe) -> dict[str, Any]:
    rows = read_catalog(given.data.catalog)
    return compact(rows.table, modalities_of(given), bands_of(given, rows), check_modalities(given, rows))


def test_workers_keep_what_the_file_has_by_name_and_statistics(catalog: Path) -> None:
    """Against the HDF5 file, read here: bands by name, standardised by its level's statistics, classes from 0."""
    given = recipe(catalog, {"inputs": "rgb", "targets": "all"})
    read = local_modalities([shares(given)])
    files = catalog.parent / "files"
    statistics = json.loads((files / "data_invented_band_stats.json").read_text())
    with h5py.File(files / "data_invented.h5") as file:
        raw = {name: file[name][:] for name in ("sentinel2", "esa_worldcover", "aster", "eco_region")}
        levels = [bytes(row["S2_type"]).decode().strip("\0 ") for row in file["metadata"][:]]
    missing = (raw["sentinel2"][:, 1:4] == 0).mean(axis=(1, 2, 3)) > 0.5
    chosen = np.flatnonzero(~missing)
    assert all(len(values) == len(chosen) for values in read.values())
    assert read["sentinel2"].shape[1:] == (3, SIDE, SIDE)
    for mine, number in zip(read["sentinel2"], chosen, strict=True):
        of_level = statistics[f"sentinel2_{levels[number]}"]
        for channel, place in enumerate((1, 2, 3)):  # B2, B3 and B4 in the file's order
            pixels = raw["sentinel2"][number, place].astype(np.float64)
            expected = (pixels - of_level["mean"][place]) / of_level["std"][place]
            np.testing.assert_allclose(mine[channel], np.where(pixels == 0, np.nan, expected), rtol=2e-3, atol=2e-3)
    codes = [10, 20, 30, 40, 50, 60, 70, 80, 90, 95, 100]
    for mine, number in zip(read["esa_worldcover"], chosen, strict=True):
        theirs = raw["esa_worldcover"][number]
        assert (np.where(mine >= 0, np.take(codes, mine), 0) == np.where(np.isin(theirs, codes), theirs, 0)).all()
    hot = raw["eco_region"][chosen]
    there = (hot == 1).sum(axis=1) == 1
    np.testing.assert_array_equal(read["eco_region"][:, 0], np.where(there, hot.argmax(axis=1), -1))


def test_a_share_in_several_blocks_is_one_in_order_and_empty_blocks_do_not_matter(catalog: Path) -> None:
    given = recipe(catalog)
    rows = read_catalog(catalog).table
    names, bands = modalities_of(given), bands_of(given, read_catalog(catalog))
    broken = rows.slice(0, 2).set_column(
        rows.column_names.index("source"), "source", [[f"{row}9999" for row in rows["source"].to_pylist()[:2]]]
    )
    parts = [compact(part, names, bands, SIDE) for part in (broken, rows.slice(0, 5), rows.slice(5))]
    assert {len(values) for values in parts[0].values()} == {0}
    whole = local_modalities([shares(given)])
    for name, values in local_modalities(parts).items():
        np.testing.assert_array_equal(values, whole[name])


def test_the_classes_of_what_decays_are_the_papers(catalog: Path) -> None:
    """One-dimensional parameters and GRN do not."""
    model = initial_pretraining(recipe(catalog))[0]
    decayed = {id(p) for p in parameter_groups(model, 0.05)[0]["params"]}
    for name, weight in model.named_parameters():
        free = weight.ndim == 1 or name.endswith(("grn.gamma", "grn.beta", "mask_token"))
        assert (id(weight) not in decayed) == free, name


def test_gradients_in_parts_are_those_of_the_whole_where_nothing_is_missing() -> None:
    torch.manual_seed(0)
    model = MpMae(MpMaeConfig.mmearth("atto", pixels=16, patch=8, targets="s2"))
    pixels = torch.randn(4, 12, 16, 16)
    found = []
    for accumulate in (1, 2):
        model.zero_grad()
        means = pretext_gradients(
            model, pixels, {"sentinel2": pixels}, mask_ratio=0.0, generator=None, accumulate=accumulate
        )
        assert means[1].tolist() == [1.0, 1.0]
        found.append([means, *(p.grad.clone() for p in model.parameters() if p.grad is not None)])
    for whole, parts in zip(*found, strict=True):
        torch.testing.assert_close(parts, whole, rtol=1e-3, atol=1e-5)


def test_a_worker_counts_what_is_there_and_nothing_else(catalog: Path) -> None:
    """A task of which the whole share has nothing is NaN in the metrics, and its uncertainty stays."""
    given = recipe(catalog, {"targets": "pixel"})
    tiles = {name: np.array(values[:8]) for name, values in shares(given).items()}
    tiles["sentinel1"][:] = np.nan
    model = initial_pretraining(given)[0]
    worker = Pretrainer(model, given, tiles, torch.device("cpu"), 0, 1)
    row = worker.epoch(1)
    assert np.isnan(row["loss_sentinel1"])
    assert row["log_var_sentinel1"] == 0
    assert row["log_var_aster"] != 0
    # log variances have hardly moved: the weighted loss is nearly the sum of the others.
    others = [value for name, value in row.items() if name.startswith("loss_") and name != "loss_sentinel1"]
    assert row["loss"] == pytest.approx(sum(others), rel=0.01)


def test_reconstructions_of_a_perfect_decoder_are_the_targets(catalog: Path, tmp_path: Path) -> None:
    """A stand-in decoder predicts the targets as the losses want them; the picture's predictions must be these."""
    given = recipe(catalog, {"targets": "all"})
    tiles = {name: values[:2] for name, values in shares(given).items()}
    targets = random_crop(batch_of(tiles, np.arange(2), torch.device("cpu")), SIZE, torch.Generator().manual_seed(0))
    model = initial_pretraining(given)[0].eval()

    def patches(values: torch.Tensor) -> torch.Tensor:
        rows = values.unfold(2, 8, 8).unfold(3, 8, 8)  # batch, channel, patch row, patch column, row, column
        return rows.permute(0, 2, 3, 4, 5, 1).reshape(len(values), 4, -1)

    class Perfect(torch.nn.Module):
        patch = 8

        def forward(self, *_: torch.Tensor) -> dict[str, torch.Tensor]:
            made = {}
            for output in model.config.outputs:
                target = targets[output.name]
                value = patches(target) if output.level == "pixel" else target
                if output.kind == "categorical":
                    value = torch.nn.functional.one_hot(value.clamp(min=0), output.classes).flatten(-2).float()
                made[output.name] = normalise_patches(value) if output.patch_normalised else value
            return made

    model.decoder = Perfect()
    found = reconstruct(model, targets["sentinel2"], targets, 0.6, torch.Generator().manual_seed(0))
    for name, made in found.predicted.items():
        theirs = targets[name].numpy()
        there = theirs >= 0 if theirs.dtype == np.int64 else ~np.isnan(theirs)
        np.testing.assert_allclose(made[there], theirs[there], rtol=1e-3, atol=1e-3, err_msg=name)
    seen = found.visible.reshape(2, 2, 8, 2, 8).mean(axis=(2, 4))
    assert set(seen.flatten().tolist()) <= {0.0, 1.0}
    assert (seen.sum(axis=(1, 2)) == 1).all()  # 4 patches, int(4 * 0.4) are visible
    rows = read_catalog(catalog)
    bands = bands_of(given, rows)
    path = reconstructions(found, bands, statistics_of(given, rows), tmp_path / "r.png")
    assert path.stat().st_size > 20_000
    only = Reconstruction(
        found.visible, {"sentinel2": found.targets["sentinel2"]}, {"sentinel2": found.predicted["sentinel2"]}
    )
    assert reconstructions(only, bands, {}, tmp_path / "s2.png").stat().st_size > 3_000


def test_what_cannot_be_pretrained_is_refused_before_ray_starts(catalog: Path, tmp_path: Path) -> None:
    path = tmp_path / "scene.parquet"
    write_catalog(build_catalog(str(builtin_scene()), tile_size=32), str(path))
    with pytest.raises(BadSource, match="no catalog of MMEarth's HDF5 files") as caught:
        train(recipe(path), tmp_path / "a")
    assert "\n" not in str(caught.value)
    large = recipe(catalog)
    large = large.model_copy(update={"data": large.data.model_copy(update={"size": 32})})
    with pytest.raises(BadSource, match=r"tiles of 24 pixels a side; pretraining takes windows of data.size 32"):
        train(large, tmp_path / "b")
    with pytest.raises(ValueError, match=r"leave data.bands, data.normalise, data.mean and data.std out"):
        Recipe.model_validate({**large.model_dump(), "data": {**large.data.model_dump(), "bands": ["B2"]}})


@pytest.fixture(scope="module")
def run(catalog: Path, local_ray: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a whole, undisturbed run."""
    out = tmp_path_factory.mktemp("pretrain") / "run"
    assert train(recipe(catalog), out) == str(out / "weights.safetensors")
    return out


@pytest.mark.slow
def test_a_run_leaves_metrics_pictures_and_weights_of_the_published_layout(run: Path, catalog: Path) -> None:
    rows = read_metrics(run / "metrics.csv")
    assert [(row["epoch"], row["phase"]) for row in rows] == [("1", "pretrain"), ("2", "pretrain")]
    tasks = modalities_of(recipe(catalog))
    added = ["loss", *(f"loss_{name}" for name in tasks), *(f"log_var_{name}" for name in tasks)]
    assert list(rows[0]) == [*FIELDS[:-1], *added, FIELDS[-1]]
    assert all(float(row["mse"]) == float(row["loss_sentinel2"]) > 0 for row in rows)
    tensors = load_file(run / "weights.safetensors")
    model = MpMae(MpMaeConfig.mmearth("atto", pixels=SIZE, patch=8, targets="pixel"))
    import_pretraining(model, tensors, "weights")
    assert tensors["loss_fn.log_vars"].tolist() == pytest.approx(
        [float(rows[1][f"log_var_{name}"]) for name in tasks], abs=1e-6
    )
    for name in ("loss.png", "uncertainties.png", "reconstructions.png"):
        assert (run / name).stat().st_size > 10_000
    left = {path.name for path in run.iterdir()}
    assert not left & {"ray", "ray-pretraining", "codec", "input.json"}
    with pytest.raises(BadRecipe, match=r"another recipe \(model.targets\)"):
        train(recipe(catalog, {"targets": "s2"}), run)


@pytest.mark.slow
def test_a_killed_run_goes_on_to_the_weights_of_an_undisturbed_one(run: Path, catalog: Path, tmp_path: Path) -> None:
    """The driver and its whole Ray are killed after an epoch; the same call in another process finishes."""
    out, path = tmp_path / "run", tmp_path / "recipe.json"
    path.write_text(recipe(catalog).model_dump_json())
    driver = subprocess.Popen(
        [sys.executable, "-W", "ignore", "-c", _TRAIN, str(path), str(out)],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        start_new_session=True,
    )
    deadline = time.monotonic() + 600

    def kept() -> bool:
        return any((out / "ray-pretraining").rglob("state.pt"))

    while not kept() and time.monotonic() < deadline and driver.poll() is None:
        time.sleep(0.01)
    os.killpg(driver.pid, signal.SIGKILL)
    driver.wait()
    assert kept()
    assert not (out / "weights.safetensors").exists()
    assert train(recipe(catalog), out) == str(out / "weights.safetensors")
    rows, undisturbed = read_metrics(out / "metrics.csv"), read_metrics(run / "metrics.csv")
    assert len(rows) == len(undisturbed)
    for name, tensor in load_file(run / "weights.safetensors").items():
        torch.testing.assert_close(load_file(out / "weights.safetensors")[name], tensor, msg=name)


@pytest.mark.slow
def test_one_recipe_pretrains_and_adapts_with_two_workers(catalog: Path, local_ray: None, tmp_path: Path) -> None:
    given = recipe(
        catalog,
        {"inputs": "rgb", "targets": "s2", "stages": [3]},
        pretrain_epochs=1,
        adapt_epochs=1,
        workers=2,
        accumulate=2,
    )
    assert train(given, tmp_path / "run") == str(tmp_path / "run" / "codec")
    rows = read_metrics(tmp_path / "run" / "metrics.csv")
    assert [(row["epoch"], row["phase"], bool(row["loss"])) for row in rows] == [
        ("1", "pretrain", True),
        ("2", "adapt", False),
    ]
    codec = load_codec(tmp_path / "run" / "codec")
    assert (codec.spec.family, codec.spec.input.bands) == ("mp_mae", ["B2", "B3", "B4"])
    statistics = json.loads((catalog.parent / "files" / "data_invented_band_stats.json").read_text())
    assert codec.spec.input.mean == statistics["sentinel2_l2a"]["mean"][1:4]  # as in pretraining
    assert codec.spec.input.std == statistics["sentinel2_l2a"]["std"][1:4]
    # The paper's set does not adapt the first stage's blocks: they are the pretrained ones.
    pretrained = load_file(tmp_path / "run" / "weights.safetensors")["encoder.stages.0.0.dwconv.bias"][0]
    mine = torch.from_numpy(np.array(codec.tensors("encoder")["encoder.stages.0.0.dwconv.bias"]))
    torch.testing.assert_close(mine, pretrained)
    assert pretrained.abs().max() > 0

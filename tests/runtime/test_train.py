"""Whole training runs on a real local Ray and the built-in scene."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from nec_ray.codec import load_codec
from nec_ray.errors import BadRecipe, BadSource, CodecMismatch, InputError, NotFound
from nec_ray.models.embed import Embedder
from nec_ray.runtime.recipe import Recipe
from nec_ray.runtime.train import _alone, read_metrics, train
from nec_ray.tiles import build_catalog, builtin_scene, read_tiles, write_catalog

ROOT = Path(__file__).parents[2]
EPOCHS = 6
_TRAIN = """
import sys
from pathlib import Path
from nec_ray.runtime.recipe import Recipe
from nec_ray.runtime.train import train
train(Recipe.model_validate_json(Path(sys.argv[1]).read_text()), sys.argv[2])
"""


@pytest.fixture(scope="module")
def catalog(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("catalog") / "catalog.parquet"
    write_catalog(build_catalog(str(builtin_scene()), tile_size=32), str(path))
    return path


def recipe(catalog: Path, **train_section: object) -> Recipe:
    return Recipe.model_validate(
        {
            "data": {"catalog": str(catalog), "size": 32, "max_tiles": 320},
            "model": {"size": "micro", "patch": 8, "depth": 2},
            "train": {
                "pretrain_epochs": 3,
                "adapt_epochs": 3,
                "trainable": "all",
                "batch_size": 32,
                "checkpoint_every": 1,
                **train_section,
            },
        }
    )


@pytest.fixture(scope="module")
def run(catalog: Path, local_ray: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a whole, undisturbed run."""
    out = tmp_path_factory.mktemp("train") / "run"
    lines: list[str] = []
    assert train(recipe(catalog), out, progress=lines.append) == out / "codec"
    assert sum("epoch" in line for line in lines) == EPOCHS
    return out


@pytest.mark.slow
def test_a_run_learns_and_leaves_a_codec_that_codes_real_tiles(run: Path, catalog: Path) -> None:
    rows = read_metrics(run / "metrics.csv")
    assert [int(row["epoch"]) for row in rows] == list(range(1, EPOCHS + 1))
    assert [row["phase"] for row in rows] == ["pretrain"] * 3 + ["adapt"] * 3
    assert float(rows[2]["mse"]) < 0.95 * float(rows[0]["mse"])
    assert float(rows[-1]["bits"]) < 0.95 * float(rows[3]["bits"])
    assert (run / "loss.png").stat().st_size > 5_000
    codec = load_codec(run / "codec")
    spec = codec.spec
    assert spec.input.bands == ["red", "green", "blue"]
    assert spec.lineage.beta == 0.01
    tiles = build_catalog(str(builtin_scene()), tile_size=32).table.slice(420, 16)
    pixels = read_tiles(tiles, bands=spec.input.bands, size=32, fill=spec.input.mean).pixels
    # The scene's own statistics: normalised pixels of many tiles are near mean 0 and standard deviation 1.
    scaled = (pixels - np.array(spec.input.mean)[:, None, None]) / np.array(spec.input.std)[:, None, None]
    assert abs(scaled.mean()) < 1
    assert 0.2 < scaled.std() < 3
    symbols = Embedder(codec).symbols(pixels)
    np.testing.assert_array_equal(codec.decompress(codec.compress(symbols)), symbols)


@pytest.mark.slow
def test_a_second_call_returns_the_finished_codec_and_another_recipe_is_refused(run: Path, catalog: Path) -> None:
    before = load_codec(run / "codec").id
    lines: list[str] = []
    assert train(recipe(catalog), run, progress=lines.append) == run / "codec"
    assert lines == [f"trained already: {run / 'codec'}"]
    with pytest.raises(BadRecipe, match=r"another recipe \(train.beta\)"):
        train(recipe(catalog, beta=0.5), run)
    assert load_codec(run / "codec").id == before


@pytest.mark.slow
def test_a_killed_run_goes_on_to_the_codec_of_an_undisturbed_one(run: Path, catalog: Path, tmp_path: Path) -> None:
    """The driver and its whole Ray are killed in the middle; the same call in another process finishes."""
    out = tmp_path / "run"
    path = tmp_path / "recipe.json"
    path.write_text(recipe(catalog).model_dump_json())
    driver = subprocess.Popen(
        [sys.executable, "-W", "ignore", "-c", _TRAIN, str(path), str(out)],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        start_new_session=True,
    )
    deadline = time.monotonic() + 150
    while len(read_metrics(out / "metrics.csv")) < 2 and time.monotonic() < deadline and driver.poll() is None:
        time.sleep(0.02)
    os.killpg(driver.pid, signal.SIGKILL)
    driver.wait()
    reached = len(read_metrics(out / "metrics.csv"))
    assert 2 <= reached < EPOCHS
    assert not (out / "codec").exists()
    assert train(recipe(catalog), out) == out / "codec"
    assert [int(row["epoch"]) for row in read_metrics(out / "metrics.csv")] == list(range(1, EPOCHS + 1))
    assert load_codec(out / "codec").id == load_codec(run / "codec").id


@pytest.mark.slow
def test_two_workers_train_one_model(catalog: Path, local_ray: None, tmp_path: Path) -> None:
    codec = load_codec(train(recipe(catalog, workers=2, trainable="paper"), tmp_path / "run"))
    rows = read_metrics(tmp_path / "run" / "metrics.csv")
    assert len(rows) == EPOCHS
    assert float(rows[2]["mse"]) < 0.95 * float(rows[0]["mse"])
    assert codec.spec.lineage.bits_per_symbol > 0


def test_what_cannot_be_trained_is_refused_before_ray_starts(catalog: Path, tmp_path: Path) -> None:
    with pytest.raises(NotFound):
        train(recipe(tmp_path / "none.parquet"), tmp_path / "a")
    wanted = recipe(catalog)
    nir = wanted.model_copy(update={"data": wanted.data.model_copy(update={"bands": ["nir"]})})
    with pytest.raises(CodecMismatch, match="nir"):
        train(nir, tmp_path / "b")
    (tmp_path / "c").mkdir()
    (tmp_path / "c" / "thesis.tex").write_text("mine")
    with pytest.raises(InputError, match="not empty and no training run"):
        train(wanted, tmp_path / "c", restart=True)
    assert (tmp_path / "c" / "thesis.tex").read_text() == "mine"


def test_a_second_run_in_the_same_folder_is_refused_while_the_first_is_at_work(catalog: Path, tmp_path: Path) -> None:
    with _alone(tmp_path / "out"), pytest.raises(InputError, match="another run is at work in it"):
        train(recipe(catalog), tmp_path / "out")
    with _alone(tmp_path / "out"):
        pass


def test_a_catalog_of_unreadable_tiles_is_refused(tmp_path: Path, local_ray: None) -> None:
    folder = tmp_path / "images"
    folder.mkdir()
    (folder / "broken.jpg").write_bytes(b"\xff\xd8\xff\xe0 no picture")
    write_catalog(build_catalog(str(folder)), str(tmp_path / "catalog.parquet"))
    with pytest.raises(BadSource, match="no tile of the sample is whole"):
        train(recipe(tmp_path / "catalog.parquet"), tmp_path / "run")

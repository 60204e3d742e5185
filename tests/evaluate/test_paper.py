"""What is packaged to reproduce the paper's Fig. 3: configs, settings, and UCMerced's layout."""

import os
import subprocess
from pathlib import Path

import numpy as np
import pytest
import rasterio

import nec_ray
from nec_ray.evaluate.experiment import Embeddings, Quantised, Raw, curves, read_experiment
from nec_ray.evaluate.labels import hash_split
from nec_ray.runtime.recipe import read_recipe
from nec_ray.tiles import build_catalog, read_tiles

PAPER = Path(nec_ray.__file__).parent / "data" / "paper"
LAMBDAS = {"1e7": 0.98, "1e8": 0.098, "1e9": 0.0098, "1e10": 0.00098}


@pytest.mark.parametrize(("name", "size", "task"), [("ucmerced", 256, "head"), ("potsdam", 512, "segmentation")])
def test_the_packaged_evaluation_is_the_paper_s(name: str, size: int, task: str) -> None:
    experiment = read_experiment(PAPER / f"{name}.toml")
    assert experiment.tasks == [task]
    assert len(experiment.seeds) >= 3
    assert {"NEC", "NEC, first decoder layer", "UQE", "JPEG 2000", "RDC"} <= set(curves(experiment))
    nec = [method for method in experiment.methods if isinstance(method, Embeddings)]
    assert {method.archive for method in nec} == {f"nec-{rate}.archive" for rate in LAMBDAS}
    quantised = [method for method in experiment.methods if isinstance(method, Quantised)]
    assert {method.precision for method in quantised} == {"int2", "int3", "int5", "int8", "float16", "float32"}
    assert all(method.ranges == "tensor" for method in quantised)
    raw = [method for method in experiment.methods if isinstance(method, Raw)]
    assert {(method.bits, method.encoder) for method in raw} == {(8, "trained"), (16, "trained")}
    script = (PAPER / "reproduce.sh").read_text()
    for rate, beta in LAMBDAS.items():
        assert f"{rate}:{beta}" in script
        settings = [f"train.beta={beta}", "model.init=weights.safetensors", "data.catalog=tiles.parquet"]
        recipe = read_recipe(PAPER / f"{name}-recipe.toml", settings)
        assert recipe.data.augment == ["crop", "flip"]  # RandomResizedCrop(0.2-1) and a flip; no turns
        assert (recipe.data.size, recipe.data.bands, recipe.train.beta) == (size, ["red", "green", "blue"], beta)


def test_the_script_calls_what_there_is(tmp_path: Path) -> None:
    """Its commands are written down by a `nec` that does nothing, and read by the real command line's parser."""
    from typer.main import get_command

    from nec_ray.cli import app

    (tmp_path / "bin").mkdir()
    fake = tmp_path / "bin" / "nec"
    fake.write_text('#!/bin/sh\nfor part in "$@"; do printf "%s\\037" "$part"; done >> "$LOG"\necho >> "$LOG"\n')
    fake.chmod(0o755)
    env = {"PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}", "LOG": str(tmp_path / "log")}
    for name in ("ucmerced", "potsdam"):
        given = ["sh", str(PAPER / "reproduce.sh"), name, "data", f"out-{name}", "w.pth", "--set", "train.workers=2"]
        subprocess.run(given, cwd=tmp_path, env=env, check=True, timeout=60)
        assert (tmp_path / f"out-{name}" / f"{name}.toml").exists()
    assert (tmp_path / "out-potsdam" / "labels").readlink() == tmp_path / "data" / "5_Labels_all_noBoundary"
    calls = [line.split("\037")[:-1] for line in (tmp_path / "log").read_text().splitlines()]
    assert [call[0] for call in calls] == (["tiles"] + ["train"] + ["train", "encode"] * 4 + ["evaluate"]) * 2
    root = get_command(app)
    for call in calls:
        command, words = root, call
        while hasattr(command, "commands"):
            command, words = command.commands[words[0]], words[1:]
        command.make_context("nec", [word.replace("data/", "") for word in words], resilient_parsing=False).close()


def test_ucmerced_s_images_are_tiles_with_their_folder_as_class(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    pixels = {}
    for kind in ("agricultural", "airplane", "tenniscourt"):
        (tmp_path / kind).mkdir()
        for number in range(3):
            # Some of its images are a few pixels smaller or larger.
            height, width = (256, 256) if number else (250, 257)
            values = rng.integers(0, 256, (3, height, width)).astype(np.uint8)
            path = tmp_path / kind / f"{kind}{number:02}.tif"
            with rasterio.open(
                path, "w", driver="GTiff", count=3, height=height, width=width, dtype="uint8", photometric="RGB"
            ) as image:
                image.write(values)
            pixels[f"{kind}/{kind}{number:02}/y00000_x00000"] = values
    table = build_catalog(tmp_path, tile_size=512).select("true").table  # as reproduce.sh picks them
    assert sorted(table["tile_id"].to_pylist()) == sorted(pixels)
    for row in table.to_pylist():
        assert row["label"] == row["tile_id"].split("/")[0]
        assert row["bands"] == ["red", "green", "blue"]
    batch = read_tiles(table, bands=["red", "green", "blue"], size=256, fill=[0, 0, 0])
    for tile_id, read in zip(table["tile_id"].to_pylist(), batch.pixels, strict=True):
        if pixels[tile_id].shape[1:] == (256, 256):
            np.testing.assert_array_equal(read, pixels[tile_id])
    names = [f"{i}/{i}{n:02}/y00000_x00000" for i in range(21) for n in range(100)]
    assert 0.17 < np.mean([hash_split(name) for name in names]) < 0.23

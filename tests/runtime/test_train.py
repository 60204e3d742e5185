"""Whole training runs on a real local Ray and the built-in scene."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file
from safetensors.torch import save_file

from nec_ray.codec import load_codec
from nec_ray.errors import BadCheckpoint, BadRecipe, BadSource, CodecMismatch, InputError, NotFound
from nec_ray.models.embed import Embedder
from nec_ray.models.published import published_tensors
from nec_ray.runtime.recipe import Recipe
from nec_ray.runtime.train import read_metrics, train
from nec_ray.runtime.train_files import alone
from nec_ray.runtime.train_loop import _Worker, initial_model
from nec_ray.storage import Store
from nec_ray.tiles import build_catalog, builtin_scene, read_tiles, write_catalog
from tests.s3 import Server

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
            "model": {"size": "micro", "patch": 8, "depth": 2, "step": 0.8},
            "train": {
                "pretrain_epochs": 3,
                "adapt_epochs": 3,
                "adapt_mask_ratio": 0.5,
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
    assert train(recipe(catalog), out, progress=lines.append) == str(out / "codec")
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
    latents = Embedder(codec).latents(pixels)
    assert codec.transform is not None
    # Each axis is rounded, and the axes are all of the channels.
    error = np.sqrt(((codec.dequantise(symbols) - latents) ** 2).mean())
    assert 0.1 * codec.transform.step < error < 0.36 * codec.transform.step
    spread = codec.transform.forward(latents).std(axis=(0, 1))
    assert spread[0] > 2 * spread[-1]


@pytest.mark.slow
def test_a_second_call_returns_the_finished_codec_and_another_recipe_is_refused(run: Path, catalog: Path) -> None:
    before = load_codec(run / "codec").id
    lines: list[str] = []
    assert train(recipe(catalog), run, progress=lines.append) == str(run / "codec")
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
    deadline = time.monotonic() + 600
    while len(read_metrics(out / "metrics.csv")) < 2 and time.monotonic() < deadline and driver.poll() is None:
        time.sleep(0.02)
    os.killpg(driver.pid, signal.SIGKILL)
    driver.wait()
    reached = len(read_metrics(out / "metrics.csv"))
    assert 2 <= reached < EPOCHS
    assert not (out / "codec").exists()
    assert train(recipe(catalog), out) == str(out / "codec")
    assert [int(row["epoch"]) for row in read_metrics(out / "metrics.csv")] == list(range(1, EPOCHS + 1))
    assert load_codec(out / "codec").id == load_codec(run / "codec").id


_FAILURES = """
import os, sys
from pathlib import Path
import psutil
from ray.cluster_utils import Cluster
from nec_ray.runtime.recipe import Recipe
from nec_ray.runtime.train import train
cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0})
nodes = [cluster.add_node(num_cpus=2)]
os.environ["RAY_ADDRESS"] = cluster.address
killed = []
def fail(line):
    if line.startswith("epoch 2") and not killed:
        below = psutil.Process().children(recursive=True)
        [worker] = [one for one in below if "RayTrainWorker" in "".join(one.cmdline())]
        killed.append(worker.pid)
        worker.kill()
    if line.startswith("epoch 4") and len(nodes) == 1:
        nodes.append(cluster.add_node(num_cpus=2))
        cluster.remove_node(nodes[0], allow_graceful=False)
train(Recipe.model_validate_json(Path(sys.argv[1]).read_text()), sys.argv[2], progress=fail)
print("killed", len(killed), "nodes", len(nodes))
cluster.shutdown()
"""


@pytest.mark.slow
def test_a_killed_worker_and_then_a_lost_node_do_not_change_the_codec(run: Path, catalog: Path, tmp_path: Path) -> None:
    """The worker begins at the last checkpoint; a node takes the worker and its tiles with it, Ray makes both anew."""
    path, out = tmp_path / "recipe.json", tmp_path / "run"
    path.write_text(recipe(catalog).model_dump_json())
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    environment.pop("RAY_ADDRESS", None)
    command = [sys.executable, "-W", "ignore", "-c", _FAILURES, str(path), str(out)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    assert done.stdout.splitlines()[-1] == "killed 1 nodes 2"
    rows, undisturbed = read_metrics(out / "metrics.csv"), read_metrics(run / "metrics.csv")
    assert [int(row["epoch"]) for row in rows] == list(range(1, EPOCHS + 1))
    for name in ("mse", "bits"):
        assert [float(row[name]) for row in rows] == pytest.approx([float(row[name]) for row in undisturbed], rel=1e-4)
    assert load_codec(out / "codec").id == load_codec(run / "codec").id


@pytest.mark.slow
def test_pretraining_alone_leaves_weights_that_another_run_on_s3_adapts(
    catalog: Path, local_ray: None, s3_server: Server, tmp_path: Path
) -> None:
    """Checkpoints, metrics, TensorBoard's events and the codec on S3; layers, and a driver of its own as in a job."""
    weights = train(recipe(catalog, adapt_epochs=0), tmp_path / "mae")
    assert weights == str(tmp_path / "mae" / "weights.safetensors")
    assert not (tmp_path / "mae" / "codec").exists()
    bucket = f"s3://{s3_server.bucket()}"
    out = f"{bucket}/run"
    job = tmp_path / "recipe.toml"
    job.write_text(
        f"""
[data]
catalog = "{catalog}"
size = 32
max_tiles = 320
augment = ["crop", "flip"]
[model]
size = "micro"
patch = 8
depth = 2
init = "mae/weights.safetensors"
layers = [16, 112]
weights = "float16"
[train]
pretrain_epochs = 0
adapt_epochs = 2
workers = 2
accumulate = 2
batch_size = 32
"""
    )
    command = [sys.executable, "-W", "ignore", str(ROOT / "jobs" / "train.py"), str(job), "--out", out]
    environment = {**os.environ, **s3_server.environment, "PYTHONPATH": str(ROOT)}
    # In a folder of its own: the recipe's path is the driver's, workers are elsewhere.
    done = subprocess.run(
        command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=600, check=False
    )
    assert done.returncode == 0, done.stderr
    events = [json.loads(line)["event"] for line in done.stderr.splitlines() if line.startswith("{")]
    assert f"weights of {weights}: encoder and decoder" in events
    assert events[-1].startswith("epoch 2 of 2 (adapt)")
    assert json.loads(done.stdout) == {"result": f"{out}/codec"}
    first, second = read_metrics(f"{out}/metrics.csv")
    assert float(second["bits"]) < 0.95 * float(first["bits"])
    codec = load_codec(f"{out}/codec")
    assert [layer.channels for layer in codec.spec.layers] == [16, 112]
    assert codec.spec.lineage.parent == "weights.safetensors"
    encoder = codec.tensors("encoder")
    assert {array.dtype for array in encoder.values()} == {np.dtype(np.float16)}
    before = load_file(weights)
    # Adaptation leaves all but the last block as they were, in another order of channels.
    for mine, theirs in zip(encoder["blocks.0.mlp.fc1.bias"], before["blocks.0.mlp.fc1.bias"], strict=True):
        assert float(mine) == pytest.approx(float(theirs), abs=1e-3)
    variance = codec.golden().var(axis=(0, 1))
    assert variance[:16].mean() > variance[16:].mean()
    names = [name.removeprefix("run/") for name in Store(bucket).names("run")]
    assert not [name for name in names if name.startswith("ray/") or name == "input.json"]
    assert {"loss.png", "metrics.csv", "recipe.json", "codec/codec.json"} <= set(names)


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


def test_weights_that_are_not_there_leave_the_folder_as_it_was(
    catalog: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The corrected command is no run of another recipe, and --restart throws nothing away for a mistyped path."""

    def begun_from(name: str) -> Recipe:
        given = recipe(catalog)
        return given.model_copy(update={"model": given.model.model_copy(update={"init": str(tmp_path / name)})})

    out = tmp_path / "run"
    (tmp_path / "bad.pth").write_bytes(b"no weights")
    with pytest.raises(NotFound):
        train(begun_from("nope.pth"), out)
    with pytest.raises(BadCheckpoint):
        train(begun_from("bad.pth"), out)
    monkeypatch.setattr("nec_ray.runtime.train._train", lambda *_: "trained")
    model = initial_model(recipe(catalog), 3)[0]
    save_file(published_tensors(model.encoder, model.decoder), tmp_path / "good.safetensors")
    lines: list[str] = []
    assert train(begun_from("good.safetensors"), out, progress=lines.append) == "trained"
    assert lines == [f"weights of {tmp_path / 'good.safetensors'}: encoder and decoder"]
    (out / "metrics.csv").write_text("epoch\n")
    with pytest.raises(NotFound):
        train(begun_from("nope.pth"), out, restart=True)
    assert (out / "metrics.csv").exists()
    with pytest.raises(BadRecipe, match=r"another recipe \(model.init\)"):
        train(recipe(catalog), out)


@pytest.mark.parametrize(("pretrain_epochs", "trained"), [(0, True), (2, False)])
def test_a_decoder_that_was_pretrained_is_no_longer_new(catalog: Path, pretrain_epochs: int, trained: bool) -> None:
    """The paper's adaptation leaves the decoder's further blocks as they are, unless they are random still."""
    given = recipe(catalog, pretrain_epochs=pretrain_epochs)
    how = given.train.model_copy(update={"trainable": "paper"})
    given = given.model_copy(update={"train": how})
    model = initial_model(given, 3)[0]
    worker = _Worker(model, given, np.zeros((4, 3, 32, 32), np.float32), torch.device("cpu"), 0, 1)
    worker.begin_phase(adapting=False, decoder_is_new=True)
    assert all(parameter.requires_grad for parameter in model.decoder.blocks.parameters())
    worker.begin_phase(adapting=True, decoder_is_new=True)
    assert {parameter.requires_grad for parameter in model.decoder.blocks.parameters()} == {trained}
    assert model.decoder.first.decoder_embed.weight.requires_grad


def test_a_second_run_in_the_same_folder_is_refused_while_the_first_is_at_work(catalog: Path, tmp_path: Path) -> None:
    with alone(Store(tmp_path / "out")), pytest.raises(InputError, match="another run is at work in it"):
        train(recipe(catalog), tmp_path / "out")
    with alone(Store(tmp_path / "out")):
        pass


def test_a_catalog_of_unreadable_tiles_is_refused(tmp_path: Path, local_ray: None) -> None:
    folder = tmp_path / "images"
    folder.mkdir()
    (folder / "broken.jpg").write_bytes(b"\xff\xd8\xff\xe0 no picture")
    write_catalog(build_catalog(str(folder)), str(tmp_path / "catalog.parquet"))
    with pytest.raises(BadSource, match="no tile of the sample is whole"):
        train(recipe(tmp_path / "catalog.parquet"), tmp_path / "run")

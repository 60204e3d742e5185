"""Where both papers meet: the road of nec_ray/docs/geobench.md to the end, as it stands there.

Only `nec train` does its work here in one process, without Ray, whose start would take most of the time; test_train.py
and test_pretrain.py have it on Ray.
"""

import json
import re
import shlex
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

import nec_ray
from nec_ray import open_archive
from nec_ray.codec import InputSpec, load_codec
from nec_ray.evaluate.geobench.data import GeobenchTask
from nec_ray.evaluate.geobench.experiment import Dataset
from nec_ray.models.mmearth_weights import mmearth_tensors
from nec_ray.runtime.pretrain_data import check_modalities, compact, local_modalities, modalities_of
from nec_ray.runtime.pretrain_loop import Pretrainer, initial_pretraining
from nec_ray.runtime.recipe import read_recipe
from nec_ray.runtime.train_data import bands_of
from nec_ray.runtime.train_loop import _export, _Worker, initial_model
from nec_ray.tiles import read_catalog, read_tiles
from tests.command import nec_here
from tests.evaluate.geobench.test_geobench_report import tables
from tests.test_docs import blocks
from tests.tiles.geobench_files import SO2SAT_NAMES, write_dataset

BETAS = ("0.98", "0.098", "0.0098", "0.00098")
SET = "geobench/classification_v1.0/m-so2sat"


def commands(block: str) -> Iterator[list[str]]:
    """A block's commands, one after the other: loops unrolled, lines that go on put together."""

    def unrolled(loop: re.Match[str]) -> str:
        name, values, body = loop.groups()
        return "".join(body.replace(f"${name}", value) for value in values.split())

    text = re.sub(r"^for (\w+) in (.*?); do\n(.*?)^done\n", unrolled, block, flags=re.MULTILINE | re.DOTALL)
    yield from (shlex.split(line) for line in text.replace("\\\n", " ").strip().splitlines())


def train_here(words: list[str]) -> None:
    """`nec train RECIPE --set ... --out OUT`."""
    changes = [value for key, value in pairwise(words) if key == "--set"]
    recipe, out = read_recipe(Path(words[0]), changes), Path(words[words.index("--out") + 1])
    catalog, cpu = read_catalog(recipe.data.catalog), torch.device("cpu")
    out.mkdir()
    if recipe.pretrains_mp_mae:
        names, bands = modalities_of(recipe), bands_of(recipe, catalog)
        tiles = local_modalities([compact(catalog.table, names, bands, check_modalities(recipe, catalog))])
        pretrained = initial_pretraining(recipe)[0]
        pretrainer = Pretrainer(pretrained, recipe, tiles, cpu, 0, 1)
        for epoch in range(recipe.train.pretrain_epochs):
            pretrainer.epoch(epoch)
        save_file(mmearth_tensors(pretrained), out / "weights.safetensors")
        return
    bands, size = bands_of(recipe, catalog), recipe.data.size
    pixels = read_tiles(catalog.table, bands=bands, size=size, fill=[0.0] * len(bands)).pixels
    mean, std = pixels.mean((0, 2, 3)), pixels.std((0, 2, 3))
    scaled = ((pixels - mean[:, None, None]) / std[:, None, None]).astype(np.float32)
    model, decoder_is_new, _ = initial_model(recipe, len(bands))
    worker = _Worker(model, recipe, scaled, cpu, 0, 1)
    worker.begin_adaptation()
    worker.begin_phase(adapting=True, decoder_is_new=decoder_is_new)
    for epoch in range(recipe.train.adapt_epochs):
        worker.epoch(epoch)
    spec = InputSpec(bands=list(bands), mean=mean.tolist(), std=std.tolist(), size=size)
    _export(model, scaled, spec, recipe, {"out": str(out), "data": "generated", "licence": "none"})


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder that looks like a clone, in which all commands of the page were done."""
    folder = tmp_path_factory.mktemp("compressed")
    (folder / "nec_ray").mkdir()
    (folder / "nec_ray" / "data").symlink_to(Path(nec_ray.__file__).parent / "data")
    (folder / SET).parent.mkdir(parents=True)
    write_dataset(folder / SET, "classification", samples=48, classes=4, size=32, names=SO2SAT_NAMES, noise=0.5)
    [block] = [text for language, text in blocks("geobench.md") if not language]
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for words in commands(block):
            assert words[0] == "nec"
            if words[1] == "train":
                train_here(words[2:])
                continue
            done = nec_here(*words[1:])
            assert done.returncode == 0, f"{shlex.join(words)}\n{done.stdout}\n{done.stderr}"
        yield folder


@pytest.fixture
def rows(work: Path) -> dict[tuple[str, str], dict[str, Any]]:
    summary = json.loads((work / "compressed" / "results.json").read_text())["summary"]
    return {(row["method"], row["protocol"]): row for row in summary}


@pytest.mark.slow
def test_one_config_has_every_rate_next_to_the_uncompressed(
    work: Path, rows: dict[tuple[str, str], dict[str, Any]]
) -> None:
    names = ["MP-MAE", "NEC's encoder, float32", *(f"NEC, beta {beta}" for beta in BETAS)]
    assert list(rows) == [(name, protocol) for name in names for protocol in ("linear", "knn")]
    task = GeobenchTask(Dataset(folder="x"), str(work / SET))
    bytes_a_tile = []
    for beta in BETAS:
        codec, pull = (
            load_codec(work / f"so2sat-{beta}" / "codec"),
            open_archive(work / f"so2sat-{beta}.archive").pull(),
        )
        assert codec.spec.lineage.beta == float(beta)
        assert codec.spec.lineage.parent == "weights.safetensors"
        used = [name in set(task.tile_ids([*task.train, *task.test])) for name in pull.tile_ids]
        assert sum(used) == 36, "of 48; the split valid is not used"
        bytes_a_tile.append(pull.n_bytes[used].mean())
        for protocol in ("linear", "knn"):
            row = rows[f"NEC, beta {beta}", protocol]
            assert row["bytes_per_tile"] == pytest.approx(bytes_a_tile[-1])
            assert row["encoder_id"] == codec.spec.encoder_id
    assert bytes_a_tile[0] < 0.97 * bytes_a_tile[-1], "a higher beta is a lower rate"
    for name in ("linear", "knn"):
        assert rows["MP-MAE", name]["bytes_per_tile"] is None
        assert rows["NEC's encoder, float32", name]["bytes_per_tile"] == 4 * 16 * 320
        # classes have colours of their own, which neither an encoder nor rounding hides
        assert np.array([rows[method, name]["accuracy"] for method in names]) == pytest.approx(1.0, abs=0.2)


@pytest.mark.slow
def test_the_page_has_the_curve_and_no_number_beside_the_paper_s(work: Path) -> None:
    page = (work / "compressed" / "report.html").read_text()
    assert page.count("data:image/png;base64,") == 1
    assert (work / "compressed" / "rate_accuracy-1.png").stat().st_size > 5_000
    assert all(f"NEC, beta {beta}" in page for beta in BETAS)
    lines = [line for some in tables(work / "compressed" / "report.html").values() for line in some]
    assert not any("training samples" in line for line in lines)

"""Traps of Ray Data (one-block catalogs, starved readers, dropped blocks, endless retries): that we are in none."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from nec_ray import open_archive
from nec_ray.errors import NecError, RunError
from nec_ray.runtime.encode import encode, prepare
from nec_ray.runtime.pipeline import on_ray
from nec_ray.tiles import Catalog, build_catalog, write_catalog
from tests.runtime.cluster import ROOT, command
from tests.runtime.make import random_codec
from tests.runtime.test_encode import bad_folder, hashes

_PLUGIN = """
import os, signal, sys
from fsspec.implementations.local import LocalFileSystem

class Killer(LocalFileSystem):
    '''Files whose name says so kill the process that opens them, as a crash in a decoder would.'''
    protocol = ("killer",)

    @classmethod
    def _strip_protocol(cls, path):
        return LocalFileSystem._strip_protocol(str(path).replace("killer://", "file://"))

    def _meet(self, path):
        if "deadly" in str(path) and ("torch" in sys.modules or "model" not in str(path)):
            os.kill(os.getpid(), signal.SIGKILL)

    def open(self, path, *args, **kwargs):
        self._meet(path)
        return super().open(path, *args, **kwargs)

    def cat_file(self, path, *args, **kwargs):
        self._meet(path)
        return super().cat_file(path, *args, **kwargs)
"""


@pytest.fixture(scope="module")
def plugin(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file system as a package would bring it, for Ray's workers to find."""
    folder = tmp_path_factory.mktemp("plugin")
    (folder / "nec_test_killer.py").write_text(_PLUGIN)
    (folder / "nec_test_killer-0.dist-info").mkdir()
    (folder / "nec_test_killer-0.dist-info" / "METADATA").write_text(
        "Metadata-Version: 2.1\nName: nec-test-killer\nVersion: 0\n"
    )
    (folder / "nec_test_killer-0.dist-info" / "entry_points.txt").write_text(
        "[fsspec.specs]\nkiller = nec_test_killer:Killer\n"
    )
    return folder


def images(folder: Path, deadly: dict[int, str]) -> Catalog:
    """48 images; those of `deadly`, by number, under these names."""
    rng = np.random.default_rng(0)
    folder.mkdir()
    for n in range(48):
        Image.fromarray(rng.integers(0, 255, (32, 32, 3), np.uint8)).save(folder / f"{deadly.get(n, f'{n:02}')}.png")
    return build_catalog(folder)


def through_the_plugin(catalog: Catalog) -> Catalog:
    table = catalog.table
    sources = ["killer://" + source for source in table["source"].to_pylist()]
    at = table.column_names.index("source")
    return Catalog(table.set_column(at, table.schema.field("source"), [sources]), catalog.metadata)


@pytest.mark.slow
def test_a_tile_that_kills_its_process_is_found_and_recorded(
    plugin: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The other tiles' payloads are those of a run in which it cannot be read."""
    codec = str(tmp_path / "codec")
    random_codec(tmp_path / "codec", mean=128)
    catalog = images(tmp_path / "images", {7: "07-deadly"})
    write_catalog(through_the_plugin(catalog), tmp_path / "catalog.parquet")
    monkeypatch.setenv("PYTHONPATH", str(plugin))
    words = ["encode", str(tmp_path / "catalog.parquet"), str(tmp_path / "archive"), "--codec", codec, "--json"]
    run = command(None, *words, shard_tiles=8, commit_seconds=30)
    out, problems = run.communicate(timeout=600)
    assert run.returncode == 0, problems
    account = json.loads(out)
    assert (account["valid"], account["failed"], account["missing"]) == (47, 1, 0)
    query = "SELECT tile_id, reason FROM embeddings WHERE status = 'failed'"
    [(tile_id, reason)] = open_archive(tmp_path / "archive").sql(query).fetchall()
    assert tile_id == "07-deadly.png"
    assert "died" in reason

    (tmp_path / "images" / "07-deadly.png").unlink()
    write_catalog(catalog, tmp_path / "plain.parquet")
    encode(tmp_path / "plain.parquet", tmp_path / "unreadable", codec_url=codec, local=True, shard_tiles=8)
    assert hashes(tmp_path / "archive") == hashes(tmp_path / "unreadable")

    again = command(None, *words, shard_tiles=8, commit_seconds=30)
    out, problems = again.communicate(timeout=600)
    assert (again.returncode, json.loads(out)["encoded"]) == (0, 0), problems


@pytest.mark.slow
def test_more_poisoned_shards_than_a_run_may_leave_out_are_recorded_too(
    plugin: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As those of a scene whose file is broken; beyond 16 lost shards Ray Data ends its run."""
    random_codec(tmp_path / "codec", mean=128)
    deadly = {7: "07-deadly", 20: "20-deadly", 40: "40-deadly"}
    write_catalog(through_the_plugin(images(tmp_path / "images", deadly)), tmp_path / "catalog.parquet")
    monkeypatch.setenv("PYTHONPATH", str(plugin))
    few = "from nec_ray.runtime import pipeline; pipeline._LOST_SHARDS, pipeline._LOST_SHARE = 1, 0.0"
    words = ["encode", *(str(tmp_path / name) for name in ("catalog.parquet", "archive")), "--json"]
    run = command(None, *words, "--codec", str(tmp_path / "codec"), shard_tiles=8, commit_seconds=30, before=few)
    out, problems = run.communicate(timeout=600)
    assert run.returncode == 0, problems
    account = json.loads(out)
    assert (account["valid"], account["failed"], account["missing"]) == (45, 3, 0)
    failed = open_archive(tmp_path / "archive").rows(["tile_id"], "status = 'failed'")["tile_id"].to_pylist()
    assert sorted(failed) == [f"{name}.png" for name in deadly.values()]


@pytest.mark.slow
def test_every_encoder_gets_shards_of_a_small_catalog(tmp_path: Path, local_ray: None) -> None:
    """A Parquet of 48 rows would be one block, and one worker's."""
    codec = random_codec(tmp_path / "codec", mean=128)
    write_catalog(images(tmp_path / "images", {}), tmp_path / "catalog.parquet")
    with prepare(tmp_path / "catalog.parquet", tmp_path / "archive", codec_url=codec._store.url, shard_tiles=4) as run:
        receipts = list(on_ray(run.plan.shards(), run.codec, run.store, 2))
    assert len(receipts) == 12
    assert len({receipt.worker for receipt in receipts}) == 2


@pytest.mark.slow
def test_encoders_that_would_take_every_core_are_refused(tmp_path: Path, local_ray: None) -> None:
    """Readers would wait for a core for ever, without an error."""
    codec = random_codec(tmp_path / "codec", mean=128)
    write_catalog(images(tmp_path / "images", {}), tmp_path / "catalog.parquet")
    most = int((len(os.sched_getaffinity(0)) - 0.25) // 0.75)
    with pytest.raises(RunError, match=f"use --workers {most}$"):
        encode(tmp_path / "catalog.parquet", tmp_path / "archive", codec_url=codec._store.url, workers=most + 1)
    account = encode(tmp_path / "catalog.parquet", tmp_path / "archive", codec_url=codec._store.url, workers=most)
    assert account.missing == 0


@pytest.mark.slow
def test_bad_tiles_take_none_of_their_shard_with_them(tmp_path: Path, local_ray: None) -> None:
    """`max_errored_blocks` would drop whole blocks."""
    codec = random_codec(tmp_path / "codec", mean=7700)
    catalog = build_catalog(bad_folder(tmp_path / "images"))
    in_colour = [t for t in catalog.table["tile_id"].to_pylist() if "grey" not in t]
    write_catalog(catalog.where_ids(in_colour), tmp_path / "catalog.parquet")
    account = encode(tmp_path / "catalog.parquet", tmp_path / "archive", codec_url=codec._store.url)
    assert (account.valid, account.nodata, account.failed, account.missing) == (5, 1, 4, 0)


@pytest.mark.slow
def test_an_error_that_every_shard_meets_ends_the_run_in_one_line(tmp_path: Path, local_ray: None) -> None:
    codec = random_codec(tmp_path / "codec", mean=128)
    write_catalog(images(tmp_path / "images", {}), tmp_path / "catalog.parquet")
    archive = tmp_path / "archive"
    with prepare(tmp_path / "catalog.parquet", archive, codec_url=codec._store.url, shard_tiles=4) as run:
        (archive / "packs").write_text("where a folder should be")
        with pytest.raises(NecError, match="packs"):
            list(on_ray(run.plan.shards(), run.codec, run.store, 2))


_ISOLATE = """
import json, sys
from nec_ray.runtime.cluster import connect
from nec_ray.runtime.encode import prepare
from nec_ray.runtime.isolate import isolate
catalog, archive, codec = sys.argv[1:]
with prepare(catalog, archive, codec_url=codec, shard_tiles=8) as run, connect():
    shard = next(run.plan.shards())
    rows = isolate(shard, run.codec, run.store, num_cpus=1, num_gpus=0).rows
print(json.dumps(dict(zip(rows["tile_id"].to_pylist(), rows["status"].to_pylist()))))
"""


@pytest.mark.slow
def test_a_tile_that_kills_only_the_encoder_is_found_too(
    plugin: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    random_codec(tmp_path / "codec", mean=128)
    catalog = images(tmp_path / "images", {5: "05-deadly-model"})
    write_catalog(through_the_plugin(catalog), tmp_path / "catalog.parquet")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), str(plugin)]))
    words = [str(tmp_path / name) for name in ("catalog.parquet", "archive", "codec")]
    run = subprocess.run(
        [sys.executable, "-c", _ISOLATE, *words], capture_output=True, text=True, check=False, timeout=600
    )
    assert run.returncode == 0, run.stderr
    status = json.loads(run.stdout.splitlines()[-1])
    assert len(status) == 8
    assert {tile_id for tile_id, what in status.items() if what != "valid"} == {"05-deadly-model.png"}

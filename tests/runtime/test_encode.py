"""Encoding real imagery: exact, resumable, each tile once, and no bad tile lost or in the way."""

import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import h5py
import numpy as np
import pytest
import rasterio
import s3fs
import xarray
from PIL import Image

from nec_ray import open_archive
from nec_ray.archive.layout import ArchiveInfo, create_archive
from nec_ray.codec import Codec
from nec_ray.errors import CodecMismatch, InputError, Interrupted, NotFound
from nec_ray.models.embed import Embedder
from nec_ray.runtime.encode import encode, prepare
from nec_ray.runtime.shard import read_shard
from nec_ray.storage import Store
from nec_ray.tiles import Catalog, build_catalog, builtin_scene, read_catalog, write_catalog
from tests.runtime.make import CtrlC, random_codec
from tests.s3 import Server
from tests.tiles import geobench_files


@pytest.fixture(scope="module")
def codec(tmp_path_factory: pytest.TempPathFactory) -> Codec:
    return random_codec(tmp_path_factory.mktemp("codec") / "codec")


@pytest.fixture(scope="module")
def codec_folder(codec: Codec) -> str:
    return codec._store.url


@pytest.fixture(scope="module")
def catalog(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("catalog") / "catalog.parquet"
    write_catalog(build_catalog(builtin_scene(), tile_size=64, licence="public domain"), path)
    return path


@pytest.fixture(scope="module")
def whole(catalog: Path, codec_folder: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    """Archive of an undisturbed serial run."""
    archive = tmp_path_factory.mktemp("whole") / "archive"
    encode(catalog, archive, codec_url=codec_folder, local=True, shard_tiles=32)
    return str(archive)


def hashes(archive: str | Path) -> dict[str, bytes | None]:
    rows = open_archive(archive).rows(["tile_id", "sha256"])
    ids = rows["tile_id"].to_pylist()
    assert len(ids) == len(set(ids)), "a tile is there twice"
    return dict(zip(ids, rows["sha256"].to_pylist(), strict=True))


def test_pulled_symbols_are_exactly_the_encoders(whole: str, catalog: Path, codec: Codec, tmp_path: Path) -> None:
    pull = open_archive(whole).pull()
    at = {tile_id: i for i, tile_id in enumerate(pull.tile_ids)}
    seen = 0
    with prepare(catalog, tmp_path / "other", codec_url=codec._store.url, shard_tiles=32, create=False) as run:
        shards = list(run.plan.shards())
    for shard in shards:
        batch = read_shard(shard, codec.spec)
        expected = np.rint(Embedder(codec).latents(batch.pixels) - codec.tables.median)
        ids = shard.rows["tile_id"].to_pylist()
        assert np.array_equal(pull.symbols[[at[ids[row]] for row in batch.valid]], expected)
        seen += len(batch.valid)
    assert seen == len(pull)


def test_a_data_set_of_geo_bench_is_encoded_by_the_names_of_its_bands(tmp_path: Path) -> None:
    labels = geobench_files.write_dataset(tmp_path / "m-eurosat", "classification", samples=6, size=32)
    damaged = tmp_path / "m-eurosat" / "id_0004.hdf5"
    damaged.write_bytes(damaged.read_bytes()[:5000])
    write_catalog(build_catalog(tmp_path / "m-eurosat"), tmp_path / "catalog.parquet")
    codec = random_codec(tmp_path / "codec", bands=("B4", "B8A", "B8"), mean=4500)
    account = encode(tmp_path / "catalog.parquet", tmp_path / "archive", codec_url=tmp_path / "codec", local=True)
    assert (account.valid, account.failed) == (5, 1)
    pull = open_archive(tmp_path / "archive").pull()
    for tile_id, symbols in zip(pull.tile_ids, pull.symbols, strict=True):
        with h5py.File(tmp_path / f"{tile_id}.hdf5") as file:  # EuroSAT's B8A has B12's name in GEO-Bench
            pixels = np.stack([file[name][...] for name in ("04 - Red", "12 - SWIR", "08 - NIR")]).astype(np.float32)
        assert np.array_equal(symbols, np.rint(Embedder(codec).latents(pixels[None]) - codec.tables.median)[0])
    rows = open_archive(tmp_path / "archive").rows(["tile_id", "label", "status", "reason"]).to_pylist()
    for row in rows:
        name = row["tile_id"].removeprefix("m-eurosat/")
        assert row["label"] == (None if name == "id_0004" else f"class {labels[name]}, of 4")
        assert (row["status"] == "failed") == (name == "id_0004") == ("cannot be read as HDF5" in (row["reason"] or ""))


def test_the_account_adds_up(whole: str, catalog: Path) -> None:
    rows = open_archive(whole).rows(["*"])
    status = rows["status"].to_pylist()
    assert len(status) == len(read_catalog(catalog)) == status.count("valid") + status.count("nodata")
    share = dict(zip(rows["tile_id"].to_pylist(), rows["nodata_share"].to_pylist(), strict=True))
    counted = read_catalog(catalog).table
    for tile_id, expected in zip(counted["tile_id"].to_pylist(), counted["nodata_share"].to_pylist(), strict=True):
        assert share[tile_id] == pytest.approx(expected)
    assert open_archive(whole).info.licence == "public domain"


def test_a_second_run_has_nothing_to_do(whole: str, catalog: Path) -> None:
    before = open_archive(whole).version
    account = encode(catalog, whole, local=True, shard_tiles=32)
    assert (account.encoded, account.missing, account.version) == (0, 0, before)


def test_an_interrupted_run_goes_on_to_the_same_archive(
    whole: str, catalog: Path, codec_folder: str, tmp_path: Path
) -> None:
    archive = tmp_path / "archive"
    with pytest.raises(Interrupted, match="run the same command again"):
        encode(catalog, archive, codec_url=codec_folder, local=True, shard_tiles=32, progress=CtrlC(3))
    assert len(open_archive(archive)) == 96
    account = encode(catalog, archive, local=True, shard_tiles=32)
    assert account.missing == 0
    assert account.encoded == account.tiles - 96
    assert hashes(archive) == hashes(whole)


def test_a_run_that_died_before_its_index_is_done_again(catalog: Path, codec_folder: str, tmp_path: Path) -> None:
    create_archive(Store(tmp_path / "archive"), ArchiveInfo())
    url = str(tmp_path / "archive")
    assert encode(catalog, url, codec_url=codec_folder, local=True).missing == 0
    shutil.rmtree(tmp_path / "archive" / "index")  # its packs are there: `nec archive rebuild` makes it anew
    with pytest.raises(NotFound, match="index"):
        encode(catalog, url, codec_url=codec_folder, local=True)


def test_a_run_that_was_partly_done_makes_the_same_payloads(
    whole: str, catalog: Path, codec_folder: str, tmp_path: Path
) -> None:
    archive = tmp_path / "archive"
    part = encode(catalog, archive, codec_url=codec_folder, local=True, shard_tiles=32, where="x_off > y_off")
    assert 0 < part.tiles == part.encoded < len(hashes(whole))
    encode(catalog, archive, local=True, shard_tiles=32)
    assert hashes(archive) == hashes(whole)


@pytest.mark.slow
def test_zarr_is_encoded_to_the_payloads_of_a_geotiff_of_the_same_pixels(
    codec_folder: str, local_ray: None, tmp_path: Path
) -> None:
    with rasterio.open(builtin_scene()) as scene:
        pixels = scene.read(window=rasterio.windows.Window(400, 300, 128, 128))
    profile = {"driver": "GTiff", "count": 3, "height": 128, "width": 128, "dtype": "uint16", "nodata": 0}
    with rasterio.open(tmp_path / "scene.tif", "w", **profile) as file:
        file.write(pixels)
    bands = {name: (("y", "x"), band) for name, band in zip(("red", "green", "blue"), pixels, strict=True)}
    xarray.Dataset(bands).to_zarr(tmp_path / "scene.zarr", zarr_format=3, consolidated=False)
    found = {}
    for name, given in (("scene.tif", ["red", "green", "blue"]), ("scene.zarr", None)):
        tiles = build_catalog(tmp_path / name, bands=given, tile_size=32, nodata=0)
        write_catalog(tiles, tmp_path / f"{name}.parquet")
        done = encode(tmp_path / f"{name}.parquet", tmp_path / f"of-{name}", codec_url=codec_folder, workers=2)
        assert done.valid == 16
        found[name] = hashes(tmp_path / f"of-{name}")
    assert found["scene.tif"] == found["scene.zarr"]


@pytest.mark.slow
def test_ray_makes_the_archive_of_the_serial_run(
    whole: str, catalog: Path, codec_folder: str, tmp_path: Path, local_ray: None
) -> None:
    archive = tmp_path / "archive"
    account = encode(catalog, archive, codec_url=codec_folder, shard_tiles=32)
    assert account.missing == 0
    assert hashes(archive) == hashes(whole)


@pytest.mark.slow
def test_two_encodes_at_once_leave_every_tile_once(
    whole: str, catalog: Path, codec_folder: str, tmp_path: Path
) -> None:
    archive = tmp_path / "archive"
    code = (
        "import sys; from nec_ray.runtime.encode import encode; c, a, k = sys.argv[1:];"
        "encode(c, a, codec_url=k, local=True, shard_tiles=32, commit_seconds=0)"
    )
    command = [sys.executable, "-c", code, str(catalog), str(archive), codec_folder]
    runs = [subprocess.Popen(command, stderr=subprocess.PIPE, text=True) for _ in range(2)]
    problems = [run.communicate(timeout=600)[1] for run in runs]
    assert [run.returncode for run in runs] == [0, 0], problems
    assert hashes(archive) == hashes(whole)


@pytest.mark.slow
@pytest.mark.parametrize("route", [["--local"], []], ids=["local", "ray"])
def test_ctrl_c_in_the_command_stops_cleanly(
    route: list[str], whole: str, catalog: Path, codec_folder: str, tmp_path: Path
) -> None:
    archive = tmp_path / "archive"
    code = (
        "import sys; from nec_ray import cli; from nec_ray.runtime import encode as e;"
        "e.encode.__kwdefaults__.update(shard_tiles=4, commit_seconds=0); sys.argv[0] = 'nec'; cli.main()"
    )
    command = [sys.executable, "-c", code, "encode", str(catalog), str(archive), "--codec", codec_folder, *route]
    run = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True)
    deadline = time.monotonic() + 600
    while time.monotonic() < deadline and len(list(archive.glob("index/*.parquet"))) < 3:
        time.sleep(0.02)
    os.killpg(run.pid, signal.SIGINT)  # as a terminal does: to every process of the command
    _, problems = run.communicate(timeout=60)
    assert run.returncode == 130, problems
    assert "tiles are committed; run the same command again" in problems.splitlines()[-1]
    assert "Traceback" not in problems
    assert 0 < len(open_archive(archive)) < len(hashes(whole))
    encode(catalog, archive, local=True, shard_tiles=4)
    encode(catalog, tmp_path / "undisturbed", codec_url=codec_folder, local=True, shard_tiles=4)
    assert hashes(archive) == hashes(tmp_path / "undisturbed")


def bad_folder(folder: Path) -> Path:
    """Good images, and one of each kind of bad one."""
    rng = np.random.default_rng(0)
    (folder / "town").mkdir(parents=True)
    for i in range(5):
        Image.fromarray(rng.integers(0, 255, (40, 40, 3), np.uint8)).save(folder / "town" / f"{i}.jpg")
    whole = (folder / "town" / "0.jpg").read_bytes()
    (folder / "town" / "truncated.jpg").write_bytes(whole[: len(whole) // 2])
    (folder / "town" / "text.jpg").write_text("not an image")
    (folder / "town" / "empty.png").write_bytes(b"")
    Image.fromarray(rng.integers(0, 255, (40, 40), np.uint8)).save(folder / "town" / "grey.png")
    profile = {"driver": "GTiff", "width": 64, "height": 64, "count": 3, "dtype": "float32"}
    pixels = rng.random((3, 64, 64)).astype(np.float32)
    for name, value, nodata in (("holes", np.nan, None), ("void", -1, -1)):
        pixels_of = pixels.copy()
        pixels_of[:] = np.where(value == -1, value, pixels_of)
        pixels_of[0, 3, 4] = value
        with rasterio.open(folder / f"{name}.tif", "w", **profile, nodata=nodata) as file:
            file.descriptions = ("red", "green", "blue")
            file.write(pixels_of)
    return folder


def test_bad_tiles_become_rows_with_a_reason(codec_folder: str, tmp_path: Path) -> None:
    catalog = build_catalog(bad_folder(tmp_path / "images"))
    in_colour = [t for t in catalog.table["tile_id"].to_pylist() if "grey" not in t]
    write_catalog(catalog.where_ids(in_colour), tmp_path / "catalog.parquet")
    (tmp_path / "images" / "town" / "4.jpg").unlink()
    account = encode(tmp_path / "catalog.parquet", tmp_path / "archive", codec_url=codec_folder, local=True)
    assert (account.valid, account.nodata, account.failed, account.missing) == (4, 1, 5, 0)
    archive = open_archive(tmp_path / "archive")
    found = dict(archive.sql("SELECT tile_id, reason FROM embeddings WHERE status <> 'valid'").fetchall())
    says = {
        "town/truncated.jpg": "truncated",
        "town/text.jpg": "cannot",
        "town/empty.png": "cannot",
        "town/4.jpg": "nothing is there",
        "holes/y00000_x00000": "1 values are NaN",
        "void/y00000_x00000": "all pixels are no-data",
    }
    assert found.keys() == says.keys()
    for tile_id, words in says.items():
        assert words in found[tile_id], found[tile_id]
        assert "\n" not in found[tile_id]
    assert len(archive.pull()) == 4


def test_failed_tiles_are_tried_again_when_asked(codec_folder: str, tmp_path: Path) -> None:
    images = bad_folder(tmp_path / "images")
    catalog = build_catalog(images).select("tile_id LIKE 'town/%.jpg'")
    write_catalog(catalog, tmp_path / "catalog.parquet")
    encode(tmp_path / "catalog.parquet", tmp_path / "archive", codec_url=codec_folder, local=True)
    shutil.copy(images / "town" / "1.jpg", images / "town" / "truncated.jpg")
    unasked = encode(tmp_path / "catalog.parquet", tmp_path / "archive", local=True)
    assert (unasked.encoded, unasked.failed) == (0, 2)
    asked = encode(tmp_path / "catalog.parquet", tmp_path / "archive", local=True, retry_failed=True)
    assert (asked.failed, asked.valid) == (1, 6)
    assert len(hashes(tmp_path / "archive")) == 7


def test_a_changed_source_is_encoded_again(tmp_path: Path) -> None:
    random_codec(tmp_path / "codec", mean=128)
    images = bad_folder(tmp_path / "images")

    def build() -> Catalog:
        return build_catalog(images).select("tile_id LIKE 'town/_.jpg'")

    write_catalog(build(), tmp_path / "catalog.parquet")
    encode(tmp_path / "catalog.parquet", tmp_path / "archive", codec_url=tmp_path / "codec", local=True)
    before = hashes(tmp_path / "archive")
    shutil.copy(images / "town" / "1.jpg", images / "town" / "3.jpg")
    write_catalog(build(), tmp_path / "catalog.parquet")
    assert encode(tmp_path / "catalog.parquet", tmp_path / "archive", local=True).encoded == 1
    after = hashes(tmp_path / "archive")
    assert {t for t in before if before[t] != after[t]} == {"town/3.jpg"}
    assert len(open_archive(tmp_path / "archive", version=1)) == 5


def test_a_codec_that_does_not_fit_is_refused_and_nothing_is_written(catalog: Path, tmp_path: Path) -> None:
    other = random_codec(tmp_path / "codec", bands=("nir", "red"))
    with pytest.raises(CodecMismatch, match="bands nir that are asked for"):
        encode(catalog, tmp_path / "archive", codec_url=other._store.url, local=True)
    assert not (tmp_path / "archive").exists()


def test_a_second_codec_for_the_same_tiles_is_refused(whole: str, catalog: Path, tmp_path: Path) -> None:
    before = sorted(Path(whole).rglob("*"))
    other = random_codec(tmp_path / "codec", seed=1)
    with pytest.raises(CodecMismatch, match="give that codec"):
        encode(catalog, whole, codec_url=other._store.url, local=True, shard_tiles=32)
    assert sorted(Path(whole).rglob("*")) == before


def test_what_is_not_there(catalog: Path, codec_folder: str, tmp_path: Path) -> None:
    with pytest.raises(NotFound, match="nothing is there"):
        encode(tmp_path / "none.parquet", tmp_path / "archive", codec_url=codec_folder, local=True)
    with pytest.raises(NotFound, match="no codec there"):
        encode(catalog, tmp_path / "archive", codec_url=tmp_path / "none", local=True)
    with pytest.raises(InputError, match="name one for these tiles with --codec"):
        encode(catalog, tmp_path / "archive", local=True)
    with pytest.raises(InputError, match="use a path, s3"):
        encode(catalog, "nowhere://x/y", codec_url=codec_folder, local=True)


@pytest.mark.slow
def test_an_object_store_that_dies_and_comes_back_leaves_the_same_archive(
    whole: str, catalog: Path, codec_folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed after the second shard; the run waits for it and goes on."""
    server = Server(tmp_path / "s3")
    server.start()
    for name, value in server.environment.items():
        monkeypatch.setenv(name, value)
    s3fs.S3FileSystem.clear_instance_cache()
    archive = f"s3://{server.bucket()}/archive"
    back = threading.Timer(3, server.start)
    shards = 0

    def kill(*_: int) -> None:
        nonlocal shards
        shards += 1
        if shards == 2:
            server.kill()
            back.start()

    try:
        account = encode(
            catalog, archive, codec_url=codec_folder, local=True, shard_tiles=32, commit_seconds=0, progress=kill
        )
        assert account.missing == 0
        assert hashes(archive) == hashes(whole)
    finally:
        if back.ident:
            back.join()
        server.stop()
        s3fs.S3FileSystem.clear_instance_cache()

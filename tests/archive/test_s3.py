"""Archives on a real S3 server: many writers, killed writers, killed servers, failing connections; nothing lost."""

import os
import random
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
import s3fs
from deltalake import DeltaTable
from deltalake.exceptions import DeltaError

from nec_ray import open_archive
from nec_ray.archive.change import delete, rebuild, restore
from nec_ray.archive.collect import collect
from nec_ray.archive.compact import compact
from nec_ray.archive.index import Index
from nec_ray.archive.recorded import write_recorded
from nec_ray.archive.verify import verify
from nec_ray.errors import ConflictError, InputError, NotFound, StorageError
from nec_ray.storage import Store
from nec_ray.storage.faults import is_passing
from tests.archive import writer
from tests.archive.make import Made, empty_archive, filled_archive, index_rows, pack
from tests.faults import FaultyProxy
from tests.s3 import Server

ROOT = Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.slow


@pytest.fixture
def made(s3_server: Server, tmp_path: Path) -> Made:
    return filled_archive(tmp_path, url=f"s3://{s3_server.bucket()}/archives/one")


@pytest.fixture
def empty(s3_server: Server, tmp_path: Path) -> Made:
    return empty_archive(tmp_path, url=f"s3://{s3_server.bucket()}/archives/one")


@contextmanager
def writing(url: str, *arguments: int, **environment: str) -> "Iterator[subprocess.Popen[str]]":
    """A writer process that has begun to write; killed where it still runs in the end."""
    command = [sys.executable, "-m", "tests.archive.writer", url, *map(str, arguments)]
    with subprocess.Popen(
        command, cwd=ROOT, env=os.environ | environment, stdout=subprocess.PIPE, text=True
    ) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == "started\n"
            yield process
        finally:
            process.kill()


def write_at_once(url: str, workers: int, *arguments: int, **environment: str) -> list[int]:
    """Exit codes of writers that ran side by side."""

    def run(worker: int) -> int:
        with writing(url, worker, *arguments, **environment) as process:
            return process.wait(400)

    with ThreadPoolExecutor(workers) as pool:
        return list(pool.map(run, range(workers)))


def check(url: str, expected: set[str]) -> None:
    """Every tile is there once, and is what it was encoded as."""
    archive = open_archive(url)
    pulled = archive.pull()
    assert len(archive) == len(expected)
    assert set(pulled.tile_ids) == expected
    for tile_id, symbols in zip(pulled.tile_ids, pulled.symbols, strict=True):
        assert np.array_equal(symbols, writer.symbols(tile_id))
    assert not verify(archive).faults


def of(workers: int, shards: int, shared: int = 0) -> set[str]:
    return {t for w in range(workers) for s in range(shards) for t in writer.tile_ids(w, s, shared)}


def test_all_upkeep_works_there(made: Made) -> None:
    archive = open_archive(made.url)
    pulled = archive.pull()
    for tile_id, symbols in zip(pulled.tile_ids, pulled.symbols, strict=True):
        assert np.array_equal(symbols, made.symbols[tile_id])
    [(embedding,)] = archive.sql("SELECT nec_decode(payload) FROM embeddings WHERE tile_id = 't003'").fetchall()
    assert np.allclose(embedding, made.codec.dequantise(made.symbols["t003"]))
    delete(made.store, "tile_id < 't030'")
    made.index.append(made.index.version(), pack(made, ["later"], seed=9))
    assert compact(made.store).packs == 2
    assert open_archive(made.url).pull("tile_id = 'later'").tile_ids == ["later"]
    assert restore(made.store, 1).version == 5
    garbage = collect(made.store, timedelta(0))
    assert len(garbage.packs) == 2
    assert len(open_archive(made.url)) == 40
    made.store.delete(made.store.names("index"))
    with pytest.raises(NotFound, match="no index there"):
        open_archive(made.url)
    assert rebuild(made.store)[0].added == 40
    assert not verify(open_archive(made.url)).faults


def test_others_read_the_index_as_a_plain_delta_table(made: Made, s3_server: Server) -> None:
    options = {**s3_server.environment, "AWS_ALLOW_HTTP": "true"}
    assert DeltaTable(f"{made.url}/index", storage_options=options).count() == 40
    assert pl.read_delta(f"{made.url}/index", storage_options=options).height == 40


def test_eight_writers_lose_and_double_nothing(empty: Made) -> None:
    assert write_at_once(empty.url, 8, 4, 3) == [0] * 8
    check(empty.url, of(8, 4, 3))
    transactions = DeltaTable(f"{empty.url}/index", storage_options=empty.store.delta_options())
    assert all(transactions.transaction_version(f"shard-{w}-{s}") for w in range(8) for s in range(4))


def test_a_killed_writer_leaves_an_archive_that_a_second_run_completes(empty: Made, fault_seed: int) -> None:
    rng = random.Random(fault_seed)
    expected = of(1, 12)
    for _ in range(3):
        with writing(empty.url, 0, 12):
            time.sleep(rng.uniform(0, 1.5))
        archive = open_archive(empty.url)
        assert set(archive.rows(["tile_id"])["tile_id"].to_pylist()) <= expected
        assert not verify(archive).faults
    assert write_at_once(empty.url, 1, 12) == [0]
    check(empty.url, expected)


def test_of_two_swaps_at_once_one_wins(made: Made) -> None:
    rows = open_archive(made.url).rows(["tile_id", "encoded_at"], "tile_id < 't005'")
    changes = dict(zip(rows["tile_id"].to_pylist(), rows["encoded_at"].to_pylist(), strict=True))
    prepared = [pack(made, list(changes), seed=20 + n) for n in range(4)]
    barrier = threading.Barrier(4)
    results: list[object] = []

    def swap(n: int) -> None:
        index = Index(Store(made.url))
        barrier.wait()
        try:
            results.append(index.swap(changes, prepared[n], "reencode").version)
        except ConflictError as error:
            results.append(str(error))

    threads = [threading.Thread(target=swap, args=(n,)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len([one for one in results if isinstance(one, int)]) == 1
    assert len([one for one in results if "was changed by another writer" in str(one)]) == 3
    assert len(open_archive(made.url)) == 40
    assert not verify(open_archive(made.url)).faults


def test_a_reader_sees_every_tile_once_during_swaps_and_compaction(made: Made) -> None:
    stop = threading.Event()
    failures: list[str] = []
    reads = 0

    def read() -> None:
        nonlocal reads
        while not stop.is_set():
            archive = open_archive(made.url)
            ids = archive.rows(["tile_id"])["tile_id"].to_pylist()
            pulled = archive.pull()
            if len(ids) != 40 or len(set(ids)) != 40 or len(pulled) != 38:
                failures.append(f"version {archive.version}: {len(ids)} rows, {len(pulled)} tiles")
            reads += 1

    reader = threading.Thread(target=read)
    reader.start()
    for n in range(6):
        rows = open_archive(made.url).rows(["tile_id", "encoded_at"], f"tile_id LIKE 't0{n % 4}%' AND status = 'valid'")
        changes = dict(zip(rows["tile_id"].to_pylist(), rows["encoded_at"].to_pylist(), strict=True))
        made.index.swap(changes, pack(made, list(changes), seed=n), "reencode")
        if n % 3 == 2:
            compact(made.store)
    stop.set()
    reader.join()
    assert not failures
    assert reads > 2


@pytest.fixture
def proxy(s3_server: Server, fault_seed: int) -> Iterator[FaultyProxy]:
    proxy = FaultyProxy(s3_server.endpoint, 0.0, seed=fault_seed)
    yield proxy
    proxy.stop()


def test_failing_connections_lose_nothing(empty: Made, proxy: FaultyProxy, monkeypatch: pytest.MonkeyPatch) -> None:
    """A sixth of all requests fails, also such that a write happened and its answer was lost."""
    proxy.share = 0.15
    assert write_at_once(empty.url, 2, 3, 2, AWS_ENDPOINT_URL=proxy.endpoint) == [0, 0]
    proxy.share = 0
    check(empty.url, of(2, 3, 2))
    proxy.share = 0.15
    monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.endpoint)
    s3fs.S3FileSystem.clear_instance_cache()
    try:
        check(empty.url, of(2, 3, 2))
    finally:
        s3fs.S3FileSystem.clear_instance_cache()
    assert sum(proxy.met[kind] for kind in proxy.met if kind) > 10


def test_a_server_that_is_killed_and_comes_back_interrupts_a_writer_but_harms_nothing(tmp_path: Path) -> None:
    server = Server(tmp_path / "s3")
    server.start()
    try:
        with pytest.MonkeyPatch.context() as patch:
            for name, value in server.environment.items():
                patch.setenv(name, value)
            s3fs.S3FileSystem.clear_instance_cache()
            made = empty_archive(tmp_path, url=f"s3://{server.bucket()}/archive")
            with writing(made.url, 0, 12) as process:
                time.sleep(0.7)
                server.kill()
                time.sleep(2)
                server.start()
                assert process.wait(200) == 0  # it waited
            check(made.url, of(1, 12))
    finally:
        server.stop()
        s3fs.S3FileSystem.clear_instance_cache()


@pytest.mark.parametrize("kind", ["busy", "error", "reset"])
def test_what_delta_rs_says_of_a_store_that_restarts_is_known_to_pass(kind: str) -> None:
    """It tries for two seconds by itself; a store that finds its data again may take longer."""
    proxy = FaultyProxy("http://127.0.0.1:9", 1.0, (kind,))
    options = {
        "AWS_ENDPOINT_URL": proxy.endpoint,
        "AWS_ALLOW_HTTP": "true",
        "AWS_REGION": "us-east-1",
        "AWS_ACCESS_KEY_ID": "x",
        "AWS_SECRET_ACCESS_KEY": "x",
    }
    try:
        with pytest.raises((OSError, DeltaError)) as caught:
            DeltaTable("s3://bucket/table", storage_options=options)
        assert is_passing(caught.value)
    finally:
        proxy.stop()


def test_a_large_object_goes_up_in_parts_and_only_once(s3_server: Server, tmp_path: Path) -> None:
    store = Store(f"s3://{s3_server.bucket()}/here")
    data = np.random.default_rng(0).bytes(40 << 20)
    (tmp_path / "large").write_bytes(data)
    assert store.create_from("large", tmp_path / "large")
    (tmp_path / "large").write_bytes(data[::-1])
    assert not store.create_from("large", tmp_path / "large")
    assert store.read("large") == data
    assert list(store.read_ranges([("large", n, n + 7) for n in range(0, 70, 7)])) == [
        data[n : n + 7] for n in range(0, 70, 7)
    ]


def test_an_object_is_made_young_again(s3_server: Server) -> None:
    store = Store(f"s3://{s3_server.bucket()}/here")
    store.create("one", b"1" * 100)
    before = store.modified("one")
    time.sleep(1.1)  # the store tells whole seconds
    store.touch("one")
    assert store.modified("one") > before
    assert store.read("one") == b"1" * 100


_TRY = """
import sys
from nec_ray import open_archive
from nec_ray.errors import NecError
try:
    print(len(open_archive(sys.argv[1]).pull()))
except NecError as error:
    print(type(error).__name__, error)
"""


def try_to_pull(url: str, **environment: str | None) -> str:
    merged = {**os.environ, **environment}
    clean = {name: value for name, value in merged.items() if value is not None}
    done = subprocess.run(
        [sys.executable, "-c", _TRY, url], env=clean, cwd=ROOT, capture_output=True, text=True, check=False, timeout=600
    )
    assert done.stderr == ""
    return done.stdout.strip()


def test_a_first_object_that_appears_while_its_folder_is_listed_harms_nothing(
    s3_server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = Store(f"s3://{s3_server.bucket()}/archive")
    listing = s3fs.S3FileSystem._lsdir

    async def then_write(self: s3fs.S3FileSystem, path: str, *args: Any, **kwargs: Any) -> Any:
        monkeypatch.undo()
        found = await listing(self, path, *args, **kwargs)
        assert not found
        await self._pipe_file(f"{path}/first", b"x")
        return found

    monkeypatch.setattr(s3fs.S3FileSystem, "_lsdir", then_write)
    assert store.names("packs") == []
    assert store.names("packs") == ["packs/first"]


def test_wrong_credentials_buckets_and_addresses_are_named(made: Made) -> None:
    wrong = try_to_pull(made.url, AWS_SECRET_ACCESS_KEY="wrong")
    assert wrong.startswith("StorageError")
    assert "check the credentials" in wrong
    assert "its bucket is not there" in try_to_pull("s3://no-such-bucket-here/archive")
    assert "no archive there" in try_to_pull(f"{made.url}-not")


_NOBODY: dict[str, str | None] = {
    "AWS_ACCESS_KEY_ID": None,
    "AWS_SECRET_ACCESS_KEY": None,
    "AWS_EC2_METADATA_DISABLED": "true",
    "AWS_CONFIG_FILE": "/nonexistent",
    "AWS_SHARED_CREDENTIALS_FILE": "/nonexistent",
}


def test_a_public_archive_is_read_without_credentials_and_over_plain_http(s3_server: Server, tmp_path: Path) -> None:
    made = filled_archive(tmp_path, url="s3://public/archive")
    assert try_to_pull(made.url, **_NOBODY) == "38"
    web = f"{s3_server.endpoint}/public/archive"
    everything: dict[str, str | None] = dict.fromkeys(s3_server.environment)
    assert try_to_pull(web, **{**_NOBODY, **everything}) == "38"
    for n in range(3):
        made.index.append(made.index.version(), pack(made, [f"later{n}"], seed=n))
    archive = open_archive(web)
    assert (archive.version, len(archive)) == (4, 43)
    assert len(open_archive(web, 1)) == 40
    assert [entry.version for entry in Index(Store(web)).history()] == [4, 3, 2, 1, 0]
    with pytest.raises(NotFound, match="no version 9; the newest is 4"):
        open_archive(web, 9)
    asked = write_recorded([index_rows(["t000", "t001", "later1", "wanted"], "")], tmp_path / "asked.parquet")
    assert made.store.create_from(asked.path, tmp_path / "asked.parquet")
    made.index.record([asked])
    made.index.record([asked])
    assert open_archive(web).version == 5
    assert open_archive(web).coverage().absent == open_archive(made.url).coverage(time="2020-05").absent == 1
    assert open_archive(web, 4).coverage().absent is None
    assert not verify(open_archive(web)).catalogs
    with pytest.raises(InputError, match="nothing can be written"):
        Store(web).create("x", b"")
    with pytest.raises(InputError, match="lists nothing"):
        collect(Store(web), timedelta(0))
    with pytest.raises(NotFound, match="no archive there"):
        open_archive(f"{s3_server.endpoint}/public/nothing")


def test_an_archive_with_checkpoints_is_read_over_plain_http(
    s3_server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("nec_ray.archive.log._CHECKPOINT_EVERY", 5)
    made = empty_archive(tmp_path, url="s3://public/long")
    base = made.index.version()
    for n in range(13):
        made.index.append(base, pack(made, [f"t{n}"], ["failed"], seed=n))
    assert made.store.exists("index/_delta_log/_last_checkpoint")
    web = f"{s3_server.endpoint}/public/long"
    assert len(open_archive(web)) == 13
    assert len(open_archive(web, 7)) == 7
    assert len(open_archive(web, 12)) == 12


def test_a_full_disk_is_named(tmp_path: Path) -> None:
    """On a file system of a megabyte, in a namespace of its own."""
    code = (
        "import sys; from nec_ray.storage import Store; from nec_ray.errors import StorageError\n"
        "try: Store(sys.argv[1]).create('big', b'x' * (3 << 20))\n"
        "except StorageError as error: print(error)"
    )
    script = 'mount -t tmpfs -o size=1m none "$1" && "$2" -c "$3" "$1" && ls "$1"'
    done = subprocess.run(
        ["unshare", "-rm", "sh", "-c", script, "sh", str(tmp_path), sys.executable, code],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    if "unshare" in done.stderr or "mount" in done.stderr:
        pytest.skip("this machine allows no file systems of one's own")
    assert done.stdout.strip() == f"{tmp_path}/big: the disk is full; make room, then run the command again"


def test_a_store_that_is_away_is_an_error_in_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("nec_ray.storage.faults.PATIENCE_S", 0.5)
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "x")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "x")
    s3fs.S3FileSystem.clear_instance_cache()
    try:
        with pytest.raises(StorageError, match=r"127\.0\.0\.1"):
            open_archive("s3://bucket/archive")
    finally:
        s3fs.S3FileSystem.clear_instance_cache()

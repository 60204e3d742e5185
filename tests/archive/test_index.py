"""Commits to the index: each tile once, whoever comes first; other readers see a plain Delta table of GeoParquet."""

import errno
import multiprocessing
import zlib
from datetime import UTC, datetime
from pathlib import Path

import geopandas
import polars as pl
import pyarrow as pa
import pytest
import zstandard
from deltalake import DeltaTable
from deltalake.transaction import AddAction

from nec_ray import open_archive
from nec_ray.archive.datafile import DataFile, read_file, write_files
from nec_ray.archive.index import Index
from nec_ray.archive.pack import read_footer
from nec_ray.errors import CorruptIndex, CorruptPack, StorageError
from nec_ray.storage import Store
from tests.archive.make import empty_archive, filled_archive, index_rows, pack


def tile_ids(url: str) -> list[str]:
    found: list[str] = open_archive(url).rows(["tile_id"])["tile_id"].to_pylist()
    return found


def test_tiles_that_appeared_since_the_plan_are_dropped(tmp_path: Path) -> None:
    made = empty_archive(tmp_path)
    base = made.index.version()
    first = made.index.append(base, pack(made, ["a", "b", "c"]))
    second = made.index.append(base, pack(made, ["b", "c", "d"], seed=1))
    assert (first.added, first.dropped) == (3, 0)
    assert (second.added, second.dropped) == (1, 2)
    assert tile_ids(made.url) == ["a", "b", "c", "d"]
    third = made.index.append(base, pack(made, ["a", "d"], seed=2))
    assert (third.added, third.version) == (0, 2)


def test_a_box_without_end_spoils_no_index(tmp_path: Path) -> None:
    made = filled_archive(tmp_path)
    rows = index_rows(["endless"], made.codec.id, ["failed"])
    field = rows.schema.field("bbox")
    endless = pa.array([{"xmin": float("-inf"), "ymin": 0.0, "xmax": float("inf"), "ymax": float("nan")}], field.type)
    made.index.append(made.index.version(), rows.set_column(rows.schema.get_field_index("bbox"), field, endless))
    assert len(open_archive(made.url)) == 41


def test_a_replacement_takes_the_old_row_away_unless_it_changed(tmp_path: Path) -> None:
    made = filled_archive(tmp_path)
    base = made.index.version()
    planned = {
        r["tile_id"]: r["encoded_at"] for r in open_archive(made.url).rows(["tile_id", "encoded_at"]).to_pylist()
    }
    new = pack(made, ["t001", "t038"], seed=5)
    replaces = {tile: planned[tile] for tile in ("t001", "t038")}
    assert made.index.append(base, new, replaces=replaces).added == 2
    assert len(tile_ids(made.url)) == len(set(tile_ids(made.url))) == 40
    status = dict(open_archive(made.url).sql("SELECT tile_id, status FROM embeddings").fetchall())
    assert status["t038"] == "valid"
    again = made.index.append(base, pack(made, ["t001"], seed=6), replaces={"t001": planned["t001"]})
    assert (again.added, again.dropped) == (0, 1)
    assert tile_ids(made.url).count("t001") == 1


def _append(url: str, worker: int) -> None:
    index = Index(Store(url))
    base = index.version(0)  # planned before anybody committed
    for i in range(4):
        own = index_rows([f"shared{i}", f"w{worker}-{i}"], "0" * 64, ["failed", "failed"])
        index.append(base, own, shards=[f"{i}"])


@pytest.mark.slow
def test_writers_in_other_processes_lose_and_double_nothing(tmp_path: Path) -> None:
    made = empty_archive(tmp_path)
    context = multiprocessing.get_context("spawn")
    workers = [context.Process(target=_append, args=(made.url, n)) for n in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert [worker.exitcode for worker in workers] == [0] * 4
    expected = [f"shared{i}" for i in range(4)] + [f"w{n}-{i}" for n in range(4) for i in range(4)]
    assert tile_ids(made.url) == sorted(expected)
    assert DeltaTable(f"{made.url}/index").transaction_version("shard-0") is not None


def test_geopandas_polars_and_deltalake_read_the_index(tmp_path: Path) -> None:
    made = filled_archive(tmp_path)
    [name] = [p for p in made.store.names("index") if p.endswith(".parquet")]
    frame = geopandas.read_parquet(Path(made.url) / name)
    assert len(frame) == 40
    assert frame.crs.to_epsg() == 4326 or frame.crs.to_string() == "OGC:CRS84"
    assert len(geopandas.read_parquet(Path(made.url) / name, bbox=(0.01, 0.01, 0.09, 0.09))) == 1
    ours = {r["tile_id"]: r["n_bytes"] for r in open_archive(made.url).rows(["tile_id", "n_bytes"]).to_pylist()}
    theirs = pl.read_delta(f"{made.url}/index", columns=["tile_id", "n_bytes"])
    assert dict(theirs.rows()) == ours
    uris = DeltaTable(f"{made.url}/index").file_uris(file_pruning_predicate="bbox.xmin > 5")
    assert uris == []


def test_a_pack_describes_itself(tmp_path: Path) -> None:
    made = filled_archive(tmp_path)
    [name] = made.store.names("packs")
    rows = read_footer(made.store, name)
    indexed = open_archive(made.url).rows(["*"])
    assert rows.sort_by("tile_id").to_pylist() == indexed.to_pylist()
    path = Path(made.url) / name
    whole = path.read_bytes()
    footer_bit = bytearray(whole)
    footer_bit[-40] ^= 1
    for damaged in (whole[:-1], whole[:20], whole[:-16] + b"\xff" * 8 + whole[-8:], bytes(footer_bit)):
        path.write_bytes(damaged)
        with pytest.raises(CorruptPack):
            read_footer(made.store, name)


def footer_of(whole: bytes) -> bytes:
    """The footer of a pack, as it is kept."""
    return whole[-20 - int.from_bytes(whole[-16:-8], "little") : -20]


def with_footer(whole: bytes, footer: bytes) -> bytes:
    """The pack with another footer, its length and checksum put right."""
    trailer = zlib.crc32(footer).to_bytes(4, "little") + len(footer).to_bytes(8, "little") + whole[-8:]
    return whole[: -20 - len(footer_of(whole))] + footer + trailer


def test_plain_footers_of_older_packs_are_read_and_hostile_ones_refused(tmp_path: Path) -> None:
    made = filled_archive(tmp_path)
    [name] = made.store.names("packs")
    rows = read_footer(made.store, name)
    path = Path(made.url) / name
    whole = path.read_bytes()
    path.write_bytes(with_footer(whole, zstandard.ZstdDecompressor().decompress(footer_of(whole))))
    assert read_footer(made.store, name).equals(rows)
    bomb = zstandard.ZstdCompressor().compress(bytes(1 << 20))
    header = zstandard.get_frame_parameters(bomb)
    assert header.content_size == 1 << 20
    endless = bomb.replace((1 << 20).to_bytes(4, "little"), (1 << 31).to_bytes(4, "little"), 1)
    assert zstandard.frame_content_size(endless) == 1 << 31
    for hostile in (bomb, endless, whole[-20 - 5 : -20], b"\x28\xb5\x2f\xfd", b""):
        path.write_bytes(with_footer(whole, hostile))
        with pytest.raises(CorruptPack):
            read_footer(made.store, name)


def test_a_log_that_names_a_file_outside_the_index_is_refused(tmp_path: Path) -> None:
    made = filled_archive(tmp_path)
    table = DeltaTable(f"{made.url}/index")
    evil = AddAction("../../secret.parquet", 1, {}, 0, True, '{"numRecords": 1}')
    table.create_write_transaction([evil], "append", table.schema())
    with pytest.raises(CorruptIndex, match="no data file of this index"):
        open_archive(made.url)


def test_writing_the_same_pack_twice_is_success(tmp_path: Path) -> None:
    made = empty_archive(tmp_path)
    rows = index_rows(["a"], made.codec.id).set_column(18, "encoded_at", [[datetime(2026, 1, 1, tzinfo=UTC)]])
    from nec_ray.archive.pack import write_pack

    names = {write_pack(made.store, made.codec.id, rows, [b"x"], [[1]])["payload"][0]["pack"].as_py() for _ in range(2)}
    assert names == set(made.store.names("packs"))


def test_a_data_file_is_read_through_a_restart_of_its_store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = Store(f"memory://{tmp_path.name}")
    [action] = write_files(store, index_rows(["a", "b"], "0" * 32))
    file = DataFile(action.path, action.size, 2)
    failures = [OSError(errno.EREMOTEIO, "We encountered an internal error"), ConnectionResetError(), TimeoutError()]
    cat_file = store._fs.cat_file

    def restarting(*arguments: object, **options: object) -> bytes:
        if failures:
            raise failures.pop()
        return bytes(cat_file(*arguments, **options))

    monkeypatch.setattr(store._fs, "cat_file", restarting)
    assert read_file(store, file, ["tile_id"])["tile_id"].to_pylist() == ["a", "b"]
    assert not failures
    failures += [ConnectionResetError()] * 100
    monkeypatch.setattr("nec_ray.storage.faults.PATIENCE_S", 0.5)
    with pytest.raises(StorageError, match=file.name):
        read_file(store, file, ["tile_id"])

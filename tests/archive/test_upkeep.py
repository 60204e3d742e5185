"""Upkeep on real archives: what a reader sees stays what was encoded, whatever was compacted, collected or rebuilt."""

import os
import shutil
import time
from datetime import timedelta
from pathlib import Path

import numpy as np
import pytest

from nec_ray import open_archive
from nec_ray.archive.change import delete, rebuild, restore
from nec_ray.archive.collect import collect, find_garbage
from nec_ray.archive.compact import compact
from nec_ray.archive.info import describe
from nec_ray.archive.layout import install_codec
from nec_ray.archive.pack import write_pack
from nec_ray.archive.verify import verify
from nec_ray.errors import BadQuery, ConflictError, CorruptPayload, NotFound
from nec_ray.storage import Store
from tests.archive.make import Made, empty_archive, filled_archive, index_rows, pack

NOW = timedelta(0)


def check(made: Made, expected: set[str] | None = None) -> None:
    """Every expected tile is there once and is what was encoded."""
    pulled = open_archive(made.url).pull()
    assert pulled.tile_ids == sorted(expected if expected is not None else made.symbols)
    for tile_id, symbols in zip(pulled.tile_ids, pulled.symbols, strict=True):
        assert np.array_equal(symbols, made.symbols[tile_id])


def many_commits(folder: Path, commits: int = 6) -> Made:
    made = empty_archive(folder)
    for n in range(commits):
        made.index.append(made.index.version(), pack(made, [f"c{n}-{i}" for i in range(20)], seed=n))
    return made


def test_compaction_merges_files_and_packs_and_changes_no_embedding(tmp_path: Path) -> None:
    made = many_commits(tmp_path)
    before = open_archive(made.url)
    old = before.pull()
    planned = compact(made.store, dry_run=True)
    assert (planned.files, planned.packs, planned.tiles) == (6, 6, 120)
    assert made.index.version().number == 6
    done = compact(made.store)
    archive = open_archive(made.url)
    assert archive.version == done.version == 7
    assert len(archive.files) == 1
    packs = archive.sql("SELECT DISTINCT payload.pack FROM embeddings").fetchall()
    assert len(packs) == 1
    check(made)
    assert not verify(archive).faults
    assert np.array_equal(before.pull().symbols, old.symbols)  # a reader of the old version goes on
    again = compact(made.store)
    assert (again.files, again.version) == (0, 7)


def test_compacted_payloads_lie_in_hilbert_order(tmp_path: Path) -> None:
    made = many_commits(tmp_path)
    compact(made.store)
    rows = made.index.read(made.index.version().files, ["payload"])["payload"].to_pylist()
    offsets = [row["offset"] for row in rows]
    assert offsets == sorted(offsets)


def test_a_small_limit_makes_several_packs(tmp_path: Path) -> None:
    made = many_commits(tmp_path)
    total = int(open_archive(made.url).pull().n_bytes.sum())
    compact(made.store, most_bytes=total // 3)
    [(packs,)] = open_archive(made.url).sql("SELECT count(DISTINCT payload.pack) FROM embeddings").fetchall()
    assert 3 <= packs <= 5
    check(made)


def test_compaction_refuses_a_payload_that_is_not_the_one_that_was_written(tmp_path: Path) -> None:
    made = many_commits(tmp_path, 2)
    name = made.store.names("packs")[0]
    data = bytearray(made.store.read(name))
    data[60] ^= 1
    Path(made.store.path(name)).write_bytes(data)
    with pytest.raises(CorruptPayload, match="not the one that was written"):
        compact(made.store)
    assert made.index.version().number == 2


def test_half_dead_packs_are_rewritten(tmp_path: Path) -> None:
    made = filled_archive(tmp_path)
    delete(made.store, "tile_id > 't010'")
    alive = {tile_id for tile_id in made.symbols if tile_id <= "t010"}
    done = compact(made.store)
    assert done.packs == 1
    check(made, alive)
    garbage = collect(made.store, NOW)
    assert len(garbage.packs) == 1
    check(made, alive)
    assert not verify(open_archive(made.url)).faults


def test_delete_and_restore(tmp_path: Path) -> None:
    made = filled_archive(tmp_path)
    everything = open_archive(made.url).rows(["tile_id"])
    assert delete(made.store, "label = 'water'", dry_run=True).dropped == 20
    assert len(open_archive(made.url)) == 40
    gone = delete(made.store, "label = 'water'")
    assert (gone.dropped, gone.version) == (20, 2)
    left = open_archive(made.url).sql("SELECT DISTINCT label FROM embeddings").fetchall()
    assert left == [("forest",)]
    assert delete(made.store, "label = 'water'").version == 2
    assert len(open_archive(made.url, 1)) == 40
    assert restore(made.store, 1).version == 3
    assert open_archive(made.url).rows(["tile_id"]).equals(everything)
    assert [entry.operation for entry in made.index.history()] == ["restore", "delete", "append", "create"]
    with pytest.raises(BadQuery):
        delete(made.store, "no such column")
    with pytest.raises(NotFound, match="no version 99"):
        restore(made.store, 99)


def test_of_two_swaps_of_the_same_rows_one_wins_and_the_other_is_told(tmp_path: Path) -> None:
    made = filled_archive(tmp_path)
    rows = open_archive(made.url).rows(["tile_id", "encoded_at"], "tile_id < 't003'")
    changes = dict(zip(rows["tile_id"].to_pylist(), rows["encoded_at"].to_pylist(), strict=True))
    made.index.swap(changes, pack(made, list(changes), seed=3), "reencode")
    with pytest.raises(ConflictError, match="t000 was changed by another writer"):
        made.index.swap(changes, pack(made, list(changes), seed=4), "reencode")
    with pytest.raises(ConflictError, match="t000 was changed"):
        made.index.swap({"t000": changes["t000"]}, index_rows([], made.codec.id), "delete")
    made.index.swap({}, index_rows([], made.codec.id), "delete")
    delete(made.store, "tile_id = 't000'")
    with pytest.raises(ConflictError, match="t000 was removed"):
        made.index.swap({"t000": changes["t000"]}, pack(made, ["t000"], seed=4), "reencode")


def test_a_swap_of_other_rows_survives_a_compaction(tmp_path: Path) -> None:
    made = many_commits(tmp_path, 3)
    rows = open_archive(made.url).rows(["tile_id", "encoded_at"], "tile_id = 'c1-3'")
    files = made.index.version().files
    compact(made.store)
    made.index.swap({"c1-3": rows["encoded_at"][0].as_py()}, index_rows([], ""), "delete", within=files)
    check(made, set(made.symbols) - {"c1-3"})


def test_gc_takes_what_no_kept_version_needs_and_nothing_else(tmp_path: Path) -> None:
    made = many_commits(tmp_path)
    orphan = pack(made, ["never-committed"])["payload"][0].as_py()["pack"]
    del made.symbols["never-committed"]
    compact(made.store)
    old = open_archive(made.url, 6)
    assert not find_garbage(made.store, timedelta(days=1)).entries  # everything is young
    kept = find_garbage(made.store, NOW)
    assert kept.kept_versions == (7, 7)
    assert orphan in {entry.name for entry in kept.packs}
    assert (len(kept.packs), len(kept.index_files), kept.codecs) == (7, 6, [])
    assert len(made.store.names("packs")) == 8  # that was a dry run
    collect(made.store, NOW)
    assert len(made.store.names("packs")) == 1
    assert made.store.names("clocks") == []
    check(made)
    assert not verify(open_archive(made.url)).faults
    with pytest.raises(NotFound, match="gc has removed this version"):
        old.pull()
    with pytest.raises(NotFound, match="no longer whole"):
        restore(made.store, 6)


def test_gc_keeps_versions_that_were_the_newest_within_the_grace(tmp_path: Path) -> None:
    made = many_commits(tmp_path, 3)
    compact(made.store)
    assert not find_garbage(made.store, timedelta(minutes=5)).entries
    # As if all but the last commit had landed two hours ago: version 3 was the newest until just now.
    past = time.time() - 7200
    for entry in [entry for folder in ("packs", "codecs", "index") for entry in made.store.entries(folder)]:
        if not entry.name.endswith(f"{4:020}.json"):
            os.utime(made.store.path(entry.name), (past, past))
    garbage = find_garbage(made.store, timedelta(hours=1))
    assert garbage.kept_versions == (3, 4)
    assert not garbage.entries


def test_gc_takes_unused_codecs_whole(tmp_path: Path) -> None:
    made = filled_archive(tmp_path)
    other = empty_archive(tmp_path / "other", seed=1)
    install_codec(made.store, other.codec)
    assert collect(made.store, NOW).codecs == [other.codec.id]
    assert not made.store.names(f"codecs/{other.codec.id}")
    check(made)


def test_rebuild_brings_the_index_back_from_the_packs(tmp_path: Path) -> None:
    made = many_commits(tmp_path)
    compact(made.store)  # now every tile is in two packs
    expected = (
        open_archive(made.url).sql("SELECT * EXCLUDE (payload) FROM embeddings ORDER BY tile_id").to_arrow_table()
    )
    shutil.rmtree(Path(made.url) / "index")
    with pytest.raises(NotFound, match="no index there"):
        open_archive(made.url)
    done, faults = rebuild(made.store)
    assert (done.added, faults) == (120, [])
    rebuilt = open_archive(made.url)
    found = rebuilt.sql("SELECT * EXCLUDE (payload) FROM embeddings ORDER BY tile_id").to_arrow_table()
    assert found.equals(expected)
    check(made)
    assert not verify(rebuilt).faults


def test_rebuild_names_damaged_packs_and_takes_the_newest_row(tmp_path: Path) -> None:
    made = many_commits(tmp_path, 2)
    rows = open_archive(made.url).rows(["tile_id", "encoded_at"], "tile_id = 'c0-0'")
    made.index.swap({"c0-0": rows["encoded_at"][0].as_py()}, pack(made, ["c0-0"], seed=77), "reencode")
    broken = made.store.names("packs")[0]
    path = Path(made.store.path(broken))
    lost = open_archive(made.url).sql(f"SELECT tile_id FROM embeddings WHERE payload.pack = '{broken}'").fetchall()
    path.write_bytes(path.read_bytes()[:-1])
    done, faults = rebuild(made.store)
    assert len(faults) == 1
    assert broken in faults[0]
    left = set(made.symbols) - {tile_id for (tile_id,) in lost}
    if lost != [("c0-0",)]:
        check(made, left)
    assert done.added >= len(left)


def test_verify_names_each_damaged_tile(tmp_path: Path) -> None:
    made = many_commits(tmp_path, 3)
    archive = open_archive(made.url)
    rows = archive.rows(["tile_id", "payload"]).to_pylist()
    first, second, third = (row["payload"]["pack"] for row in rows[::20])
    flipped = bytearray(made.store.read(first))
    flipped[rows[4]["payload"]["offset"] + 3] ^= 4
    Path(made.store.path(first)).write_bytes(flipped)
    Path(made.store.path(second)).unlink()
    whole = made.store.read(third)
    Path(made.store.path(third)).write_bytes(whole[: rows[50]["payload"]["offset"]])
    report = verify(archive)
    faults = {fault.tile_id: fault.what for fault in report.faults}
    assert "SHA-256 differs" in faults.pop(rows[4]["tile_id"])
    assert "is gone" in faults.pop("c1-7")
    assert {tile for tile in faults if tile.startswith("c0")} == set()
    assert len([tile for tile in faults if tile.startswith("c1")]) == 19
    late = {row["tile_id"] for row in rows[40:] if row["payload"]["offset"] >= rows[50]["payload"]["offset"]}
    assert {tile for tile in faults if tile.startswith("c2")} == late
    assert (report.tiles, report.checked) == (60, 60)
    assert verify(archive, sample=5).checked == 5


def test_info_counts_what_is_there(tmp_path: Path) -> None:
    made = filled_archive(tmp_path)
    facts = describe(open_archive(made.url))
    pulled = open_archive(made.url).pull()
    assert (facts["tiles"], facts["valid"], facts["nodata"], facts["failed"]) == (40, 38, 1, 1)
    assert facts["payload_bytes"] == int(pulled.n_bytes.sum())
    assert facts["bbox"] == pytest.approx([0, 0, 1, 0.4])
    [codec] = facts["codecs"]
    assert (codec["codec_id"], codec["tiles"], codec["layers"]) == (made.codec.id, 38, 2)


def test_packs_of_equal_content_are_written_once(tmp_path: Path) -> None:
    made = empty_archive(tmp_path)
    rows = index_rows(["a"], made.codec.id)
    payload = made.codec.compress(np.zeros((1, 16, 24), np.int32))[0]
    lengths = [made.codec.layer_lengths([payload])[0].tolist()]
    one = write_pack(made.store, made.codec.id, rows, [payload], lengths)
    two = write_pack(made.store, made.codec.id, rows, [payload], lengths)
    assert one.equals(two)
    assert len(made.store.names("packs")) == 1


def test_a_store_knows_its_own_time(tmp_path: Path) -> None:
    store = Store(tmp_path)
    store.create("before", b"")
    assert store.modified("before") <= store.now()
    assert store.names("clocks") == []

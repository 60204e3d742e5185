"""Recorded catalogs: what an archive knows to be absent, by real runs of `encode` and against brute force."""

import hashlib
import itertools
import json
import os
import shutil
import struct
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import shapely
from deltalake import DeltaTable

from nec_ray import open_archive
from nec_ray.archive.change import delete, rebuild, restore
from nec_ray.archive.collect import collect, find_garbage
from nec_ray.archive.compact import compact
from nec_ray.archive.database import _token_of
from nec_ray.archive.index import Index
from nec_ray.archive.recorded import (
    CONTRACT,
    Digest,
    RecordedCatalog,
    check_recorded,
    recorded_catalogs,
    write_recorded,
)
from nec_ray.archive.verify import verify
from nec_ray.contracts import arrow_schema
from nec_ray.errors import CorruptIndex, Interrupted, NecError, NotFound
from nec_ray.runtime.encode import encode, prepare
from nec_ray.storage import Store
from nec_ray.tiles import Catalog, build_catalog, builtin_scene, write_catalog
from tests.archive.make import filled_archive, index_rows, pack
from tests.command import nec_here
from tests.runtime.make import CtrlC, random_codec
from tests.storage.web import serve

NOW = timedelta(0)
DAY = datetime(2020, 5, 18, tzinfo=UTC)


@pytest.fixture(scope="module")
def codec(tmp_path_factory: pytest.TempPathFactory) -> str:
    return random_codec(tmp_path_factory.mktemp("codec") / "codec")._store.url


@pytest.fixture(scope="module")
def scene() -> Catalog:
    return build_catalog(builtin_scene(), tile_size=64)


@pytest.fixture(scope="module")
def catalog(scene: Catalog, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("catalog") / "catalog.parquet"
    write_catalog(scene, path)
    return path


@pytest.fixture(scope="module")
def whole(catalog: Path, codec: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    """An archive of all of the scene's tiles: not to be changed."""
    archive = str(tmp_path_factory.mktemp("whole") / "archive")
    encode(catalog, archive, codec_url=codec, local=True)
    return archive


@pytest.fixture
def copied(whole: str, tmp_path: Path) -> Store:
    shutil.copytree(whole, tmp_path / "copied")
    return Store(tmp_path / "copied")


def absent(archive: str | Path | Store, *args: Any, version: int | None = None) -> list[str]:
    url = archive.url if isinstance(archive, Store) else archive
    found = open_archive(url, version).coverage(*args)
    tiles = found.tiles.filter(pa.compute.equal(found.tiles["status"], "absent"))
    assert tiles.num_rows == found.absent
    counted = Counter(found.tiles["status"].to_pylist())
    assert (found.valid, found.nodata, found.failed) == tuple(counted[s] for s in ("valid", "nodata", "failed"))
    return sorted(tiles["tile_id"].to_pylist())


def names(catalog: Catalog, where: str | None = None) -> list[str]:
    return sorted(catalog.select(where).table["tile_id"].to_pylist())


def objects(store: Store) -> dict[str, bytes]:
    return {
        name: store.read(name) for folder in ("catalogs", "codecs", "index", "packs") for name in store.names(folder)
    }


def test_an_interrupted_run_leaves_behind_what_is_absent(
    scene: Catalog, catalog: Path, codec: str, tmp_path: Path
) -> None:
    archive = tmp_path / "archive"
    with prepare(catalog, archive, codec_url=codec):  # killed before the first tile
        assert absent(archive) == names(scene)
    with pytest.raises(Interrupted):
        encode(catalog, archive, local=True, shard_tiles=32, progress=CtrlC(3))
    there = set(open_archive(archive).rows(["tile_id"])["tile_id"].to_pylist())
    assert len(there) == 96
    assert absent(archive) == sorted(set(names(scene)) - there)
    encode(catalog, archive, local=True, shard_tiles=32)
    assert absent(archive) == []
    assert len(open_archive(archive).catalogs) == 1


def test_the_same_call_again_leaves_the_same_objects(
    scene: Catalog, catalog: Path, copied: Store, tmp_path: Path
) -> None:
    before, version = objects(copied), open_archive(copied.url).version
    assert version == 1  # the record came with the index
    encode(catalog, copied.url, local=True)
    shuffled = scene.table.take(np.random.default_rng(0).permutation(len(scene)))
    write_catalog(Catalog(shuffled, scene.metadata), tmp_path / "shuffled.parquet")
    encode(tmp_path / "shuffled.parquet", copied.url, local=True)
    with prepare(catalog, copied.url, where="bbox.ymin > -25.3", create=False):  # a dry run
        pass
    assert objects(copied) == before
    assert open_archive(copied.url).version == version


def test_only_tiles_that_were_asked_for_are_absent(scene: Catalog, catalog: Path, codec: str, tmp_path: Path) -> None:
    archive = tmp_path / "archive"
    west, north = "bbox.xmin < -54.6", "bbox.ymin > -25.35"
    with prepare(catalog, archive, codec_url=codec, where=west):
        assert 0 < len(absent(archive)) < len(scene)
    assert absent(archive) == names(scene, west)
    encode(catalog, archive, where=f"{west} AND {north}", local=True)
    assert absent(archive) == names(scene, f"{west} AND NOT ({north})")
    with prepare(catalog, archive, where=north):  # overlaps the first
        pass
    assert len(open_archive(archive).catalogs) == 3
    both = f"({west}) <> ({north})"
    assert absent(archive) == names(scene, both)
    assert absent(archive, version=0) == names(scene, west)
    last = open_archive(archive).version
    assert absent(archive, version=last - 1) == names(scene, f"{west} AND NOT ({north})")
    assert [one.operation for one in Index(Store(archive)).history()] == ["catalog", "append", "catalog", "create"]
    with prepare(catalog, archive, where="false"):  # nothing is asked for
        assert open_archive(archive).version == last


def footprints(rng: np.random.Generator, count: int) -> list[shapely.Geometry]:
    """Turned squares about 0, and some across the antimeridian, whose longitudes go on beyond 180."""
    shapes = []
    for n in range(count):
        centre = (rng.uniform(179, 181) if n % 10 == 0 else rng.uniform(-3, 3), rng.uniform(-3, 3))
        angle = rng.uniform(0, 2 * np.pi) + np.arange(4) * np.pi / 2
        shapes.append(shapely.Polygon(np.stack([np.cos(angle), np.sin(angle)], axis=1) * 0.3 + centre))
    return shapes


def synthetic(scene: Catalog, shapes: list[shapely.Geometry], rng: np.random.Generator) -> pa.Table:
    """A catalog of these footprints; some tiles have no time, some no place. Its pixels are nowhere."""
    n = len(shapes)
    rows = scene.table.take(np.zeros(n, np.int64))
    placed = rng.random(n) > 0.1
    boxes = [dict(zip(("xmin", "ymin", "xmax", "ymax"), shape.bounds, strict=True)) for shape in shapes]
    times = [DAY + timedelta(hours=float(h)) if h < 900 else None for h in rng.uniform(0, 1000, n)]
    columns = {
        "tile_id": [f"é{i:05}" for i in rng.permutation(n)],
        "acquired_at": times,
        "bbox": [box if there else None for box, there in zip(boxes, placed, strict=True)],
        "geometry": [shape.wkb if there else None for shape, there in zip(shapes, placed, strict=True)],
    }
    for name, values in columns.items():
        at = rows.schema.get_field_index(name)
        rows = rows.set_column(at, rows.schema.field(at), pa.array(values, rows.schema.field(at).type))
    return rows


@pytest.mark.parametrize("seed", range(2))
def test_places_and_times_against_brute_force(
    scene: Catalog, codec: str, tmp_path: Path, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("nec_ray.archive.recorded._ROW_GROUP", 50)
    rng = np.random.default_rng(seed)
    archive = tmp_path / "archive"
    known: dict[str, tuple[shapely.Geometry | None, datetime | None]] = {}
    one, other = (synthetic(scene, footprints(rng, 300), rng) for _ in range(2))
    new = pa.array([f"b{i}" for i in range(150)])  # the other half of the second catalog was in the first too
    other = pa.concat_tables([one.slice(0, 150), other.slice(150).set_column(0, one.schema.field(0), new)])
    for rows in (one, other):
        write_catalog(Catalog(rows), tmp_path / "catalog.parquet")
        with prepare(tmp_path / "catalog.parquet", archive, codec_url=codec):
            pass
        for row in rows.select(["tile_id", "geometry", "acquired_at"]).to_pylist():
            known[row["tile_id"]] = (row["geometry"] and shapely.from_wkb(row["geometry"]), row["acquired_at"])
    assert len(known) == 450
    there = set(rng.choice(sorted(known), 200, replace=False).tolist())
    made = index_rows(sorted(there), "0" * 64, ["failed"] * 200)  # whose places are others than the catalog's
    index = Index(Store(archive))
    index.append(index.version(), made)

    def expected(region: shapely.Geometry | None, period: tuple[datetime, datetime] | None) -> list[str]:
        found = []
        for tile_id, (shape, at) in known.items():
            turned = [region and shapely.affinity.translate(region, turn) for turn in (0, 360, -360)]
            near = region is None or (shape is not None and any(shape.intersects(one) for one in turned))
            timed = period is None or (at is not None and period[0] <= at < period[1])
            if near and timed and tile_id not in there:
                found.append(tile_id)
        return sorted(found)

    assert absent(archive) == expected(None, None)
    sizes = []
    for _ in range(12):
        corners = rng.uniform(-4, 4, (5, 2)) + ([178, 0] if rng.random() < 0.3 else [0, 0])
        region = shapely.MultiPoint(corners).convex_hull
        begin = DAY + timedelta(days=int(rng.integers(0, 40)))
        end = begin + timedelta(days=int(rng.integers(1, 15)))
        days = (begin.date(), (end - timedelta(days=1)).date())
        sizes.append(len(expected(region, (begin, end))))
        assert absent(archive, region) == expected(region, None)
        assert absent(archive, None, days) == expected(None, (begin, end))
        assert absent(archive, region, days) == expected(region, (begin, end))
    assert max(sizes) > 3


def test_the_digest_is_what_the_contract_says(scene: Catalog, tmp_path: Path) -> None:
    rng = np.random.default_rng(5)
    rows = synthetic(scene, footprints(rng, 100), rng).select(arrow_schema(CONTRACT).names)
    streams = [b""] * 9
    for row in rows.to_pylist():
        box = row["bbox"] or dict.fromkeys(("xmin", "ymin", "xmax", "ymax"), float("nan"))
        at = row["acquired_at"]
        micros = -(1 << 63) if at is None else (at - datetime(1970, 1, 1, tzinfo=UTC)) // timedelta(microseconds=1)
        wkb = row["geometry"]
        parts = [
            struct.pack("<i", len(row["tile_id"].encode())),
            row["tile_id"].encode(),
            struct.pack("<q", micros),
            *(struct.pack("<d", box[edge]) for edge in ("xmin", "ymin", "xmax", "ymax")),
            struct.pack("<i", -1 if wkb is None else len(wkb)),
            wkb or b"",
        ]
        streams = [stream + part for stream, part in zip(streams, parts, strict=True)]
    expected = hashlib.sha256(b"".join(hashlib.sha256(stream).digest() for stream in streams)).hexdigest()
    for cuts in ([0, 100], [0, 1, 40, 40, 41, 100]):
        digest = Digest()
        for start, stop in itertools.pairwise(cuts):
            digest.update(rows.slice(start, stop - start))
        assert digest.hexdigest() == expected
    store = Store(tmp_path)
    (tmp_path / "catalogs").mkdir()
    path = tmp_path / "catalogs" / f"{expected}.parquet"
    written = write_recorded([rows.slice(0, 3), rows.slice(3)], path)
    sha256 = hashlib.sha256(path.read_bytes()).hexdigest()
    assert written == RecordedCatalog(expected, 100, path.stat().st_size, sha256)
    assert check_recorded(store, f"catalogs/{expected}.parquet") == written
    pq.write_table(rows, path, compression="none", row_group_size=7)  # as another release may write it
    assert check_recorded(store, f"catalogs/{expected}.parquet").tiles == 100
    pq.write_table(rows.slice(1), path)
    with pytest.raises(CorruptIndex, match="does not hold the tiles that its name says; remove it"):
        check_recorded(store, f"catalogs/{expected}.parquet")


def test_what_was_deleted_is_absent_also_after_upkeep(scene: Catalog, copied: Store, catalog: Path) -> None:
    delete(copied, "bbox.ymin > -25.3")
    gone = names(scene, "bbox.ymin > -25.3")
    assert absent(copied) == gone
    assert absent(copied, version=1) == []
    compact(copied)
    assert absent(copied) == gone
    past = time.time() - 86400
    for name in copied.names("catalogs"):
        os.utime(copied.path(name), (past, past))
    assert not collect(copied, NOW).catalogs
    assert absent(copied) == gone
    assert not verify(open_archive(copied.url)).catalogs
    shutil.rmtree(Path(copied.url) / "index")
    assert rebuild(copied)[1] == []
    assert absent(copied) == []  # their rows came back, but of the packs that gc took
    assert len(open_archive(copied.url).catalogs) == 1
    delete(copied, "true")
    assert absent(copied) == names(scene)
    encode(catalog, copied.url, local=True)
    assert absent(copied) == []


def test_gc_takes_a_record_that_no_version_names(scene: Catalog, catalog: Path, copied: Store, tmp_path: Path) -> None:
    [kept] = copied.names("catalogs")
    with prepare(catalog, copied.url, where="bbox.ymin > -25.3"):
        pass
    [other] = set(copied.names("catalogs")) - {kept}
    (Path(copied.url) / "catalogs" / "mine.parquet").write_bytes(b"somebody's")
    assert not find_garbage(copied, NOW).catalogs
    assert restore(copied, 1).version == 3
    assert [one.path for one in open_archive(copied.url).catalogs] == [kept]
    assert not find_garbage(copied, timedelta(days=1)).catalogs
    assert [entry.name for entry in collect(copied, NOW).catalogs] == [other]
    assert not find_garbage(copied, NOW).catalogs
    assert sorted(copied.names("catalogs")) == sorted([kept, "catalogs/mine.parquet"])
    assert absent(copied) == []
    with pytest.raises(NotFound, match=f"gc has removed {other}"):
        restore(copied, 2)
    with pytest.raises(NotFound, match=f"{other} is gone"):
        open_archive(copied.url, 2).coverage()
    encode(catalog, copied.url, where="bbox.ymin > -25.3", local=True)  # the same call makes it again
    assert set(copied.names("catalogs")) >= {kept, other}
    assert absent(copied, version=2) == []


def test_a_record_that_was_lost_comes_back(scene: Catalog, catalog: Path, copied: Store) -> None:
    [name] = copied.names("catalogs")
    data = copied.read(name)
    Path(copied.path(name)).unlink()
    archive = open_archive(copied.url)
    assert archive.coverage(catalog=catalog).absent == 0
    with pytest.raises(NotFound, match="is gone"):
        archive.coverage()
    assert "encode its catalog again" in verify(archive).catalogs[0]
    encode(catalog, copied.url, local=True)
    assert copied.read(name) == data
    assert absent(copied) == []
    assert not verify(open_archive(copied.url)).catalogs


def test_an_orphan_of_the_same_tiles_is_made_young(catalog: Path, whole: str, codec: str, tmp_path: Path) -> None:
    """Between what an interrupted run left and its second try gc must not come."""
    [name] = Store(whole).names("catalogs")
    archive = Store(tmp_path / "archive")
    archive.create(name, Store(whole).read(name))
    os.utime(archive.path(name), (0, 0))
    with prepare(catalog, archive.url, codec_url=codec):
        pass
    assert archive.modified(name) > datetime.now(UTC) - timedelta(minutes=10)
    assert [one.path for one in open_archive(archive.url).catalogs] == [name]


def test_archives_of_earlier_releases_do_not_know(tmp_path: Path) -> None:
    made = filled_archive(tmp_path)
    found = open_archive(made.url).coverage()
    assert (found.absent, found.tiles.num_rows) == (None, 40)
    assert open_archive(made.url).catalogs == ()


def test_over_a_web_server_nothing_is_listed(scene: Catalog, copied: Store) -> None:
    delete(copied, "bbox.ymin > -25.3")
    with serve(Path(copied.url)) as web:
        assert absent(web.url) == names(scene, "bbox.ymin > -25.3")
        assert absent(web.url, version=1) == []
        box = scene.select("bbox.ymin > -25.3").table["bbox"][0].as_py()
        point = shapely.Point((box["xmin"] + box["xmax"]) / 2, (box["ymin"] + box["ymax"]) / 2)
        assert len(absent(web.url, point)) == 1


def test_writers_at_once_record_all_their_catalogs(scene: Catalog, catalog: Path, codec: str, tmp_path: Path) -> None:
    made = filled_archive(tmp_path)
    barrier = threading.Barrier(6)
    failed: list[BaseException] = []

    def write(n: int) -> None:
        index = Index(Store(made.url))
        try:
            barrier.wait()
            if n % 2:
                index.record([RecordedCatalog(f"{n}" * 64, n, 100, "f" * 64)])
            else:
                index.append(index.version(), pack(made, [f"w{n}"], seed=n))
        except BaseException as error:
            failed.append(error)

    threads = [threading.Thread(target=write, args=(n,)) for n in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failed
    archive = open_archive(made.url)
    assert [one.tiles for one in archive.catalogs] == [1, 3, 5]
    assert (archive.version, len(archive)) == (7, 43)


def test_records_outlive_a_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("nec_ray.archive.log._CHECKPOINT_EVERY", 3)
    made = filled_archive(tmp_path)
    made.index.record([RecordedCatalog("a" * 64, 1, 100, "f" * 64)])
    for n in range(4):
        made.index.append(made.index.version(), pack(made, [f"w{n}"], seed=n))
    assert made.store.exists("index/_delta_log/_last_checkpoint")
    assert [one.digest for one in open_archive(made.url).catalogs] == ["a" * 64]
    table = DeltaTable(f"{made.url}/index")  # and others read it as before
    assert table.count() == 44
    with serve(Path(made.url)) as web:
        assert [one.digest for one in open_archive(web.url).catalogs] == ["a" * 64]


SHA = "f" * 64
GOOD = json.dumps({"bytes": 100, "sha256": SHA, "tiles": 1})


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("../../../etc/passwd", GOOD),
        ("/etc/passwd", GOOD),
        ("https://example.org/x", GOOD),
        ("s3://bucket/x", GOOD),
        ("", GOOD),
        ("A" * 64, GOOD),
        ("a" * 63, GOOD),
        ("a" * 64 + "\n", GOOD),
        ("a" * 64, ""),
        ("a" * 64, "[" * 100_000),
        ("a" * 64, "[1]"),
        ("a" * 64, '{"bytes": 1, "tiles": 1}'),
        ("a" * 64, GOOD.replace("100", '"1"')),
        ("a" * 64, GOOD.replace("100", "true")),
        ("a" * 64, GOOD.replace("100", "-1")),
        ("a" * 64, GOOD.replace("100", "1e9")),
        ("a" * 64, GOOD.replace("100", str(1 << 70))),
        ("a" * 64, GOOD.replace(SHA, "../x")),
        ("a" * 64, GOOD.replace(f'"{SHA}"', "5")),
    ],
)
def test_names_that_cannot_be_are_refused(name: str, value: str) -> None:
    with pytest.raises(CorruptIndex, match="no recorded catalog of this archive") as caught:
        recorded_catalogs("here", {f"nec.catalog.{name}": value, "delta.appendOnly": "false"})
    assert len(str(caught.value)) < 400
    assert "\n" not in str(caught.value)


def test_a_hostile_name_stops_coverage_and_nothing_else(tmp_path: Path) -> None:
    made = filled_archive(tmp_path)
    outside = tmp_path / "outside.parquet"
    outside.write_bytes(b"secret")
    hostile = {"nec.catalog.../../outside": GOOD}
    DeltaTable(f"{made.url}/index").alter.set_table_properties(hostile, raise_if_not_exists=False)
    archive = open_archive(made.url)
    assert len(archive.pull()) == 38
    for refused in (archive.coverage, lambda: find_garbage(made.store, NOW)):
        with pytest.raises(CorruptIndex, match="no recorded catalog"):
            refused()
    assert "no recorded catalog" in verify(archive).catalogs[0]
    assert outside.read_bytes() == b"secret"
    restore(made.store, 1)
    assert open_archive(made.url).coverage().absent is None


def damages(data: bytes) -> Iterator[tuple[str, bytes]]:
    yield "empty", b""
    yield "cut", data[: len(data) // 2]
    yield "no end", data[:-4]
    yield "longer", data + b"x" * 100
    yield "not Parquet", b"x" * len(data)
    yield "long footer", data[:-8] + struct.pack("<I", 0x7FFFFFFF) + b"PAR1"
    wrong = {
        "other columns": pa.table({"a": [1]}),
        "other types": pa.table({"tile_id": [1], "acquired_at": ["x"], "bbox": [5], "geometry": [2.0]}),
        "no text": pa.table({"tile_id": [b"\xff\xfe"], "acquired_at": [DAY], "bbox": [None], "geometry": [None]}),
    }
    for what, table in wrong.items():
        out = pa.BufferOutputStream()
        pq.write_table(table, out)
        yield what, out.getvalue().to_pybytes()


def error_of(call: Callable[[], object]) -> str | None:
    """The text of the typed error that a call raises."""
    try:
        call()
    except NecError as error:
        return str(error)
    return None


def test_damaged_records_are_typed_errors(whole: str, copied: Store) -> None:
    [name] = copied.names("catalogs")
    good = Store(whole).read(name)
    [named] = open_archive(whole).catalogs
    facts = json.loads(named.properties[f"nec.catalog.{named.digest}"])
    region = shapely.box(-54.7, -25.4, -54.5, -25.3)
    rng = np.random.default_rng(0)
    flipped = []
    for _ in range(10):
        bits = bytearray(good)
        bits[rng.integers(len(bits))] ^= 1 << int(rng.integers(8))
        flipped.append(("flip", bytes(bits)))
    for what, data in [*damages(good), *flipped]:
        Path(copied.path(name)).write_bytes(data)
        for size in {len(good), max(1, len(data))}:  # the log may be wrong too
            lying = {f"nec.catalog.{name[9:-8]}": json.dumps({**facts, "bytes": size})}
            DeltaTable(f"{copied.url}/index").alter.set_table_properties(lying, raise_if_not_exists=False)
            _token_of.cache_clear()  # as another process would read it: objects are immutable, and parsed once
            archive = open_archive(copied.url)
            said = error_of(lambda: (archive.coverage(region), archive.coverage()))  # noqa: B023
            assert said is None or said.startswith(copied.url), said
            assert said or what in {"flip", "longer"}, what  # DuckDB does not look at all bits
            [fault] = verify(archive).catalogs
            assert "encode its catalog again" in fault
    shutil.rmtree(Path(copied.url) / "index")
    faults = rebuild(copied)[1]
    assert len(faults) == 1
    assert name in faults[0]
    assert open_archive(copied.url).catalogs == ()


def test_the_command_line_says_what_is_absent(copied: Store) -> None:
    def run(*args: str) -> str:
        done = nec_here("archive", *args)
        assert done.returncode == 0, done.stderr
        return done.stdout

    delete(copied, "bbox.ymin > -25.3")
    gone = len(absent(copied))
    assert gone > 0
    assert json.loads(run("coverage", copied.url, "--json"))["absent"] == gone
    assert f"absent: {gone}" in run("coverage", copied.url)
    assert json.loads(run("coverage", copied.url, "--version", "1", "--json"))["absent"] == 0
    assert json.loads(run("verify", copied.url, "--json"))["catalogs"] == []
    assert json.loads(run("gc", copied.url, "--dry-run", "--json"))["catalogs"] == 0

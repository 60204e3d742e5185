"""`nec bench planning`: a catalog of a continent's size through plan, packs, index, query, pull and re-encoding.

There are no pixels: the encoder draws symbols.

Each step runs in a process of its own, so that its peak memory is its own.
"""

import json
import multiprocessing
import resource
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from nec_ray.archive import open_archive
from nec_ray.archive.layout import archive_codec
from nec_ray.contracts import arrow_schema
from nec_ray.evaluate.bench import machine
from nec_ray.runtime.commit import Committer
from nec_ray.runtime.encode import COMMIT_SECONDS, prepare
from nec_ray.runtime.messages import shard_of, to_ipc
from nec_ray.runtime.pipeline import on_ray
from nec_ray.runtime.policy import one_rule
from nec_ray.runtime.reencode import reencode
from nec_ray.runtime.shard import pack_shard
from nec_ray.runtime.standin import standin_codec
from nec_ray.storage import Store
from nec_ray.tiles import TileBatch
from nec_ray.tiles.catalog import METADATA_KEY

SHARD_TILES = 2048
_CHUNK = 500_000
_WEST, _SOUTH, _EAST, _NORTH = -18.0, -35.0, 52.0, 37.0
"""About Africa, degrees."""
_STRIDE = 2_654_435_761
"""Prime: tiles come in an order that has nothing to do with their places."""

Say = Callable[[str], None]


def bench_planning(tiles: int, folder: Path | None = None, *, say: Say = lambda _: None) -> dict[str, Any]:
    """Seconds and peak memory of each step over a catalog of so many tiles.

    Args:
        tiles: of the catalog.
        folder: where to write, about 400 bytes a tile; a temporary folder where it is None.
        say: told what is being done.

    Returns:
        `{"machine": {...}, "rows": [...]}`, a row a step: `step`, `tiles`, `seconds`, `peak_mb` (the largest process),
        `disk_mb` (what the step left behind), and what it found.
    """
    rows = []
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="nec-bench-planning-", dir=folder) as name:
        work = Path(name)
        for step in (_catalog, _plan, _encode, _query, _pull, _reencode):
            say(f"{tiles:,} tiles: {step.__name__.removeprefix('_')}")
            before = _size(work)
            facts = _apart(step, work, tiles)
            rows.append(
                {
                    "step": step.__name__.removeprefix("_"),
                    "tiles": tiles,
                    **facts,
                    "disk_mb": (_size(work) - before) / 1e6,
                }
            )
    return {"machine": machine(), "rows": rows}


def _catalog(work: Path, tiles: int) -> dict[str, Any]:
    schema = arrow_schema("catalog.json").with_metadata({METADATA_KEY: json.dumps({"version": 1, "licence": "none"})})
    with pq.ParquetWriter(work / "catalog.parquet", schema, compression="zstd") as out:
        for start in range(0, tiles, _CHUNK):
            out.write_table(_rows(start, min(start + _CHUNK, tiles), tiles, schema))
    return {}


def _plan(work: Path, tiles: int) -> dict[str, Any]:
    standin_codec(work / "codec", size="standin", pixels=16, layers=2)
    with prepare(
        work / "catalog.parquet", work / "none", codec_url=work / "codec", shard_tiles=SHARD_TILES, create=False
    ) as run:
        shards = sum(1 for _ in run.plan.shards())
        assert run.plan.todo == tiles
    return {"shards": shards}


def _encode(work: Path, tiles: int) -> dict[str, Any]:
    with prepare(work / "catalog.parquet", work / "archive", codec_url=work / "codec", shard_tiles=SHARD_TILES) as run:
        planned = time.monotonic()
        committer = Committer(run.index, run.plan, run.codec, COMMIT_SECONDS, None)
        committer.run(on_ray(run.plan.shards(), run.codec, run.store, None, stages=(_NoPixels, _StandIn)))
        assert committer.committed == tiles
        return {"encode_s": time.monotonic() - planned, "version": run.index.version().number}


def _query(work: Path, tiles: int) -> dict[str, Any]:
    archive = open_archive(work / "archive")
    [(count, size)] = archive.sql("SELECT count(*), avg(n_bytes) FROM embeddings WHERE status = 'valid'").fetchall()
    assert count == tiles
    started = time.monotonic()
    [(near,)] = archive.sql(f"SELECT count(*) FROM embeddings WHERE {_PLACE}").fetchall()
    return {"payload_bytes": size, "found": near, "place_s": time.monotonic() - started}


def _pull(work: Path, _: int) -> dict[str, Any]:
    return {"found": len(open_archive(work / "archive").pull(where=_PLACE))}


def _reencode(work: Path, tiles: int) -> dict[str, Any]:
    """All tiles down to the first of the codec's two layers."""
    done = reencode(one_rule(str(work / "archive"), layers=1))
    assert done.swapped == tiles
    [(size,)] = open_archive(work / "archive").sql("SELECT avg(n_bytes) FROM embeddings").fetchall()
    return {"payload_bytes": size, "version": done.version}


_PLACE = "bbox.xmin > 10 AND bbox.xmax < 11 AND bbox.ymin > 5 AND bbox.ymax < 6"


class _NoPixels:
    """A reader that reads nothing."""

    def __init__(self, _: str) -> None:
        pass

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        return row


class _StandIn:
    """An encoder that draws symbols."""

    def __init__(self, archive_url: str, codec_id: str, _: bool) -> None:
        self._store = Store(archive_url)
        self._codec = archive_codec(self._store, codec_id)

    def __call__(self, block: dict[str, Any]) -> dict[str, Any]:
        shard = shard_of({name: values[0] for name, values in block.items()})
        n = shard.rows.num_rows
        spec = self._codec.spec
        rng = np.random.default_rng(int(shard.id[:8], 16))
        symbols = np.rint(rng.laplace(0, 0.3, (n, spec.tokens, spec.channels))).astype(np.int32)
        batch = TileBatch(
            pixels=np.empty((n, 0, 0, 0), np.float32),
            valid=np.arange(n),
            status=["valid"] * n,
            reason=[None] * n,
            nodata_share=np.zeros(n, np.float32),
        )
        receipt = pack_shard(shard, batch, symbols, self._codec, self._store)
        return {"id": [receipt.shard_id], "rows": [to_ipc(receipt.rows)], "worker": [""]}


def _rows(start: int, stop: int, tiles: int, schema: pa.Schema) -> pa.Table:
    """Tiles on a grid over the continent, in an order that has nothing to do with their places."""
    n = stop - start
    side = int(np.ceil(np.sqrt(tiles)))
    place = np.arange(start, stop, dtype=np.int64) * _STRIDE % tiles
    width, height = (_EAST - _WEST) / side, (_NORTH - _SOUTH) / side
    west, south = _WEST + place % side * width, _SOUTH + place // side * height
    east, north = west + width, south + height
    same: dict[str, Any] = {
        "source": "none",
        "source_etag": "0",
        "x_off": 0,
        "y_off": 0,
        "width": 16,
        "height": 16,
        "bands": ["red", "green", "blue"],
        "dtype": "uint16",
        "nodata": None,
        "nodata_share": 0.0,
        "acquired_at": None,
        "sensor": None,
        "crs": "EPSG:4326",
        "transform": None,
        "label": None,
    }
    columns: dict[str, Any] = {
        name: pa.repeat(pa.scalar(value, schema.field(name).type), n) for name, value in same.items()
    }
    columns["tile_id"] = pa.array([f"t{number:09d}" for number in place.tolist()])
    columns["bbox"] = pa.StructArray.from_arrays(
        [pa.array(edge) for edge in (west, south, east, north)], ["xmin", "ymin", "xmax", "ymax"]
    )
    columns["geometry"] = _polygons(west, south, east, north)
    return pa.table([columns[field.name] for field in schema], schema=schema)


def _polygons(*edges: npt.NDArray[np.float64]) -> pa.Array:
    """Rectangles as WKB: byte order, type, rings, points, then five points."""
    west, south, east, north = edges
    n = len(west)
    wkb = np.empty((n, 93), np.uint8)
    wkb[:, :13] = np.frombuffer(b"\x01" + np.array([3, 1, 5], "<u4").tobytes(), np.uint8)
    points = np.stack([west, south, east, south, east, north, west, north, west, south], axis=1)
    wkb[:, 13:] = points.astype("<f8").view(np.uint8).reshape(n, 80)
    offsets = np.arange(0, (n + 1) * 93, 93, dtype=np.int32)
    return pa.Array.from_buffers(pa.binary(), n, [None, pa.py_buffer(offsets), pa.py_buffer(wkb)])


def _apart(step: Callable[[Path, int], dict[str, Any]], work: Path, tiles: int) -> dict[str, Any]:
    context = multiprocessing.get_context("spawn")
    with context.Pool(1) as pool:
        return pool.apply(_timed, (step, work, tiles))


def _timed(step: Callable[[Path, int], dict[str, Any]], work: Path, tiles: int) -> dict[str, Any]:
    started = time.monotonic()
    facts = step(work, tiles)
    peaks = [resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return {"seconds": time.monotonic() - started, "peak_mb": max(peaks) * 1024 / 1e6, **facts}


def _size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())

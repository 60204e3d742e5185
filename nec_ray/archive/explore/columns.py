"""What the explorer's page knows of an archive: columns of all tiles, packed small.

The packed form is gzip of: the length of the header as uint32, the header (JSON, padded with spaces to a multiple of
8 bytes), and the columns, each padded to a multiple of 8 bytes, all little-endian. The header says of each column its
type, its first byte behind the header and its length in bytes. Texts are int32 codes, -1 where there is none, and a
JSON list of the distinct texts. Some 30 to 60 bytes a tile, most of them the pooled vector and the id.
"""

import gzip
import json
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from nec_ray.archive.archive import Archive
from nec_ray.archive.explore.colours import false_colour
from nec_ray.archive.similar import pool_kind
from nec_ray.archive.tile_set import TileSet
from nec_ray.errors import InputError, without_secrets

MOST_TILES = 1_000_000
"""More are too much for a browser."""
STATUS = ("valid", "nodata", "failed")

_TEXTS = {"codec_id": 64, "sensor": 200, "label": 200, "source": 1000, "reason": 1000, "encoded_from": 64, "crs": 200}
"""Text columns, and the characters of them that are shown."""
_LONGEST_POOLED = 256
"""Longer vectors are no small ones (a codec's have at most 32 numbers): they are taken for none."""
_NO_PLACE = np.iinfo(np.int32).min
_MICRO = 1e6
"""Bounds are integers of a millionth of a degree, a tenth of a metre."""
_QUERY = ", ".join(
    [
        "tile_id",
        "epoch(acquired_at) AS acquired_at",
        "epoch(encoded_at) AS encoded_at",
        *(f"bbox.{edge} AS {edge}" for edge in ("xmin", "ymin", "xmax", "ymax")),
        "grid.rows AS grid_rows",
        "grid.cols AS grid_cols",
        "nodata_share",
        "n_bytes",
        "status",
        *(f"left({name}, {most}) AS {name}" for name, most in _TEXTS.items()),
        f"CASE WHEN status = 'valid' AND len(pooled) <= {_LONGEST_POOLED} THEN pooled END AS pooled",
    ]
)


class _Packed:
    """Columns one after another."""

    def __init__(self) -> None:
        self.columns: dict[str, dict[str, Any]] = {}
        self.parts: list[bytes] = []
        self._end = 0

    def add(self, name: str, values: npt.NDArray[Any]) -> None:
        """A column of numbers."""
        data = np.ascontiguousarray(values, values.dtype.newbyteorder("<")).tobytes()
        self._add(name, values.dtype.name, data)

    def add_texts(self, name: str, texts: list[str]) -> None:
        """A list of texts."""
        self._add(name, "texts", json.dumps(texts, ensure_ascii=False).encode())

    def _add(self, name: str, kind: str, data: bytes) -> None:
        self.columns[name] = {"type": kind, "start": self._end, "length": len(data)}
        self.parts += [data, bytes(-len(data) % 8)]
        self._end += len(data) + len(self.parts[-1])


def pack_columns(tiles: TileSet) -> bytes:
    """Columns of the tiles in the order of their ids, packed as the docstring of this file says.

    Raises:
        InputError: there are no tiles, or too many for a page.
    """
    archive = tiles.archive
    rows = archive.sql(
        f"SELECT {_QUERY} FROM embeddings WHERE {tiles.where} ORDER BY tile_id LIMIT {MOST_TILES + 1}"
    ).to_arrow_table()
    if not rows.num_rows:
        raise InputError(f"{archive.url}: no tiles to show; look with nec archive coverage what there is")
    if rows.num_rows > MOST_TILES:
        raise InputError(
            f"{archive.url}: more than {MOST_TILES:,} tiles, too many for a page; pick some with --where, --within or "
            "--time"
        )
    packed = _Packed()
    packed.add_texts("tile_id", rows["tile_id"].to_pylist())
    for name in ("acquired_at", "encoded_at", "nodata_share"):
        packed.add(name, rows[name].cast(pa.float64()).fill_null(np.nan).to_numpy())
    for name in ("grid_rows", "grid_cols", "n_bytes"):
        packed.add(name, rows[name].fill_null(0).to_numpy().astype(np.int32))
    packed.add("status", _status(rows["status"]))
    for name, values in zip(("west", "south", "east", "north"), _bounds(rows), strict=True):
        packed.add(name, values)
    for name in _TEXTS:
        codes = rows[name].combine_chunks().dictionary_encode()
        packed.add(name, codes.indices.fill_null(-1).to_numpy(zero_copy_only=False).astype(np.int32))
        packed.add_texts(f"{name}.texts", [without_secrets(text) for text in codes.dictionary.to_pylist()])
    kinds = _add_pooled(packed, archive, rows)
    header = {
        "archive": without_secrets(archive.url),
        "version": archive.version,
        "licence": archive.info.licence,
        "attribution": archive.info.attribution,
        "where": "" if tiles.where == "true" else tiles.where,
        "tiles": rows.num_rows,
        "kinds": kinds,
        "columns": packed.columns,
    }
    text = json.dumps(header).encode()
    text += b" " * ((-4 - len(text)) % 8)
    # Without a time in it, one version of an archive gives one page; harder compression gains little and takes long.
    return gzip.compress(b"".join([len(text).to_bytes(4, "little"), text, *packed.parts]), compresslevel=6, mtime=0)


def _status(column: pa.ChunkedArray) -> npt.NDArray[np.uint8]:
    """Places in STATUS; what is none of them counts as failed."""
    return pc.index_in(column, pa.array(STATUS)).fill_null(STATUS.index("failed")).to_numpy().astype(np.uint8)


def _bounds(rows: pa.Table) -> npt.NDArray[np.int32]:
    """(4, tiles) west, south, east, north; _NO_PLACE where there are none or where they are none on Earth."""
    edges = [rows[name].cast(pa.float64()).fill_null(np.nan).to_numpy() for name in ("xmin", "ymin", "xmax", "ymax")]
    bounds = np.array(edges)
    west, south, east, north = bounds
    # Longitudes go on beyond 180 where a footprint lies across the antimeridian.
    placed = (west >= -360) & (east <= 540) & (west <= east) & (south >= -90) & (north <= 90) & (south <= north)
    return np.where(placed, np.rint(np.where(placed, bounds, 0) * _MICRO), _NO_PLACE).astype(np.int32)


def _add_pooled(packed: _Packed, archive: Archive, rows: pa.Table) -> list[dict[str, Any]]:
    """Pooled vectors, each tile's kind, and its false colour; what is said of each kind.

    Vectors can be compared within a kind: of one encoder, the same axes, and one length. Kinds count from 1 on.
    """
    codecs = rows["codec_id"].combine_chunks().dictionary_encode()
    names = codecs.dictionary.to_pylist()
    lengths = pc.list_value_length(rows["pooled"]).fill_null(0).to_numpy().astype(np.int64)
    spaces = _spaces(archive, names, codecs.indices.to_numpy()[lengths > 0])
    space = np.array([spaces.get(name, 0) for name in names], np.int64)[codecs.indices.to_numpy()]
    group = np.where(lengths > 0, space * (_LONGEST_POOLED + 1) + lengths, -1)
    flat = np.asarray(rows["pooled"].combine_chunks().flatten().fill_null(0).to_numpy(zero_copy_only=False), np.int8)
    start = np.cumsum(lengths) - lengths
    kind = np.zeros(rows.num_rows, np.uint16)
    colours = np.zeros((rows.num_rows, 3), np.uint8)
    told: list[dict[str, Any]] = []
    for one in np.unique(group[group >= 0]):
        here = np.flatnonzero(group == one)
        channels = int(lengths[here[0]])
        colours[here], shares = false_colour(flat[start[here, None] + np.arange(channels)])
        told.append({"channels": channels, "tiles": len(here), "shares": [round(share, 4) for share in shares]})
        kind[here] = len(told)
    packed.add("kind", kind)
    packed.add("pooled", flat)
    packed.add("colour", colours)
    return told


def _spaces(archive: Archive, names: list[str], used: npt.NDArray[np.int32]) -> dict[str, int]:
    """By codec id, a number that codecs share whose pooled vectors can be compared."""
    wanted = [names[code] for code in np.unique(used)]
    if len(wanted) < 2:  # no need to load it
        return dict.fromkeys(wanted, 0)
    found: dict[Any, int] = {}
    return {name: found.setdefault(pool_kind(archive.codec(name)), len(found)) for name in wanted}

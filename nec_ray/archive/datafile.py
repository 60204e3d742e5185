"""Data files of the index: GeoParquet in Hilbert order, with the statistics by which readers skip them."""

import json
import math
import secrets
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime

import pyarrow as pa
import pyarrow.compute as pc
from deltalake.transaction import AddAction, RemoveAction

from nec_ray.archive.layout import INDEX
from nec_ray.contracts import arrow_schema
from nec_ray.errors import CorruptIndex
from nec_ray.storage import Store
from nec_ray.storage.parquet import read_columns
from nec_ray.tiles.geoparquet import ROW_GROUP, geoparquet_bytes
from nec_ray.tiles.hilbert import spatial_order

FILE_ROWS = 500_000
_FOOTER, _FOOTER_GROUP = 16 << 10, 2500
"""Bytes of a footer, about: of its key-value metadata, and of each row group."""
_STATISTICS = ("tile_id", "codec_id", "status", "acquired_at")
_BOX = ("xmin", "ymin", "xmax", "ymax")
_NEAR = ("bbox", "label", "acquired_at", "status", "codec_id", "n_bytes", "tile_id", "payload")
"""What conditions and pulls read lies side by side at the front of a row group, so that it comes in one request."""


@dataclass(frozen=True)
class DataFile:
    """One data file of a version."""

    name: str
    size: int
    rows: int

    @property
    def path(self) -> str:
        """Its name below the archive."""
        return f"{INDEX}/{self.name}"

    @property
    def footer(self) -> int:
        """Bytes of its footer, about."""
        return _FOOTER + _FOOTER_GROUP * -(-self.rows // ROW_GROUP)

    def removal(self) -> RemoveAction:
        """The action that takes it out of the table."""
        return RemoveAction(self.name, True, _now_ms())


def write_files(store: Store, rows: pa.Table) -> Iterator[AddAction]:
    """Write rows (schema index.json) as data files; the actions that add them."""
    rows = rows.take(pa.array(spatial_order(rows)))
    for start in range(0, rows.num_rows, FILE_ROWS):
        part = rows.slice(start, FILE_ROWS)
        name = f"part-{secrets.token_hex(16)}.parquet"
        data = geoparquet_bytes(part.select([*_NEAR, *(c for c in part.column_names if c not in _NEAR)]))
        store.create(f"{INDEX}/{name}", data)
        yield AddAction(name, len(data), {}, _now_ms(), True, json.dumps(_statistics(part)))


def read_file(store: Store, file: DataFile, columns: Sequence[str]) -> pa.Table:
    """Columns of a data file, in the types of index.json.

    Raises:
        CorruptIndex: it does not read, or is another file than the log says.
    """
    schema = arrow_schema("index.json")
    try:
        table = read_columns(store, file.path, columns)
        return table.select(list(columns)).cast(pa.schema([schema.field(name) for name in columns]))
    except (pa.ArrowException, KeyError, ValueError) as error:
        text = " ".join(str(error).split())
        raise CorruptIndex(f"{store.url}/{file.path}: {text}; restore the file from a copy") from None


def _statistics(rows: pa.Table) -> dict[str, object]:
    """Delta's per-file statistics, nested for the bounding box."""
    low: dict[str, object] = {}
    high: dict[str, object] = {}
    nulls: dict[str, object] = {}
    for name in _STATISTICS:
        limits = pc.min_max(rows[name]).as_py()
        nulls[name] = rows[name].null_count
        for side, value in ((low, limits["min"]), (high, limits["max"])):
            if value is not None:
                side[name] = value.isoformat().replace("+00:00", "Z") if isinstance(value, datetime) else value
    box = rows["bbox"].combine_chunks()
    if box.null_count < len(box):
        parts = {key: pc.min_max(pc.struct_field(box, key)).as_py() for key in _BOX}
        if all(math.isfinite(value) for limits in parts.values() for value in limits.values()):  # JSON has no infinity
            low["bbox"] = {key: value["min"] for key, value in parts.items()}
            high["bbox"] = {key: value["max"] for key, value in parts.items()}
        nulls["bbox"] = dict.fromkeys(_BOX, pc.struct_field(box, "xmin").null_count)
    return {"numRecords": rows.num_rows, "minValues": low, "maxValues": high, "nullCount": nulls}


def _now_ms() -> int:
    return int(time.time() * 1000)

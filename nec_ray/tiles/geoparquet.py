"""GeoParquet 1.1: Parquet whose `geo` key tells readers where the geometry and its bounding boxes are."""

import io
import json
from collections.abc import Mapping
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

ROW_GROUP = 4096
"""With smaller ones a spatial filter would read less, but every reader a longer footer."""
_EDGES = ("xmin", "ymin", "xmax", "ymax")
_BOX = tuple(f"bbox.{edge}" for edge in _EDGES)
_STATISTICS = ("tile_id", "acquired_at", "codec_id", *_BOX)
"""What readers skip row groups by; statistics of every column would double the footer, which all readers fetch."""
_ENCODINGS = {"payload.offset": "DELTA_BINARY_PACKED", **dict.fromkeys(_BOX, "BYTE_STREAM_SPLIT")}
_ALL_DISTINCT = ("tile_id", "geometry", "sha256")
"""Columns in which a dictionary would only be written, found too long and given up."""


def geoparquet_bytes(
    table: pa.Table, *, key_value: Mapping[str, str] | None = None, row_group_size: int = ROW_GROUP
) -> bytes:
    """A table as Parquet, and as GeoParquet 1.1 where it has a geometry.

    Args:
        table: with `geometry` (WKB polygons, longitude and latitude, may be null) and `bbox` (struct).
        key_value: further entries of the file's metadata.
        row_group_size: rows a row group: what a spatial filter can skip.
    """
    metadata = dict(key_value or {})
    if table["geometry"].null_count < table.num_rows:  # geopandas refuses a geo key without a geometry
        metadata["geo"] = geo_key(table["bbox"])
    sink = pa.BufferOutputStream()
    with parquet_writer(sink, table.schema.with_metadata(metadata)) as writer:
        writer.write_table(table, row_group_size=row_group_size)
    return bytes(sink.getvalue().to_pybytes())


def parquet_writer(sink: Any, schema: pa.Schema) -> pq.ParquetWriter:
    """A writer of tables of tiles, compressed by zstd, with the statistics by which readers skip row groups.

    Args:
        sink: a path, or an Arrow stream.
        schema: of the tables, with the file's metadata.
    """
    leaves = _leaves(schema)
    encodings = {name: encoding for name, encoding in _ENCODINGS.items() if name in leaves}
    return pq.ParquetWriter(
        sink,
        schema,
        compression="zstd",
        write_statistics=[name for name in _STATISTICS if name in leaves],
        use_dictionary=[name for name in leaves if name not in encodings and name not in _ALL_DISTINCT],
        column_encoding=encodings,
    )


def _leaves(schema: pa.Schema) -> list[str]:
    """Parquet's names of the columns, such as bbox.xmin."""
    empty = io.BytesIO()
    pq.write_table(schema.empty_table(), empty)
    found = pq.read_metadata(empty).schema
    return [found.column(i).path for i in range(len(found.names))]


def geo_key(bbox: pa.ChunkedArray) -> str:
    """The `geo` key of a file whose polygons in the column `geometry` have these bounds, a struct column `bbox`."""
    box = bbox.combine_chunks()
    limits = [pc.min_max(pc.struct_field(box, name)).as_py() for name in _EDGES]
    geo = {
        "version": "1.1.0",
        "primary_column": "geometry",
        "columns": {
            "geometry": {
                "encoding": "WKB",
                "geometry_types": ["Polygon"],
                "bbox": [limits[0]["min"], limits[1]["min"], limits[2]["max"], limits[3]["max"]],
                "covering": {"bbox": {name: ["bbox", name] for name in _EDGES}},
            }
        },
    }
    return json.dumps(geo)

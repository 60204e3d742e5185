"""GeoParquet 1.1: Parquet whose `geo` key tells readers where the geometry and its bounding boxes are."""

import json
from collections.abc import Mapping

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

ROW_GROUP = 8192
_EDGES = ("xmin", "ymin", "xmax", "ymax")


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
        metadata["geo"] = json.dumps(_geo(table))
    sink = pa.BufferOutputStream()
    with pq.ParquetWriter(sink, table.schema.with_metadata(metadata), compression="zstd") as writer:
        writer.write_table(table, row_group_size=row_group_size)
    return bytes(sink.getvalue().to_pybytes())


def _geo(table: pa.Table) -> dict[str, object]:
    box = table["bbox"].combine_chunks()
    limits = [pc.min_max(pc.struct_field(box, name)).as_py() for name in _EDGES]
    return {
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

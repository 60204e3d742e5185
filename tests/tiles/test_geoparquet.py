import io
import json
from typing import Any

import geopandas
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from shapely import box, to_wkb

from nec_ray.tiles import geoparquet_bytes

BOXES = [(-54.8, -25.6, -54.7, -25.5), None, (10.0, 50.0, 10.1, 50.2), (-54.6, -25.6, -54.5, -25.5)]
BBOX = pa.struct([(name, pa.float64()) for name in ("xmin", "ymin", "xmax", "ymax")])


def make(boxes: list[Any]) -> pa.Table:
    return pa.table(
        {
            "n": pa.array(range(len(boxes)), pa.int32()),
            "geometry": pa.array([None if b is None else to_wkb(box(*b)) for b in boxes], pa.binary()),
            "bbox": pa.array(
                [None if b is None else dict(zip(("xmin", "ymin", "xmax", "ymax"), b, strict=True)) for b in boxes],
                BBOX,
            ),
        }
    )


def test_geopandas_reads_it() -> None:
    frame = geopandas.read_parquet(io.BytesIO(geoparquet_bytes(make(BOXES))))
    assert frame.crs == "OGC:CRS84"
    assert frame.geometry.isna().tolist() == [False, True, False, False]
    np.testing.assert_allclose(frame.geometry.bounds.dropna(), [b for b in BOXES if b])


def test_geopandas_filters_by_bounding_box() -> None:
    data = geoparquet_bytes(make(BOXES), row_group_size=1)
    frame = geopandas.read_parquet(io.BytesIO(data), bbox=(-55, -26, -54, -25))
    assert frame["n"].tolist() == [0, 3]


def test_the_geo_key_is_1_1_and_the_file_zstd() -> None:
    file = pq.ParquetFile(io.BytesIO(geoparquet_bytes(make(BOXES), key_value={"mine": "yes"}, row_group_size=2)))
    metadata = file.schema_arrow.metadata
    geo = json.loads(metadata[b"geo"])
    assert geo["version"] == "1.1.0"
    column = geo["columns"][geo["primary_column"]]
    assert column["encoding"] == "WKB"
    assert "crs" not in column  # absent means OGC:CRS84
    assert column["bbox"] == [-54.8, -25.6, 10.1, 50.2]
    assert column["covering"]["bbox"]["ymax"] == ["bbox", "ymax"]
    assert metadata[b"mine"] == b"yes"
    assert file.num_row_groups == 2
    assert file.metadata.row_group(0).column(0).compression == "ZSTD"


def test_a_table_without_any_geometry_is_plain_parquet() -> None:
    table = make([None, None])
    file = pq.ParquetFile(io.BytesIO(geoparquet_bytes(table)))
    assert b"geo" not in (file.schema_arrow.metadata or {})
    assert file.read().equals(table)

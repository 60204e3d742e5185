"""stac-geoparquet 1.1: items as rows of one GeoParquet file, properties as columns.

Specification: github.com/stac-utils/stac-geoparquet, spec/stac-geoparquet-spec.md.
"""

import json
from collections.abc import Iterator
from datetime import datetime
from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from nec_ray.archive.exports.selection import EDGES
from nec_ray.archive.exports.stac_items import Item
from nec_ray.tiles.geoparquet import geo_key

_ROW_GROUP = 4096
_TIME = pa.timestamp("us", tz="UTC")
_LINK = {name: pa.string() for name in ("rel", "href", "type", "title")}
_ASSET = {
    "href": pa.string(),
    "type": pa.string(),
    "title": pa.string(),
    "roles": pa.list_(pa.string()),
    "created": pa.string(),
    "nec:offset": pa.int64(),
    "nec:length": pa.int64(),
    "nec:layer_lengths": pa.list_(pa.int32()),
    "file:checksum": pa.string(),
    "nec:checksum": pa.string(),
}
_PROPERTIES = {
    "datetime": _TIME,
    "start_datetime": _TIME,
    "end_datetime": _TIME,
    "emb:quantization": pa.struct(
        {"method": pa.string(), "original_dtype": pa.string(), "quantized_dtype": pa.string(), "link": pa.struct(_LINK)}
    ),
    "nec:codec_id": pa.string(),
    "nec:encoded_from": pa.string(),
    "nec:sensor": pa.string(),
    "nec:label": pa.string(),
    "nec:nodata_share": pa.float32(),
    "proj:code": pa.string(),
    "proj:transform": pa.list_(pa.float64()),
    "proj:shape": pa.list_(pa.int32()),
}
_SCHEMA = pa.schema(
    {
        "type": pa.string(),
        "stac_version": pa.string(),
        "stac_extensions": pa.list_(pa.string()),
        "id": pa.string(),
        "collection": pa.string(),
        "geometry": pa.binary(),
        "bbox": pa.struct(dict.fromkeys(EDGES, pa.float64())),
        "links": pa.list_(pa.struct(_LINK)),
        "assets": pa.struct({"embeddings": pa.struct(_ASSET)}),
        **_PROPERTIES,
    }
)


def write_items(items: Iterator[Item], collection: dict[str, Any], bbox: pa.ChunkedArray, path: Path) -> None:
    """Write the items as they come, a row group at a time.

    Args:
        items: taken one after the other.
        collection: goes into the metadata.
        bbox: bounds of all tiles, null where one has no footprint.
        path: the file.
    """
    metadata = {"stac-geoparquet": json.dumps({"version": "1.1.0", "collections": {collection["id"]: collection}})}
    if bbox.null_count < len(bbox):
        metadata["geo"] = geo_key(bbox)
    with pq.ParquetWriter(path, _SCHEMA.with_metadata(metadata), compression="zstd") as writer:
        while some := list(islice(items, _ROW_GROUP)):
            writer.write_table(pa.Table.from_pylist([_row(item) for item in some], _SCHEMA))


def _row(item: Item) -> dict[str, Any]:
    document = item.json(".")
    properties = document.pop("properties")
    for name in ("datetime", "start_datetime", "end_datetime"):
        if properties.get(name):
            properties[name] = datetime.fromisoformat(properties[name])
    return {**document, **properties, "geometry": item.row["geometry"], "bbox": item.row["bbox"]}

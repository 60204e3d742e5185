"""One GeoParquet 1.1 file: the index's columns and each tile's embedding, tokens of channels, float32."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from nec_ray.archive.exports.selection import Selection
from nec_ray.contracts import arrow_schema
from nec_ray.tiles.geoparquet import geo_key


def write(selection: Selection, path: Path, progress: Callable[[int, int], None]) -> dict[str, Any]:
    """Write the file, a batch a row group: tiles near each other, which a spatial filter reads or skips together.

    `embedding` is a fixed-size list of tokens of fixed-size lists of channels. The metadata key `nec_ray` holds
    where it came from, as JSON.
    """
    index = arrow_schema("index.json")
    schema = index.append(pa.field("embedding", _type(selection), nullable=False))
    metadata = {"nec_ray": json.dumps(selection.facts())}
    if selection.rows["bbox"].null_count < len(selection):  # geopandas refuses a geo key without a geometry
        metadata["geo"] = geo_key(selection.rows["bbox"])
    with pq.ParquetWriter(path, schema.with_metadata(metadata), compression="zstd") as writer:
        for start, part in selection.batches(selection.batch_tiles):
            rows = selection.index(part, index.names).cast(index)
            rows = rows.append_column(schema.field("embedding"), _column(selection.embeddings(part)))
            writer.write_table(rows, row_group_size=selection.batch_tiles)
            progress(start + len(part), len(selection))
    return {"bytes": path.stat().st_size}


def _type(selection: Selection) -> pa.DataType:
    return pa.list_(pa.list_(pa.float32(), selection.channels), selection.tokens)


def _column(embeddings: npt.NDArray[np.float32]) -> pa.Array:
    _, tokens, channels = embeddings.shape
    token = pa.FixedSizeListArray.from_arrays(pa.array(embeddings.reshape(-1)), channels)
    return pa.FixedSizeListArray.from_arrays(token, tokens)

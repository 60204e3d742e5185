"""A Zarr v3 store: dense embeddings in shards, with what `xarray.open_zarr(path, consolidated=False)` needs.

The group's attributes follow the geo-embeddings convention for Zarr, version 1
(github.com/geo-embeddings/embeddings-zarr-convention), beside this package's own.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import zarr

from nec_ray.archive.exports.selection import EDGES, Selection, edges

_CHUNK_BYTES = 1 << 20
"""What a reader decompresses at least; a shard holds as many chunks as a batch fills."""
_COORDINATE_CHUNK = 1 << 16
_CONVENTION = {
    "schema_url": "https://raw.githubusercontent.com/geo-embeddings/embeddings-zarr-convention/refs/tags/v1/schema.json",
    "spec_url": "https://github.com/geo-embeddings/embeddings-zarr-convention/blob/v1/README.md",
    "uuid": "61c12cc5-0e28-4056-999a-480cf3fb7e4c",
    "name": "geoemb:",
}


def write(selection: Selection, path: Path, progress: Callable[[int, int], None]) -> dict[str, Any]:
    """Write the store, whole shards at a time.

    `embeddings` float32 (tile, token, channel), and along `tile` the coordinates `tile_id`, `lon`, `lat` (centre of
    the bounds), `xmin`, `ymin`, `xmax`, `ymax` (NaN where a tile has no footprint) and `acquired_at`.
    """
    group = zarr.open_group(str(path), mode="w", zarr_format=3, attributes=_attributes(selection))
    coordinates = _coordinates(selection)
    chunk = max(1, min(_CHUNK_BYTES // selection.tile_bytes, selection.batch_tiles, len(selection)))
    shard = chunk * max(1, min(selection.batch_tiles, len(selection)) // chunk)
    inner = (selection.tokens, selection.channels)
    array = group.create_array(
        "embeddings",
        shape=(len(selection), *inner),
        dtype="float32",
        chunks=(chunk, *inner),
        shards=(shard, *inner),
        dimension_names=("tile", "token", "channel"),
        attributes={"coordinates": " ".join(coordinates)},  # CF's way to say so, which xarray reads
    )
    for name, (values, dtype, attributes) in coordinates.items():
        group.create_array(
            name,
            shape=(len(selection),),
            dtype=dtype,
            chunks=(min(_COORDINATE_CHUNK, len(selection)),),
            dimension_names=("tile",),
            attributes=attributes,
        )[:] = values
    for start, part in selection.batches(shard):
        array[start : start + len(part)] = selection.embeddings(part)
        progress(start + len(part), len(selection))
    return {"shard_tiles": shard, "chunk_tiles": chunk}


def _coordinates(selection: Selection) -> dict[str, tuple[npt.NDArray[Any], str, dict[str, str]]]:
    """Values, Zarr type and attributes of each coordinate.

    Ids are Zarr's variable-length `string`: of the ways to write text it is the one that has a specification, and that
    xarray gives back as strings to select by (fixed-length text warns, raw bytes need decoding). Times are CF's
    integers, which every reader knows; the smallest one stands for an unknown time.
    """
    box = edges(selection.rows["bbox"])
    time = selection.rows["acquired_at"].combine_chunks().cast(pa.timestamp("us", tz="UTC")).cast(pa.int64())
    degrees = {"x": {"units": "degrees_east"}, "y": {"units": "degrees_north"}}
    return {
        "tile_id": (np.array(selection.rows["tile_id"].to_pylist(), object), "string", {}),
        "lon": ((box[0] + box[2]) / 2, "float64", {"standard_name": "longitude", **degrees["x"]}),
        "lat": ((box[1] + box[3]) / 2, "float64", {"standard_name": "latitude", **degrees["y"]}),
        **{name: (values, "float64", degrees[name[0]]) for name, values in zip(EDGES, box, strict=True)},
        "acquired_at": (
            pc.fill_null(time, np.iinfo(np.int64).min).to_numpy(),
            "int64",
            {"units": "microseconds since 1970-01-01", "calendar": "proleptic_gregorian"},
        ),
    }


def _attributes(selection: Selection) -> dict[str, Any]:
    return {
        "zarr_conventions": [_CONVENTION],
        "geoemb:type": "chip",
        "geoemb:dimensions": selection.channels,
        "geoemb:model": selection.codec_url(selection.codec),
        "geoemb:source_data": [selection.source()],
        "geoemb:data_type": "float32",
        "geoemb:chip_layout": {"layout_type": "regular_grid", "chip_size": selection.patch()},
        **selection.facts(),
    }

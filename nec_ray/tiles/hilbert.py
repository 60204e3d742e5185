"""Spatial order of tiles: along a Hilbert curve, so that neighbours lie beside each other in shards and files."""

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

_ORDER = 16
"""Bits of each coordinate: cells of about 600 m at the equator."""


def spatial_order(table: pa.Table) -> npt.NDArray[np.int64]:
    """Permutation (rows,) that puts tiles in Hilbert order of the centres of their `bbox`.

    Ties, and tiles without a finite bbox (they come last), are ordered by `tile_id`, so that the order depends on
    nothing but the tiles.
    """
    key = hilbert_keys(table["bbox"])
    by_id = pc.sort_indices(table, sort_keys=[("tile_id", "ascending")]).to_numpy().astype(np.int64)
    order: npt.NDArray[np.int64] = by_id[np.argsort(key[by_id], kind="stable")]
    return order


def hilbert_keys(bbox: pa.ChunkedArray | pa.StructArray) -> npt.NDArray[np.int64]:
    """Distance along the curve of the centres of bounding boxes, a struct array; the largest int64 without one."""
    box = bbox.combine_chunks() if isinstance(bbox, pa.ChunkedArray) else bbox
    edges = [pc.fill_null(pc.struct_field(box, name), np.nan).to_numpy(zero_copy_only=False) for name in _EDGES]
    xmin, ymin, xmax, ymax = (np.where(np.isfinite(edge), edge, np.nan) for edge in edges)
    return hilbert_distance((xmin + xmax) / 2, (ymin + ymax) / 2)


_EDGES = ("xmin", "ymin", "xmax", "ymax")


def hilbert_distance(lon: npt.NDArray[np.float64], lat: npt.NDArray[np.float64]) -> npt.NDArray[np.int64]:
    """Distance along the curve over longitude and latitude of points in degrees; the largest int64 for NaN.

    Skilling, "Programming the Hilbert curve" (2004), in two dimensions.
    """
    known = np.isfinite(lon) & np.isfinite(lat)
    side = 1 << _ORDER
    x = np.clip((np.where(known, lon, 0.0) + 180) / 360 * side, 0, side - 1).astype(np.int64)
    y = np.clip((np.where(known, lat, 0.0) + 90) / 180 * side, 0, side - 1).astype(np.int64)
    distance = np.zeros(len(x), np.int64)
    step = side >> 1
    while step:
        right, upper = (x & step) > 0, (y & step) > 0
        distance += step * step * ((3 * right) ^ upper)
        turn = ~upper
        flip = turn & right
        x, y = np.where(flip, side - 1 - x, x), np.where(flip, side - 1 - y, y)
        x, y = np.where(turn, y, x), np.where(turn, x, y)
        step >>= 1
    return np.where(known, distance, np.iinfo(np.int64).max)

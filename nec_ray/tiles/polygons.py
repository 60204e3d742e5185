"""Points in polygons, in numpy: WKB and GeoJSON polygons as rings, and the even-odd rule over them."""

import struct
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

Ring = npt.NDArray[np.float64]
"""(vertices, 2): x and y; closed or not."""

_POLYGON, _MULTIPOLYGON = 3, 6
_PARTS = (b"\x01" + _POLYGON.to_bytes(4, "little"), b"\x00" + _POLYGON.to_bytes(4, "big"))
_PAIRS_A_STEP = 1 << 21  # point-edge pairs held in memory at a time


def points_in_rings(
    x: npt.NDArray[np.float64], y: npt.NDArray[np.float64], rings: Sequence[Ring]
) -> npt.NDArray[np.bool_]:
    """Whether each point lies inside, by the even-odd rule over all rings: holes and parts need no order.

    A ray to the right counts the edges it crosses, each half open in y, so that of two polygons that share an
    edge exactly one holds a point on it.

    Args:
        x: (points,) coordinates.
        y: (points,) coordinates.
        rings: the polygon's outer and inner rings, those of a multi-polygon's parts one after another.

    Returns:
        (points,) bool.
    """
    inside = np.zeros(len(x), bool)
    if not rings:
        return inside
    start = np.concatenate(rings)
    end = np.concatenate([np.roll(ring, -1, axis=0) for ring in rings])
    low, high = start.min(axis=0), start.max(axis=0)
    near = np.flatnonzero((x >= low[0]) & (x <= high[0]) & (y >= low[1]) & (y <= high[1]))
    (x0, y0), (x1, y1) = start.T, end.T
    with np.errstate(divide="ignore", invalid="ignore"):
        slope = (x1 - x0) / (y1 - y0)  # unused where an edge is level: no ray crosses it
    step = max(1, _PAIRS_A_STEP // len(start))
    for first in range(0, len(near), step):
        chosen = near[first : first + step]
        px, py = x[chosen, None], y[chosen, None]
        spans = (y0 > py) != (y1 > py)
        with np.errstate(invalid="ignore"):
            crossed = spans & (px < x0 + (py - y0) * slope)
        inside[chosen] = crossed.sum(axis=1) % 2 == 1
    return inside


def rings_of_wkb(wkb: bytes) -> list[Ring]:
    """Rings of a two-dimensional WKB Polygon or MultiPolygon.

    Raises:
        ValueError: it is another geometry, or cut short.
    """
    try:
        rings, _ = _read_wkb(wkb, 0)
    except (struct.error, IndexError):
        raise ValueError("a WKB geometry is cut short") from None
    return rings


def _read_wkb(wkb: bytes, at: int) -> tuple[list[Ring], int]:
    order = "<" if wkb[at] == 1 else ">"
    kind, count = struct.unpack_from(f"{order}II", wkb, at + 1)
    at += 9
    rings: list[Ring] = []
    if kind == _MULTIPOLYGON:
        for _ in range(count):
            if wkb[at : at + 5] not in _PARTS:  # a multi-polygon in a multi-polygon would recurse as deep as it likes
                raise ValueError("a part of a WKB MultiPolygon is no Polygon")
            part, at = _read_wkb(wkb, at)
            rings += part
    elif kind == _POLYGON:
        for _ in range(count):
            (points,) = struct.unpack_from(f"{order}I", wkb, at)
            at += 4
            if at + 16 * points > len(wkb):
                raise ValueError("a WKB geometry is cut short")
            rings.append(np.frombuffer(wkb, f"{order}f8", 2 * points, at).reshape(-1, 2).astype(np.float64))
            at += 16 * points
    else:
        raise ValueError(f"WKB geometry type {kind}, only Polygon and MultiPolygon are read")
    return [ring for ring in rings if len(ring)], at


def rings_of_geojson(geometry: dict[str, Any]) -> list[Ring]:
    """Rings of a GeoJSON Polygon or MultiPolygon (RFC 7946, section 3.1.6); heights are left out.

    Raises:
        ValueError: it is another geometry, or its coordinates are not rings of positions.
    """
    parts: Iterable[Any]
    match geometry:
        case {"type": "Polygon", "coordinates": [*polygon]}:
            parts = [polygon]
        case {"type": "MultiPolygon", "coordinates": [*polygons]}:
            parts = polygons
        case _:
            raise ValueError(f"geometry {str(geometry.get('type'))[:40]} is no Polygon or MultiPolygon")
    try:
        return [np.array([(p[0], p[1]) for p in ring], np.float64) for part in parts for ring in part if ring]
    except (TypeError, IndexError, KeyError, ValueError):
        raise ValueError("a polygon's coordinates are not rings of [longitude, latitude]") from None

"""Where a window lies: its footprint in longitude and latitude, its CRS and transform."""

import functools
from typing import Any

import numpy as np
import numpy.typing as npt
from rasterio._err import CPLE_BaseError
from rasterio.crs import CRS
from rasterio.errors import CRSError
from rasterio.warp import transform as transform_points

from nec_ray.errors import BadSource

_EDGE_POINTS = 4
"""Points a side from which the bounds are taken: straight edges in one CRS are curves in another."""

NOWHERE: dict[str, Any] = {"geometry": None, "bbox": None, "crs": None, "transform": None}
"""The columns of a tile without a place on the map."""


def place_of(crs: CRS | None, transform: Any, width: int, height: int, where: str) -> dict[str, Any]:
    """The catalog's columns geometry, bbox, crs and transform of a window.

    Args:
        crs: of the pixels; None where they have no place on the map.
        transform: affine, pixel of the window to CRS.
        width: columns of the window.
        height: rows of the window.
        where: what to call the source in an error.

    Raises:
        BadSource: the window does not lie in the CRS, or the CRS does not turn into longitude and latitude.
    """
    if not crs:
        return NOWHERE
    ring = _footprint(crs, transform, width, height, where)
    return {
        "geometry": _wkb(ring[::_EDGE_POINTS]),
        "bbox": _bounds(ring),
        "crs": crs_name(crs),
        "transform": list(transform)[:6],
    }


def _footprint(crs: CRS, transform: Any, width: int, height: int, where: str) -> npt.NDArray[np.float64]:
    """Closed ring (points, 2) of longitude and latitude, counter-clockwise from the upper left."""
    steps = np.linspace(0, 1, _EDGE_POINTS, endpoint=False)
    left = np.stack([np.zeros_like(steps), steps], axis=1)
    lower = np.stack([steps, np.ones_like(steps)], axis=1)
    right = np.stack([np.ones_like(steps), 1 - steps], axis=1)
    upper = np.stack([1 - steps, np.zeros_like(steps)], axis=1)
    corners = np.concatenate([left, lower, right, upper, left[:1]]) * [width, height]
    xs, ys = transform * (corners[:, 0], corners[:, 1])
    try:
        lon, lat = transform_points(crs, CRS.from_epsg(4326), xs, ys)
    except CRSError as error:
        raise BadSource(f"{where}: its CRS cannot be turned into longitude and latitude ({_line(error)})") from None
    except CPLE_BaseError:  # GDAL's word for places that the CRS has not, where PROJ does not say infinity
        raise BadSource(f"{where}: parts of it lie outside its CRS; check its georeference") from None
    ring = np.stack([lon, lat], axis=1)
    if not np.isfinite(ring).all():
        raise BadSource(f"{where}: parts of it lie outside its CRS; check its georeference")
    if np.ptp(ring[:, 0]) > 180:  # across the antimeridian: longitudes go on beyond 180
        ring[:, 0] += np.where(ring[:, 0] < 0, 360, 0)
    return ring


def _wkb(ring: npt.NDArray[np.float64]) -> bytes:
    """A polygon of one ring as little-endian WKB."""
    head = b"\x01" + (3).to_bytes(4, "little") + (1).to_bytes(4, "little") + len(ring).to_bytes(4, "little")
    return head + ring.astype("<f8").tobytes()


def _bounds(ring: npt.NDArray[np.float64]) -> dict[str, float]:
    (xmin, ymin), (xmax, ymax) = ring.min(axis=0).tolist(), ring.max(axis=0).tolist()
    return {"xmin": xmin, "ymin": ymin, "xmax": xmax, "ymax": ymax}


@functools.lru_cache(maxsize=64)
def crs_name(crs: CRS) -> str:
    """`EPSG:` and its code, else WKT."""
    code = crs.to_epsg()
    return f"EPSG:{code}" if code else str(crs.to_wkt())


def _line(error: Exception) -> str:
    return str(error).strip().split("\n", 1)[0]

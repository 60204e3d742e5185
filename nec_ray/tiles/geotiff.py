"""Tiles as windows of GeoTIFFs (COGs too): footprints, CRS, share of missing pixels."""

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from typing import Any

import numpy as np
import numpy.typing as npt
import rasterio
from rasterio.crs import CRS
from rasterio.errors import CRSError, NotGeoreferencedWarning, RasterioError
from rasterio.warp import transform as transform_points
from rasterio.windows import Window

from nec_ray.errors import BadSource
from nec_ray.storage import Store

# A filter for the process: one for the length of a read would not be safe between threads.
warnings.filterwarnings("ignore", category=NotGeoreferencedWarning)

_EDGE_POINTS = 4
"""Points a side from which the bounds are taken: straight edges in one CRS are curves in another."""


def windows(
    store: Store,
    name: str,
    tile_id_prefix: str,
    *,
    tile_size: int,
    bands: Sequence[str] | None,
    nodata: float | None,
    acquired_at: datetime | None,
    sensor: str | None,
) -> list[dict[str, Any]]:
    """Catalog rows of all windows of one GeoTIFF.

    Windows of `tile_size` pixels a side cover the whole image without overlap; those at the right and lower
    edge are as small as what is left there.

    Raises:
        BadSource: the file cannot be read as an image, or `bands` are not as many as it has.
    """
    where = f"{store.url}/{name}"
    try:
        with open_image(store, name) as image:
            return list(
                _rows(image, where, tile_id_prefix, store.etag(name), tile_size, bands, nodata, acquired_at, sensor)
            )
    except RasterioError as error:
        raise BadSource(f"{where}: cannot be read as an image ({_line(error)})") from None


@contextmanager
def open_image(store: Store, name: str) -> Iterator[Any]:
    """The image as a rasterio data set; local files by path, others through the store."""
    # One driver, by name: others (VRT) are text that can make GDAL read any file of the machine.
    if store.is_local:
        with rasterio.open(store.path(name), driver="GTiff") as image:
            yield image
    else:
        with store.open(name) as file, rasterio.open(file, driver="GTiff") as image:
            yield image


def band_names(image: Any) -> list[str]:
    """Names from the descriptions, else from the colours, else by number."""
    if all(image.descriptions):
        return [str(name) for name in image.descriptions]
    colours = [colour.name for colour in image.colorinterp]
    if colours[:3] == ["red", "green", "blue"]:
        return [c if i < 3 else f"band_{i + 1}" for i, c in enumerate(colours)]
    return [f"band_{i + 1}" for i in range(image.count)]


def missing_pixels(pixels: npt.NDArray[Any], nodata: float | None) -> npt.NDArray[np.bool_]:
    """(bands, rows, columns): which values are missing."""
    if nodata is None:
        return np.zeros(pixels.shape, bool)
    if np.isnan(nodata):
        return np.isnan(pixels) if pixels.dtype.kind == "f" else np.zeros(pixels.shape, bool)
    return pixels == nodata


def _rows(
    image: Any,
    where: str,
    prefix: str,
    etag: str,
    size: int,
    bands: Sequence[str] | None,
    nodata: float | None,
    acquired_at: datetime | None,
    sensor: str | None,
) -> Iterator[dict[str, Any]]:
    names = list(bands) if bands else band_names(image)
    if len(names) != image.count:
        raise BadSource(f"{where}: has {image.count} bands, {len(names)} names are given ({', '.join(names)})")
    if len(set(image.dtypes)) > 1:
        raise BadSource(f"{where}: its bands are of several types ({', '.join(image.dtypes)}); convert it to one")
    marker = image.nodata if nodata is None else nodata
    crs = _crs_name(image.crs)
    for y in range(0, image.height, size):
        height = min(size, image.height - y)
        missing = _missing(image, Window(0, y, image.width, height), marker)
        for x in range(0, image.width, size):
            width = min(size, image.width - x)
            window = Window(x, y, width, height)
            transform = image.window_transform(window)
            ring = _footprint(image.crs, transform, width, height, where) if image.crs else None
            yield {
                "tile_id": f"{prefix}/y{y:05}_x{x:05}",
                "source": where,
                "source_etag": etag,
                "x_off": x,
                "y_off": y,
                "width": width,
                "height": height,
                "bands": names,
                "dtype": image.dtypes[0],
                "nodata": marker,
                "nodata_share": None if missing is None else float(missing[:, x : x + width].mean()),
                "acquired_at": acquired_at or _time_of(image),
                "sensor": sensor or image.tags(ns="IMAGERY").get("SATELLITEID"),
                "geometry": None if ring is None else _wkb(ring[::_EDGE_POINTS]),
                "bbox": None if ring is None else _bounds(ring),
                "crs": crs if image.crs else None,
                "transform": list(transform)[:6] if image.crs else None,
                "label": None,
            }


def _missing(image: Any, window: Window, marker: float | None) -> npt.NDArray[np.bool_] | None:
    """(rows, columns): pixels missing in every band; None where the file is damaged there, which encoding records."""
    try:
        return np.asarray(missing_pixels(image.read(window=window), marker).all(axis=0))
    except RasterioError:
        return None


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
    ring = np.stack([lon, lat], axis=1)
    if np.ptp(ring[:, 0]) > 180:  # across the antimeridian: longitudes go on beyond 180
        ring[:, 0] += np.where(ring[:, 0] < 0, 360, 0)
    if not np.isfinite(ring).all():
        raise BadSource(f"{where}: parts of it lie outside its CRS; check its georeference")
    return ring


def _wkb(ring: npt.NDArray[np.float64]) -> bytes:
    """A polygon of one ring as little-endian WKB."""
    head = b"\x01" + (3).to_bytes(4, "little") + (1).to_bytes(4, "little") + len(ring).to_bytes(4, "little")
    return head + ring.astype("<f8").tobytes()


def _bounds(ring: npt.NDArray[np.float64]) -> dict[str, float]:
    (xmin, ymin), (xmax, ymax) = ring.min(axis=0).tolist(), ring.max(axis=0).tolist()
    return {"xmin": xmin, "ymin": ymin, "xmax": xmax, "ymax": ymax}


def _crs_name(crs: CRS | None) -> str | None:
    if not crs:
        return None
    code = crs.to_epsg()
    return f"EPSG:{code}" if code else str(crs.to_wkt())


def _time_of(image: Any) -> datetime | None:
    """Time of acquisition (UTC) from GDAL's IMAGERY metadata; TIFF's own DATETIME is when the file was made."""
    try:
        return datetime.fromisoformat(image.tags(ns="IMAGERY")["ACQUISITIONDATETIME"]).replace(tzinfo=UTC)
    except (KeyError, ValueError):
        return None


def _line(error: Exception) -> str:
    return str(error).strip().split("\n", 1)[0]

"""Tiles as windows of GeoTIFFs (COGs too): footprints, CRS, share of missing pixels."""

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from typing import Any

import numpy as np
import numpy.typing as npt
import rasterio
from rasterio.errors import NotGeoreferencedWarning, RasterioError
from rasterio.windows import Window

from nec_ray.errors import BadSource
from nec_ray.storage import Store
from nec_ray.tiles.place import place_of
from nec_ray.tiles.rows import window_id

# A filter for the process: one for the length of a read would not be safe between threads.
warnings.filterwarnings("ignore", category=NotGeoreferencedWarning)


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
    edge are as small as what is left there. An image of one window without a georeference has its folder as label.

    Raises:
        BadSource: the file cannot be read as an image, or `bands` are not as many as it has.
    """
    where = f"{store.url}/{name}"
    try:
        with open_image(store, name) as image:
            rows = list(
                _rows(image, where, tile_id_prefix, store.etag(name), tile_size, bands, nodata, acquired_at, sensor)
            )
            if len(rows) == 1 and image.crs is None:  # a picture of a class folder, such as UCMerced's
                rows[0]["label"] = name.rpartition("/")[0] or None
            return rows
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
    for y in range(0, image.height, size):
        height = min(size, image.height - y)
        missing = _missing(image, Window(0, y, image.width, height), marker)
        for x in range(0, image.width, size):
            width = min(size, image.width - x)
            window = Window(x, y, width, height)
            transform = image.window_transform(window)
            place = place_of(image.crs, transform, width, height, where)
            yield {
                "tile_id": window_id(prefix, y, x),
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
                "label": None,
                **place,
            }


def _missing(image: Any, window: Window, marker: float | None) -> npt.NDArray[np.bool_] | None:
    """(rows, columns): pixels missing in every band; None where the file is damaged there, which encoding records."""
    try:
        return np.asarray(missing_pixels(image.read(window=window), marker).all(axis=0))
    except RasterioError:
        return None


def _time_of(image: Any) -> datetime | None:
    """Time of acquisition (UTC) from GDAL's IMAGERY metadata; TIFF's own DATETIME is when the file was made."""
    try:
        return datetime.fromisoformat(image.tags(ns="IMAGERY")["ACQUISITIONDATETIME"]).replace(tzinfo=UTC)
    except (KeyError, ValueError):
        return None


def _line(error: Exception) -> str:
    return str(error).strip().split("\n", 1)[0]

"""Tiles whose bands lie in GeoTIFFs of their own, with pixels of different sizes and units.

The bands come onto one grid, that of the finest of them, by nearest neighbour: a pixel takes the value of the coarser
pixel that its centre lies in. So no value is invented, no missing pixel spreads, and a tile's pixels do not depend on
where its window ends.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np
import numpy.typing as npt
from rasterio.transform import Affine
from rasterio.windows import Window

from nec_ray.errors import BadSource
from nec_ray.storage import Store
from nec_ray.tiles.geotiff import missing_pixels, open_image
from nec_ray.tiles.place import crs_name

Pixels = npt.NDArray[Any]
_MOST_PIXELS = 1 << 26
"""Of a tile; a catalog from outside must not make a reader take all memory."""
_TIE = 1e-6
"""Of a pixel: a centre on the border of two pixels takes the next one, however its place was rounded."""


@contextmanager
def open_assets(assets: Sequence[Mapping[str, Any]]) -> Iterator[Callable[[dict[str, Any]], Pixels]]:
    """A function that reads the windows of catalog rows with these `assets`.

    It gives (bands, height, width), numbers as the files hold them; for values see `in_units`.

    Raises:
        BadSource: (reading) a file is not what the row says about it.
        NotFound, StorageError, RasterioError: a file is not there or does not read.
    """
    with ExitStack() as stack:
        images = {}
        for href in dict.fromkeys(str(asset["href"]) for asset in assets):
            folder, _, name = href.rpartition("/")
            images[href] = stack.enter_context(open_image(Store(folder or "/"), name))

        def read(row: dict[str, Any]) -> Pixels:
            return np.stack([_on_grid(images[asset["href"]], asset, row) for asset in assets])

        yield read


def in_units(pixels: Pixels, assets: Sequence[Mapping[str, Any]]) -> npt.NDArray[np.float32]:
    """`scale * DN + offset` of each band; missing pixels are NaN.

    Args:
        pixels: (bands, height, width), as the files hold them.
        assets: one a band.
    """
    values = np.empty(pixels.shape, np.float32)
    for value, band, asset in zip(values, pixels, assets, strict=True):
        value[:] = band.astype(np.float64) * asset["scale"] + asset["offset"]
        value[missing_pixels(band, asset["nodata"])] = math.nan
    return values


def check_grid(image: Any, transform: Affine, width: int, height: int, where: str) -> None:
    """Check that a file has a pixel for each of a grid's.

    Raises:
        BadSource: it is turned, or does not cover the grid.
    """
    _lines(image, transform, width, height, where)


def _on_grid(image: Any, asset: Mapping[str, Any], row: Mapping[str, Any]) -> Pixels:
    """(height, width) pixels of a band on the grid of a row."""
    where = str(asset["href"])
    if not 1 <= asset["band"] <= image.count:
        raise BadSource(f"{where}: has {image.count} bands, its catalog names number {asset['band']}")
    if image.crs is None or crs_name(image.crs) != row["crs"]:
        raise BadSource(f"{where}: has another CRS than its catalog says")
    if row["width"] * row["height"] > _MOST_PIXELS:
        raise BadSource(f"{where}: a tile of {row['width']} x {row['height']} pixels is too large; cut smaller ones")
    rows, columns = _lines(image, Affine(*row["transform"]), row["width"], row["height"], where)
    window = Window(columns[0], rows[0], columns[-1] - columns[0] + 1, rows[-1] - rows[0] + 1)
    if window.width * window.height > _MOST_PIXELS:
        raise BadSource(f"{where}: {window.width} x {window.height} pixels for one tile; cut smaller ones")
    pixels: Pixels = image.read(asset["band"], window=window)
    return pixels[np.ix_(rows - rows[0], columns - columns[0])]


def _lines(
    image: Any, transform: Affine, width: int, height: int, where: str
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Rows and columns of a file in which the centres of a grid's rows and columns lie."""
    own = image.transform
    if own.b or own.d or transform.b or transform.d or not (own.a > 0 > own.e and transform.a > 0 > transform.e):
        raise BadSource(f"{where}: its pixels are turned, not north up; warp it first")
    columns = (transform.c + transform.a * (np.arange(width) + 0.5) - own.c) / own.a
    rows = (transform.f + transform.e * (np.arange(height) + 0.5) - own.f) / own.e
    found = []
    for places, length in ((rows, image.height), (columns, image.width)):
        # Products whose bands differ in resolution may end half a coarse pixel apart, as Landsat's pan band does.
        if not (places.min() >= -0.5 and places.max() < length + 0.5):
            raise BadSource(f"{where}: does not cover the tile's grid; its bands must show the same place")
        found.append(np.clip(np.floor(places + _TIE).astype(np.int64), 0, length - 1))
    return found[0], found[1]

"""Class maps of tiles, written as one GeoTIFF or as a folder of PNGs; memory holds a few tiles at a time."""

import json
import secrets
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from nec_ray.errors import InputError
from nec_ray.evaluate.class_list import Colour
from nec_ray.evaluate.mask_pictures import palette
from nec_ray.models.segmentation import IGNORED, UPSAMPLING

MOSAIC_ROWS = ("tile_id", "crs", "transform", "grid")
"""Columns of the index that `plan_mosaic` needs."""

_LARGEST_SIDE = 2**31 - 1
_LARGEST_AREA = 2**36  # pixels: a block index of some megabytes
_BLOCK = 256
_TOLERANCE = 0.01  # of a pixel
ClassMap = npt.NDArray[np.uint8]


@dataclass(frozen=True)
class Mosaic:
    """Where tiles lie in one north-up image."""

    crs: str
    left: float
    top: float
    pixel: tuple[float, float]
    """Width and height of a pixel in the CRS."""
    width: int
    height: int
    edges: npt.NDArray[np.float64]
    """(tiles, 4): left, upper, right and lower edge of each tile, in pixels of the mosaic."""

    def order(self) -> npt.NDArray[np.int64]:
        """Tiles row by row, so that blocks of the image are finished one after the other."""
        return np.lexsort((self.edges[:, 0], np.rint(self.edges[:, 1])))


def plan_mosaic(where: str, rows: pa.Table) -> Mosaic:
    """The image that holds all tiles: `UPSAMPLING` pixels a side of the largest tiles' tokens.

    Args:
        where: the archive, for errors.
        rows: `MOSAIC_ROWS` of the tiles.

    Raises:
        InputError: tiles without a georeference, of several CRSs, turned, or not on one grid.
    """
    remedy = "write a folder of PNGs instead (--out DIR), or pick tiles with --where"
    missing = sum(
        a is None or b is None for a, b in zip(*(rows[n].to_pylist() for n in ("crs", "transform")), strict=True)
    )
    if missing:
        raise InputError(
            f"{where}: {missing:,} of {rows.num_rows:,} tiles have no georeference for a GeoTIFF; {remedy}"
        )
    systems = rows["crs"].unique().to_pylist()
    if len(systems) > 1:
        named = ", ".join(name[:40] for name in sorted(systems)[:3])
        raise InputError(f"{where}: tiles lie in {len(systems)} CRSs ({named}), a GeoTIFF has one; {remedy}")
    a, b, c, d, e, f = np.array(rows["transform"].to_pylist(), np.float64).T
    if not (np.isfinite([a, c, e, f]).all() and (a > 0).all() and (e < 0).all()) or b.any() or d.any():
        raise InputError(f"{where}: tiles are turned or mirrored in their CRS, the mosaic is north-up; {remedy}")
    grid = np.array([(g["rows"], g["cols"]) for g in rows["grid"].to_pylist()])
    # Windows at a scene's edge are smaller, and have smaller tokens; all others are of one size.
    width, height = a.max() / UPSAMPLING, -e.min() / UPSAMPLING
    left, top = c.min(), f.max()
    x, y = (c - left) / width, (top - f) / height
    edges = np.stack([x, y, x + a * grid[:, 1] / width, y - e * grid[:, 0] / height], axis=1)
    off = np.abs(np.stack([x, y]) - np.rint([x, y])).max(axis=0)
    apart = np.flatnonzero(off > _TOLERANCE)
    if len(apart):
        name = rows["tile_id"][int(apart[0])].as_py()
        raise InputError(f"{where}: {len(apart):,} tiles do not lie on the others' grid, such as {name}; {remedy}")
    right, bottom = np.ceil(edges[:, 2:].max(axis=0) - _TOLERANCE)
    if max(right, bottom) > _LARGEST_SIDE or right * bottom > _LARGEST_AREA:
        raise InputError(f"{where}: a mosaic of {right:,.0f} x {bottom:,.0f} pixels is too large; {remedy}")
    size = max(1, int(right)), max(1, int(bottom))
    return Mosaic(str(systems[0]), float(left), float(top), (float(width), float(height)), *size, edges)


@contextmanager
def written_mosaic(
    out: Path, mosaic: Mosaic, classes: Sequence[str], colours: Sequence[Colour]
) -> Iterator["MosaicWriter"]:
    """A GeoTIFF to put tiles into; it is there, whole, when the block ends without an error.

    uint8 class numbers with a colour table and their names in the tag CLASSES; 255 (nodata) where no tile lies.

    Raises:
        InputError: the CRS is none that GDAL knows.
    """
    import rasterio
    from affine import Affine
    from rasterio.crs import CRS
    from rasterio.errors import CRSError

    try:
        crs = CRS.from_user_input(mosaic.crs)
    except CRSError as error:
        line = " ".join(str(error).split())[:160]
        raise InputError(f"{mosaic.crs[:80]}: GDAL does not know this CRS ({line}); write a folder of PNGs") from None
    out.parent.mkdir(parents=True, exist_ok=True)
    part = out.with_name(f".{out.name}.{secrets.token_hex(4)}.tif")
    try:
        with rasterio.open(
            part,
            "w",
            driver="GTiff",
            width=mosaic.width,
            height=mosaic.height,
            count=1,
            dtype="uint8",
            nodata=IGNORED,
            crs=crs,
            transform=Affine(mosaic.pixel[0], 0, mosaic.left, 0, -mosaic.pixel[1], mosaic.top),
            tiled=True,
            blockxsize=_BLOCK,
            blockysize=_BLOCK,
            compress="deflate",
            sparse_ok=True,  # blocks without a tile take no bytes
            bigtiff="if_safer",
        ) as image:
            table = palette(colours)
            opacity = [255 if number < len(classes) else 0 for number in range(256)]
            image.write_colormap(1, {i: (*table[i].tolist(), opacity[i]) for i in range(256)})
            image.update_tags(CLASSES=json.dumps(list(classes), ensure_ascii=False))
            image.set_band_description(1, "class")
            yield MosaicWriter(image, mosaic)
        part.replace(out)
    finally:
        with suppress(FileNotFoundError):
            part.unlink()


class MosaicWriter:
    """Puts class maps into the GeoTIFF of `written_mosaic`."""

    def __init__(self, image: Any, mosaic: Mosaic) -> None:
        self._image = image
        self._mosaic = mosaic

    def put(self, tile: int, classes: ClassMap) -> None:
        """Write a tile's class map uint8 (rows, columns); each pixel of the mosaic takes what lies at its centre."""
        from rasterio.windows import Window

        left, top, right, bottom = self._mosaic.edges[tile]
        col, from_x = _pixels(left, right, classes.shape[1], self._mosaic.width)
        row, from_y = _pixels(top, bottom, classes.shape[0], self._mosaic.height)
        if len(from_x) and len(from_y):
            window = Window(col, row, len(from_x), len(from_y))
            self._image.write(classes[from_y[:, None], from_x], 1, window=window)


def _pixels(start: float, end: float, size: int, most: int) -> tuple[int, npt.NDArray[np.int64]]:
    """The first of the mosaic's pixels whose centre lies between two places, and where in the tile each one lies."""
    first, after = max(0, round(start)), min(most, int(np.ceil(end - 0.5 - _TOLERANCE)))
    centres = np.arange(first, max(first, after)) + 0.5
    place = np.floor((centres - start) / (end - start) * size).astype(np.int64)
    return first, place.clip(0, size - 1)


def write_png(out: Path, classes: ClassMap, colours: Sequence[Colour]) -> None:
    """Write a class map uint8 (rows, columns) as a PNG of class numbers with a palette."""
    from PIL import Image

    image = Image.fromarray(classes, mode="P")
    image.putpalette(palette(colours).ravel().tolist())
    part = out.with_name(f".{out.name}.part")
    image.save(part, format="PNG")
    part.replace(out)

"""Reads the pixels of tiles; a tile that cannot be read becomes a status and a reason, never an exception."""

import io
import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from nec_ray.errors import NecError
from nec_ray.storage import Store
from nec_ray.tiles.reader import numbered
from nec_ray.tiles.reader import window as window_in
from nec_ray.tiles.readers import reader_of
from nec_ray.tiles.resize import resize
from nec_ray.tiles.rows import is_hdf5, is_sample, is_stack, stack_number, window_of

Pixels = npt.NDArray[Any]


@dataclass(frozen=True)
class TileBatch:
    """Pixels of some tiles, and what became of the others."""

    pixels: npt.NDArray[np.float32]
    """(valid tiles, bands, size, size), in the source's units; missing pixels are filled."""
    valid: npt.NDArray[np.int64]
    """Rows that `pixels` holds, in order."""
    status: list[str]
    """valid, nodata or failed, one a row."""
    reason: list[str | None]
    """Why a tile is not valid, one a row."""
    nodata_share: npt.NDArray[np.float32]
    """(rows,) share of the pixels that are missing in every band that was asked for; NaN where a tile failed."""


@dataclass(frozen=True)
class NativeTile:
    """Pixels of one tile as large as the source has them, or what became of it."""

    pixels: npt.NDArray[np.float32] | None
    """(bands, height, width), in the source's units, missing pixels filled; None for a tile that is not valid."""
    status: str
    """valid, nodata or failed."""
    reason: str | None
    """Why it is not valid."""
    nodata_share: float
    """Share of the pixels that are missing in every band that was asked for; NaN where the tile failed."""


class _TileError(Exception):
    """Why one tile cannot be read."""


def read_tiles(rows: pa.Table, *, bands: Sequence[str], size: int, fill: Sequence[float]) -> TileBatch:
    """Read tiles and resize them.

    Args:
        rows: catalog rows.
        bands: bands to read, by name, in this order.
        size: pixels a side of the result.
        fill: what stands for missing pixels, one value a band.
    """
    status: list[str] = []
    reason: list[str | None] = []
    share, pixels, valid = [], [], []
    for i, tile in enumerate(read_native(rows, bands=bands, fill=fill)):
        status.append(tile.status)
        reason.append(tile.reason)
        share.append(tile.nodata_share)
        if tile.pixels is not None:
            valid.append(i)
            pixels.append(resize(tile.pixels, size, size))
    stacked = np.stack(pixels) if pixels else np.empty((0, len(bands), size, size), np.float32)
    return TileBatch(stacked, np.array(valid, np.int64), status, reason, np.array(share, np.float32))


def read_native(rows: pa.Table, *, bands: Sequence[str], fill: Sequence[float]) -> Iterator[NativeTile]:
    """Read tiles, one after the other, at the size that they have.

    Args:
        rows: catalog rows.
        bands: bands to read, by name, in this order.
        fill: what stands for missing pixels, one value a band.
    """
    for row, result in _each(rows, bands):
        try:
            if isinstance(result, _TileError):
                raise result
            chosen = _pick(_values(result, row), row["bands"], bands)
            whole, share = _fill(chosen, row["nodata"], fill)
        except _TileError as error:
            yield NativeTile(None, "failed", str(error), math.nan)
            continue
        if share == 1:
            yield NativeTile(None, "nodata", "all pixels are no-data", share)
        else:
            yield NativeTile(whole, "valid", None, share)


def read_pixels(rows: pa.Table) -> Iterator[Pixels]:
    """Pixels (bands, height, width) of each tile as the source holds them; tiles that cannot be read are left out."""
    for _, result in _each(rows):
        if not isinstance(result, _TileError):
            yield result


def _each(rows: pa.Table, wanted: Sequence[str] | None = None) -> Iterator[tuple[dict[str, Any], Pixels | _TileError]]:
    """Every row with its pixels; consecutive tiles of one file share it open, or what was decoded of it.

    Args:
        rows: of a catalog.
        wanted: bands that are needed; others that lie in files of their own are left out of the row and its pixels.
    """
    file, read = None, None
    with ExitStack() as stack:
        for row in rows.select(_NEEDED + (_OF_ASSETS if "assets" in rows.column_names else [])).to_pylist():
            try:
                source = numbered(row["source"])[0] if is_stack(row["source"]) else row["source"]
                assets = _needed_assets(row, wanted)
                if read is None or file != (source, row["bands"], assets):
                    stack.close()
                    file, read = (source, row["bands"], assets), None
                    read = stack.enter_context(_opened(source, row["bands"], assets))
                yield row, read(row)
            except _TileError as error:
                yield row, error
            except Exception as error:
                yield row, _TileError(_line(error))


_NEEDED = ["tile_id", "source", "x_off", "y_off", "width", "height", "bands", "dtype", "nodata"]
_OF_ASSETS = ["assets", "crs", "transform"]
_Read = Callable[[dict[str, Any]], Pixels]
_Assets = list[dict[str, Any]]


def _needed_assets(row: dict[str, Any], wanted: Sequence[str] | None) -> _Assets | None:
    """The assets of a row, one a band; the row keeps only the bands that are wanted and those assets."""
    assets: _Assets | None = row.get("assets")
    if assets is None:
        return None
    if not assets:
        raise _TileError("its STAC item could not be read; build the catalog of that item alone to see why")
    if len(assets) != len(row["bands"]) or any(one is None or None in _said(one) for one in assets):
        raise _TileError(f"its catalog names no file for each of its {len(row['bands'])} bands")
    if wanted is not None:
        _check_bands(row["bands"], wanted)
    kept = [i for i, band in enumerate(row["bands"]) if wanted is None or band in wanted]
    row["bands"], row["assets"] = ([row[name][i] for i in kept] for name in ("bands", "assets"))
    return list(row["assets"])


def _said(asset: dict[str, Any]) -> list[Any]:
    return [asset[name] for name in ("href", "band", "scale", "offset")]


def _values(pixels: Pixels, row: dict[str, Any]) -> Pixels:
    """Pixels in the tile's units, of what its files hold."""
    if row.get("assets") is None:
        return pixels
    from nec_ray.tiles.assets import in_units

    return in_units(pixels, row["assets"])


@contextmanager
def _opened(source: str, bands: Sequence[str], assets: _Assets | None) -> Iterator[_Read]:
    """A function that reads the rows of one file, or of the files of one item."""
    folder, _, name = source.rpartition("/")
    if assets is not None:
        from nec_ray.tiles.assets import open_assets

        with open_assets(assets) as read_assets:
            yield read_assets
    elif reader := reader_of(source):
        with reader.opened(source, bands) as read_row:
            yield read_row
    elif is_sample(source, bands):
        from nec_ray.tiles.geobench_rows import sample_window

        with sample_window(Store(folder or "/"), name, bands) as window:
            yield lambda row: window(*window_in(row))
    elif is_hdf5(source):
        from nec_ray.tiles.mmearth import sentinel2

        with sentinel2(Store(folder or "/"), name, bands) as window:
            yield lambda row: window(stack_number(row["source"]), *window_in(row))
    elif source.lower().endswith((".tif", ".tiff")):
        from nec_ray.tiles.geotiff import open_image

        with open_image(Store(folder or "/"), name) as tiff:
            yield lambda row: _read_window(tiff, row)
    else:
        decoded: list[Pixels] = []

        def read(row: dict[str, Any]) -> Pixels:
            if not decoded:
                decoded.append(_read_image(Store(folder or "/"), name))
            return _crop(decoded[0], row)

        yield read


def _read_window(image: Any, row: dict[str, Any]) -> Pixels:
    from rasterio.windows import Window

    x, y, width, height = row["x_off"], row["y_off"], row["width"], row["height"]
    if image.count != len(row["bands"]):
        raise _TileError(f"the file has {image.count} bands, its catalog says {len(row['bands'])}")
    if x + width > image.width or y + height > image.height:
        raise _TileError(f"its window ends outside the file of {image.width} x {image.height} pixels")
    pixels: Pixels = image.read(window=Window(x, y, width, height))
    return pixels


def _read_image(store: Store, name: str) -> Pixels:
    from PIL import Image

    data = store.read(name)
    with warnings.catch_warnings():
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        with _image(data) as image:
            plain = image if image.mode in {"RGB", "L", "I;16"} else image.convert("RGB")
            pixels: Pixels = np.asarray(plain)
    return pixels[None] if pixels.ndim == 2 else pixels.transpose(2, 0, 1)


def _crop(image: Pixels, row: dict[str, Any]) -> Pixels:
    x, y, width, height = row["x_off"], row["y_off"], row["width"], row["height"]
    bands, *size = image.shape
    if size != [height, width] and window_of(row["tile_id"]) is None:
        raise _TileError(f"the file has {_by(size)} pixels, its catalog says {_by([height, width])}")
    if bands != len(row["bands"]):
        raise _TileError(f"the file has {bands} bands, its catalog says {len(row['bands'])}")
    if x + width > size[1] or y + height > size[0]:
        raise _TileError(f"its window ends outside the file of {_by(size)} pixels")
    return image[:, y : y + height, x : x + width]


def _check_bands(names: Sequence[str], wanted: Sequence[str]) -> None:
    missing = [band for band in wanted if band not in names]
    if missing:
        raise _TileError(f"it has no band {', '.join(missing)}")


def _pick(pixels: Pixels, names: Sequence[str], wanted: Sequence[str]) -> Pixels:
    _check_bands(names, wanted)
    return pixels[[list(names).index(band) for band in wanted]]


def _fill(pixels: Pixels, nodata: float | None, fill: Sequence[float]) -> tuple[npt.NDArray[np.float32], float]:
    """Pixels as float32 with missing ones filled, and the share missing in every band."""
    missing = np.isnan(pixels) if nodata is not None and np.isnan(nodata) else pixels == nodata
    missing = np.broadcast_to(missing, pixels.shape)
    values = pixels.astype(np.float32)
    bad = ~np.isfinite(values) & ~missing
    if bad.any():
        raise _TileError(f"{int(bad.sum())} values are NaN or infinite, and its no-data value is {nodata}")
    if missing.any():
        values = np.where(missing, np.asarray(fill, np.float32)[:, None, None], values)
    return values, float(missing.all(axis=0).mean())


def _image(data: bytes) -> Any:
    from PIL import Image, UnidentifiedImageError

    try:
        return Image.open(io.BytesIO(data), formats=("JPEG", "PNG"))
    except UnidentifiedImageError:
        raise _TileError("cannot be read: no JPEG or PNG") from None


def _by(size: Sequence[int]) -> str:
    height, width = size
    return f"{width} x {height}"


def _line(error: Exception) -> str:
    first = str(error).strip().split("\n", 1)[0] or type(error).__name__
    return first if isinstance(error, NecError) else f"cannot be read: {first}"

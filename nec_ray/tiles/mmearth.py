"""MMEarth's HDF5 files as tiles (MMEarth, section 3; `convert_to_h5.py` of vishalned/MMEarth-data).

A tile's pixels are its sample's Sentinel-2 image; `read_modalities` reads all that its sample has.
"""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
from rasterio._err import CPLE_BaseError
from rasterio.crs import CRS
from rasterio.errors import CRSError
from rasterio.transform import Affine
from rasterio.warp import transform as transform_points

from nec_ray.errors import BadSource, NecError
from nec_ray.storage import Store
from nec_ray.tiles.mmearth_reader import MMEarthFile, open_mmearth
from nec_ray.tiles.modalities import MODALITIES, SENTINEL2_BANDS
from nec_ray.tiles.place import NOWHERE, place_of
from nec_ray.tiles.reader import numbered
from nec_ray.tiles.rows import is_hdf5, stack_number

EXTRA_COLUMNS = ("s2_type", "split", "biome", "eco_region")
"""Texts that a catalog of MMEarth has beside the usual columns; biome and eco_region are class numbers."""
_PIXEL_M = 10


def mmearth_rows(store: Store, name: str) -> Iterator[dict[str, Any]]:
    """Catalog rows of the samples of a file, with `EXTRA_COLUMNS` beside the usual.

    A tile's footprint is that of its size around its centre, in the sample's UTM zone.

    Raises:
        BadSource: no MMEarth file, or a JSON file beside it does not read.
    """
    where = f"{store.url}/{name}"
    stem = name.rpartition(".")[0]
    etag = store.etag(name)
    with open_mmearth(store, name) as file:
        info, splits = file.tile_info, file.splits
        height, width = file.height, file.width
        named = list(zip(file.tile_ids, file.s2_types, strict=True))
    split_of = {number: split for split, numbers in splits.items() for number in numbers}
    for number, (tile_id, s2_type) in enumerate(named):
        about = info.get(tile_id, {})
        yield {
            "tile_id": f"{stem}/{tile_id}",
            "source": f"{where}#{number}",
            "source_etag": etag,
            "x_off": 0,
            "y_off": 0,
            "width": width,
            "height": height,
            "bands": list(SENTINEL2_BANDS),
            "dtype": "uint16",
            "nodata": 0.0,
            "nodata_share": None,
            "acquired_at": _date(about.get("S2_DATE")),
            "sensor": "Sentinel-2",
            "label": None,
            "s2_type": s2_type,
            "split": split_of.get(number),
            **{key: None if about.get(key) is None else str(about[key]) for key in ("biome", "eco_region")},
            **_place(about, height, width, f"{where}#{number}"),
        }


@contextmanager
def sentinel2(store: Store, name: str, bands: Sequence[str]) -> Iterator[Any]:
    """A function (sample, rows, columns) that reads a window of Sentinel-2 as (13, height, width) uint16.

    Raises:
        BadSource: no MMEarth file, or it has other bands.
    """
    if tuple(bands) != SENTINEL2_BANDS:
        said = ", ".join(bands)
        raise BadSource(f"{store.url}/{name}: has the bands {', '.join(SENTINEL2_BANDS)}, its catalog says {said}")
    with open_mmearth(store, name) as file:

        def window(number: int, rows: range, columns: range) -> npt.NDArray[np.uint16]:
            _check_window(file, number, rows, columns)
            pixels = file.raw("sentinel2", number, (slice(rows.start, rows.stop), slice(columns.start, columns.stop)))
            return np.asarray(pixels, np.uint16)

        yield window


@dataclass(frozen=True)
class ModalityBatch:
    """Modalities of some tiles, and what became of the others."""

    values: dict[str, npt.NDArray[Any]]
    """(valid tiles, ...) of each modality: float32 with NaN, or int64 with -1, where a value is missing. Empty where no
    tile is valid."""
    valid: npt.NDArray[np.int64]
    """Rows that `values` holds, in order."""
    reason: list[str | None]
    """Why a tile is not valid, one a row."""


def read_modalities(
    rows: pa.Table, names: Sequence[str] = tuple(MODALITIES), *, standardised: bool = False
) -> ModalityBatch:
    """All that MMEarth has of some tiles, windows and all; a tile that cannot be read gets a reason, no exception.

    Args:
        rows: of a catalog of MMEarth; windows of one size, that of the first that can be read.
        names: modalities, of `modalities.MODALITIES` or `QUALITY`.
        standardised: by the file's band statistics, see `MMEarthFile.read`.
    """
    values: dict[str, list[npt.NDArray[Any]]] = {name: [] for name in names}
    reason: list[str | None] = [None] * rows.num_rows
    valid, size, opened = [], None, ""
    with ExitStack() as stack:
        for i, row in enumerate(rows.select(_NEEDED).to_pylist()):
            try:
                source = numbered(row["source"])[0]
                if not is_hdf5(source):
                    raise BadSource(f"{source}: no MMEarth file, it has no modalities")
                if source != opened:  # the one before is closed: files lie in order in a catalog
                    stack.close()
                    opened, (folder, _, name) = "", source.rpartition("/")
                    file = stack.enter_context(open_mmearth(Store(folder or "/"), name))
                    opened = source
                number = stack_number(row["source"])
                y, x, height, width = (row[column] for column in ("y_off", "x_off", "height", "width"))
                _check_window(file, number, range(y, y + height), range(x, x + width))
                if size not in (None, (height, width)):
                    raise BadSource(f"{width} x {height} pixels, the tiles before have {size[1]} x {size[0]}")
                window = {"rows": slice(y, y + height), "columns": slice(x, x + width)}
                read = file.read([number], names, standardised=standardised, **window)
            except NecError as error:
                reason[i] = str(error)
                continue
            size = (height, width)
            valid.append(i)
            for name, value in read.items():
                values[name].append(value)
    return ModalityBatch(
        {name: np.concatenate(parts) for name, parts in values.items() if parts}, np.array(valid, np.int64), reason
    )


_NEEDED = ["source", "x_off", "y_off", "width", "height"]


def _check_window(file: MMEarthFile, number: int, rows: range, columns: range) -> None:
    if number >= file.count or rows.stop > file.height or columns.stop > file.width:
        said = f"{file.count} samples of {file.width} x {file.height} pixels"
        raise BadSource(f"its window ends outside the file of {said}")


def _place(about: dict[str, Any], height: int, width: int, where: str) -> dict[str, Any]:
    try:
        crs = CRS.from_user_input(about["CRS"])
        (x,), (y,) = transform_points(CRS.from_epsg(4326), crs, [float(about["lon"])], [float(about["lat"])])
        half = _PIXEL_M / 2
        transform = Affine(_PIXEL_M, 0, x - width * half, 0, -_PIXEL_M, y + height * half)
        return place_of(crs, transform, width, height, where)
    except (KeyError, TypeError, ValueError, OverflowError, CRSError, CPLE_BaseError, NecError):
        return NOWHERE  # CPLE_BaseError: GDAL's word for a latitude beyond the pole


def _date(text: Any) -> datetime | None:
    try:
        return datetime.fromisoformat(str(text)[:10]).replace(tzinfo=UTC)
    except ValueError:
        return None

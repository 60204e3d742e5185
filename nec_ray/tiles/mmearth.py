"""MMEarth's HDF5 files (MMEarth, sections 3 and A; `convert_to_h5.py` of vishalned/MMEarth-data): Sentinel-2 tiles.

Beside `NAME.h5` stand `NAME_tile_info.json` and `NAME_splits.json`. The file's links are not followed, and nothing of
what it may say about other files.
"""

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from typing import Any

import h5py
import numpy as np
import numpy.typing as npt
from rasterio.crs import CRS
from rasterio.errors import CRSError
from rasterio.transform import Affine
from rasterio.warp import transform as transform_points

from nec_ray.errors import BadSource, NecError, NotFound
from nec_ray.storage import Store
from nec_ray.tiles.place import NOWHERE, place_of

SENTINEL2_BANDS = ("B1", "B2", "B3", "B4", "B5", "B6", "B7", "B8A", "B8", "B9", "B10", "B11", "B12")
"""In the file's order: B8A before B8. B10 is 0 in L2A."""
_PIXEL_M = 10
_MOST_BYTES = 1 << 28
"""Of a chunk, one sample in the published files."""


def mmearth_rows(store: Store, name: str) -> Iterator[dict[str, Any]]:
    """Catalog rows of the samples of a file, with columns `s2_type` (l1c or l2a), `split` and `biome` beside the usual.

    A tile's footprint is that of its size around its centre, in the sample's UTM zone.

    Raises:
        BadSource: no MMEarth file, or its tile_info.json does not read.
    """
    where = f"{store.url}/{name}"
    stem = name.rpartition(".")[0]
    info, splits = (_json(store, f"{stem}_{kind}.json") for kind in ("tile_info", "splits"))
    split_of = {int(number): split for split, numbers in splits.items() for number in numbers}
    etag = store.etag(name)
    with _opened(store, name) as file:
        images, metadata = _dataset(file, "sentinel2", where), _dataset(file, "metadata", where)
        _check(images, where)
        count, _, height, width = images.shape
        if metadata.shape != (count,) or not {"tile_id", "S2_type"} <= set(metadata.dtype.names or ()):
            raise BadSource(f"{where}: its metadata has no tile_id and S2_type for each of its {count} samples")
        named = [(_text(one["tile_id"]), _text(one["S2_type"])) for one in metadata[:]]
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
            "biome": None if about.get("biome") is None else str(about["biome"]),
            **_place(about, height, width, f"{where}#{number}"),
        }


@contextmanager
def sentinel2(store: Store, name: str, bands: Sequence[str]) -> Iterator[Any]:
    """A function (sample, rows, columns) that reads a window of Sentinel-2 as (13, height, width) uint16.

    Raises:
        BadSource: no MMEarth file, or it has other bands.
    """
    where = f"{store.url}/{name}"
    if tuple(bands) != SENTINEL2_BANDS:
        raise BadSource(f"{where}: has the bands {', '.join(SENTINEL2_BANDS)}, its catalog says {', '.join(bands)}")
    with _opened(store, name) as file:
        images = _dataset(file, "sentinel2", where)
        _check(images, where)
        count, _, height, width = images.shape

        def window(number: int, rows: range, columns: range) -> npt.NDArray[np.uint16]:
            if number >= count or rows.stop > height or columns.stop > width:
                raise BadSource(f"its window ends outside the file of {count} samples of {width} x {height} pixels")
            pixels = images[number, :, rows.start : rows.stop, columns.start : columns.stop]
            return np.asarray(pixels, np.uint16)

        yield window


@contextmanager
def _opened(store: Store, name: str) -> Iterator[Any]:
    where = f"{store.url}/{name}"
    with store.open(name) as data:
        try:
            file = h5py.File(data, "r")
        except (OSError, ValueError, KeyError, RuntimeError) as error:
            raise BadSource(f"{where}: cannot be read as HDF5 ({_line(error)})") from None
        with file:
            yield file


def _dataset(file: Any, name: str, where: str) -> Any:
    """A data set that lies in the file itself: HDF5 can refer to other files, and to programs that decode."""
    link = file.get(name, getlink=True)
    found = file.get(name) if isinstance(link, h5py.HardLink) else None
    if not isinstance(found, h5py.Dataset):
        raise BadSource(f"{where}: no MMEarth file, it has no data set {name} of its own")
    if found.external or found.is_virtual:
        raise BadSource(f"{where}: its data set {name} lies in other files, which are not read")
    filters = found.id.get_create_plist()
    known = {h5py.h5z.FILTER_DEFLATE, h5py.h5z.FILTER_SHUFFLE, h5py.h5z.FILTER_FLETCHER32}
    if any(filters.get_filter(i)[0] not in known for i in range(filters.get_nfilters())):
        raise BadSource(f"{where}: its data set {name} is compressed by another filter than gzip; write it with gzip")
    whole = int(np.prod(found.chunks or (1,), dtype=object)) * found.dtype.itemsize
    if whole > _MOST_BYTES:
        raise BadSource(f"{where}: a chunk of {name} has {whole:,} bytes, {_MOST_BYTES:,} are the most")
    return found


def _check(images: Any, where: str) -> None:
    if images.dtype != np.uint16 or images.ndim != 4 or images.shape[1] != len(SENTINEL2_BANDS):
        said = f"{images.dtype} {images.shape}"
        raise BadSource(
            f"{where}: its sentinel2 is {said}, not uint16 (samples, {len(SENTINEL2_BANDS)}, rows, columns)"
        )


def _json(store: Store, name: str) -> dict[str, Any]:
    where = f"{store.url}/{name}"
    try:
        document = json.loads(store.read(name))
    except NotFound:
        raise BadSource(f"{where}: is not there; MMEarth's HDF5 file needs its json files beside it") from None
    except ValueError as error:
        raise BadSource(f"{where}: does not read as JSON ({_line(error)})") from None
    if not isinstance(document, dict):
        raise BadSource(f"{where}: holds no JSON object")
    return document


def _place(about: dict[str, Any], height: int, width: int, where: str) -> dict[str, Any]:
    try:
        crs = CRS.from_user_input(about["CRS"])
        (x,), (y,) = transform_points(CRS.from_epsg(4326), crs, [float(about["lon"])], [float(about["lat"])])
        half = _PIXEL_M / 2
        transform = Affine(_PIXEL_M, 0, x - width * half, 0, -_PIXEL_M, y + height * half)
        return place_of(crs, transform, width, height, where)
    except (KeyError, TypeError, ValueError, CRSError, NecError):
        return NOWHERE


def _date(text: Any) -> datetime | None:
    try:
        return datetime.fromisoformat(str(text)[:10]).replace(tzinfo=UTC)
    except ValueError:
        return None


def _text(value: Any) -> str:
    return (value.decode("utf-8", "replace") if isinstance(value, bytes) else str(value)).strip("\0 ")


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__

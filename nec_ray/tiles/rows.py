"""Catalog rows of whole files."""

import re
from collections.abc import Sequence
from typing import Any

from nec_ray.storage import Store
from nec_ray.tiles.modalities import SENTINEL2_BANDS
from nec_ray.tiles.reader import numbered

_USUAL = ("red", "green", "blue")
_WINDOW = re.compile(r"(.+)/y(\d{5,})_x(\d{5,})", re.DOTALL | re.ASCII)

_HDF5 = (".h5", ".hdf5")
TASK_SPECS = "task_specs.pkl"
"""What a folder of GEO-Bench's is known by."""
SAMPLE = ".hdf5"
"""How its samples' names end."""
_STAC = (".json", ".geojson", ".parquet", ".geoparquet")


def is_hdf5(source: str) -> bool:
    """Whether a source is, or lies in, an HDF5 file."""
    return numbered(source)[0].lower().endswith(_HDF5)


def is_sample(source: str, bands: Sequence[str]) -> bool:
    """Whether a source is one sample of GEO-Bench: an HDF5 file of other bands than MMEarth's, or in another order."""
    return source.lower().endswith(SAMPLE) and tuple(bands) != SENTINEL2_BANDS


def is_geobench(url: str) -> bool:
    """Whether a folder is a data set of GEO-Bench."""
    store = Store(url)
    return store.lists and store.exists(TASK_SPECS)


def is_zarr(source: str) -> bool:
    """Whether a source is, or lies in, a Zarr store: a folder whose name ends with `.zarr`."""
    return ".zarr/" in numbered(source)[0] + "/"


def is_stack(source: str) -> bool:
    """Whether a source may hold several images, so that `#n` behind it is a number and no part of a name."""
    from nec_ray.tiles.readers import reader_of

    reader = reader_of(source)
    return is_hdf5(source) or (reader is not None and reader.several)


def is_stac(source: str) -> bool:
    """Whether a source is a STAC document or stac-geoparquet: by its name, which is that of no other source."""
    return source.lower().endswith(_STAC)


def stack_number(source: str) -> int:
    """Of the image among those that the source holds, from 0."""
    return numbered(source)[1]


def window_id(prefix: str, y: int, x: int) -> str:
    """Tile id of the window of the image `prefix` whose first row and column are these."""
    return f"{prefix}/y{y:05}_x{x:05}"


def window_of(tile_id: str) -> tuple[str, int, int] | None:
    """Prefix, first row and first column of what `window_id` made; None for other tile ids."""
    found = _WINDOW.fullmatch(tile_id)
    return (found[1], int(found[2]), int(found[3])) if found else None


def file_row(
    store: Store, name: str, sensor: str | None, *, width: int, height: int, bands: Sequence[str], dtype: str
) -> dict[str, Any]:
    """Row of a tile that is a whole image without a place on the map; its folder is its label."""
    return {
        "tile_id": name,
        "source": f"{store.url}/{name}",
        "source_etag": store.etag(name),
        "x_off": 0,
        "y_off": 0,
        "width": width,
        "height": height,
        "bands": list(bands),
        "dtype": dtype,
        "nodata": None,
        "nodata_share": None,
        "acquired_at": None,
        "sensor": sensor,
        "geometry": None,
        "bbox": None,
        "crs": None,
        "transform": None,
        "label": name.rpartition("/")[0] or None,
    }


def unreadable_row(store: Store, name: str, sensor: str | None) -> dict[str, Any]:
    """Row of a file whose header does not read: it is not dropped, encoding records it as failed, with the reason."""
    return file_row(store, name, sensor, width=1, height=1, bands=_USUAL, dtype="uint8")

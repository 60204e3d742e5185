"""Catalog rows of whole files."""

from collections.abc import Sequence
from typing import Any

from nec_ray.storage import Store

_USUAL = ("red", "green", "blue")


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

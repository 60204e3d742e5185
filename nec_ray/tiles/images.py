"""Tiles as whole images (JPEG, PNG) or windows of them, their class folder as label."""

import warnings
from collections.abc import Iterator
from typing import Any

from PIL import Image, UnidentifiedImageError

from nec_ray.storage import Store
from nec_ray.tiles.rows import file_row, unreadable_row, window_id

_BANDS = {"L": ["grey"], "I;16": ["grey"]}


def image_row(store: Store, name: str, sensor: str | None) -> dict[str, Any]:
    """Catalog row of one image, of which only the header is read; other modes than grey are read as RGB."""
    try:
        with warnings.catch_warnings(), store.open(name) as file:
            warnings.simplefilter("ignore")
            with Image.open(file, formats=("JPEG", "PNG")) as image:
                width, height = image.size
                mode = image.mode
    except (UnidentifiedImageError, OSError, ValueError, Image.DecompressionBombError):
        return unreadable_row(store, name, sensor)
    bands = _BANDS.get(mode, ["red", "green", "blue"])
    dtype = "uint16" if mode == "I;16" else "uint8"
    return file_row(store, name, sensor, width=width, height=height, bands=bands, dtype=dtype)


def image_windows(row: dict[str, Any], prefix: str, tile_size: int) -> Iterator[dict[str, Any]]:
    """Rows of the windows of the image that `row` is of: they cover it, smaller ones at its right and lower edge."""
    for y in range(0, row["height"], tile_size):
        for x in range(0, row["width"], tile_size):
            size = {"width": min(tile_size, row["width"] - x), "height": min(tile_size, row["height"] - y)}
            yield row | size | {"tile_id": window_id(prefix, y, x), "x_off": x, "y_off": y}

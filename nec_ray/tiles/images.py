"""Tiles as whole images (JPEG, PNG), their class folder as label."""

import warnings
from typing import Any

from PIL import Image, UnidentifiedImageError

from nec_ray.storage import Store
from nec_ray.tiles.rows import file_row, unreadable_row

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

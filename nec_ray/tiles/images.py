"""Tiles as whole images (JPEG, PNG), their class folder as label."""

import warnings
from typing import Any

from PIL import Image, UnidentifiedImageError

from nec_ray.storage import Store

ENDINGS = (".jpg", ".jpeg", ".png")
_BANDS = {"RGB": ["red", "green", "blue"], "L": ["grey"], "I;16": ["grey"]}
_UNREADABLE = ["red", "green", "blue"]


def image_row(store: Store, name: str, sensor: str | None) -> dict[str, Any]:
    """Catalog row of one image: only its header is read.

    An image whose header does not read still gets a row, so that it is not silently dropped: encoding records
    it as failed, with the reason.
    """
    width = height = 1
    bands, dtype = _UNREADABLE, "uint8"
    try:
        with warnings.catch_warnings(), store.open(name) as file:
            warnings.simplefilter("ignore")
            with Image.open(file, formats=("JPEG", "PNG")) as image:
                width, height = image.size
                bands = _BANDS.get(image.mode, _UNREADABLE)
                dtype = "uint16" if image.mode == "I;16" else "uint8"
    except (UnidentifiedImageError, OSError, ValueError, Image.DecompressionBombError):
        pass  # said above
    folder = name.rpartition("/")[0]
    return {
        "tile_id": name,
        "source": f"{store.url}/{name}",
        "source_etag": store.etag(name),
        "x_off": 0,
        "y_off": 0,
        "width": width,
        "height": height,
        "bands": bands,
        "dtype": dtype,
        "nodata": None,
        "nodata_share": None,
        "acquired_at": None,
        "sensor": sensor,
        "geometry": None,
        "bbox": None,
        "crs": None,
        "transform": None,
        "label": folder or None,
    }

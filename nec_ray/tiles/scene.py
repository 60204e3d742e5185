"""The built-in scene and its labels, which `nec demo` and the tests run on; see `nec_ray/data/README.md`."""

from pathlib import Path

_DATA = Path(__file__).resolve().parent.parent / "data"


def builtin_scene() -> Path:
    """The built-in Landsat 8 GeoTIFF: uint16 red, green, blue, 928 rows x 960 columns of 60 m, no-data 0."""
    return _DATA / "landsat8_itaipu.tif"


def builtin_labels() -> Path:
    """GeoJSON of labelled tiles of the built-in scene: `tile_id` (at `tile_size=32`) and `label` a feature."""
    return _DATA / "landsat8_itaipu_labels.geojson"

"""Tile catalogs and their pixels: build, write and read a catalog, order it in space, read its tiles.

`import nec_ray.tiles` is light: rasterio and Pillow are loaded where a source is opened.
"""

from nec_ray.tiles.build import build_catalog
from nec_ray.tiles.catalog import Catalog, CatalogMetadata, band_sets, check_bands, read_catalog, write_catalog
from nec_ray.tiles.geoparquet import geoparquet_bytes
from nec_ray.tiles.hilbert import spatial_order
from nec_ray.tiles.ordered import OrderedTiles
from nec_ray.tiles.read import NativeTile, TileBatch, read_native, read_pixels, read_tiles
from nec_ray.tiles.resize import resize
from nec_ray.tiles.scene import builtin_labels, builtin_scene

__all__ = [
    "Catalog",
    "CatalogMetadata",
    "NativeTile",
    "OrderedTiles",
    "TileBatch",
    "band_sets",
    "build_catalog",
    "builtin_labels",
    "builtin_scene",
    "check_bands",
    "geoparquet_bytes",
    "read_catalog",
    "read_native",
    "read_pixels",
    "read_tiles",
    "resize",
    "spatial_order",
    "write_catalog",
]

"""The archive room: packs, index, versions, SQL and pull."""

from nec_ray.archive.archive import Archive, open_archive
from nec_ray.archive.coverage import Coverage
from nec_ray.archive.pull import Part, Pull
from nec_ray.archive.sql import Query
from nec_ray.archive.tile_set import TileSet

__all__ = ["Archive", "Coverage", "Part", "Pull", "Query", "TileSet", "open_archive"]

"""The archive room: packs, index, versions, SQL and pull."""

from nec_ray.archive.archive import Archive, Pull, open_archive
from nec_ray.archive.sql import Query

__all__ = ["Archive", "Pull", "Query", "open_archive"]

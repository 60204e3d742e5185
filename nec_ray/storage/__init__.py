"""Folders of objects on local disks, S3 and other stores, through one small interface."""

from nec_ray.storage.ranges import RangeReader
from nec_ray.storage.store import Entry, Range, Store, normalise_url, read_url

__all__ = ["Entry", "Range", "RangeReader", "Store", "normalise_url", "read_url"]

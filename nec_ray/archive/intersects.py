"""`nec_intersects(geometry, region)`: which footprints meet a GeoJSON region, in SQL."""

import hashlib

import numpy as np
import pyarrow as pa

from nec_ray.archive.database import plain_function
from nec_ray.archive.regions import Region, region_of_text
from nec_ray.errors import InputError

_regions: dict[str, Region] = {}
"""Regions by their SHA-256: text of a region would be copied for every row."""
_MOST_REGIONS = 64


@plain_function("nec_region", ["VARCHAR"], "VARCHAR")
def _remember(texts: pa.ChunkedArray) -> pa.Array:
    """Short names of GeoJSON regions; of a constant DuckDB asks once."""
    names = {}
    for text in texts.unique().to_pylist():
        names[text] = hashlib.sha256(text.encode()).hexdigest()
        region = region_of_text(text)
        while len(_regions) >= _MOST_REGIONS:
            _regions.pop(next(iter(_regions)), None)
        _regions[names[text]] = region
    return pa.array([names[text] for text in texts.to_pylist()], pa.string())


@plain_function(
    "nec_meets",
    ["BLOB", "VARCHAR"],
    "BOOLEAN",
    macro="nec_intersects(geometry, region) AS nec_meets(geometry, nec_region(region))",
)
def _meets(footprints: pa.ChunkedArray, names: pa.ChunkedArray) -> pa.Array:
    """Whether footprints, WKB, meet the regions of these names."""
    found = np.zeros(len(footprints), bool)
    coded = names.combine_chunks().dictionary_encode()
    number = coded.indices.to_numpy()
    wkb = footprints.to_pylist()
    for i, name in enumerate(coded.dictionary.to_pylist()):
        rows = np.flatnonzero(number == i).tolist()
        region = _regions.get(name)
        if region is None:
            raise InputError("a region was forgotten while it was asked for; run the query again")
        found[rows] = region.meets([wkb[row] for row in rows])
    return pa.array(found)

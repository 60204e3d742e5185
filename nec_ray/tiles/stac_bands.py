"""Bands of STAC items: their names, and the units of their pixels.

Names: `bands` (STAC 1.1), `eo:bands` and `raster:bands` (STAC 1.0), else the assets' own.

Units: a pixel's value is `scale * DN + offset`, as the metadata say, with two products known beside them:

- Sentinel-2 reflectance is always 10,000 times the reflectance, ESA's unit until processing baseline 04.00 and that of
  most published models. From 04.00 on (25 January 2022) products are `DN = 10,000 * reflectance + 1,000`, so that dark
  surfaces may be negative (ESA, Sentinel-2 Products Specification, BOA_ADD_OFFSET and RADIO_ADD_OFFSET, -1,000).
- Landsat Collection 2 Level 2 whose items do not state a scale: surface reflectance is `0.0000275 * DN - 0.2`, surface
  temperature `0.00341802 * DN + 149` kelvin (USGS, Landsat Collection 2 Level-2 Science Product Guide).
"""

import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from nec_ray.errors import BadSource
from nec_ray.tiles.stac import Item

_NOT_DATA = {"thumbnail", "overview", "visual", "metadata"}
_SENTINEL2_BAND = re.compile(r"B(0[1-9]|1[0-2]|8A)")
_PRODUCT = re.compile(r"_N(\d\d)(\d\d)_")
"""Processing baseline in the name of a Sentinel-2 product."""
_APPLIED = ("earthsearch:boa_offset_applied", "sentinel:boa_offset_applied")
_BASELINES = ("s2:processing_baseline", "sentinel:processing_baseline", "processing:version")
_WITH_OFFSET = (4, 0)
_QUANTIFICATION = 10_000
_OFFSET = -1_000
_LANDSAT_REFLECTANCE = (0.0000275, -0.2)
_LANDSAT_TEMPERATURE = (0.00341802, 149.0)
_THERMAL = ("lwir", "lwir11", "lwir12")


@dataclass(frozen=True)
class Band:
    """A band of an item."""

    asset: str
    href: str
    number: int
    """In its file, from 1."""
    alone: bool
    """Whether its file is said to hold no other."""
    name: str | None
    common_name: str | None
    fields: Mapping[str, Any]
    """What the metadata say about it."""


@dataclass(frozen=True)
class Units:
    """What the numbers in a file mean: `scale * DN + offset`."""

    scale: float
    offset: float
    nodata: float | None
    """DN of a missing pixel, where the metadata say; the file may say it too."""


def bands_of(item: Item) -> list[Band]:
    """The bands of all GeoTIFFs of an item that hold data, in the order of its assets."""
    found = []
    for key, asset in item.assets.items():
        roles, href = asset.get("roles"), asset.get("href")
        if _name(key) is None or not isinstance(href, str) or not _is_tiff(asset, href):
            continue
        if isinstance(roles, list) and any(role in _NOT_DATA for role in roles if isinstance(role, str)):
            continue
        lists = [one if isinstance(one := asset.get(k), list) else [] for k in ("bands", "eo:bands", "raster:bands")]
        count = max(1, *(len(one) for one in lists))
        own = {
            name: value for name, value in asset.items() if name not in {"name", "bands", "eo:bands", "raster:bands"}
        }
        for i in range(count):
            fields = dict(own)
            for one in lists:
                fields |= one[i] if i < len(one) and isinstance(one[i], dict) else {}
            common = fields.get("eo:common_name", fields.get("common_name"))
            found.append(Band(key, href, i + 1, count == 1, _name(fields.get("name")), _name(common), fields))
    return found


def usual_names(item: Item) -> list[str]:
    """Names of the bands to take where none are asked for: those with a common name, else all."""
    bands = bands_of(item)
    bands = [band for band in bands if band.common_name] or bands
    single = {band.common_name for band in bands if band.alone}
    bands = [band for band in bands if band.alone or band.common_name not in single]
    common, own = Counter(band.common_name for band in bands), Counter(band.name for band in bands)
    names = []
    for band in bands:
        if band.common_name and common[band.common_name] == 1:
            names.append(band.common_name)
        elif band.name and own[band.name] == 1:
            names.append(band.name)
        elif band.alone:
            names.append(band.asset)
    return list(dict.fromkeys(names))


def find_band(item: Item, bands: Sequence[Band], wanted: str) -> Band | None:
    """The band of that name: an asset's of one band, a band's own, or a common one; None where there is none.

    Raises:
        BadSource: several have it.
    """
    for names in (
        [band.asset if band.alone else None for band in bands],
        [band.name for band in bands],
        [band.common_name for band in bands],
    ):
        found = [band for band, name in zip(bands, names, strict=True) if name == wanted]
        found = [band for band in found if band.alone] or found  # rather than a picture of several
        if len(found) > 1:
            said = ", ".join(band.asset for band in found)
            raise BadSource(f"{item.url}: {wanted} may be any of its assets {said}; name one of them with --bands")
        if found:
            return found[0]
    return None


def units_of(item: Item, band: Band) -> Units:
    """Scale, offset and no-data value of a band's file, from metadata.

    Raises:
        BadSource: a number that is none, or a Sentinel-2 item that says neither its offset nor its baseline.
    """
    scale, offset = (_number(item, band, name) for name in ("scale", "offset"))
    nodata = _nodata(band.fields.get("nodata"))
    if scale is not None and (scale == 0 or not math.isfinite(scale)):
        raise BadSource(f"{item.url}: the scale of its asset {band.asset} is {scale}; give valid STAC")
    if offset is not None and not math.isfinite(offset):
        raise BadSource(f"{item.url}: the offset of its asset {band.asset} is {offset}; give valid STAC")
    if _is_sentinel2(item) and _is_reflectance(band):
        return _sentinel2(item, scale, offset, nodata)
    if scale is None and offset is None:
        scale, offset = _landsat(item, band)
    return Units(1.0 if scale is None else scale, offset or 0.0, nodata)


def _sentinel2(item: Item, scale: float | None, offset: float | None, nodata: float | None) -> Units:
    """To 10,000 times the reflectance; DN 0 is ESA's no-data value."""
    baseline, is_stated = _baseline(item), scale is not None
    # Most state both for reflectance, some for DN.
    of_dn = scale == 1 or (scale is None and offset is not None and abs(offset) >= 1)
    unit = 1 if of_dn else _QUANTIFICATION
    scale = 1.0 if of_dn or scale is None else round(scale * unit, 9)
    if any(item.properties.get(name) is True for name in _APPLIED):
        offset = 0.0  # Earth Search states the product's offset even where its copies have it subtracted already
    elif offset is not None:
        offset = round(offset * unit, 6)
    elif baseline is not None:
        offset = _OFFSET * scale if baseline >= _WITH_OFFSET else 0.0
    elif is_stated:
        offset = 0.0  # what STAC means by a scale alone; HLS is such a product
    else:
        raise BadSource(
            f"{item.url}: a Sentinel-2 item that states neither an offset nor its processing baseline, so that its "
            "pixels may be 1,000 too high; add s2:processing_baseline"
        )
    return Units(scale, offset, 0.0 if nodata is None else nodata)


def _baseline(item: Item) -> tuple[int, int] | None:
    """Processing baseline of a Sentinel-2 item: 05.11 is (5, 11)."""
    for name in _BASELINES:
        if found := re.fullmatch(r"0?(\d)\.(\d\d)", str(item.properties.get(name))):
            return int(found[1]), int(found[2])
    for text in (item.properties.get("s2:product_uri"), item.id):
        if found := _PRODUCT.search(str(text)):
            return int(found[1]), int(found[2])
    return None


def _landsat(item: Item, band: Band) -> tuple[float | None, float | None]:
    properties = item.properties
    level = str(properties.get("landsat:correction"))
    if str(properties.get("landsat:collection_number")) != "02" or level not in {"L2SP", "L2SR"}:
        return None, None
    if band.common_name in _THERMAL:
        return _LANDSAT_TEMPERATURE
    return _LANDSAT_REFLECTANCE if band.common_name else (None, None)


def _is_sentinel2(item: Item) -> bool:
    said = (item.properties.get(name) for name in ("constellation", "platform"))
    return any(re.match(r"sentinel[- _]?2", str(text).lower()) is not None for text in said) or any(
        name.startswith("s2:") for name in item.properties
    )


def _is_reflectance(band: Band) -> bool:
    return band.common_name is not None or any(
        _SENTINEL2_BAND.fullmatch(name) is not None for name in (band.name, band.asset) if name
    )


def _number(item: Item, band: Band, name: str) -> float | None:
    value = band.fields.get(f"raster:{name}", band.fields.get(name))
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise BadSource(f"{item.url}: the {name} of its asset {band.asset} is no number; give valid STAC")
    try:
        return float(value)
    except OverflowError:
        return math.inf


def _nodata(value: Any) -> float | None:
    """A number, or one of JSON's texts for those that it lacks."""
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        return None
    try:
        return float(value)
    except (ValueError, OverflowError):
        return None


def _name(value: Any) -> str | None:
    return value if isinstance(value, str) and 0 < len(value) <= 100 and value.isprintable() else None


def _is_tiff(asset: Mapping[str, Any], href: str) -> bool:
    kind = asset.get("type")
    if isinstance(kind, str):
        return kind.lower().startswith("image/tiff")
    return href.lower().partition("?")[0].endswith((".tif", ".tiff"))

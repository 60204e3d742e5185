"""Catalog rows of the windows of STAC items, whose bands lie in GeoTIFFs of their own."""

import hashlib
import json
import math
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from datetime import UTC, datetime
from itertools import islice
from typing import Any

import numpy as np
from rasterio.errors import RasterioError
from rasterio.transform import Affine

from nec_ray.errors import BadSource, NotFound
from nec_ray.storage import Store
from nec_ray.tiles.assets import check_grid
from nec_ray.tiles.geotiff import open_image
from nec_ray.tiles.place import NOWHERE, place_of
from nec_ray.tiles.rows import window_id
from nec_ray.tiles.stac import Item, Items
from nec_ray.tiles.stac_bands import Band, bands_of, find_band, units_of, usual_names

_READERS = 8
_MOST_SIDE = 1 << 20
_MOST_TILES = 4_000_000
"""Of an item; a header that lies must not make the table grow without end."""


def stac_windows(
    items: Items,
    *,
    tile_size: int,
    bands: Sequence[str] | None,
    nodata: float | None,
    acquired_at: datetime | None,
    sensor: str | None,
    progress: Callable[[int, int], None] | None = None,
) -> Iterator[dict[str, Any]]:
    """Catalog rows, `assets` and `cloud_cover` too, of all windows of all items.

    Windows of `tile_size` pixels a side of the finest band cover the item without overlap, smaller ones at its right
    and lower edge. Pixels are not read: their `nodata_share` is null. An item that lacks a band, or whose files do not
    read, is one row, which encoding records as failed, with the reason.

    Args:
        items: of a source.
        tile_size: pixels a side of a window.
        bands: to take, by common name, band name or asset; where it is None, those of the first item.
        nodata: number of missing pixels in the files, otherwise than they or the metadata say.
        acquired_at: time, UTC, for items that have none.
        sensor: platform or instrument, otherwise than the items say.
        progress: called with (items done, items known of).

    Raises:
        NotFound: a document of the catalog is not there.
        BadSource: no STAC, without items, of which none can be read, or with an id that stands twice.
    """
    cut = _Cut(items, tile_size, nodata, acquired_at, sensor)
    wanted = list(bands) if bands else None
    seen: set[str] = set()
    why: BadSource | NotFound | None = None
    done, read = 0, False
    waiting = iter(items)
    with ThreadPoolExecutor(_READERS) as pool:
        while some := list(islice(waiting, 4 * _READERS)):
            wanted = wanted or usual_names(some[0])
            if not wanted:
                raise BadSource(f"{some[0].url}: none of its assets is a GeoTIFF of bands; name assets with --bands")
            for item, result in zip(some, pool.map(cut.attempt, some, [wanted] * len(some)), strict=True):
                prefix = f"{item.collection}/{item.id}" if item.id in seen and item.collection else item.id
                if prefix in seen:
                    raise BadSource(f"{items.url}: its item {prefix} stands twice; keep one")
                seen.add(prefix)
                if isinstance(result, _Scene):
                    read = True
                    yield from result.rows(prefix, tile_size)
                else:
                    why = why or result
                    yield cut.failed(item, prefix, wanted)
            done += len(some)
            if progress:
                progress(done, done)
    if not done:
        raise BadSource(f"{items.url}: has no items; give a STAC catalog that has, or an ItemCollection")
    if why and not read:
        raise why if done == 1 else BadSource(f"{items.url}: none of its {done:,} items can be read, such as {why}")


@dataclass(frozen=True)
class _Scene:
    """An item whose files were opened."""

    crs: Any
    transform: Any
    width: int
    height: int
    row: dict[str, Any]
    """What all of its tiles have in common."""

    def rows(self, prefix: str, size: int) -> Iterator[dict[str, Any]]:
        for y in range(0, self.height, size):
            for x in range(0, self.width, size):
                height, width = min(size, self.height - y), min(size, self.width - x)
                place = place_of(self.crs, self.transform @ Affine.translation(x, y), width, height, self.row["source"])
                window = {"x_off": x, "y_off": y, "width": width, "height": height}
                yield self.row | window | place | {"tile_id": window_id(prefix, y, x)}


@dataclass(frozen=True)
class _Cut:
    """How items become rows."""

    items: Items
    tile_size: int
    nodata: float | None
    acquired_at: datetime | None
    sensor: str | None

    def attempt(self, item: Item, wanted: Sequence[str]) -> "_Scene | BadSource | NotFound":
        """The item, or why it cannot be read."""
        try:
            return self._scene(item, wanted)
        except (BadSource, NotFound) as error:
            return error
        except RasterioError as error:
            return BadSource(f"{item.url}: an asset cannot be read as an image ({_line(error)})")

    def failed(self, item: Item, prefix: str, wanted: Sequence[str]) -> dict[str, Any]:
        """Row of an item that cannot be read: reading it finds no files, for the bands that it should have."""
        window = {"x_off": 0, "y_off": 0, "width": 1, "height": 1, "source_etag": "none", "dtype": "uint8"}
        return self._common(item, wanted) | window | NOWHERE | {"tile_id": prefix, "assets": []}

    def _common(self, item: Item, wanted: Sequence[str]) -> dict[str, Any]:
        properties = item.properties
        sensor = self.sensor or next(filter(None, map(properties.get, ("platform", "constellation"))), None)
        cover = properties.get("eo:cloud_cover")
        known = isinstance(cover, int | float) and not isinstance(cover, bool) and 0 <= cover <= 100
        return {
            "source": item.url,
            "bands": list(wanted),
            "nodata": math.nan,
            "nodata_share": None,
            "acquired_at": _time(properties) or self.acquired_at,
            "sensor": sensor if isinstance(sensor, str) and sensor.isprintable() else None,
            "label": None,
            "cloud_cover": cover if known else None,
        }

    def _scene(self, item: Item, wanted: Sequence[str]) -> _Scene:
        chosen = _chosen(item, wanted)
        hrefs = [self.items.asset_url(item, band.href) for band in chosen]
        with ExitStack() as stack:
            images, etags = {}, {}
            for href in dict.fromkeys(hrefs):
                folder, _, name = href.rpartition("/")
                store = Store(folder or "/")
                etags[href] = store.etag(name)
                images[href] = stack.enter_context(open_image(store, name))
            assets = [self._asset(item, band, href, images[href]) for band, href in zip(chosen, hrefs, strict=True)]
            finest = min(images.values(), key=lambda image: abs(image.transform.a * image.transform.e))
            self._check_size(item, finest)
            place_of(finest.crs, finest.transform, finest.width, finest.height, item.url)  # lest a tile's fails later
            for href, image in images.items():
                if image.crs != finest.crs or not image.crs:
                    raise BadSource(f"{item.url}: its assets have no CRS, or several ({href}); warp them to one")
                check_grid(image, finest.transform, finest.width, finest.height, href)
            dtypes = {images[href].dtypes[asset["band"] - 1] for href, asset in zip(hrefs, assets, strict=True)}
            stamp = json.dumps([[etags[asset["href"]], asset] for asset in assets], sort_keys=True)
            return _Scene(
                finest.crs,
                finest.transform,
                finest.width,
                finest.height,
                self._common(item, wanted)
                | {
                    "source_etag": hashlib.sha256(stamp.encode()).hexdigest()[:32],
                    "dtype": _common_type(item, dtypes),
                    "assets": assets,
                },
            )

    def _asset(self, item: Item, band: Band, href: str, image: Any) -> dict[str, Any]:
        if band.number > image.count or (band.alone and image.count > 1):
            raise BadSource(f"{item.url}: its asset {band.asset} has {image.count} bands, which is not what it says")
        units = units_of(item, band)
        own = image.nodatavals[band.number - 1]
        said = next((one for one in (self.nodata, own, units.nodata) if one is not None), None)
        return {"href": href, "band": band.number, "scale": units.scale, "offset": units.offset, "nodata": said}

    def _check_size(self, item: Item, image: Any) -> None:
        tiles = math.ceil(image.width / self.tile_size) * math.ceil(image.height / self.tile_size)
        if max(image.width, image.height) > _MOST_SIDE or tiles > _MOST_TILES:
            raise BadSource(
                f"{item.url}: {image.width} x {image.height} pixels in {tiles:,} tiles are too many; "
                "give larger tiles with --tile-size"
            )


def _chosen(item: Item, wanted: Sequence[str]) -> list[Band]:
    bands = bands_of(item)
    found = {name: find_band(item, bands, name) for name in wanted}
    if missing := [name for name, band in found.items() if band is None]:
        has = ", ".join(dict.fromkeys(band.common_name or band.name or band.asset for band in bands)) or "none"
        raise BadSource(f"{item.url}: has no GeoTIFF of {', '.join(missing)}; it has {has[:200]}")
    return [band for band in found.values() if band is not None]


def _common_type(item: Item, dtypes: set[str]) -> str:
    if any(np.dtype(name).kind not in "uif" for name in dtypes):
        raise BadSource(f"{item.url}: its pixels are of the types {', '.join(sorted(dtypes))}, which are not read")
    return np.result_type(*dtypes).name


def _time(properties: Any) -> datetime | None:
    """Of acquisition, UTC; of its start where it is a range."""
    for name in ("datetime", "start_datetime"):
        value = properties.get(name)
        try:
            time = value if isinstance(value, datetime) else datetime.fromisoformat(value)
            return time.astimezone(UTC) if time.tzinfo else time.replace(tzinfo=UTC)
        except (TypeError, ValueError, OverflowError):
            continue
    return None


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:200]

"""Builds tile catalogs from what providers have: GeoTIFFs, folders of them, folders of images."""

import os
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from typing import Any

import pyarrow as pa

from nec_ray.contracts import arrow_schema
from nec_ray.errors import BadSource, NotFound
from nec_ray.storage import Store, normalise_url
from nec_ray.tiles.catalog import Catalog, CatalogMetadata

_TIFFS = (".tif", ".tiff")
_DEFAULT_TILE = 64
Progress = Callable[[int, int], None]


def build_catalog(
    source: str | os.PathLike[str],
    *,
    tile_size: int | None = None,
    bands: Sequence[str] | None = None,
    nodata: float | None = None,
    sensor: str | None = None,
    acquired_at: datetime | None = None,
    title: str | None = None,
    licence: str | None = None,
    attribution: str | None = None,
    progress: Progress | None = None,
) -> Catalog:
    """Tile catalog of a source.

    A GeoTIFF gives windows of `tile_size` pixels that cover it without overlap (smaller ones at its right and
    lower edge), each with its footprint, CRS and share of missing pixels; a folder of GeoTIFFs the same for
    each. A folder of JPEG or PNG images gives one tile an image, its folder's name as label.

    Args:
        source: a file or folder, as path or URL.
        tile_size: pixels a side of a window; 64 where it is None.
        bands: names of the bands, in order, for sources that have none.
        nodata: value that marks missing pixels, where the file does not say.
        sensor: platform or instrument.
        acquired_at: time of acquisition, UTC.
        title: of the catalog; the source's name where it is None.
        licence: of the imagery; carried into archives.
        attribution: whom to name; carried into archives.
        progress: called with (files done, files).

    Raises:
        NotFound: nothing is there.
        BadSource: a GeoTIFF that cannot be read, or a folder without images.
    """
    url = normalise_url(source)
    parent, _, base = url.rpartition("/")
    if not Store(parent or "/").exists(base):
        raise NotFound(f"{url}: nothing is there; check the path or URL")
    if acquired_at is not None and acquired_at.tzinfo is None:
        acquired_at = acquired_at.replace(tzinfo=UTC)
    if url.lower().endswith(_TIFFS):
        store, names = Store(parent or "/"), [base]
    else:
        store = Store(parent or "/")
        inside = [n.removeprefix(f"{base}/") for n in store.list(base)]
        store = Store(url)
        names = [n for n in inside if _kind(n)]
    if not names:
        raise BadSource(f"{url}: holds no GeoTIFF, JPEG or PNG; give one, or a folder of them")
    rows: list[dict[str, Any]] = []
    for done, name in enumerate(names, 1):
        rows += _rows(
            store, name, tile_size=tile_size, bands=bands, nodata=nodata, sensor=sensor, acquired_at=acquired_at
        )
        if progress and (done % 50 == 0 or done == len(names)):
            progress(done, len(names))
    schema = arrow_schema("catalog.json")
    table = pa.table([pa.array([row[f.name] for row in rows], f.type) for f in schema], schema=schema)
    return Catalog(table, CatalogMetadata(title=title or base, licence=licence, attribution=attribution))


def _kind(name: str) -> str | None:
    from nec_ray.tiles.images import ENDINGS

    hidden = any(part.startswith(".") for part in name.split("/"))
    if hidden:
        return None
    lower = name.lower()
    return "tiff" if lower.endswith(_TIFFS) else "image" if lower.endswith(ENDINGS) else None


def _rows(store: Store, name: str, *, tile_size: int | None, sensor: str | None, **how: Any) -> list[dict[str, Any]]:
    if _kind(name) == "tiff":
        from nec_ray.tiles.geotiff import windows

        prefix = name.rpartition(".")[0]
        return windows(store, name, prefix, tile_size=tile_size or _DEFAULT_TILE, sensor=sensor, **how)
    from nec_ray.tiles.images import image_row

    row = image_row(store, name, sensor)
    row["acquired_at"] = how["acquired_at"]
    if how["nodata"] is not None:
        row["nodata"] = how["nodata"]
    if how["bands"]:
        if len(how["bands"]) != len(row["bands"]):
            raise BadSource(f"{store.url}/{name}: has {len(row['bands'])} bands, {len(how['bands'])} names are given")
        row["bands"] = list(how["bands"])
    return [row]

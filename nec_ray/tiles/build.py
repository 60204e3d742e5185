"""Builds tile catalogs from what providers have: GeoTIFFs, folders of them, folders of images."""

import os
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

import pyarrow as pa

from nec_ray.contracts import arrow_schema
from nec_ray.errors import BadSource, InputError, NotFound
from nec_ray.storage import Store, normalise_url
from nec_ray.tiles.catalog import Catalog, CatalogMetadata
from nec_ray.tiles.rows import unreadable_row

_TIFFS = (".tif", ".tiff")
_IMAGES = (".jpg", ".jpeg", ".png")
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
    if tile_size is not None and tile_size < 1:
        raise InputError(f"tile size {tile_size}: give at least 1 pixel")
    url = normalise_url(source)
    if acquired_at is not None and acquired_at.tzinfo is None:
        acquired_at = acquired_at.replace(tzinfo=UTC)
    store, names = _files(url)
    stems = Counter(name.rpartition(".")[0] for name in names)
    rows: list[dict[str, Any]] = []
    refused = 0
    for done, name in enumerate(names, 1):
        stem = name.rpartition(".")[0]
        how = _How(tile_size or _DEFAULT_TILE, bands, nodata, sensor, acquired_at)
        try:
            rows += _rows(store, name, stem if stems[stem] == 1 else name, how)
        except BadSource:
            if len(names) == 1:
                raise
            # Encoding records it as failed, with the reason; the others are not lost with it.
            rows.append(unreadable_row(store, name, sensor) | ({"bands": list(bands)} if bands else {}))
            refused += 1
        if progress and (done % 50 == 0 or done == len(names)):
            progress(done, len(names))
    if refused == len(names):
        raise BadSource(f"{url}: none of its {refused} files can be read{' with these bands' if bands else ''}")
    schema = arrow_schema("catalog.json")
    table = pa.table([pa.array([row[f.name] for row in rows], f.type) for f in schema], schema=schema)
    return Catalog(
        table, CatalogMetadata(title=title or url.rpartition("/")[2], licence=licence, attribution=attribution)
    )


def _files(url: str) -> tuple[Store, list[str]]:
    """The folder to read from, and the names of the images in it."""
    parent, _, base = url.rpartition("/")
    outside = Store(parent or "/")
    if not outside.exists(base):
        raise NotFound(f"{url}: nothing is there; check the path or URL")
    inside = outside.list(base)
    if inside == [base]:
        if not _kind(base):
            raise BadSource(f"{url}: no GeoTIFF, JPEG or PNG; give one, or a folder of them")
        return outside, inside
    names = [name.removeprefix(f"{base}/") for name in inside]
    names = [name for name in names if _kind(name)]
    if not names:
        raise BadSource(f"{url}: holds no GeoTIFF, JPEG or PNG; give one, or a folder of them")
    return Store(url), names


def _kind(name: str) -> str | None:
    if any(part.startswith(".") for part in name.split("/")):
        return None
    lower = name.lower()
    return "tiff" if lower.endswith(_TIFFS) else "image" if lower.endswith(_IMAGES) else None


@dataclass(frozen=True)
class _How:
    """What the user said about the files."""

    tile_size: int
    bands: Sequence[str] | None
    nodata: float | None
    sensor: str | None
    acquired_at: datetime | None


def _rows(store: Store, name: str, prefix: str, how: _How) -> list[dict[str, Any]]:
    if _kind(name) == "tiff":
        from nec_ray.tiles.geotiff import windows

        made = windows(
            store,
            name,
            prefix,
            tile_size=how.tile_size,
            bands=how.bands,
            nodata=how.nodata,
            acquired_at=how.acquired_at,
            sensor=how.sensor,
        )
        if all(row["nodata_share"] is None for row in made):
            raise BadSource(f"{store.url}/{name}: none of its pixels can be read; it is cut off or damaged")
        return made
    from nec_ray.tiles.images import image_row

    row = image_row(store, name, how.sensor) | {"acquired_at": how.acquired_at, "nodata": how.nodata}
    if how.bands:
        if len(how.bands) != len(row["bands"]):
            raise BadSource(f"{store.url}/{name}: has {len(row['bands'])} bands, {len(how.bands)} names are given")
        row["bands"] = list(how.bands)
    return [row]

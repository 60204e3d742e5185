"""Builds tile catalogs from what providers have: GeoTIFFs, images, folders of them, STAC, Zarr, MMEarth, GEO-Bench."""

import os
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from itertools import islice
from typing import Any

import pyarrow as pa

from nec_ray.contracts import arrow_schema
from nec_ray.errors import BadSource, InputError, NotFound
from nec_ray.storage import Store, normalise_url
from nec_ray.tiles.catalog import Catalog, CatalogMetadata
from nec_ray.tiles.readers import reader_of
from nec_ray.tiles.rows import is_geobench, is_hdf5, is_stac, unreadable_row

_TIFFS = (".tif", ".tiff")
_IMAGES = (".jpg", ".jpeg", ".png")
_DEFAULT_TILE = 64
_PART = 100_000
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
    each. A folder of JPEG or PNG images gives one tile an image, or such windows of each where `tile_size` is
    given; its folder's name is the label, as it is of a TIFF of one window without a georeference. A Zarr v3 array of
    rows and columns, with bands and times, gives windows of every time, as does a group whose arrays are one band each.
    A file of MMEarth's gives one tile a sample, with its Sentinel-2 bands, and a folder of GEO-Bench's one a sample,
    see `geobench_rows`. A STAC Catalog, Collection, Item or ItemCollection (JSON), or stac-geoparquet, gives windows of
    each item's GeoTIFFs: see `nec_ray.tiles.stac` for what is followed, `stac_bands` for names and units, `assets` for
    bands of different resolution.

    Args:
        source: a file or folder, as path or URL.
        tile_size: pixels a side of a window; where it is None, 64 for GeoTIFFs, STAC and Zarr, and other images stay
            whole.
        bands: names of the bands, in order, for sources that have none; of a Zarr group, the arrays to take; of STAC,
            the bands to take, by common name, band name or asset, where it is None those that have a common name.
        nodata: value that marks missing pixels, where the file does not say.
        sensor: platform or instrument.
        acquired_at: time of acquisition, UTC.
        title: of the catalog; the source's name where it is None.
        licence: of the imagery, where STAC does not say or otherwise than it says; carried into archives.
        attribution: whom to name, likewise; carried into archives.
        progress: called with (files done, files).

    Raises:
        NotFound: nothing is there.
        BadSource: a file or Zarr store that cannot be read, or a folder without images.
        InputError: something is given that the source has itself.
    """
    if tile_size is not None and tile_size < 1:
        raise InputError(f"tile size {tile_size}: give at least 1 pixel")
    url = normalise_url(source)
    if acquired_at is not None and acquired_at.tzinfo is None:
        acquired_at = acquired_at.replace(tzinfo=UTC)
    metadata = CatalogMetadata(title=title or url.rpartition("/")[2], licence=licence, attribution=attribution)
    how = _How(tile_size, bands, nodata, sensor, acquired_at)
    if is_hdf5(url):
        return Catalog(_mmearth(url, how), metadata)
    if reader := reader_of(url):
        folder, _, name = url.rpartition("/")
        return Catalog(_table(reader.rows(Store(folder or "/"), name, **how.of_windows())), metadata)
    if not _kind(url.rpartition("/")[2]) and is_geobench(url):
        how.check_unsaid(f"{url}: GEO-Bench's data set")
        from nec_ray.tiles.geobench_rows import EXTRA_COLUMNS, geobench_rows

        more = [pa.field(name, kind) for name, kind in EXTRA_COLUMNS.items()]
        return Catalog(_table(geobench_rows(url, progress), more), metadata)
    if is_stac(url):
        return _stac(url, how, metadata, progress)
    store, names = _files(url)
    stems = Counter(name.rpartition(".")[0] for name in names)
    rows: list[dict[str, Any]] = []
    refused = 0
    for done, name in enumerate(names, 1):
        stem = name.rpartition(".")[0]
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
    return Catalog(_table(rows), metadata)


def _table(rows: Iterable[dict[str, Any]], extra: Iterable[pa.Field] = ()) -> pa.Table:
    """The rows as a catalog's columns, and some more; a part at a time, since there may be millions."""
    schema = pa.schema([*arrow_schema("catalog.json"), *extra])
    rows = iter(rows)
    parts = [schema.empty_table()]
    while part := list(islice(rows, _PART)):
        parts.append(pa.table([pa.array([row[f.name] for row in part], f.type) for f in schema], schema=schema))
    return pa.concat_tables(parts)


def _mmearth(url: str, how: "_How") -> pa.Table:
    from nec_ray.tiles.mmearth import EXTRA_COLUMNS, mmearth_rows

    how.check_unsaid(f"{url}: MMEarth's file")
    folder, _, name = url.rpartition("/")
    return _table(mmearth_rows(Store(folder or "/"), name), [pa.field(one, pa.string()) for one in EXTRA_COLUMNS])


def _stac(url: str, how: "_How", metadata: CatalogMetadata, progress: Progress | None) -> Catalog:
    """Of STAC's items; their terms hold where the user states none."""
    from nec_ray.tiles.stac import Items
    from nec_ray.tiles.stac_rows import stac_windows

    items = Items(url)
    rows = stac_windows(items, progress=progress, **how.of_windows())
    table = _table(rows, arrow_schema("catalog.json", "optional_columns"))
    licence, attribution = metadata.licence or items.licence, metadata.attribution or items.attribution
    return Catalog(table, replace(metadata, licence=licence, attribution=attribution))


def _files(url: str) -> tuple[Store, list[str]]:
    """The folder to read from, and the names of the images in it."""
    parent, _, base = url.rpartition("/")
    outside = Store(parent or "/")
    if not outside.exists(base):
        raise NotFound(f"{url}: nothing is there; check the path or URL")
    inside = outside.names(base)
    if inside == [base]:
        if not _kind(base):
            raise BadSource(
                f"{url}: no GeoTIFF, JPEG, PNG, MMEarth .h5 or .zarr; give one, or a folder of images or of GEO-Bench's"
            )
        return outside, inside
    names = [name.removeprefix(f"{base}/") for name in inside]
    names = [name for name in names if _kind(name)]
    if f"{base}/zarr.json" in inside:
        raise BadSource(f"{url}: a Zarr store whose name does not end with .zarr; rename it")
    if not names:
        raise BadSource(f"{url}: holds no GeoTIFF, JPEG or PNG; give one, or a folder of them")
    return Store(url), names


def _kind(name: str) -> str | None:
    if any(part.startswith(".") for part in name.split("/")):
        return None
    lower = name.lower()
    if lower.endswith(_TIFFS):
        return "tiff"
    reader = reader_of(lower)
    return "image" if lower.endswith(_IMAGES) else "reader" if reader and lower.endswith(reader.ends) else None


@dataclass(frozen=True)
class _How:
    """What the user said about the files."""

    tile_size: int | None
    bands: Sequence[str] | None
    nodata: float | None
    sensor: str | None
    acquired_at: datetime | None

    def check_unsaid(self, whose: str) -> None:
        """Refuse what a source says itself."""
        given: dict[str, Any] = {"tile size": self.tile_size, "bands": self.bands, "no-data value": self.nodata}
        given |= {"sensor": self.sensor, "time": self.acquired_at}
        if said := [name for name, value in given.items() if value is not None]:
            raise InputError(f"{whose} says its {', '.join(said)} itself; leave that out")

    def of_windows(self) -> dict[str, Any]:
        """Arguments of the functions that cut sources into windows."""
        return {**vars(self), "tile_size": self.tile_size or _DEFAULT_TILE}


def _rows(store: Store, name: str, prefix: str, how: _How) -> list[dict[str, Any]]:
    if _kind(name) == "reader" and (reader := reader_of(name)):
        return list(reader.rows(store, name, **how.of_windows()))
    if _kind(name) == "tiff":
        from nec_ray.tiles.geotiff import windows

        made = windows(store, name, prefix, **how.of_windows())
        if all(row["nodata_share"] is None for row in made):
            raise BadSource(f"{store.url}/{name}: none of its pixels can be read; it is cut off or damaged")
        return made
    from nec_ray.tiles.images import image_row, image_windows

    row = image_row(store, name, how.sensor) | {"acquired_at": how.acquired_at, "nodata": how.nodata}
    if how.bands:
        if len(how.bands) != len(row["bands"]):
            raise BadSource(f"{store.url}/{name}: has {len(row['bands'])} bands, {len(how.bands)} names are given")
        row["bands"] = list(how.bands)
    if how.tile_size is None or (row["width"], row["height"]) == (1, 1):  # as files are recorded that do not read
        return [row]
    return list(image_windows(row, prefix, how.tile_size))

"""Catalog rows of the windows of Zarr v3 arrays: bands, times and place as xarray, GeoZarr and STAC write them."""

import hashlib
import warnings
from collections.abc import Iterator, Mapping, Sequence
from datetime import UTC, datetime
from typing import Any, NoReturn

import numpy as np
import xarray
from rasterio.crs import CRS
from rasterio.errors import CRSError
from rasterio.transform import Affine
from zarr.errors import UnstableSpecificationWarning

from nec_ray.errors import BadSource, InputError
from nec_ray.storage import Store
from nec_ray.tiles.place import place_of
from nec_ray.tiles.rows import window_id
from nec_ray.tiles.zarr import TIMES, Member, consolidated, members, split
from nec_ray.tiles.zarr_store import read_only

_LON_LAT = ({"lon", "longitude"}, {"lat", "latitude"})
_EVEN = 0.01
"""Of a pixel: how far coordinates may be from evenly spaced ones."""


def zarr_windows(
    source: str,
    *,
    tile_size: int,
    bands: Sequence[str] | None,
    nodata: float | None,
    acquired_at: datetime | None,
    sensor: str | None,
) -> Iterator[dict[str, Any]]:
    """Catalog rows of all windows of an array, or of a group whose arrays are one band each; of every time.

    Windows of `tile_size` pixels a side cover the array without overlap, smaller ones at its right and lower edge.
    Pixels are not read: their `nodata_share` is null. `source_etag` changes with any chunk that a window lies in.

    Args:
        source: path or URL.
        tile_size: pixels a side of a window.
        bands: of a group, the arrays to take; of an array, names of its bands, where it does not hold them itself.
        nodata: value of missing pixels, where the array does not say.
        acquired_at: time, UTC, where it does not say.
        sensor: platform or instrument.

    Raises:
        NotFound: nothing is there.
        BadSource: no Zarr v3 array of rows and columns, or one that is not read here.
    """
    store, path, _ = split(source)
    found = members(store, path)
    if isinstance(found, Member):
        chosen, group, names = [found], path.rpartition("/")[0], None
    else:
        names = _chosen(source, found, bands)
        chosen, group = [found[name] for name in names], path
    for one in chosen:
        one.open()
    first = chosen[0]
    around = _dataset(store, group, source) if group else _alone(first)
    variable = around[first.name]
    names = names or _band_names(first, variable, bands)
    crs, transform = _georeference(first, variable, around)
    times = _times(variable)
    marker = _nodata(variable) if nodata is None else nodata
    stamps = _Stamps(store, chosen)
    prefix = f"{path}/".replace(".zarr/", "/", 1).rstrip("/")
    rows, columns = first.length("row"), first.length("column")
    for number, time in enumerate(times):
        which = f"#{number}" if "time" in first.axes else ""
        for y in range(0, rows, tile_size):
            for x in range(0, columns, tile_size):
                height, width = min(tile_size, rows - y), min(tile_size, columns - x)
                at = {"time": range(number, number + 1), "row": range(y, y + height), "column": range(x, x + width)}
                yield {
                    "tile_id": window_id(f"{prefix}/t{number:05}" if which else prefix, y, x),
                    "source": f"{source}{which}",
                    "source_etag": stamps.of(at),
                    "x_off": x,
                    "y_off": y,
                    "width": width,
                    "height": height,
                    "bands": names,
                    "dtype": first.dtype,
                    "nodata": marker,
                    "nodata_share": None,
                    "acquired_at": time or acquired_at,
                    "sensor": sensor,
                    "label": None,
                    **place_of(crs, transform @ Affine.translation(x, y), width, height, source),
                }


def _chosen(source: str, found: Mapping[str, Member], wanted: Sequence[str] | None) -> list[str]:
    """Names of the arrays of a group that are its bands."""
    if wanted and (missing := [name for name in wanted if name not in found]):
        _refuse(source, f"it has no array {', '.join(missing)}; it has {', '.join(found) or 'none'}")
    names = list(wanted or (name for name, one in found.items() if len(one.shape) >= 2))
    if not names:
        _refuse(source, "the group holds no array of rows and columns; give the path of one that does")
    kinds = {(found[name].shape, found[name].dtype, found[name].axes) for name in names}
    if len(kinds) > 1:
        _refuse(source, f"its arrays {', '.join(names)} differ in shape or type; name with --bands those to take")
    if "band" in found[names[0]].axes and len(names) == 1:
        _refuse(source, f"its array {names[0]} has bands of its own; give its path, {source}/{names[0]}")
    return names


def _dataset(store: Store, group: str, source: str) -> xarray.Dataset:
    try:
        with warnings.catch_warnings():  # Zarr warns of texts, which name bands
            warnings.simplefilter("ignore", UnstableSpecificationWarning)
            return xarray.open_zarr(
                read_only(store, group),
                zarr_format=3,
                consolidated=consolidated(store, group),
                chunks=None,
                mask_and_scale=False,
                decode_coords="all",
                decode_timedelta=False,
            )
    except (ValueError, KeyError, TypeError, OSError) as error:
        _refuse(source, f"xarray does not open its group ({_line(error)})")


def _alone(array: Member) -> xarray.Dataset:
    """An array that stands in no group, so that it has no coordinates."""
    values = np.broadcast_to(np.zeros((), array.dtype), array.shape)
    attributes = array.document.get("attributes") or {}
    return xarray.Dataset({array.name: (array.document["dimension_names"], values, attributes)})


def _band_names(array: Member, variable: xarray.DataArray, wanted: Sequence[str] | None) -> list[str]:
    count = array.length("band")
    if wanted:
        if len(wanted) != count:
            array.refuse(f"has {count} bands, {len(wanted)} names are given ({', '.join(wanted)})")
        return list(wanted)
    own = variable.dims[array.axes.index("band")] if "band" in array.axes else None
    if own in variable.coords and variable.coords[own].dtype.kind in "UTO":
        return [str(name) for name in variable.coords[own].values]
    return [array.name.removesuffix(".zarr")] if own is None else [f"band_{i + 1}" for i in range(count)]


def _georeference(array: Member, variable: xarray.DataArray, around: xarray.Dataset) -> tuple[CRS | None, Affine]:
    """CRS, None where there is none, and transform of a whole array."""
    mapping = variable.encoding.get("grid_mapping") or variable.attrs.get("grid_mapping")
    notes = [variable.attrs, around[mapping].attrs if mapping in around.variables else {}, around.attrs]
    row, column = (str(name) for name in variable.dims[-2:])
    crs = next(filter(None, (_crs(note, array) for note in notes)), None)
    if crs is None and column.lower() in _LON_LAT[0] and row.lower() in _LON_LAT[1]:
        crs = CRS.from_epsg(4326)
    if crs is None:
        return None, Affine.identity()
    if row in variable.coords and column in variable.coords:
        (x, dx), (y, dy) = (_axis(variable.coords[name], array) for name in (column, row))
        return crs, Affine(dx, 0, x - dx / 2, 0, dy, y - dy / 2)
    for note in notes:
        for name in ("spatial:transform", "proj:transform"):
            if (found := note.get(name)) is not None:
                return crs, Affine(*_six(found, array))
        if "GeoTransform" in note:  # as GDAL writes it
            c, a, b, f, d, e = _six(str(note["GeoTransform"]).split(), array)
            return crs, Affine(a, b, c, d, e, f)
    return array.refuse("it has a CRS, but neither coordinates nor a transform; write one of them")


def _crs(note: Mapping[Any, Any], array: Member) -> CRS | None:
    for name in ("crs_wkt", "spatial_ref", "proj:wkt2", "proj:code", "proj:epsg"):
        if note.get(name):
            try:
                return CRS.from_user_input(note[name])
            except (CRSError, ValueError) as error:
                array.refuse(f"its CRS {str(note[name])[:60]!r} is not understood ({_line(error)})")
    return None


def _axis(coordinate: xarray.DataArray, array: Member) -> tuple[float, float]:
    """First centre of a pixel, and the step to the next one."""
    try:
        values = np.asarray(coordinate.values, np.float64)
    except (TypeError, ValueError):
        values = np.empty(0)
    if values.ndim != 1 or len(values) < 2:
        array.refuse(f"its coordinate {coordinate.name} has no two numbers")
    step = float(values[-1] - values[0]) / (len(values) - 1)
    line = values[0] + step * np.arange(len(values))
    if step == 0 or not np.abs(values - line).max() <= _EVEN * abs(step):
        array.refuse(f"its coordinate {coordinate.name} is not evenly spaced; resample it to a regular grid")
    return float(values[0]), step


def _six(values: Any, array: Member) -> list[float]:
    try:
        numbers = [float(value) for value in list(values)[:6]]
    except (TypeError, ValueError):
        numbers = []
    if len(numbers) != 6:
        array.refuse(f"its transform {str(values)[:60]} is no six numbers")
    return numbers


def _times(variable: xarray.DataArray) -> list[datetime | None]:
    """Of each step of the time axis, UTC; one None where it has none."""
    axes = [name for name in variable.dims if str(name).lower() in TIMES]
    if not axes:
        scalar = next((c for name, c in variable.coords.items() if str(name).lower() in TIMES and not c.ndim), None)
        return [None if scalar is None else _utc(scalar.values)]
    if axes[0] not in variable.coords:
        return [None] * variable.sizes[axes[0]]
    return [_utc(value) for value in variable.coords[axes[0]].values]


def _utc(value: Any) -> datetime | None:
    if np.asarray(value).dtype.kind != "M" or np.isnat(value):
        return None
    return datetime.fromtimestamp(0, UTC) + (value - np.datetime64(0, "s")).astype("timedelta64[us]").item()


def _nodata(variable: xarray.DataArray) -> float | None:
    """`_FillValue`, else NaN for floats; Zarr's own fill value is what a chunk that was not written reads as."""
    for name in ("_FillValue", "missing_value", "nodata"):
        value = variable.attrs.get(name)
        if isinstance(value, int | float | np.number):
            return float(value)
    return float("nan") if variable.dtype.kind == "f" else None


class _Stamps:
    """What changes when the objects change that hold a window."""

    def __init__(self, store: Store, arrays: Sequence[Member]) -> None:
        self._arrays = arrays
        self._known: dict[tuple[str, ...], str] = {}
        try:
            self._entries: dict[str, str] | None = {
                entry.name: f"{entry.modified.timestamp():.6f}-{entry.size}"
                for array in arrays
                for entry in store.entries(array.path)
            }
            self._all = ""
        except InputError:  # a web server lists nothing
            self._entries = None
            self._all = store.etag(f"{arrays[0].path}/zarr.json")

    def of(self, place: Mapping[str, range]) -> str:
        if self._entries is None:
            return self._all
        names = ["zarr.json", *(name for name in self._arrays[0].objects(place))]
        key = tuple(names)
        if key not in self._known:
            stamps = (self._entries.get(f"{array.path}/{name}", "none") for array in self._arrays for name in names)
            self._known[key] = hashlib.sha256("\n".join(stamps).encode()).hexdigest()[:32]
        return self._known[key]


def _refuse(source: str, why: str) -> NoReturn:
    raise BadSource(f"{source}: {why}")


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__

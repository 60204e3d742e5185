"""Reads MMEarth's HDF5 files: 1M and 100k at 128 pixels, 1M at 64 (MMEarth, section 3; supplement A and C).

Beside `NAME.h5` stand `NAME_tile_info.json`, `NAME_splits.json` and `NAME_band_stats.json`. What released code does
otherwise, and this does not: WorldCover's trees become missing (their class number is its no-data value), and missing
Sentinel-1, terrain and canopy become 0.
"""

import functools
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from nec_ray.errors import BadSource, InputError, NotFound
from nec_ray.storage import Store
from nec_ray.tiles import hdf5
from nec_ray.tiles.modalities import MODALITIES, QUALITY, S2_TYPES, Modality

Values = npt.NDArray[Any]
_KNOWN = {**MODALITIES, **QUALITY}
_MOST_TEXT = 1024  # bytes of a row of the metadata, 110 in the published files
_ROUNDING = 1e-6  # of its greatest value: what running sums may lose of a band that hardly varies
_LAST_CODE = 65535  # of no class, whatever the modality


@dataclass(frozen=True)
class BandStatistics:
    """Of one modality, one number a band; NaN where no sample has a value."""

    mean: npt.NDArray[np.float64]
    std: npt.NDArray[np.float64]
    min: npt.NDArray[np.float64]
    max: npt.NDArray[np.float64]


class MMEarthFile:
    """An open file of MMEarth's; `open_mmearth` makes it.

    Raises:
        BadSource: a data set or a JSON file is missing, of another shape or type, or does not read.
    """

    def __init__(self, store: Store, name: str, file: Any) -> None:
        self.url = f"{store.url}/{name}"
        self._store, self._stem, self._file = store, name.rpartition(".")[0], file
        images = hdf5.dataset(file, "sentinel2", self.url)
        _check(MODALITIES["sentinel2"], images, self.url, count=len(images) if images.ndim else 0)
        self.count: int = len(images)
        """Samples."""
        self.height, self.width = (int(side) for side in images.shape[2:])
        self._sets: dict[str, Any] = {}

    @functools.cached_property
    def tile_ids(self) -> list[str]:
        """One a sample."""
        return [_text(value) for value in self._all_metadata["tile_id"].tolist()]

    @functools.cached_property
    def s2_types(self) -> list[str]:
        """l1c or l2a, one a sample."""
        return [self._s2_type(row) for row in self._all_metadata]

    def s2_type(self, number: int) -> str:
        """Of one sample: a request, where `s2_types` is one a sample."""
        if "s2_types" in self.__dict__:
            return self.s2_types[number]
        return self._s2_type(hdf5.part(self._metadata, number, number + 1, "metadata", self.url)[0])

    def _s2_type(self, row: Any) -> str:
        tile_id = _text(bytes(row["tile_id"]))
        if "S2_type" in row.dtype.names:
            level = _text(bytes(row["S2_type"]))
            if level not in S2_TYPES:
                raise BadSource(f"{self.url}: its metadata says S2_type {level!r} of {tile_id}; l1c or l2a is wanted")
            return level
        # a file that the released script merged of two has ids only
        said = self.tile_info.get(tile_id, {}).get("S2_type")
        if said not in S2_TYPES:
            raise BadSource(
                f"{self._beside('tile_info')}: does not say the S2_type of {tile_id}, nor does the .h5 file"
            )
        return str(said)

    @functools.cached_property
    def _metadata(self) -> Any:
        found = hdf5.dataset(self._file, "metadata", self.url)
        names = found.dtype.names or ()
        texts = "tile_id" in names and all(found.dtype[name].kind == "S" for name in names)
        if found.shape != (self.count,) or not texts or found.dtype.itemsize > _MOST_TEXT:
            raise BadSource(f"{self.url}: its metadata has no tile_id for each of its {self.count} samples")
        return found

    @functools.cached_property
    def _all_metadata(self) -> Values:
        read: Values = hdf5.whole(self._metadata, "metadata", self.url)
        return read

    @functools.cached_property
    def tile_info(self) -> dict[str, dict[str, Any]]:
        """What is known of each tile id: `S2_DATE`, `CRS`, `lat`, `lon`, `BANDS` and so on."""
        found = self._json("tile_info")
        if not all(isinstance(about, dict) for about in found.values()):
            raise BadSource(f"{self._beside('tile_info')}: does not hold one object a tile")
        return found

    @functools.cached_property
    def splits(self) -> dict[str, list[int]]:
        """Numbers of the samples of train, val and test."""
        found = self._json("splits")
        for split, numbers in found.items():
            if not isinstance(numbers, list) or not all(isinstance(n, int) and 0 <= n < self.count for n in numbers):
                raise BadSource(f"{self._beside('splits')}: {split} does not list numbers of the {self.count} samples")
        return found

    def statistics(self, modality: Modality, s2_type: str = "l2a") -> BandStatistics:
        """Mean, standard deviation, least and greatest value of `modality.bands`, from band_stats.json.

        The published ones of aster and canopy_height_eth probably include no-data values (MMEarth-data compares int16
        with -inf and int8 with 255, which they cannot hold); they are used as given, as the released training does.

        Args:
            modality: a continuous one.
            s2_type: l1c or l2a: Sentinel-2's levels have statistics of their own.

        Raises:
            InputError: a categorical modality, or another level.
            BadSource: the file has no such numbers, or impossible ones. A band without values has null or NaN for both
                mean and deviation, one that does not vary the deviation 0.
        """
        if modality.kind != "continuous" or s2_type not in S2_TYPES:
            raise InputError(f"{modality.name} of {s2_type}: there are statistics of continuous ones, of l1c and l2a")
        key, where = modality.statistics_key(s2_type), self._beside("band_stats")
        found = self._band_stats.get(key)
        try:
            columns = [np.array([_number(value) for value in found[what]]) for what in ("mean", "std", "min", "max")]  # type: ignore[index]
        except (KeyError, TypeError, OverflowError):
            raise BadSource(f"{where}: has no mean, std, min and max of {key}") from None
        if any(column.shape != (len(modality.file_bands),) for column in columns):
            raise BadSource(f"{where}: {key} has not {len(modality.file_bands)} numbers each, one a band")
        statistics = BandStatistics(*(column[list(modality.taken)] for column in columns))
        _check_statistics(statistics, modality, f"{where}: {key}")
        return statistics

    def read(
        self,
        numbers: Sequence[int],
        names: Sequence[str] | None = None,
        *,
        rows: slice | None = None,
        columns: slice | None = None,
        standardised: bool = False,
    ) -> dict[str, Values]:
        """Modalities of some samples.

        Args:
            numbers: of the samples, from 0.
            names: modalities, of `MODALITIES` or `QUALITY`; the twelve where it is None.
            rows: of the images, all where it is None.
            columns: of the images.
            standardised: continuous ones with mean 0 and standard deviation 1 by band_stats.json, Sentinel-2 by the
                statistics of the sample's own level.

        Returns:
            (samples, *modality.shape): float32 with NaN, or int64 with -1, where a value is missing.

        Raises:
            InputError: no such modality or sample.
        """
        chosen = [self._modality(name) for name in (MODALITIES if names is None else names)]
        wrong = [number for number in numbers if not 0 <= number < self.count]
        if wrong:
            raise InputError(f"{self.url}: has {self.count} samples, none has the number {wrong[0]}")
        window = (rows or slice(None), columns or slice(None))
        read = {}
        for modality in chosen:
            values = self._read(modality, numbers, window)
            if standardised and modality.kind == "continuous":
                for values_of_one, number in zip(values, numbers, strict=True):
                    key = self.s2_type(number) if len(modality.statistics) > 1 else "l2a"
                    values_of_one[:] = standardise(values_of_one, self.statistics(modality, key))
            read[modality.name] = values
        return read

    def raw(self, name: str, number: int, window: tuple[slice, slice] = (slice(None), slice(None))) -> Values:
        """One sample of a data set as the file holds it, with all its bands."""
        modality = self._modality(name)
        found = self._sets.get(name)
        if found is None:
            found = hdf5.dataset(self._file, name, self.url)
            _check(modality, found, self.url, count=self.count, size=(self.height, self.width))
            self._sets[name] = found
        read: Values = hdf5.part(found, number, number + 1, name, self.url)[0]
        return read[(slice(None), *window)] if modality.level == "pixel" else read

    def _read(self, modality: Modality, numbers: Sequence[int], window: tuple[slice, slice]) -> Values:
        height, width = (len(range(size)[part]) for size, part in zip((self.height, self.width), window, strict=True))
        kind = np.float32 if modality.kind == "continuous" else np.int64
        values = np.empty((len(numbers), *modality.shape(height, width)), kind)
        for i, number in enumerate(numbers):
            values[i] = decode(modality, self.raw(modality.name, number, window))
        return values

    def _modality(self, name: str) -> Modality:
        if name not in _KNOWN:
            raise InputError(f"{name!r} is no modality; there are {', '.join(_KNOWN)}")
        return _KNOWN[name]

    @functools.cached_property
    def _band_stats(self) -> dict[str, Any]:
        return self._json("band_stats")

    def _beside(self, kind: str) -> str:
        return f"{self._store.url}/{self._stem}_{kind}.json"

    def _json(self, kind: str) -> dict[str, Any]:
        where = self._beside(kind)
        try:
            document = json.loads(self._store.read(f"{self._stem}_{kind}.json"))
        except NotFound:
            raise BadSource(f"{where}: is not there; MMEarth's HDF5 file needs its json files beside it") from None
        except (ValueError, RecursionError) as error:
            raise BadSource(f"{where}: does not read as JSON ({hdf5.line(error)})") from None
        if not isinstance(document, dict):
            raise BadSource(f"{where}: holds no JSON object")
        return document


@contextmanager
def open_mmearth(store: Store, name: str) -> Iterator[MMEarthFile]:
    """A file of MMEarth's in a folder, local or on an object store.

    Raises:
        BadSource: no such file, see `MMEarthFile`.
        NotFound: nothing is there.
    """
    with hdf5.opened(store, name) as file:
        yield MMEarthFile(store, name, file)


def decode(modality: Modality, raw: Values) -> Values:
    """One sample as the file holds it, in the reader's convention.

    Args:
        modality: which.
        raw: (stored bands, rows, columns), (stored bands,), or (classes,) of a one-hot vector.

    Returns:
        float32 with NaN, or int64 with -1, where a value is missing; shape `modality.shape`.
    """
    if modality.one_hot:  # all 0, several 1 or the no-data value say nothing
        hot = np.flatnonzero(raw)
        return np.int64(hot[0]) if len(hot) == 1 and raw[hot[0]] == 1 else np.int64(-1)  # type: ignore[return-value]
    if modality.kind == "categorical":
        codes = raw.astype(np.int64)
        return _classes(modality.class_values)[np.where((codes < 0) | (codes > _LAST_CODE), _LAST_CODE, codes)]
    return without_missing(modality, raw)[list(modality.taken)]


def without_missing(modality: Modality, raw: Values) -> Values:
    """All stored bands of a continuous modality as float32, NaN where a value is missing."""
    gone = ~np.isfinite(raw) if raw.dtype.kind == "f" else np.zeros(raw.shape, bool)
    for value in modality.missing:
        gone |= raw == value
    values: Values = np.where(gone, np.float32(np.nan), raw.astype(np.float32))
    return values


def standardise(values: Values, statistics: BandStatistics) -> Values:
    """Values (bands, ...) with mean 0 and standard deviation 1; missing ones stay NaN.

    A band that does not vary has the standard deviation 1; one without statistics has no values, so that all of it is
    missing.
    """
    shape = (-1, *[1] * (values.ndim - 1))
    spread = np.where(statistics.std == 0, 1, statistics.std)
    scaled: Values = ((values - statistics.mean.reshape(shape)) / spread.reshape(shape)).astype(np.float32)
    return scaled


@functools.cache
def _classes(values: tuple[int, ...]) -> npt.NDArray[np.int64]:
    """Class number by a file's value; -1 where it is none."""
    table = np.full(_LAST_CODE + 1, -1, np.int64)
    table[list(values)] = range(len(values))
    return table


def _check(modality: Modality, found: Any, where: str, *, count: int, size: tuple[int, int] | None = None) -> None:
    """That a data set has a modality's shape and kind of numbers; files with wider numbers are read too."""
    said = f"{where}: its {modality.name} is {found.dtype} {found.shape}, not {modality.dtype} (samples"
    if modality.level == "pixel":
        height, width = size or (found.shape[2:] if len(found.shape) == 4 else (0, 0))
        wanted, axes = modality.file_shape(height, width), f", {len(modality.file_bands)}, rows, columns)"
    else:
        wanted, axes = modality.file_shape(0, 0), f", {modality.file_shape(0, 0)[0]})"
    kinds = "iu" if modality.kind == "categorical" else "fiu"
    if found.dtype.kind not in kinds or found.shape != (count, *wanted) or 0 in wanted:
        raise BadSource(said + axes + (f" of {count} samples" if size else ""))


def _check_statistics(found: BandStatistics, modality: Modality, where: str) -> None:
    for band, mean, std, least, most in zip(modality.bands, found.mean, found.std, found.min, found.max, strict=True):
        said = f"{where} has mean {mean:g} and std {std:g} of {band}"
        if np.isnan(mean) and np.isnan(std):
            continue
        if not (np.isfinite(mean) and np.isfinite(std) and std >= 0):
            raise BadSource(f"{said}; they must be finite, std not negative, or null both")
        if std == 0 and most - least > _ROUNDING * max(abs(least), abs(most)):
            raise BadSource(f"{said}, but values from {least:g} to {most:g}; a band that varies has a std above 0")


def _number(value: Any) -> float:
    """NaN for null."""
    if value is not None and (isinstance(value, bool) or not isinstance(value, int | float)):
        raise TypeError
    return float("nan") if value is None else float(value)


def _text(value: bytes) -> str:
    return value.decode("utf-8", "replace").strip("\0 ")

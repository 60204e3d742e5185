"""Writes invented samples in MMEarth's layout, one at a time.

The layout is that of `convert_to_h5.py`, `normalization.py` and `splits.py` of vishalned/MMEarth-data.
"""

import json
import os
import secrets
import shutil
import tempfile
from calendar import monthrange
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import numpy.typing as npt

from nec_ray.errors import InputError
from nec_ray.storage import Store
from nec_ray.tiles.invented import sensors
from nec_ray.tiles.invented.landscape import landscape
from nec_ray.tiles.invented.world import Place, World
from nec_ray.tiles.mmearth_reader import without_missing
from nec_ray.tiles.modalities import BIOMES, ECO_REGIONS, MODALITIES, QUALITY, S2_TYPES, SENTINEL2_BANDS, cyclic

Progress = Callable[[int, int], None]

DATA_SETS = {
    name: {**MODALITIES, **QUALITY}[name]
    for name in (
        "sentinel2",
        "sentinel2_cloudmask",
        "sentinel2_cloudprod",
        "sentinel2_scl",
        "sentinel1",
        "aster",
        "era5",
        "dynamic_world",
        "canopy_height_eth",
        "lat",
        "lon",
        "biome",
        "eco_region",
        "month",
        "esa_worldcover",
    )
}
"""Of the file, in the order in which they are made."""
METADATA = np.dtype([("tile_id", "S100"), ("S2_type", "S10")])
_YEARS = (2017, 2020)
_TRAIN, _VAL = 0.8, 0.1
_LEAST_SIDE, _MOST_SIDE = 8, 1024


def generate(
    folder: str | os.PathLike[str],
    *,
    samples: int,
    side: int = 128,
    seed: int = 0,
    name: str = "data_invented",
    progress: Progress | None = None,
) -> str:
    """Write `NAME.h5` with its three JSON files into a folder, and give its URL.

    A sample depends on the seed and its number alone, so that a larger set begins with a smaller one. Memory holds one
    sample, and the numbers of all for the splits.

    Args:
        folder: a path, or the URL of one; made where it is not there.
        samples: how many.
        side: pixels of 10 m a side; the published ones have 128 or 64.
        seed: of the planet and of the samples.
        name: of the files.
        progress: called with (samples done, samples).

    Raises:
        InputError: impossible numbers, or files of that name are there.
    """
    if samples < 1 or seed < 0:
        raise InputError(f"{samples} samples, seed {seed}: give at least one, and no negative seed")
    if not _LEAST_SIDE <= side <= _MOST_SIDE:
        raise InputError(f"{side} pixels a side: give {_LEAST_SIDE} to {_MOST_SIDE}")
    store = Store(folder)
    store.check_writable()
    names = [f"{name}{ending}" for ending in (".h5", "_tile_info.json", "_splits.json", "_band_stats.json")]
    there = [one for one in names if store.exists(one)]
    if there:
        raise InputError(f"{store.url}/{there[0]}: is there already; give another folder or name")
    with _made_elsewhere(store) as made:
        statistics = _write_samples(made / names[0], made / names[1], samples, side, seed, progress)
        order = np.random.default_rng([seed, samples]).permutation(samples).tolist()
        train, val = round(_TRAIN * samples), round((_TRAIN + _VAL) * samples)
        splits = {"train": order[:train], "val": order[train:val], "test": order[val:]}
        (made / names[2]).write_text(json.dumps(splits), encoding="utf-8")
        (made / names[3]).write_text(json.dumps(statistics), encoding="utf-8")
        for one in (*names[1:], names[0]):  # who sees the .h5 file sees the others
            if not _move(store, one, made / one):
                raise InputError(f"{store.url}/{one}: somebody else has just written it; give another folder or name")
    return f"{store.url}/{names[0]}"


def sample(world: World, seed: int, number: int, side: int) -> tuple[dict[str, npt.NDArray[Any]], dict[str, Any]]:
    """One sample: what every data set of the file holds of it, and its entry of tile_info.json."""
    rng = np.random.default_rng([seed, number])
    place = world.place(rng)
    land = landscape(rng, place, side)
    day = _day(rng, place)
    images = sensors.sentinel2(rng, place, land, day)
    radar, radar_bands = sensors.sentinel1(rng, place, land)
    dynamic_world, world_cover = sensors.land_cover(rng, land)
    climate = sensors.climate(rng, place, land, day.month)
    values = {
        **images,
        "sentinel1": radar,
        "aster": sensors.terrain(rng, land),
        "era5": np.array(climate, np.float32).ravel(),
        "dynamic_world": dynamic_world,
        "canopy_height_eth": sensors.canopy(rng, land),
        "lat": cyclic(place.lat, 360),
        "lon": cyclic(place.lon, 360),
        "biome": np.eye(1, len(BIOMES), place.biome, dtype=np.uint8)[0],
        "eco_region": np.eye(1, ECO_REGIONS, place.eco_region, dtype=np.uint16)[0],
        "month": cyclic(day.month, 12),
        "esa_worldcover": world_cover,
    }
    l2a = day.s2_type == "l2a"
    info = {
        "S2_DATE": f"{day.year}-{day.month:02}-{day.day:02}",
        "S2_type": day.s2_type,
        "CRS": f"EPSG:{326 if place.lat >= 0 else 327}{_utm_zone(place.lon):02}",
        "lat": place.lat,
        "lon": place.lon,
        "biome": place.biome,
        "eco_region": place.eco_region,
        "NO_DATA": False,
        "BANDS": {
            "sentinel2": [
                *(band for band in SENTINEL2_BANDS if not (l2a and band == "B10")),
                *(["MSK_CLDPRB", "SCL"] if l2a else []),
                "QA60",
            ],
            **radar_bands,
            "aster": ["b1", "slope"],
            "era5": list(MODALITIES["era5"].bands),
            "dynamic_world": ["label"],
            "canopy_height_eth": ["height", "std"],
            "esa_worldcover": ["Map"],
        },
        "era5": {
            key: [None if np.isnan(x) else x for x in one]
            for key, one in zip(("month1", "month2", "year"), climate, strict=True)
        },
    }
    return values, info


def _day(rng: np.random.Generator, place: Place) -> sensors.Day:
    """A date, and a level by the rule of the supplement (A.1): L2A is not everywhere before December 2018."""
    year, month = int(rng.integers(_YEARS[0], _YEARS[1] + 1)), int(rng.integers(1, 13))
    day = int(rng.integers(1, monthrange(year, month)[1] + 1))
    european = 35 < place.lat < 70 and -15 < place.lon < 40
    wanted = S2_TYPES[int(rng.integers(2))]
    return sensors.Day(year, month, day, wanted if (year, month) >= (2018, 12) or european else "l1c")


def _utm_zone(lon: float) -> int:
    return int((lon + 180) // 6) % 60 + 1


def _write_samples(
    path: Path, info_path: Path, samples: int, side: int, seed: int, progress: Progress | None
) -> dict[str, Any]:
    """The HDF5 file and tile_info.json; gives the contents of band_stats.json."""
    world = World(seed)
    sums: dict[str, _Sums] = {
        key: _Sums(len(data_set.file_bands)) for data_set in DATA_SETS.values() for key in data_set.statistics
    }
    with h5py.File(path, "w") as file, info_path.open("w", encoding="utf-8") as infos:
        for name, data_set in DATA_SETS.items():
            shape = data_set.file_shape(side, side)
            file.create_dataset(name, (samples, *shape), data_set.dtype, chunks=(1, *shape), compression="gzip")
        metadata = file.create_dataset("metadata", (samples,), METADATA, chunks=(1,), compression="gzip")
        infos.write("{")
        for number in range(samples):
            values, info = sample(world, seed, number, side)
            for name, data_set in DATA_SETS.items():
                file[name][number] = values[name]
                if data_set.statistics:
                    sums[data_set.statistics_key(info["S2_type"])].add(without_missing(data_set, values[name]))
            metadata[number] = (str(number), info["S2_type"])
            infos.write(f"{',' if number else ''}\n{json.dumps(str(number))}: {json.dumps(info)}")
            if progress and (number % 10 == 9 or number + 1 == samples):
                progress(number + 1, samples)
        infos.write("\n}\n")
    return {key: one.numbers() for key, one in sums.items()}


@dataclass
class _Sums:
    """Running sums of a modality's bands."""

    bands: int
    count: npt.NDArray[np.float64] = field(init=False)

    def __post_init__(self) -> None:
        self.count, self._sum, self._squares = (np.zeros(self.bands) for _ in range(3))
        self._min, self._max = np.full(self.bands, np.inf), np.full(self.bands, -np.inf)

    def add(self, values: npt.NDArray[Any]) -> None:
        """Values (bands, ...) of a sample, NaN where missing."""
        flat = values.reshape(self.bands, -1).astype(np.float64)
        self.count += np.isfinite(flat).sum(axis=1)
        self._sum += np.nansum(flat, axis=1)
        self._squares += np.nansum(flat**2, axis=1)
        self._min = np.minimum(self._min, np.where(np.isnan(flat), np.inf, flat).min(axis=1))
        self._max = np.maximum(self._max, np.where(np.isnan(flat), -np.inf, flat).max(axis=1))

    def numbers(self) -> dict[str, list[float | None]]:
        """Mean, standard deviation, least and greatest; null for a band without values."""
        some = np.maximum(self.count, 1)
        mean = self._sum / some
        spread = np.sqrt(np.maximum(self._squares / some - mean**2, 0))
        columns = {"mean": mean, "std": spread, "min": self._min, "max": self._max}
        return {
            what: [float(x) if n else None for x, n in zip(column, self.count, strict=True)]
            for what, column in columns.items()
        }


@contextmanager
def _made_elsewhere(store: Store) -> Iterator[Path]:
    """A folder for unfinished files: on the same disk as a local store, so that they need not be copied."""
    if not store.is_local:
        with tempfile.TemporaryDirectory() as name:
            yield Path(name)
        return
    made = Path(store.path(f".generate.{secrets.token_hex(8)}.tmp"))
    made.mkdir(parents=True)
    try:
        yield made
    finally:
        shutil.rmtree(made, ignore_errors=True)


def _move(store: Store, name: str, path: Path) -> bool:
    """Bring a finished file into the store; false where one of that name has come to be there."""
    if not store.is_local:
        return store.create_from(name, path)
    try:
        os.link(path, store.path(name))
    except FileExistsError:
        return False
    return True

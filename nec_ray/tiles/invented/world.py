"""Where a sample lies: its height, its climate through the year, its biome and ecoregion."""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from nec_ray.tiles.modalities import BIOMES, ECO_REGIONS

Floats = npt.NDArray[np.float64]

_SOUTH, _NORTH = -56, 78  # of land that satellites map
_CANDIDATES = 256
_TERMS = 24
_LAPSE = 6.5e-3
"""Degrees a metre by which air is colder higher up."""
_MONTHS = np.arange(1, 13)
_TROPICAL = 18
(
    _TUNDRA,
    _RAINFOREST,
    _MEDITERRANEAN,
    _DESERT,
    _STEPPE,
    _TAIGA,
    _CONIFER,
    _BROADLEAF,
    _MONTANE,
    _MANGROVES,
    _FLOODED,
    _SAVANNA,
    _DRY_FOREST,
    _PINES,
) = range(len(BIOMES))


@dataclass(frozen=True)
class Place:
    """One location."""

    lat: float
    lon: float
    elevation: float
    """Metres, of its surroundings."""
    relief: float
    """Standard deviation of the height over 1.28 km, metres."""
    temperature: Floats
    """(12,) mean of each month from January, degrees Celsius, at `elevation`."""
    rain: Floats
    """(12,) mm a month."""
    people: float
    """0 (wilderness) to 1."""
    biome: int
    eco_region: int

    @property
    def warmest(self) -> float:
        """Mean of the warmest month, degrees Celsius."""
        return float(self.temperature.max())

    def at_height(self, height: Floats) -> Floats:
        """Degrees by which it is warmer at a height than at `elevation`."""
        return -_LAPSE * (height - self.elevation)


class _Field:
    """A smooth random function on the sphere, of mean 0 and variance 1."""

    def __init__(self, rng: np.random.Generator, frequency: float) -> None:
        self._waves = rng.normal(size=(_TERMS, 3)) * frequency
        self._phases = rng.uniform(0, 2 * np.pi, _TERMS)

    def __call__(self, points: Floats) -> Floats:
        waves: Floats = np.cos(points @ self._waves.T + self._phases).sum(axis=1) * np.sqrt(2 / _TERMS)
        return waves


class World:
    """A planet, decided by a seed."""

    def __init__(self, seed: int) -> None:
        rng = np.random.default_rng(seed)
        frequencies = {"mountains": 4, "rough": 14, "wet": 3, "coast": 9, "flood": 9, "people": 12, "winter_rain": 4}
        self._fields = {name: _Field(rng, frequency) for name, frequency in frequencies.items()}

    def place(self, rng: np.random.Generator) -> Place:
        """A random location, chosen so that all biomes are about equally frequent, as in MMEarth."""
        wanted = rng.integers(len(BIOMES))
        lon = rng.uniform(-180, 180, _CANDIDATES)
        low, high = np.sin(np.radians([_SOUTH, _NORTH]))
        lat = np.degrees(np.arcsin(rng.uniform(low, high, _CANDIDATES)))
        elevation, relief, temperature, rain, people, biome = self._facts(lat, lon)
        i = int(np.argmax(biome == wanted))
        return Place(
            float(lat[i]),
            float(lon[i]),
            float(elevation[i]),
            float(relief[i]),
            temperature[i],
            rain[i],
            float(people[i]),
            int(biome[i]),
            _eco_region(int(biome[i]), float(lat[i]), float(lon[i])),
        )

    def _facts(self, lat: Floats, lon: Floats) -> tuple[Floats, Floats, Floats, Floats, Floats, npt.NDArray[np.int64]]:
        phi, theta = np.radians(lat), np.radians(lon)
        points = np.stack([np.cos(phi) * np.cos(theta), np.cos(phi) * np.sin(theta), np.sin(phi)], axis=1)
        field = {name: f(points) for name, f in self._fields.items()}
        coastal = field["coast"] > 1
        elevation = 60 + 120 * np.exp(0.8 * field["rough"]) + 1600 * np.clip(field["mountains"] - 0.4, 0, None) ** 1.5
        elevation = np.where(coastal, 8 + 4 * np.tanh(field["rough"]), elevation)
        relief = np.where(coastal, 3, 4 + 0.04 * elevation)

        mean = 27.5 - 0.0078 * lat**2 - _LAPSE * elevation
        swing = 0.3 * np.abs(lat) * (1 - 0.3 * np.tanh(field["coast"]))
        summer = np.where(lat >= 0, 7, 1)
        wave = np.cos(2 * np.pi * (_MONTHS - summer[:, None]) / 12)
        temperature = mean[:, None] + swing[:, None] * wave

        away = np.abs(lat)
        belts = 1900 * np.exp(-((lat / 13) ** 2)) + 750 * np.exp(-(((away - 50) / 16) ** 2)) + 120
        annual = belts * np.exp(0.7 * field["wet"])
        subtropical = np.exp(-(((away - 36) / 8) ** 2))
        winter_wet = subtropical * (field["winter_rain"] > -0.3)
        monsoon = 0.9 * (1 - np.exp(-((lat / 7) ** 2))) * np.exp(-((away / 25) ** 4))
        season = 1 + (monsoon - 0.85 * winter_wet)[:, None] * wave
        rain = annual[:, None] / 12 * np.clip(season, 0.03, None)

        people = 1 / (1 + np.exp(-1.5 * (field["people"] - 0.6))) * np.clip((mean + 2) / 10, 0, 1) * (elevation < 2500)
        biome = np.select(
            [
                coastal & (mean > 20),
                (field["flood"] > 1.1) & (elevation < 600) & (mean > 8),
                (elevation > 2000) & (mean > -6) & (mean < 13),
                mean < -5,
                annual < 120 + 9 * np.clip(mean, 0, None),
                mean < 3,
                (mean < _TROPICAL) & (mean > 9) & (winter_wet > 0.4),
                (mean < _TROPICAL) & (elevation > 900),
                (mean < _TROPICAL) & (annual < 520),
                mean < _TROPICAL,
                elevation > 900,
                annual > 1650,
                annual > 1050,
            ],
            [
                _MANGROVES,
                _FLOODED,
                _MONTANE,
                _TUNDRA,
                _DESERT,
                _TAIGA,
                _MEDITERRANEAN,
                _CONIFER,
                _STEPPE,
                _BROADLEAF,
                _PINES,
                _RAINFOREST,
                _DRY_FOREST,
            ],
            _SAVANNA,
        )
        return elevation, relief, temperature, rain, people, biome


def eco_regions(biome: int) -> range:
    """Numbers of the ecoregions of a biome: an invention, as the regions are; each lies in one biome."""
    bounds = [ECO_REGIONS * i // len(BIOMES) for i in range(len(BIOMES) + 1)]
    return range(bounds[biome], bounds[biome + 1])


def _eco_region(biome: int, lat: float, lon: float) -> int:
    """Stripes of longitude, north and south of the equator."""
    own = eco_regions(biome)
    share = ((lon + 180) / 360 + (lat >= 0)) / 2
    return own[min(int(share * len(own)), len(own) - 1)]

"""What lies on the ground of a sample: terrain, land cover, vegetation."""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from nec_ray.tiles.invented.world import Place
from nec_ray.tiles.modalities import BIOMES

Floats = npt.NDArray[np.float64]
Map = npt.NDArray[np.int64]

PIXEL_M = 10
TREES, SHRUBS, GRASS, CROPS, BUILT, BARE, SNOW, WATER, WETLAND, MANGROVES, MOSS = range(11)
"""Classes of WorldCover, in the order of its class numbers."""
_DENSITY = (0.14, 0.92, 0.48, 0.06, 0.34, 0.7, 0.7, 0.68, 0.3, 0.8, 0.4, 0.42, 0.64, 0.68)
"""How much vegetation a biome bears, 0 to 1."""
_TUNDRA, _MANGROVE_BIOME, _FLOODED_BIOME = (
    BIOMES.index(name) for name in ("Tundra", "Mangroves", "Flooded Grasslands & Savannas")
)
_STEEPEST_FIELD, _STEEPEST_TOWN = 8, 14  # degrees
_WHOLE = 128  # pixels that `Place.relief` is over


@dataclass(frozen=True)
class Landscape:
    """Maps (rows, columns) of a sample, north up."""

    height: Floats
    """Metres."""
    slope: Floats
    """Degrees."""
    east: Floats
    """Rise towards the east, metres a metre."""
    north: Floats
    """Rise towards the north."""
    moisture: Floats
    """Of the soil, about -2 to 2."""
    density: Floats
    """Of vegetation, 0 to 1, in its best season."""
    cover: Map
    """Class numbers of WorldCover."""
    canopy: Floats
    """Height of the vegetation, metres."""
    vigour: Floats
    """Of crops, 0 to 1, field by field."""


def fractal(rng: np.random.Generator, side: int, steepness: float) -> Floats:
    """A random map of mean 0 and variance 1 whose power falls with the frequency to this power."""
    rows, columns = np.fft.fftfreq(side)[:, None], np.fft.rfftfreq(side)[None]
    frequency = np.hypot(rows, columns)
    frequency[0, 0] = np.inf
    noise = np.fft.rfft2(rng.normal(size=(side, side)))
    field = np.fft.irfft2(noise * frequency ** (-steepness / 2), s=(side, side))
    made: Floats = (field - field.mean()) / max(float(field.std()), 1e-12)
    return made


def landscape(rng: np.random.Generator, place: Place, side: int) -> Landscape:
    """The ground of a place, `side` pixels of 10 m a side."""
    shape = fractal(rng, side, 4)
    height = np.maximum(place.elevation + place.relief * np.sqrt(side / _WHOLE) * shape, 0)
    moisture = -0.7 * shape + 0.6 * fractal(rng, side, 2.5) + 0.5 * np.log(place.rain.sum() / 700)

    wet = 0.03 + 0.3 * (place.biome == _FLOODED_BIOME) + 0.25 * (place.biome == _MANGROVE_BIOME)
    share = min(wet * rng.lognormal(0, 0.8) * min(place.rain.sum() / 800, 2), 0.7)
    level = np.quantile(height, share) if share > 0.02 else -1.0
    water = height < level
    height = np.where(water, level, height)  # lakes are flat

    to_south, east = np.gradient(height, PIXEL_M)
    slope = np.degrees(np.arctan(np.hypot(to_south, east)))
    warmest = place.warmest + place.at_height(height)
    density = _DENSITY[place.biome] + 0.09 * moisture + 0.07 * fractal(rng, side, 2) - 0.003 * slope
    density = np.clip(density - 0.1 * np.clip(10 - warmest, 0, None) * (place.biome != _TUNDRA), 0, 1)

    cover = np.select([density > 0.58, density > 0.46, density > 0.2], [TREES, SHRUBS, GRASS], BARE)
    if place.biome == _TUNDRA:
        cover = np.where((cover == BARE) & (density > 0.1), MOSS, np.where(cover == TREES, SHRUBS, cover))
    if place.biome == _FLOODED_BIOME:
        cover = np.where(moisture > np.quantile(moisture, 0.7), WETLAND, cover)
    if place.biome == _MANGROVE_BIOME:
        cover = np.where((cover == TREES) & (height < np.quantile(height, 0.8)), MANGROVES, cover)
    tilled, vigour = _fields(rng, side, place.people)
    cover = np.where(tilled & (slope < _STEEPEST_FIELD) & (density > 0.18), CROPS, cover)
    town = fractal(rng, side, 2.2) > 2.6 - 2.2 * place.people
    cover = np.where(town & (slope < _STEEPEST_TOWN) & (place.people > 0.25), BUILT, cover)
    cover = np.where(warmest < 3, SNOW, cover)
    cover = np.where(water, WATER, cover)

    grown = (5 + 55 * np.clip(density - 0.55, 0, 0.5)) * np.exp(0.12 * rng.normal(size=height.shape))
    tall = {TREES: grown, MANGROVES: 0.5 * grown, SHRUBS: np.full_like(grown, 2), BUILT: np.full_like(grown, 1)}
    canopy = np.select([cover == kind for kind in tall], list(tall.values()), 0.0)
    return Landscape(height, slope, east, -to_south, moisture, density, cover, canopy, vigour)


def _fields(rng: np.random.Generator, side: int, people: float) -> tuple[npt.NDArray[np.bool_], Floats]:
    """Which pixels are tilled, and the vigour of each field: rectangles, turned by a random angle."""
    turn = rng.uniform(0, np.pi / 2)
    rows, columns = np.mgrid[:side, :side].astype(np.float64)
    along, across = (
        rows * np.cos(turn) + columns * np.sin(turn) + 2 * side,
        columns * np.cos(turn) - rows * np.sin(turn) + 2 * side,
    )
    long, wide = rng.uniform(8, 30), rng.uniform(5, 20)
    i, j = (along / long).astype(np.int64), (across / wide).astype(np.int64)
    count = int(max(i.max(), j.max())) + 1
    tilled, vigour = rng.random((count, count)) < 0.9 * people, rng.uniform(0.2, 1, (count, count))
    return tilled[i, j], vigour[i, j]

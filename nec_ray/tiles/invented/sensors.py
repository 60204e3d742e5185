"""What satellites and maps see of a landscape on a day, as a file of MMEarth's holds it."""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from nec_ray.tiles.invented.landscape import (
    BARE,
    BUILT,
    CROPS,
    GRASS,
    MANGROVES,
    MOSS,
    SHRUBS,
    SNOW,
    TREES,
    WATER,
    WETLAND,
    Floats,
    Landscape,
    fractal,
)
from nec_ray.tiles.invented.world import Place
from nec_ray.tiles.modalities import BIOMES, MODALITIES, QUALITY, SENTINEL2_BANDS

Raw = npt.NDArray[np.generic]
_MISSING = {name: one.gap for name, one in {**MODALITIES, **QUALITY}.items()}

# Reflectance of pure surfaces, in the file's order of bands.
_LEAVES = (0.02, 0.025, 0.06, 0.03, 0.09, 0.28, 0.35, 0.40, 0.38, 0.41, 0.010, 0.18, 0.08)
_STRAW = (0.06, 0.075, 0.11, 0.14, 0.18, 0.21, 0.23, 0.27, 0.25, 0.28, 0.010, 0.33, 0.23)
_SOIL = (0.08, 0.100, 0.14, 0.19, 0.22, 0.24, 0.26, 0.28, 0.27, 0.29, 0.010, 0.34, 0.29)
_WATER = (0.05, 0.045, 0.04, 0.025, 0.02, 0.012, 0.01, 0.008, 0.01, 0.007, 0.001, 0.004, 0.003)
_SNOW = (0.90, 0.90, 0.90, 0.89, 0.88, 0.86, 0.84, 0.80, 0.82, 0.76, 0.020, 0.10, 0.07)
_ROOFS = (0.14, 0.16, 0.18, 0.20, 0.21, 0.22, 0.23, 0.25, 0.24, 0.25, 0.010, 0.26, 0.24)
_CLOUD = (0.72, 0.72, 0.70, 0.70, 0.71, 0.71, 0.71, 0.70, 0.70, 0.66, 0.030, 0.55, 0.45)
_HAZE = (0.10, 0.075, 0.045, 0.028, 0.022, 0.018, 0.014, 0.009, 0.011, 0.008, 0.001, 0.003, 0.002)
_AIR = (0.85, 0.88, 0.91, 0.93, 0.93, 0.94, 0.95, 0.95, 0.95, 0.45, 0.05, 0.96, 0.95)
"""Share of the light that the air lets through, both ways."""
_RESOLUTION = {"B1": 6, "B9": 6, "B10": 6, "B5": 2, "B6": 2, "B7": 2, "B8A": 2, "B11": 2, "B12": 2}
"""Pixels of 10 m that one of a band's own is wide, where that is not one."""

_LEAVES_ALWAYS = {TREES: 0.25, SHRUBS: 0.2, GRASS: 0.12, CROPS: 0.05, WETLAND: 0.25, MANGROVES: 0.8, MOSS: 0.15}
_LEAVES_IN_SEASON = {TREES: 0.7, SHRUBS: 0.4, GRASS: 0.6, CROPS: 0.85, WETLAND: 0.5, MANGROVES: 0.15, MOSS: 0.25}
_EVERGREEN = tuple(
    BIOMES.index(name)
    for name in (
        "Tropical & Subtropical Moist Broadleaf Forests",
        "Boreal Forests/Taiga",
        "Temperate Conifer Forests",
        "Tropical & Subtropical Coniferous Forests",
        "Mediterranean Forests, Woodlands & Scrub",
    )
)

# By class of WorldCover, decibels: VV, and VH below it.
_VV = (-8.0, -11.0, -12.5, -11.5, -3.0, -15.0, -13.0, -21.0, -10.0, -8.0, -13.0)
_VH_BELOW = (5.5, 7.0, 8.0, 7.5, 8.0, 10.0, 8.0, 7.0, 7.0, 5.5, 9.0)
_LOOKS = 4.4  # of a ground-range product: how strong its speckle is
_POLAR = 66  # degrees from which Sentinel-1 sends horizontally
_FACING = 10  # decibels a unit of slope towards the radar

_COVER_VALUES = np.array(MODALITIES["esa_worldcover"].class_values, np.uint8)
_DYNAMIC_VALUES = np.array(
    [
        dict(zip(MODALITIES["dynamic_world"].class_names, MODALITIES["dynamic_world"].class_values, strict=True))[name]
        for name in (
            *("trees", "shrub and scrub", "grass", "crops", "built", "bare", "snow and ice", "water"),
            *("flooded vegetation", "trees", "shrub and scrub"),
        )
    ],
    np.uint8,
)
"""Of Dynamic World, for each class of WorldCover."""
_DISAGREEMENT = 1.9
"""Where a random map is higher than this, Dynamic World errs: 3 of 100 pixels."""
_KELVIN = 273.15

# Chances, a sample.
_CLOUDY = 0.2
_S2_GAP = 0.02
_S1_MISSING = 0.12  # an orbit
_S1_GAP = 0.05
_DW_MISSING = 0.01
_CANOPY_MISSING = 0.03
_ASTER_MISSING = 0.01
_COVER_MISSING = 0.005
_ERA5_MISSING = 0.02


@dataclass(frozen=True)
class Day:
    """When Sentinel-2 sees a place, and how its image is processed."""

    year: int
    month: int
    day: int
    s2_type: str


def leaves(place: Place, land: Landscape, month: int) -> Floats:
    """Share of the ground that green leaves hide in a month, 0 to 1."""
    warm = 1 / (1 + np.exp(-(place.temperature[month - 1] - 7) / 2.5))
    rain = (place.rain[month - 1] + place.rain[month - 2]) / 2
    season = warm / (1 + np.exp(-(rain - 30) / 12))
    share = np.zeros_like(land.density)
    for kind, always in _LEAVES_ALWAYS.items():
        evergreen = 0.5 if kind == TREES and place.biome in _EVERGREEN else 0.0
        grown = always + evergreen + (_LEAVES_IN_SEASON[kind] - evergreen) * season
        share = np.where(land.cover == kind, grown, share)
    share = np.where(land.cover == CROPS, share * land.vigour, share * (0.4 + 0.6 * land.density))
    share = np.where(land.cover == BUILT, 0.1, np.where(land.cover == BARE, 0.04, share))
    return np.clip(share, 0, 1)


def snow(place: Place, land: Landscape, month: int) -> Floats:
    """Share of the ground that snow hides in a month, 0 to 1."""
    cold = place.temperature[month - 1] + place.at_height(land.height)
    share = 1 / (1 + np.exp((cold + 2) / 1.2))
    share = np.where((land.cover == TREES) | (land.cover == MANGROVES), 0.4 * share, share)
    return np.where(land.cover == SNOW, np.maximum(share, 0.9), share)


def sentinel2(rng: np.random.Generator, place: Place, land: Landscape, day: Day) -> dict[str, Raw]:
    """Image, cloud mask, cloud probability and scene classification."""
    side = len(land.height)
    green, white = leaves(place, land, day.month), snow(place, land, day.month)
    dry = np.isin(land.cover, (GRASS, CROPS, SHRUBS, WETLAND, MOSS, TREES))
    wet = 1 - 0.12 * np.clip(land.moisture, -1, 2)
    ground = np.where(dry[None], _column(_STRAW), _column(_SOIL) * wet)
    ground = np.where(land.cover == BUILT, _column(_ROOFS) * (1 + 0.25 * rng.normal(size=(side, side))), ground)
    seen = green * _column(_LEAVES) + (1 - green) * ground
    seen = np.where(land.cover == WATER, _column(_WATER), seen)
    seen = white * _column(_SNOW) + (1 - white) * seen
    seen *= np.where((land.cover == WATER) & (white < 0.5), 1, _light(place, land, day.month))

    if day.s2_type == "l1c":
        seen = seen * _column(_AIR) + _column(_HAZE)
    cloud, shadow = _clouds(rng, side)
    seen = seen * (1 - 0.55 * shadow)
    seen = cloud * _column(_CLOUD) + (1 - cloud) * seen
    seen *= 1 + 0.015 * rng.normal(size=seen.shape)
    for band, wide in _RESOLUTION.items():
        i = SENTINEL2_BANDS.index(band)
        coarse = seen[i, ::wide, ::wide].repeat(wide, axis=0).repeat(wide, axis=1)
        seen[i] = coarse[:side, :side]
    image = np.clip(np.rint(1e4 * seen), 1, 20_000).astype(np.uint16)
    gone = _beyond(rng, side) if rng.random() < _S2_GAP else np.zeros((side, side), bool)
    image[:, gone] = _MISSING["sentinel2"]

    mask = np.where(cloud > 0.6, 1024, 0).astype(np.uint16)
    if day.s2_type == "l1c":
        probability, classes = (
            np.full((side, side), _MISSING[name]) for name in ("sentinel2_cloudprod", "sentinel2_scl")
        )
    else:
        image[SENTINEL2_BANDS.index("B10")] = 0
        probability = np.rint(100 * cloud).astype(np.uint16)
        kinds = [gone, cloud > 0.8, cloud > 0.4, shadow > 0.4, white > 0.5, land.cover == WATER, green > 0.35]
        classes = np.select(kinds, [0, 9, 8, 3, 11, 6, 4], 5).astype(np.uint8)
    return {
        "sentinel2": image,
        "sentinel2_cloudmask": mask[None],
        "sentinel2_cloudprod": probability[None],
        "sentinel2_scl": classes[None],
    }


def sentinel1(rng: np.random.Generator, place: Place, land: Landscape) -> tuple[Raw, dict[str, list[str] | None]]:
    """Backscatter (8, rows, columns), decibels, and the bands of each orbit."""
    side = len(land.height)
    image = np.full((8, side, side), _MISSING["sentinel1"])
    bands: dict[str, list[str] | None] = {"sentinel1_asc": None, "sentinel1_desc": None}
    soil = np.isin(land.cover, (GRASS, CROPS, BARE, MOSS, SHRUBS))
    own = np.array(_VV)[land.cover] + 1.3 * soil * np.clip(land.moisture, -2, 2)
    crossed = own - np.array(_VH_BELOW)[land.cover] + 1.5 * (land.density - 0.5) * (land.cover == TREES)
    polar = abs(place.lat) > _POLAR
    for orbit, first, facing in (("asc", 0, 1), ("desc", 4, -1)):
        missing, gap = rng.random(2) < (_S1_MISSING, _S1_GAP)
        if missing:
            continue
        towards = np.clip(_FACING * facing * land.east, -6, 6)  # ascending it looks to the east
        gone = _beyond(rng, side) if gap else None
        for i, strength in zip((2, 3) if polar else (0, 1), (own, crossed), strict=True):
            speckle = 10 * np.log10(rng.gamma(_LOOKS, 1 / _LOOKS, (side, side)))
            image[first + i] = strength + towards + speckle
            if gone is not None:
                image[first + i, gone] = _MISSING["sentinel1"]
        bands[f"sentinel1_{orbit}"] = ["HH", "HV"] if polar else ["VV", "VH"]
    return image, bands


def terrain(rng: np.random.Generator, land: Landscape) -> Raw:
    """Elevation (metres) and slope (degrees)."""
    if rng.random() < _ASTER_MISSING:
        return np.full((2, *land.height.shape), _MISSING["aster"])
    return np.rint(np.stack([land.height, land.slope])).astype(np.int16)


def canopy(rng: np.random.Generator, land: Landscape) -> Raw:
    """Height of the vegetation and its standard deviation, metres."""
    if rng.random() < _CANOPY_MISSING:
        return np.full((2, *land.height.shape), _MISSING["canopy_height_eth"])
    spread = 1.5 + 0.15 * land.canopy + 0.4 * np.abs(rng.normal(size=land.canopy.shape))
    height = np.clip(land.canopy + 0.3 * spread * rng.normal(size=land.canopy.shape), 0, 60)
    both = np.rint(np.stack([np.where(land.canopy > 0, height, 0), spread])).astype(np.int8)
    both[:, land.cover == WATER] = _MISSING["canopy_height_eth"]
    return both


def land_cover(rng: np.random.Generator, land: Landscape) -> tuple[Raw, Raw]:
    """Dynamic World and WorldCover, (1, rows, columns) each; they are of one land and mostly agree."""
    side = len(land.height)
    world_cover = _COVER_VALUES[land.cover][None]
    wrong = fractal(rng, side, 2) > _DISAGREEMENT
    shifted = np.roll(land.cover, side // 3 + 1, axis=(0, 1))
    dynamic_world = _DYNAMIC_VALUES[np.where(wrong, shifted, land.cover)][None]
    dynamic_missing, cover_missing = rng.random(2) < (_DW_MISSING, _COVER_MISSING)
    return (
        np.full_like(dynamic_world, _MISSING["dynamic_world"]) if dynamic_missing else dynamic_world,
        np.full_like(world_cover, _MISSING["esa_worldcover"]) if cover_missing else world_cover,
    )


def climate(rng: np.random.Generator, place: Place, land: Landscape, month: int) -> list[list[float]]:
    """Previous month, month and year before: mean, least and greatest temperature (K), and precipitation (m)."""
    if rng.random() < _ERA5_MISSING:
        return [[_MISSING["era5"].item()] * 4] * 3
    warmer = place.temperature + place.at_height(np.array(land.height.mean())) + rng.normal(0, 1, 12) + _KELVIN
    rain = place.rain * rng.lognormal(0, 0.2, 12) / 1000
    months = [[warmer[m], warmer[m] - 6, warmer[m] + 7, rain[m]] for m in range(12)]
    year = [warmer.mean(), warmer.min() - 6, warmer.max() + 7, rain.sum()]
    return [[float(x) for x in one] for one in (months[month - 2], months[month - 1], year)]


def _light(place: Place, land: Landscape, month: int) -> Floats:
    """How much more light slopes get than flat ground, at half past ten."""
    declination = np.radians(-23.44 * np.cos(2 * np.pi * (month + 0.3) / 12))
    phi, hour = np.radians(place.lat), np.radians(-22.5)
    up = np.sin(phi) * np.sin(declination) + np.cos(phi) * np.cos(declination) * np.cos(hour)
    east = -np.cos(declination) * np.sin(hour)
    north = np.cos(phi) * np.sin(declination) - np.sin(phi) * np.cos(declination) * np.cos(hour)
    up = max(float(up), 0.25)  # nobody keeps images of polar nights
    towards = (up - east * land.east - north * land.north) / np.sqrt(1 + land.east**2 + land.north**2)
    return np.clip(towards / up, 0.35, 1.6)


def _clouds(rng: np.random.Generator, side: int) -> tuple[Floats, Floats]:
    """How thick clouds are and how dark their shadows, 0 to 1."""
    if rng.random() >= _CLOUDY:
        return np.zeros((side, side)), np.zeros((side, side))
    thick = np.clip((fractal(rng, side, 3) - rng.uniform(0.5, 2)) * 1.5, 0, 1)
    below = np.roll(thick, (-side // 10, -side // 16), axis=(0, 1))
    return thick, np.where(thick < 0.3, below, 0.0)


def _beyond(rng: np.random.Generator, side: int) -> npt.NDArray[np.bool_]:
    """Pixels beyond the edge of a swath, which is a slanting line."""
    rows, columns = np.mgrid[:side, :side] / side - 0.5
    angle, away = rng.uniform(0, 2 * np.pi), rng.uniform(0, 0.4)
    return np.asarray(columns * np.cos(angle) + 0.3 * rows * np.sin(angle) > away * abs(np.cos(angle)), np.bool_)


def _column(spectrum: tuple[float, ...]) -> Floats:
    return np.array(spectrum)[:, None, None]

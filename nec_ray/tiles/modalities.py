"""The twelve modalities of MMEarth as data (MMEarth, table 1 and supplement A.1; `MODALITIES.py` of MMEarth-train).

Names, orders and numbers are the published ones, so that checkpoints and files fit. Where the file cannot hold the
value that stands for a missing one (255 in int8, -inf in int16), what HDF5 stores in its place counts as missing too.
"""

from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt


@dataclass(frozen=True)
class Modality:
    """One data product of a sample: how a file holds it, and what a reader makes of it.

    Continuous ones become float32 with NaN where a value is missing, (bands, rows, columns) or (bands,); categorical
    ones int64 class numbers with -1 where missing, (1, rows, columns) or ().
    """

    name: str
    """The data set's name in the file."""
    level: Literal["pixel", "image"]
    kind: Literal["continuous", "categorical"]
    bands: tuple[str, ...]
    """That a reader gives, in order; of a categorical one its single name."""
    dtype: str
    """Numpy name of the file's numbers."""
    missing: tuple[float, ...] = ()
    """Values in the file that stand for a missing one; NaN and infinities always do."""
    classes: int = 0
    """0 for a continuous one."""
    class_values: tuple[int, ...] = ()
    """Value in the file of each class; any other is missing. Empty for a one-hot vector."""
    class_names: tuple[str, ...] = ()
    """Where the classes are few enough to be named."""
    stored: tuple[str, ...] = ()
    """Bands of the file, in order, where they are not `bands`."""
    period: float | None = None
    """Of a cyclic encoding: sin(2 pi x / period), then cos."""
    statistics: tuple[str, ...] = ()
    """Keys of band_stats.json: two where the processing levels of Sentinel-2 have their own."""

    @property
    def one_hot(self) -> bool:
        """Whether the file holds a vector with a 1 for the class."""
        return self.kind == "categorical" and not self.class_values

    @property
    def file_bands(self) -> tuple[str, ...]:
        """Bands of the file, in order."""
        return self.stored or self.bands

    @property
    def taken(self) -> tuple[int, ...]:
        """Place in the file of each of `bands`."""
        return tuple(self.file_bands.index(band) for band in self.bands)

    @property
    def channels(self) -> int:
        """Of a network's output: one a class, or one a band."""
        return self.classes or len(self.bands)

    @property
    def gap(self) -> np.generic:
        """The first of `missing` that the file's numbers can hold."""
        kind = np.dtype(self.dtype)
        least, most = (-np.inf, np.inf) if kind.kind == "f" else (np.iinfo(kind).min, np.iinfo(kind).max)
        held: np.generic = next(kind.type(one) for one in self.missing if np.isnan(one) or least <= one <= most)
        return held

    def file_shape(self, height: int, width: int) -> tuple[int, ...]:
        """Of one sample in a file whose images have this size."""
        first = self.classes if self.one_hot else len(self.file_bands)
        return (first, height, width) if self.level == "pixel" else (first,)

    def shape(self, height: int, width: int) -> tuple[int, ...]:
        """Of one sample that a reader gives."""
        if self.one_hot:
            return ()
        return (len(self.bands), height, width) if self.level == "pixel" else (len(self.bands),)

    def statistics_key(self, s2_type: str) -> str:
        """Key of band_stats.json for a sample whose Sentinel-2 image is of this processing level (l1c or l2a)."""
        return self.statistics[0] if len(self.statistics) == 1 else f"{self.name}_{s2_type}"


SENTINEL2_BANDS = ("B1", "B2", "B3", "B4", "B5", "B6", "B7", "B8A", "B8", "B9", "B10", "B11", "B12")
"""In the file's order: B8A before B8. B10 is 0 in L2A."""
S2_TYPES = ("l1c", "l2a")
"""Processing levels of Sentinel-2: reflectance above the atmosphere, and below it."""

BIOMES = (
    "Tundra",
    "Tropical & Subtropical Moist Broadleaf Forests",
    "Mediterranean Forests, Woodlands & Scrub",
    "Deserts & Xeric Shrublands",
    "Temperate Grasslands, Savannas & Shrublands",
    "Boreal Forests/Taiga",
    "Temperate Conifer Forests",
    "Temperate Broadleaf & Mixed Forests",
    "Montane Grasslands & Shrublands",
    "Mangroves",
    "Flooded Grasslands & Savannas",
    "Tropical & Subtropical Grasslands, Savannas & Shrublands",
    "Tropical & Subtropical Dry Broadleaf Forests",
    "Tropical & Subtropical Coniferous Forests",
)
"""Of RESOLVE's ecoregions, in MMEarth's numbering."""
ECO_REGIONS = 846

_WORLD_COVER = {
    10: "tree cover",
    20: "shrubland",
    30: "grassland",
    40: "cropland",
    50: "built-up",
    60: "bare or sparse vegetation",
    70: "snow and ice",
    80: "permanent water",
    90: "herbaceous wetland",
    95: "mangroves",
    100: "moss and lichen",
}
# The product's own numbers run from 0; MMEarth adds one, since 0 is missing there (supplement, A.1).
_DYNAMIC_WORLD = dict(
    enumerate(
        (
            "water",
            "trees",
            "grass",
            "flooded vegetation",
            "crops",
            "shrub and scrub",
            "built",
            "bare",
            "snow and ice",
        ),
        start=1,
    )
)
_ERA5 = ("avg_temp", "min_temp", "max_temp", "total_precip")

_ALL = (
    Modality(
        "sentinel2",
        "pixel",
        "continuous",
        tuple(band for band in SENTINEL2_BANDS if band != "B10"),
        "uint16",
        missing=(0,),
        stored=SENTINEL2_BANDS,
        statistics=tuple(f"sentinel2_{kind}" for kind in S2_TYPES),
    ),
    Modality(
        "sentinel1",
        "pixel",
        "continuous",
        tuple(f"{orbit}_{polarisation}" for orbit in ("asc", "desc") for polarisation in ("VV", "VH", "HH", "HV")),
        "float32",
        missing=(-np.inf,),
        statistics=("sentinel1",),
    ),
    Modality(
        "aster",
        "pixel",
        "continuous",
        ("elevation", "slope"),
        "int16",
        missing=(-np.inf, -32768),
        statistics=("aster",),
    ),
    Modality(
        "era5",
        "image",
        "continuous",
        tuple(f"{period}_{what}" for period in ("prev_month", "curr_month", "year") for what in _ERA5),
        "float32",
        missing=(np.nan,),
        statistics=("era5",),
    ),
    Modality(
        "dynamic_world",
        "pixel",
        "categorical",
        ("landcover",),
        "uint8",
        missing=(0,),
        classes=9,
        class_values=tuple(_DYNAMIC_WORLD),
        class_names=tuple(_DYNAMIC_WORLD.values()),
    ),
    Modality(
        "canopy_height_eth",
        "pixel",
        "continuous",
        ("height", "std"),
        "int8",
        missing=(255, 127),
        statistics=("canopy_height_eth",),
    ),
    Modality(
        "lat",
        "image",
        "continuous",
        ("sin", "cos"),
        "float32",
        missing=(-np.inf,),
        period=360,
        statistics=("lat",),
    ),
    Modality(
        "lon",
        "image",
        "continuous",
        ("sin", "cos"),
        "float32",
        missing=(-np.inf,),
        period=360,
        statistics=("lon",),
    ),
    Modality(
        "biome", "image", "categorical", ("biome",), "uint8", missing=(255,), classes=len(BIOMES), class_names=BIOMES
    ),
    Modality("eco_region", "image", "categorical", ("eco_region",), "uint16", missing=(65535,), classes=ECO_REGIONS),
    Modality(
        "month",
        "image",
        "continuous",
        ("sin_month", "cos_month"),
        "float32",
        missing=(-np.inf,),
        period=12,
        statistics=("month",),
    ),
    Modality(
        "esa_worldcover",
        "pixel",
        "categorical",
        ("map",),
        "uint8",
        missing=(0, 255),
        classes=11,
        class_values=tuple(_WORLD_COVER),
        class_names=tuple(_WORLD_COVER.values()),
    ),
)
MODALITIES = {modality.name: modality for modality in _ALL}
"""The twelve, by name, in the order of the published checkpoints' tasks and log variances."""

QUALITY = {
    modality.name: modality
    for modality in (
        Modality(
            "sentinel2_cloudmask",
            "pixel",
            "continuous",
            ("QA60",),
            "uint16",
            missing=(65535,),
            statistics=tuple(f"sentinel2_cloudmask_{kind}" for kind in S2_TYPES),
        ),
        Modality(
            "sentinel2_cloudprod",
            "pixel",
            "continuous",
            ("MSK_CLDPRB",),
            "uint16",
            missing=(65535,),
            statistics=tuple(f"sentinel2_cloudprod_{kind}" for kind in S2_TYPES),
        ),
        Modality(
            "sentinel2_scl",
            "pixel",
            "categorical",
            ("SCL",),
            "uint8",
            missing=(255,),
            classes=12,
            class_values=tuple(range(12)),
        ),
    )
}
"""What the file says about the quality of Sentinel-2's pixels; no modalities of the paper."""


def cyclic(values: npt.ArrayLike, period: float) -> npt.NDArray[np.float32]:
    """Sine and cosine of numbers on a circle (supplement, equations 3 to 8).

    Args:
        values: degrees (period 360) or months from 1 to 12 (period 12), any shape.
        period: after which values repeat.

    Returns:
        float32, a last axis of two added.
    """
    angle = 2 * np.pi * np.asarray(values, np.float64) / period
    return np.stack([np.sin(angle), np.cos(angle)], axis=-1).astype(np.float32)

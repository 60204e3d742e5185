"""Samples of MMEarth with all their modalities, and in the same way what a model makes of them (MMEarth, Fig. A5)."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from nec_ray.errors import InputError
from nec_ray.evaluate.pictures import new_figure
from nec_ray.tiles.modalities import BIOMES, MODALITIES

Image = npt.NDArray[np.float64]

_SIDE = 1.35  # inches of an image
_MISSING = (0.89, 0.89, 0.89)
_STRETCH = (2, 98)
_TREES, _SHRUBS, _GRASS, _CROPS = "#1B6B3A", "#B5A642", "#A8D08D", "#E69F00"
_BUILT, _BARE, _SNOW, _WATER, _WETLAND = "#D55E00", "#CBB9A3", "#F4F4FF", "#0072B2", "#56B4E9"
COLOURS = {
    "esa_worldcover": (
        _TREES,
        _SHRUBS,
        _GRASS,
        _CROPS,
        _BUILT,
        _BARE,
        _SNOW,
        _WATER,
        _WETLAND,
        "#009E73",
        "#CC79A7",
    ),
    "dynamic_world": (_WATER, _TREES, _GRASS, _WETLAND, _CROPS, _SHRUBS, _BUILT, _BARE, _SNOW),
}
"""Of each class; the same land has the same colour in both products."""
_PANELS = (
    ("sentinel2", "Sentinel-2: B4, B3, B2"),
    ("infrared", "B8, B11, B4"),
    ("sentinel1_asc", "Sentinel-1 asc., co-pol."),
    ("sentinel1_desc", "desc., cross-pol."),
    ("elevation", "elevation"),
    ("slope", "slope"),
    ("canopy_height", "canopy height"),
    ("canopy_std", "canopy std"),
    ("dynamic_world", "Dynamic World"),
    ("esa_worldcover", "WorldCover"),
)


def modality_samples(values: Mapping[str, npt.NDArray[Any]], out: Path, *, titles: Sequence[str] | None = None) -> Path:
    """Draw samples, one a row: the six pixel modalities as images, the six of the whole image as text.

    Missing pixels are grey. Images are stretched sample by sample.

    Args:
        values: of the twelve modalities, (samples, ...) as `MMEarthFile.read` gives them, not standardised.
        out: PNG file to write.
        titles: one a sample, such as its date.

    Raises:
        InputError: a modality is missing, or there are no samples.
    """
    from matplotlib.patches import Patch

    absent = [name for name in MODALITIES if name not in values]
    count = 0 if absent else len(values["biome"])
    if not count:
        raise InputError(f"no picture of {'no samples' if not absent else 'samples without ' + ', '.join(absent)}")
    shown = {name: [i for i in range(MODALITIES[name].classes) if (values[name] == i).any()] for name in COLOURS}
    legend_rows = -(-max(map(len, shown.values())) // 4)
    size = (_SIDE * 1.06 * (len(_PANELS) + 1.6), _SIDE * 1.12 * count + 0.5 + 0.24 * legend_rows)
    with new_figure(out, figsize=size) as figure:
        panels = figure.subplots(
            count, len(_PANELS) + 1, squeeze=False, gridspec_kw={"width_ratios": [1] * len(_PANELS) + [1.6]}
        )
        for row in range(count):
            one = {name: value[row] for name, value in values.items()}
            images = _images(one)
            for (name, title), panel in zip(_PANELS, panels[row], strict=False):
                panel.imshow(images[name], interpolation="nearest")
                if row == 0:
                    panel.set_title(title, fontsize=8)
            panels[row, -1].text(0, 0.5, words(one), fontsize=7, va="center", linespacing=1.35)
            if titles is not None:
                panels[row, 0].text(
                    -0.05,
                    0.5,
                    titles[row],
                    fontsize=7,
                    rotation=90,
                    ha="right",
                    va="center",
                    transform=panels[row, 0].transAxes,
                )
        for panel in panels.ravel():
            panel.axis("off")
        for name, place in (("dynamic_world", "outside lower left"), ("esa_worldcover", "outside lower right")):
            names, title = MODALITIES[name].class_names, dict(_PANELS)[name]
            handles = [
                Patch(facecolor=COLOURS[name][i], edgecolor="#808080", linewidth=0.4, label=names[i])
                for i in shown[name]
            ]
            figure.legend(handles=handles, loc=place, ncols=4, frameon=False, fontsize=7, title=title, title_fontsize=8)
    return out


def class_image(name: str, classes: npt.NDArray[np.int64]) -> Image:
    """Class numbers (rows, columns) of a land-cover product as colours; missing ones are grey."""
    from matplotlib.colors import to_rgb

    table = np.array([*(to_rgb(colour) for colour in COLOURS[name]), _MISSING])
    picked: Image = table[classes]  # -1 is the last
    return picked


def shaded(values: npt.NDArray[Any], cmap: str, bounds: tuple[float, float] | None = None) -> Image:
    """One band (rows, columns) as colours, between two percentiles or given bounds; missing pixels are grey."""
    from matplotlib import colormaps

    low, high = bounds or _percentiles(values)
    scaled = np.nan_to_num(np.clip((values - low) / (high - low), 0, 1))
    colours = np.asarray(colormaps[cmap](scaled))[..., :3]
    return np.where(np.isnan(values)[..., None], _MISSING, colours)


def composite(bands: npt.NDArray[Any]) -> Image:
    """Three bands (3, rows, columns) as red, green and blue, all between the same percentiles."""
    low, high = _percentiles(bands)
    scaled = np.nan_to_num(np.clip((bands - low) / (high - low), 0, 1)).transpose(1, 2, 0)
    return np.where(np.isnan(bands).any(axis=0)[..., None], _MISSING, scaled)


def words(one: Mapping[str, npt.NDArray[Any]]) -> str:
    """The modalities of the whole image of one sample in words, a line each."""
    lat, lon, month = (_uncycled(one[name]) for name in ("lat", "lon", "month"))
    climate = dict(zip(MODALITIES["era5"].bands, one["era5"], strict=True))
    biome, eco_region = int(one["biome"]), int(one["eco_region"])
    north, east = f"{abs(lat) * 360:.1f}° {'S' if lat < 0 else 'N'}", f"{abs(lon) * 360:.1f}° {'W' if lon < 0 else 'E'}"
    lines = [
        _short(BIOMES[biome]) if biome >= 0 else "biome missing",
        f"ecoregion {eco_region}" if eco_region >= 0 else "ecoregion missing",
        f"{north}, {east}" if np.isfinite(lat + lon) else "place missing",
        f"month {round(month * 12 - 1) % 12 + 1}" if np.isfinite(month) else "month missing",
    ]
    for name in ("prev_month", "curr_month", "year"):
        low, mean, high = (climate[f"{name}_{which}_temp"] - 273.15 for which in ("min", "avg", "max"))
        rain = 1000 * climate[f"{name}_total_precip"]
        said = f"{low:.0f} / {mean:.0f} / {high:.0f} °C, {rain:.0f} mm" if np.isfinite(mean) else "missing"
        lines.append(f"{name.replace('_', ' ')}: {said}")
    return "\n".join(lines)


def _images(one: Mapping[str, npt.NDArray[Any]]) -> dict[str, Image]:
    bands = MODALITIES["sentinel2"].bands
    optical = {band: one["sentinel2"][bands.index(band)] for band in bands}
    radar = dict(zip(MODALITIES["sentinel1"].bands, one["sentinel1"], strict=True))
    co, cross = ("HH", "HV") if np.isnan(radar["asc_VV"]).all() and np.isnan(radar["desc_VV"]).all() else ("VV", "VH")
    return {
        "sentinel2": composite(np.stack([optical[band] for band in ("B4", "B3", "B2")])),
        "infrared": composite(np.stack([optical[band] for band in ("B8", "B11", "B4")])),
        "sentinel1_asc": shaded(radar[f"asc_{co}"], "gray", (-25, 0)),
        "sentinel1_desc": shaded(radar[f"desc_{cross}"], "gray", (-30, -5)),
        "elevation": shaded(one["aster"][0], "cividis"),
        "slope": shaded(one["aster"][1], "magma", (0, 40)),
        "canopy_height": shaded(one["canopy_height_eth"][0], "viridis", (0, 40)),
        "canopy_std": shaded(one["canopy_height_eth"][1], "viridis", (0, 10)),
        **{name: class_image(name, one[name][0]) for name in COLOURS},
    }


def _uncycled(sine_and_cosine: npt.NDArray[Any]) -> float:
    """Share of a circle, -0.5 to 0.5."""
    return float(np.arctan2(*sine_and_cosine) / (2 * np.pi))


def _percentiles(values: npt.NDArray[Any]) -> tuple[float, float]:
    there = values[np.isfinite(values)]
    low, high = np.percentile(there, _STRETCH) if there.size else (0.0, 1.0)
    return float(low), float(max(high, low + 1e-6))


def _short(text: str) -> str:
    return text if len(text) <= 30 else text[:29] + "…"

"""The built-in scene is within its limits, and its labels fit the catalog that is built from it."""

import json
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import rasterio
from shapely import from_wkb
from shapely.geometry import shape

from nec_ray.data.make_scene import make_scene
from nec_ray.tiles import build_catalog, builtin_labels, builtin_scene


@pytest.fixture(scope="module")
def rows() -> dict[str, dict[str, Any]]:
    return {row["tile_id"]: row for row in build_catalog(builtin_scene(), tile_size=32).table.to_pylist()}


@pytest.fixture(scope="module")
def labels() -> list[dict[str, Any]]:
    features: list[dict[str, Any]] = json.loads(builtin_labels().read_text(encoding="utf-8"))["features"]
    return features


def test_the_scene_is_small_and_says_what_it_is() -> None:
    assert builtin_scene().stat().st_size <= 3_000_000
    with rasterio.open(builtin_scene()) as scene:
        assert scene.descriptions == ("red", "green", "blue")
        assert [c.name for c in scene.colorinterp] == ["red", "green", "blue"]
        assert (scene.dtypes[0], scene.nodata, scene.crs.to_epsg()) == ("uint16", 0, 32621)
        assert scene.tags()["TIFFTAG_DATETIME"].startswith("2020:05:18")
        assert "U.S. Geological Survey" in scene.tags()["TIFFTAG_IMAGEDESCRIPTION"]
        pixels = scene.read()
    missing = pixels == 0
    assert np.array_equal(missing.any(axis=0), missing.all(axis=0))  # a pixel is missing whole or not at all
    assert 0.1 < missing.all(axis=0).mean() < 0.3
    assert pixels[~missing].min() > 5000  # no-data never averaged into a valid pixel


def test_each_pixel_is_the_mean_of_four_of_the_source(data: Path) -> None:
    with rasterio.open(data / "landsat8" / "LC08_L1TP_224078_20200518_RT_rgb.tif") as source:
        whole, west, north = source.read(), source.bounds.left, source.bounds.top
    with rasterio.open(builtin_scene()) as scene:
        pixels, bounds = scene.read(), scene.bounds
    rng = np.random.default_rng(3)
    for row, column in zip(rng.integers(0, 928, 300), rng.integers(0, 960, 300), strict=True):
        y = int((north - bounds.top) / 30) + 2 * row
        x = int((bounds.left - west) / 30) + 2 * column
        block = whole[:, y : y + 2, x : x + 2].reshape(3, 4).astype(float)
        expected = np.zeros(3) if (block == 0).any() else np.rint(block.mean(axis=1))
        assert pixels[:, row, column].tolist() == expected.tolist()


def test_the_script_makes_the_same_pixels(data: Path, tmp_path: Path) -> None:
    make_scene(data / "landsat8" / "LC08_L1TP_224078_20200518_RT_rgb.tif", tmp_path / "again.tif")
    with rasterio.open(tmp_path / "again.tif") as again, rasterio.open(builtin_scene()) as scene:
        assert np.array_equal(again.read(), scene.read())
        assert again.transform == scene.transform


def test_labels_are_tiles_of_the_scene(rows: dict[str, dict[str, Any]], labels: list[dict[str, Any]]) -> None:
    assert len(rows) == 29 * 30
    ids = [feature["properties"]["tile_id"] for feature in labels]
    assert len(set(ids)) == len(ids)
    assert 250 <= len(ids) <= 450
    assert set(ids) <= set(rows)
    for feature in labels:
        row = rows[feature["properties"]["tile_id"]]
        assert row["nodata_share"] == 0
        footprint = from_wkb(row["geometry"])
        assert shape(feature["geometry"]).symmetric_difference(footprint).area < 1e-3 * footprint.area


def test_every_class_has_tiles_enough_to_learn_from(labels: list[dict[str, Any]]) -> None:
    counts = Counter(feature["properties"]["label"] for feature in labels)
    assert set(counts) == {"water", "built-up", "cropland", "forest"}
    assert min(counts.values()) >= 20


def test_labels_look_like_their_class(rows: dict[str, dict[str, Any]], labels: list[dict[str, Any]]) -> None:
    """Physics that no label was made from: forest is dark, a reservoir is even, a town is bright and uneven."""
    with rasterio.open(builtin_scene()) as scene:
        pixels = scene.read().astype(float)
    red: dict[str, list[tuple[float, float]]] = {}
    for feature in labels:
        row = rows[feature["properties"]["tile_id"]]
        window = pixels[0, row["y_off"] : row["y_off"] + 32, row["x_off"] : row["x_off"] + 32]
        red.setdefault(feature["properties"]["label"], []).append((window.mean(), window.std()))
    mean = {label: np.array(values)[:, 0] for label, values in red.items()}
    spread = {label: np.array(values)[:, 1] for label, values in red.items()}
    assert mean["forest"].max() < mean["built-up"].min()
    assert np.median(spread["water"]) < np.median(spread["cropland"]) / 3
    assert np.median(mean["built-up"]) > np.median(mean["cropland"])


def test_importing_the_room_is_light() -> None:
    code = "import sys, nec_ray.tiles; print(sorted({'rasterio', 'PIL', 'torch', 'ray', 'duckdb'} & set(sys.modules)))"
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert said.strip() == "[]"

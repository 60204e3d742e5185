from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.colors import to_rgb
from PIL import Image

from nec_ray.errors import InputError
from nec_ray.evaluate.modality_pictures import COLOURS, class_image, composite, modality_samples, shaded, words
from nec_ray.storage import Store
from nec_ray.tiles.invented import generate
from nec_ray.tiles.mmearth_reader import open_mmearth
from nec_ray.tiles.modalities import MODALITIES, cyclic

GREY = (0.89, 0.89, 0.89)


def test_missing_classes_and_values_are_grey() -> None:
    image = class_image("esa_worldcover", np.array([[0, 7, -1]]))
    assert [tuple(pixel) for pixel in image[0]] == [to_rgb("#1B6B3A"), to_rgb("#0072B2"), GREY]
    assert {name: len(colours) for name, colours in COLOURS.items()} == {"esa_worldcover": 11, "dynamic_world": 9}
    pair = [("tree cover", "trees"), ("permanent water", "water"), ("built-up", "built"), ("cropland", "crops")]
    for cover, world in pair:
        i, j = (MODALITIES[n].class_names.index(c) for n, c in (("esa_worldcover", cover), ("dynamic_world", world)))
        assert COLOURS["esa_worldcover"][i] == COLOURS["dynamic_world"][j]
    one = shaded(np.array([[0.0, np.nan, 5, 99]]), "gray", (0, 10))
    assert [tuple(pixel) for pixel in one[0]][1] == GREY
    np.testing.assert_allclose(one[0, [0, 2, 3]].mean(axis=1), [0, 0.5, 1], atol=0.01)
    three = composite(np.array([[[0, 50, 100, np.nan]], [[100, 50, 0, 1]], [[50, 50, 50, 1]]], np.float32))
    np.testing.assert_allclose(three[0, 1], [0.5] * 3, atol=0.02)
    np.testing.assert_allclose(three[0, 0], [0, 1, 0.5], atol=0.05)
    assert tuple(three[0, 3]) == GREY
    assert tuple(shaded(np.full((1, 1), np.nan), "gray")[0, 0]) == GREY
    assert np.isfinite(shaded(np.full((1, 1), 3.0), "gray")).all()


def test_modalities_of_the_whole_image_in_words() -> None:
    era5 = np.array([270, 260, 280, 0.01, 275.15, 265.15, 285.15, 0.05, 280, 250, 300, 0.6], np.float32)
    one: dict[str, Any] = {
        "lat": cyclic(-33.4, 360),
        "lon": cyclic(-179.9, 360),
        "month": cyclic(12, 12),
        "biome": np.int64(9),
        "eco_region": np.int64(845),
        "era5": era5,
    }
    said = words(one)
    for part in ("Mangroves", "ecoregion 845", "33.4° S, 179.9° W", "month 12", "curr month: -8 / 2 / 12 °C, 50 mm"):
        assert part in said
    for month in range(1, 13):
        assert f"month {month}\n" in words({**one, "month": cyclic(month, 12)})
    gone = {name: np.full_like(value, np.nan if value.dtype == np.float32 else -1) for name, value in one.items()}
    assert words(gone).count("missing") == 7


def test_a_picture_has_a_row_a_sample(tmp_path: Path) -> None:
    generate(tmp_path, samples=3, side=16, seed=4)
    with open_mmearth(Store(tmp_path), "data_invented.h5") as file:
        values = file.read(range(3))
    sizes = []
    for count in (1, 3):
        out = modality_samples({name: value[:count] for name, value in values.items()}, tmp_path / f"{count}.png")
        with Image.open(out) as image:
            sizes.append(image.size)
    assert sizes[1][1] - sizes[0][1] > 2 * 150
    with pytest.raises(InputError, match="without aster"):
        modality_samples({name: value for name, value in values.items() if name != "aster"}, tmp_path / "x.png")
    with pytest.raises(InputError, match="no samples"):
        modality_samples({name: value[:0] for name, value in values.items()}, tmp_path / "x.png")

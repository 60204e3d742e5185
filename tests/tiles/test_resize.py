import numpy as np
import pytest
from PIL import Image

from nec_ray.tiles import resize


@pytest.mark.parametrize(
    ("rows", "columns", "height", "width"),
    [(150, 150, 64, 64), (32, 32, 64, 64), (33, 97, 64, 64), (512, 300, 7, 224), (1, 1, 4, 4), (5, 640, 1, 1)],
)
def test_it_is_pillows_bilinear(rows: int, columns: int, height: int, width: int, rng: np.random.Generator) -> None:
    pixels = rng.uniform(0, 20_000, (3, rows, columns)).astype(np.float32)
    expected = [np.asarray(Image.fromarray(band).resize((width, height), Image.Resampling.BILINEAR)) for band in pixels]
    np.testing.assert_allclose(resize(pixels, height, width), expected, rtol=2e-5)


def test_the_right_size_is_left_alone(rng: np.random.Generator) -> None:
    pixels = rng.normal(size=(2, 8, 9)).astype(np.float32)
    assert resize(pixels, 8, 9) is pixels


def test_a_flat_image_stays_flat() -> None:
    out = resize(np.full((1, 37, 61), 7266, np.float32), 16, 100)
    assert out.dtype == np.float32
    np.testing.assert_allclose(out, 7266, rtol=1e-6)

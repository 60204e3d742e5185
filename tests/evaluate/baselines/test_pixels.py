"""Coders of pixels: raw bytes that lose nothing, JPEG 2000 at the rate asked for."""

import io
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import zstandard
from PIL import Image

from nec_ray.evaluate.baselines import fit_jpeg2000, fit_raw
from nec_ray.tiles import build_catalog, builtin_scene, read_pixels, resize

Floats = npt.NDArray[np.float32]


def smooth(bands: int, *, top: float, size: tuple[int, int] = (40, 48), tiles: int = 6) -> list[Floats]:
    """Whole numbers from 0 to `top`, correlated in space and over bands."""
    rng = np.random.default_rng(3)
    made = []
    for _ in range(tiles):
        coarse = rng.random((bands, size[0] // 8, size[1] // 8)) + 2 * rng.random((1, size[0] // 8, size[1] // 8))
        fine = np.stack(
            [
                np.asarray(Image.fromarray(band.astype(np.float32)).resize(size[::-1], Image.Resampling.BICUBIC))
                for band in coarse
            ]
        )
        fine = fine + 0.02 * rng.random(fine.shape)
        made.append(np.rint((fine - fine.min()) / np.ptp(fine) * top).astype(np.float32))
    return made


@pytest.mark.parametrize(("bits", "dtype", "top"), [(8, "uint8", 255), (16, "uint8", 255), (16, "uint16", 65535)])
def test_raw_pixels_come_back_as_they_were(bits: Any, dtype: str, top: float) -> None:
    train = smooth(4, top=top)
    coder = fit_raw(train[:3], bits, {dtype})
    for tile in train:
        data = coder.encode(tile)
        back = coder.decode(data, *tile.shape[1:])
        np.testing.assert_array_equal(back, tile)
        np.testing.assert_array_equal(resize(back, 32, 32), resize(tile, 32, 32))
        plain = zstandard.ZstdCompressor(level=19).compress(tile.astype(dtype).tobytes())
        assert len(data) < 0.9 * len(plain), "differences of neighbours are smaller than pixels"
    noise = np.random.default_rng(0).integers(0, int(top), (3, 4, 9, 5)).astype(np.float32)
    for tile in noise:
        np.testing.assert_array_equal(coder.decode(coder.encode(tile), 9, 5), tile)


def test_sixteen_bits_as_eight_lose_half_a_level_and_what_is_beyond_the_percentiles() -> None:
    train = smooth(3, top=65535)
    coder = fit_raw(train, 8, {"uint16"})
    for tile in train:
        back = coder.decode(coder.encode(tile), *tile.shape[1:])
        for band in range(3):
            low, high = np.quantile(np.concatenate([t[band].ravel() for t in train]), [0.001, 0.999])
            level = (high - low) / 255
            kept = np.clip(tile[band], low, high)
            assert np.abs(back[band] - kept).max() <= level / 2 * 1.001
            assert len(np.unique(back[band])) <= 256
    assert coder.shared_bytes == 2 * 3 * 4


@pytest.mark.parametrize(
    ("bands", "bits", "top", "dtype"),
    [(3, 8, 255, "uint8"), (1, 8, 255, "uint8"), (3, 8, 9000, "uint16"), (2, 16, 9000, "uint16")],
)
def test_jpeg_2000_keeps_to_its_rate_and_gains_by_it(bands: int, bits: Any, top: float, dtype: str) -> None:
    train = smooth(bands, top=top, size=(64, 64))
    errors, sizes = [], []
    for rate in (0.5, 2, 6):
        coder = fit_jpeg2000(train, rate * bands / 3, bits, {dtype})
        data = [coder.encode(tile) for tile in train]
        back = [coder.decode(one, *tile.shape[1:]) for one, tile in zip(data, train, strict=True)]
        sizes.append(np.mean([len(one) for one in data]))
        assert sizes[-1] <= rate * bands / 3 * 64 * 64 / 8 + 120 * bands
        errors.append(np.mean([(a - b) ** 2 for a, b in zip(back, train, strict=True)]))
    assert sizes == sorted(sizes)
    assert errors == sorted(errors, reverse=True)
    decibel = 20 * np.log10(top / np.sqrt(errors))
    assert decibel[0] > 15
    assert decibel[2] > 38


def test_a_tile_of_rgb_is_one_codestream_that_pillow_reads_and_small_tiles_are_no_error() -> None:
    [tile, *_] = train = smooth(3, top=255)
    coder = fit_jpeg2000(train, 4, 8, {"uint8"})
    data = coder.encode(tile)
    assert data[:2] == b"\xff\x4f", "a codestream begins with SOC: no boxes are paid for"
    assert b"\xff\x64" not in data[: data.index(b"\xff\x90")], "nor is a comment"
    with Image.open(io.BytesIO(data)) as image:
        np.testing.assert_array_equal(np.asarray(image).transpose(2, 0, 1), coder.decode(data, 40, 48))
    for size in ((1, 1), (3, 7), (17, 2)):
        cut = tile[:, : size[0], : size[1]]
        assert coder.decode(coder.encode(cut), *size).shape == cut.shape
    with pytest.raises(ValueError, match="a codestream of"):
        coder.decode(data, 48, 40)


@pytest.mark.parametrize("quality", [15, 60])
def test_jpeg_2000_is_better_than_jpeg_at_the_same_bytes(quality: int) -> None:
    rows = build_catalog(builtin_scene(), tile_size=128).table.slice(16, 6)
    tiles = list(read_pixels(rows))
    eight = [np.clip((tile.astype(np.float32) - 5900) / 12, 0, 255).astype(np.uint8) for tile in tiles]
    assert min(tile.min() for tile in tiles) > 0, "the scene's edge would flatter both"
    gained = []
    for tile in eight:
        plain = io.BytesIO()
        Image.fromarray(tile.transpose(1, 2, 0)).save(plain, "JPEG", quality=quality, optimize=True)
        with Image.open(plain) as image:
            error = np.mean((np.asarray(image).transpose(2, 0, 1).astype(np.float32) - tile) ** 2)
        coder = fit_jpeg2000([tile.astype(np.float32)], 8 * len(plain.getvalue()) / 128**2, 8, {"uint8"})
        data = coder.encode(tile.astype(np.float32))
        assert len(data) <= 1.02 * len(plain.getvalue())
        gained.append(10 * np.log10(error / np.mean((coder.decode(data, 128, 128) - tile) ** 2)))
    assert np.mean(gained) > 0.5

"""Augmentations against numpy's symmetries and a brute-force crop."""

import numpy as np
import pytest
import torch

from nec_ray.models.augment import augment


def ramp(count: int, size: int = 3) -> torch.Tensor:
    return torch.arange(count * 2 * size * size, dtype=torch.float32).reshape(count, 2, size, size)


@pytest.mark.parametrize(("names", "ways"), [(["flip", "turn"], 8), (["turn"], 4), (["flip"], 2), ([], 1)])
def test_each_tile_becomes_one_of_its_symmetries_the_same_for_all_bands(names: list[str], ways: int) -> None:
    pixels = ramp(400)
    seen = []
    for before, after in zip(pixels, augment(pixels, names, torch.Generator().manual_seed(0)), strict=True):
        image = before.numpy()
        symmetries = [np.rot90(side, turn, (1, 2)) for side in (image, image[:, :, ::-1]) for turn in range(4)]
        [match] = [i for i, turned in enumerate(symmetries) if np.array_equal(turned, after.numpy())]
        seen.append(match)
    counts = np.unique(seen, return_counts=True)[1]
    assert len(counts) == ways
    assert counts.min() > 0.7 * 400 / ways


def test_a_crop_is_a_window_of_a_fifth_to_all_of_the_tile() -> None:
    """Bands that hold the column and the row of a pixel's centre tell which window was taken."""
    size, count = 32, 500
    centre = (torch.arange(size, dtype=torch.float32) + 0.5) / size
    tile = torch.stack([centre.expand(size, size), centre[:, None].expand(size, size)])
    out = augment(tile.expand(count, -1, -1, -1), ["crop"], torch.Generator().manual_seed(0))
    # Bilinear sampling of a ramp is exact but at the border, so the middle tells slope and place.
    step = (out[:, :, 20, 20] - out[:, :, 12, 12]) / 8 * size
    width, height = step[:, 0], step[:, 1]
    area = width * height
    assert float(area.min()) > 0.19
    assert float(area.max()) <= 1.0001
    assert 0.5 < float(area.mean()) < 0.65
    ratio = width / height
    assert float(ratio.min()) >= 0.74
    assert float(ratio.max()) <= 1.34
    middle = (out[:, :, 15, 15] + out[:, :, 16, 16]) / 2
    assert float((middle - step / 2).min()) > -1e-4  # inside the tile on all sides
    assert float((middle + step / 2).max()) < 1 + 1e-4
    assert float((middle - step / 2).std()) > 0.05

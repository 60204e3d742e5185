"""Resizing by a separable antialiased triangle filter, as two matrix products."""

import functools

import numpy as np
from numpy.typing import NDArray


def resize(pixels: NDArray[np.float32], height: int, width: int) -> NDArray[np.float32]:
    """Resize an image.

    The filter is the one that Pillow calls BILINEAR: a triangle as wide as the larger of an input and an output
    pixel, its weights made to add up to one at the image's edge (Pillow, `src/libImaging/Resample.c`).

    Args:
        pixels: `(bands, rows, columns)`, float32.
        height: rows wanted.
        width: columns wanted.

    Returns:
        `(bands, height, width)`, float32; the array itself where it has that size already.
    """
    rows, columns = pixels.shape[1:]
    if columns != width:
        pixels = np.matmul(pixels, triangle_weights(columns, width).T)
    if rows != height:
        pixels = np.matmul(triangle_weights(rows, height), pixels)
    return pixels


@functools.lru_cache(maxsize=64)
def triangle_weights(before: int, after: int) -> NDArray[np.float32]:
    """Matrix `(after, before)` float32, read-only, that resizes a line of `before` pixels to `after`."""
    scale = before / after
    reach = max(scale, 1.0)
    centres = (np.arange(after)[:, None] + 0.5) * scale
    positions = np.arange(before)[None, :] + 0.5
    weights = np.maximum(0.0, 1.0 - np.abs(positions - centres) / reach)
    weights /= weights.sum(axis=1, keepdims=True)
    matrix = weights.astype(np.float32)
    matrix.flags.writeable = False
    return matrix

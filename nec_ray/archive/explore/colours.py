"""False colour of tiles: the first three principal components of their pooled vectors as red, green and blue."""

import numpy as np
import numpy.typing as npt

_COLOURS = 3
_SHOWN = (2, 98)
"""Percentiles of a component that its colour reaches over; what lies outside is as dark or as bright as can be."""
_NEUTRAL = 128


def false_colour(vectors: npt.NDArray[np.int8]) -> tuple[npt.NDArray[np.uint8], list[float]]:
    """Colours of tiles such that similar tiles are of similar colours.

    Args:
        vectors: (tiles, channels) pooled vectors of one encoder.

    Returns:
        (tiles, 3) red, green and blue, 128 where a component does not vary; and the share of the variance in each of
        the three components.
    """
    tiles, channels = vectors.shape
    colours = np.full((tiles, _COLOURS), _NEUTRAL, np.uint8)
    shares = [0.0] * _COLOURS
    if not tiles:
        return colours, shares
    mean = vectors.mean(axis=0, dtype=np.float64).astype(np.float32)
    centred = vectors - mean  # float32: four bytes a channel are enough beside rounding to int8
    values, axes = np.linalg.eigh((centred.T @ centred).astype(np.float64) / tiles)
    for component in range(min(_COLOURS, channels)):
        axis = axes[:, -1 - component]
        # An axis has no direction of its own: one is chosen, so that a page is the same each time.
        axis = axis * np.sign(axis[np.abs(axis).argmax()])
        score = centred @ axis.astype(np.float32)
        low, high = np.percentile(score, _SHOWN)
        if high > low:
            colours[:, component] = np.rint(255 * np.clip((score - low) / (high - low), 0, 1))
        if values.sum() > 0:
            shares[component] = float(max(values[-1 - component], 0) / values.sum())
    return colours, shares

"""How far embeddings are from what they were before compression."""

from dataclasses import dataclass

import numpy as np

from nec_ray.evaluate.fitting import Floats

_TILES_A_STEP = 64


@dataclass(frozen=True)
class Distortion:
    """Over all values of some tiles."""

    mse: float
    """Mean squared error."""
    snr_db: float | None
    """10 log10 of the embeddings' variance, each channel's around its own mean, by the error; None without error."""


def distortion(x: Floats, reference: Floats) -> Distortion:
    """Compare embeddings float32 (tiles, tokens, channels) with those before compression, of the same shape."""
    error = signal = 0.0
    mean = reference.mean(axis=(0, 1), dtype=np.float64)
    for start in range(0, len(x), _TILES_A_STEP):  # float64 of all tiles would be twice the embeddings
        true = reference[start : start + _TILES_A_STEP].astype(np.float64)
        error += float(np.square(x[start : start + _TILES_A_STEP] - true).sum())
        signal += float(np.square(true - mean).sum())
    return Distortion(error / x.size, 10 * np.log10(signal / error) if error > 0 and signal > 0 else None)

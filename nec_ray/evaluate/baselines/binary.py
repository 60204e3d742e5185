"""One bit a value: on which side of its channel's median it lies."""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from nec_ray.evaluate.baselines.blocks import Block, fit_block

Floats = npt.NDArray[np.float32]
_SAMPLES = 16
_TOKENS_A_STEP = 1 << 14
_MEDIAN_VALUES = 1 << 25
"""Values that medians are taken of, at most: tokens evenly spaced among all."""


@dataclass(frozen=True)
class BinaryCoder:
    """Embeddings as signs."""

    threshold: Floats
    """(channels,)."""
    levels: Floats
    """(2, channels): what a value up to the threshold, and one above it, stands for."""
    tokens: int
    block: Block

    @property
    def shared_bytes(self) -> int:
        """Bytes of thresholds and levels."""
        return self.threshold.nbytes + self.levels.nbytes

    def encode(self, tile: Floats) -> bytes:
        """Bytes of an embedding float32 (tokens, channels)."""
        return self.block.encode((tile > self.threshold).astype(np.uint8))

    def decode(self, data: bytes) -> Floats:
        """The embedding float32 (tokens, channels) of its bytes."""
        above = self.block.decode(data, (self.tokens, len(self.threshold)))
        return np.where(above, self.levels[1], self.levels[0])


def fit_binary(train: Floats) -> BinaryCoder:
    """Fit each channel's threshold, its median, and the means on both sides of it.

    Args:
        train: embeddings float32 (tiles, tokens, channels) of training tiles.
    """
    tokens, channels = train.shape[1:]
    values = train.reshape(-1, channels)
    threshold = np.median(values[:: max(1, values.size // _MEDIAN_VALUES)], axis=0).astype(np.float32)
    count, sums = np.zeros((2, channels)), np.zeros((2, channels))
    for start in range(0, len(values), _TOKENS_A_STEP):
        part = values[start : start + _TOKENS_A_STEP].astype(np.float64)
        above = part > threshold
        for side, mine in enumerate((~above, above)):
            count[side] += mine.sum(axis=0)
            sums[side] += np.where(mine, part, 0).sum(axis=0)
    # Nothing lies above where a channel never changes.
    levels = np.where(count > 0, sums / np.maximum(count, 1), threshold)
    block = fit_block([(tile > threshold).astype(np.uint8) for tile in train[:_SAMPLES]], 1, ((0, 1), (1, 0)))
    return BinaryCoder(threshold, levels.astype(np.float32), tokens, block)

"""Pixels as integers of 8 or 16 bits, and back: what raw data and image codecs work on."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float32]
Depth = Literal[8, 16]

_EXACT = {8: {"uint8"}, 16: {"uint8", "uint16"}}
_PERCENTILE = 99.9  # of 8 bits: a cloud must not take the contrast of everything else


@dataclass(frozen=True)
class Scaling:
    """Each band's range as integers."""

    low: Floats
    """(bands,)."""
    step: Floats
    """(bands,), above 0."""
    bits: Depth

    @property
    def shared_bytes(self) -> int:
        """Bytes of the ranges."""
        return self.low.nbytes + self.step.nbytes

    def integers(self, tile: Floats) -> npt.NDArray[np.unsignedinteger[Any]]:
        """Integers of `bits` bits (bands, height, width) of pixels; values outside the range are cut off."""
        whole = np.rint((tile - self.low[:, None, None]) / self.step[:, None, None])
        return np.clip(whole, 0, 2**self.bits - 1).astype(f"<u{self.bits // 8}")

    def pixels(self, whole: npt.NDArray[Any]) -> Floats:
        """Pixels float32 of integers (bands, height, width)."""
        # In the order that sources are read in: sums over them then round in the same way.
        values = np.ascontiguousarray(whole, np.float32)
        return self.low[:, None, None] + values * self.step[:, None, None]


def fit_scaling(train: Sequence[Floats], bits: Depth, dtypes: set[str]) -> Scaling:
    """Exact where integers of so many bits hold the sources' type; else fitted to training tiles.

    Args:
        train: pixels float32 (bands, height, width) of training tiles.
        bits: of the integers. 8 bits go from one percentile of the training pixels to another, 16 bits from the least
            to the greatest.
        dtypes: numpy's names of the sources' types.
    """
    bands = len(train[0])
    if dtypes <= _EXACT[bits]:
        return Scaling(np.zeros(bands, np.float32), np.ones(bands, np.float32), bits)
    values = np.concatenate([tile.reshape(bands, -1) for tile in train], axis=1)
    percentile = _PERCENTILE if bits == 8 else 100.0
    low, high = np.percentile(values, [100 - percentile, percentile], axis=1).astype(np.float32)
    step = (high - low) / np.float32(2**bits - 1)
    return Scaling(low, np.where(step > 0, step, np.float32(1)), bits)

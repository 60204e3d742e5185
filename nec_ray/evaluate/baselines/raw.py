"""Pixels with zstd (NEC, section 4, "RDC"), also after a difference along rows as GeoTIFF's predictor 2 takes it."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from nec_ray.evaluate.baselines.blocks import Block, fit_block
from nec_ray.evaluate.baselines.scaling import Depth, Floats, Scaling, fit_scaling

_ORDERS = ((0, 1, 2), (1, 2, 0))
"""Band by band, and pixel by pixel."""
_SAMPLES = 16


@dataclass(frozen=True)
class RawCoder:
    """Pixels as integers, without further loss."""

    scaling: Scaling
    difference: bool
    """Whether a value's distance to its left neighbour is kept in its place."""
    block: Block

    @property
    def shared_bytes(self) -> int:
        """Bytes of the bands' ranges."""
        return self.scaling.shared_bytes

    def encode(self, tile: Floats) -> bytes:
        """Bytes of pixels float32 (bands, height, width) in the source's units."""
        whole = self.scaling.integers(tile)
        return self.block.encode(_differences(whole) if self.difference else whole)

    def decode(self, data: bytes, height: int, width: int) -> Floats:
        """The pixels float32 (bands, height, width) of their bytes."""
        whole = self.block.decode(data, (len(self.scaling.low), height, width))
        if self.difference:
            whole = np.cumsum(whole, axis=2, dtype=whole.dtype)  # wraps around, as the differences did
        return self.scaling.pixels(whole)


def fit_raw(train: Sequence[Floats], bits: Depth, dtypes: set[str]) -> RawCoder:
    """Fit the bands' ranges, where the sources' type does not fit into so many bits, and the smallest arrangement.

    Args:
        train: pixels float32 (bands, height, width) of training tiles.
        bits: of a value.
        dtypes: numpy's names of the sources' types.
    """
    scaling = fit_scaling(train, bits, dtypes)
    some = [scaling.integers(tile) for tile in train[:_SAMPLES]]
    coders = []
    for difference in (False, True):
        samples = [_differences(whole) for whole in some] if difference else some
        block = fit_block(samples, bits, _ORDERS)
        coders.append((sum(len(block.encode(one)) for one in samples), RawCoder(scaling, difference, block)))
    return min(coders, key=lambda pair: pair[0])[1]


def _differences(whole: npt.NDArray[np.unsignedinteger[Any]]) -> npt.NDArray[np.unsignedinteger[Any]]:
    return np.diff(whole, axis=2, prepend=whole.dtype.type(0))

"""Uniformly quantised embeddings (NEC, section 4, "UQE"): floats, or affine integers, and zstd."""

from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

from nec_ray.evaluate.baselines.blocks import Block, fit_block, unsigned

Floats = npt.NDArray[np.float32]
Precision = Literal["float32", "float16", "int8", "int6", "int5", "int4", "int3", "int2"]
Ranges = Literal["tensor", "channel"]

_ORDERS = ((0, 1), (1, 0))
_SAMPLES = 16
_PERCENTILE_VALUES = 1 << 25
"""Values that percentiles are taken of, at most: tokens evenly spaced among all."""


@dataclass(frozen=True)
class FloatCoder:
    """Embeddings as floats of 32 or 16 bits."""

    kind: "np.dtype[np.floating]"  # type: ignore[type-arg]
    shape: tuple[int, int]
    block: Block
    shared_bytes: int = 0

    def encode(self, tile: Floats) -> bytes:
        """Bytes of an embedding float32 (tokens, channels); what float16 cannot hold becomes its largest number."""
        return self.block.encode(_bits_of(tile, self.kind))

    def decode(self, data: bytes) -> Floats:
        """The embedding float32 (tokens, channels) of its bytes."""
        return self.block.decode(data, self.shape).view(self.kind).astype(np.float32)


@dataclass(frozen=True)
class AffineCoder:
    """Embeddings as integers `q`, which stand for `low + q * step`."""

    low: Floats
    """(1,) or (channels,)."""
    step: Floats
    """(1,) or (channels,), above 0."""
    bits: int
    shape: tuple[int, int]
    block: Block

    @property
    def shared_bytes(self) -> int:
        """Bytes of the ranges."""
        return self.low.nbytes + self.step.nbytes

    def encode(self, tile: Floats) -> bytes:
        """Bytes of an embedding float32 (tokens, channels); values outside the range are cut off."""
        return self.block.encode(_integers(tile, self.low, self.step, self.bits))

    def decode(self, data: bytes) -> Floats:
        """The embedding float32 (tokens, channels) of its bytes."""
        return self.low + self.block.decode(data, self.shape).astype(np.float32) * self.step


def fit_quantised(
    train: Floats, precision: Precision, ranges: Ranges = "tensor", percentile: float = 100
) -> FloatCoder | AffineCoder:
    """Fit the ranges of integers, and the arrangement of the bytes.

    Args:
        train: embeddings float32 (tiles, tokens, channels) of training tiles.
        precision: of a value.
        ranges: one range for all values, as the paper has it, or one a channel.
        percentile: that a range ends at, on both sides; 100 is from the least to the greatest value.
    """
    tokens, channels = train.shape[1:]
    some = train[:_SAMPLES]
    if precision in {"float32", "float16"}:
        kind = np.dtype(f"<f{int(precision[5:]) // 8}")
        block = fit_block([_bits_of(tile, kind) for tile in some], 8 * kind.itemsize, _ORDERS)
        return FloatCoder(kind, (tokens, channels), block)
    bits = int(precision[3:])
    low, high = _range(train.reshape(-1, channels), ranges, percentile)
    step = ((high - low) / (2**bits - 1)).astype(np.float32)
    step[step <= 0] = 1  # a channel that is always the same
    block = fit_block([_integers(tile, low, step, bits) for tile in some], bits, _ORDERS)
    return AffineCoder(low, step, bits, (tokens, channels), block)


def _range(values: Floats, ranges: Ranges, percentile: float) -> tuple[Floats, Floats]:
    """Least and greatest value (1,) or (channels,) of tokens (tokens, channels), or those percentiles."""
    axis = 0 if ranges == "channel" else None
    if percentile == 100:
        ends = np.stack([values.min(axis=axis), values.max(axis=axis)])
    else:
        every = max(1, values.size // _PERCENTILE_VALUES)
        ends = np.percentile(values[::every], [100 - percentile, percentile], axis=axis)
    low, high = ends.astype(np.float32).reshape(2, -1)
    return low, high


def _integers(tile: Floats, low: Floats, step: Floats, bits: int) -> npt.NDArray[np.uint8]:
    return np.clip(np.rint((tile - low) / step), 0, 2**bits - 1).astype(np.uint8)


def _bits_of(tile: Floats, kind: "np.dtype[np.floating]") -> "npt.NDArray[np.unsignedinteger]":  # type: ignore[type-arg]
    largest = np.finfo(kind).max
    return np.clip(tile, -largest, largest).astype(kind).view(unsigned(8 * kind.itemsize))

"""Small unsigned integers as zstd blocks, in the arrangement that training tiles say is the smallest."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import zstandard

_FAST_OVER = 1 << 18
"""Bytes of a block from which level 9 is taken: level 19 saves 1 % more there, at ten times the time."""
_SAMPLES = 16

Form = Literal["plain", "packed", "planes"]
Values = npt.NDArray[np.unsignedinteger[Any]]


@dataclass(frozen=True)
class Block:
    """How an array of integers of `bits` bits lies in a block."""

    bits: int
    form: Form
    """`plain`: one whole unsigned integer a value; `packed`: its bits one behind the other, without gaps; `planes`:
    all highest bits, then all second highest, ... (whole bytes where a value has several), as bitshuffle does."""
    order: tuple[int, ...]
    """Axes from the slowest to the fastest."""

    def encode(self, values: Values) -> bytes:
        """Bytes of unsigned integers of any shape, of `unsigned(bits)`."""
        data = self._arrange(np.transpose(values, self.order))
        level = 9 if len(data) > _FAST_OVER else 19
        # The size follows from the shape, which the reader knows.
        return zstandard.ZstdCompressor(level=level, write_content_size=False).compress(data)

    def decode(self, data: bytes, shape: Sequence[int]) -> Values:
        """The integers of a block, of `shape`."""
        moved = tuple(shape[axis] for axis in self.order)
        count, kind = int(np.prod(moved)), unsigned(self.bits)
        size = count * kind.itemsize if self.form == "plain" or self.bits > 8 else -(-count * self.bits // 8)
        raw = np.frombuffer(zstandard.ZstdDecompressor().decompress(data, max_output_size=size), np.uint8)
        return np.transpose(self._restore(raw, count, kind).reshape(moved), np.argsort(self.order))

    def _arrange(self, values: Values) -> bytes:
        if self.form == "plain":
            return values.astype(unsigned(self.bits)).tobytes()
        if self.bits > 8:
            big = np.ascontiguousarray(values).view(np.uint8).reshape(-1, values.dtype.itemsize)
            return big.T.tobytes()
        bits = np.unpackbits(np.ascontiguousarray(values).reshape(-1, 1), axis=1)[:, 8 - self.bits :]
        return np.packbits((bits if self.form == "packed" else bits.T).ravel()).tobytes()

    def _restore(self, raw: npt.NDArray[np.uint8], count: int, kind: "np.dtype[Any]") -> Values:
        if self.form == "plain":
            return raw.view(kind)
        if self.bits > 8:
            return np.ascontiguousarray(raw.reshape(kind.itemsize, -1).T).view(kind).ravel()
        bits = np.unpackbits(raw, count=count * self.bits)
        bits = bits.reshape(count, self.bits) if self.form == "packed" else bits.reshape(self.bits, count).T
        whole = np.zeros((count, 8), np.uint8)
        whole[:, 8 - self.bits :] = bits
        return np.packbits(whole, axis=1).ravel()


def unsigned(bits: int) -> "np.dtype[Any]":
    """The smallest unsigned type that holds so many bits, little-endian."""
    return np.dtype(f"<u{1 if bits <= 8 else 2 if bits <= 16 else 4}")


def fit_block(samples: Sequence[Values], bits: int, orders: Sequence[tuple[int, ...]]) -> Block:
    """The arrangement with the fewest bytes for the first of some tiles.

    Args:
        samples: unsigned integers of training tiles, of `unsigned(bits)`.
        bits: that a value has at most.
        orders: of axes, to choose from.
    """
    forms: tuple[Form, ...] = ("plain", "packed", "planes") if bits < 8 else ("plain", "planes")
    blocks = [Block(bits, form, order) for form, order in product(forms, orders)]
    return min(blocks, key=lambda block: sum(len(block.encode(values)) for values in samples[:_SAMPLES]))

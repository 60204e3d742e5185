"""Layers of several grid scales: an array (tiles, tokens, channels) for each scale, where one scale has one array."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from nec_ray.codec.spec import LayerSpec, scaled_grid

Arrays = Any
"""An array (tiles, tokens, channels); where there are several grid scales, a tuple of one such array a scale, in the
order in which the layers come to them, which is coarse first in the codecs that are made here. Not a union: who knows
that a codec has one scale need not ask which of the two it is."""


@dataclass(frozen=True)
class Scale:
    """The layers of one grid scale, whose channels share an array."""

    grid: tuple[int, int]
    """Token rows and columns."""
    rows: npt.NDArray[np.int64]
    """(channels,) which of the tables' channels they are: those of a layer follow one another."""

    @property
    def tokens(self) -> int:
        """Tokens of a tile."""
        return self.grid[0] * self.grid[1]

    @property
    def shape(self) -> tuple[int, int]:
        """Tokens and channels of a tile."""
        return self.tokens, len(self.rows)


def scales_of(grid: tuple[int, int], layers: Sequence[LayerSpec]) -> list[Scale]:
    """The grid scales of some of a codec's first layers, in the order in which these come to them.

    Args:
        grid: the codec's token rows and columns.
        layers: the first ones, or all.
    """
    rows: dict[int, list[npt.NDArray[np.int64]]] = {}
    first = 0
    for layer in layers:
        rows.setdefault(layer.scale, []).append(np.arange(first, first + layer.channels))
        first += layer.channels
    return [Scale(scaled_grid(grid, scale), np.concatenate(some)) for scale, some in rows.items()]


def parts_of(arrays: Arrays) -> tuple[Any, ...]:
    """The arrays, or tensors, of all scales, whether there are one or several."""
    return tuple(arrays) if isinstance(arrays, tuple | list) else (arrays,)


def of_tiles(arrays: Arrays, which: Any) -> Arrays:
    """The arrays, or tensors, of some tiles: `which` are their numbers, a mask or a slice."""
    return joined(part[which] for part in parts_of(arrays))


def joined(parts: Iterable[Any]) -> Arrays:
    """The reverse of `parts_of`: the array, or tensor, itself where there is one."""
    found = tuple(parts)
    return found[0] if len(found) == 1 else found

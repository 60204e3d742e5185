"""Transform coding of embeddings: what is rounded are a token's coordinates along some orthogonal axes of equal length.

An encoder's channels vary together, which entropy tables of single channels cannot see. Along the principal axes of
the tokens (Karhunen-Loeve transform) they do not, and one step for all axes is what costs the fewest bits at a given
squared error (Goyal 2001, "Theoretical foundations of transform coding", sections 2 and 3).
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

_BASIS = "transform_basis"
_CENTER = "transform_center"
_SKEW = 1e-3
"""Of axes that should be orthogonal, in float32."""

_LARGEST = 1e9
"""Of an axis or the centre: any symbol has an embedding then that is a float32."""

Floats = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Transform:
    """Embeddings are `coordinates @ basis + center`."""

    basis: Floats
    """(channels, width): orthogonal rows whose common length is the quantisation step."""
    center: Floats
    """(width,) the embedding of which all symbols are 0."""

    @property
    def step(self) -> float:
        """The quantisation step, in the embedding's units."""
        return float(np.sqrt(np.mean(np.sum(self.basis.astype(np.float64) ** 2, axis=1))))

    def forward(self, embeddings: npt.NDArray[Any]) -> npt.NDArray[np.float64]:
        """Coordinates float64 (tiles, tokens, channels) of embeddings (tiles, tokens, width).

        In float64, so that which symbol is nearest does not hang on the order in which a machine adds, unless two are
        equally near. A coordinate depends on its own axis alone: the first ones are those of `first`.
        """
        basis = self.basis.astype(np.float64)
        return (embeddings - self.center.astype(np.float64)) @ (basis.T / np.sum(basis**2, axis=1))

    def inverse(self, symbols: npt.NDArray[Any], dtype: type[np.floating[Any]] = np.float32) -> npt.NDArray[Any]:
        """Embeddings (..., width) of symbols (..., channels), or of the first channels: the others are 0.

        A float's last bits hang on the order in which a machine adds: only symbols are the same everywhere.
        """
        basis, center = self.basis.astype(dtype, copy=False), self.center.astype(dtype, copy=False)
        return symbols.astype(dtype) @ basis[: symbols.shape[-1]] + center

    def first(self, channels: int) -> "Transform":
        """That of the first channels."""
        return Transform(self.basis[:channels], self.center)

    def to_tensors(self) -> dict[str, Floats]:
        """Arrays of tables.safetensors."""
        return {_BASIS: self.basis, _CENTER: self.center}

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, npt.NDArray[Any]]) -> "Transform | None":
        """The reverse of `to_tensors`; None where there is no transform: not there, too large, not orthogonal."""
        basis, center = tensors.get(_BASIS), tensors.get(_CENTER)
        if basis is None or center is None or not basis.dtype == center.dtype == np.float32:
            return None
        if basis.ndim != 2 or center.shape != basis.shape[1:] or not basis.shape[0] <= basis.shape[1]:
            return None
        if not all((np.abs(array) <= _LARGEST).all() for array in (basis, center)):  # which what is no number is not
            return None
        found = cls(basis, center)
        products = basis.astype(np.float64) @ basis.astype(np.float64).T
        if not found.step > 0 or np.abs(products / found.step**2 - np.eye(len(basis))).max() > _SKEW:
            return None
        return found

    def equals(self, other: "Transform | None") -> bool:
        """Whether it is the same to the last bit."""
        return (
            other is not None and np.array_equal(self.basis, other.basis) and np.array_equal(self.center, other.center)
        )

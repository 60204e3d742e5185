"""What NEC is compared with: embeddings and pixels coded as their best users code them.

Each file is a family: `fit_...` takes what it needs from training tiles, and gives a coder of single tiles, whose
bytes are all that is fetched for a tile. What every consumer needs once (ranges, a basis) is `shared_bytes`.
"""

from typing import Protocol

import numpy as np
import numpy.typing as npt

from nec_ray.evaluate.baselines.binary import fit_binary
from nec_ray.evaluate.baselines.jpeg2000 import fit_jpeg2000
from nec_ray.evaluate.baselines.pca import fit_pca
from nec_ray.evaluate.baselines.quantised import fit_quantised
from nec_ray.evaluate.baselines.raw import fit_raw

__all__ = [
    "EmbeddingCoder",
    "PixelCoder",
    "fit_binary",
    "fit_jpeg2000",
    "fit_pca",
    "fit_quantised",
    "fit_raw",
]


class EmbeddingCoder(Protocol):
    """Codes embeddings, a tile at a time."""

    @property
    def shared_bytes(self) -> int:
        """Bytes that a consumer fetches once, whatever the number of tiles."""

    def encode(self, tile: npt.NDArray[np.float32]) -> bytes:
        """Bytes of an embedding float32 (tokens, channels)."""

    def decode(self, data: bytes) -> npt.NDArray[np.float32]:
        """The embedding float32 (tokens, channels) of its bytes."""


class PixelCoder(Protocol):
    """Codes pixels, a tile at a time; the catalog says how large a tile is."""

    @property
    def shared_bytes(self) -> int:
        """Bytes that a consumer fetches once, whatever the number of tiles."""

    def encode(self, tile: npt.NDArray[np.float32]) -> bytes:
        """Bytes of pixels float32 (bands, height, width) in the source's units."""

    def decode(self, data: bytes, height: int, width: int) -> npt.NDArray[np.float32]:
        """The pixels float32 (bands, height, width) of their bytes."""

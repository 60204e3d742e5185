"""Principal components of tokens as small integers and zstd: what publishers of embeddings do today."""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from nec_ray.errors import InputError
from nec_ray.evaluate.baselines.quantised import AffineCoder, FloatCoder, Precision, Ranges, fit_quantised

Floats = npt.NDArray[np.float32]
_TILES_A_STEP = 64


@dataclass(frozen=True)
class PcaCoder:
    """Embeddings by their first principal components, which are quantised."""

    mean: Floats
    """(channels,)."""
    basis: Floats
    """(channels, components), its columns orthonormal."""
    inner: FloatCoder | AffineCoder
    """Of the components."""

    @property
    def shared_bytes(self) -> int:
        """Bytes of the mean, the basis and the components' ranges."""
        return self.mean.nbytes + self.basis.nbytes + self.inner.shared_bytes

    def encode(self, tile: Floats) -> bytes:
        """Bytes of an embedding float32 (tokens, channels)."""
        return self.inner.encode((tile - self.mean) @ self.basis)

    def decode(self, data: bytes) -> Floats:
        """The embedding float32 (tokens, channels) of its bytes, back in the encoder's channels."""
        return self.inner.decode(data) @ self.basis.T + self.mean


def fit_pca(
    train: Floats,
    components: int,
    precision: Precision = "int8",
    ranges: Ranges = "channel",
    percentile: float = 100,
) -> PcaCoder:
    """Fit mean and basis to all tokens of training tiles, and the ranges to their components.

    Args:
        train: embeddings float32 (tiles, tokens, channels) of training tiles.
        components: kept.
        precision: of a component.
        ranges: `channel` is a range a component; `tensor` is one for all, with the same error in each, and few bits
            for those that vary little.
        percentile: see `fit_quantised`.

    Raises:
        InputError: more components than the embeddings have channels.
    """
    channels = train.shape[2]
    if components > channels:
        raise InputError(f"{components} principal components of embeddings of {channels} channels: ask for fewer")
    mean = train.mean(axis=(0, 1), dtype=np.float64)
    covariance = np.zeros((channels, channels))
    for start in range(0, len(train), _TILES_A_STEP):  # float64 of all tiles would be twice the embeddings
        part = train[start : start + _TILES_A_STEP].reshape(-1, channels) - mean
        covariance += part.T @ part
    basis = np.linalg.eigh(covariance)[1][:, ::-1][:, :components].astype(np.float32)
    kept = np.stack([(tile - mean.astype(np.float32)) @ basis for tile in train])
    return PcaCoder(mean.astype(np.float32), basis, fit_quantised(kept, precision, ranges, percentile))

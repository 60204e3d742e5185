"""JPEG 2000 at a rate (NEC, section 4): OpenJPEG, as Pillow has it; the encoder runs at the consumer."""

import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from nec_ray.evaluate.baselines.scaling import Depth, Floats, Scaling, fit_scaling

_RESOLUTIONS = 6  # OpenJPEG's default, where a tile is large enough
_COMMENT = b"\xff\x64\x00\x05\x00\x01-"
"""Segment of the comment "-": OpenJPEG's own takes 39 bytes of a rate that may be 150."""
_LENGTH = 4  # bytes that say how long a band's codestream is


@dataclass(frozen=True)
class Jpeg2000Coder:
    """Pixels by the irreversible wavelet; three bands of 8 bits also by the irreversible colour transform."""

    scaling: Scaling
    bits_per_pixel: float
    """Aimed at, over all bands; a codestream's headers set a floor."""

    @property
    def shared_bytes(self) -> int:
        """Bytes of the bands' ranges."""
        return self.scaling.shared_bytes

    def encode(self, tile: Floats) -> bytes:
        """Bytes of pixels float32 (bands, height, width) in the source's units: bare codestreams, no JP2 boxes."""
        whole = self.scaling.integers(tile)
        if self._joint:
            return _encode(whole.transpose(1, 2, 0), 24 / self.bits_per_pixel)
        ratio = len(whole) * self.scaling.bits / self.bits_per_pixel
        streams = [_encode(band, ratio) for band in whole]
        return b"".join(len(stream).to_bytes(_LENGTH, "little") + stream for stream in streams)

    def decode(self, data: bytes, height: int, width: int) -> Floats:
        """The pixels float32 (bands, height, width) of their bytes."""
        if self._joint:
            return self.scaling.pixels(_decode(data, height, width).transpose(2, 0, 1))
        bands, start = [], 0
        for _ in self.scaling.low:
            end = start + _LENGTH + int.from_bytes(data[start : start + _LENGTH], "little")
            bands.append(_decode(data[start + _LENGTH : end], height, width))
            start = end
        return self.scaling.pixels(np.stack(bands))

    @property
    def _joint(self) -> bool:
        return self.scaling.bits == 8 and len(self.scaling.low) == 3


def fit_jpeg2000(train: Sequence[Floats], bits_per_pixel: float, bits: Depth, dtypes: set[str]) -> Jpeg2000Coder:
    """Fit the bands' ranges, where the sources' type does not fit into so many bits.

    Args:
        train: pixels float32 (bands, height, width) of training tiles.
        bits_per_pixel: aimed at, over all bands.
        bits: of a value before it is coded.
        dtypes: numpy's names of the sources' types.
    """
    return Jpeg2000Coder(fit_scaling(train, bits, dtypes), bits_per_pixel)


def _encode(image: npt.NDArray[Any], ratio: float) -> bytes:
    from PIL import Image

    levels = max(1, min(_RESOLUTIONS, min(image.shape[:2]).bit_length()))
    out = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(image)).save(
        out,
        "JPEG2000",
        irreversible=True,
        mct=int(image.ndim == 3),
        no_jp2=True,
        comment="-",
        num_resolutions=levels,
        quality_mode="rates",
        quality_layers=[max(1.0, ratio)],
    )
    return out.getvalue().replace(_COMMENT, b"", 1)


def _decode(data: bytes, height: int, width: int) -> npt.NDArray[Any]:
    from PIL import Image

    with Image.open(io.BytesIO(data), formats=("JPEG2000",)) as image:
        if image.size != (width, height):
            raise ValueError(f"a codestream of {image.size} pixels for a tile of {(width, height)}")
        return np.asarray(image)

"""From pixels to latents and symbols with a codec's encoder; CompressAI is not needed for that."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from nec_ray.codec import Arrays, Codec, Scale, joined, parts_of
from nec_ray.codec.truncate import MEDIANS
from nec_ray.errors import CorruptCodec, InputError, UnsupportedFormat
from nec_ray.models.families import family, names
from nec_ray.models.family import Config
from nec_ray.models.threads import one_thread

BATCH = 32
_LARGEST_INPUT = 1e6
"""Standard deviations from the mean: wilder pixels are cut off here, so that no latent overflows to NaN."""


class Embedder:
    """A codec's encoder, ready to run.

    Tiles are taken `BATCH` at a time from the first one on, every batch has the same shape (the last one is
    filled up) and runs on one thread: symbols depend on a tile's pixels, its place in its batch and the kind of
    machine, but not on how many tiles, workers or threads there are.

    Args:
        codec: whose encoder.
        device: `cpu` or `cuda`; in float32 on both, without TF32.

    Raises:
        CorruptCodec: the encoder's arrays do not fit the architecture in codec.json.
    """

    def __init__(self, codec: Codec, device: str = "cpu") -> None:
        self._encoder = encoder_of(codec).eval()
        self._device = torch.device(device)
        self._encoder.to(self._device)
        spec = codec.spec.input
        self._mean = torch.tensor(spec.mean, dtype=torch.float32)[:, None, None]
        self._std = torch.tensor(spec.std, dtype=torch.float32)[:, None, None]
        self._shape = (len(spec.bands), spec.size, spec.size)
        self._codec = codec
        self._shapes = codec.spec.embedding_shapes()  # fewer, or of fewer channels, where the codec is truncated

    def latents(self, pixels: npt.NDArray[np.float32]) -> Arrays:
        """Latents float32 (tiles, tokens, channels) of pixels float32 (tiles, bands, size, size), raw units.

        Where the codec has several grid scales, a tuple of one such array a scale.

        Raises:
            ValueError: pixels of another shape.
        """
        if pixels.shape[1:] != self._shape:
            raise ValueError(f"pixels must be (tiles, {self._shape}), not {pixels.shape}")
        out = [np.empty((len(pixels), *shape), np.float32) for shape in self._shapes]
        batch = torch.zeros((BATCH, *self._shape))
        with torch.inference_mode(), one_thread(), _exact():
            for start in range(0, len(pixels), BATCH):
                part = torch.from_numpy(np.array(pixels[start : start + BATCH], np.float32))
                batch[: len(part)] = ((part - self._mean) / self._std).clamp_(-_LARGEST_INPUT, _LARGEST_INPUT)
                latents = parts_of(self._encoder(batch.to(self._device)))
                for whole, latent in zip(out, latents, strict=False):
                    whole[start : start + len(part)] = latent[: len(part), :, : whole.shape[2]].cpu().numpy()
        return joined(out)

    def symbols(self, pixels: npt.NDArray[np.float32]) -> Arrays:
        """Symbols int32 (tiles, tokens, channels) of the latents; see `Codec.quantise`."""
        return self._codec.quantise(self.latents(pixels))


@contextmanager
def _exact() -> Iterator[None]:
    """Products of float32 on a GPU in float32, whatever the process has set."""
    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before


def model_config(codec: Codec) -> Config:
    """The model's sizes that codec.json declares.

    Raises:
        CorruptCodec: they are incomplete, or contradict the latent's shape.
        UnsupportedFormat: the model is of a family that is not known here; what is encoded decodes without it.
    """
    spec = codec.spec
    if spec.family not in names():
        raise UnsupportedFormat(
            f"codec {codec.id[:12]}: its model is of the family {spec.family}, of a later release; update nec_ray"
        )
    of = family(spec.family)
    try:
        config = of.config(spec.architecture)
    except (TypeError, InputError) as error:
        raise CorruptCodec(f"codec {codec.id[:12]}: its architecture is not that of {of.noun} ({error})") from None
    declared = (spec.grid, spec.input.size, len(spec.input.bands))
    fits = ((config.side, config.side), config.size, config.bands) == declared
    if not fits or not _has_scales(config, codec.scales()) or spec.width not in {None, config.dim}:
        raise CorruptCodec(f"codec {codec.id[:12]}: its architecture and its latent's shape contradict each other")
    return config


def encoder_of(codec: Codec) -> nn.Module:
    """The codec's encoder: normalised pixels (batch, bands, size, size) -> latent (batch, tokens, dim)."""
    config = model_config(codec)
    encoder = family(codec.spec.family).encoder(config)
    _load(encoder, codec, "encoder")
    return encoder


def _has_scales(config: Config, scales: Sequence[Scale]) -> bool:
    """Whether they are the first channels of a model's latent, in its order."""
    shapes, first = config.shapes, 0
    for number, (scale, (side, dim)) in enumerate(zip(scales, shapes, strict=False)):
        count = len(scale.rows)
        in_order = np.array_equal(scale.rows, np.arange(first, first + count))
        last = number + 1 == len(scales)
        if scale.grid != (side, side) or not in_order or count > dim or (count < dim and not last):
            return False
        first += count
    return len(scales) <= len(shapes)


def first_decoder_layer(codec: Codec) -> nn.Module:
    """The codec's first decoder layer: (batch, tokens, channels) -> (batch, tokens, decoder channels).

    Of several grid scales, its tokens are those of the finest one; see `dataset.on_one_grid`.
    """
    config = model_config(codec)
    layer = family(codec.spec.family).first_layer(config)
    _load(layer, codec, "decoder")
    return layer


def latent_medians(codec: Codec) -> npt.NDArray[np.float32]:
    """Medians float32 (channels,) of the whole latent, also where the codec holds only its first layers."""
    medians = codec.tensors("decoder").get(MEDIANS, codec.tables.median)
    if medians.dtype != np.float32 or medians.shape != (model_config(codec).dim,) or not np.all(np.isfinite(medians)):
        raise CorruptCodec(f"codec {codec.id[:12]}: its decoder's medians do not fit its architecture")
    return np.asarray(medians)


def _load(module: nn.Module, codec: Codec, part: str) -> None:
    arrays = codec.tensors(part)
    tensors = {name: torch.from_numpy(np.array(array)) for name, array in arrays.items() if name != MEDIANS}
    try:
        module.load_state_dict(tensors, strict=True)
    except RuntimeError as error:
        first = str(error).strip().splitlines()[1:2] or [str(error)]
        raise CorruptCodec(
            f"codec {codec.id[:12]}: its {part} does not fit its architecture ({first[0].strip()})"
        ) from None

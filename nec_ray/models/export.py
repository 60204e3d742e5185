"""From a trained compressor to a codec directory: integer tables, encoder, first decoder layer, golden payloads."""

import copy
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from compressai.entropy_models import EntropyBottleneck
from torch import nn

from nec_ray.codec import EntropyTables, InputSpec, LayerSpec, Lineage, write_codec
from nec_ray.codec.payload import PayloadCoder
from nec_ray.models.mae import MaeEncoder
from nec_ray.models.nec import NeuralEmbeddingCompressor
from nec_ray.models.stages import StageEncoder

_MAX_RADIUS = 4096
_TAIL = 1e-9
"""Probability that may lie outside a channel's table: what does is coded as an escape."""
_DEAD = 1e-4
"""A channel whose symbols differ from 0 more rarely than this costs nothing but escapes."""
_DEAD_CALIBRATION = 1e-3


def export_codec(
    model: NeuralEmbeddingCompressor,
    folder: Path,
    *,
    input_spec: InputSpec,
    lineage: Lineage,
    calibration: npt.NDArray[np.float32],
    half: bool = False,
) -> str:
    """Write the codec directory of a trained compressor.

    Args:
        model: the compressor; its bottleneck's quantiles are solved for here.
        folder: where to; must not exist.
        input_spec: what the encoder is fed.
        lineage: where it comes from; `bits_per_symbol` is replaced by what real payloads measure.
        calibration: pixels float32 (tiles, bands, size, size), raw units, of some training tiles.
        half: keep the weights as float16; the tables are made from what they then compute.

    Returns:
        The codec id.
    """
    model.eval()
    encoder, first = model.encoder, model.decoder.first
    assert isinstance(encoder, MaeEncoder | StageEncoder)
    assert isinstance(first, nn.Module)
    config = encoder.config
    kept = np.float16 if half else np.float32
    if half:
        for module in (encoder, first):
            module.load_state_dict({name: tensor.half() for name, tensor in module.state_dict().items()})
    latents = _latents(model, input_spec, calibration)
    tables = tables_of(model.bottleneck, latents)
    symbols = np.rint(latents - tables.median).astype(np.int32)
    layers = [LayerSpec(channels=channels, tokens=config.tokens) for channels in model.layers]
    size = int(PayloadCoder(tables, layers).compress(symbols).length.sum())
    return write_codec(
        folder,
        family=encoder.family,
        architecture=config.to_architecture(),
        input=input_spec,
        grid=(config.side, config.side),
        layers=layers,
        lineage=lineage.model_copy(update={"bits_per_symbol": 8 * size / symbols.size}),
        tables=tables,
        encoder=_arrays(encoder, kept),
        decoder=_arrays(first, kept),
        calibration=symbols,
    )


def tables_of(bottleneck: EntropyBottleneck, latents: npt.NDArray[np.float32]) -> EntropyTables:
    """Integer tables of a trained bottleneck.

    Args:
        bottleneck: the trained densities.
        latents: real latents float32 (tiles, tokens, channels), to tell dead channels.
    """
    bottleneck.update(force=True, update_quantiles=True)
    with torch.no_grad():
        quantiles = bottleneck.quantiles[:, 0, :]
        median = quantiles[:, 1]
        # The quantiles of CompressAI leave a tail of 1e-9 on either side.
        reach = torch.maximum(median - quantiles[:, 0], quantiles[:, 2] - median).ceil().clamp(1, _MAX_RADIUS)
        radius = int(reach.max())
        steps = torch.arange(-radius, radius + 1, dtype=torch.float64)
        # In float32 the difference of two sigmoids near 1 is lost in the upper tail.
        exact = copy.deepcopy(bottleneck).double()
        likelihood, _, _ = exact._likelihood(median.double()[:, None, None] + steps, stop_gradient=True)
        density = likelihood[:, 0].numpy()
        centre = median.detach().numpy()
    pmfs, offset = [], np.zeros(len(centre), np.int64)
    for channel, row in enumerate(density):
        inside = np.flatnonzero(row > _TAIL)
        first, last = (int(inside[0]), int(inside[-1])) if len(inside) else (radius, radius)
        pmfs.append(row[first : last + 1] / max(1.0, float(row.sum())))
        offset[channel] = first - radius
    moved = np.mean(np.rint(latents - centre) != 0, axis=(0, 1))
    dead = (density[:, radius] >= 1 - _DEAD) & (moved <= _DEAD_CALIBRATION)
    return EntropyTables.from_pmf(pmfs, offset, centre, dead, tokens=latents.shape[1])


def _latents(
    model: NeuralEmbeddingCompressor, spec: InputSpec, pixels: npt.NDArray[np.float32], batch: int = 64
) -> npt.NDArray[np.float32]:
    mean = torch.tensor(spec.mean, dtype=torch.float32)[:, None, None]
    std = torch.tensor(spec.std, dtype=torch.float32)[:, None, None]
    parts = []
    with torch.inference_mode():
        for start in range(0, len(pixels), batch):
            part = torch.from_numpy(np.array(pixels[start : start + batch], np.float32))
            parts.append(model.encoder((part - mean) / std).numpy())
    return np.concatenate(parts)


def _arrays(module: nn.Module, kept: type[np.floating[Any]]) -> dict[str, npt.NDArray[np.floating[Any]]]:
    return {name: tensor.detach().numpy().astype(kept) for name, tensor in module.state_dict().items()}

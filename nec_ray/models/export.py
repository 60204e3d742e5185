"""From a trained compressor to a codec directory: integer tables, encoder, first decoder layer, golden payloads."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from nec_ray.codec import (
    InputSpec,
    LayerSpec,
    Lineage,
    Transform,
    joined,
    parts_of,
    write_codec,
)
from nec_ray.codec.payload import PayloadCoder
from nec_ray.models.family import Config
from nec_ray.models.nec import NeuralEmbeddingCompressor


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
    assert isinstance(first, nn.Module)
    config: Config = encoder.config  # type: ignore[assignment]
    kept = np.float16 if half else np.float32
    if half:
        for module in (encoder, first):
            module.load_state_dict({name: tensor.half() for name, tensor in module.state_dict().items()})
    latents = _latents(model, input_spec, calibration)
    tables = model.entropy.tables(model.bottleneck, latents)
    medians = np.split(tables.median, np.cumsum(model.widths)[:-1])
    transform = None
    if model.basis is not None and model.center is not None:
        # Embeddings are of whole symbols: what is left of the medians goes into the centre.
        basis, center = model.basis.numpy(), model.center.numpy() + tables.median @ model.basis.numpy()
        transform, tables = Transform(basis, center), replace(tables, median=np.zeros_like(tables.median))
    parts = [np.rint(part - median).astype(np.int32) for part, median in zip(latents, medians, strict=True)]
    sides = [side for side, _ in config.shapes]
    layers = [
        LayerSpec(channels=channels, tokens=sides[scale] ** 2, scale=config.side // sides[scale])
        for channels, scale in zip(model.layers, model.layer_scales(), strict=True)
    ]
    symbols = joined(parts)
    size = int(PayloadCoder(tables, layers).compress(symbols).length.sum())
    return write_codec(
        folder,
        family=str(encoder.family),
        architecture=config.to_architecture(),
        input=input_spec,
        grid=(config.side, config.side),
        layers=layers,
        lineage=lineage.model_copy(update={"bits_per_symbol": 8 * size / sum(part.size for part in parts)}),
        tables=tables,
        encoder=_arrays(encoder, kept),
        decoder=_arrays(first, kept),
        calibration=symbols,
        transform=transform,
    )


def _latents(
    model: NeuralEmbeddingCompressor, spec: InputSpec, pixels: npt.NDArray[np.float32], batch: int = 64
) -> list[npt.NDArray[np.float32]]:
    """What is rounded, of each grid scale (tiles, tokens, channels)."""
    mean = torch.tensor(spec.mean, dtype=torch.float32)[:, None, None]
    std = torch.tensor(spec.std, dtype=torch.float32)[:, None, None]
    parts = []
    with torch.inference_mode():
        for start in range(0, len(pixels), batch):
            part = torch.from_numpy(np.array(pixels[start : start + batch], np.float32))
            latents = parts_of(model.encoder((part - mean) / std))
            parts.append([model.coordinates(latent).numpy() for latent in latents])
    return [np.concatenate(scale) for scale in zip(*parts, strict=True)]


def _arrays(module: nn.Module, kept: type[np.floating[Any]]) -> dict[str, npt.NDArray[np.floating[Any]]]:
    return {name: tensor.detach().numpy().astype(kept) for name, tensor in module.state_dict().items()}

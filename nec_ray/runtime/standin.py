"""Codecs of random weights: what is measured with them does not depend on what a model has learned."""

from pathlib import Path

import numpy as np
import torch

from nec_ray.codec import Codec, EntropyTables, InputSpec, LayerSpec, Lineage, load_codec, write_codec
from nec_ray.models.mae import SIZES, FirstDecoderLayer, MaeConfig, MaeEncoder

_STANDIN = {"dim": 8, "depth": 1, "heads": 1, "decoder_dim": 8, "decoder_depth": 1, "decoder_heads": 1}
_SCALE = 0.3
"""Of the symbols' Laplacian: about 0.8 bits each."""


def standin_codec(folder: Path, *, size: str, pixels: int, layers: int = 1) -> Codec:
    """Write and load a codec for red, green and blue.

    Args:
        folder: where to; must not exist.
        size: one of `nec_ray.models.mae.SIZES`, or `standin` for 8 channels and a single block.
        pixels: a side of the input, a multiple of 16, or of 8 for `standin`.
        layers: equal ones, into which the channels are divided.
    """
    torch.manual_seed(0)
    patch = 8 if size == "standin" else 16
    config = MaeConfig(size=pixels, patch=patch, bands=3, **(_STANDIN if size == "standin" else SIZES[size]))
    encoder, decoder = (
        {name: tensor.numpy() for name, tensor in module(config).state_dict().items()}
        for module in (MaeEncoder, FirstDecoderLayer)
    )
    steps = np.arange(-12, 13)
    pmf = np.exp(-np.abs(steps) / _SCALE)
    channels = config.dim
    symbols = np.rint(np.random.default_rng(0).laplace(0, _SCALE, (64, config.tokens, channels))).astype(np.int32)
    write_codec(
        folder,
        family="mae_vit",
        architecture=config.to_architecture(),
        input=InputSpec(bands=["red", "green", "blue"], mean=[7700.0] * 3, std=[2500.0] * 3, size=pixels),
        grid=(config.side, config.side),
        layers=[LayerSpec(channels=channels // layers, tokens=config.tokens)] * layers,
        lineage=Lineage(data="none: random weights", licence="none", beta=0, bits_per_symbol=0),
        tables=EntropyTables.from_pmf(
            [pmf / pmf.sum()] * channels,
            np.full(channels, steps[0], np.int64),
            np.zeros(channels, np.float32),
            np.zeros(channels, bool),
            tokens=config.tokens,
        ),
        encoder=encoder,
        decoder=decoder,
        calibration=symbols,
    )
    return load_codec(folder)

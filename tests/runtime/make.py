"""A codec with a small random encoder: encoding does not care whether it was trained."""

from pathlib import Path

import numpy as np
import torch

from nec_ray.codec import Codec, InputSpec, LayerSpec, Lineage, load_codec, write_codec
from nec_ray.models.mae import FirstDecoderLayer, MaeConfig, MaeEncoder
from tests.codec.make import laplacian_tables


def random_codec(
    folder: Path, *, bands: tuple[str, ...] = ("red", "green", "blue"), mean: float = 7700, seed: int = 0
) -> Codec:
    """4 x 4 tokens of 16 channels from tiles resized to 32 pixels."""
    torch.manual_seed(seed)
    config = MaeConfig(
        size=32, patch=8, bands=len(bands), dim=16, depth=2, heads=2, decoder_dim=8, decoder_depth=2, decoder_heads=2
    )
    parts = [
        {name: tensor.numpy() for name, tensor in module(config).state_dict().items()}
        for module in (MaeEncoder, FirstDecoderLayer)
    ]
    rng = np.random.default_rng(seed)
    write_codec(
        folder,
        family="mae_vit",
        architecture=config.to_architecture(),
        input=InputSpec(bands=list(bands), mean=[mean] * len(bands), std=[mean / 15] * len(bands), size=32),
        grid=(4, 4),
        layers=[LayerSpec(channels=16, tokens=16)],
        lineage=Lineage(data="none", licence="none", beta=0.0, bits_per_symbol=0.0),
        tables=laplacian_tables(np.full(16, 0.8)),
        encoder=parts[0],
        decoder=parts[1],
        calibration=np.rint(rng.standard_normal((40, 16, 16))).astype(np.int32),
    )
    return load_codec(folder)

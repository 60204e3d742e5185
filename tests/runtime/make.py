"""A codec with a small random encoder: encoding does not care whether it was trained."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

from nec_ray.codec import Codec, EntropyTables, InputSpec, LayerSpec, Lineage, load_codec, write_codec
from nec_ray.models.mae import FirstDecoderLayer, MaeConfig, MaeEncoder
from tests.codec.make import laplacian_symbols, laplacian_tables


class CtrlC:
    """A run's `progress` that stops it after a few shards, as Ctrl-C would."""

    def __init__(self, after: int) -> None:
        self.left = after

    def __call__(self, *_: int) -> None:
        self.left -= 1
        if not self.left:
            raise KeyboardInterrupt


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


def with_other_tables(codec: Codec, folder: Path, *, scale: float = 1.4, shift: float = 0.3) -> Codec:
    """A codec of the same encoder whose tables and medians are others; one layer."""
    widths = np.geomspace(0.1, 4, codec.spec.channels) * scale
    tables = replace(laplacian_tables(widths), median=codec.tables.median + np.float32(shift))
    symbols = laplacian_symbols(np.random.default_rng(5), widths, 40, codec.spec.tokens)
    return _same_encoder(codec, folder, [codec.spec.channels], tables, symbols)


def with_layers(codec: Codec, folder: Path, channels: list[int]) -> Codec:
    """The codec, its channels in layers of so many."""
    return _same_encoder(codec, folder, channels, codec.tables, codec.golden())


def _same_encoder(
    codec: Codec, folder: Path, layers: list[int], tables: EntropyTables, symbols: npt.NDArray[np.int32]
) -> Codec:
    write_codec(
        folder,
        family=codec.spec.family,
        architecture=codec.spec.architecture,
        input=codec.spec.input,
        grid=codec.spec.grid,
        layers=[LayerSpec(channels=channels, tokens=codec.spec.tokens) for channels in layers],
        lineage=Lineage(data="none", licence="none", beta=0.0, bits_per_symbol=0.0),
        tables=tables,
        encoder=codec.tensors("encoder"),
        decoder=codec.tensors("decoder"),
        calibration=symbols,
    )
    return load_codec(folder)

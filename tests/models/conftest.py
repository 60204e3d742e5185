"""A small compressor trained on the built-in scene, and its codec."""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pytest
import torch

from nec_ray.codec import Codec, InputSpec, Lineage, load_codec
from nec_ray.models.export import export_codec
from nec_ray.models.mae import MaeConfig
from nec_ray.models.nec import NeuralEmbeddingCompressor, set_trainable
from nec_ray.tiles import build_catalog, builtin_scene, read_tiles

CONFIG = MaeConfig(
    size=32, patch=8, bands=3, dim=48, depth=2, heads=4, decoder_dim=32, decoder_depth=2, decoder_heads=4
)
STEPS = 150


@dataclass(frozen=True)
class Trained:
    """What a short training run on real tiles left behind."""

    model: NeuralEmbeddingCompressor
    pixels: npt.NDArray[np.float32]
    """(tiles, bands, 32, 32), raw units."""
    codec: Codec
    mse: list[float]
    bits: list[float]


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Trained:
    bands = ["red", "green", "blue"]
    rows = build_catalog(str(builtin_scene()), tile_size=32).table
    pixels = read_tiles(rows.slice(400, 256), bands=bands, size=32, fill=[0.0] * 3).pixels
    spec = InputSpec(bands=bands, mean=pixels.mean((0, 2, 3)).tolist(), std=pixels.std((0, 2, 3)).tolist(), size=32)
    scaled = torch.from_numpy(
        (pixels - np.array(spec.mean, np.float32)[:, None, None]) / np.array(spec.std, np.float32)[:, None, None]
    )
    torch.manual_seed(0)
    model = NeuralEmbeddingCompressor.mae(CONFIG)
    set_trainable(model, "all")
    density = list(model.bottleneck.parameters())
    others = [p for name, p in model.named_parameters() if not name.startswith("bottleneck") and p.requires_grad]
    optimiser = torch.optim.AdamW([{"params": others, "lr": 1e-3}, {"params": density, "lr": 2e-2}])
    mse, bits = [], []
    for _ in range(STEPS):
        losses = model(scaled[torch.randint(len(scaled), (32,))], mask_ratio=0.75, beta=0.02)
        optimiser.zero_grad()
        losses.loss.backward()
        optimiser.step()
        mse.append(float(losses.mse.detach()))
        bits.append(float(losses.bits.detach()))
    folder = tmp_path_factory.mktemp("models") / "codec"
    lineage = Lineage(data="built-in scene", licence="public domain", beta=0.02, bits_per_symbol=0)
    export_codec(model, folder, input_spec=spec, lineage=lineage, calibration=pixels)
    return Trained(model, pixels, load_codec(folder), mse, bits)

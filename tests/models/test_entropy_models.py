"""An entropy model is one file: densities that nothing of nec_ray names are trained; payloads cost what they say."""

from pathlib import Path

import numpy as np
import pytest
import torch

from nec_ray.codec import Lineage, load_codec
from nec_ray.errors import InputError
from nec_ray.models import entropy_models
from nec_ray.models.embed import Embedder
from nec_ray.models.export import export_codec
from nec_ray.models.nec import NeuralEmbeddingCompressor, set_trainable
from tests.models.conftest import CONFIG, Trained

TOY = Path(__file__).with_name("toy_entropy.py")


def test_an_entropy_model_in_one_file_is_trained_and_coded(
    trained: Trained, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(InputError, match="no entropy model 'toy_entropy'; there are factorized"):
        NeuralEmbeddingCompressor.mae(CONFIG, entropy="toy_entropy")
    (tmp_path / "entropy_models").mkdir()
    (tmp_path / "entropy_models" / TOY.name).write_text(TOY.read_text())
    monkeypatch.setattr(entropy_models, "__path__", [*entropy_models.__path__, str(tmp_path / "entropy_models")])
    torch.manual_seed(0)
    model = NeuralEmbeddingCompressor.mae(CONFIG, entropy="toy_entropy")
    model.encoder.load_state_dict(trained.model.encoder.state_dict())
    set_trainable(model, "entropy")
    optimiser = torch.optim.Adam(model.bottleneck.parameters(), lr=5e-2)
    spec = trained.codec.spec.input
    scaled = torch.from_numpy(
        ((trained.pixels - np.array(spec.mean)[:, None, None]) / np.array(spec.std)[:, None, None]).astype(np.float32)
    )
    for _ in range(60):
        bits = model(scaled, mask_ratio=0.0, beta=1.0).bits
        optimiser.zero_grad()
        bits.backward()
        optimiser.step()
    lineage = Lineage(data="built-in scene", licence="public domain", beta=0.02, bits_per_symbol=0)
    export_codec(model, tmp_path / "codec", input_spec=spec, lineage=lineage, calibration=trained.pixels)
    codec = load_codec(tmp_path / "codec")
    symbols = Embedder(codec).symbols(trained.pixels)
    payloads = codec.compress(symbols)
    assert np.array_equal(codec.decompress(payloads), symbols)
    values = torch.from_numpy(np.asarray(codec.dequantise(symbols))).flatten(0, 1).T
    with torch.no_grad():
        promised = float(model.entropy.bits(model.bottleneck, values).double().sum())
    coded = 8 * float(payloads.length.sum())
    assert promised < coded < 1.005 * promised + 8 * 16 * len(symbols)

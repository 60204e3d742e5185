import copy
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from compressai.entropy_models import EntropyBottleneck
from torch import nn

from nec_ray.codec import EntropyTables, LayerSpec, Lineage, PayloadCoder, load_codec
from nec_ray.errors import InputError
from nec_ray.models.embed import Embedder
from nec_ray.models.entropy_models.factorized import tables_of
from nec_ray.models.export import export_codec
from nec_ray.models.nec import NeuralEmbeddingCompressor
from tests.models.conftest import CONFIG, Trained


def model_bits(bottleneck: EntropyBottleneck, symbols: np.ndarray, median: np.ndarray) -> float:  # type: ignore[type-arg]
    """Sum of -log2 of the torch model's own likelihoods of symbols int32 (tiles, tokens, channels)."""
    values = torch.from_numpy((symbols + median).astype(np.float32)).permute(2, 0, 1).flatten(1)[:, None]
    with torch.no_grad():
        likelihood, _, _ = bottleneck._likelihood(values)
    return float(-likelihood.double().log2().sum())


def test_losses_fall_on_real_tiles(trained: Trained) -> None:
    assert np.mean(trained.mse[-20:]) < 0.9 * np.mean(trained.mse[:20])
    assert np.mean(trained.bits[-20:]) < 0.5 * np.mean(trained.bits[:20])


def test_tables_cost_what_the_model_says(trained: Trained) -> None:
    """On symbols drawn from the model itself, integer tables cost within 0.3% of its likelihoods.

    Payloads of so many tokens that what each has besides symbols, some 16 bytes, is 0.05% of it.
    """
    tiles, tokens = 3, 10_000
    rng = np.random.default_rng(0)
    tables = trained.codec.tables
    live = np.flatnonzero(~tables.dead)
    support = np.arange(-200, 201)
    values = torch.from_numpy((tables.median[:, None, None] + support).astype(np.float32))
    with torch.no_grad():
        likelihood = trained.model.bottleneck._likelihood(values)[0][:, 0].double().numpy()
    symbols = np.zeros((tiles, tokens, tables.channels), np.int32)
    for channel in live:
        pmf = likelihood[channel] / likelihood[channel].sum()
        symbols[:, :, channel] = rng.choice(support, (tiles, tokens), p=pmf)
    expected = model_bits(trained.model.bottleneck, symbols, tables.median)  # a dead channel's zeros cost nearly 0
    coder = PayloadCoder(tables, [LayerSpec(channels=tables.channels, tokens=tokens)])
    size = 8 * int(coder.compress(symbols).length.sum())
    assert expected <= size <= expected * 1.003
    assert 8 * 16 * tiles < 0.001 * expected


def test_symbols_are_compressais(trained: Trained) -> None:
    """CompressAI's own coder, through its own tables, decodes to the same embeddings."""
    model, codec = trained.model.eval(), trained.codec
    spec = codec.spec.input
    mean, std = (torch.tensor(v)[:, None, None] for v in (spec.mean, spec.std))
    with torch.no_grad():
        latent = model.encoder((torch.from_numpy(trained.pixels[:8]) - mean) / std)
        stacked = latent.transpose(1, 2).unsqueeze(3)
        strings = model.bottleneck.compress(stacked)
        theirs = model.bottleneck.decompress(strings, stacked.shape[2:]).squeeze(3).transpose(1, 2).numpy()
    symbols = np.rint(latent.numpy() - codec.tables.median).astype(np.int32)
    payloads = codec.compress(symbols)
    ours = codec.dequantise(codec.decompress(payloads))
    np.testing.assert_allclose(ours, theirs, atol=1e-5)
    size = sum(map(len, payloads))
    assert size <= 1.02 * sum(map(len, strings)) + 8 * 16  # and payloads with checksums are hardly larger


def test_lineage_states_measured_payload_bytes(trained: Trained) -> None:
    from nec_ray.models.embed import Embedder

    payloads = trained.codec.compress(Embedder(trained.codec).symbols(trained.pixels))
    measured = 8 * sum(map(len, payloads)) / (len(payloads) * 16 * 48)
    stated = trained.codec.spec.lineage.bits_per_symbol
    assert abs(stated / measured - 1) < 0.001
    assert 0.02 < stated < 6


def test_a_channel_that_is_always_zero_costs_nothing_and_a_busy_one_is_kept() -> None:
    torch.manual_seed(0)
    bottleneck = EntropyBottleneck(3)
    latents = torch.randn(64, 3, 16, 1) * torch.tensor([0.01, 0.01, 2.0]).reshape(1, 3, 1, 1)
    optimiser = torch.optim.Adam(bottleneck.parameters(), lr=3e-2)
    for _ in range(500):
        likelihood = bottleneck(latents * 1.0)[1]
        optimiser.zero_grad()
        (-likelihood.log().mean()).backward()
        optimiser.step()
    rounded = latents.squeeze(3).transpose(1, 2).numpy()
    rounded[0, 0, 1] = 5.0  # one surprise among 1,024: within what escapes may cost
    tables = tables_of(bottleneck, rounded)
    assert isinstance(tables, EntropyTables)
    assert not tables.dead[2]
    busy = rounded.copy()
    busy[:, :8, :2] = 5.0
    assert not tables_of(bottleneck, busy).dead[:2].any()


def test_embedding_needs_no_compressai() -> None:
    code = "import sys, nec_ray.models.embed; sys.exit('compressai' in sys.modules or 'ray' in sys.modules)"
    assert subprocess.run([sys.executable, "-W", "ignore", "-c", code], check=False).returncode == 0


def test_weights_kept_in_half_are_what_the_tables_are_made_from(trained: Trained, tmp_path: Path) -> None:
    """The codec's encoder is the rounded one: its latents are those that export saw, and half the bytes."""
    model = copy.deepcopy(trained.model)
    spec = trained.codec.spec
    lineage = Lineage(data="scene", licence="public domain", beta=0.01, bits_per_symbol=0)
    export_codec(
        model, tmp_path / "codec", input_spec=spec.input, lineage=lineage, calibration=trained.pixels[:64], half=True
    )
    codec = load_codec(tmp_path / "codec")
    rounded = {name: tensor.half().float() for name, tensor in trained.model.encoder.state_dict().items()}
    kept = codec.tensors("encoder")
    assert all(np.array_equal(kept[name], tensor.numpy()) for name, tensor in rounded.items())
    symbols = Embedder(codec).symbols(trained.pixels[:64])
    np.testing.assert_array_equal(symbols[:4], codec.golden())
    size = 8 * sum(map(len, codec.compress(symbols))) / symbols.size
    assert size == pytest.approx(codec.spec.lineage.bits_per_symbol, rel=0.01)
    before = (trained.codec._store.size("encoder.safetensors"), codec._store.size("encoder.safetensors"))
    assert before[1] < 0.52 * before[0]


def test_a_transform_is_the_principal_axes_and_costs_what_the_model_says(trained: Trained, tmp_path: Path) -> None:
    """The exported codec's embeddings are the model's own; its axes those that an independent PCA finds."""
    from sklearn.decomposition import PCA

    spec = trained.codec.spec
    model = NeuralEmbeddingCompressor.mae(CONFIG, layers=[6, 42], transformed=True)
    model.encoder.load_state_dict(trained.model.encoder.state_dict())
    latents = torch.from_numpy(Embedder(trained.codec).latents(trained.pixels))
    flat = latents.flatten(0, 1).double()
    model.set_transform(flat.mean(0), torch.cov(flat.T), 0.7)
    pca = PCA(48).fit(flat.numpy())
    assert model.basis is not None
    lengths = model.basis.norm(dim=1)
    step = 0.7 * float(np.sqrt(pca.explained_variance_.mean()))
    np.testing.assert_allclose(lengths.numpy(), step, rtol=1e-3)
    along = np.abs(np.sum(model.basis.numpy() / step * pca.components_, axis=1))
    assert (along[:12] > 0.999).all()  # of the last ones, of nearly no variance, the order may differ
    optimiser = torch.optim.Adam(model.bottleneck.parameters(), lr=2e-2)
    model.train()
    for _ in range(300):
        bits = model.coded(latents[torch.randint(len(latents), (32,))])[1]
        optimiser.zero_grad()
        torch.autograd.backward(bits)
        optimiser.step()
    lineage = Lineage(data="scene", licence="public domain", beta=0.01, bits_per_symbol=0)
    export_codec(model, tmp_path / "codec", input_spec=spec.input, lineage=lineage, calibration=trained.pixels[:64])
    codec = load_codec(tmp_path / "codec")
    with torch.no_grad():
        expected, rate = model.eval().coded(latents)
    embedder = Embedder(codec)
    np.testing.assert_allclose(embedder.latents(trained.pixels[:64]), latents[:64], atol=1e-5)
    symbols = embedder.symbols(trained.pixels)
    near = np.abs(codec.dequantise(symbols) - expected.numpy()).max(axis=2)
    assert np.mean(near > 1e-3) < 0.01  # a coordinate just between two steps may go either way
    assert np.abs(codec.dequantise(symbols) - latents.numpy()).mean() < step
    size = 8 * sum(map(len, codec.compress(symbols)))
    assert size <= float(rate) * symbols.size * 1.005 + 8 * (16 + 12) * len(symbols)
    assert codec.encoder_id == trained.codec.encoder_id  # archives of both hold the same embeddings


def test_several_stages_have_no_transform() -> None:
    with pytest.raises(InputError, match="several stages have no transform"):
        NeuralEmbeddingCompressor(_TwoScales(), nn.Identity(), transformed=True)


class _TwoScales(nn.Module):
    channels, widths = 8, (4, 4)

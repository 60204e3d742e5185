import math

import pytest
import torch

from nec_ray.models.mae import SIZES, MaeConfig
from nec_ray.models.nec import NeuralEmbeddingCompressor, count_parameters, set_trainable
from tests.models.test_mae import CONFIG


def test_the_papers_set_is_a_tenth_of_the_base_model() -> None:
    model = NeuralEmbeddingCompressor(MaeConfig(size=224, patch=16, bands=3, **SIZES["base"]))
    set_trainable(model, "paper")
    trained, total = count_parameters(model)
    # research/nec-original.md: 11.67M of 111.7M parameters, 10.4%
    assert trained / 1e6 == pytest.approx(11.67, abs=0.06)
    assert total / 1e6 == pytest.approx(111.7, abs=0.2)
    assert trained / total == pytest.approx(0.104, abs=0.001)


def test_adaptation_moves_the_papers_set_and_nothing_else() -> None:
    torch.manual_seed(0)
    model = NeuralEmbeddingCompressor(CONFIG)
    set_trainable(model, "paper")
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimiser = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(3):
        losses = model(torch.randn(4, 3, 32, 32), mask_ratio=0.75, beta=0.1)
        optimiser.zero_grad()
        losses.loss.backward()
        optimiser.step()
    moved = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    trained = (
        "encoder.patch_embed",
        "encoder.cls_token",
        "encoder.blocks.2.",
        "encoder.norm",
        "decoder.first.decoder_embed",
        "decoder.first.block",
        "decoder.mask_token",
        "decoder.norm",
        "decoder.pred",
        "bottleneck",
    )
    expected = {name for name in before if name.startswith(trained) and "quantiles" not in name}
    assert moved == expected


def test_one_density_a_channel_shared_by_all_tokens() -> None:
    """Bits per element against the factorized model evaluated number by number."""
    torch.manual_seed(0)
    model = NeuralEmbeddingCompressor(CONFIG).eval()
    latent = torch.randn(2, 5, 48) * 3
    with torch.no_grad():
        coded, bits = model.noisy(latent)
        bottleneck, total = model.bottleneck, 0.0
        # The quantiles begin with medians of 0: rounding to the nearest integer.
        torch.testing.assert_close(coded, latent.round())
        for channel in range(48):
            at = torch.zeros(48, 1, 10)
            at[channel, 0] = coded[:, :, channel].flatten()
            likelihood, _, _ = bottleneck._likelihood(at)
            total -= float(likelihood[channel].clamp_min(1e-9).log2().sum())
    assert float(bits) == pytest.approx(total / latent.numel(), rel=1e-4)


def test_training_adds_uniform_noise_of_one_step() -> None:
    torch.manual_seed(0)
    model = NeuralEmbeddingCompressor(CONFIG).train()
    latent = torch.randn(64, 16, 48)
    noise = model.noisy(latent)[0] - latent
    assert float(noise.abs().max()) <= 0.5 + 1e-5
    assert float(noise.detach().var()) == pytest.approx(1 / 12, rel=0.02)


def test_loss_is_mse_plus_beta_times_bits_and_pretraining_has_no_rate() -> None:
    torch.manual_seed(0)
    model = NeuralEmbeddingCompressor(CONFIG)
    pixels = torch.randn(4, 3, 32, 32)
    with torch.no_grad():
        losses = model(pixels, mask_ratio=0.75, beta=0.3)
        plain = model(pixels, mask_ratio=0.75, beta=None)
    assert float(losses.loss) == pytest.approx(float(losses.mse) + 0.3 * float(losses.bits))
    assert float(losses.bits) > 0
    assert float(plain.loss) == float(plain.mse)
    assert math.isclose(float(plain.bits), 0.0)

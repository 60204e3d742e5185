import math

import pytest
import torch

from nec_ray.errors import InputError
from nec_ray.models.family import Trainable
from nec_ray.models.mae import SIZES, MaeConfig, MaeDecoder, MaeEncoder, patchify
from nec_ray.models.nec import (
    NeuralEmbeddingCompressor,
    count_parameters,
    set_trainable,
)
from tests.models.test_mae import CONFIG


def test_the_papers_set_is_a_tenth_of_the_base_model() -> None:
    model = NeuralEmbeddingCompressor.mae(MaeConfig(size=224, patch=16, bands=3, **SIZES["base"]))
    set_trainable(model, "paper")
    trained, total = count_parameters(model)
    # research/nec-original.md: 11.67M of 111.7M parameters, 10.4%
    assert trained / 1e6 == pytest.approx(11.67, abs=0.06)
    assert total / 1e6 == pytest.approx(111.7, abs=0.2)
    assert trained / total == pytest.approx(0.104, abs=0.001)


def test_adaptation_moves_the_papers_set_and_nothing_else() -> None:
    torch.manual_seed(0)
    model = NeuralEmbeddingCompressor.mae(CONFIG)
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
    model = NeuralEmbeddingCompressor.mae(CONFIG).eval()
    latent = torch.randn(2, 5, 48) * 3
    with torch.no_grad():
        coded, bits = model.coded(latent)
        bottleneck, total = model.bottleneck, 0.0
        # The quantiles begin with medians of 0: rounding to the nearest integer.
        torch.testing.assert_close(coded, latent.round())
        for channel in range(48):
            at = torch.zeros(48, 1, 10)
            at[channel, 0] = coded[:, :, channel].flatten()
            likelihood, _, _ = bottleneck._likelihood(at)
            total -= float(likelihood[channel].clamp_min(1e-9).log2().sum())
    assert float(bits) == pytest.approx(total / latent.numel(), rel=1e-4)


@pytest.mark.parametrize("training", [True, False])
def test_the_bottleneck_is_compressais(training: bool) -> None:
    """Values, likelihoods and gradients of CompressAI's forward, which is given the same noise."""
    torch.manual_seed(0)
    model = NeuralEmbeddingCompressor.mae(CONFIG).train(training)
    torch.nn.init.normal_(model.bottleneck.quantiles, std=0.3)
    latent = torch.randn(3, 5, 48) * 2
    mine = latent.clone().requires_grad_()
    coded, bits = model.coded(mine, generator=torch.Generator().manual_seed(3))
    torch.autograd.backward(bits)
    gradients = {n: p.grad.clone() for n, p in model.bottleneck.named_parameters() if p.grad is not None}
    assert len(gradients) > 4
    model.zero_grad()
    noise = torch.rand(latent.shape, generator=torch.Generator().manual_seed(3)) - 0.5
    theirs = latent.clone().requires_grad_()
    fed = (theirs + noise if training else theirs).transpose(1, 2).unsqueeze(3)
    with pytest.MonkeyPatch.context() as patch:
        if training:
            patch.setattr(model.bottleneck, "quantize", lambda values, *_: values)
        out, likelihood = model.bottleneck(fed)
    torch.autograd.backward((-likelihood.log2()).mean())
    torch.testing.assert_close(coded, out.squeeze(3).transpose(1, 2))
    torch.testing.assert_close(bits, (-likelihood.log2()).mean())
    if training:
        torch.testing.assert_close(mine.grad, theirs.grad)
    for name, parameter in model.bottleneck.named_parameters():
        if name in gradients:
            torch.testing.assert_close(gradients[name], parameter.grad)


def test_training_adds_uniform_noise_of_one_step() -> None:
    torch.manual_seed(0)
    model = NeuralEmbeddingCompressor.mae(CONFIG).train()
    latent = torch.randn(64, 16, 48)
    noise = model.coded(latent)[0] - latent
    assert float(noise.abs().max()) <= 0.5 + 1e-5
    assert float(noise.detach().var()) == pytest.approx(1 / 12, rel=0.02)


def test_loss_is_mse_plus_beta_times_bits_and_pretraining_has_no_rate() -> None:
    torch.manual_seed(0)
    model = NeuralEmbeddingCompressor.mae(CONFIG)
    pixels = torch.randn(4, 3, 32, 32)
    with torch.no_grad():
        losses = model(pixels, mask_ratio=0.75, beta=0.3)
        plain = model(pixels, mask_ratio=0.75, beta=None)
    assert float(losses.loss) == pytest.approx(float(losses.mse) + 0.3 * float(losses.bits))
    assert float(losses.bits) > 0
    assert float(plain.loss) == float(plain.mse)
    assert math.isclose(float(plain.bits), 0.0)


@pytest.mark.parametrize(
    ("trainable", "parts"),
    [("entropy", ["bottleneck"]), ("entropy+patch", ["bottleneck", "encoder.patch_embed"])],
)
def test_the_ablations_train_no_more_than_they_say(trainable: Trainable, parts: list[str]) -> None:
    model = NeuralEmbeddingCompressor.mae(CONFIG)
    set_trainable(model, trainable)
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert {name for name in trained if not name.startswith(tuple(parts))} == set()
    assert all(any(name.startswith(part) for name in trained) for part in parts)
    set_trainable(model, trainable, decoder_is_new=True)
    more = {name for name, p in model.named_parameters() if p.requires_grad} - trained
    assert more == {n for n, _ in model.named_parameters() if n.startswith("decoder.") and "pos_embed" not in n}


def test_channels_in_another_order_are_the_same_model() -> None:
    torch.manual_seed(0)
    encoder, decoder = MaeEncoder(CONFIG).eval(), MaeDecoder(CONFIG).eval()
    for module in (encoder, decoder):
        for parameter in module.parameters():
            parameter.requires_grad_(False).add_(0.05 * torch.randn_like(parameter))
    pixels, keep = torch.randn(3, 3, 32, 32), torch.arange(16).repeat(3, 1)
    latent = encoder(pixels)
    patches = decoder(latent, keep)
    order = torch.randperm(48)
    encoder.reorder(decoder, order)
    torch.testing.assert_close(encoder(pixels), latent[:, :, order], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(decoder(encoder(pixels), keep), patches, rtol=1e-4, atol=1e-5)


def test_dropped_layers_are_medians_and_cost_nothing() -> None:
    """Against the same latent coded whole: kept channels and their bits alike, the others gone."""
    torch.manual_seed(0)
    model = NeuralEmbeddingCompressor.mae(CONFIG, [8, 16, 24]).eval()
    with torch.no_grad():
        model.bottleneck.quantiles[:, 0, 1] = torch.randn(48) / 4
        latent = torch.randn(3, 5, 48) * 3
        whole, _ = model.coded(latent)
        part, bits = model.coded(latent, torch.tensor([1, 2, 3]))
        median = model.bottleneck.quantiles[:, 0, 1]
        expected = 0.0
        for sample, channels in enumerate([8, 24, 48]):
            assert torch.equal(part[sample, :, :channels], whole[sample, :, :channels])
            torch.testing.assert_close(part[sample, :, channels:], median[channels:].expand(5, -1))
            alone = latent[sample : sample + 1].transpose(1, 2).unsqueeze(3)
            likelihood = model.bottleneck(alone)[1][0, :channels]
            expected -= float(likelihood.log2().sum())
    assert float(bits) == pytest.approx(expected / latent.numel(), rel=1e-5)


def test_half_of_the_samples_keep_all_layers_and_the_rest_every_fewer_number() -> None:
    model = NeuralEmbeddingCompressor.mae(CONFIG, [8, 16, 24])
    kept = model._kept_layers(8000, torch.Generator().manual_seed(0))
    counts = torch.bincount(kept, minlength=4).tolist()
    assert counts[0] == 0
    for count, expected in zip(counts[1:], (2000, 2000, 4000), strict=True):
        assert abs(count - expected) < 5 * 45  # standard deviation 39 to 45


def test_layers_must_make_up_the_channels() -> None:
    with pytest.raises(InputError, match=r"\[8, 16\] channels do not make up the encoder's 48"):
        NeuralEmbeddingCompressor.mae(CONFIG, [8, 16])


def test_any_encoder_of_tokens_is_adapted() -> None:
    """A convolution and a linear decoder, which know nothing of masked autoencoders."""

    class Convolution(torch.nn.Module):
        channels, tokens = 12, 16

        def __init__(self) -> None:
            super().__init__()
            self.layer = torch.nn.Conv2d(3, 12, 8, 8)

        def forward(self, pixels: torch.Tensor, keep: torch.Tensor | None = None) -> torch.Tensor:
            found: torch.Tensor = self.layer(pixels).flatten(2).transpose(1, 2)
            return found if keep is None else found.gather(1, keep[:, :, None].expand(-1, -1, 12))

    class Linear(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = torch.nn.Linear(12, 192)

        def loss(self, latent: torch.Tensor, keep: torch.Tensor, pixels: torch.Tensor) -> torch.Tensor:
            target = patchify(pixels, 8).gather(1, keep[:, :, None].expand(-1, -1, 192))
            return (self.layer(latent) - target).square().mean()

    torch.manual_seed(0)
    model = NeuralEmbeddingCompressor(Convolution(), Linear())
    optimiser = torch.optim.Adam([p for n, p in model.named_parameters() if "quantiles" not in n], lr=1e-2)
    pixels = torch.randn(16, 3, 32, 32).cumsum(3) / 8
    seen = []
    for _ in range(60):
        losses = model(pixels, mask_ratio=0.0, beta=0.01)
        optimiser.zero_grad()
        losses.loss.backward()
        optimiser.step()
        seen.append((float(losses.mse.detach()), float(losses.bits.detach())))
    assert seen[-1][0] < 0.5 * seen[0][0]
    assert seen[-1][1] < seen[0][1]

"""NEC on several stages of MP-MAE, against feature maps, loops, and one bottleneck a stage."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from compressai.entropy_models import EntropyBottleneck
from torch import Tensor

from nec_ray.codec import Codec, InputSpec, Lineage, load_codec, truncate_codec
from nec_ray.errors import CorruptCodec, InputError
from nec_ray.models.convnext import ConvNextConfig
from nec_ray.models.embed import Embedder, first_decoder_layer, latent_medians
from nec_ray.models.export import export_codec
from nec_ray.models.mmearth_weights import import_stage, mmearth_tensors
from nec_ray.models.mp_mae import MpMae, MpMaeConfig
from nec_ray.models.nec import NeuralEmbeddingCompressor, set_trainable
from nec_ray.models.pretext import Output
from nec_ray.models.stages import StageConfig, StageDecoder, StageEncoder

SIZES = ConvNextConfig(size=24, patch=8, bands=3, dim=4, depth_1=1, depth_2=1, depth_3=2, depth_4=2)
OPTICAL = Output("sentinel2", "pixel", "continuous", 3, patch_normalised=True)
SHAPES = {1: (24, 4), 2: (12, 8), 3: (6, 16), 4: (3, 32)}
"""Tokens a side and channels of each stage."""


def compressor(stages: tuple[int, ...], layers: list[int] | None = None) -> NeuralEmbeddingCompressor:
    torch.manual_seed(sum(stages))
    model = NeuralEmbeddingCompressor.mp_mae(StageConfig(SIZES, stages, decoder_dim=8), layers)
    for module in (model.encoder, model.decoder):
        for name, weight in module.named_parameters():
            weight.data = 0.3 * torch.randn_like(weight) + (1.0 if "norm" in name else 0.0)
    return model


def encoder_of(model: NeuralEmbeddingCompressor) -> StageEncoder:
    assert isinstance(model.encoder, StageEncoder)
    return model.encoder


@pytest.mark.parametrize("stages", [(4, 3), (3, 2, 1), (4, 2)])
def test_each_stages_places_are_its_tokens_coarse_first(stages: tuple[int, ...]) -> None:
    encoder = encoder_of(compressor(stages))
    pixels, keep = torch.randn(2, 3, 24, 24), torch.tensor([[4, 0], [8, 2]])
    with torch.no_grad():
        maps, visible = encoder.encoder(pixels), encoder.encoder(pixels, keep)
        latents, kept = encoder(pixels), encoder(pixels, keep)
    assert len(encoder.encoder.stages) == stages[0]
    assert encoder.channels == sum(SHAPES[stage][1] for stage in stages)
    for stage, latent, some in zip(stages, latents, kept, strict=True):
        side, dim = SHAPES[stage]
        assert latent.shape == (2, side**2, dim)
        n = side // 3
        for sample in range(2):
            whole = [maps[stage - 1][sample, :, row, col] for row in range(side) for col in range(side)]
            assert torch.equal(latent[sample], torch.stack(whole))
            places = [
                visible[stage - 1][sample, :, n * (patch // 3) + row, n * (patch % 3) + col]
                for patch in keep[sample].tolist()
                for row in range(n)
                for col in range(n)
            ]
            assert torch.equal(some[sample], torch.stack(places))


def test_the_decoder_reads_all_stages_on_the_finest_grid() -> None:
    """The loss of maps put together by loops."""
    model = compressor((4, 3))
    encoder, decoder = encoder_of(model), model.decoder
    assert isinstance(decoder, StageDecoder)
    pixels, keep = torch.randn(2, 3, 24, 24), torch.tensor([[5, 1, 6], [0, 8, 3]])
    with torch.no_grad():
        coarse, fine = encoder.encoder(pixels, keep)[3], encoder.encoder(pixels, keep)[2]
        grid = torch.zeros(2, 48, 6, 6)
        for row in range(6):
            for col in range(6):
                grid[:, :32, row, col] = coarse[:, :, row // 2, col // 2]
                grid[:, 32:, row, col] = fine[:, :, row, col]
        [expected], _ = decoder.decoder.losses(grid, keep, {"sentinel2": pixels})
        torch.testing.assert_close(decoder.loss(encoder(pixels, keep), keep, pixels), expected)


def alone(model: NeuralEmbeddingCompressor, rows: slice) -> EntropyBottleneck:
    """CompressAI's bottleneck of some of the channels."""
    state = {name: t[rows] for name, t in model.bottleneck.state_dict().items() if len(t) == sum(model.widths)}
    single = EntropyBottleneck(rows.stop - rows.start)
    single.load_state_dict({**single.state_dict(), **state})
    return single.eval()


@pytest.mark.parametrize("training", [False, True])
def test_bits_are_those_of_one_bottleneck_a_stage(training: bool) -> None:
    model = compressor((4, 3)).train(training)
    model.bottleneck.quantiles.data[:, 0, 1] = torch.linspace(-1, 1, 48)
    with torch.no_grad():
        latents = encoder_of(model)(torch.randn(2, 3, 24, 24))
        coded, rate = model.coded(latents, generator=torch.Generator().manual_seed(4))
    bits, elements = 0.0, 0
    for latent, found, rows in zip(latents, coded, (slice(0, 32), slice(32, 48)), strict=True):
        single = alone(model, rows)
        if training:
            assert (found - latent).abs().max() <= 0.5
        with torch.no_grad():
            rounded, likelihood = single(found.transpose(1, 2)[..., None], training=False)
            if training:
                likelihood = single.likelihood_lower_bound(single._likelihood(found.flatten(0, 1).T[:, None])[0])
            else:
                torch.testing.assert_close(rounded[..., 0].transpose(1, 2), found)
        bits -= float(likelihood.log2().sum())
        elements += latent.numel()
    assert float(rate) == pytest.approx(bits / elements, rel=1e-4)


def test_a_sample_that_keeps_the_coarse_stage_has_medians_in_the_finer_one() -> None:
    model = compressor((4, 3), [20, 12, 16]).eval()
    model.bottleneck.quantiles.data[:, 0, 1] = torch.linspace(-1, 1, 48)
    assert model.layer_scales() == [0, 0, 1]
    with torch.no_grad():
        latents = encoder_of(model)(torch.randn(2, 3, 24, 24))
        whole, _ = model.coded(latents)
        (coarse, fine), rate = model.coded(latents, torch.tensor([2, 3]))
        _, both = model.coded(tuple(latent[1:] for latent in latents))
        single = alone(model, slice(0, 32))
        likelihood = single(whole[0][:1].transpose(1, 2)[..., None], training=False)[1]
    assert torch.equal(coarse, whole[0])
    assert torch.equal(fine[1], whole[1][1])
    torch.testing.assert_close(fine[0], torch.linspace(-1, 1, 48)[32:].expand(36, 16))
    elements = 9 * 32 + 36 * 16
    assert float(rate) == pytest.approx(
        (float(both) * elements - float(likelihood.log2().sum())) / (2 * elements), rel=1e-4
    )


def test_a_layer_of_two_stages_is_refused() -> None:
    with pytest.raises(InputError, match=r"one would hold channels of two stages, which have \[32, 16\]"):
        compressor((4, 3), [20, 28])
    assert compressor((4, 3)).layers == [32, 16]


@pytest.mark.parametrize("stages", [(4, 3), (3, 2, 1), (4, 2)])
def test_channels_take_another_order_within_their_stage_and_nothing_else_changes(stages: tuple[int, ...]) -> None:
    model = compressor(stages)
    pixels = torch.randn(2, 3, 24, 24)
    importance = torch.randn(encoder_of(model).channels)
    order = model.order_of(importance)

    def of() -> tuple[tuple[Tensor, ...], Tensor]:
        with torch.no_grad():
            losses = model(pixels, mask_ratio=0.6, beta=None, generator=torch.Generator().manual_seed(0))
            return model.encoder(pixels), losses.mse

    latents, loss = of()
    encoder_of(model).reorder(model.decoder, order)  # type: ignore[arg-type]
    moved, after = of()
    first = 0
    for latent, new in zip(latents, moved, strict=True):
        own = importance[first : first + latent.shape[2]].argsort(descending=True)
        torch.testing.assert_close(new, latent[:, :, own], rtol=1e-3, atol=1e-3)
        first += latent.shape[2]
    torch.testing.assert_close(after, loss, rtol=1e-3, atol=1e-3)
    with pytest.raises(ValueError, match="among themselves"):
        encoder_of(model).reorder(model.decoder, order.flip(0))  # type: ignore[arg-type]


def test_adaptation_trains_the_last_block_of_each_stage() -> None:
    model = compressor((4, 3))
    set_trainable(model, "paper")
    trained = {name.removeprefix("encoder.encoder.") for name, p in model.named_parameters() if p.requires_grad}
    moving = ("initial_conv", "stem", "stages.2.1", "stages.3.1", "decoder", "bottleneck")
    assert {name for name in trained if not name.startswith(moving)} == set()
    assert {prefix for prefix in moving if any(name.startswith(prefix) for name in trained)} == set(moving)


def exported(
    folder: Path, stages: tuple[int, ...], layers: list[int] | None = None
) -> tuple[NeuralEmbeddingCompressor, Codec, npt.NDArray[np.float32]]:
    model = compressor(stages, layers)
    rng = np.random.default_rng(0)
    pixels = (rng.normal(size=(6, 3, 24, 24)) * 50 + 300).astype(np.float32)
    spec = InputSpec(bands=["B2", "B3", "B4"], mean=[300.0] * 3, std=[50.0] * 3, size=24)
    lineage = Lineage(parent="mmearth", data="random numbers", licence="none", beta=0.1, bits_per_symbol=0)
    export_codec(model, folder, input_spec=spec, lineage=lineage, calibration=pixels)
    return model, load_codec(folder), pixels


@pytest.mark.parametrize(
    ("stages", "layers"), [((4, 3), None), ((4, 3), [8, 24, 10, 6]), ((4, 2), None), ((3, 2, 1), None)]
)
def test_the_exported_codec_embeds_as_the_model_does(
    tmp_path: Path, stages: tuple[int, ...], layers: list[int] | None
) -> None:
    """The torch model's feature maps, rounded by hand, come back from payloads."""
    model, codec, pixels = exported(tmp_path / "codec", stages, layers)
    assert [scale.grid for scale in codec.scales()] == [(SHAPES[stage][0],) * 2 for stage in stages]
    with torch.no_grad():
        maps = encoder_of(model).encoder(torch.from_numpy((pixels - 300) / 50))
    embedder = Embedder(codec)
    payloads = codec.compress(embedder.symbols(pixels))
    embeddings, first = codec.dequantise(codec.decompress(payloads)), 0
    for stage, latent, embedding in zip(stages, embedder.latents(pixels), embeddings, strict=True):
        side, dim = SHAPES[stage]
        exact = maps[stage - 1].permute(0, 2, 3, 1).reshape(6, side**2, dim).numpy()
        np.testing.assert_allclose(latent, exact, rtol=1e-3, atol=1e-3)
        median = codec.tables.median[first : first + dim]
        rounded = np.rint(latent - median) + median
        np.testing.assert_allclose(embedding, rounded, atol=1e-5)
        assert np.abs(embedding - exact).max() <= 0.5 + 2e-3
        first += dim
    sizes = [len(payload) for payload in codec.compress(embedder.symbols(pixels))]
    symbols = sum(SHAPES[stage][0] ** 2 * SHAPES[stage][1] for stage in stages)
    assert codec.spec.lineage.bits_per_symbol == pytest.approx(8 * sum(sizes) / (6 * symbols), rel=0.01)


def test_a_codec_of_the_coarse_layers_embeds_their_stage_alone(tmp_path: Path) -> None:
    _, codec, pixels = exported(tmp_path / "codec", (4, 3), [8, 24, 16])
    truncate_codec(codec, 1, tmp_path / "cut")
    cut = load_codec(tmp_path / "cut")
    coarse, _ = Embedder(codec).symbols(pixels)
    assert np.array_equal(Embedder(cut).symbols(pixels), coarse[:, :, :8])
    assert np.array_equal(latent_medians(cut), codec.tables.median)


def test_the_first_decoder_layer_reads_the_finest_grid_and_refuses_less(tmp_path: Path) -> None:
    model, codec, _ = exported(tmp_path / "codec", (4, 3))
    decoder, layer = model.decoder, first_decoder_layer(codec)
    assert isinstance(decoder, StageDecoder)
    grid = torch.randn(2, 48, 6, 6)
    with torch.no_grad():
        expected = decoder.decoder.blocks["sentinel2"](decoder.decoder.proj(grid)).flatten(2).transpose(1, 2)
        torch.testing.assert_close(layer(grid.flatten(2).transpose(1, 2)), expected)
        with pytest.raises(InputError, match="reads 36 tokens of 48 channels, not 9 of 48; take layers of every"):
            layer(torch.zeros(2, 9, 48))


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"stage_2": 2}, "contradict each other"),
        ({"stage_2": None}, "contradict each other"),
        ({"stage": 3, "stage_2": 4}, "not that of stages of MP-MAE"),
        ({"stage_3": 2}, "contradict each other"),
        ({"stage_2": None, "stage_3": 3}, "not that of stages of MP-MAE"),
        ({"stage": None}, "not that of stages of MP-MAE"),
    ],
)
def test_a_codec_whose_stages_are_not_its_layers_is_refused(tmp_path: Path, change: dict[str, Any], says: str) -> None:
    exported(tmp_path / "codec", (4, 3))
    path = tmp_path / "codec" / "codec.json"
    document = json.loads(path.read_text())
    document["architecture"] |= change
    document["architecture"] = {k: v for k, v in document["architecture"].items() if v is not None}
    path.write_text(json.dumps(document))
    with pytest.raises(CorruptCodec, match=says):
        Embedder(load_codec(tmp_path / "codec"))


def test_architectures_come_back() -> None:
    for stages in ((4,), (4, 3), (4, 3, 2, 1)):
        config = StageConfig(SIZES, stages, 8)
        assert StageConfig.of_architecture(config.to_architecture()) == config
    assert StageConfig(SIZES, (3,)).to_architecture()["stage"] == 3
    for wrong in ([3, 4], [4, 4], []):
        with pytest.raises(InputError, match="coarse first"):
            StageConfig(SIZES, tuple(wrong))


def test_a_checkpoint_gives_all_stages_their_encoder_and_leaves_the_decoder() -> None:
    torch.manual_seed(1)
    source = MpMae(MpMaeConfig(SIZES, (OPTICAL,), decoder_dim=8))
    model = compressor((4, 3))
    assert isinstance(model.decoder, StageDecoder)
    assert not import_stage(encoder_of(model), model.decoder, mmearth_tensors(source), "made")
    for name, tensor in encoder_of(model).encoder.state_dict().items():
        assert torch.equal(tensor, source.encoder.state_dict()[name])

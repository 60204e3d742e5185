"""NEC on MP-MAE: a stage's feature map as a latent, against the whole model, loops and the exported codec."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from nec_ray.codec import Codec, InputSpec, Lineage, load_codec
from nec_ray.errors import CorruptCodec, InputError
from nec_ray.models.convnext import ConvNextConfig
from nec_ray.models.embed import Embedder, first_decoder_layer
from nec_ray.models.export import export_codec
from nec_ray.models.family import Trainable
from nec_ray.models.mmearth_weights import import_stage, mmearth_tensors
from nec_ray.models.mp_mae import MpMae, MpMaeConfig
from nec_ray.models.nec import NeuralEmbeddingCompressor, set_trainable
from nec_ray.models.pretext import Output
from nec_ray.models.stages import StageConfig, StageDecoder, StageEncoder

SIZES = ConvNextConfig(size=24, patch=8, bands=3, dim=4, depth_1=1, depth_2=1, depth_3=2, depth_4=2)
OPTICAL = Output("sentinel2", "pixel", "continuous", 3, patch_normalised=True)
COVER = Output("dynamic_world", "pixel", "categorical", 1, 9)
CLIMATE = Output("era5", "image", "continuous", 12)


def stage_of(stage: int) -> StageConfig:
    return StageConfig(SIZES, (stage,), decoder_dim=8)


def compressor(stage: int, layers: list[int] | None = None) -> NeuralEmbeddingCompressor:
    torch.manual_seed(stage)
    model = NeuralEmbeddingCompressor.mp_mae(stage_of(stage), layers)
    for module in (model.encoder, model.decoder):
        for name, weight in module.named_parameters():
            weight.data = 0.3 * torch.randn_like(weight) + (1.0 if "norm" in name else 0.0)
    return model


@pytest.mark.parametrize(("stage", "side"), [(1, 24), (2, 12), (3, 6), (4, 3)])
def test_a_stages_places_are_the_tokens_and_masked_ones_are_left_out(stage: int, side: int) -> None:
    """Places of each patch in turn, read off the feature map by loops."""
    encoder = compressor(stage).encoder
    assert isinstance(encoder, StageEncoder)
    config = encoder.config
    assert (config.side, config.tokens, config.dim) == (side, side**2, 4 * 2 ** (stage - 1))
    pixels, keep = torch.randn(2, 3, 24, 24), torch.tensor([[4, 0], [8, 2]])
    with torch.no_grad():
        whole, visible = encoder.encoder(pixels)[-1], encoder.encoder(pixels, keep)[-1]
        tokens, kept = encoder(pixels), encoder(pixels, keep)
    assert len(encoder.encoder.stages) == stage
    n = side // 3
    for sample in range(2):
        expected = [whole[sample, :, row, column] for row in range(side) for column in range(side)]
        assert torch.equal(tokens[sample], torch.stack(expected))
        expected = [
            visible[sample, :, n * (patch // 3) + row, n * (patch % 3) + column]
            for patch in keep[sample].tolist()
            for row in range(n)
            for column in range(n)
        ]
        assert torch.equal(kept[sample], torch.stack(expected))


def test_the_last_stage_without_a_bottleneck_is_the_pretraining_model() -> None:
    """The same masks, the same losses, with several modalities of which one lacks its data in some samples."""
    outputs = (OPTICAL, COVER, CLIMATE)
    torch.manual_seed(0)
    whole = MpMae(MpMaeConfig(SIZES, outputs, "equal", decoder_dim=8))
    encoder, decoder = StageEncoder(stage_of(4)), StageDecoder(stage_of(4), outputs)
    encoder.take(whole.encoder)
    decoder.decoder.load_state_dict(whole.decoder.state_dict())
    model = NeuralEmbeddingCompressor(encoder, decoder)
    pixels = torch.randn(3, 3, 24, 24)
    cover, climate = torch.randint(0, 9, (3, 1, 24, 24)), torch.randn(3, 12)
    cover[1], climate[2] = -1, torch.nan
    targets = {"sentinel2": pixels, "dynamic_world": cover, "era5": climate}
    expected = whole(pixels, targets, mask_ratio=0.6, generator=torch.Generator().manual_seed(2)).loss
    del targets["sentinel2"]
    losses = model(pixels, mask_ratio=0.6, beta=None, generator=torch.Generator().manual_seed(2), targets=targets)
    torch.testing.assert_close(losses.mse, expected)


@pytest.mark.parametrize("stage", [1, 3])
def test_an_earlier_stages_places_each_predict_their_own_pixels(stage: int) -> None:
    """The loss by hand: patches of the stage's stride, of whole masked 8-pixel patches only."""
    model = compressor(stage)
    encoder, decoder = model.encoder, model.decoder
    assert isinstance(encoder, StageEncoder)
    assert isinstance(decoder, StageDecoder)
    pixels, keep = torch.randn(1, 3, 24, 24), torch.tensor([[5, 1, 6]])
    side, n = encoder.config.side, encoder.config.side // 3
    stride = 24 // side
    with torch.no_grad():
        loss = decoder.loss(encoder(pixels, keep), keep, pixels)
        features = encoder.encoder(pixels, keep)[-1]
        predicted = decoder.decoder(features, keep)["sentinel2"][0]
    errors = []
    for row in range(side):
        for column in range(side):
            if 3 * (row // n) + column // n in keep[0].tolist():
                continue
            values = pixels[0, :, row * stride : (row + 1) * stride, column * stride : (column + 1) * stride]
            target = (values - values.mean()) / (values.var() + 1e-6).sqrt()
            errors.append((predicted[row * side + column] - target.permute(1, 2, 0).flatten()).square().mean())
    assert len(errors) == 6 * n * n
    torch.testing.assert_close(loss, torch.stack(errors).mean(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("stage", [1, 2, 4])
def test_channels_take_another_order_and_nothing_else_changes(stage: int) -> None:
    model = compressor(stage)
    pixels = torch.randn(2, 3, 24, 24)
    order = torch.randperm(stage_of(stage).dim)

    def of() -> tuple[Tensor, Tensor]:
        with torch.no_grad():
            losses = model(pixels, mask_ratio=0.6, beta=None, generator=torch.Generator().manual_seed(0))
            return model.encoder(pixels), losses.mse

    latent, loss = of()
    model.encoder.reorder(model.decoder, order)  # type: ignore[operator]
    moved, after = of()
    torch.testing.assert_close(moved, latent[:, :, order], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(after, loss, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("trainable", "new", "moving"),
    [
        ("entropy", False, {"bottleneck"}),
        ("entropy", True, {"bottleneck", "decoder"}),
        ("entropy+patch", False, {"bottleneck", "initial_conv", "stem"}),
        ("paper", False, {"bottleneck", "initial_conv", "stem", "stages.2.1", "decoder"}),
        ("all", False, {"bottleneck", "initial_conv", "stem", "stages", "downsample_layers", "decoder"}),
    ],
)
def test_what_adaptation_trains(trainable: Trainable, new: bool, moving: set[str]) -> None:
    """Seen by what a step of gradients moves."""
    model = compressor(3)
    set_trainable(model, trainable, decoder_is_new=new)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimiser = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 0.1)
    model(torch.randn(2, 3, 24, 24), mask_ratio=0.6, beta=0.1).loss.backward()
    optimiser.step()
    moved = {name for name, p in model.named_parameters() if not torch.equal(p.detach(), before[name])}
    expected = {
        name
        for name in before
        if name.removeprefix("encoder.encoder.").startswith(tuple(moving)) and "quantiles" not in name
    }
    assert moved == expected


def test_adapting_lowers_the_rate_of_whole_tiles() -> None:
    """Bits per element of rounded latents of the unmasked tiles, before and after 30 steps."""
    model = compressor(4, [8, 24])
    set_trainable(model, "paper")
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimiser = torch.optim.Adam(parameters, 1e-2)
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randn(4, 3, 24, 24, generator=generator)

    def rate() -> float:
        with torch.no_grad():
            return float(model.eval().coded(model.encoder(pixels))[1])

    before = rate()
    for _ in range(30):
        losses = model.train()(pixels, mask_ratio=0.6, beta=1.0, generator=generator)
        optimiser.zero_grad()
        losses.loss.backward()
        optimiser.step()
    assert rate() < 0.9 * before


def exported(folder: Path, stage: int, layers: list[int] | None = None) -> tuple[NeuralEmbeddingCompressor, Codec, Any]:
    model = compressor(stage, layers)
    rng = np.random.default_rng(0)
    pixels = (rng.normal(size=(6, 3, 24, 24)) * 50 + 300).astype(np.float32)
    spec = InputSpec(bands=["B2", "B3", "B4"], mean=[300.0] * 3, std=[50.0] * 3, size=24)
    lineage = Lineage(parent="mmearth", data="random numbers", licence="none", beta=0.1, bits_per_symbol=0)
    export_codec(model, folder, input_spec=spec, lineage=lineage, calibration=pixels)
    return model, load_codec(folder), pixels


@pytest.mark.parametrize(("stage", "layers"), [(4, [8, 24]), (2, None)])
def test_the_exported_codec_embeds_as_the_model_does(tmp_path: Path, stage: int, layers: list[int] | None) -> None:
    model, codec, pixels = exported(tmp_path / "codec", stage, layers)
    side, channels = stage_of(stage).side, stage_of(stage).dim
    assert (codec.spec.family, codec.spec.grid, codec.spec.channels) == ("mp_mae", (side, side), channels)
    with torch.no_grad():
        latent = model.encoder(torch.from_numpy((pixels - 300) / 50))
    embedder = Embedder(codec)
    np.testing.assert_allclose(embedder.latents(pixels), latent.numpy(), rtol=1e-3, atol=1e-4)
    np.testing.assert_array_equal(embedder.latents(pixels[3:4])[0], embedder.latents(pixels[3:])[0])
    symbols = embedder.symbols(pixels)
    payloads = codec.compress(symbols)
    assert np.array_equal(codec.decompress(payloads), symbols)
    assert np.abs(codec.dequantise(symbols) - embedder.latents(pixels)).max() <= 0.5 + 1e-3
    if layers:
        assert np.array_equal(codec.decompress(payloads, layers=1), symbols[:, :, : layers[0]])
    decoder = model.decoder
    assert isinstance(decoder, StageDecoder)
    grid = latent.transpose(1, 2).reshape(6, channels, side, side)
    with torch.no_grad():
        expected = decoder.decoder.blocks["sentinel2"](decoder.decoder.proj(grid)).flatten(2).transpose(1, 2)
        torch.testing.assert_close(first_decoder_layer(codec)(latent), expected)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"stage": 3}, "contradict each other"),
        ({"stage": 9}, "not that of stages of MP-MAE"),
        ({"dim": 10**9}, "not that of stages of MP-MAE"),
        ({"decoder_dim": 10**9}, "not that of stages of MP-MAE"),
        ({"heads": 3}, "not that of stages of MP-MAE"),
        ({"stage": None}, "not that of stages of MP-MAE"),
        ({"depth_4": 1}, "does not fit its architecture"),
    ],
)
def test_a_codec_that_contradicts_itself_is_refused(tmp_path: Path, change: dict[str, Any], says: str) -> None:
    exported(tmp_path / "codec", 4)
    path = tmp_path / "codec" / "codec.json"
    document = json.loads(path.read_text())
    document["architecture"] |= change
    document["architecture"] = {k: v for k, v in document["architecture"].items() if v is not None}
    path.write_text(json.dumps(document))
    with pytest.raises(CorruptCodec, match=says):
        Embedder(load_codec(tmp_path / "codec"))


def test_a_checkpoint_gives_the_last_stage_its_decoder_and_an_earlier_one_only_the_encoder() -> None:
    torch.manual_seed(1)
    source = MpMae(MpMaeConfig(SIZES, (OPTICAL, CLIMATE), decoder_dim=8))
    tensors = mmearth_tensors(source)
    for stage in (4, 3):
        encoder, decoder = StageEncoder(stage_of(stage)), StageDecoder(stage_of(stage))
        before = {name: tensor.clone() for name, tensor in decoder.state_dict().items()}
        assert import_stage(encoder, decoder, tensors, "made") == (stage == 4)
        for name, tensor in encoder.encoder.state_dict().items():
            assert torch.equal(tensor, source.encoder.state_dict()[name])
        theirs = source.decoder.state_dict()
        for name, tensor in decoder.decoder.state_dict().items():
            assert torch.equal(tensor, theirs[name] if stage == 4 else before[f"decoder.{name}"])


def test_sizes_and_outputs_that_cannot_be_are_refused() -> None:
    with pytest.raises(InputError, match="stage 5 is none of 1 to 4"):
        stage_of(5)
    with pytest.raises(InputError, match="decoder_dim 0 is out of range"):
        StageConfig(SIZES, (4,), 0)
    for outputs in ((CLIMATE,), (replace(OPTICAL, channels=12),)):
        with pytest.raises(InputError, match="first output must be sentinel2 of 3 bands"):
            StageDecoder(stage_of(4), outputs)

"""The whole of MP-MAE: predictions against modules applied by hand, what masks and missing data may not reach."""

import math

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional

from nec_ray.errors import InputError
from nec_ray.models.convnext import SIZES, ConvNextConfig
from nec_ray.models.mp_mae import MASK_RATIO, MpMae, MpMaeConfig, Pool
from nec_ray.models.pretext import Output, Weighting

ENCODER = ConvNextConfig(size=24, patch=8, bands=3, dim=8, depth_1=1, depth_2=1, depth_3=1, depth_4=1)
OUTPUTS = (
    Output("sentinel2", "pixel", "continuous", 3, patch_normalised=True),
    Output("sentinel1", "pixel", "continuous", 2),
    Output("cover", "pixel", "categorical", 1, 4),
    Output("climate", "image", "continuous", 3),
    Output("biome", "image", "categorical", 1, 5),
)


def model(weighting: Weighting = "uncertainty", pool: Pool = "masked") -> MpMae:
    torch.manual_seed(0)
    made = MpMae(MpMaeConfig(ENCODER, OUTPUTS, weighting, decoder_dim=16, pool=pool))
    for name, weight in made.named_parameters():
        if "log_vars" not in name:
            weight.data = torch.randn_like(weight) * 0.2 + (1.0 if "norm" in name and "weight" in name else 0.0)
    return made


def batch(count: int = 4, seed: int = 0) -> tuple[Tensor, dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(count, *shape, generator=generator)

    pixels = normal(3, 24, 24)
    return pixels, {
        "sentinel2": pixels.clone(),
        "sentinel1": normal(2, 24, 24),
        "cover": torch.randint(0, 4, (count, 1, 24, 24), generator=generator),
        "climate": normal(3),
        "biome": torch.randint(0, 5, (count, 1), generator=generator),
    }


@pytest.mark.parametrize("pool", ["masked", "all"])
def test_decoders_see_visible_places_and_mask_tokens(pool: Pool) -> None:
    """Against the released decoder's steps, on functional operations, with image heads over masked or all places."""
    mp_mae = model(pool=pool)
    state = {name: p.detach() for name, p in mp_mae.decoder.named_parameters()}
    features, keep = torch.randn(2, 64, 3, 3), torch.tensor([[7, 0, 4], [2, 3, 8]])
    visible = torch.zeros(2, 1, 3, 3)
    for sample, tokens in enumerate(keep.tolist()):
        for token in tokens:
            visible[sample, 0, token // 3, token % 3] = 1
    x = functional.conv2d(features, state["proj.weight"], state["proj.bias"])
    x = x * visible + state["mask_token"] * (1 - visible)
    with torch.no_grad():
        found = mp_mae.decoder(features, keep)
    assert list(found) == [output.name for output in OUTPUTS]
    for output in OUTPUTS:

        def weight(name: str, of: str = f"blocks.{output.name}.") -> Tensor:
            return state[of + name]

        y = functional.conv2d(x, weight("dwconv.weight"), weight("dwconv.bias"), padding=3, groups=16)
        y = y.permute(0, 2, 3, 1)
        y = functional.layer_norm(y, (16,), weight("norm.weight"), weight("norm.bias"), 1e-6)
        y = functional.gelu(y @ weight("pwconv1.weight").T + weight("pwconv1.bias"))
        norm = y.square().sum((1, 2), keepdim=True).sqrt()
        y = weight("grn.gamma") * y * norm / (norm.mean(3, keepdim=True) + 1e-6) + weight("grn.beta") + y
        y = x.permute(0, 2, 3, 1) + y @ weight("pwconv2.weight").T + weight("pwconv2.bias")
        matrix, bias = state[f"heads.{output.name}.weight"].flatten(1), state[f"heads.{output.name}.bias"]
        if output.level == "pixel":
            expected = y.flatten(1, 2) @ matrix.T + bias
        else:
            y = functional.layer_norm(y, (16,), state["image_norm.weight"], state["image_norm.bias"], 1e-6)
            there = [(1 - visible[s, 0]).bool() if pool == "masked" else torch.ones(3, 3).bool() for s in range(2)]
            expected = torch.stack([y[s][there[s]].mean(0) for s in range(2)]) @ matrix.T + bias
        torch.testing.assert_close(found[output.name], expected, rtol=1e-4, atol=1e-4)


def test_the_papers_mask_hides_30_of_49_patches() -> None:
    """int(49 * 0.4) = 19 are kept, in the released code and here: seen by the gradient that reaches the pixels."""
    assert MASK_RATIO == 0.6
    mp_mae = MpMae(MpMaeConfig.mmearth("atto", pixels=56, patch=8, inputs="rgb", targets="s2"))
    pixels = torch.randn(2, 3, 56, 56, requires_grad=True)
    mp_mae(pixels, {"sentinel2": pixels.detach()}).loss.backward()
    assert pixels.grad is not None
    seen = functional.max_pool2d(pixels.grad.abs().amax(1, keepdim=True), 8) > 0
    assert seen.sum((1, 2, 3)).tolist() == [19, 19]


def test_no_prediction_knows_what_is_masked() -> None:
    """Pixels change under the mask only: encoder, and so every prediction, stay as they are."""
    mp_mae = model()
    pixels, _ = batch(2)
    keep = torch.tensor([[1, 5, 6], [0, 4, 8]])
    spoilt = torch.full_like(pixels, 50.0)
    for sample, tokens in enumerate(keep.tolist()):
        for token in tokens:
            top, left = 8 * (token // 3), 8 * (token % 3)
            spoilt[sample, :, top : top + 8, left : left + 8] = pixels[sample, :, top : top + 8, left : left + 8]
    with torch.no_grad():
        one, other = (mp_mae.decoder(mp_mae.encoder(given, keep)[-1], keep) for given in (pixels, spoilt))
    for name in one:
        assert torch.equal(one[name], other[name])


@pytest.mark.parametrize("weighting", ["uncertainty", "equal"])
def test_losses_are_weighted_and_summed(weighting: Weighting) -> None:
    mp_mae = model(weighting)
    if mp_mae.weighting.log_vars is not None:
        mp_mae.weighting.log_vars.data = torch.tensor([0.1, -0.4, 0.3, 1.0, -0.2])
    pixels, targets = batch()
    losses = mp_mae(pixels, targets, generator=torch.Generator().manual_seed(3))
    variances = mp_mae.log_variances() or dict.fromkeys(losses.tasks, 0.0)
    expected = sum(math.exp(-variances[name]) * float(loss) + variances[name] for name, loss in losses.tasks.items())
    assert list(losses.tasks) == [output.name for output in OUTPUTS]
    assert float(losses.loss.detach()) == pytest.approx(expected, rel=1e-5)


def missing(targets: dict[str, Tensor], name: str, samples: slice) -> dict[str, Tensor]:
    spoilt = targets[name].clone()
    spoilt[samples] = math.nan if spoilt.is_floating_point() else -1
    return targets | {name: spoilt}


@pytest.mark.parametrize("name", ["sentinel2", "sentinel1", "cover", "climate", "biome"])
def test_a_modality_that_a_whole_batch_lacks_changes_no_weight_of_its_own(name: str) -> None:
    """Nothing of the task learns, its log variance neither, and the rest learns as if the task did not exist."""
    mp_mae = model()
    pixels, targets = batch()

    def gradients(given: MpMae, targets: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        given.zero_grad()
        losses = given(pixels, targets, generator=torch.Generator().manual_seed(5))
        losses.loss.backward()
        return losses.loss.detach(), {n: p.grad.clone() for n, p in given.named_parameters() if p.grad is not None}

    loss, found = gradients(mp_mae, missing(targets, name, slice(None)))
    number = [output.name for output in OUTPUTS].index(name)
    others = tuple(output for output in OUTPUTS if output.name != name)
    without = MpMae(MpMaeConfig(ENCODER, others, decoder_dim=16))
    without.load_state_dict(
        {n: p for n, p in mp_mae.state_dict().items() if f".{name}." not in n and "log_vars" not in n}
        | {"weighting.log_vars": torch.zeros(4)}
    )
    expected_loss, expected = gradients(without, targets)
    assert float(loss) == pytest.approx(float(expected_loss), rel=1e-5)
    log_vars = found.pop("weighting.log_vars").tolist()
    assert log_vars.pop(number) == 0
    np.testing.assert_allclose(log_vars, expected.pop("weighting.log_vars"), rtol=1e-4)
    for parameter, gradient in found.items():
        if f".{name}." in parameter:
            assert not gradient.any()
        else:
            torch.testing.assert_close(gradient, expected[parameter], rtol=1e-3, atol=1e-6)


def test_a_missing_task_is_reported_as_such() -> None:
    pixels, targets = batch()
    tasks = model()(pixels, missing(targets, "sentinel1", slice(None))).tasks
    assert [name for name, loss in tasks.items() if loss.isnan()] == ["sentinel1"]


def test_missing_input_pixels_are_the_mean() -> None:
    mp_mae = model()
    pixels, targets = batch()
    holes = pixels.clone()
    holes[:, :, 3:9, 5:20] = math.nan

    def loss(given: Tensor) -> float:
        return float(mp_mae(given, targets, generator=torch.Generator().manual_seed(1)).loss.detach())

    assert loss(holes) == loss(torch.where(holes.isnan(), 0.0, pixels))
    assert loss(holes) != loss(pixels)


def test_the_whole_atto_has_the_parameters_of_the_published_one() -> None:
    """11.91 million with 16-pixel patches, 7.58 with 8, of which the released code counts one decoder of twelve."""
    for pixels, patch, millions in ((112, 16, 11.91), (56, 8, 7.58)):
        mp_mae = MpMae(MpMaeConfig.mmearth("atto", pixels=pixels, patch=patch))
        whole = sum(p.numel() for p in mp_mae.parameters())
        one = sum(p.numel() for p in mp_mae.decoder.blocks["sentinel2"].parameters())
        assert (whole - 11 * one) / 1e6 == pytest.approx(millions, abs=0.005)


def test_training_beats_the_best_constant_prediction_in_every_task() -> None:
    """Targets that follow from the image: 90 steps on one batch, from the model's own first weights."""
    torch.manual_seed(0)
    mp_mae = MpMae(MpMaeConfig(ENCODER, OUTPUTS, decoder_dim=16))
    rng = torch.Generator().manual_seed(0)
    pixels = torch.randn(8, 3, 1, 1, generator=rng) + 0.1 * torch.randn(8, 3, 24, 24, generator=rng)
    mean = pixels.mean((2, 3))
    targets = {
        "sentinel2": pixels,
        "sentinel1": pixels[:, :2] * 2,
        "cover": (pixels[:, :1] > 0).long(),
        "climate": mean,
        "biome": (mean[:, 1:2] > 0).long() * 4,
    }
    optimiser = torch.optim.AdamW(mp_mae.parameters(), 3e-3)
    for _ in range(90):
        losses = mp_mae(pixels, targets, generator=rng)
        optimiser.zero_grad()
        losses.loss.backward()
        optimiser.step()

    def entropy(share: float) -> float:
        return -share * math.log(share) - (1 - share) * math.log(1 - share)

    constant = {
        "sentinel2": 1.0,
        "sentinel1": float(targets["sentinel1"].var((0, 2, 3)).mean()),
        "cover": entropy(float((targets["cover"] == 1).float().mean())),
        "climate": float(mean.var(0, unbiased=False).mean()),
        "biome": entropy(float((targets["biome"] == 4).float().mean())),
    }
    for name, loss in losses.tasks.items():
        assert float(loss) < 0.7 * constant[name], name


def test_wrong_configurations_and_batches_are_refused() -> None:
    pixels, targets = batch()
    del targets["biome"]
    with pytest.raises(InputError, match="lacks the targets biome"):
        model()(pixels, targets)
    with pytest.raises(InputError, match="each once"):
        MpMaeConfig(ENCODER, (OUTPUTS[0], OUTPUTS[0]))
    with pytest.raises(InputError, match=f"no size 'huge'; there are {', '.join(SIZES)}"):
        MpMaeConfig.mmearth("huge", pixels=56, patch=8)

"""Losses, learning rates and frozen parts, against formulas written out, timm's groups and MMEarth's code."""

import copy
import math
from typing import Any

import numpy as np
import pytest
import timm
import torch
from timm.optim import param_groups_layer_decay
from torch import Tensor, nn

from nec_ray.evaluate.geobench.encoders import ConvNextFeatures, TimmFeatures, VitFeatures
from nec_ray.evaluate.geobench.experiment import Training
from nec_ray.evaluate.geobench.training import (
    Classifier,
    Segmenter,
    class_loss,
    fit,
    labels_loss,
    layer_groups,
    rate_at,
)
from nec_ray.models.convnext import Block, ConvNextConfig, ConvNextEncoder
from nec_ray.models.mae import MaeConfig, MaeEncoder
from nec_ray.models.segmentation import mask_loss

DEPTHS = (1, 2, 3, 1)
SIZES = ConvNextConfig(16, 8, 3, 4, *DEPTHS)
Scales = dict[str, tuple[float, float]]
"""Share of the learning rate and weight decay of each parameter."""


def convnext() -> ConvNextFeatures:
    torch.manual_seed(0)
    return ConvNextFeatures(ConvNextEncoder(SIZES))


def scales(model: nn.Module, groups: list[dict[str, Any]]) -> Scales:
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    found = [(names[id(p)], (group["lr_scale"], group["weight_decay"])) for group in groups for p in group["params"]]
    assert len(found) == len(names) == len(dict(found)), "every parameter is in one group"
    return dict(found)


def mmearth_scale(name: str) -> float:
    """`get_num_layer_for_convnext_single` and `LayerDecayValueAssigner` of the code that MMEarth's was made from,
    ConvNeXt's, whose `downsample_layers.0` is the stem; there are 7 blocks."""
    kind, *rest = name.removeprefix("encoder.net.").split(".")
    if kind in {"initial_conv", "stem"}:
        layer = 0
    elif kind == "downsample_layers":
        layer = sum(DEPTHS[: int(rest[0]) + 1]) + 1
    elif kind == "stages":
        layer = sum(DEPTHS[: int(rest[0])]) + int(rest[1]) + 1
    else:
        layer = 7 + 1
    return 0.9 ** (7 + 1 - layer)


def test_layers_of_convnext_decay_as_its_own_code_has_it() -> None:
    model = Classifier(convnext(), SIZES.dims[-1], 5)
    found = scales(model, layer_groups(model, 0.3, 0.9))
    for name, parameter in model.named_parameters():
        plain = parameter.ndim == 1 or name.endswith((".bias", ".gamma", ".beta"))
        assert found[name] == pytest.approx((mmearth_scale(name), 0.0 if plain else 0.3)), name
    assert found["head.weight"][0] == 1
    assert found["encoder.net.stem.0.weight"][0] == pytest.approx(0.9**8)


def theirs(model: Any) -> Scales:
    exempt = model.no_weight_decay() if hasattr(model, "no_weight_decay") else ()
    return scales(model, param_groups_layer_decay(model, 0.3, exempt, layer_decay=0.75))


def test_layers_of_a_mae_vit_decay_as_timm_has_it() -> None:
    config = MaeConfig(16, 8, 3, 16, 3, 2, 8, 1, 2)
    model = Classifier(VitFeatures(MaeEncoder(config)), 16, 4)
    vit = timm.models.VisionTransformer(16, 8, 3, 4, embed_dim=16, depth=3, num_heads=2)
    expected = theirs(vit)
    found = scales(model, layer_groups(model, 0.3, 0.75))
    for name, scale in expected.items():
        ours = name if name.startswith("head.") else f"encoder.net.{name}"
        assert found.pop(ours) == pytest.approx(scale), name
    assert found == {"norm.weight": (1.0, 0.0), "norm.bias": (1.0, 0.0)}


def test_layers_of_timm_s_models_decay_as_timm_has_it() -> None:
    how = {"depths": (1, 1, 2, 1), "dims": (4, 8, 16, 32), "use_grn": True, "ls_init_value": None}
    whole = timm.models.ConvNeXt(num_classes=3, **how)
    model = Classifier(TimmFeatures(timm.models.ConvNeXt(num_classes=0, **how), 3, 32), 32, 3)
    found = scales(model, layer_groups(model, 0.3, 0.75))
    for name, scale in theirs(whole).items():
        ours = name.replace("head.fc", "head") if name.startswith("head.fc") else f"encoder.net.{name}"
        assert found.pop(ours) == pytest.approx(scale), name
    assert set(found) == {"norm.weight", "norm.bias"}


def test_smoothed_targets_are_those_of_the_formulas() -> None:
    rng = np.random.default_rng(0)
    logits, smoothing, classes = rng.normal(size=(6, 5)), 0.2, 5
    target = rng.integers(0, classes, 6)
    log_p = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
    soft = np.full((6, classes), smoothing / classes)
    soft[np.arange(6), target] += 1 - smoothing
    got = class_loss(smoothing)(torch.from_numpy(logits), torch.from_numpy(target))
    assert float(got) == pytest.approx(float(-(soft * log_p).sum(axis=1).mean()))
    # LabelSmoothingBinaryCrossEntropy of MMEarth-train's custom_loss.py
    flags = rng.random((6, classes)) < 0.4
    truth = np.where(flags, 1 - smoothing, smoothing)
    p = 1 / (1 + np.exp(-logits))
    expected = -(truth * np.log(p) + (1 - truth) * np.log(1 - p)).mean()
    got = labels_loss(smoothing)(torch.from_numpy(logits), torch.from_numpy(flags))
    assert float(got) == pytest.approx(float(expected))


def test_pixels_that_are_ignored_do_not_count() -> None:
    logits = torch.randn(1, 3, 2, 2)
    mask = torch.tensor([[[0, 255], [2, 255]]], dtype=torch.uint8)
    log_p = logits.log_softmax(1)
    expected = -(log_p[0, 0, 0, 0] + log_p[0, 2, 1, 0]) / 2
    assert float(mask_loss(logits, mask)) == pytest.approx(float(expected))
    large = mask.repeat_interleave(2, 1).repeat_interleave(2, 2)
    assert torch.isfinite(mask_loss(logits, large))


def test_the_learning_rate_is_that_of_the_released_code() -> None:
    """`adjust_learning_rate`, called with epochs as fractions."""
    settings = Training(epochs=10, batch=1024, base_lr=2e-4, warmup_epochs=2, min_lr=1e-6)
    peak = 2e-4 * 1024 / 256
    for step in range(40):
        epoch = step / 4
        expected = (
            peak * epoch / 2
            if epoch < 2
            else 1e-6 + (peak - 1e-6) * 0.5 * (1.0 + math.cos(math.pi * (epoch - 2) / (10 - 2)))
        )
        assert rate_at(step, 40, settings) == pytest.approx(expected)
    assert rate_at(0, 40, settings.model_copy(update={"warmup_epochs": 0})) == pytest.approx(8e-4)


def changed(before: dict[str, Tensor], model: nn.Module) -> set[str]:
    return {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}


def state(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


SHORT = Training(epochs=2, batch=4, part=3, base_lr=0.1)
PIXELS = np.random.default_rng(1).normal(size=(5, 3, 16, 16)).astype(np.float32)
CLASSES = torch.tensor([0, 1, 0, 1, 1])


def inputs(some: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    return PIXELS[some]


def test_what_is_frozen_stays_as_it_is() -> None:
    torch.manual_seed(3)
    encoder = convnext()
    model = Classifier(encoder, encoder.dim, 2)
    model.head.weight.data *= 1000  # or the first layer's gradients are lost in rounding
    before = state(model)
    trained = [model.head, encoder.first_layer()]
    fit(model, inputs, CLASSES, class_loss(0.2), SHORT, trained=trained, drop_path=False)
    first = {"encoder.net.initial_conv.0.weight", "encoder.net.initial_conv.0.bias"}
    assert changed(before, model) == {"head.weight", "head.bias"} | first
    before = state(model)
    fit(model, inputs, CLASSES, class_loss(0.0), SHORT, trained=[model], layer_decay=0.9)
    assert changed(before, model) == set(before)


def test_the_u_net_is_trained_first_and_then_both() -> None:
    torch.manual_seed(4)
    masks = torch.randint(0, 2, (5, 16, 16), dtype=torch.uint8)

    def done(frozen_epochs: int, epochs: int = 2) -> set[bool]:
        encoder = convnext()
        model = Segmenter(encoder, encoder.widths, 2)
        settings = SHORT.model_copy(update={"epochs": epochs})
        before = state(model)
        fit(
            model,
            inputs,
            masks,
            mask_loss,
            settings,
            trained=[model.decoder],
            frozen_epochs=frozen_epochs,
            thawed=[encoder],
        )
        names = changed(before, model)
        assert {name for name in before if name.startswith("decoder.")} <= names
        assert model(torch.from_numpy(PIXELS)).shape == (5, 2, 16, 16)
        return {name in names for name in before if name.startswith("encoder.")}

    assert done(2) == {False}
    assert done(1) == {True}


def test_parts_of_a_batch_add_up_to_it() -> None:
    torch.manual_seed(5)
    features = torch.randn(7, 6).numpy()
    target = torch.tensor([0, 1, 2, 0, 1, 2, 0])
    whole = Classifier(None, 6, 3).double()
    parts = copy.deepcopy(whole)
    for model, part in ((whole, 7), (parts, 2)):
        torch.manual_seed(6)
        settings = Training(epochs=3, batch=7, part=part, base_lr=0.5)
        fit(model, lambda some: features[some].astype(np.float64), target, class_loss(0.1), settings, trained=[model])
    for name, tensor in whole.state_dict().items():
        assert torch.allclose(tensor, parts.state_dict()[name], atol=1e-12), name


def test_no_batch_is_of_one_sample() -> None:
    """Batch normalisation of a place has nothing to do with one."""
    seen: list[int] = []

    def counted(some: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        seen.append(len(some))
        return np.zeros((len(some), 6), np.float32)

    model = Classifier(None, 6, 2)
    target = torch.zeros(33, dtype=torch.int64)
    fit(model, counted, target, class_loss(0.0), Training(epochs=1, batch=16, part=10), trained=[model])
    assert sum(seen) == 33
    assert len(seen) == 3 * 2, "three steps, two parts each"
    assert min(seen) == 5


def test_blocks_are_left_out_in_training_alone() -> None:
    torch.manual_seed(7)
    net = ConvNextEncoder(SIZES)
    net.set_drop_path(0.6)
    blocks = [block for block in net.modules() if isinstance(block, Block)]
    assert [block.drop_path for block in blocks] == pytest.approx(np.linspace(0, 0.6, sum(DEPTHS)).tolist())
    block, x = blocks[-1], torch.randn(64, 32, 1, 1)
    with torch.no_grad():
        y = block.eval()(x) - x
        dropped = block.train()(x) - x
    kept = dropped.flatten(1).abs().sum(1) > 0
    assert 5 < int(kept.sum()) < 50, "0.4 of 64"
    assert torch.allclose(dropped[kept], y[kept] / 0.4, atol=1e-5)

"""Encoders under one interface, beside the models themselves."""

from pathlib import Path

import pytest
import timm
import torch
from timm.layers import DropPath

from nec_ray.errors import BadCheckpoint, InputError
from nec_ray.evaluate.geobench.encoders import build, input_of
from nec_ray.evaluate.geobench.experiment import MaeVit, MpMae, Timm
from nec_ray.models.convnext import Block, ConvNextEncoder
from nec_ray.models.mae import MaeEncoder
from nec_ray.models.mmearth_weights import mmearth_tensors
from nec_ray.models.mp_mae import MpMae as WholeModel
from nec_ray.models.mp_mae import MpMaeConfig


def test_a_published_checkpoint_is_the_encoder(tmp_path: Path) -> None:
    torch.manual_seed(0)
    whole = WholeModel(MpMaeConfig.mmearth("atto", pixels=56, patch=8, inputs="rgb", targets="s2"))
    torch.save({"model": mmearth_tensors(whole)}, tmp_path / "checkpoint-199.pth")
    source = MpMae(kind="mp_mae", name="x", patch=8, inputs="rgb", weights=str(tmp_path / "checkpoint-199.pth"))
    assert input_of(source) == (["B2", "B3", "B4"], None, None)
    encoder = build(source, drop_path=0.5).eval()
    assert isinstance(encoder.net, ConvNextEncoder)
    blocks = [block for block in encoder.net.modules() if isinstance(block, Block)]
    assert [block.drop_path for block in blocks] == pytest.approx([0.5 * number / 11 for number in range(12)])
    pixels = torch.randn(2, 3, 20, 20)  # of no patch's multiple
    with torch.no_grad():
        stages = whole.encoder(pixels)
        assert torch.allclose(encoder(pixels), stages[-1].flatten(2).mean(2), atol=1e-6)
        maps = encoder.maps(pixels)
        first = whole.encoder.initial_conv(pixels)
        expected = [first, whole.encoder.stem(first), *stages[1:]]
    assert [one.shape[1] for one in maps] == list(encoder.widths)
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(maps, expected, strict=True))
    assert encoder.first_layer() is encoder.net.initial_conv[0]
    with pytest.raises(BadCheckpoint, match="patches of 8"):
        build(source.model_copy(update={"patch": 16}))


def test_a_mae_vit_gives_its_mean_token_and_its_grid() -> None:
    source = MaeVit(kind="mae_vit", name="x", size="micro", pixels=24, patch=8)
    torch.manual_seed(1)
    encoder = build(source, drop_path=0.2).eval()
    assert isinstance(encoder.net, MaeEncoder)
    rates = [module.drop_prob for module in encoder.net.modules() if isinstance(module, DropPath)]
    assert rates == pytest.approx([0, 0, 0.2 / 3, 0.2 / 3, 0.4 / 3, 0.4 / 3, 0.2, 0.2])
    pixels = torch.randn(2, 3, 24, 24)
    with torch.no_grad():
        tokens = encoder.net(pixels)
        [grid] = encoder.maps(pixels)
        assert torch.allclose(encoder(pixels), tokens.mean(1))
    assert torch.equal(grid[1, :, 2, 0], tokens[1, 6])
    assert grid.shape[1:] == (encoder.widths[0], 3, 3)


def test_models_of_timm_give_what_their_classifier_gets(tmp_path: Path) -> None:
    torch.manual_seed(2)
    theirs = timm.create_model("test_convnext", num_classes=5, in_chans=2).eval()
    torch.save(theirs.state_dict(), tmp_path / "a.pth")
    source = Timm(kind="timm", name="x", model="test_convnext", bands=["B4", "B8"], weights=str(tmp_path / "a.pth"))
    encoder = build(source, drop_path=0.1).eval()
    pixels = torch.randn(2, 2, 64, 64)
    with torch.no_grad():
        assert torch.allclose(encoder(pixels), theirs.forward_head(theirs.forward_features(pixels), pre_logits=True))
        maps = encoder.maps(pixels)
    sides = [one.shape[2] for one in maps]
    assert sides == sorted(set(sides), reverse=True)
    assert [one.shape[1] for one in maps] == list(encoder.widths)
    with pytest.raises(BadCheckpoint, match=r"name the model and bands"):
        build(source.model_copy(update={"bands": ["B4", "B3", "B2"]}))
    with pytest.raises(InputError, match="timm makes no model 'resnot'"):
        build(source.model_copy(update={"model": "resnot", "weights": None}))
    vit = build(Timm(kind="timm", name="x", model="test_vit", pixels=32)).eval()
    with torch.no_grad():
        assert len(vit.maps(torch.randn(1, 3, 32, 32))) == 1
    with pytest.raises(InputError, match=r"takes no images of 64 px .*give the pixels that it is for"):
        build(Timm(kind="timm", name="x", model="vit_tiny_patch16_224"))

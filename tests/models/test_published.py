"""Import of published weights: state dicts of exactly the names and shapes of the published code."""

import argparse
import collections
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import save_file
from torch import Tensor

from nec_ray.errors import BadCheckpoint, NotFound
from nec_ray.models.mae import SIZES, MaeConfig, MaeDecoder, MaeEncoder
from nec_ray.models.published import import_weights, published_tensors, read_checkpoint, resize_positions


def mae_names(
    dim: int, depth: int, decoder_dim: int, decoder_depth: int, patch: int, side: int
) -> dict[str, tuple[int, ...]]:
    """Names and shapes of facebookresearch/mae's `MaskedAutoencoderViT` (models_mae.py), written down one by one."""

    def block(name: str, width: int) -> dict[str, tuple[int, ...]]:
        return {
            f"{name}.norm1.weight": (width,),
            f"{name}.norm1.bias": (width,),
            f"{name}.attn.qkv.weight": (3 * width, width),
            f"{name}.attn.qkv.bias": (3 * width,),
            f"{name}.attn.proj.weight": (width, width),
            f"{name}.attn.proj.bias": (width,),
            f"{name}.norm2.weight": (width,),
            f"{name}.norm2.bias": (width,),
            f"{name}.mlp.fc1.weight": (4 * width, width),
            f"{name}.mlp.fc1.bias": (4 * width,),
            f"{name}.mlp.fc2.weight": (width, 4 * width),
            f"{name}.mlp.fc2.bias": (width,),
        }

    shapes: dict[str, tuple[int, ...]] = {
        "cls_token": (1, 1, dim),
        "pos_embed": (1, side * side + 1, dim),
        "mask_token": (1, 1, decoder_dim),
        "decoder_pos_embed": (1, side * side + 1, decoder_dim),
        "patch_embed.proj.weight": (dim, 3, patch, patch),
        "patch_embed.proj.bias": (dim,),
        "norm.weight": (dim,),
        "norm.bias": (dim,),
        "decoder_embed.weight": (decoder_dim, dim),
        "decoder_embed.bias": (decoder_dim,),
        "decoder_norm.weight": (decoder_dim,),
        "decoder_norm.bias": (decoder_dim,),
        "decoder_pred.weight": (patch * patch * 3, decoder_dim),
        "decoder_pred.bias": (patch * patch * 3,),
    }
    for i in range(depth):
        shapes |= block(f"blocks.{i}", dim)
    for i in range(decoder_depth):
        shapes |= block(f"decoder_blocks.{i}", decoder_dim)
    return shapes


def random_of(shapes: dict[str, tuple[int, ...]], seed: int = 0) -> "collections.OrderedDict[str, Tensor]":
    generator = torch.Generator().manual_seed(seed)
    return collections.OrderedDict((n, 0.1 * torch.randn(s, generator=generator)) for n, s in shapes.items())


SMALL = MaeConfig(size=32, patch=8, bands=3, dim=48, depth=3, heads=4, decoder_dim=32, decoder_depth=2, decoder_heads=4)
SMALL_NAMES = mae_names(48, 3, 32, 2, 8, 4)


def whole(config: MaeConfig) -> tuple[MaeEncoder, MaeDecoder]:
    return MaeEncoder(config), MaeDecoder(config)


def released_forward(tensors: dict[str, Tensor], pixels: Tensor) -> Tensor:
    """The released encoder's `forward_encoder` without a mask, on functional operations alone; 4 heads."""
    functional = torch.nn.functional
    x = functional.conv2d(pixels, tensors["patch_embed.proj.weight"], tensors["patch_embed.proj.bias"], stride=8)
    x = x.flatten(2).transpose(1, 2) + tensors["pos_embed"][:, 1:]
    x = torch.cat([(tensors["cls_token"] + tensors["pos_embed"][:, :1]).expand(len(x), -1, -1), x], 1)

    def normed(value: Tensor, name: str) -> Tensor:
        return functional.layer_norm(value, (48,), tensors[f"{name}.weight"], tensors[f"{name}.bias"], 1e-6)

    def linear(value: Tensor, name: str) -> Tensor:
        return value @ tensors[f"{name}.weight"].T + tensors[f"{name}.bias"]

    for i in range(3):
        block = f"blocks.{i}"
        q, k, v = (
            linear(normed(x, f"{block}.norm1"), f"{block}.attn.qkv")
            .reshape(len(x), -1, 3, 4, 12)
            .permute(2, 0, 3, 1, 4)
        )
        attention = (q @ k.transpose(2, 3) / 12**0.5).softmax(3) @ v
        x = x + linear(attention.transpose(1, 2).flatten(2), f"{block}.attn.proj")
        hidden = functional.gelu(linear(normed(x, f"{block}.norm2"), f"{block}.mlp.fc1"))
        x = x + linear(hidden, f"{block}.mlp.fc2")
    return normed(x, "norm")


@pytest.mark.parametrize("wrapper", ["plain", "model", "module."])
def test_the_released_mae_is_imported_whole(tmp_path: Path, wrapper: str) -> None:
    tensors = random_of(SMALL_NAMES)
    saved: Any = {"plain": tensors, "model": {"model": tensors}}.get(
        wrapper, {"state_dict": {f"module.{name}": tensor for name, tensor in tensors.items()}}
    )
    torch.save(saved, tmp_path / "mae.pth")
    encoder, decoder = whole(SMALL)
    found = import_weights(encoder, decoder, read_checkpoint(str(tmp_path / "mae.pth")), "mae.pth")
    assert (found.decoder, found.resized_from, found.ignored) == (True, None, [])
    pixels = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(encoder(pixels), released_forward(tensors, pixels)[:, 1:], rtol=1e-4, atol=1e-5)
    state = decoder.state_dict()
    assert torch.equal(state["first.block.mlp.fc1.weight"], tensors["decoder_blocks.0.mlp.fc1.weight"])
    assert torch.equal(state["blocks.0.attn.qkv.bias"], tensors["decoder_blocks.1.attn.qkv.bias"])
    assert torch.equal(state["first.decoder_pos_embed"], tensors["decoder_pos_embed"][:, 1:])
    assert torch.equal(state["pred.weight"], tensors["decoder_pred.weight"])
    assert torch.equal(state["mask_token"], tensors["mask_token"])
    used = {"first.decoder_embed", "norm", "pred", "mask_token", "first", "blocks"}
    assert all(name.split(".")[0] in {u.split(".")[0] for u in used} for name in state)


def test_rvsas_checkpoint_with_its_training_state_is_read_without_unpickling_code(tmp_path: Path) -> None:
    """`util/misc.py: save_model` keeps the optimiser, the scaler and the arguments beside the model, ViT-B in full."""
    base = MaeConfig(size=224, patch=16, bands=3, **SIZES["base"])
    tensors = random_of(mae_names(768, 12, 512, 8, 16, 14))
    saved = {
        "model": tensors,
        "optimizer": {
            "state": {0: {"step": 3, "exp_avg": torch.zeros(2)}},
            "param_groups": [{"lr": 6e-4, "betas": (0.9, 0.95)}],
        },
        "epoch": 1599,
        "scaler": {"scale": 65536.0, "growth_tracker": 12},
        "args": argparse.Namespace(batch_size=256, blr=1.5e-4, model="mae_vit_base_patch16", norm_pix_loss=False),
    }
    torch.save(saved, tmp_path / "vit-b-checkpoint-1599.pth")
    encoder, decoder = whole(base)
    found = import_weights(encoder, decoder, read_checkpoint(str(tmp_path / "vit-b-checkpoint-1599.pth")), "rvsa")
    assert found.decoder
    assert torch.equal(encoder.blocks[11].state_dict()["mlp.fc2.bias"], tensors["blocks.11.mlp.fc2.bias"])


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "vit_base_patch16_224.mae"])
def test_a_vit_of_timm_is_imported_and_gives_timms_features(tmp_path: Path, name: str) -> None:
    torch.manual_seed(0)
    vit = timm.create_model(name, pretrained=False).eval()
    save_file(vit.state_dict(), tmp_path / "model.safetensors")
    size = {"vit_tiny_patch16_224": "tiny"}.get(name, "base")
    encoder, decoder = whole(MaeConfig(size=224, patch=16, bands=3, **SIZES[size]))
    before = {n: t.clone() for n, t in decoder.state_dict().items()}
    found = import_weights(encoder, decoder, read_checkpoint(str(tmp_path / "model.safetensors")), name)
    assert not found.decoder
    assert all(name.startswith("head") for name in found.ignored)
    assert all(torch.equal(tensor, before[n]) for n, tensor in decoder.state_dict().items())
    pixels = torch.randn(1, 3, 224, 224)
    with torch.no_grad():
        expected = vit.forward_features(pixels)[:, 1:]
        torch.testing.assert_close(encoder.eval()(pixels), expected, rtol=1e-4, atol=1e-4)


def test_our_own_weights_have_the_published_names_and_come_back(tmp_path: Path) -> None:
    """What `nec train` leaves after pretraining, read as any other checkpoint."""
    config = MaeConfig(
        size=32, patch=8, bands=3, dim=48, depth=2, heads=4, decoder_dim=32, decoder_depth=3, decoder_heads=4
    )
    encoder, decoder = whole(config)
    named = published_tensors(encoder, decoder)
    assert {name: tuple(tensor.shape) for name, tensor in named.items()} == mae_names(48, 2, 32, 3, 8, 4)
    save_file(named, tmp_path / "weights.safetensors")
    torch.manual_seed(1)
    again, decoding = whole(config)
    where = str(tmp_path / "weights.safetensors")
    assert import_weights(again, decoding, read_checkpoint(where), where).decoder
    for mine, theirs in ((encoder, again), (decoder, decoding)):
        assert all(torch.equal(tensor, theirs.state_dict()[name]) for name, tensor in mine.state_dict().items())


def cubic(x: float) -> float:
    """Keys' kernel with a = -0.75."""
    x, a = abs(x), -0.75
    if x <= 1:
        return (a + 2) * x**3 - (a + 3) * x**2 + 1
    return a * x**3 - 5 * a * x**2 + 8 * a * x - 4 * a if x < 2 else 0.0


def resized(grid: "np.ndarray[Any, Any]", side: int) -> "np.ndarray[Any, Any]":
    """Bicubic interpolation of (before, before, dim), number by number; pixels are areas, edges repeat."""
    before = len(grid)
    out = np.zeros((side, side, grid.shape[2]))
    for i in range(side):
        for j in range(side):
            y, x = ((n + 0.5) * before / side - 0.5 for n in (i, j))
            for a in range(int(np.floor(y)) - 1, int(np.floor(y)) + 3):
                for b in range(int(np.floor(x)) - 1, int(np.floor(x)) + 3):
                    weight = cubic(y - a) * cubic(x - b)
                    out[i, j] += weight * grid[min(max(a, 0), before - 1), min(max(b, 0), before - 1)]
    return out


@pytest.mark.parametrize("side", [3, 4, 7, 9])
def test_positions_are_interpolated_bicubically(side: int) -> None:
    positions = torch.randn(1, 17, 5, generator=torch.Generator().manual_seed(1))
    made = resize_positions(positions, side, "x")[0].numpy()
    grid = positions[0, 1:].numpy().reshape(4, 4, 5)
    np.testing.assert_allclose(made[0], positions[0, 0].numpy())
    np.testing.assert_allclose(made[1:].reshape(side, side, 5), resized(grid, side), atol=2e-6)


def test_another_image_size_takes_interpolated_positions() -> None:
    tensors = random_of(SMALL_NAMES)
    larger = MaeConfig(**{**SMALL.to_architecture(), "size": 48})
    encoder, decoder = whole(larger)
    found = import_weights(encoder, decoder, tensors, "x")
    assert found.resized_from == 4
    grid = tensors["pos_embed"][0, 1:].numpy().reshape(4, 4, 48)
    np.testing.assert_allclose(encoder.pos_embed[0, 1:].detach().numpy(), resized(grid, 6).reshape(36, 48), atol=2e-6)
    grid = tensors["decoder_pos_embed"][0, 1:].numpy().reshape(4, 4, 32)
    found_decoder = decoder.first.decoder_pos_embed[0].detach().numpy()
    np.testing.assert_allclose(found_decoder, resized(grid, 6).reshape(36, 32), atol=2e-6)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda t: t.pop("blocks.1.mlp.fc1.bias"), "it lacks blocks.1.mlp.fc1.bias"),
        (lambda t: t.pop("decoder_norm.weight"), "it lacks norm.weight"),
        (lambda t: t.update({"blocks.0.ls1.gamma": torch.ones(48)}), r"blocks.0.ls1.gamma"),
        (lambda t: t.update({"norm_pre.weight": torch.ones(48)}), "tensors that a MAE ViT has not: norm_pre.weight"),
        (
            lambda t: t.update({"cls_token": torch.ones(1, 1, 50)}),
            r"cls_token is \(1, 1, 50\), the model's is \(1, 1, 48\)",
        ),
        (lambda t: t.update({"pos_embed": torch.ones(1, 13, 48)}), "no square grid"),
        (lambda t: t.update({"pos_embed": torch.ones(2, 17, 48)}), r"\(2, 17, 48\) are of no square grid"),
        (lambda t: t.update({"pos_embed": torch.ones(1, 26, 0)}), "no square grid"),
        (lambda t: t.pop("decoder_embed.weight"), "it lacks first.decoder_embed.weight"),
        (
            lambda t: [t.pop(n) for n in list(t) if n.startswith(("decoder_embed.", "decoder_norm.", "decoder_pred."))],
            "it lacks first.decoder_embed.bias, first.decoder_embed.weight, norm.bias, norm.weight and 2 more",
        ),
        (lambda t: t["blocks.1.mlp.fc1.bias"].fill_(torch.nan), "blocks.1.mlp.fc1.bias is not finite"),
        (lambda t: t["decoder_pred.bias"].fill_(torch.inf), "decoder_pred.bias is not finite"),
        (lambda t: t["pos_embed"].fill_(torch.nan), "pos_embed is not finite"),
        (
            lambda t: t.update({"norm.bias": torch.full((48,), 1e300, dtype=torch.float64)}),
            "norm.bias is not finite",
        ),
        (
            lambda t: t.update({"blocks.0.norm1.weight": torch.ones(48, dtype=torch.int64)}),
            r"blocks.0.norm1.weight holds no weights \(strided, int64\)",
        ),
        (
            lambda t: t.update({"pos_embed": torch.ones(1, 17, 48, dtype=torch.complex64)}),
            r"pos_embed holds no weights \(strided, complex64\)",
        ),
        (lambda t: t.update({"norm.bias": torch.ones(48).to_sparse()}), r"norm.bias holds no weights \(sparse_coo,"),
        (lambda t: t.update({"decoder_blocks.².norm1.bias": torch.ones(32)}), "a MAE ViT has not: decoder_blocks.²"),
        (
            lambda t: [t.pop(n) for n in list(t) if n.startswith("blocks.2.")],
            "the checkpoint has 2 blocks of 48 channels",
        ),
    ],
)
def test_what_does_not_fit_is_named_and_nothing_is_set(change: Any, says: str) -> None:
    tensors = dict(random_of(SMALL_NAMES))
    change(tensors)
    encoder, decoder = whole(SMALL)
    before = {n: t.clone() for n, t in [*encoder.state_dict().items(), *decoder.state_dict().items()]}
    with pytest.raises(BadCheckpoint, match=says) as caught:
        import_weights(encoder, decoder, tensors, "weights.pth")
    assert "weights.pth" in str(caught.value)
    assert "\n" not in str(caught.value)
    after = dict([*encoder.state_dict().items(), *decoder.state_dict().items()])
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())


def test_half_precision_and_a_mask_token_of_an_encoder_are_taken(tmp_path: Path) -> None:
    """DINOv2's and BEiT's encoders have a mask token and no decoder."""
    tensors = {n: t.half() for n, t in random_of(SMALL_NAMES).items() if not n.startswith("decoder_")}
    encoder, decoder = whole(SMALL)
    found = import_weights(encoder, decoder, tensors, "x")
    assert (found.decoder, found.ignored) == (False, ["mask_token"])
    assert torch.equal(encoder.norm.bias, tensors["norm.bias"].float())


def test_a_checkpoint_that_contains_itself_or_is_nested_deep_is_refused(tmp_path: Path) -> None:
    itself: dict[str, Any] = {}
    itself["model"] = itself
    turn: dict[str, Any] = {"state_dict": {"module": {}}}
    turn["state_dict"]["module"]["model"] = turn
    deep: dict[Any, Any] = {"cls_token": torch.ones(1, 1, 48), 3: torch.ones(1)}
    for _ in range(3):
        deep = {"model": deep}
    torch.save(deep, tmp_path / "deep.pth")
    assert set(read_checkpoint(str(tmp_path / "deep.pth"))) == {"cls_token"}
    for _ in range(30):
        deep = {"model": deep}
    for number, found in enumerate((itself, turn, deep)):
        torch.save(found, tmp_path / f"{number}.pth")
        with pytest.raises(BadCheckpoint, match=rf"{number}\.pth: its state dict is in more than 7 others"):
            read_checkpoint(str(tmp_path / f"{number}.pth"))


class _Evil:
    def __reduce__(self) -> Any:
        return (print, ("pwned",))


def test_files_that_are_no_checkpoints_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "noise.pth").write_bytes(b"\x80\x04garbage" * 40)
    (tmp_path / "noise.safetensors").write_bytes(b"garbage" * 40)
    (tmp_path / "empty.pth").write_bytes(b"")
    (tmp_path / "pickled.pth").write_bytes(pickle.dumps({"model": _Evil()}))
    torch.save({"model": {"x": _Evil()}}, tmp_path / "evil.pth")
    torch.save({"epoch": 3}, tmp_path / "none.pth")
    for path in sorted(tmp_path.iterdir()):
        with pytest.raises(BadCheckpoint) as caught:
            read_checkpoint(str(path))
        assert path.name in str(caught.value)
        assert "\n" not in str(caught.value)
    assert "pwned" not in capsys.readouterr().out
    with pytest.raises(NotFound):
        read_checkpoint(str(tmp_path / "absent.pth"))

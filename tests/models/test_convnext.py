"""The masked encoder against a sparse convolution over lists of places, the dense one against timm."""

import pytest
import timm
import torch
from torch import Tensor
from torch.nn import functional

from nec_ray.errors import InputError
from nec_ray.models.convnext import SIZES, Block, ConvNextConfig, ConvNextEncoder, Reach, visible_map

DEPTHS = {"depth_1": 1, "depth_2": 1, "depth_3": 2, "depth_4": 1}


def small(patch: int, side: int, reach: Reach = "sample", seed: int = 0) -> ConvNextEncoder:
    """One in float64 all of whose weights are random, GRN's too, which start at 0."""
    torch.manual_seed(seed)
    encoder = ConvNextEncoder(ConvNextConfig(size=patch * side, patch=patch, bands=2, dim=4, **DEPTHS), reach).double()
    for weight in encoder.parameters():
        weight.data = 0.3 * torch.randn_like(weight)
    return encoder


class Sparse:
    """Places (n, 3) of sample, row and column, and their features (n, channels)."""

    def __init__(self, places: Tensor, values: Tensor, side: int) -> None:
        self.places, self.values, self.side = places, values, side

    def number_of(self, places: Tensor) -> Tensor:
        """Where in the list each place is; -1 where it is not among them."""
        found = (places[:, None, :] == self.places[None, :, :]).all(2)
        return torch.where(found.any(1), found.int().argmax(1), -1)

    def convolve(self, weight: Tensor, bias: Tensor, kernel: int, stride: int) -> "Sparse":
        """A sum over the neighbours that are in the list; kernels of odd size are centred."""
        out = torch.tensor(sorted({tuple(p) for p in (self.places // torch.tensor([1, stride, stride])).tolist()}))
        reach = (kernel - 1) // 2 if stride == 1 else 0
        total = bias.expand(len(out), -1)
        for row in range(kernel):
            for column in range(kernel):
                at = out * torch.tensor([1, stride, stride]) + torch.tensor([0, row - reach, column - reach])
                number = self.number_of(at)
                near = self.values[number.clamp(min=0)] * (number >= 0)[:, None]
                tap = weight[:, :, row, column]
                total = total + (near * tap[:, 0] if tap.shape[1] == 1 else near @ tap.T)
        return Sparse(out, total, self.side // stride)

    def but(self, values: Tensor) -> "Sparse":
        return Sparse(self.places, values, self.side)

    def grn(self, state: dict[str, Tensor], name: str, reach: str) -> Tensor:
        sample = self.places[:, 0]
        out = torch.empty_like(self.values)
        for one in set(sample.tolist()):
            mine = torch.ones_like(sample, dtype=torch.bool) if reach == "batch" else sample == one
            norm = self.values[mine].square().sum(0).sqrt()
            scaled = self.values * norm / (norm.mean() + 1e-6)
            changed = state[f"{name}.gamma"].flatten() * scaled + state[f"{name}.beta"].flatten() + self.values
            out = torch.where((sample == one)[:, None], changed, out)
        return out


def normed(values: Tensor, state: dict[str, Tensor], name: str) -> Tensor:
    centred = values - values.mean(1, keepdim=True)
    scaled = centred / (centred.square().mean(1, keepdim=True) + 1e-6).sqrt()
    return scaled * state[f"{name}.weight"] + state[f"{name}.bias"]


def sparse_forward(encoder: ConvNextEncoder, pixels: Tensor, keep: Tensor, reach: str) -> list[Sparse]:
    """The released sparse encoder on lists of the visible places, from the same weights."""
    state: dict[str, Tensor] = {**dict(encoder.named_parameters())}
    config = encoder.config
    places = torch.tensor(
        [
            (sample, config.patch * (patch // config.side) + row, config.patch * (patch % config.side) + column)
            for sample in range(len(keep))
            for patch in keep[sample].tolist()
            for row in range(config.patch)
            for column in range(config.patch)
        ]
    )
    x = Sparse(places, pixels[places[:, 0], :, places[:, 1], places[:, 2]], config.size)

    def convolve(x: Sparse, name: str, kernel: int, stride: int) -> Sparse:
        return x.convolve(state[f"{name}.weight"], state[f"{name}.bias"], kernel, stride)

    x = convolve(x, "initial_conv.0", 3, 1)
    x = x.but(functional.gelu(normed(x.values, state, "initial_conv.1")))
    x = convolve(x, "stem.0", config.patch // 8, config.patch // 8)
    x = x.but(normed(x.values, state, "stem.1"))
    features = []
    for stage, depth in enumerate(config.depths):
        if stage:
            x = x.but(normed(x.values, state, f"downsample_layers.{stage - 1}.0"))
            x = convolve(x, f"downsample_layers.{stage - 1}.1", 2, 2)
        for block in range(depth):
            name = f"stages.{stage}.{block}"
            y = convolve(x, f"{name}.dwconv", 7, 1)
            hidden = normed(y.values, state, f"{name}.norm") @ state[f"{name}.pwconv1.weight"].T
            y = y.but(functional.gelu(hidden + state[f"{name}.pwconv1.bias"]))
            hidden = y.grn(state, f"{name}.grn", reach) @ state[f"{name}.pwconv2.weight"].T
            x = x.but(x.values + hidden + state[f"{name}.pwconv2.bias"])
        features.append(x)
    return features


@pytest.mark.parametrize(("patch", "side", "reach"), [(8, 3, "sample"), (8, 3, "batch"), (16, 2, "sample")])
def test_the_masked_encoder_is_a_sparse_convolution(patch: int, side: int, reach: Reach) -> None:
    """All four stages, and the gradients of every weight and pixel."""
    encoder = small(patch, side, reach)
    pixels = torch.randn(2, 2, patch * side, patch * side, dtype=torch.float64, requires_grad=True)
    keep = torch.tensor([[4, 0], [5, 8]]) if side == 3 else torch.tensor([[3], [1]])

    features = encoder(pixels, keep)
    expected = sparse_forward(encoder, pixels, keep, reach)
    assert [f.shape[2] for f in features] == [8 * side, 4 * side, 2 * side, side]
    total, wanted = torch.zeros(()).double(), torch.zeros(()).double()
    for feature, sparse in zip(features, expected, strict=True):
        at = sparse.places.T
        dense = torch.zeros_like(feature).permute(0, 2, 3, 1)
        dense[at[0], at[1], at[2]] = sparse.values.detach()
        torch.testing.assert_close(feature, dense.permute(0, 3, 1, 2), rtol=1e-9, atol=1e-9)
        total = total + feature.sin().sum()  # sin(0) = 0: masked places count for nothing
        wanted = wanted + sparse.values.sin().sum()

    weights = [pixels, *encoder.parameters()]
    for mine, theirs in zip(torch.autograd.grad(total, weights), torch.autograd.grad(wanted, weights), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-8, atol=1e-9)


def test_masked_pixels_do_not_matter_even_where_they_are_wild() -> None:
    encoder = small(8, 3)
    pixels, keep = torch.randn(1, 2, 24, 24).double(), torch.tensor([[2, 3, 7]])
    spoilt = torch.where(visible_map(keep, 3).repeat_interleave(8, 2).repeat_interleave(8, 3), pixels, 1e6)
    for one, other in zip(encoder(pixels, keep), encoder(spoilt, keep), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("reach", ["sample", "batch"])
def test_a_mask_of_nothing_is_the_dense_model(reach: Reach) -> None:
    """Of a batch of one, where a sample's norm and the batch's are the same."""
    encoder = small(8, 2, reach)
    pixels = torch.randn(1, 2, 16, 16).double()
    for masked, dense in zip(encoder(pixels, torch.tensor([[1, 3, 0, 2]])), encoder(pixels), strict=True):
        torch.testing.assert_close(masked, dense)


def test_the_dense_encoder_does_not_mix_tiles() -> None:
    encoder = small(8, 2, "batch")
    pixels = torch.randn(3, 2, 16, 16).double()
    alone = [encoder(pixels[i : i + 1])[3] for i in range(3)]
    torch.testing.assert_close(encoder(pixels)[3], torch.cat(alone))


@pytest.mark.parametrize("size", ["atto", "nano"])
def test_behind_the_stem_the_dense_encoder_is_timms(size: str) -> None:
    torch.manual_seed(0)
    encoder = ConvNextEncoder(ConvNextConfig(size=56, patch=8, bands=12, **SIZES[size])).eval()
    for weight in encoder.parameters():
        weight.data = torch.randn_like(weight) * 0.05 + (1.0 if weight.ndim == 1 else 0.0)
    timms = timm.create_model(f"convnextv2_{size}", num_classes=0, global_pool="", conv_mlp=False).eval()
    renamed = {}
    for name, tensor in encoder.state_dict().items():
        part, _, rest = name.partition(".")
        if part == "downsample_layers":
            number, rest = rest.split(".", 1)
            renamed[f"stages.{int(number) + 1}.downsample.{rest}"] = tensor
        elif part == "stages":
            stage, block, rest = rest.split(".", 2)
            for ours, theirs in (("dwconv", "conv_dw"), ("pwconv1", "mlp.fc1"), ("pwconv2", "mlp.fc2")):
                rest = rest.replace(ours, theirs)
            rest = rest.replace("grn.gamma", "mlp.grn.weight").replace("grn.beta", "mlp.grn.bias")
            renamed[f"stages.{stage}.blocks.{block}.{rest}"] = tensor.flatten() if "grn" in rest else tensor
    left = timms.load_state_dict(renamed, strict=False)
    assert not left.unexpected_keys
    assert {name.split(".")[0] for name in left.missing_keys} <= {"stem", "norm_pre", "head"}
    pixels = torch.randn(2, 12, 56, 56)
    with torch.no_grad():
        x = encoder.stem(encoder.initial_conv(pixels))
        for stage, feature in zip(timms.stages, encoder(pixels), strict=True):
            x = stage(x)
            torch.testing.assert_close(feature, x, rtol=1e-4, atol=1e-4)


def test_atto_has_the_parameters_of_the_published_one() -> None:
    """MMEarth's released encoder of 16-pixel patches has 3,389,440."""
    encoder = ConvNextEncoder(ConvNextConfig(size=112, patch=16, bands=12, **SIZES["atto"]))
    assert sum(p.numel() for p in encoder.parameters()) == 3_389_440


@pytest.mark.parametrize(("size", "patch"), [(56, 8), (64, 8), (112, 16), (128, 16), (128, 32)])
def test_every_size_and_patch_of_the_paper_gives_a_place_a_patch(size: int, patch: int) -> None:
    encoder = ConvNextEncoder(ConvNextConfig(size=size, patch=patch, bands=3, dim=8, **DEPTHS)).eval()
    with torch.no_grad():
        shapes = [tuple(f.shape[1:]) for f in encoder(torch.randn(1, 3, size, size))]
    side = size // patch
    assert shapes == [(8, 8 * side, 8 * side), (16, 4 * side, 4 * side), (32, 2 * side, 2 * side), (64, side, side)]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"patch": 12}, "patch 12 is none of 8, 16, 32"),
        ({"size": 60}, "no multiple of the patch"),
        ({"depth_3": 0}, "depth_3 0 is out of range"),
        ({"dim": 10**9}, "dim 1000000000 is out of range"),
    ],
)
def test_sizes_that_cannot_be_are_refused(change: dict[str, int], message: str) -> None:
    with pytest.raises(InputError, match=message):
        ConvNextConfig(**({"size": 56, "patch": 8, "bands": 3, "dim": 8, **DEPTHS} | change))


@pytest.mark.parametrize("reach", ["sample", "batch"])
@pytest.mark.parametrize("patch", [8, 16, 32])
def test_leaving_masked_places_out_changes_neither_features_nor_gradients(patch: int, reach: Reach) -> None:
    found = []
    for skip in (False, True):
        encoder = small(patch, 3, reach)
        encoder.skip = skip
        pixels = torch.randn(
            2, 2, 3 * patch, 3 * patch, dtype=torch.float64, generator=torch.Generator().manual_seed(1)
        ).requires_grad_()
        features = encoder(pixels, torch.tensor([[4, 1, 8], [6, 0, 2]]))
        sum((f * torch.linspace(0.1, 1, f.numel(), dtype=f.dtype).reshape(f.shape)).sum() for f in features).backward()
        found.append([*features, pixels.grad, *(weight.grad for weight in encoder.parameters())])
    for whole, visible_only in zip(*found, strict=True):
        torch.testing.assert_close(visible_only, whole)


def test_whole_samples_are_skipped_alike_with_masked_places_left_out() -> None:
    """By the same random numbers; over many samples the rate is that which was asked for."""
    torch.manual_seed(0)
    block = Block(4).double().train()
    for weight in block.parameters():
        weight.data = 0.3 * torch.randn_like(weight)
    block.drop_path = 0.25
    places = torch.rand(600, 9).argsort(1)[:, :5]
    visible = torch.zeros(600, 9, dtype=torch.float64).scatter_(1, places, 1).reshape(600, 1, 3, 3)
    x = torch.randn(600, 4, 3, 3, dtype=torch.float64) * visible
    found = []
    for given in (None, places):
        torch.manual_seed(1)
        found.append(block(x, visible, given))
    torch.testing.assert_close(found[1], found[0])
    skipped = (found[1] == x).flatten(1).all(1)
    assert 0.2 < skipped.double().mean() < 0.3
    block.eval()
    torch.testing.assert_close(block(x, visible, places), block(x, visible))
    kept = x + (block(x, visible, places) - x) / 0.75  # what stays is scaled up by the share that stays
    torch.testing.assert_close(found[1][~skipped], kept[~skipped])

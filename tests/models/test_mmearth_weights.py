"""MMEarth's weights: state dicts of exactly the published names and shapes, kernels remapped tap by tap."""

import argparse
import collections
import os
import pickle
from pathlib import Path, PosixPath
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from nec_ray.errors import BadCheckpoint, InputError
from nec_ray.models.convnext import ConvNextConfig, ConvNextEncoder
from nec_ray.models.mmearth_weights import import_encoder, import_pretraining, mmearth_tensors, parse_folder
from nec_ray.models.mp_mae import MpMae, MpMaeConfig
from nec_ray.models.pretext import Output
from nec_ray.models.published import read_checkpoint

PIXEL = {"sentinel2": 12, "sentinel1": 8, "aster": 2, "dynamic_world": 9, "canopy_height_eth": 2, "esa_worldcover": 11}
IMAGE = {"era5": 12, "lat": 2, "lon": 2, "biome": 14, "eco_region": 846, "month": 2}
Shapes = dict[str, tuple[int, ...]]


def published_shapes(
    dims: list[int], depths: list[int], bands: int, patch: int, pixel: dict[str, int], image: dict[str, int],
    *, width: int = 512, log_vars: bool = True,
) -> Shapes:  # fmt: skip
    """Names and shapes of the released `FCMAE` (models/fcmae.py, models/convnextv2_sparse.py), one by one."""
    shapes: Shapes = {
        "mask_token": (1, width, 1, 1),
        "encoder.initial_conv.0.kernel": (9, bands, dims[0]),
        "encoder.initial_conv.0.bias": (1, dims[0]),
        "encoder.initial_conv.1.ln.weight": (dims[0],),
        "encoder.initial_conv.1.ln.bias": (dims[0],),
        "encoder.stem.0.kernel": ((patch // 8) ** 2, dims[0]),
        "encoder.stem.0.bias": (1, dims[0]),
        "encoder.stem.1.ln.weight": (dims[0],),
        "encoder.stem.1.ln.bias": (dims[0],),
        "proj.weight": (width, dims[3], 1, 1),
        "proj.bias": (width,),
    }
    for i in range(3):
        shapes |= {
            f"encoder.downsample_layers.{i}.0.ln.weight": (dims[i],),
            f"encoder.downsample_layers.{i}.0.ln.bias": (dims[i],),
            f"encoder.downsample_layers.{i}.1.kernel": (4, dims[i], dims[i + 1]),
            f"encoder.downsample_layers.{i}.1.bias": (1, dims[i + 1]),
        }
    for stage, depth in enumerate(depths):
        for block in range(depth):
            name, dim = f"encoder.stages.{stage}.{block}", dims[stage]
            shapes |= {
                f"{name}.dwconv.kernel": (49, dim),
                f"{name}.dwconv.bias": (1, dim),
                f"{name}.norm.ln.weight": (dim,),
                f"{name}.norm.ln.bias": (dim,),
                f"{name}.pwconv1.linear.weight": (4 * dim, dim),
                f"{name}.pwconv1.linear.bias": (4 * dim,),
                f"{name}.pwconv2.linear.weight": (dim, 4 * dim),
                f"{name}.pwconv2.linear.bias": (dim,),
                f"{name}.grn.gamma": (1, 4 * dim),
                f"{name}.grn.beta": (1, 4 * dim),
            }
    for modality, channels in {**pixel, **image}.items():
        name = f"decoder_dict.{modality}.0"
        shapes |= {
            f"{name}.dwconv.weight": (width, 1, 7, 7),
            f"{name}.dwconv.bias": (width,),
            f"{name}.norm.weight": (width,),
            f"{name}.norm.bias": (width,),
            f"{name}.pwconv1.weight": (4 * width, width),
            f"{name}.pwconv1.bias": (4 * width,),
            f"{name}.grn.gamma": (1, 1, 1, 4 * width),
            f"{name}.grn.beta": (1, 1, 1, 4 * width),
            f"{name}.pwconv2.weight": (width, 4 * width),
            f"{name}.pwconv2.bias": (width,),
            f"pred_dict.{modality}.weight": (
                (patch * patch * channels, width, 1, 1) if modality in pixel else (channels, width)
            ),
            f"pred_dict.{modality}.bias": (patch * patch * channels if modality in pixel else channels,),
        }
    if image:
        shapes |= {"layer_norm_tmp.weight": (width,), "layer_norm_tmp.bias": (width,)}
    if log_vars:
        shapes["loss_fn.log_vars"] = (len(pixel) + len(image),)
    return shapes


def random_of(shapes: Shapes, seed: int = 0) -> "collections.OrderedDict[str, Tensor]":
    generator = torch.Generator().manual_seed(seed)
    return collections.OrderedDict((n, 0.2 * torch.randn(s, generator=generator)) for n, s in shapes.items())


ATTO = ([40, 80, 160, 320], [2, 2, 6, 2])
TINY = ([96, 192, 384, 768], [3, 3, 9, 3])
SMALL = ConvNextConfig(size=32, patch=16, bands=3, dim=4, depth_1=1, depth_2=1, depth_3=2, depth_4=1)
SMALL_OUTPUTS = (
    Output("sentinel2", "pixel", "continuous", 3, patch_normalised=True),
    Output("dynamic_world", "pixel", "categorical", 1, 9),
    Output("era5", "image", "continuous", 12),
)
SMALL_SHAPES = published_shapes(
    [4, 8, 16, 32], [1, 1, 2, 1], 3, 16, {"sentinel2": 3, "dynamic_world": 9}, {"era5": 12}, width=16
)


def small_model(pool: Any = "all") -> MpMae:
    return MpMae(MpMaeConfig(SMALL, SMALL_OUTPUTS, decoder_dim=16, pool=pool, reach="batch"))


def dense_by_taps(kernel: Tensor) -> Tensor:
    """MinkowskiEngine counts a kernel's taps with the first axis, the rows, running fastest."""
    side = {1: 1, 4: 2, 9: 3, 49: 7}[len(kernel)]
    depthwise = kernel.ndim == 2
    dense = torch.empty((kernel.shape[-1], 1 if depthwise else kernel.shape[1], side, side))
    for tap in range(len(kernel)):
        row, column = tap % side, tap // side
        dense[:, :, row, column] = kernel[tap][:, None] if depthwise else kernel[tap].T
    return dense


def released_forward(tensors: dict[str, Tensor], pixels: Tensor, depths: list[int]) -> Tensor:
    """The released encoder without a mask, from its own tensors."""

    def norm(x: Tensor, name: str) -> Tensor:
        x = x.permute(0, 2, 3, 1)
        x = functional.layer_norm(x, x.shape[3:], tensors[f"{name}.weight"], tensors[f"{name}.bias"], 1e-6)
        return x.permute(0, 3, 1, 2)

    def conv(x: Tensor, name: str, **how: int) -> Tensor:
        return functional.conv2d(x, dense_by_taps(tensors[f"{name}.kernel"]), tensors[f"{name}.bias"][0], **how)

    x = functional.gelu(norm(conv(pixels, "encoder.initial_conv.0", padding=1), "encoder.initial_conv.1.ln"))
    stride = {1: 1, 4: 2}[len(tensors["encoder.stem.0.kernel"])]
    x = norm(conv(x, "encoder.stem.0", stride=stride, groups=x.shape[1]), "encoder.stem.1.ln")
    for stage, depth in enumerate(depths):
        if stage:
            name = f"encoder.downsample_layers.{stage - 1}"
            x = conv(norm(x, f"{name}.0.ln"), f"{name}.1", stride=2)
        for block in range(depth):
            name = f"encoder.stages.{stage}.{block}"
            y = norm(conv(x, f"{name}.dwconv", padding=3, groups=x.shape[1]), f"{name}.norm.ln").permute(0, 2, 3, 1)
            y = functional.gelu(y @ tensors[f"{name}.pwconv1.linear.weight"].T + tensors[f"{name}.pwconv1.linear.bias"])
            size = y.square().sum((1, 2), keepdim=True).sqrt()
            scaled = y * size / (size.mean(3, keepdim=True) + 1e-6)
            y = tensors[f"{name}.grn.gamma"][0] * scaled + tensors[f"{name}.grn.beta"][0] + y
            y = y @ tensors[f"{name}.pwconv2.linear.weight"].T + tensors[f"{name}.pwconv2.linear.bias"]
            x = x + y.permute(0, 3, 1, 2)
    return x


def test_the_published_atto_has_290_tensors() -> None:
    assert len(published_shapes(*ATTO, 12, 16, PIXEL, IMAGE)) == 290


KINDS = {
    "all_mod": (12, PIXEL, IMAGE),
    "img_mod": (12, {"sentinel2": 12}, IMAGE),
    "pix_mod": (12, PIXEL, {}),
    "S2": (12, {"sentinel2": 12}, {}),
    "rgb": (3, {"sentinel2": 3}, {}),
}
SHAPES = (("1M_64", "uncertainty", "56-8"), ("1M_128", "unweighted", "112-16"), ("100k_128", "uncertainty", "112-16"))


def shapes_of(kind: str, size: str, loss: str, shape: str) -> Shapes:
    bands, pixel, image = KINDS[kind]
    sizes = {"atto": ATTO, "tiny": TINY}[size]
    return published_shapes(*sizes, bands, int(shape.split("-")[1]), pixel, image, log_vars=loss == "uncertainty")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", ["atto", "tiny"])
def test_the_model_of_every_published_folder_has_its_names_and_shapes(kind: str, size: str) -> None:
    for data, loss, shape in SHAPES:
        folder = parse_folder(f"pt-{kind}_{size}_{data}_{loss}_{shape}")
        assert (folder.data, folder.pixels) == (data, int(shape.split("-")[0]))
        with torch.device("meta"):
            model = MpMae(folder.config())
        found = {name: tuple(tensor.shape) for name, tensor in mmearth_tensors(model).items()}
        assert found == shapes_of(kind, size, loss, shape)


@pytest.mark.parametrize("kind", KINDS)
def test_a_checkpoint_of_every_kind_is_imported_key_by_key(kind: str) -> None:
    loss, shape = ("unweighted", "112-16") if kind == "rgb" else ("uncertainty", "56-8")
    tensors = {
        name: torch.full(size, 0.001 * number)
        for number, (name, size) in enumerate(shapes_of(kind, "atto", loss, shape).items())
    }
    folder = parse_folder(f"pt-{kind}_atto_1M_64_{loss}_{shape}")
    model = MpMae(folder.config())
    import_pretraining(model, tensors, kind)
    encoder = ConvNextEncoder(folder.config().encoder)
    ignored = import_encoder(encoder, tensors, kind)
    assert ignored == sorted(name for name in tensors if not name.startswith("encoder."))
    for name, tensor in mmearth_tensors(model).items():
        assert float(tensor.flatten()[0]) == float(tensors[name].flatten()[0]), name
    for name, tensor in encoder.state_dict().items():
        assert torch.equal(tensor, model.encoder.state_dict()[name])


def test_log_variances_are_in_the_order_of_the_released_losses() -> None:
    """OUT_MODALITIES of the released MODALITIES.py."""
    model = MpMae(parse_folder("pt-all_mod_atto_1M_64_uncertainty_56-8").config())
    assert list(model.log_variances()) == [
        "sentinel2", "sentinel1", "aster", "era5", "dynamic_world", "canopy_height_eth", "lat", "lon", "biome",
        "eco_region", "month", "esa_worldcover",
    ]  # fmt: skip


def test_kernels_are_remapped_tap_by_tap() -> None:
    tensors = random_of(SMALL_SHAPES)
    encoder = ConvNextEncoder(SMALL)
    import_encoder(encoder, tensors, "small")
    state = encoder.state_dict()
    kernels = [name for name in tensors if name.endswith(".kernel")]
    assert len(kernels) == 1 + 1 + 3 + 5
    for name in kernels:
        mine = state[name.removeprefix("encoder.").replace(".kernel", ".weight")]
        assert torch.equal(mine, dense_by_taps(tensors[name])), name


def test_the_released_encoder_computes_the_same() -> None:
    tensors = random_of(SMALL_SHAPES, seed=1)
    encoder, model = ConvNextEncoder(SMALL), small_model()
    import_encoder(encoder, tensors, "small")
    import_pretraining(model, tensors, "small")
    pixels = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        expected = released_forward(tensors, pixels, [1, 1, 2, 1])
        torch.testing.assert_close(encoder(pixels)[3], expected, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(model.encoder(pixels)[3], expected, rtol=1e-4, atol=1e-4)
    decoder = model.decoder.state_dict()
    for ours, theirs in (
        ("blocks.era5.pwconv2.weight", "decoder_dict.era5.0.pwconv2.weight"),
        ("blocks.sentinel2.grn.gamma", "decoder_dict.sentinel2.0.grn.gamma"),
        ("heads.dynamic_world.weight", "pred_dict.dynamic_world.weight"),
        ("image_norm.bias", "layer_norm_tmp.bias"),
        ("mask_token", "mask_token"),
        ("proj.weight", "proj.weight"),
    ):
        assert torch.equal(decoder[ours], tensors[theirs])
    assert model.weighting.log_vars is not None
    assert torch.equal(model.weighting.log_vars.detach(), tensors["loss_fn.log_vars"])


def test_weights_go_out_in_the_published_layout_and_come_back() -> None:
    tensors = random_of(SMALL_SHAPES, seed=2)
    model = small_model()
    import_pretraining(model, tensors, "small")
    exported = mmearth_tensors(model)
    assert set(exported) == set(tensors)
    for name, tensor in tensors.items():
        assert torch.equal(exported[name], tensor), name


def test_a_dense_encoder_of_the_released_code_is_imported() -> None:
    """As a fine-tuned model is saved: dense names, with the norm and the classifier behind it."""
    source = ConvNextEncoder(SMALL)
    others = {"norm.weight": torch.ones(32), "norm.bias": torch.zeros(32), "head.weight": torch.ones(5, 32)}
    encoder = ConvNextEncoder(SMALL)
    assert import_encoder(encoder, {**source.state_dict(), **others}, "fine") == sorted(others)
    for name, tensor in source.state_dict().items():
        assert torch.equal(encoder.state_dict()[name], tensor)


def test_the_published_file_is_read_without_unpickling_code(tmp_path: Path) -> None:
    """model, optimizer, epoch, scaler and args, with a Path among them."""
    tensors = random_of(SMALL_SHAPES)
    args = argparse.Namespace(
        data_dir=PosixPath("/projects/data"), model="convnextv2_atto", out_modalities={"lat": "all"}
    )
    optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.ones(2))]).state_dict()
    saved = {"model": tensors, "optimizer": optimizer, "epoch": 199, "scaler": {"scale": 1.0}, "args": args}
    torch.save(saved, tmp_path / "checkpoint-199.pth")
    found = read_checkpoint(str(tmp_path / "checkpoint-199.pth"))
    assert set(found) == set(tensors)
    import_pretraining(small_model(), found, "small")


class Evil:
    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, ("echo unpickled",)


def test_a_published_file_with_code_in_its_arguments_is_refused(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    args = argparse.Namespace(data_dir=Evil())
    torch.save({"model": random_of(SMALL_SHAPES), "args": args}, tmp_path / "checkpoint.pth")
    with pytest.raises(BadCheckpoint, match="holds more than tensors"):
        read_checkpoint(str(tmp_path / "checkpoint.pth"))
    assert "unpickled" not in capfd.readouterr().out
    assert pickle.loads(pickle.dumps(args.data_dir)) == 0  # noqa: S301  the file would have run it
    assert "unpickled" in capfd.readouterr().out


def but(name: str, tensor: Tensor | None) -> dict[str, Tensor]:
    tensors = dict(random_of(SMALL_SHAPES))
    if tensor is None:
        del tensors[name]
    else:
        tensors[name] = tensor
    return tensors


@pytest.mark.parametrize(
    ("tensors", "says"),
    [
        (but("encoder.stem.0.bias", None), "it lacks encoder.stem.0.bias"),
        (but("pred_dict.era5.weight", None), "it lacks decoder.heads.era5.weight"),
        (but("loss_fn.log_vars", None), "it lacks weighting.log_vars"),
        (but("decoder_dict.lat.0.norm.bias", torch.ones(16)), "has not decoder.blocks.lat.norm.bias"),
        (but("decoder_dict.era5.1.norm.bias", torch.ones(16)), "has not decoder_dict.era5.1.norm.bias"),
        (but("encoder.stem.0.kernel", torch.ones(1, 4)), r"is \(4, 1, 1, 1\), .* \(4, 1, 2, 2\).*patches of 8"),
        (but("encoder.stem.0.kernel", torch.ones(5, 4)), r"\(5, 4\), no square kernel"),
        (but("encoder.stem.0.kernel", torch.ones(())), "no square kernel"),
        (but("encoder.initial_conv.0.kernel", torch.ones(9, 12, 4)), "on 12 bands"),
        (but("encoder.stem.0.weight", torch.ones(4, 1, 2, 2)), "encoder.stem.0.weight is there under two names"),
        (but("proj.bias", torch.full((16,), torch.nan)), "decoder.proj.bias is not finite"),
        ({"encoder.stem_orig.0.kernel": torch.ones(16, 3, 40)}, "own stem"),
        ({"fc.weight": torch.ones(2, 2)}, "one of MMEarth's pretraining checkpoints"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_named_and_nothing_is_set(tensors: dict[str, Tensor], says: str) -> None:
    model = small_model()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(BadCheckpoint, match=says):
        import_pretraining(model, tensors, "small")
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name])


def test_an_encoder_of_another_size_is_refused_and_nothing_is_set() -> None:
    encoder = ConvNextEncoder(
        ConvNextConfig(size=32, patch=16, bands=3, dim=8, depth_1=1, depth_2=1, depth_3=2, depth_4=1)
    )
    before = {name: tensor.clone() for name, tensor in encoder.state_dict().items()}
    with pytest.raises(BadCheckpoint, match=r"the checkpoint has 4 channels first.* the model has 8"):
        import_encoder(encoder, random_of(SMALL_SHAPES), "small")
    for name, tensor in encoder.state_dict().items():
        assert torch.equal(tensor, before[name])


def test_the_settings_that_a_published_folder_names_are_said() -> None:
    encoder = ConvNextEncoder(
        ConvNextConfig(size=32, patch=16, bands=3, dim=8, depth_1=1, depth_2=1, depth_3=2, depth_4=1)
    )
    folder = "s3://bucket/pt-pix_mod_tiny_1M_128_unweighted_112-16"
    with pytest.raises(BadCheckpoint) as refused:
        import_encoder(encoder, random_of(SMALL_SHAPES), f"{folder}/checkpoint-199.pth")
    assert str(refused.value).endswith(
        "; its folder names model.size tiny, model.patch 16, data.size 112, inputs s2 (12 bands), targets pixel, "
        "weighting equal"
    )
    with pytest.raises(BadCheckpoint, match=r"in patches of 16$"):
        import_encoder(encoder, random_of(SMALL_SHAPES), "s3://bucket/mine/checkpoint-199.pth")


@pytest.mark.parametrize(
    "name",
    [
        "pt-imagenet_atto_200epochs_224_32",
        "pt-all_mod_femto_1M_64_uncertainty_56-8",
        "pt-S2_atto_1M_64_uncertainty_56-8/",
    ],
)
def test_other_folder_names_are_refused(name: str) -> None:
    with pytest.raises(InputError, match="is no folder of MMEarth's weights"):
        parse_folder(name)

"""Encoders under one interface: mean features to classify, feature maps to segment, layers for the learning rate.

Images of any size go through convolutional encoders as they are, as in MMEarth's released code.
"""

import math
from collections.abc import Sequence
from typing import Any

import timm
import torch
from timm.layers import DropPath
from timm.models import group_parameters
from torch import Tensor, nn

from nec_ray.codec import Codec, load_codec, parts_of
from nec_ray.errors import BadCheckpoint, InputError
from nec_ray.evaluate.geobench.experiment import CodecEncoder, MaeVit, MpMae, Timm
from nec_ray.models.convnext import SIZES as CONVNEXT_SIZES
from nec_ray.models.convnext import ConvNextConfig, ConvNextEncoder
from nec_ray.models.embed import encoder_of
from nec_ray.models.mae import SIZES as VIT_SIZES
from nec_ray.models.mae import MaeConfig, MaeEncoder
from nec_ray.models.mmearth_weights import import_encoder
from nec_ray.models.pretext import BANDS
from nec_ray.models.published import import_weights, read_checkpoint
from nec_ray.models.stages import StageEncoder
from nec_ray.tiles.geobench import Statistics

PixelSource = MpMae | MaeVit | Timm | CodecEncoder
_VIT_TOKENS = ("patch_embed.", "cls_token", "pos_embed")


class Features(nn.Module):
    """An encoder of normalised pixels float32 (batch, bands, rows, columns).

    Args:
        net: the network.
        dim: of the mean features.
        widths: channels of the feature maps, the finest first.
    """

    def __init__(self, net: nn.Module, dim: int, widths: Sequence[int]) -> None:
        super().__init__()
        self.net = net
        self.dim = dim
        self.widths = tuple(widths)

    def forward(self, pixels: Tensor) -> Tensor:
        """Mean features (batch, dim)."""
        raise NotImplementedError

    def maps(self, pixels: Tensor) -> list[Tensor]:
        """Feature maps (batch, channels, rows, columns), the finest first."""
        raise NotImplementedError

    def layers(self) -> dict[str, int]:
        """Number of the layer of each of the network's parameters, from 0 at the input; see `train.layer_groups`."""
        raise NotImplementedError

    def first_layer(self) -> nn.Module:
        """The first convolution."""
        return next(module for module in self.net.modules() if isinstance(module, nn.Conv2d))


class ConvNextFeatures(Features):
    """Of MP-MAE's encoder."""

    net: ConvNextEncoder

    def __init__(self, net: ConvNextEncoder) -> None:
        dims = net.config.dims
        super().__init__(net, dims[-1], (dims[0], *dims))

    def forward(self, pixels: Tensor) -> Tensor:
        """Mean of the last stage's places."""
        features: list[Tensor] = self.net(pixels)
        return features[-1].mean((2, 3))

    def maps(self, pixels: Tensor) -> list[Tensor]:
        """Of the first convolution, the stem and the stages but the first."""
        return self.net.unet_features(pixels)

    def layers(self) -> dict[str, int]:
        """A layer a block, see `convnext_layer`."""
        depths = self.net.config.depths
        return {name: convnext_layer(name, depths) for name, _ in self.net.named_parameters()}


class VitFeatures(Features):
    """Of a MAE ViT."""

    net: MaeEncoder

    def __init__(self, net: MaeEncoder) -> None:
        super().__init__(net, net.config.dim, (net.config.dim,))

    def forward(self, pixels: Tensor) -> Tensor:
        """Mean token."""
        tokens: Tensor = self.net(pixels)
        return tokens.mean(1)

    def maps(self, pixels: Tensor) -> list[Tensor]:
        """The tokens in their places."""
        return [_grid(self.net(pixels))]

    def layers(self) -> dict[str, int]:
        """A layer a block; the last norm is of the last one, as timm has it."""
        depth = self.net.config.depth
        return {
            name: 0 if name.startswith(_VIT_TOKENS) else int(name.split(".")[1]) + 1 if "blocks." in name else depth
            for name, _ in self.net.named_parameters()
        }


class StageFeatures(Features):
    """Of a codec's stages of MP-MAE: what its archives hold, before it is rounded."""

    net: StageEncoder

    def __init__(self, net: StageEncoder) -> None:
        super().__init__(net, net.config.dim, tuple(reversed(net.widths)))

    def forward(self, pixels: Tensor) -> Tensor:
        """Mean tokens of all stages, coarse first."""
        return torch.cat([part.mean(1) for part in parts_of(self.net(pixels))], dim=1)

    def maps(self, pixels: Tensor) -> list[Tensor]:
        """Of the stages."""
        return [_grid(part) for part in reversed(parts_of(self.net(pixels)))]

    def layers(self) -> dict[str, int]:
        """As of the whole network."""
        depths = self.net.config.encoder.depths
        return {name: convnext_layer(name.removeprefix("encoder."), depths) for name, _ in self.net.named_parameters()}


class TimmFeatures(Features):
    """Of a model of timm without its classifier."""

    net: Any

    def __init__(self, net: Any, bands: int, side: int) -> None:
        try:
            with torch.no_grad():  # what widths it has, it tells by doing
                found = _intermediates(net.eval(), torch.zeros(1, bands, side, side))
        except (AssertionError, RuntimeError, ValueError) as error:
            first = " ".join(str(error).split())[:160]
            raise InputError(
                f"timm's model takes no images of {side} px ({first}); give the pixels that it is for"
            ) from None
        kept = list({one.shape[2]: place for place, one in enumerate(found)}.values())
        super().__init__(net, net.num_features, [found[place].shape[1] for place in kept])
        self._kept = kept

    def forward(self, pixels: Tensor) -> Tensor:
        """What the model's classifier would be given."""
        features: Tensor = self.net(pixels)
        return features

    def maps(self, pixels: Tensor) -> list[Tensor]:
        """Of each size the last."""
        found = _intermediates(self.net, pixels)
        return [found[place] for place in self._kept]

    def layers(self) -> dict[str, int]:
        """As timm groups them."""
        found: dict[str, int] = group_parameters(self.net, self.net.group_matcher(coarse=False), reverse=True)
        return found


def build(source: PixelSource, drop_path: float = 0.0) -> Features:
    """An encoder with its weights; random ones are of torch's generator.

    Args:
        source: which.
        drop_path: of its last block, in training.

    Raises:
        NotFound: no weights there.
        BadCheckpoint: they do not fit.
        InputError: sizes that do not divide, or a model that timm does not have.
    """
    features = _built(source, drop_path)
    net = features.net
    if isinstance(net, StageEncoder):
        net = net.encoder
    if isinstance(net, ConvNextEncoder):
        net.set_drop_path(drop_path)
    elif isinstance(net, MaeEncoder):
        for number, block in enumerate(net.blocks):
            rate = drop_path * number / max(1, len(net.blocks) - 1)
            block.drop_path1, block.drop_path2 = DropPath(rate), DropPath(rate)
    return features


def input_of(source: PixelSource) -> tuple[list[str], int | None, Statistics | None]:
    """Bands, pixels a side (None: as they are), and statistics (None: the data set's) that an encoder is fed."""
    if isinstance(source, CodecEncoder):
        spec = load_codec(source.codec).spec.input
        mean, std = (torch.tensor(values, dtype=torch.float64).numpy() for values in (spec.mean, spec.std))
        return list(spec.bands), spec.size, Statistics(mean, std)
    bands = list(BANDS[source.inputs]) if isinstance(source, MpMae) else list(source.bands)
    return bands, source.pixels, None


def convnext_layer(name: str, depths: Sequence[int]) -> int:
    """The layer of a parameter of `ConvNextEncoder`: 0 of the stem, then each block's.

    What reduces a stage's input is of its first block's layer. (MMEarth's released code, made for a network whose
    stem was the first of these, has them one stage too early, and the stem in the classifier's layer.)

    Args:
        name: of the parameter.
        depths: blocks of each stage.
    """
    part, *rest = name.split(".")
    if part == "stages":
        return 1 + sum(depths[: int(rest[0])]) + int(rest[1])
    return 1 + sum(depths[: int(rest[0]) + 1]) if part == "downsample_layers" else 0


def _built(source: PixelSource, drop_path: float) -> Features:
    if isinstance(source, CodecEncoder):
        return _of_codec(load_codec(source.codec))
    tensors = None if source.weights is None else read_checkpoint(source.weights)
    where = str(source.weights)
    bands = input_of(source)[0]
    if isinstance(source, MpMae):
        # Convolutions take images of any size; what is named here only has to be allowed.
        side = source.pixels or 7 * source.patch
        size = source.patch * math.ceil(side / source.patch)
        config = ConvNextConfig(size, source.patch, len(bands), **CONVNEXT_SIZES[source.size])
        net = ConvNextEncoder(config)
        if tensors is not None:
            import_encoder(net, tensors, where)
        return ConvNextFeatures(net)
    if isinstance(source, MaeVit):
        vit = MaeEncoder(MaeConfig(source.pixels, source.patch, len(bands), **VIT_SIZES[source.size]))
        if tensors is not None:
            import_weights(vit, None, tensors, where)
        return VitFeatures(vit)
    return _of_timm(source, tensors, where, drop_path)


def _of_codec(codec: Codec) -> Features:
    net = encoder_of(codec)
    for parameter in net.parameters():
        parameter.requires_grad_(True)
    if isinstance(net, MaeEncoder):
        return VitFeatures(net)
    if isinstance(net, StageEncoder):
        return StageFeatures(net)
    raise InputError(
        f"codec {codec.id[:12]}: {codec.spec.family} has no feature maps here; encode the data set into an archive, "
        "and evaluate that"
    )


def _of_timm(source: Timm, tensors: dict[str, Tensor] | None, where: str, drop_path: float) -> Features:
    how: dict[str, Any] = {"num_classes": 0, "in_chans": len(source.bands)}
    if drop_path:
        how["drop_path_rate"] = drop_path
    try:
        net = timm.create_model(source.model, pretrained=False, **how, **_image_size(source))
    except (RuntimeError, TypeError) as error:
        first = str(error).split("\n", 1)[0][:160]
        raise InputError(f"timm makes no model {source.model!r} of these settings ({first}); name another") from None
    if not hasattr(net, "forward_intermediates"):
        raise InputError(f"timm's model {source.model!r} has no feature maps; name another")
    if tensors is not None:
        mine = net.state_dict()
        given = {name.removeprefix("module."): tensor for name, tensor in tensors.items()}
        wrong = [name for name in mine if name not in given or given[name].shape != mine[name].shape]
        if wrong:
            said = "is missing" if wrong[0] not in given else f"is {tuple(given[wrong[0]].shape)}"
            raise BadCheckpoint(
                f"{where}: {wrong[0]} {said}, timm's {source.model} with {len(source.bands)} bands has it as "
                f"{tuple(mine[wrong[0]].shape)}; name the model and bands that the weights are of"
            )
        net.load_state_dict({name: given[name] for name in mine})
    return TimmFeatures(net, len(source.bands), source.pixels or 64)


def _image_size(source: Timm) -> dict[str, int]:
    """Transformers are made for a size of images; convolutions take any."""
    takes = timm.models.model_entrypoint(source.model) if timm.is_model(source.model) else None
    is_vit = takes is not None and "vision_transformer" in takes.__module__
    return {"img_size": source.pixels} if is_vit and source.pixels else {}


def _intermediates(net: Any, pixels: Tensor) -> list[Tensor]:
    """All feature maps of a model of timm."""
    found: list[Tensor] = net.forward_intermediates(pixels, intermediates_only=True)
    return found


def _grid(tokens: Tensor) -> Tensor:
    """Tokens (batch, n * n, channels) as a map (batch, channels, n, n)."""
    side = math.isqrt(tokens.shape[1])
    return tokens.transpose(1, 2).reshape(len(tokens), -1, side, side)

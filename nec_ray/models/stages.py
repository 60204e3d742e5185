"""NEC on MP-MAE: feature maps of one stage or several as a latent of tokens, and what decodes it.

The last stage has one token a patch (7x7 in the paper), each earlier one four times as many of half the channels.
Several stages are a latent of several grid scales, coarse first: a tuple of tensors (batch, tokens, channels).
"""

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from nec_ray.codec import joined, parts_of
from nec_ray.errors import InputError
from nec_ray.models.convnext import STAGES, Block, ConvNextConfig, ConvNextEncoder, enlarged
from nec_ray.models.family import Trainable
from nec_ray.models.mp_mae import DECODER_DIM, MpMaeConfig, MpMaeDecoder
from nec_ray.models.pretext import Output

Latent = Any
"""A tensor (batch, tokens, channels); of several stages a tuple of them, coarse first."""
OPTICAL = "sentinel2"
"""The output that the input itself is the target of."""


@dataclass(frozen=True)
class StageConfig:
    """Which feature maps are the latent.

    Raises:
        InputError: no such stage, stages in another order than coarse first, or a decoder of an impossible width.
    """

    encoder: ConvNextConfig
    stages: tuple[int, ...] = (STAGES,)
    """1 to 4, coarse first: each lower than the one before it."""
    decoder_dim: int = DECODER_DIM

    def __post_init__(self) -> None:
        for stage in self.stages:
            if not 1 <= stage <= STAGES:
                raise InputError(f"stage {stage} is none of 1 to {STAGES}; change it")
        if not self.stages or any(a <= b for a, b in pairwise(self.stages)):
            raise InputError(f"stages {list(self.stages)}: give one or more, coarse first, such as [4, 3]")
        if not 1 <= self.decoder_dim <= _LARGEST_DECODER:
            raise InputError(
                f"decoder_dim {self.decoder_dim} is out of range, 1 to {_LARGEST_DECODER} are allowed; change it"
            )

    @property
    def size(self) -> int:
        """Pixels a side of the input."""
        return self.encoder.size

    @property
    def bands(self) -> int:
        """Of the input."""
        return self.encoder.bands

    @property
    def side(self) -> int:
        """Tokens a side of the finest stage."""
        return self.encoder.side_of(self.stages[-1])

    @property
    def tokens(self) -> int:
        """Tokens of a tile in the finest stage."""
        return self.side**2

    @property
    def shapes(self) -> list[tuple[int, int]]:
        """Tokens a side, and channels of a token, of each stage."""
        return [(self.encoder.side_of(stage), self.encoder.dims[stage - 1]) for stage in self.stages]

    @property
    def dim(self) -> int:
        """Channels of a token, of all stages together."""
        return sum(dim for _, dim in self.shapes)

    def to_architecture(self) -> dict[str, int]:
        """As codec.json keeps it: `stage`, and further ones as `stage_2`, `stage_3` and `stage_4`."""
        named = dict(zip(_STAGE_NAMES, self.stages, strict=False))
        return {**self.encoder.to_architecture(), **named, "decoder_dim": self.decoder_dim}

    @classmethod
    def of_architecture(cls, sizes: Mapping[str, int]) -> "StageConfig":
        """Of what `to_architecture` gave.

        Raises:
            TypeError: a size is missing, or there is another.
            InputError: a size is out of range.
        """
        stages = tuple(sizes[name] for name in _STAGE_NAMES if name in sizes)
        names = (*_STAGE_NAMES[: len(stages)], "decoder_dim")
        if not stages or not all(name in sizes for name in names):
            raise TypeError("stage and decoder_dim are wanted")
        encoder = ConvNextConfig(**{name: value for name, value in sizes.items() if name not in names})
        return cls(encoder, stages, sizes["decoder_dim"])


_STAGE_NAMES = ("stage", "stage_2", "stage_3", "stage_4")
_LARGEST_DECODER = 4096


class StageEncoder(nn.Module):
    """A ConvNeXt V2 up to the last wanted stage, whose places are tokens; a `nec.TokenEncoder`."""

    family = "mp_mae"

    def __init__(self, config: StageConfig) -> None:
        super().__init__()
        self.config = config
        self.encoder = ConvNextEncoder(config.encoder, last=config.stages[0])

    @property
    def channels(self) -> int:
        """Of a token, of all stages together."""
        return self.config.dim

    @property
    def widths(self) -> list[int]:
        """Channels of each stage."""
        return [dim for _, dim in self.config.shapes]

    @property
    def tokens(self) -> int:
        """Of a tile, in the finest stage."""
        return self.config.tokens

    @property
    def patches(self) -> int:
        """Of a tile, which are masked as wholes."""
        return self.config.encoder.tokens

    def forward(self, pixels: Tensor, keep: Tensor | None = None) -> Latent:
        """Latent (batch, tokens, channels) of normalised pixels (batch, bands, size, size), row by row.

        Of several stages, a tuple of one such tensor a stage.

        Args:
            pixels: normalised pixels.
            keep: (batch, kept) indexes of the visible patches; the latent then has their tokens alone, patch by patch
                in that order and row by row in each.
        """
        features = self.encoder(pixels, keep)
        latents = []
        for stage, (side, dim) in zip(self.config.stages, self.config.shapes, strict=True):
            tokens = features[stage - 1].flatten(2).transpose(1, 2)
            if keep is not None:
                tokens = tokens.gather(1, _tokens_of(keep, self.config, side)[:, :, None].expand(-1, -1, dim))
            latents.append(tokens)
        return joined(latents)

    def take(self, whole: ConvNextEncoder) -> None:
        """Set the weights from those of an encoder of all stages."""
        mine = self.encoder.state_dict()
        self.encoder.load_state_dict({name: tensor for name, tensor in whole.state_dict().items() if name in mine})

    def set_trainable(self, decoder: "StageDecoder", trainable: Trainable, decoder_is_new: bool = False) -> None:  # noqa: ARG002
        """See `nec.set_trainable`."""
        if trainable == "paper":
            self.requires_grad_(False)
            for stage in self.config.stages:
                list(self.encoder.stages[stage - 1].children())[-1].requires_grad_(True)
        self.encoder.initial_conv.requires_grad_(trainable != "entropy")
        self.encoder.stem.requires_grad_(trainable != "entropy")

    def reorder(self, decoder: "StageDecoder", order: Tensor) -> None:
        """See `reorder_stage`."""
        reorder_stage(self, decoder, order)


class FirstStageLayer(nn.Module):
    """The optical decoder up to and with its block, which consumers may have."""

    def __init__(self, config: StageConfig) -> None:
        super().__init__()
        self.config = config
        self.proj = nn.Conv2d(config.dim, config.decoder_dim, 1)
        self.block = Block(config.decoder_dim)

    def forward(self, latent: Tensor) -> Tensor:
        """(batch, tokens, decoder_dim) of a whole latent (batch, tokens, channels).

        Of several stages, on the finest grid: a coarser stage's token stands at each place that it covers.

        Raises:
            InputError: a latent of another shape, such as one of the coarser stages alone.
        """
        side = self.config.side
        if latent.shape[1:] != (side**2, self.config.dim):
            raise InputError(
                f"the decoder layer reads {side**2} tokens of {self.config.dim} channels, not {latent.shape[1]} of "
                f"{latent.shape[2]}; take layers of every grid scale, or no decoder layer"
            )
        grid = latent.transpose(1, 2).reshape(len(latent), -1, side, side)
        tokens: Tensor = self.block(self.proj(grid)).flatten(2).transpose(1, 2)
        return tokens


class StageDecoder(nn.Module):
    """MP-MAE's decoders on a latent of one stage or several; a `nec.TokenDecoder`.

    Of several stages they read the finest grid, the channels of the coarser ones at each place that these cover: their
    first convolution, of 1x1, so adds up a projection of each stage.

    Args:
        config: which stages.
        outputs: what is predicted, `sentinel2` first: the input's bands, patch-normalised. That alone where not given.

    Raises:
        InputError: the outputs do not begin with the input's bands.
    """

    def __init__(self, config: StageConfig, outputs: tuple[Output, ...] = ()) -> None:
        super().__init__()
        self.config = config
        outputs = outputs or (Output(OPTICAL, "pixel", "continuous", config.bands, patch_normalised=True),)
        if outputs[0].name != OPTICAL or outputs[0].channels != config.bands:
            raise InputError(f"the first output must be {OPTICAL} of {config.bands} bands, not {outputs[0]}")
        whole = MpMaeConfig(config.encoder, outputs, "equal", config.decoder_dim)
        self.decoder = MpMaeDecoder(whole, config.stages[-1], config.dim)

    @property
    def first(self) -> FirstStageLayer:
        """The layer that consumers may have; of the same parameters as this decoder."""
        layer = FirstStageLayer(self.config)
        layer.proj = self.decoder.proj
        layer.block = self.decoder.blocks[OPTICAL]  # type: ignore[assignment]
        return layer

    def loss(self, latent: Latent, keep: Tensor, pixels: Tensor, targets: Mapping[str, Tensor] | None = None) -> Tensor:
        """Sum of the tasks' losses; the optical task's target are the pixels.

        Args:
            latent: (batch, tokens of the visible patches, channels), as the encoder gives it.
            keep: (batch, kept) indexes of the visible patches.
            pixels: normalised pixels (batch, bands, size, size).
            targets: of the other outputs; see `pretext`.
        """
        maps = []
        for part, (side, dim) in zip(parts_of(latent), self.config.shapes, strict=True):
            places = _tokens_of(keep, self.config, side)[:, :, None].expand(-1, -1, dim)
            grid = part.new_zeros(len(part), side**2, dim).scatter(1, places, part)
            maps.append(enlarged(grid.transpose(1, 2).reshape(len(part), dim, side, side), self.config.side))
        losses, there = self.decoder.losses(torch.cat(maps, dim=1), keep, {**(targets or {}), OPTICAL: pixels})
        return (torch.stack(losses) * torch.stack(there)).sum()


def _tokens_of(keep: Tensor, config: StageConfig, side: int) -> Tensor:
    """Indexes (batch, kept * n * n) of the tokens of patches `keep`, n a side of each, in a map of `side` a side."""
    patches = config.encoder.side
    n = side // patches
    row, column = n * (keep // patches), n * (keep % patches)
    inside = torch.arange(n, device=keep.device)
    tokens = (row[:, :, None, None] + inside[:, None]) * side + column[:, :, None, None] + inside
    return tokens.flatten(1)


@torch.no_grad()
def reorder_stage(encoder: StageEncoder, decoder: StageDecoder, order: Tensor) -> None:
    """Put the latent's channels in another order without changing what the model computes.

    Args:
        encoder: whose channel `order[i]` becomes channel i.
        decoder: that reads them.
        order: (channels,) a permutation, of each stage's channels among themselves.

    Raises:
        ValueError: a channel would go to another stage.
    """

    def rows(own: Tensor, *modules: nn.Module) -> None:  # what writes channels
        for module in modules:
            for tensor in module.parameters():
                tensor.copy_(tensor[own])

    net, first = encoder.encoder, 0
    for stage, width in zip(encoder.config.stages, encoder.widths, strict=True):
        own = order[first : first + width] - first
        if not torch.equal(own.sort().values, torch.arange(width, device=order.device)):
            raise ValueError("an order of channels must keep each stage's among themselves")
        first += width
        if stage == 1:
            rows(own, net.initial_conv[0], net.initial_conv[1], net.stem)
        else:
            rows(own, net.downsample_layers[stage - 2][1])  # type: ignore[index]
        for block in net.stages[stage - 1].children():
            assert isinstance(block, Block)
            rows(own, block.dwconv, block.norm, block.pwconv2)
            block.pwconv1.weight.copy_(block.pwconv1.weight[:, own])
        if stage <= len(net.downsample_layers):  # a later stage reads them too
            norm, convolution = net.downsample_layers[stage - 1].children()
            assert isinstance(convolution, nn.Conv2d)
            rows(own, norm)
            convolution.weight.copy_(convolution.weight[:, own])
    decoder.decoder.proj.weight.copy_(decoder.decoder.proj.weight[:, order])

"""NEC on MP-MAE: one stage's feature map as a latent of tokens, and what decodes it.

The last stage has one token a patch (7x7 in the paper), each earlier one four times as many of half the channels.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from nec_ray.errors import InputError
from nec_ray.models.convnext import STAGES, Block, ConvNextConfig, ConvNextEncoder
from nec_ray.models.mp_mae import DECODER_DIM, MpMaeConfig, MpMaeDecoder
from nec_ray.models.pretext import Output

OPTICAL = "sentinel2"
"""The output that the input itself is the target of."""


@dataclass(frozen=True)
class StageConfig:
    """Which feature map is the latent.

    Raises:
        InputError: no such stage, or a decoder of an impossible width.
    """

    encoder: ConvNextConfig
    stage: int = STAGES
    """1 to 4."""
    decoder_dim: int = DECODER_DIM

    def __post_init__(self) -> None:
        if not 1 <= self.stage <= STAGES:
            raise InputError(f"stage {self.stage} is none of 1 to {STAGES}; change it")
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
        """Tokens a side."""
        return self.encoder.side_of(self.stage)

    @property
    def tokens(self) -> int:
        """Tokens of a tile."""
        return self.side**2

    @property
    def dim(self) -> int:
        """Channels of a token."""
        return self.encoder.dims[self.stage - 1]

    def to_architecture(self) -> dict[str, int]:
        """As codec.json keeps it."""
        return {**self.encoder.to_architecture(), "stage": self.stage, "decoder_dim": self.decoder_dim}

    @classmethod
    def of_architecture(cls, sizes: Mapping[str, int]) -> "StageConfig":
        """Of what `to_architecture` gave.

        Raises:
            TypeError: a size is missing, or there is another.
            InputError: a size is out of range.
        """
        own = {name: sizes[name] for name in ("stage", "decoder_dim") if name in sizes}
        if len(own) < 2:
            raise TypeError("stage and decoder_dim are wanted")
        return cls(ConvNextConfig(**{name: value for name, value in sizes.items() if name not in own}), **own)


_LARGEST_DECODER = 4096


class StageEncoder(nn.Module):
    """A ConvNeXt V2 up to one stage, whose places are tokens; a `nec.TokenEncoder`."""

    family = "mp_mae"

    def __init__(self, config: StageConfig) -> None:
        super().__init__()
        self.config = config
        self.encoder = ConvNextEncoder(config.encoder, last=config.stage)

    @property
    def channels(self) -> int:
        """Of a token."""
        return self.config.dim

    @property
    def tokens(self) -> int:
        """Of a tile."""
        return self.config.tokens

    @property
    def patches(self) -> int:
        """Of a tile, which are masked as wholes."""
        return self.config.encoder.tokens

    def forward(self, pixels: Tensor, keep: Tensor | None = None) -> Tensor:
        """Latent (batch, tokens, channels) of normalised pixels (batch, bands, size, size), row by row.

        Args:
            pixels: normalised pixels.
            keep: (batch, kept) indexes of the visible patches; the latent then has their tokens alone, patch by patch
                in that order and row by row in each.
        """
        tokens = self.encoder(pixels, keep)[-1].flatten(2).transpose(1, 2)
        if keep is None:
            return tokens
        return tokens.gather(1, _tokens_of(keep, self.config)[:, :, None].expand(-1, -1, tokens.shape[2]))

    def take(self, whole: ConvNextEncoder) -> None:
        """Set the weights from those of an encoder of all stages."""
        mine = self.encoder.state_dict()
        self.encoder.load_state_dict({name: tensor for name, tensor in whole.state_dict().items() if name in mine})


class FirstStageLayer(nn.Module):
    """The optical decoder up to and with its block, which consumers may have."""

    def __init__(self, config: StageConfig) -> None:
        super().__init__()
        self.config = config
        self.proj = nn.Conv2d(config.dim, config.decoder_dim, 1)
        self.block = Block(config.decoder_dim)

    def forward(self, latent: Tensor) -> Tensor:
        """(batch, tokens, decoder_dim) of a whole latent (batch, tokens, channels)."""
        side = self.config.side
        grid = latent.transpose(1, 2).reshape(len(latent), -1, side, side)
        tokens: Tensor = self.block(self.proj(grid)).flatten(2).transpose(1, 2)
        return tokens


class StageDecoder(nn.Module):
    """MP-MAE's decoders on one stage's latent; a `nec.TokenDecoder`.

    Args:
        config: which stage.
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
        self.decoder = MpMaeDecoder(whole, config.stage)

    @property
    def first(self) -> FirstStageLayer:
        """The layer that consumers may have; of the same parameters as this decoder."""
        layer = FirstStageLayer(self.config)
        layer.proj = self.decoder.proj
        layer.block = self.decoder.blocks[OPTICAL]  # type: ignore[assignment]
        return layer

    def loss(self, latent: Tensor, keep: Tensor, pixels: Tensor, targets: Mapping[str, Tensor] | None = None) -> Tensor:
        """Sum of the tasks' losses; the optical task's target are the pixels.

        Args:
            latent: (batch, tokens of the visible patches, channels), as the encoder gives it.
            keep: (batch, kept) indexes of the visible patches.
            pixels: normalised pixels (batch, bands, size, size).
            targets: of the other outputs; see `pretext`.
        """
        places = _tokens_of(keep, self.config)[:, :, None].expand(-1, -1, latent.shape[2])
        grid = latent.new_zeros(len(latent), self.config.tokens, latent.shape[2]).scatter(1, places, latent)
        side = self.config.side
        features = grid.transpose(1, 2).reshape(len(latent), -1, side, side)
        losses, there = self.decoder.losses(features, keep, {**(targets or {}), OPTICAL: pixels})
        return (torch.stack(losses) * torch.stack(there)).sum()


def _tokens_of(keep: Tensor, config: StageConfig) -> Tensor:
    """Indexes (batch, kept * n * n) of the tokens of patches `keep`, which have n tokens a side."""
    n, side = config.side // config.encoder.side, config.encoder.side
    row, column = n * (keep // side), n * (keep % side)
    inside = torch.arange(n, device=keep.device)
    tokens = (row[:, :, None, None] + inside[:, None]) * config.side + column[:, :, None, None] + inside
    return tokens.flatten(1)


@torch.no_grad()
def reorder_stage(encoder: StageEncoder, decoder: StageDecoder, order: Tensor) -> None:
    """Put the latent's channels in another order without changing what the model computes.

    Args:
        encoder: whose channel `order[i]` becomes channel i.
        decoder: that reads them.
        order: (channels,) a permutation.
    """

    def rows(*modules: nn.Module) -> None:  # what writes channels
        for module in modules:
            for tensor in module.parameters():
                tensor.copy_(tensor[order])

    net = encoder.encoder
    if encoder.config.stage == 1:
        rows(net.initial_conv[0], net.initial_conv[1], net.stem)
    else:
        rows(net.downsample_layers[-1][1])  # type: ignore[index]
    for block in net.stages[-1].children():
        assert isinstance(block, Block)
        rows(block.dwconv, block.norm, block.pwconv2)
        block.pwconv1.weight.copy_(block.pwconv1.weight[:, order])
    decoder.decoder.proj.weight.copy_(decoder.decoder.proj.weight[:, order])

"""Neural Embedding Compression (Gomes & Brunschwiler 2024, section 3): a bottleneck between encoder and decoder."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from compressai.entropy_models import EntropyBottleneck
from torch import Tensor, nn

from nec_ray.errors import InputError
from nec_ray.models.mae import MaeConfig, MaeDecoder, MaeEncoder, random_keep
from nec_ray.models.stages import StageConfig, StageDecoder, StageEncoder, reorder_stage

Trainable = Literal["entropy", "entropy+patch", "paper", "all"]


class TokenEncoder(Protocol):
    """What the adapter needs of an encoder: a module of tokens."""

    @property
    def channels(self) -> int:
        """Of a token."""

    @property
    def tokens(self) -> int:
        """Of a tile."""

    def __call__(self, pixels: Tensor, keep: Tensor | None = None) -> Tensor:
        """Latent (batch, tokens, channels), of the tokens `keep` (batch, kept) where some are masked.

        Where several tokens are masked together, as a patch, `keep` counts the patches, and the encoder has their
        number as its attribute `patches`.
        """


class TokenDecoder(Protocol):
    """What the adapter needs of a decoder."""

    def loss(self, latent: Tensor, keep: Tensor, pixels: Tensor) -> Tensor:
        """How far what it makes of a latent (batch, visible tokens, channels) is from the pixels.

        A decoder of several modalities takes their targets by name as a further argument.
        """


@dataclass(frozen=True)
class Losses:
    """What a batch cost."""

    loss: Tensor
    """MSE + beta * bits per element; the MSE alone while pretraining."""
    mse: Tensor
    """The decoder's loss: a sum over the tasks, where it has several."""
    bits: Tensor
    """Bits per element of the latent under the noise proxy; 0 while pretraining."""


class NeuralEmbeddingCompressor(nn.Module):
    """An encoder and a decoder of tokens with a factorized entropy model between them.

    The latent (batch, tokens, channels) is coded as (batch, channels, tokens, 1): one density for each embedding
    channel, shared by all tokens (NEC, section 3, "Rate Term"; Balle et al. 2018, appendix 6.1).

    Several layers are trained with nested dropout (Rippel et al. 2014, arXiv 1402.0915): each sample keeps a random
    number of the first layers, the other channels are their medians and cost nothing, so that every prefix of the
    layers is an embedding of its own. All layers are kept half of the time.

    Args:
        encoder: a module that is a `TokenEncoder`.
        decoder: a module that is a `TokenDecoder`.
        layers: channels of each layer, in order; one layer where not given.

    Raises:
        InputError: the layers are not of the encoder's channels.
    """

    def __init__(self, encoder: nn.Module, decoder: nn.Module, layers: Sequence[int] | None = None) -> None:
        super().__init__()
        self.encoder = encoder
        self.decoder = decoder
        channels = int(encoder.channels)  # type: ignore[arg-type]
        self.layers = list(layers or [channels])
        if sum(self.layers) != channels or min(self.layers) < 1:
            raise InputError(f"layers of {self.layers} channels do not make up the encoder's {channels}")
        self.bottleneck = EntropyBottleneck(channels)

    @classmethod
    def mae(cls, config: MaeConfig, layers: Sequence[int] | None = None) -> "NeuralEmbeddingCompressor":
        """One of a masked autoencoder with random weights."""
        return cls(MaeEncoder(config), MaeDecoder(config), layers)

    @classmethod
    def mp_mae(cls, config: StageConfig, layers: Sequence[int] | None = None) -> "NeuralEmbeddingCompressor":
        """One of a stage of MP-MAE's encoder, which predicts its own input, with random weights."""
        return cls(StageEncoder(config), StageDecoder(config), layers)

    def forward(
        self,
        pixels: Tensor,
        *,
        mask_ratio: float,
        beta: float | None,
        generator: torch.Generator | None = None,
        targets: Mapping[str, Tensor] | None = None,
    ) -> Losses:
        """Losses of normalised pixels (batch, bands, size, size).

        Args:
            pixels: normalised pixels.
            mask_ratio: share of masked patches.
            beta: weight of the rate; None leaves the bottleneck out (plain MAE pretraining).
            generator: of the masks, the noise and the numbers of layers, on the pixels' device.
            targets: of the other modalities that the decoder predicts, by name; see `pretext`.
        """
        patches = int(getattr(self.encoder, "patches", self.encoder.tokens))  # type: ignore[arg-type]
        keep = random_keep(len(pixels), patches, mask_ratio, generator, pixels.device)
        latent = self.encoder(pixels, keep)
        bits = torch.zeros((), device=pixels.device)
        if beta is not None:
            kept = self._kept_layers(len(pixels), generator, pixels.device) if len(self.layers) > 1 else None
            latent, bits = self.coded(latent, kept, generator)
        others = () if targets is None else (targets,)
        mse = self.decoder.loss(latent, keep, pixels, *others)  # type: ignore[operator]
        return Losses(mse if beta is None else mse + beta * bits, mse, bits)

    def coded(
        self, latent: Tensor, kept: Tensor | None = None, generator: torch.Generator | None = None
    ) -> tuple[Tensor, Tensor]:
        """Latent after the bottleneck, and its bits per element; in float32 whatever autocast says.

        Args:
            latent: (batch, tokens, channels); uniform noise is added in training, otherwise it is rounded.
            kept: (batch,) numbers of the first layers that are kept; all where it is None.
            generator: of the noise.
        """
        with torch.autocast(latent.device.type, enabled=False):
            latent = latent.float()
            medians = self.bottleneck._get_medians()[:, 0, 0].detach()
            if self.training:
                coded = latent + torch.rand(latent.shape, generator=generator, device=latent.device) - 0.5
            else:
                coded = (latent - medians).round() + medians
            # CompressAI's forward draws its noise from the global generator; its parts are used instead.
            values = coded.flatten(0, 1).T[:, None, :]
            likelihood, _, _ = self.bottleneck._likelihood(values)
            if self.bottleneck.use_likelihood_bound:
                likelihood = self.bottleneck.likelihood_lower_bound(likelihood)
            bits = -likelihood.log2()[:, 0].T.reshape(latent.shape)
            if kept is not None:
                layer = torch.repeat_interleave(torch.arange(len(self.layers)), torch.tensor(self.layers))
                there = (layer.to(latent.device) < kept[:, None])[:, None, :]
                coded, bits = torch.where(there, coded, medians), bits * there
            return coded, bits.mean()

    def _kept_layers(self, batch: int, generator: torch.Generator | None, device: torch.device | None = None) -> Tensor:
        count = len(self.layers)
        fewer = torch.randint(1, count, (batch,), generator=generator, device=device)
        whole = torch.rand(batch, generator=generator, device=device) < 0.5
        return torch.where(whole, torch.full_like(fewer, count), fewer)


def set_trainable(model: NeuralEmbeddingCompressor, trainable: Trainable, *, decoder_is_new: bool = False) -> None:
    """Freeze everything that adaptation leaves as it is.

    - `entropy`: the entropy model alone is trained; the frozen latents are only quantised and coded.
    - `entropy+patch`: and the patch embedding (MP-MAE: the initial convolution and the stem).
    - `paper`: all but all encoder blocks but the last, all decoder blocks but the first, and the position embeddings
      (NEC, section 3, "Efficient Model Adaptation"). MP-MAE's downsampling layers stay with the blocks, and its
      decoders have one block each.
    - `all`: all but the position embeddings.

    Args:
        model: of a masked autoencoder, or of a stage of MP-MAE.
        trainable: which.
        decoder_is_new: whether the decoder has random weights, and is trained whatever is frozen besides.
    """
    encoder, decoder = model.encoder, model.decoder
    model.requires_grad_(trainable in {"paper", "all"})
    model.bottleneck.requires_grad_(True)
    # The quantiles do not train: they are solved for when the tables are made (export.py).
    model.bottleneck.quantiles.requires_grad_(False)
    if isinstance(encoder, StageEncoder):
        if trainable == "paper":
            encoder.requires_grad_(False)
            list(encoder.encoder.stages[-1].children())[-1].requires_grad_(True)
        encoder.encoder.initial_conv.requires_grad_(trainable != "entropy")
        encoder.encoder.stem.requires_grad_(trainable != "entropy")
    else:
        assert isinstance(encoder, MaeEncoder)
        assert isinstance(decoder, MaeDecoder)
        encoder.patch_embed.requires_grad_(trainable != "entropy")
        if trainable == "paper":
            encoder.blocks[:-1].requires_grad_(False)
            decoder.blocks.requires_grad_(False)
    if decoder_is_new:
        decoder.requires_grad_(True)
    if isinstance(encoder, MaeEncoder):
        assert isinstance(decoder, MaeDecoder)
        encoder.pos_embed.requires_grad_(False)
        decoder.first.decoder_pos_embed.requires_grad_(False)


def count_parameters(model: nn.Module) -> tuple[int, int]:
    """Numbers of trained and of all parameters, fixed position embeddings left out of both."""
    named = [(n, p) for n, p in model.named_parameters() if "pos_embed" not in n and "quantiles" not in n]
    return sum(p.numel() for _, p in named if p.requires_grad), sum(p.numel() for _, p in named)


@torch.no_grad()
def reorder_channels(encoder: MaeEncoder | StageEncoder, decoder: MaeDecoder | StageDecoder, order: Tensor) -> None:
    """Put the latent's channels in another order without changing what the model computes.

    The channels of a transformer, or of a stage, have no order of their own: what reads and what writes them is
    permuted alike. So the channels that matter most can come first, where a prefix of layers begins, before adaptation.

    Args:
        encoder: whose channel `order[i]` becomes channel i.
        decoder: that reads them.
        order: (channels,) a permutation.
    """
    if isinstance(encoder, StageEncoder):
        assert isinstance(decoder, StageDecoder)
        reorder_stage(encoder, decoder, order)
        return
    assert isinstance(decoder, MaeDecoder)

    def rows(*tensors: Tensor) -> None:  # what writes channels
        for tensor in tensors:
            tensor.copy_(tensor[order])

    def columns(*layers: nn.Linear) -> None:  # what reads them
        for layer in layers:
            layer.weight.copy_(layer.weight[:, order])

    rows(encoder.patch_embed.proj.weight, _bias(encoder.patch_embed.proj), encoder.norm.weight, encoder.norm.bias)
    for token in (encoder.cls_token, encoder.pos_embed):
        token.copy_(token[:, :, order])
    for block in encoder.blocks:
        parts = dict(block.named_modules())
        for name in ("norm1", "norm2"):
            rows(parts[name].weight, parts[name].bias)
        for name in ("attn.proj", "mlp.fc2"):
            rows(parts[name].weight, parts[name].bias)
        for name in ("attn.qkv", "mlp.fc1"):
            columns(parts[name])
    columns(decoder.first.decoder_embed)


def _bias(layer: nn.Conv2d) -> Tensor:
    assert layer.bias is not None
    return layer.bias

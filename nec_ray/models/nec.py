"""Neural Embedding Compression (Gomes & Brunschwiler 2024, section 3): a bottleneck between encoder and decoder."""

from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional

from nec_ray.codec import joined, parts_of
from nec_ray.errors import InputError
from nec_ray.models.entropy_models import entropy_model
from nec_ray.models.family import Trainable
from nec_ray.models.mae import MaeConfig, MaeDecoder, MaeEncoder, random_keep
from nec_ray.models.stages import Latent, StageConfig, StageDecoder, StageEncoder


class TokenEncoder(Protocol):
    """What the adapter needs of an encoder: a module of tokens."""

    @property
    def channels(self) -> int:
        """Of a token."""

    @property
    def tokens(self) -> int:
        """Of a tile."""

    def __call__(self, pixels: Tensor, keep: Tensor | None = None) -> Latent:
        """Latent (batch, tokens, channels), of the tokens `keep` (batch, kept) where some are masked.

        Of several grid scales, a tuple of one such tensor a scale; the encoder has their channels as its attribute
        `widths`.

        Where several tokens are masked together, as a patch, `keep` counts the patches, and the encoder has their
        number as its attribute `patches`.
        """


class TokenDecoder(Protocol):
    """What the adapter needs of a decoder."""

    def loss(self, latent: Latent, keep: Tensor, pixels: Tensor) -> Tensor:
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

    Where there are several grid scales, their channels follow one another, coarse first, each with as many tokens as
    its scale has; a layer is of one scale, so that the first layers can be the coarser scales alone.

    Several layers are trained with nested dropout (Rippel et al. 2014, arXiv 1402.0915): each sample keeps a random
    number of the first layers, the other channels are their medians and cost nothing, so that every prefix of the
    layers is an embedding of its own. All layers are kept half of the time.

    Args:
        encoder: a module that is a `TokenEncoder`.
        decoder: a module that is a `TokenDecoder`.
        layers: channels of each layer, in order; one layer a grid scale where not given.
        transformed: whether not the latent is rounded, but its coordinates along the axes that `set_transform` gives;
            the decoder sees the latent again. With one grid scale only.
        entropy: name of the entropy model, see `entropy_models`.

    Raises:
        InputError: the layers are not of the encoder's channels, or one has channels of two scales; a transform is
            wanted of several.

    Attributes:
        widths: channels of each grid scale.
        basis, center: buffers of the transform, see `nec_ray.codec.Transform`; None where there is none.
    """

    basis: Tensor | None
    center: Tensor | None

    def __init__(
        self,
        encoder: nn.Module,
        decoder: nn.Module,
        layers: Sequence[int] | None = None,
        *,
        transformed: bool = False,
        entropy: str = "factorized",
    ) -> None:
        super().__init__()
        self.encoder = encoder
        self.decoder = decoder
        channels = int(encoder.channels)  # type: ignore[arg-type]
        self.widths: list[int] = list(getattr(encoder, "widths", [channels]))
        self.layers = list(layers or self.widths)
        if sum(self.layers) != channels or min(self.layers) < 1:
            raise InputError(f"layers of {self.layers} channels do not make up the encoder's {channels}")
        if not set(accumulate(self.widths)) <= set(accumulate(self.layers)):
            raise InputError(
                f"layers of {self.layers} channels: one would hold channels of two stages, which have {self.widths}"
            )
        if transformed and len(self.widths) > 1:
            raise InputError("several stages have no transform: leave out the step")
        self.entropy = entropy_model(entropy)
        self.bottleneck: Any = self.entropy.make(channels)
        self.register_buffer("basis", torch.eye(channels) if transformed else None)
        self.register_buffer("center", torch.zeros(channels) if transformed else None)

    @classmethod
    def mae(
        cls,
        config: MaeConfig,
        layers: Sequence[int] | None = None,
        *,
        transformed: bool = False,
        entropy: str = "factorized",
    ) -> "NeuralEmbeddingCompressor":
        """One of a masked autoencoder with random weights."""
        return cls(MaeEncoder(config), MaeDecoder(config), layers, transformed=transformed, entropy=entropy)

    @classmethod
    def mp_mae(
        cls,
        config: StageConfig,
        layers: Sequence[int] | None = None,
        *,
        transformed: bool = False,
        entropy: str = "factorized",
    ) -> "NeuralEmbeddingCompressor":
        """One of stages of MP-MAE's encoder, which predicts its own input, with random weights."""
        return cls(StageEncoder(config), StageDecoder(config), layers, transformed=transformed, entropy=entropy)

    @torch.no_grad()
    def set_transform(self, mean: Tensor, covariance: Tensor, step: float) -> None:
        """Round the latent's coordinates along its principal axes, which come by falling variance.

        Args:
            mean: (channels,) of the latent's tokens.
            covariance: float64 (channels, channels) of them.
            step: between two values of a coordinate, in units of the channels' root mean square deviation.

        Raises:
            InputError: the latent does not vary.
        """
        assert self.basis is not None
        assert self.center is not None
        deviation = covariance.diagonal().mean().sqrt()
        if not deviation > 0:
            raise InputError("the encoder gives the same embedding for everything; check the weights (model.init)")
        _, axes = torch.linalg.eigh(covariance)
        axes = axes.T.flip(0)
        axes *= axes.gather(1, axes.abs().argmax(dim=1, keepdim=True)).sign()  # one sign everywhere
        self.basis.copy_(axes * (step * deviation))
        self.center.copy_(mean)

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
        self, latent: Latent, kept: Tensor | None = None, generator: torch.Generator | None = None
    ) -> tuple[Latent, Tensor]:
        """Latent after the bottleneck, and its bits per element; in float32 whatever autocast says.

        Args:
            latent: (batch, tokens, channels), a tuple of one such tensor a grid scale where there are several; uniform
                noise is added in training, otherwise it is rounded.
            kept: (batch,) numbers of the first layers that are kept; all where it is None.
            generator: of the noise.
        """
        parts = [self.coordinates(part) for part in parts_of(latent)]
        device = parts[0].device
        with torch.autocast(device.type, enabled=False):
            medians = torch.split(self.entropy.medians(self.bottleneck), self.widths)
            coded = []
            for part, median in zip(parts, medians, strict=True):
                x = part.float()
                if self.training:
                    coded.append(x + torch.rand(x.shape, generator=generator, device=device) - 0.5)
                else:
                    coded.append((x - median).round() + median)
            bits = self._bits(coded)
            if kept is not None:
                layer = torch.repeat_interleave(torch.arange(len(self.layers)), torch.tensor(self.layers)).to(device)
                for n, (median, own) in enumerate(zip(medians, torch.split(layer, self.widths), strict=True)):
                    there = (own < kept[:, None])[:, None, :]
                    coded[n], bits[n] = torch.where(there, coded[n], median), bits[n] * there
            if self.basis is not None and self.center is not None:
                coded = [coded[0] @ self.basis + self.center]
            return joined(coded), torch.cat([part.flatten() for part in bits]).mean()

    def coordinates(self, latent: Tensor) -> Tensor:
        """What is rounded of a latent (batch, tokens, channels) of one scale: its coordinates, or the latent itself."""
        if self.basis is None or self.center is None:
            return latent
        with torch.autocast(latent.device.type, enabled=False):
            found: Tensor = (latent.float() - self.center) @ (self.basis.T / self.basis[0].square().sum())
            return found

    def _bits(self, coded: Sequence[Tensor]) -> list[Tensor]:
        """Bits of each element of the scales' latents."""
        # As many values of each channel: those of a scale of fewer tokens are filled up.
        flat = [part.flatten(0, 1).T for part in coded]
        longest = max(part.shape[1] for part in flat)
        values = torch.cat([functional.pad(part, (0, longest - part.shape[1])) for part in flat])
        found = torch.split(self.entropy.bits(self.bottleneck, values), self.widths)
        return [
            bits[:, : part.shape[0] * part.shape[1]].T.reshape(part.shape)
            for bits, part in zip(found, coded, strict=True)
        ]

    def layer_scales(self) -> list[int]:
        """Of each layer, the number of the grid scale that its channels are of."""
        ends = list(accumulate(self.widths))
        return [bisect_left(ends, end) for end in accumulate(self.layers)]

    def order_of(self, importance: Tensor) -> Tensor:
        """The channels (channels,) by falling importance (channels,), each scale's among themselves."""
        orders = [part.argsort(descending=True) for part in torch.split(importance, self.widths)]
        return torch.cat([start + order for start, order in zip(accumulate([0, *self.widths]), orders, strict=False)])

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
      (NEC, section 3, "Efficient Model Adaptation"). MP-MAE's downsampling layers stay with the blocks, its
      decoders have one block each, and of several stages each one's last block is trained.
    - `all`: all but the position embeddings.

    Args:
        model: of a masked autoencoder, or of stages of MP-MAE.
        trainable: which.
        decoder_is_new: whether the decoder has random weights, and is trained whatever is frozen besides.
    """
    model.requires_grad_(trainable in {"paper", "all"})
    model.bottleneck.requires_grad_(True)
    for parameter in model.entropy.fixed(model.bottleneck):
        parameter.requires_grad_(False)
    if decoder_is_new:
        model.decoder.requires_grad_(True)
    model.encoder.set_trainable(model.decoder, trainable, decoder_is_new)  # type: ignore[operator]


def count_parameters(model: nn.Module) -> tuple[int, int]:
    """Numbers of trained and of all parameters, fixed position embeddings left out of both."""
    named = [(n, p) for n, p in model.named_parameters() if "pos_embed" not in n and "quantiles" not in n]
    return sum(p.numel() for _, p in named if p.requires_grad), sum(p.numel() for _, p in named)

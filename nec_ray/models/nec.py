"""Neural Embedding Compression (Gomes & Brunschwiler 2024, section 3): a bottleneck between encoder and decoder."""

import math
from dataclasses import dataclass
from typing import Literal

import torch
from compressai.entropy_models import EntropyBottleneck
from torch import Tensor, nn

from nec_ray.models.mae import MaeConfig, MaeDecoder, MaeEncoder, masked_mse, patchify, random_keep

Trainable = Literal["paper", "all"]


@dataclass(frozen=True)
class Losses:
    """What a batch cost."""

    loss: Tensor
    """MSE + beta * bits per element; the MSE alone while pretraining."""
    mse: Tensor
    bits: Tensor
    """Bits per element of the latent under the noise proxy; 0 while pretraining."""


class NeuralEmbeddingCompressor(nn.Module):
    """Masked autoencoder with a factorized entropy model on its latent.

    The latent (batch, tokens, dim) is coded as (batch, dim, tokens, 1): one density for each embedding
    channel, shared by all tokens (NEC, section 3, "Rate Term"; Balle et al. 2018, appendix 6.1).
    """

    def __init__(self, config: MaeConfig) -> None:
        super().__init__()
        self.config = config
        self.encoder = MaeEncoder(config)
        self.decoder = MaeDecoder(config)
        self.bottleneck = EntropyBottleneck(config.dim)

    def forward(
        self, pixels: Tensor, *, mask_ratio: float, beta: float | None, generator: torch.Generator | None = None
    ) -> Losses:
        """Losses of normalised pixels (batch, bands, size, size).

        Args:
            pixels: normalised pixels.
            mask_ratio: share of masked tokens.
            beta: weight of the rate; None leaves the bottleneck out (plain MAE pretraining).
            generator: of the masks.
        """
        keep = random_keep(len(pixels), self.config.tokens, mask_ratio, generator).to(pixels.device)
        latent = self.encoder(pixels, keep)
        bits = torch.zeros((), device=pixels.device)
        if beta is not None:
            latent, bits = self.noisy(latent)
        predicted = self.decoder(latent, keep)
        mse = masked_mse(predicted, patchify(pixels, self.config.patch), keep)
        return Losses(mse if beta is None else mse + beta * bits, mse, bits)

    def noisy(self, latent: Tensor) -> tuple[Tensor, Tensor]:
        """Latent after the bottleneck (uniform noise in training, rounding otherwise), and its bits per element."""
        coded, likelihoods = self.bottleneck(latent.transpose(1, 2).unsqueeze(3))
        bits = -likelihoods.log().mean() / math.log(2)
        return coded.squeeze(3).transpose(1, 2), bits


def set_trainable(model: NeuralEmbeddingCompressor, trainable: Trainable) -> None:
    """Freeze everything that adaptation leaves as it is.

    `paper`: all encoder blocks but the last, all decoder blocks but the first, and the position embeddings are
    frozen (NEC, section 3, "Efficient Model Adaptation"). `all`: only the position embeddings are.
    """
    model.requires_grad_(True)
    model.encoder.pos_embed.requires_grad_(False)
    model.decoder.first.decoder_pos_embed.requires_grad_(False)
    if trainable == "paper":
        model.encoder.blocks[:-1].requires_grad_(False)
        model.decoder.blocks.requires_grad_(False)
    # The quantiles do not train: they are solved for when the tables are made (export.py).
    model.bottleneck.quantiles.requires_grad_(False)


def count_parameters(model: nn.Module) -> tuple[int, int]:
    """Numbers of trained and of all parameters, fixed position embeddings left out of both."""
    named = [(n, p) for n, p in model.named_parameters() if "pos_embed" not in n and "quantiles" not in n]
    return sum(p.numel() for _, p in named if p.requires_grad), sum(p.numel() for _, p in named)

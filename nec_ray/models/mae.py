"""Masked autoencoder on Vision Transformer blocks (He et al. 2022, arXiv 2111.06377, sections 3 and A.1)."""

from dataclasses import asdict, dataclass

import torch
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from nec_ray.errors import InputError
from nec_ray.models.family import Trainable


@dataclass(frozen=True)
class MaeConfig:
    """Sizes of a masked autoencoder.

    Raises:
        InputError: sizes that do not divide.
    """

    size: int
    """Pixels a side of the input."""
    patch: int
    bands: int
    dim: int
    depth: int
    heads: int
    decoder_dim: int
    decoder_depth: int
    decoder_heads: int

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():  # bounds what a hostile codec can make a reader build
            if not 1 <= value <= _LARGEST[name]:
                raise InputError(f"{name} {value} is out of range, 1 to {_LARGEST[name]} are allowed; change it")
        if self.size % self.patch:
            raise InputError(
                f"input size {self.size} is no multiple of the patch size {self.patch}; change one of them"
            )
        for name, dim, heads in (("dim", self.dim, self.heads), ("decoder_dim", self.decoder_dim, self.decoder_heads)):
            if dim % heads or dim % 4:
                raise InputError(f"{name} {dim} must be a multiple of 4 and of its {heads} heads; change one of them")

    @property
    def side(self) -> int:
        """Tokens a side."""
        return self.size // self.patch

    @property
    def tokens(self) -> int:
        """Tokens of a tile."""
        return self.side**2

    @property
    def shapes(self) -> list[tuple[int, int]]:
        """Tokens a side, and channels of a token, of the one grid."""
        return [(self.side, self.dim)]

    def to_architecture(self) -> dict[str, int]:
        """As codec.json keeps it."""
        return asdict(self)


_LARGEST = {
    "size": 8192,
    "patch": 256,
    "bands": 256,
    "dim": 4096,
    "depth": 64,
    "heads": 64,
    "decoder_dim": 4096,
    "decoder_depth": 64,
    "decoder_heads": 64,
}

SIZES: dict[str, dict[str, int]] = {
    "micro": {"dim": 128, "depth": 4, "heads": 4, "decoder_dim": 96, "decoder_depth": 2, "decoder_heads": 4},
    "tiny": {"dim": 192, "depth": 12, "heads": 3, "decoder_dim": 128, "decoder_depth": 4, "decoder_heads": 4},
    "small": {"dim": 384, "depth": 12, "heads": 6, "decoder_dim": 256, "decoder_depth": 4, "decoder_heads": 8},
    "base": {"dim": 768, "depth": 12, "heads": 12, "decoder_dim": 512, "decoder_depth": 8, "decoder_heads": 16},
    "large": {"dim": 1024, "depth": 24, "heads": 16, "decoder_dim": 512, "decoder_depth": 8, "decoder_heads": 16},
}
"""`base` and `large` are He et al.'s."""


class MaeEncoder(nn.Module):
    """Patches -> latent. Parameter names are those of facebookresearch/mae."""

    family = "mae_vit"

    def __init__(self, config: MaeConfig) -> None:
        super().__init__()
        self.config = config
        self.patch_embed = PatchEmbed(config)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, config.dim))
        self.pos_embed = nn.Parameter(sincos_positions(config.dim, config.side), requires_grad=False)
        self.blocks = nn.ModuleList([_block(config.dim, config.heads) for _ in range(config.depth)])
        self.norm = nn.LayerNorm(config.dim, eps=1e-6)
        nn.init.normal_(self.cls_token, std=0.02)
        self.apply(_initialise)
        nn.init.xavier_uniform_(self.patch_embed.proj.weight.view(config.dim, -1))

    @property
    def channels(self) -> int:
        """Of a token."""
        return self.config.dim

    @property
    def tokens(self) -> int:
        """Of a tile."""
        return self.config.tokens

    def forward(self, pixels: Tensor, keep: Tensor | None = None) -> Tensor:
        """Latent (batch, kept tokens, dim) of normalised pixels (batch, bands, size, size).

        Args:
            pixels: normalised pixels.
            keep: (batch, kept tokens) indexes of the visible tokens; all tokens in order where it is None.
        """
        x = self.patch_embed(pixels) + self.pos_embed[:, 1:]
        if keep is not None:
            x = x.gather(1, keep[:, :, None].expand(-1, -1, x.shape[2]))
        cls = (self.cls_token + self.pos_embed[:, :1]).expand(len(x), -1, -1)
        x = torch.cat([cls, x], dim=1)
        for block in self.blocks:
            x = block(x)
        # The class token takes part in attention but is no part of the latent: it would cost bytes (NEC, sec. 3).
        latent: Tensor = self.norm(x)[:, 1:]
        return latent

    def set_trainable(self, decoder: "MaeDecoder", trainable: Trainable, decoder_is_new: bool = False) -> None:
        """See `nec.set_trainable`."""
        self.patch_embed.requires_grad_(trainable != "entropy")
        if trainable == "paper":
            self.blocks[:-1].requires_grad_(False)
            if not decoder_is_new:
                decoder.blocks.requires_grad_(False)
        self.pos_embed.requires_grad_(False)
        decoder.first.decoder_pos_embed.requires_grad_(False)

    @torch.no_grad()
    def reorder(self, decoder: "MaeDecoder", order: Tensor) -> None:
        """Put the latent's channels in another order without changing what encoder and decoder compute.

        The channels of a transformer have no order of their own: what reads and what writes them is permuted alike.
        So the channels that matter most can come first, where a prefix of layers begins, before adaptation.

        Args:
            decoder: that reads them.
            order: (channels,) a permutation: channel `order[i]` becomes channel i.
        """

        def rows(*tensors: Tensor | None) -> None:  # what writes channels
            for tensor in tensors:
                if tensor is not None:
                    tensor.copy_(tensor[order])

        def columns(*layers: nn.Linear) -> None:  # what reads them
            for layer in layers:
                layer.weight.copy_(layer.weight[:, order])

        rows(self.patch_embed.proj.weight, self.patch_embed.proj.bias, self.norm.weight, self.norm.bias)
        for token in (self.cls_token, self.pos_embed):
            token.copy_(token[:, :, order])
        for block in self.blocks:
            parts = dict(block.named_modules())
            for name in ("norm1", "norm2"):
                rows(parts[name].weight, parts[name].bias)
            for name in ("attn.proj", "mlp.fc2"):
                rows(parts[name].weight, parts[name].bias)
            for name in ("attn.qkv", "mlp.fc1"):
                columns(parts[name])
        columns(decoder.first.decoder_embed)


class FirstDecoderLayer(nn.Module):
    """The decoder up to its first block, which consumers may have (NEC, section 3, fine-tuning)."""

    def __init__(self, config: MaeConfig) -> None:
        super().__init__()
        self.decoder_embed = nn.Linear(config.dim, config.decoder_dim)
        self.decoder_pos_embed = nn.Parameter(
            sincos_positions(config.decoder_dim, config.side)[:, 1:], requires_grad=False
        )
        self.block = _block(config.decoder_dim, config.decoder_heads)
        self.apply(_initialise)

    def forward(self, latent: Tensor) -> Tensor:
        """(batch, tokens, decoder_dim) of a whole latent (batch, tokens, dim)."""
        x: Tensor = self.block(self.decoder_embed(latent) + self.decoder_pos_embed)
        return x


class MaeDecoder(nn.Module):
    """Latent -> patches."""

    def __init__(self, config: MaeConfig) -> None:
        super().__init__()
        self.config = config
        self.first = FirstDecoderLayer(config)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, config.decoder_dim))
        self.blocks = nn.ModuleList(
            [_block(config.decoder_dim, config.decoder_heads) for _ in range(config.decoder_depth - 1)]
        )
        self.norm = nn.LayerNorm(config.decoder_dim, eps=1e-6)
        self.pred = nn.Linear(config.decoder_dim, config.patch**2 * config.bands)
        nn.init.normal_(self.mask_token, std=0.02)
        self.blocks.apply(_initialise)
        _initialise(self.pred)

    def forward(self, latent: Tensor, keep: Tensor) -> Tensor:
        """Patches (batch, tokens, patch * patch * bands) from the visible tokens' latent."""
        visible = self.first.decoder_embed(latent)
        x = self.mask_token.to(visible.dtype).expand(len(latent), self.config.tokens, -1)
        x = x.scatter(1, keep[:, :, None].expand(-1, -1, visible.shape[2]), visible)
        x = self.first.block(x + self.first.decoder_pos_embed)
        for block in self.blocks:
            x = block(x)
        patches: Tensor = self.pred(self.norm(x))
        return patches

    def loss(self, latent: Tensor, keep: Tensor, pixels: Tensor) -> Tensor:
        """Mean squared error of normalised pixels (batch, bands, size, size), over the masked patches."""
        return masked_mse(self(latent, keep), patchify(pixels, self.config.patch), keep)


class PatchEmbed(nn.Module):
    """Non-overlapping patches, each projected to a token."""

    def __init__(self, config: MaeConfig) -> None:
        super().__init__()
        self.proj = nn.Conv2d(config.bands, config.dim, config.patch, config.patch)

    def forward(self, pixels: Tensor) -> Tensor:
        """(batch, tokens, dim) of (batch, bands, size, size)."""
        x: Tensor = self.proj(pixels).flatten(2).transpose(1, 2)
        return x


def random_keep(
    batch: int,
    tokens: int,
    mask_ratio: float,
    generator: torch.Generator | None = None,
    device: torch.device | None = None,
) -> Tensor:
    """Random visible tokens (batch, kept), int64, uniform without replacement, a set of its own for each sample."""
    kept = max(1, int(tokens * (1 - mask_ratio)))
    noise = torch.rand(batch, tokens, generator=generator, device=device)
    return noise.argsort(dim=1)[:, :kept]


def patchify(pixels: Tensor, patch: int) -> Tensor:
    """Patches (batch, tokens, patch * patch * bands) of (batch, bands, height, width); row by row, bands last."""
    batch, bands, height, width = pixels.shape
    x = pixels.reshape(batch, bands, height // patch, patch, width // patch, patch)
    return x.permute(0, 2, 4, 3, 5, 1).reshape(batch, (height // patch) * (width // patch), patch * patch * bands)


def masked_mse(predicted: Tensor, target: Tensor, keep: Tensor) -> Tensor:
    """Mean squared error over the masked patches; over all of them where none is masked."""
    error = (predicted - target).square().mean(dim=2)
    masked = torch.ones_like(error).scatter(1, keep, 0.0)
    if keep.shape[1] == error.shape[1]:
        masked = torch.ones_like(error)
    return (error * masked).sum() / masked.sum()


def sincos_positions(dim: int, side: int) -> Tensor:
    """Fixed 2-D sine-cosine position embeddings (1, 1 + side * side, dim), zero for the class token.

    Half of the channels encode the column, half the row, as in facebookresearch/mae.
    """
    frequency = 1.0 / 10_000 ** (torch.arange(dim // 4, dtype=torch.float64) / (dim / 4))
    steps = torch.arange(side, dtype=torch.float64)[:, None] * frequency
    axis = torch.cat([steps.sin(), steps.cos()], dim=1)
    column = axis[None, :].expand(side, side, -1)
    row = axis[:, None].expand(side, side, -1)
    grid = torch.cat([column, row], dim=2).reshape(1, side * side, dim)
    return torch.cat([torch.zeros(1, 1, dim), grid.float()], dim=1)


def _block(dim: int, heads: int) -> nn.Module:
    block: nn.Module = Block(dim, heads, mlp_ratio=4.0, qkv_bias=True, norm_layer=_layer_norm)
    return block


def _layer_norm(dim: int, **_: object) -> nn.LayerNorm:
    return nn.LayerNorm(dim, eps=1e-6)


def _initialise(module: nn.Module) -> None:
    if isinstance(module, nn.Linear):
        nn.init.xavier_uniform_(module.weight)
        if module.bias is not None:
            nn.init.zeros_(module.bias)

"""A family of foundation models in one file, as `contributing.md` says: patches, each projected to a token."""

from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from nec_ray.errors import InputError
from nec_ray.models.family import Begun, Choice, Family, Trainable, read_own_names
from nec_ray.models.mae import patchify
from nec_ray.models.nec import NeuralEmbeddingCompressor
from nec_ray.models.published import read_checkpoint


@dataclass(frozen=True)
class Config:
    """Its sizes."""

    size: int
    patch: int
    bands: int
    dim: int

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            if not 1 <= value <= 1024:
                raise InputError(f"{name} {value} is out of range")

    @property
    def side(self) -> int:
        return self.size // self.patch

    @property
    def shapes(self) -> list[tuple[int, int]]:
        return [(self.side, self.dim)]

    def to_architecture(self) -> dict[str, int]:
        return asdict(self)


class Encoder(nn.Module):
    """A token a patch."""

    family = "toy_family"

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        self.channels, self.tokens = config.dim, config.side**2
        self.project = nn.Conv2d(config.bands, config.dim, config.patch, config.patch)

    def forward(self, pixels: Tensor, keep: Tensor | None = None) -> Tensor:
        tokens: Tensor = self.project(pixels).flatten(2).transpose(1, 2)
        return tokens if keep is None else tokens.gather(1, keep[:, :, None].expand(-1, -1, self.channels))

    def set_trainable(self, decoder: Any, trainable: Trainable, decoder_is_new: bool = False) -> None:
        self.requires_grad_(trainable != "entropy")
        if trainable == "paper" and not decoder_is_new:
            decoder.last.requires_grad_(False)

    @torch.no_grad()
    def reorder(self, decoder: Any, order: Tensor) -> None:
        for tensor in self.project.parameters():
            tensor.copy_(tensor[order])
        decoder.first.weight.copy_(decoder.first.weight[:, order])


class Decoder(nn.Module):
    """Two linear layers, of which consumers may have the first."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        self.first = nn.Linear(config.dim, 24)
        self.last = nn.Linear(24, config.patch**2 * config.bands)

    def loss(self, latent: Tensor, keep: Tensor, pixels: Tensor) -> Tensor:
        patches = patchify(pixels, self.config.patch)
        target = patches.gather(1, keep[:, :, None].expand(-1, -1, patches.shape[2]))
        return (self.last(self.first(latent).relu()) - target).square().mean()


_DIMS = {"little": 8, "less": 4}


def _begin(choice: Choice, size: int, bands: int, seed: int) -> Begun:
    config = Config(size, choice.patch, bands, _DIMS[choice.size])
    torch.manual_seed(seed)
    model = NeuralEmbeddingCompressor(Encoder(config), Decoder(config), choice.layers, entropy=choice.entropy)
    if not choice.init:
        return Begun(model, False, "random weights")
    read_own_names(model, read_checkpoint(choice.init), choice.init)
    return Begun(model, False, f"weights of {choice.init}")


FAMILY = Family(
    noun="a toy",
    sizes=("little", "less"),
    config=lambda sizes: Config(**sizes),
    encoder=Encoder,
    first_layer=lambda config: nn.Linear(config.dim, 24),
    begin=_begin,
    widths=lambda choice: [_DIMS[choice.size]],
)

"""An entropy model in one file, as `contributing.md` says: a logistic density a channel."""

import numpy as np
import torch
from torch import Tensor, nn

from nec_ray.codec import Arrays, EntropyTables, parts_of
from nec_ray.models.entropy import EntropyModel


class Logistic(nn.Module):
    """Of location and scale."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.location = nn.Parameter(torch.zeros(channels, 1))
        self.scale = nn.Parameter(torch.ones(channels, 1))

    def mass(self, values: Tensor) -> Tensor:
        """Within half a unit of values (channels, n)."""
        upper, lower = ((values + side - self.location) / self.scale.exp() for side in (0.5, -0.5))
        return torch.sigmoid(upper) - torch.sigmoid(lower)


def _bits(model: Logistic, values: Tensor) -> Tensor:
    return -model.mass(values).clamp_min(1e-9).log2()


def _tables(model: Logistic, latents: Arrays) -> EntropyTables:
    steps = torch.arange(-40, 41, dtype=torch.float64)
    with torch.no_grad():
        median = model.location[:, 0].double()
        mass = model.double().mass(median[:, None] + steps).numpy()
        model.float()
    count = len(mass)
    tokens = max(part.shape[1] for part in parts_of(latents))
    dead = np.zeros(count, bool)
    return EntropyTables.from_pmf(list(mass), np.full(count, -40), median.float().numpy(), dead, tokens=tokens)


ENTROPY = EntropyModel(
    make=Logistic,
    medians=lambda model: model.location[:, 0].detach(),
    bits=_bits,
    tables=_tables,
)

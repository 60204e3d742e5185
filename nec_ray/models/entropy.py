"""What an entropy model is to the rest, so that a new one is one file of `nec_ray/models/entropy_models/`."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor, nn

    from nec_ray.codec import Arrays, EntropyTables


@dataclass(frozen=True)
class EntropyModel:
    """Densities of latent channels, one each, that are learned with the encoder and become integer tables.

    Payloads know nothing of how densities were learned. A model whose densities depend on other symbols (hyperpriors,
    contexts) is none of these: it needs a new version of the payload format (`schemas/payload.md`).
    """

    make: "Callable[[int], nn.Module]"
    """A module of so many channels, before training."""
    medians: "Callable[[Any], Tensor]"
    """(channels,) of a module: what is rounded to is them plus whole numbers, and a channel that is left out is its."""
    bits: "Callable[[Any, Tensor], Tensor]"
    """Of a module, bits float32 (channels, n) of values float32 (channels, n), with gradients: minus the binary
    logarithm of the density's mass within half a unit of the value."""
    tables: "Callable[[Any, Arrays], EntropyTables]"
    """Integer tables of a trained module, by `EntropyTables.from_pmf`; of real latents float32 (tiles, tokens,
    channels) of each grid scale, which tell dead channels. It may solve for what gradients do not train."""
    fixed: "Callable[[Any], Iterable[nn.Parameter]]" = lambda module: ()  # noqa: ARG005
    """Parameters of a module that gradients do not train."""

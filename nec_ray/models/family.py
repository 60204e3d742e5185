"""What a family of foundation models is to the rest, so that a new one is one file of `nec_ray/models/families/`."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, Protocol

if TYPE_CHECKING:
    from torch import Tensor, nn

Trainable = Literal["entropy", "entropy+patch", "paper", "all"]


class Config(Protocol):
    """Sizes of a model, which codec.json keeps; their limits bound what a hostile codec can make a reader build."""

    @property
    def size(self) -> int:
        """Pixels a side of the input."""

    @property
    def bands(self) -> int:
        """Of the input."""

    @property
    def side(self) -> int:
        """Tokens a side, of the finest grid."""

    @property
    def dim(self) -> int:
        """Channels of a token, of all grid scales together."""

    @property
    def shapes(self) -> list[tuple[int, int]]:
        """Tokens a side, and channels of a token, of each grid scale, coarse first."""

    def to_architecture(self) -> dict[str, int]:
        """As codec.json keeps it."""


class Choice(Protocol):
    """What a recipe's section `model` says; see `schemas/recipe.schema.json`."""

    @property
    def size(self) -> str:
        """Name of a size."""

    @property
    def patch(self) -> int:
        """Pixels a side of a patch."""

    @property
    def stages(self) -> Sequence[int] | None:
        """Feature maps that are the latent, coarse first."""

    @property
    def depth(self) -> int | None:
        """Blocks, where not those of the size."""

    @property
    def init(self) -> str | None:
        """Weights to begin from: path or URL."""

    @property
    def layers(self) -> Sequence[int] | None:
        """Channels of each layer of a payload."""

    @property
    def step(self) -> float | None:
        """Of transform coding."""

    @property
    def entropy(self) -> str:
        """Name of the entropy model."""


@dataclass(frozen=True)
class Begun:
    """What training begins from."""

    model: Any
    """A `nec.NeuralEmbeddingCompressor`."""
    decoder_is_new: bool
    """Whether the decoder has random weights beside an encoder that was given."""
    line: str
    """Where the weights come from."""


@dataclass(frozen=True)
class Family:
    """A family; its name is that of its file.

    The encoder is a `nec.TokenEncoder`, the decoder of what `begin` gives a `nec.TokenDecoder`; see there.
    """

    noun: str
    """For errors: `a MAE ViT`."""
    sizes: tuple[str, ...]
    """What `model.size` of a recipe may be."""
    config: Callable[[Mapping[str, int]], Config]
    """Of an architecture of codec.json. TypeError: sizes are missing, or unknown; InputError: they are impossible."""
    encoder: "Callable[[Any], nn.Module]"
    """Of a config."""
    first_layer: "Callable[[Any], nn.Module]"
    """The first decoder layer, of a config: (batch, tokens, channels) to (batch, tokens, decoder channels)."""
    begin: Callable[[Choice, int, int, int], Begun]
    """Of a recipe's model, pixels a side, bands and seed. NotFound, BadCheckpoint: of `init`."""
    check: Callable[[Choice], object] = bool
    """ValueError: a key of the recipe's model is none of this family's, or impossible."""


class FamilyEncoder(Protocol):
    """What an encoder can do beside encoding, so that its family can be trained."""

    def set_trainable(self, decoder: Any, trainable: Trainable, decoder_is_new: bool = False) -> None:
        """Freeze what `nec.set_trainable` says, of encoder and decoder; a new decoder is trained whatever is frozen."""

    def reorder(self, decoder: Any, order: "Tensor") -> None:
        """Put the latent's channels in another order without changing what encoder and decoder compute."""

"""What a family of foundation models is to the rest, so that a new one is one file of `nec_ray/models/families/`."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, Protocol

from nec_ray.errors import BadCheckpoint

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


def own_names(encoder: "nn.Module", decoder: "nn.Module") -> "dict[str, Tensor]":
    """Tensors of encoder and decoder by their own names, behind `encoder.` and `decoder.`."""
    return {
        f"{part}.{name}": tensor.detach().cpu().contiguous()
        for part, module in (("encoder", encoder), ("decoder", decoder))
        for name, tensor in module.state_dict().items()
    }


def read_own_names(model: Any, tensors: "Mapping[str, Tensor]", where: str) -> None:
    """Load what `own_names` gave into a `nec.NeuralEmbeddingCompressor`.

    Raises:
        BadCheckpoint: tensors are missing, unknown or of other shapes.
    """
    for part in ("encoder", "decoder"):
        own = {name.removeprefix(f"{part}."): t for name, t in tensors.items() if name.startswith(f"{part}.")}
        try:
            getattr(model, part).load_state_dict(own)
        except RuntimeError as error:
            raise BadCheckpoint(f"{where}: no weights of this {part} ({' '.join(str(error).split())})") from None


@dataclass(frozen=True)
class Family:
    """A family; its name is that of its file.

    The encoder is a `nec.TokenEncoder` and a `FamilyEncoder`; the decoder of what `begin` gives is a `nec.TokenDecoder`
    whose attribute `first` is the layer of `first_layer`.
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
    weights: "Callable[[Any, Any], dict[str, Tensor]]" = own_names
    """Tensors of a pretrained encoder and decoder, which a run keeps, by the names that `begin` reads from `init`."""
    widths: Callable[[Choice], Sequence[int]] | None = None
    """Channels of each grid scale of a recipe's model that `check` passed, coarse first, so that `model.layers` that do
    not make them up are refused before anything is built; where not given, they are refused when the model is made."""


class FamilyEncoder(Protocol):
    """What an encoder has and can do beside encoding, so that its family can be trained and its codecs be written."""

    @property
    def family(self) -> str:
        """Name of its family."""

    @property
    def config(self) -> Config:
        """Its sizes."""

    def set_trainable(self, decoder: Any, trainable: Trainable, decoder_is_new: bool = False) -> None:
        """Freeze what `nec.set_trainable` says, of encoder and decoder; a new decoder is trained whatever is frozen."""

    def reorder(self, decoder: Any, order: "Tensor") -> None:
        """Put the latent's channels in another order without changing what encoder and decoder compute."""

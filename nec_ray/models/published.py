"""Published weights as a start: facebookresearch/mae, RVSA's ViT-B (MillionAID), timm's ViT encoders.

All three name their tensors as timm's `VisionTransformer` does; the first two add MAE's decoder (`decoder_embed`,
`decoder_blocks.0`, ...), the third has none. Nothing is unpickled but tensors and plain containers.
"""

import argparse
import io
import math
import pickle
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import PosixPath, PurePosixPath
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from nec_ray.errors import BadCheckpoint
from nec_ray.models.mae import MaeConfig, MaeDecoder, MaeEncoder
from nec_ray.storage import Store, normalise_url

_WRAPPERS = ("model", "state_dict", "model_state_dict", "module")
_PREFIXES = ("module.", "_orig_mod.", "encoder.", "backbone.")
_HEADS = ("head.", "fc_norm.", "head_dist.", "norm_head.")
"""Of classifiers, which an encoder of tokens does not have."""
_ENCODER = ("cls_token", "pos_embed", "patch_embed.", "blocks.", "norm.")
_DECODER = ("decoder_embed.", "decoder_blocks.", "decoder_norm.", "decoder_pred.")
"""What only a checkpoint with a decoder has; encoders of other methods have a mask token, too."""
_DECODER_NAMES = {
    "mask_token": "mask_token",
    "first.decoder_pos_embed": "decoder_pos_embed",
    "first.decoder_embed.": "decoder_embed.",
    "norm.": "decoder_norm.",
    "pred.": "decoder_pred.",
    "first.block.": "decoder_blocks.0.",
}
"""Theirs by ours; the further blocks are numbered one lower here."""
_NAMED = 4
_NESTED = 8
"""Wrappers around a state dict, at most."""


@dataclass(frozen=True)
class Imported:
    """What of a model was set from a checkpoint."""

    decoder: bool
    """Whether the checkpoint had a decoder; where not, the model's stays as it is."""
    resized_from: int | None
    """Tokens a side that the position embeddings were interpolated from; None where they fitted."""
    ignored: list[str]
    """Tensors of the checkpoint that the model has no use for."""


def read_checkpoint(url: str) -> dict[str, Tensor]:
    """The tensors of a `.safetensors` file, or of a `.pth`, `.pt` or `.bin` that `torch.save` wrote.

    Args:
        url: a path or URL. Training state around the model's (optimiser, arguments) is dropped.

    Raises:
        NotFound: nothing is there.
        BadCheckpoint: no such file, one that needs more than tensors and plain containers to be read, one without
            tensors, or one that contains itself.
    """
    where = normalise_url(url)
    folder, _, name = where.rpartition("/")
    data = Store(folder).read(name)
    if PurePosixPath(name).suffix == ".safetensors":
        try:
            return safetensors.torch.load(data)
        except safetensors.SafetensorError as error:
            raise BadCheckpoint(f"{where}: no safetensors file ({error}); download it again") from None
    try:
        # The arguments of the training run, which RVSA's and MMEarth's checkpoints hold, are attributes and nothing
        # more; a path among them names a folder and opens nothing.
        with torch.serialization.safe_globals([argparse.Namespace, PosixPath]), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about old pickles, which an error below says better
            found = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        first = str(error).strip().splitlines()[0]
        raise BadCheckpoint(
            f"{where}: holds more than tensors, which is not read for safety ({first[:160]}); "
            "save its state dict as safetensors"
        ) from None
    except (RuntimeError, EOFError, ValueError, KeyError, OSError) as error:
        raise BadCheckpoint(
            f"{where}: no checkpoint ({' '.join(str(error).split())[:160]}); download it again"
        ) from None
    return _state_dict(found, where)


def import_weights(
    encoder: MaeEncoder, decoder: MaeDecoder | None, tensors: Mapping[str, Tensor], where: str
) -> Imported:
    """Set a masked autoencoder from published weights.

    Position embeddings of another grid are interpolated bicubically, as the MAE release does for fine-tuning
    (util/pos_embed.py). Nothing is set where anything does not fit.

    Args:
        encoder: all of whose tensors are set.
        decoder: all of whose tensors are set, where the checkpoint has a decoder; None to leave it out.
        tensors: what `read_checkpoint` gave.
        where: the checkpoint, for messages.

    Raises:
        BadCheckpoint: a tensor is missing, unknown, of another shape, or of no finite floating point numbers.
    """
    theirs = _without_prefix(tensors)
    decoding = _decoder_tensors(theirs)
    with_decoder = decoder is not None and any(name.startswith(_DECODER) for name in theirs)
    for name, tensor in theirs.items():
        if name.startswith(_ENCODER) or (with_decoder and name in decoding.values()):
            check_numbers(name, tensor, where)
    ours, resized_from = _encoder_tensors(theirs, encoder.config, where)
    used = set(ours)
    ignored = sorted(name for name in theirs if name.startswith(_HEADS))
    if not with_decoder:
        ignored += sorted(decoding.values())
    unknown = sorted(set(theirs) - used - set(decoding.values()) - set(ignored))
    if unknown:
        raise BadCheckpoint(
            f"{where}: tensors that a MAE ViT has not: {_some(unknown)}; {_hint(theirs, encoder.config)}"
        )
    _check(encoder, ours, where, encoder.config, theirs)
    if with_decoder and decoder is not None:
        mine = {name: theirs[source] for name, source in decoding.items()}
        if "first.decoder_pos_embed" in mine:
            # The class token is no part of what is decoded here.
            mine["first.decoder_pos_embed"] = resize_positions(
                mine["first.decoder_pos_embed"], encoder.config.side, where
            )[:, 1:]
        _check(decoder, mine, where, encoder.config, theirs)
        decoder.load_state_dict(mine)
    encoder.load_state_dict(ours)
    return Imported(with_decoder, resized_from, ignored)


def published_tensors(encoder: MaeEncoder, decoder: MaeDecoder) -> dict[str, Tensor]:
    """A masked autoencoder's tensors by the names that facebookresearch/mae gives them; `import_weights` reads them."""
    named = {name: tensor.detach().cpu().contiguous() for name, tensor in encoder.state_dict().items()}
    ours = {name: tensor.detach().cpu().contiguous() for name, tensor in decoder.state_dict().items()}
    for start, theirs in _DECODER_NAMES.items():
        named |= {theirs + name[len(start) :]: tensor for name, tensor in ours.items() if name.startswith(start)}
    for number in range(decoder.config.decoder_depth - 1):
        start = f"blocks.{number}."
        named |= {
            f"decoder_blocks.{number + 1}.{name[len(start) :]}": tensor
            for name, tensor in ours.items()
            if name.startswith(start)
        }
    positions = named["decoder_pos_embed"]
    named["decoder_pos_embed"] = torch.cat([torch.zeros_like(positions[:, :1]), positions], dim=1)
    return named


def resize_positions(positions: Tensor, side: int, where: str) -> Tensor:
    """Position embeddings (1, 1 + side * side, dim) of those of another square grid, with or without a class token.

    Raises:
        BadCheckpoint: their number is no square, nor a square and one, or they are several grids or none.
    """
    count = positions.shape[1] if positions.ndim == 3 and positions.shape[0] == 1 and positions.shape[2] else 0
    for extra in (1, 0):
        before = math.isqrt(max(0, count - extra))
        if before and before**2 == count - extra:
            break
    else:
        raise BadCheckpoint(f"{where}: position embeddings {tuple(positions.shape)} are of no square grid")
    first = positions[:, :extra] if extra else torch.zeros_like(positions[:, :1])
    grid = positions[:, extra:].float().reshape(1, before, before, -1).permute(0, 3, 1, 2)
    if before != side:
        grid = nn.functional.interpolate(grid, (side, side), mode="bicubic", align_corners=False)
    return torch.cat([first.float(), grid.permute(0, 2, 3, 1).flatten(1, 2)], dim=1)


def check_numbers(name: str, tensor: Tensor, where: str) -> None:
    """Refuse a tensor that cannot be weights.

    Raises:
        BadCheckpoint: its numbers are integers or complex, not finite in float32, or not laid out one by one.
    """
    if not tensor.is_floating_point() or tensor.layout != torch.strided:
        kind = f"{tensor.layout}, {tensor.dtype}".replace("torch.", "")
        raise BadCheckpoint(f"{where}: {name} holds no weights ({kind}); give a dense tensor of floats")
    if not torch.isfinite(tensor.float()).all():
        raise BadCheckpoint(f"{where}: {name} is not finite; download it again")


def _state_dict(found: Any, where: str) -> dict[str, Tensor]:
    for _ in range(_NESTED):  # a pickle can contain itself
        inner = None
        if isinstance(found, dict):
            inner = next((found[key] for key in _WRAPPERS if isinstance(found.get(key), dict)), None)
        if inner is None:
            break
        found = inner
    else:
        raise BadCheckpoint(f"{where}: its state dict is in more than {_NESTED - 1} others; give the state dict alone")
    plain = found.items() if isinstance(found, dict) else ()
    tensors = {name: tensor for name, tensor in plain if isinstance(name, str) and isinstance(tensor, Tensor)}
    if not tensors:
        raise BadCheckpoint(f"{where}: no tensors in it; give a state dict")
    return tensors


def _without_prefix(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    named = dict(tensors)
    for prefix in _PREFIXES:
        if f"{prefix}cls_token" in named or f"{prefix}patch_embed.proj.weight" in named:
            named = {name.removeprefix(prefix): tensor for name, tensor in named.items()}
    return named


def _encoder_tensors(
    theirs: Mapping[str, Tensor], config: MaeConfig, where: str
) -> tuple[dict[str, Tensor], int | None]:
    ours = {name: tensor for name, tensor in theirs.items() if name.startswith(_ENCODER)}
    resized_from = None
    if "pos_embed" in ours:
        before = ours["pos_embed"]
        ours["pos_embed"] = resize_positions(before, config.side, where)
        side = math.isqrt(before.shape[1])
        resized_from = None if side == config.side else side
    return ours, resized_from


def _decoder_tensors(theirs: Mapping[str, Tensor]) -> dict[str, str]:
    """Their names of the decoder's tensors, by ours."""
    found = {}
    for name in theirs:
        for ours, start in _DECODER_NAMES.items():
            if name == start or (start.endswith(".") and name.startswith(start)):
                found[ours + name[len(start) :]] = name
                break
        else:
            number, _, rest = name.removeprefix("decoder_blocks.").partition(".")
            if name.startswith("decoder_blocks.") and number.isdecimal() and len(number) < 4:
                found[f"blocks.{int(number) - 1}.{rest}"] = name
    return found


def _check(
    module: nn.Module, given: Mapping[str, Tensor], where: str, config: MaeConfig, theirs: Mapping[str, Tensor]
) -> None:
    wanted = module.state_dict()
    for what, names in (
        ("it lacks", sorted(set(wanted) - set(given))),
        ("tensors that the model has not", sorted(set(given) - set(wanted))),
    ):
        if names:
            raise BadCheckpoint(f"{where}: {what} {_some(names)}; {_hint(theirs, config)}")
    for name, tensor in wanted.items():
        if given[name].shape != tensor.shape:
            raise BadCheckpoint(
                f"{where}: {name} is {tuple(given[name].shape)}, the model's is {tuple(tensor.shape)}; "
                f"{_hint(theirs, config)}"
            )


def _hint(theirs: Mapping[str, Tensor], config: MaeConfig) -> str:
    """What the checkpoint is, beside what it was wanted for."""

    def blocks(name: str) -> int:
        return len({key.split(".")[1] for key in theirs if key.startswith(f"{name}.")})

    weight = theirs.get("patch_embed.proj.weight")
    shape = tuple(weight.shape) if weight is not None and weight.ndim == 4 else (0, 0, 0, 0)
    return (
        f"the checkpoint has {blocks('blocks')} blocks of {shape[0]} channels on patches of {shape[3]} and {shape[1]} "
        f"bands (decoder: {blocks('decoder_blocks')} blocks), the recipe's model {config.depth} of {config.dim} on "
        f"{config.patch} and {config.bands} (decoder: {config.decoder_depth})"
    )


def _some(names: list[str]) -> str:
    more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
    return ", ".join(names[:_NAMED]) + more

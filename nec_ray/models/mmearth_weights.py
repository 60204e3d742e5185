"""MMEarth's published weights (vishalned/MMEarth-train): import into MP-MAE or its encoder, export in their layout.

Their encoder is a MinkowskiEngine network: a convolution's kernel is (kernel * kernel, in, out), a depthwise one's
(kernel * kernel, channels), with the rows of the kernel running fastest; biases and GRN have an axis of 1 in front.
"""

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import PurePath

from torch import Tensor, nn

from nec_ray.errors import BadCheckpoint, InputError
from nec_ray.models.convnext import STAGES, ConvNextConfig, ConvNextEncoder
from nec_ray.models.mp_mae import MpMae, MpMaeConfig
from nec_ray.models.pretext import BANDS, Inputs, Targets, Weighting
from nec_ray.models.published import check_numbers
from nec_ray.models.stages import StageDecoder, StageEncoder

_ENCODER = "encoder."
_LOG_VARS = "loss_fn.log_vars"
_NORM = "norm."
"""Behind the encoder's last stage, where a fine-tuned checkpoint has one; never pretrained."""
_NAMED = 4
_FOLDER = re.compile(
    r"pt-(?P<kind>all_mod|img_mod|pix_mod|S2|rgb)_(?P<size>atto|tiny)_(?P<data>1M_64|1M_128|100k_128)_"
    r"(?P<loss>uncertainty|unweighted)_(?P<shape>56-8|112-16)"
)
_DOWN_NORM = re.compile(r"downsample_layers\.\d+\.0")
_TARGETS: dict[str, tuple[Inputs, Targets]] = {
    "all_mod": ("s2", "all"),
    "img_mod": ("s2", "image"),
    "pix_mod": ("s2", "pixel"),
    "S2": ("s2", "s2"),
    "rgb": ("rgb", "s2"),
}
_WEIGHTING: dict[str, Weighting] = {"uncertainty": "uncertainty", "unweighted": "equal"}


@dataclass(frozen=True)
class Published:
    """What a published checkpoint's folder name says of it."""

    inputs: Inputs
    targets: Targets
    size: str
    """Of `convnext.SIZES`."""
    data: str
    """Samples and pixels a side of MMEarth: `1M_64`, `1M_128`, `100k_128`."""
    weighting: Weighting
    pixels: int
    """A side of the images it was trained on."""
    patch: int

    def config(self) -> MpMaeConfig:
        """Of the model that takes its weights."""
        return MpMaeConfig.mmearth(
            self.size,
            pixels=self.pixels,
            patch=self.patch,
            inputs=self.inputs,
            targets=self.targets,
            weighting=self.weighting,
        )


def parse_folder(name: str) -> Published:
    """What is in a folder such as `pt-all_mod_atto_1M_64_uncertainty_56-8`.

    Raises:
        InputError: no such name.
    """
    found = _FOLDER.fullmatch(name)
    if not found:
        raise InputError(
            f"{name!r} is no folder of MMEarth's weights; they are named "
            "pt-{all_mod|img_mod|pix_mod|S2|rgb}_{atto|tiny}_{1M_64|1M_128|100k_128}_{uncertainty|unweighted}_"
            "{56-8|112-16}"
        )
    inputs, targets = _TARGETS[found["kind"]]
    pixels, _, patch = found["shape"].partition("-")
    weighting = _WEIGHTING[found["loss"]]
    return Published(inputs, targets, found["size"], found["data"], weighting, int(pixels), int(patch))


def import_pretraining(model: MpMae, tensors: Mapping[str, Tensor], where: str) -> None:
    """Set a whole model from a published checkpoint; nothing is set where anything does not fit.

    The released decoders share one block, stored once for each modality; here each becomes a block of its own.

    Args:
        model: of the same inputs, targets and weighting.
        tensors: what `published.read_checkpoint` gave.
        where: the checkpoint, for messages.

    Raises:
        BadCheckpoint: a tensor is missing, unknown, of another shape, or of no finite floats.
    """
    ours = _renamed(tensors, _our_name, where)
    _check(model, ours, tensors, where, model.config.encoder)
    model.load_state_dict(ours)


def import_encoder(encoder: ConvNextEncoder, tensors: Mapping[str, Tensor], where: str) -> list[str]:
    """Set an encoder from a published checkpoint, or from the dense encoder that MMEarth's code makes of one.

    Args:
        encoder: of the same size, patch and bands; the size of its images may be another.
        tensors: what `published.read_checkpoint` gave.
        where: the checkpoint, for messages.

    Returns:
        The tensors that an encoder has no use for: decoders, heads, log variances, a classifier and its norm.

    Raises:
        BadCheckpoint: a tensor is missing, unknown, of another shape, or of no finite floats.
    """
    if any(name.startswith(_ENCODER) for name in tensors):
        theirs = {name.removeprefix(_ENCODER): tensor for name, tensor in tensors.items() if name.startswith(_ENCODER)}
        ignored = sorted(name for name in tensors if not name.startswith(_ENCODER))
    else:
        ignored = sorted(name for name in tensors if name.startswith((_NORM, "head.")))
        theirs = {name: tensor for name, tensor in tensors.items() if name not in ignored}
    ours = _renamed(theirs, _dense_name, where)
    _check(encoder, ours, tensors, where, encoder.config)
    encoder.load_state_dict(ours)
    return ignored


def import_stage(encoder: StageEncoder, decoder: StageDecoder, tensors: Mapping[str, Tensor], where: str) -> bool:
    """Set an encoder of some stages from a published checkpoint, and its decoder where the checkpoint has it.

    The checkpoint's decoders read the last stage, in the width of the released code: a decoder of an earlier stage, of
    several, or of other outputs, stays as it is.

    Args:
        encoder: all of whose tensors are set.
        decoder: of one or more of the checkpoint's modalities.
        tensors: what `published.read_checkpoint` gave.
        where: the checkpoint, for messages.

    Returns:
        Whether the decoder was set.

    Raises:
        BadCheckpoint: the encoder does not fit; see `import_encoder`.
    """
    whole = ConvNextEncoder(encoder.config.encoder)
    import_encoder(whole, tensors, where)
    encoder.take(whole)
    wanted = decoder.decoder.state_dict()
    given = {_our_name(name).removeprefix("decoder."): tensor for name, tensor in tensors.items()}
    fits = encoder.config.stages == (STAGES,) and all(
        name in given and given[name].shape == tensor.shape for name, tensor in wanted.items()
    )
    if fits:
        decoder.decoder.load_state_dict({name: given[name] for name in wanted})
    return fits


def mmearth_tensors(model: MpMae) -> dict[str, Tensor]:
    """A model's tensors by the names and in the shapes of the published checkpoints; `import_pretraining` reads them.

    Each decoder is written with its own weights: MMEarth's code would make them one again, the last of them.
    """
    named = {}
    for name, tensor in model.state_dict().items():
        theirs = _their_name(name)
        named[theirs] = _sparse(theirs, tensor.detach()).contiguous().clone()
    return named


def _renamed(theirs: Mapping[str, Tensor], name_of: Callable[[str], str], where: str) -> dict[str, Tensor]:
    """Dense tensors by our names.

    Raises:
        BadCheckpoint: two of theirs are one of ours, or a kernel is of no square.
    """
    ours: dict[str, Tensor] = {}
    for name, tensor in theirs.items():
        if name_of(name) in ours:
            raise BadCheckpoint(f"{where}: {name} is there under two names; give one of MMEarth's checkpoints")
        ours[name_of(name)] = _dense(name, tensor, where)
    return ours


def _our_name(theirs: str) -> str:
    if theirs == _LOG_VARS:
        return "weighting.log_vars"
    if theirs.startswith(_ENCODER):
        return _ENCODER + _dense_name(theirs.removeprefix(_ENCODER))
    part, _, rest = theirs.partition(".")
    if part == "decoder_dict":  # decoder_dict.<modality>.0.<name>: the first and only block
        modality, number, rest = (*rest.split(".", 2), "", "")[:3]
        return f"decoder.blocks.{modality}.{rest}" if number == "0" else theirs
    ours = {"pred_dict": "heads.", "layer_norm_tmp": "image_norm.", "proj": "proj.", "mask_token": "mask_token"}
    return f"decoder.{ours[part]}{rest}" if part in ours else theirs


def _their_name(ours: str) -> str:
    if ours == "weighting.log_vars":
        return _LOG_VARS
    part, _, rest = ours.partition(".")
    if part == "decoder":
        part, _, rest = rest.partition(".")
        if part == "blocks":
            modality, _, rest = rest.partition(".")
            return f"decoder_dict.{modality}.0.{rest}"
        theirs = {"heads": "pred_dict.", "image_norm": "layer_norm_tmp."}
        return f"{theirs.get(part, f'{part}.' if rest else part)}{rest}"
    *_, layer, last = rest.split(".")
    head = rest.rpartition(".")[0]
    if layer == "grn":
        return ours
    if layer.startswith("pwconv"):
        return f"{_ENCODER}{head}.linear.{last}"
    if _is_norm(head):
        return f"{_ENCODER}{head}.ln.{last}"
    return f"{_ENCODER}{head}.{'kernel' if last == 'weight' else last}"


def _is_norm(layer: str) -> bool:
    """Whether a layer of the encoder is a LayerNorm."""
    return layer in {"initial_conv.1", "stem.1"} or layer.endswith(".norm") or _DOWN_NORM.fullmatch(layer) is not None


def _dense_name(theirs: str) -> str:
    """A tensor's name in the dense encoder."""
    head, _, last = theirs.rpartition(".")
    if last == "kernel":
        return f"{head}.weight"
    return f"{head.removesuffix('.ln').removesuffix('.linear')}.{last}"


def _dense(theirs: str, tensor: Tensor, where: str) -> Tensor:
    """A sparse encoder's tensor as the dense one has it; others as they are."""
    last = theirs.rpartition(".")[2]
    if last == "kernel":
        side = math.isqrt(tensor.shape[0]) if tensor.ndim in {2, 3} else 0
        if not side or side**2 != tensor.shape[0]:
            raise BadCheckpoint(f"{where}: {theirs} is {tuple(tensor.shape)}, no square kernel")
        grid = tensor.reshape(side, side, *tensor.shape[1:])  # column, row, channels
        dense = grid.permute(3, 2, 1, 0) if tensor.ndim == 3 else grid.permute(2, 1, 0)[:, None]
        return dense.contiguous()
    if tensor.ndim == 2 and tensor.shape[0] == 1:
        if last == "bias":
            return tensor[0]
        if last in {"gamma", "beta"}:
            return tensor[None, None]
    return tensor


def _sparse(theirs: str, tensor: Tensor) -> Tensor:
    """A dense encoder's tensor as the sparse one has it; others as they are."""
    last = theirs.rpartition(".")[2]
    if last == "kernel":
        out, within, side, _ = tensor.shape
        if theirs.endswith(("dwconv.kernel", "stem.0.kernel")):
            return tensor[:, 0].permute(2, 1, 0).reshape(side * side, out)
        return tensor.permute(3, 2, 1, 0).reshape(side * side, within, out)
    if not theirs.startswith(_ENCODER):
        return tensor
    if last in {"gamma", "beta"}:
        return tensor[0, 0]
    return tensor[None] if last == "bias" and not theirs.endswith((".ln.bias", ".linear.bias")) else tensor


def _check(
    module: nn.Module,
    given: Mapping[str, Tensor],
    theirs: Mapping[str, Tensor],
    where: str,
    config: ConvNextConfig,
) -> None:
    wanted = module.state_dict()
    for what, names in (
        ("it lacks", sorted(set(wanted) - set(given))),
        ("tensors that the model has not", sorted(set(given) - set(wanted))),
    ):
        if names:
            more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
            raise BadCheckpoint(f"{where}: {what} {', '.join(names[:_NAMED])}{more}; {_hint(theirs, config, where)}")
    for name, tensor in wanted.items():
        if given[name].shape != tensor.shape:
            raise BadCheckpoint(
                f"{where}: {name} is {tuple(given[name].shape)}, the model's is {tuple(tensor.shape)}; "
                f"{_hint(theirs, config, where)}"
            )
        check_numbers(name, given[name], where)


def _hint(theirs: Mapping[str, Tensor], config: ConvNextConfig, where: str) -> str:
    """What the checkpoint is, beside what it was wanted for, and the settings that its folder names."""
    if any("stem_orig" in name for name in theirs):
        return "it has ConvNeXt V2's own stem, as MMEarth's ImageNet baseline does; that is not read"
    first = theirs.get(f"{_ENCODER}initial_conv.0.kernel")
    stem = theirs.get(f"{_ENCODER}stem.0.kernel")
    if first is None or stem is None or first.ndim != 3 or stem.ndim != 2:
        return "give one of MMEarth's pretraining checkpoints"
    try:
        named = parse_folder(PurePath(where).parent.name)
    except InputError:
        settings = ""
    else:
        settings = (
            f"; its folder names model.size {named.size}, model.patch {named.patch}, data.size {named.pixels}, "
            f"inputs {named.inputs} ({len(BANDS[named.inputs])} bands), targets {named.targets}, "
            f"weighting {named.weighting}"
        )
    modalities = sorted({name.split(".")[1] for name in theirs if name.startswith("pred_dict.")})
    return (
        f"the checkpoint has {first.shape[2]} channels first, on {first.shape[1]} bands in patches of "
        f"{8 * math.isqrt(stem.shape[0])}, and predicts {len(modalities)} modalities "
        f"({'with' if _LOG_VARS in theirs else 'without'} log variances), the model has {config.dim} on {config.bands} "
        f"in patches of {config.patch}{settings}"
    )

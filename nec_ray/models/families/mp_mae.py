"""Stages of MP-MAE's ConvNeXt V2; the model is in `nec_ray/models/stages.py`. Its pretraining is `pretext.py`'s."""

import torch

from nec_ray.models.convnext import PATCHES, SIZES, STAGES, ConvNextConfig
from nec_ray.models.family import Begun, Choice, Family
from nec_ray.models.mmearth_weights import import_stage
from nec_ray.models.nec import NeuralEmbeddingCompressor
from nec_ray.models.published import read_checkpoint
from nec_ray.models.stages import FirstStageLayer, StageConfig, StageEncoder


def _begin(choice: Choice, size: int, bands: int, seed: int) -> Begun:
    assert choice.init  # the recipe says so
    tensors = read_checkpoint(choice.init)
    encoder = ConvNextConfig(size=size, patch=choice.patch, bands=bands, **SIZES[choice.size])
    config = StageConfig(encoder, tuple(choice.stages or [STAGES]))
    torch.manual_seed(seed)
    model = NeuralEmbeddingCompressor.mp_mae(
        config, choice.layers, transformed=choice.step is not None, entropy=choice.entropy
    )
    decoder = import_stage(model.encoder, model.decoder, tensors, choice.init)  # type: ignore[arg-type]
    with_decoder = " and optical decoder" if decoder else ", with a new decoder"
    return Begun(model, not decoder, f"weights of {choice.init}: encoder{with_decoder}")


def _check(choice: Choice) -> None:
    if choice.patch not in PATCHES:
        raise ValueError(f"model.patch {choice.patch}: mp_mae has 8, 16 or 32")
    if choice.depth:
        raise ValueError("model.depth is for model.family mae_vit; mp_mae's is that of its size")
    if choice.stages and sorted(set(choice.stages), reverse=True) != list(choice.stages):
        raise ValueError(f"model.stages {choice.stages}: each once, coarse first, such as [4, 3]")
    if choice.step and len(choice.stages or []) > 1:
        raise ValueError("model.step is for one grid scale; leave it out, or give one of model.stages")


def _widths(choice: Choice) -> list[int]:
    return [SIZES[choice.size]["dim"] << (stage - 1) for stage in choice.stages or [STAGES]]


FAMILY = Family(
    noun="stages of MP-MAE",
    sizes=tuple(SIZES),
    config=StageConfig.of_architecture,
    encoder=StageEncoder,
    first_layer=FirstStageLayer,
    begin=_begin,
    check=_check,
    widths=_widths,
)

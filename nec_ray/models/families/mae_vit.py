"""Masked autoencoders on vision transformers; the model is in `nec_ray/models/mae.py`."""

import torch

from nec_ray.models.family import Begun, Choice, Family
from nec_ray.models.mae import SIZES, FirstDecoderLayer, MaeConfig, MaeEncoder
from nec_ray.models.nec import NeuralEmbeddingCompressor
from nec_ray.models.published import import_weights, published_tensors, read_checkpoint


def _begin(choice: Choice, size: int, bands: int, seed: int) -> Begun:
    sizes = SIZES[choice.size] | ({"depth": choice.depth} if choice.depth else {})
    config = MaeConfig(size=size, patch=choice.patch, bands=bands, **sizes)
    torch.manual_seed(seed)
    model = NeuralEmbeddingCompressor.mae(
        config, choice.layers, transformed=choice.step is not None, entropy=choice.entropy
    )
    if not choice.init:
        return Begun(model, False, "random weights")
    tensors = read_checkpoint(choice.init)
    found = import_weights(model.encoder, model.decoder, tensors, choice.init)  # type: ignore[arg-type]
    line = f"weights of {choice.init}: encoder{' and decoder' if found.decoder else ', with a new decoder'}"
    if found.resized_from:
        line += f", positions interpolated from {found.resized_from} to {config.side} tokens a side"
    return Begun(model, not found.decoder, line)


def _check(choice: Choice) -> None:
    if choice.stages:
        raise ValueError("model.stages is for model.family mp_mae")


FAMILY = Family(
    noun="a MAE ViT",
    sizes=tuple(SIZES),
    config=lambda sizes: MaeConfig(**sizes),
    encoder=MaeEncoder,
    first_layer=FirstDecoderLayer,
    begin=_begin,
    check=_check,
    weights=published_tensors,
    widths=lambda choice: [SIZES[choice.size]["dim"]],
)

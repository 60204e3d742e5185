"""A training step's parts: gradients of a batch, the learning rate, what decays."""

import math
from collections.abc import Mapping
from contextlib import nullcontext
from typing import Any

import torch
from timm.models.vision_transformer import Attention
from torch import Tensor, nn

_DENSITY_LR_SCALE = 10.0
_WRITTEN_OUT_TOKENS = 256


def gradients(
    model: nn.Module,
    inputs: Tensor,
    *,
    mask_ratio: float,
    beta: float | None,
    generator: torch.Generator | None,
    accumulate: int = 1,
    precision: str = "float32",
) -> Tensor:
    """Leave the gradients of a batch's mean loss in the parameters.

    Args:
        model: a `NeuralEmbeddingCompressor`, alone or in DistributedDataParallel, whose workers then exchange
            gradients once.
        inputs: normalised pixels float32 (batch, bands, size, size).
        mask_ratio: see `NeuralEmbeddingCompressor.forward`, like `beta` and `generator`.
        beta: weight of the rate.
        generator: of all that is random.
        accumulate: parts that are computed one after the other; a batch's last part may be smaller.
        precision: of activations, `float32` or `bfloat16`.

    Returns:
        MSE and bits per element, float64 (2,), on the inputs' device.
    """
    found = torch.zeros(2, dtype=torch.float64, device=inputs.device)
    parts = inputs.chunk(accumulate)
    for number, part in enumerate(parts):
        last = number + 1 == len(parts)
        share = len(part) / len(inputs)
        with nullcontext() if last or not hasattr(model, "no_sync") else model.no_sync():  # type: ignore[operator]
            with torch.autocast(inputs.device.type, torch.bfloat16, enabled=precision == "bfloat16"):
                losses = model(part, mask_ratio=mask_ratio, beta=beta, generator=generator)
            (losses.loss * share).backward()
        found += torch.stack([losses.mse.detach(), losses.bits.detach()]).double() * share
    return found


def pretext_gradients(
    model: nn.Module,
    pixels: Tensor,
    targets: Mapping[str, Tensor],
    *,
    mask_ratio: float,
    generator: torch.Generator | None,
    accumulate: int = 1,
    precision: str = "float32",
) -> Tensor:
    """As `gradients`, of an `MpMae`: leave the gradients of a batch's weighted loss in the parameters.

    A part's losses are means over what it has; they count by its samples.

    Args:
        model: an `MpMae`, alone or in DistributedDataParallel.
        pixels: float32 (batch, bands, size, size), NaN where missing.
        targets: see `MpMae.forward`.
        mask_ratio: see there.
        generator: see there.
        accumulate: parts that are computed one after the other.
        precision: of activations, `float32` or `bfloat16`.

    Returns:
        float64 (2, 1 + tasks) on the pixels' device: the weighted loss and each task's, times the share of the batch
        that has something of it, and this share.
    """
    found: list[Tensor] = []
    parts = pixels.chunk(accumulate)
    start = 0
    for number, part in enumerate(parts):
        last = number + 1 == len(parts)
        share = len(part) / len(pixels)
        its = {name: target[start : start + len(part)] for name, target in targets.items()}
        start += len(part)
        with nullcontext() if last or not hasattr(model, "no_sync") else model.no_sync():  # type: ignore[operator]
            with torch.autocast(pixels.device.type, torch.bfloat16, enabled=precision == "bfloat16"):
                losses = model(part, its, mask_ratio=mask_ratio, generator=generator)
            (losses.loss * share).backward()
        values = torch.stack([losses.loss.detach(), *losses.tasks.values()]).double()
        there = ~values.isnan()
        there[0] = True  # a loss that is no number is to be seen
        found.append(torch.stack([torch.where(there, values, 0), there.double()]) * share)
    return torch.stack(found).sum(0)


def choose_attention(model: nn.Module, tokens: int, device: torch.device) -> None:
    """Write timm's attention out, as matrix products and a softmax, where that trains faster.

    On CPUs the backward pass of PyTorch's fused attention takes up to 40 % of a step of few tokens (PyTorch 2.15,
    ViT-Ti, bfloat16: 160 tiles/s with it, 390 without); of many tokens it saves memory.

    Args:
        model: of timm's blocks; any other module is left as it is.
        tokens: of a tile.
        device: on which it is trained.
    """
    for module in model.modules():
        if isinstance(module, Attention):
            module.fused_attn = device.type != "cpu" or tokens > _WRITTEN_OUT_TOKENS


def learning_rate(peak: float, progress: float, warmup: float) -> float:
    """Linear warm-up over the share `warmup` of all steps, then half a cosine to 0."""
    if progress < warmup:
        return peak * progress / warmup
    return peak * 0.5 * (1 + math.cos(math.pi * (progress - warmup) / (1 - warmup)))


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """An optimiser's groups of the trained parameters.

    Biases, norms (GRN's too, whose shapes are those of matrices), tokens and densities do not decay; the densities move
    faster, they start far too wide.
    """
    trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    density = [p for name, p in trained if name.startswith("bottleneck")]
    plain = [
        p
        for name, p in trained
        if (p.ndim < 2 or "token" in name or ".grn." in name) and not name.startswith("bottleneck")
    ]
    taken = {id(p) for p in density + plain}
    decayed = [p for _, p in trained if id(p) not in taken]
    return [
        {"params": decayed, "weight_decay": weight_decay, "lr_scale": 1.0},
        {"params": plain, "weight_decay": 0.0, "lr_scale": 1.0},
        {"params": density, "weight_decay": 0.0, "lr_scale": _DENSITY_LR_SCALE},
    ]

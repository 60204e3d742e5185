"""How a classifier or a U-Net is trained: losses, learning rates by layer and step, frozen parts.

Source: MMEarth, section 5.2 and supplement B, and the settings of its released code (`optim_factory.py`,
`main_finetune.py`, `custom_loss.py` of MMEarth-train).
"""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from nec_ray.evaluate.geobench.encoders import Features
from nec_ray.evaluate.geobench.experiment import Training
from nec_ray.models.segmentation import to_size
from nec_ray.models.unet import UNetDecoder

_EPS = 1e-6
_HEAD_SCALE = 0.001
"""Of the classifier's first weights (released code)."""
_NET = "encoder.net."
Inputs = Callable[[Any], Any]
"""Gives the inputs of samples, by their numbers, on the CPU: an array, or a list of arrays."""
Loss = Callable[[Tensor, Tensor], Tensor]
"""Of logits and targets."""


class Classifier(nn.Module):
    """Logits of mean features: LayerNorm, one linear layer.

    Args:
        encoder: gives mean features; None where these are the input.
        dim: of the features.
        classes: number of classes.
    """

    def __init__(self, encoder: Features | None, dim: int, classes: int) -> None:
        super().__init__()
        self.encoder = encoder
        self.norm = nn.LayerNorm(dim, eps=_EPS)
        self.head = nn.Linear(dim, classes)
        nn.init.trunc_normal_(self.head.weight, std=0.02 * _HEAD_SCALE)
        nn.init.zeros_(self.head.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Logits (batch, classes) of pixels, or of features (batch, dim)."""
        logits: Tensor = self.head(self.norm(x if self.encoder is None else self.encoder(x)))
        return logits


class Segmenter(nn.Module):
    """Logits of every pixel, by MMEarth's U-Net decoder.

    Args:
        encoder: gives feature maps; None where these are the input.
        widths: channels of the maps, the finest first.
        classes: number of classes.
    """

    def __init__(self, encoder: Features | None, widths: tuple[int, ...], classes: int) -> None:
        super().__init__()
        self.encoder = encoder
        self.decoder = UNetDecoder(widths, classes)

    def forward(self, x: Any) -> Tensor:
        """Logits (batch, classes, rows, columns) of pixels, of their size; or of maps, of the finest one's size."""
        if self.encoder is None:
            logits: Tensor = self.decoder(x)
            return logits
        return to_size(self.decoder(self.encoder.maps(x)), x.shape[2:])


Model = Classifier | Segmenter


def class_loss(smoothing: float) -> Loss:
    """Cross entropy; the share `smoothing` of a target is all classes' alike (Szegedy et al. 2016, section 7)."""
    return lambda logits, target: functional.cross_entropy(logits, target, label_smoothing=smoothing)


def labels_loss(smoothing: float) -> Loss:
    """Binary cross entropy of each class, with targets 1 - smoothing and smoothing (released code)."""

    def loss(logits: Tensor, target: Tensor) -> Tensor:
        soft = target.to(logits.dtype) * (1 - 2 * smoothing) + smoothing
        return functional.binary_cross_entropy_with_logits(logits, soft)

    return loss


def layer_groups(model: Model, weight_decay: float, layer_decay: float) -> list[dict[str, Any]]:
    """AdamW's groups of all parameters: `lr_scale` is `layer_decay` to the number of layers behind one.

    Layers of the encoder are those of `Features.layers`; what stands behind it is the last layer, as is what timm
    calls the head of a model. Biases, norms (GRN's too) and tokens do not decay.

    Args:
        model: a `Classifier` or `Segmenter`.
        weight_decay: of the others.
        layer_decay: 0 to 1.
    """
    layers = {} if model.encoder is None else model.encoder.layers()
    last = 1 + max((number for name, number in layers.items() if not name.startswith("head.")), default=-1)
    groups: dict[tuple[int, bool], dict[str, Any]] = {}
    for name, parameter in model.named_parameters():
        layer = min(last, layers.get(name.removeprefix(_NET), last)) if name.startswith(_NET) else last
        decays = _decays(name, parameter)
        how = {"lr_scale": layer_decay ** (last - layer), "weight_decay": weight_decay if decays else 0.0}
        groups.setdefault((layer, decays), {"params": [], **how})["params"].append(parameter)
    return list(groups.values())


def rate_at(step: int, steps: int, settings: Training) -> float:
    """The learning rate of a step: a linear warm-up from 0, then half a cosine from `lr` to `min_lr`."""
    epoch = settings.epochs * step / steps
    if epoch < settings.warmup_epochs:
        return settings.lr * epoch / settings.warmup_epochs
    share = (epoch - settings.warmup_epochs) / max(1, settings.epochs - settings.warmup_epochs)
    return settings.min_lr + (settings.lr - settings.min_lr) * 0.5 * (1 + math.cos(math.pi * share))


def fit(
    model: Model,
    inputs: Inputs,
    target: Tensor,
    loss: Loss,
    settings: Training,
    *,
    trained: list[nn.Module],
    frozen_epochs: int = 0,
    thawed: list[nn.Module] | None = None,
    layer_decay: float = 1.0,
    drop_path: bool = True,
) -> None:
    """Train parts of a model by AdamW; it is left ready to score.

    Args:
        model: a `Classifier` or `Segmenter`, on the device to train on.
        inputs: of samples.
        target: of all samples.
        loss: of logits and targets.
        settings: how.
        trained: what learns; everything else stays as it is.
        frozen_epochs: after so many epochs `thawed` learns too.
        thawed: see there.
        layer_decay: see `layer_groups`.
        drop_path: whether the encoder is in training mode where it learns.
    """
    model.requires_grad_(False)
    for module in [*trained, *([] if frozen_epochs else thawed or [])]:
        module.requires_grad_(True)
    device = next(model.parameters()).device
    optimiser = torch.optim.AdamW(layer_groups(model, settings.weight_decay, layer_decay), lr=settings.lr)
    of_epoch = math.ceil(len(target) / settings.batch)
    step = 0
    for epoch in range(settings.epochs):
        if thawed and epoch == frozen_epochs:
            for module in thawed:
                module.requires_grad_(True)
        _set_mode(model, drop_path=drop_path)
        for chosen in torch.tensor_split(torch.randperm(len(target)), of_epoch):  # alike: no batch of one sample
            rate = rate_at(step, of_epoch * settings.epochs, settings)
            for group in optimiser.param_groups:
                group["lr"] = rate * group["lr_scale"]
            optimiser.zero_grad()
            for part in torch.tensor_split(chosen, math.ceil(len(chosen) / settings.part)):
                value = loss(model(to_device(inputs(part.numpy()), device)), target[part].to(device))
                torch.autograd.backward(value * (len(part) / len(chosen)))
            optimiser.step()
            step += 1
    model.requires_grad_(False).eval()


def to_device(found: Any, device: torch.device) -> Any:
    """An array as a tensor on a device; a list of arrays as a list of them."""
    if isinstance(found, list):
        return [to_device(one, device) for one in found]
    return torch.from_numpy(np.ascontiguousarray(found)).to(device)


def _set_mode(model: Model, *, drop_path: bool) -> None:
    """Training mode, except for an encoder that is frozen or whose blocks are all to be kept."""
    model.train()
    encoder = model.encoder
    if encoder is not None and not (drop_path and any(p.requires_grad for p in encoder.parameters())):
        encoder.eval()


def _decays(name: str, parameter: Tensor) -> bool:
    return parameter.ndim >= 2 and not name.endswith(("_token", "pos_embed", ".gamma", ".beta", ".latent"))

"""What the training of every head shares: options, the first decoder layer, the loop, the order of tiles."""

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from nec_ray.codec import Arrays, joined, parts_of
from nec_ray.errors import BadLabels, InputError
from nec_ray.models.dataset import PulledTiles
from nec_ray.models.head_files import DecoderLayer
from nec_ray.models.heads import TokenHead

Floats = npt.NDArray[np.float32]
Progress = Callable[[int, int], None]
"""Called with the epochs done and the epochs in all."""

_SCORE_BATCH = 512
_WARM_UP = 0.05  # of all steps
_WEIGHT_DECAY = 0.05
_FIRST = "first_layer."


@dataclass(frozen=True)
class Front:
    """What stands before a head: how tokens reach it."""

    decoder_layer: DecoderLayer = "none"
    layer: nn.Module | None = None
    """The codec's first decoder layer, float32 (tiles, tokens, channels) -> (tiles, tokens, width)."""
    medians: Floats | None = None
    """(channels,) of the whole embedding: those beyond a prefix of layers stand for what it leaves out."""

    def check(self, layers: int | None = None) -> None:
        """Check that the parts fit each other, and the number of `layers` that is pulled.

        Raises:
            InputError: they do not.
        """
        if self.decoder_layer not in {"none", "frozen", "trained"}:
            raise InputError(f"decoder layer {self.decoder_layer!r}: use none, frozen or trained")
        if self.decoder_layer != "none" and self.layer is None:
            raise InputError(f"decoder layer {self.decoder_layer}: this archive's codec brings none; use none")
        if self.decoder_layer != "none" and layers is not None and self.medians is None:
            raise InputError("the decoder layer reads whole embeddings: give the codec's medians, or leave out layers")

    def parts(self, sample: torch.Tensor) -> tuple[int, nn.Module | None, torch.Tensor | None]:
        """Channels of the features, a copy of the layer, and its padding, for embeddings like `sample`.

        Args:
            sample: float32 (tiles, tokens, channels), on the device to train on.
        """
        if self.layer is None or self.decoder_layer == "none":
            return sample.shape[2], None, None
        layer = copy.deepcopy(self.layer).to(sample.device).requires_grad_(self.decoder_layer == "trained")
        padding = None
        if self.medians is not None and len(self.medians) > sample.shape[2]:
            padding = torch.tensor(self.medians[sample.shape[2] :], device=sample.device)
        probe = TokenHead(sample.shape[2], layer, padding)
        with torch.no_grad():
            return probe.features(sample[:1]).shape[2], layer, padding


def device() -> torch.device:
    """Where heads are trained."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def fit(
    head: TokenHead,
    embeddings: Arrays,
    loss: Callable[[Any, torch.Tensor], torch.Tensor],
    *,
    epochs: int,
    batch: int,
    learning_rate: float,
    decay: Callable[[float], float],
    progress: Progress | None,
    first_layer_rate: float | None = None,
    score_batch: int = _SCORE_BATCH,
) -> None:
    """Train a head by AdamW; it is left ready to score.

    Features are computed once where no layer before the head is trained.

    Args:
        head: on the device to train on.
        embeddings: float32 (tiles, tokens, channels); for a head that reads several grid scales a tuple of such.
        loss: of features (batch, tokens, channels), or such a tuple, and the numbers of their tiles int64 (batch,).
        epochs: passes over the tiles.
        batch: tiles a step.
        learning_rate: after a warm-up of 5 % of the steps.
        decay: its factor by the share of the steps after that.
        progress: called after each epoch.
        first_layer_rate: learning rate of the layer before the head; `learning_rate` where it is None.
        score_batch: tiles whose features are computed at a time before training.
    """
    inputs = [torch.from_numpy(part) for part in parts_of(embeddings)]
    tiles, where = len(inputs[0]), head.mean.device
    with torch.no_grad():
        # Tokens of a trained layer move while it trains; their scale at the start is near enough.
        some = [slice(start, start + score_batch) for start in range(0, tiles, score_batch)]
        found = [parts_of(head.features(joined(part[one].to(where) for part in inputs))) for one in some]
        features = [torch.cat(scale) for scale in zip(*found, strict=True)]
    head.fit_scale(joined(features))
    moves = head.first_layer is not None and any(p.requires_grad for p in head.first_layer.parameters())
    data = inputs if moves else features
    steps = epochs * math.ceil(tiles / batch)
    optimiser = torch.optim.AdamW(_groups(head, learning_rate, first_layer_rate or learning_rate))
    schedule = torch.optim.lr_scheduler.LambdaLR(optimiser, lambda step: _rate(step, steps, decay))
    head.train()
    for epoch in range(epochs):
        for chosen in torch.split(torch.randperm(tiles), batch):
            x = joined(part[chosen.to(part.device)].to(where) for part in data)
            value = loss(head.features(x) if moves else x, chosen)
            optimiser.zero_grad()
            torch.autograd.backward(value)
            optimiser.step()
            schedule.step()
        if progress:
            progress(epoch + 1, epochs)
    head.eval()


def cosine(share: float) -> float:
    """Half a cosine from 1 to 0."""
    return 0.5 * (1 + math.cos(math.pi * share))


def poly(share: float) -> float:
    """A polynomial of power 1 from 1 to 0, as the segmentation recipes of RVSA and NEC have it."""
    return 1 - share


def choose_epochs(tiles: int, batch: int, steps: int, bounds: tuple[int, int]) -> int:
    """As many epochs as give at least `steps` steps, within bounds."""
    fewest, most = bounds
    return max(fewest, min(most, math.ceil(steps / math.ceil(tiles / batch))))


def align(where: str, pull: PulledTiles, tile_ids: Sequence[str]) -> npt.NDArray[np.int64]:
    """Where each labelled tile is in the pull.

    Raises:
        BadLabels: the archive lacks one.
    """
    place = {name: i for i, name in enumerate(pull.tile_ids)}
    missing = [name for name in tile_ids if name not in place]
    if missing:
        raise BadLabels(
            f"{where}: {len(missing)} labelled tiles are not there, such as {missing[0]}; read labels again"
        )
    return np.array([place[name] for name in tile_ids], np.int64)


def _groups(head: nn.Module, rate: float, first_layer_rate: float) -> list[dict[str, Any]]:
    """Weights decay; biases, normalisations and the query do not."""
    groups = []
    for first, lr in ((False, rate), (True, first_layer_rate)):
        trained = [
            (name, p) for name, p in head.named_parameters() if p.requires_grad and name.startswith(_FIRST) == first
        ]
        kept = [p for name, p in trained if p.ndim < 2 or name.endswith("latent")]
        decayed = [p for name, p in trained if not (p.ndim < 2 or name.endswith("latent"))]
        groups.append({"params": decayed, "weight_decay": _WEIGHT_DECAY, "lr": lr})
        groups.append({"params": kept, "weight_decay": 0.0, "lr": lr})
    return [group for group in groups if group["params"]]


def _rate(step: int, steps: int, decay: Callable[[float], float]) -> float:
    """Linear warm-up, then the decay to 0."""
    warm = max(1, round(_WARM_UP * steps))
    if step < warm:
        return (step + 1) / warm
    return decay((step - warm) / max(1, steps - warm))

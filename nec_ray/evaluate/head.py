"""Trains a classification head on embeddings, and scores it on tiles it has not seen.

Source: NEC, section 4 "Scene Classification". The paper takes 400 epochs of batches of 32 on 21 x 100 images;
what is kept is AdamW, its weight decay, the batch, a short warm-up and the cosine, over as many
epochs as few tiles need and many do not. Images cannot be augmented at a consumer who holds only embeddings.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from nec_ray.errors import CodecMismatch, InputError
from nec_ray.evaluate.fitting import Floats, Front, Progress, align, choose_epochs, cosine, device, fit
from nec_ray.evaluate.labels import Labels
from nec_ray.evaluate.metrics import accuracy, confusion_counts
from nec_ray.evaluate.pictures import confusion_matrix
from nec_ray.models.dataset import EmbeddingSource, on_one_grid
from nec_ray.models.head_files import DecoderLayer, save_head
from nec_ray.models.heads import ClassificationHead
from nec_ray.models.threads import one_thread

METRICS_JSON = "metrics.json"
CONFUSION_PNG = "confusion.png"

_BATCH = 32
_STEPS = 1500  # at least, within these epochs, where their number is not given
_EPOCHS = (20, 400)
_LEARNING_RATE = 1e-3
_SCORE_BATCH = 512

Targets = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Scores:
    """How a head did on the test tiles."""

    accuracy: float
    """Share of test tiles whose class is right."""
    balanced_accuracy: float
    """Mean over classes, of those with test tiles, of the share that is right."""
    majority: float
    """Accuracy of always saying the class that is most frequent in training."""
    recall: list[float | None]
    """Share that is right of each class; None where it has no test tile."""
    confusion: list[list[int]]
    """Test tiles by true class (row) and predicted class (column)."""


@dataclass(frozen=True)
class Evaluation:
    """A trained head, its scores, and what it said of each test tile."""

    head: ClassificationHead
    scores: Scores
    predicted: Targets
    """(test tiles,) number of the class."""
    epochs: int


def train_head(
    source: EmbeddingSource,
    labels: Labels,
    out: Path,
    *,
    decoder_layer: DecoderLayer = "none",
    first_layer: nn.Module | None = None,
    medians: Floats | None = None,
    layers: int | None = None,
    epochs: int | None = None,
    seed: int = 0,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Train a head on the labelled tiles of an archive, score it, and write it to a folder.

    Writes head.safetensors, head.json, metrics.json and confusion.png. The same embeddings, labels and seed
    give the same head on one machine.

    Args:
        source: the archive.
        labels: what `read_labels` gave for its tiles.
        out: folder to write to; made where it is not there.
        decoder_layer: whether tokens go through the codec's first decoder layer, and whether that trains on.
        first_layer: that layer, float32 (tiles, tokens, channels) -> (tiles, tokens, width); it is copied.
        medians: float32 (channels,) of the codec; with `first_layer` they stand for the channels that `layers`
            leaves out, and the head keeps them.
        layers: only the first layers of each payload; all where it is None.
        epochs: passes over the training tiles; chosen by their number where it is None.
        seed: of the initial weights and the order of tiles.
        progress: called after each epoch.

    Returns:
        What metrics.json holds: the `Scores`, `classes`, and the numbers of tiles and of bytes pulled a tile.

    Raises:
        InputError: an unknown decoder layer, or options that contradict each other.
        MixedCodecs: the tiles are of several encoders.
        BadLabels: the archive lacks a labelled tile.
    """
    Front(decoder_layer, first_layer, medians).check(layers)
    pull = source.pull(layers=layers, tile_ids=labels.tile_ids)
    embeddings = on_one_grid(pull)
    take = align(source.url, pull, labels.tile_ids)
    train, test = take[~labels.is_test], take[labels.is_test]
    result = evaluate_embeddings(
        embeddings[train],
        labels.target[~labels.is_test],
        embeddings[test],
        labels.target[labels.is_test],
        classes=len(labels.classes),
        decoder_layer=decoder_layer,
        first_layer=first_layer,
        medians=medians,
        epochs=epochs,
        seed=seed,
        progress=progress,
    )
    spec = save_head(
        out,
        result.head,
        classes=labels.classes,
        encoder_id=pull.encoder_id,
        layers=layers,
        decoder_layer=decoder_layer,
        tokens=embeddings.shape[1],
        channels=embeddings.shape[2],
        coded_channels=pull.coded_channels,
    )
    metrics = {
        "task": "classification",
        "accuracy": result.scores.accuracy,
        "balanced_accuracy": result.scores.balanced_accuracy,
        "majority": result.scores.majority,
        "tiles": len(labels),
        "train_tiles": len(train),
        "test_tiles": len(test),
        "unmatched_labels": labels.unmatched,
        "bytes_per_tile": float(pull.n_bytes[take].mean()),
        "classes": labels.classes,
        "recall": result.scores.recall,
        "confusion": result.scores.confusion,
        "encoder_id": spec.encoder_id,
        "decoder_layer": decoder_layer,
        "layers": layers,
        "epochs": result.epochs,
        "seed": seed,
    }
    (out / METRICS_JSON).write_text(json.dumps(metrics, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    confusion_matrix(np.array(result.scores.confusion), labels.classes, out / CONFUSION_PNG)
    return metrics


def evaluate_embeddings(
    train_x: Floats,
    train_y: Targets,
    test_x: Floats,
    test_y: Targets,
    *,
    classes: int | None = None,
    decoder_layer: DecoderLayer = "none",
    first_layer: nn.Module | None = None,
    medians: Floats | None = None,
    epochs: int | None = None,
    seed: int = 0,
    progress: Progress | None = None,
) -> Evaluation:
    """Train a head on embeddings and score it: what makes two encodings of the same tiles comparable.

    Args:
        train_x: float32 (tiles, tokens, channels).
        train_y: int64 (tiles,) classes, 0 and up.
        test_x: float32 (tiles, tokens, channels).
        test_y: int64 (tiles,).
        classes: number of classes; the highest in the targets and one where it is None.
        decoder_layer: see `train_head`.
        first_layer: see `train_head`.
        medians: see `train_head`.
        epochs: see `train_head`.
        seed: see `train_head`.
        progress: see `train_head`.

    Raises:
        InputError: no tiles, shapes that do not fit, or options that contradict each other.
    """
    front = Front(decoder_layer, first_layer, medians)
    front.check()
    _check_shapes(train_x, train_y, test_x, test_y, epochs)
    classes = classes or int(max(train_y.max(), test_y.max())) + 1
    target = torch.from_numpy(train_y).to(device())

    def loss(logits: torch.Tensor, tiles: torch.Tensor) -> torch.Tensor:
        return nn.functional.cross_entropy(logits, target[tiles.to(target.device)])

    head, epochs = fit_classifier(train_x, classes, loss, front, epochs, seed, progress)
    predicted = predict_proba(head, test_x).argmax(axis=1)
    return Evaluation(head, score(test_y, predicted, train_y, classes), predicted, epochs)


def fit_classifier(
    train_x: Floats,
    classes: int,
    loss: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
    front: Front,
    epochs: int | None,
    seed: int,
    progress: Progress | None,
) -> tuple[ClassificationHead, int]:
    """Train a classification head.

    Args:
        train_x: float32 (tiles, tokens, channels).
        classes: number of classes.
        loss: of logits (batch, classes) and the numbers of their tiles int64 (batch,).
        front: what stands before the head.
        epochs: see `train_head`, like all that follow.
        seed: see `train_head`.
        progress: see `train_head`.

    Returns:
        The head, on the CPU, and the epochs that it was trained for.
    """
    epochs = epochs or choose_epochs(len(train_x), _BATCH, _STEPS, _EPOCHS)
    with one_thread(), torch.random.fork_rng():
        torch.manual_seed(seed)
        channels, layer, padding = front.parts(torch.from_numpy(train_x[:1]).to(device()))
        head = ClassificationHead(channels, classes, first_layer=layer, padding=padding).to(device())
        fit(
            head,
            train_x,
            lambda x, tiles: loss(head.score(x), tiles),
            epochs=epochs,
            batch=_BATCH,
            learning_rate=_LEARNING_RATE,
            decay=cosine,
            progress=progress,
        )
    return head.cpu(), epochs


def predict_proba(head: ClassificationHead, embeddings: Floats) -> Floats:
    """Probabilities float32 (tiles, classes) of embeddings (tiles, tokens, channels), in small batches."""
    return torch.from_numpy(predict_logits(head, embeddings)).softmax(dim=1).numpy()


@torch.no_grad()
def predict_logits(head: ClassificationHead, embeddings: Floats) -> Floats:
    """Logits float32 (tiles, classes) of embeddings (tiles, tokens, channels), in small batches."""
    head.eval()
    batches = torch.split(torch.from_numpy(embeddings), _SCORE_BATCH)
    return torch.cat([head(batch.to(head.mean.device)).cpu() for batch in batches]).numpy()


def score(truth: Targets, predicted: Targets, train_y: Targets, classes: int) -> Scores:
    """Scores of predictions int64 (tiles,) against the truth int64 (tiles,)."""
    confusion = confusion_counts(truth, predicted, classes)
    tiles, right = confusion.sum(axis=1), confusion.diagonal()
    recall = [float(r / n) if n else None for r, n in zip(right, tiles, strict=True)]
    most_frequent = np.bincount(train_y, minlength=classes).argmax()
    return Scores(
        accuracy=accuracy(confusion),
        balanced_accuracy=float(np.mean([r for r in recall if r is not None])),
        majority=float(np.mean(truth == most_frequent)),
        recall=recall,
        confusion=confusion.tolist(),
    )


def _check_shapes(train_x: Floats, train_y: Targets, test_x: Floats, test_y: Targets, epochs: int | None) -> None:
    if epochs is not None and epochs < 1:
        raise InputError(f"epochs {epochs}: give 1 or more")
    for name, x, y in (("train", train_x, train_y), ("test", test_x, test_y)):
        if x.ndim != 3 or len(x) != len(y) or not len(x):
            raise InputError(
                f"{name} embeddings {x.shape} and targets {y.shape}: give (tiles, tokens, channels), (tiles,)"
            )
    if train_x.shape[1:] != test_x.shape[1:]:
        raise CodecMismatch(
            f"train embeddings {train_x.shape[1:]} and test embeddings {test_x.shape[1:]} differ in shape"
        )

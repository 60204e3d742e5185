"""Trains a segmentation head on embeddings and masks, and scores it on tiles it has not seen.

Source: NEC, section 4 "Semantic Segmentation". The paper takes 160,000 iterations of AdamW at 6e-5 on Potsdam; what
is kept is AdamW, its weight decay, a warm-up and the polynomial decay, over as many epochs as few tiles need.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from nec_ray.errors import CodecMismatch, InputError
from nec_ray.evaluate.fitting import Floats, Front, Progress, align, choose_epochs, device, fit, poly
from nec_ray.evaluate.mask_pictures import mask_samples
from nec_ray.evaluate.masks import Masks
from nec_ray.evaluate.metrics import accuracy, class_iou, confusion_counts, mean_iou
from nec_ray.evaluate.pictures import confusion_matrix
from nec_ray.models.dataset import EmbeddingSource, on_one_grid
from nec_ray.models.head_files import DecoderLayer, save_head
from nec_ray.models.segmentation import IGNORED, SegmentationHead, segmentation_loss, to_size

METRICS_JSON = "metrics.json"
CONFUSION_PNG = "confusion.png"
SAMPLES_PNG = "samples.png"

_BATCH = 16
_STEPS = 1000  # at least, within these epochs, where their number is not given
_EPOCHS = (10, 100)
_LEARNING_RATE = 1e-3
_LOGITS = 1 << 24  # held at a time while predicting
_SAMPLES = 12

ClassMap = npt.NDArray[np.uint8]


@dataclass(frozen=True)
class SegmentationScores:
    """How a head did on the test tiles, over pixels that are not ignored."""

    accuracy: float
    """Overall: share of pixels whose class is right."""
    mean_iou: float
    """Mean of `iou` over the classes that have one."""
    majority: float
    """Accuracy of always saying the class that is most frequent in training."""
    iou: list[float | None]
    """Intersection over union of each class; None where it is neither true nor predicted anywhere."""
    confusion: list[list[int]]
    """Test pixels by true class (row) and predicted class (column)."""


@dataclass(frozen=True)
class SegmentationResult:
    """A trained head, its scores, and what it said of the test tiles."""

    head: SegmentationHead
    scores: SegmentationScores
    predicted: ClassMap
    """uint8 (test tiles, rows, columns) number of the class, of the masks' size."""
    epochs: int


def train_segmentation_head(
    source: EmbeddingSource,
    masks: Masks,
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
    """Train a segmentation head on the tiles of an archive that have masks, score it, and write it to a folder.

    Writes head.safetensors, head.json, metrics.json, confusion.png and samples.png. The same embeddings, masks and
    seed give the same head on one machine.

    Args:
        source: the archive.
        masks: what `read_masks` gave for its tiles.
        out: folder to write to; made where it is not there.
        decoder_layer: see `train_head`, like all that follow.
        first_layer: see `train_head`.
        medians: see `train_head`.
        layers: see `train_head`.
        epochs: see `train_head`.
        seed: see `train_head`.
        progress: see `train_head`.

    Returns:
        What metrics.json holds: the `SegmentationScores`, `classes`, and the numbers of tiles and of bytes pulled a
        tile.

    Raises:
        InputError: an unknown decoder layer, or options that contradict each other.
        MixedCodecs: the tiles are of several encoders.
        BadLabels: the archive lacks a tile that has a mask.
    """
    Front(decoder_layer, first_layer, medians).check(layers)
    pull = source.pull(layers=layers, tile_ids=masks.tile_ids)
    embeddings = on_one_grid(pull)
    take = align(source.url, pull, masks.tile_ids)
    train, test = take[~masks.is_test], take[masks.is_test]
    result = evaluate_segmentation(
        embeddings[train],
        masks.masks[~masks.is_test],
        embeddings[test],
        masks.masks[masks.is_test],
        grid=pull.grid,
        classes=len(masks.classes),
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
        classes=masks.classes,
        colours=masks.colours,
        encoder_id=pull.encoder_id,
        layers=layers,
        decoder_layer=decoder_layer,
        tokens=embeddings.shape[1],
        channels=embeddings.shape[2],
    )
    scores = result.scores
    metrics = {
        "task": "segmentation",
        "accuracy": scores.accuracy,
        "mean_iou": scores.mean_iou,
        "majority": scores.majority,
        "tiles": len(masks),
        "train_tiles": len(train),
        "test_tiles": len(test),
        "unmatched_labels": masks.unmatched,
        "mask_size": list(masks.masks.shape[1:]),
        "bytes_per_tile": float(pull.n_bytes[take].mean()),
        "classes": masks.classes,
        "iou": scores.iou,
        "confusion": scores.confusion,
        "encoder_id": spec.encoder_id,
        "decoder_layer": decoder_layer,
        "layers": layers,
        "epochs": result.epochs,
        "seed": seed,
    }
    (out / METRICS_JSON).write_text(json.dumps(metrics, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    confusion_matrix(
        np.array(scores.confusion),
        masks.classes,
        out / CONFUSION_PNG,
        title=f"{scores.accuracy:.1%} of the test pixels right, mean IoU {scores.mean_iou:.1%}",
        percent=True,
    )
    some = np.linspace(0, len(test) - 1, min(_SAMPLES, len(test))).round().astype(int)
    truth = masks.masks[masks.is_test][some]
    mask_samples(truth, result.predicted[some], masks.classes, masks.colours, out / SAMPLES_PNG)
    return metrics


def evaluate_segmentation(
    train_x: Floats,
    train_y: ClassMap,
    test_x: Floats,
    test_y: ClassMap,
    *,
    grid: tuple[int, int],
    classes: int | None = None,
    decoder_layer: DecoderLayer = "none",
    first_layer: nn.Module | None = None,
    medians: Floats | None = None,
    epochs: int | None = None,
    seed: int = 0,
    progress: Progress | None = None,
) -> SegmentationResult:
    """Train a segmentation head on embeddings and score it: what makes two encodings of the same tiles comparable.

    Args:
        train_x: float32 (tiles, tokens, channels).
        train_y: uint8 (tiles, rows, columns) class numbers from 0, or `IGNORED`; each tile has a pixel of a class.
        test_x: float32 (tiles, tokens, channels).
        test_y: uint8 (tiles, rows, columns).
        grid: token rows and columns.
        classes: number of classes; the highest in the masks and one where it is None.
        decoder_layer: see `train_head`, like all that follow.
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
    _check_shapes(train_x, train_y, test_x, test_y, grid, epochs)
    classes = classes or 1 + int(max(y[y != IGNORED].max() for y in (train_y, test_y)))
    epochs = epochs or choose_epochs(len(train_x), _BATCH, _STEPS, _EPOCHS)
    masks = torch.from_numpy(train_y)
    # Convolutions are worth all cores; torch shares them out the same way in every run on a machine.
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        channels, layer, padding = front.parts(torch.from_numpy(train_x[:1]).to(device()))
        head = SegmentationHead(channels, classes, grid, first_layer=layer, padding=padding).to(device())

        def loss(x: torch.Tensor, tiles: torch.Tensor) -> torch.Tensor:
            return segmentation_loss(*head.score_both(x), masks[tiles].to(x.device).long())

        fit(
            head,
            train_x,
            loss,
            epochs=epochs,
            batch=_BATCH,
            learning_rate=_LEARNING_RATE,
            decay=poly,
            progress=progress,
        )
    shape = (test_y.shape[1], test_y.shape[2])
    predicted = np.concatenate(list(predict_classes(head, test_x, shape)))
    return SegmentationResult(head.cpu(), score_segmentation(test_y, predicted, train_y, classes), predicted, epochs)


@torch.no_grad()
def predict_classes(
    head: SegmentationHead, embeddings: Floats, size: tuple[int, int] | None = None
) -> Iterator[ClassMap]:
    """Class numbers uint8 (some tiles, rows, columns) of embeddings (tiles, tokens, channels), in small batches.

    Args:
        head: a trained head.
        embeddings: float32.
        size: rows and columns wanted, to which logits are brought bilinearly; the head's own, `UPSAMPLING` a token,
            where it is None.
    """
    head.eval()
    rows, cols = size or (4 * head.grid[0], 4 * head.grid[1])
    batch = max(1, min(_BATCH, _LOGITS // (head.classes * max(rows * cols, 16 * head.grid[0] * head.grid[1]))))
    for x in torch.split(torch.from_numpy(embeddings), batch):
        logits = to_size(head(x.to(head.mean.device)), (rows, cols))
        yield logits.argmax(dim=1).to(torch.uint8).cpu().numpy()


def score_segmentation(truth: ClassMap, predicted: ClassMap, train_y: ClassMap, classes: int) -> SegmentationScores:
    """Scores of predictions uint8 (tiles, rows, columns) against the truth, over pixels that are not `IGNORED`.

    Args:
        truth: class numbers of the test tiles.
        predicted: of the same shape.
        train_y: class numbers of the tiles trained on, for the majority.
        classes: number of classes.
    """
    confusion = np.zeros((classes, classes), np.int64)
    for mask, said in zip(truth, predicted, strict=True):  # tile by tile: int64 of all pixels would be eight masks
        counts = mask != IGNORED
        if counts.any():
            confusion += confusion_counts(mask[counts], said[counts], classes)
    most_frequent = np.bincount(train_y.ravel(), minlength=256)[:classes].argmax()
    return SegmentationScores(
        accuracy=accuracy(confusion),
        mean_iou=mean_iou(confusion),
        majority=float(confusion[most_frequent].sum() / confusion.sum()),
        iou=class_iou(confusion),
        confusion=confusion.tolist(),
    )


def _check_shapes(
    train_x: Floats,
    train_y: ClassMap,
    test_x: Floats,
    test_y: ClassMap,
    grid: tuple[int, int],
    epochs: int | None,
) -> None:
    if epochs is not None and epochs < 1:
        raise InputError(f"epochs {epochs}: give 1 or more")
    for name, x, y in (("train", train_x, train_y), ("test", test_x, test_y)):
        if x.ndim != 3 or y.ndim != 3 or len(x) != len(y) or not len(x):
            raise InputError(
                f"{name} embeddings {x.shape} and masks {y.shape}: give (tiles, tokens, channels), (tiles, rows, cols)"
            )
    if train_x.shape[1:] != test_x.shape[1:] or train_y.shape[1:] != test_y.shape[1:]:
        raise CodecMismatch(f"train and test tiles differ in shape: {train_x.shape[1:]} and {test_x.shape[1:]}")
    if grid[0] * grid[1] != train_x.shape[1] or train_x.shape[1] < 2:
        raise InputError(
            f"{train_x.shape[1]} tokens on a grid of {grid[0]} x {grid[1]}: segmentation needs one token for each "
            "place of a grid, and two or more"
        )

"""Trains a segmentation head on embeddings and masks, and scores it on tiles it has not seen.

Source: NEC, section 4 "Semantic Segmentation". The paper takes 160,000 iterations of AdamW at 6e-5 on Potsdam; what
is kept is AdamW, its weight decay, a warm-up and the polynomial decay, over as many epochs as few tiles need.
"""

import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from nec_ray.codec import Arrays, joined, of_tiles, parts_of
from nec_ray.errors import CodecMismatch, InputError
from nec_ray.evaluate.fitting import Floats, Front, Progress, align, choose_epochs, device, fit, poly
from nec_ray.evaluate.mask_pictures import mask_samples
from nec_ray.evaluate.masks import Masks
from nec_ray.evaluate.metrics import accuracy, class_iou, confusion_counts, mean_iou
from nec_ray.evaluate.pictures import confusion_matrix
from nec_ray.models.dataset import EmbeddingSource, on_finest
from nec_ray.models.head_files import DecoderLayer, save_head
from nec_ray.models.heads import Tokens
from nec_ray.models.segmentation import IGNORED, PixelHead, SegmentationDecoder, SegmentationHead, to_size
from nec_ray.models.unet import Grid, UNetHead

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

    head: PixelHead
    scores: SegmentationScores
    predicted: ClassMap
    """uint8 (test tiles, rows, columns) number of the class, of the masks' size."""
    epochs: int


def train_segmentation_head(
    source: EmbeddingSource,
    masks: Masks,
    out: Path,
    *,
    decoder: SegmentationDecoder | None = None,
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
        decoder: `nec`, the paper's, which reads several grid scales on the finest one, or `unet`, which reads each as
            it is; where it is None a U-Net for several grid scales without a decoder layer, otherwise the paper's.
        decoder_layer: see `train_head`, like all that follow.
        first_layer: see `train_head`.
        medians: see `train_head`.
        layers: see `train_head`.
        epochs: see `train_head`.
        seed: see `train_head`.
        progress: see `train_head`.

    Returns:
        What metrics.json holds: the `SegmentationScores`, `classes`, `decoder`, and the numbers of tiles and of bytes
        pulled a tile.

    Raises:
        InputError: an unknown decoder or decoder layer, or options that contradict each other.
        MixedCodecs: the tiles are of several encoders.
        BadLabels: the archive lacks a tile that has a mask.
    """
    Front(decoder_layer, first_layer, medians).check(layers)
    check_decoder(decoder, decoder_layer)
    pull = source.pull(layers=layers, tile_ids=masks.tile_ids)
    take = align(source.url, pull, masks.tile_ids)
    train, test = take[~masks.is_test], take[masks.is_test]
    result = evaluate_segmentation(
        of_tiles(pull.embeddings, train),
        masks.masks[~masks.is_test],
        of_tiles(pull.embeddings, test),
        masks.masks[masks.is_test],
        grid=pull.grid,
        grids=pull.grids,
        decoder=decoder,
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
        tokens=math.prod(pull.grid),
        channels=sum(part.shape[2] for part in parts_of(pull.embeddings)),
        coded_channels=pull.coded_channels,
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
        "decoder": "unet" if spec.scales else "nec",
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


def check_decoder(decoder: SegmentationDecoder | None, decoder_layer: DecoderLayer) -> None:
    """Check that there is such a decoder, and that it goes with a decoder layer.

    Raises:
        InputError: it does not.
    """
    if decoder not in {None, *get_args(SegmentationDecoder)}:
        raise InputError(f"decoder {decoder!r}: use nec or unet")
    if decoder == "unet" and decoder_layer != "none":
        raise InputError(
            f"decoder layer {decoder_layer} puts all tokens on one grid, a U-Net reads each grid scale as it is; use "
            "decoder nec, or no decoder layer"
        )


def evaluate_segmentation(
    train_x: Arrays,
    train_y: ClassMap,
    test_x: Arrays,
    test_y: ClassMap,
    *,
    grid: Grid,
    grids: Sequence[Grid] | None = None,
    decoder: SegmentationDecoder | None = None,
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
        train_x: float32 (tiles, tokens, channels); of several grid scales a tuple of one such array a scale.
        train_y: uint8 (tiles, rows, columns) class numbers from 0, or `IGNORED`; each tile has a pixel of a class.
        test_x: as `train_x`.
        test_y: uint8 (tiles, rows, columns).
        grid: token rows and columns; of several grid scales those of the finest.
        grids: of each scale; `grid` alone where it is None.
        decoder: see `train_segmentation_head`.
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
    check_decoder(decoder, decoder_layer)
    grids = list(grids or [grid])
    _check_shapes(train_x, train_y, test_x, test_y, grids, epochs)
    is_unet = decoder == "unet" or (decoder is None and len(grids) > 1 and decoder_layer == "none")
    if not is_unet:
        train_x, test_x = (on_finest(x, grids) for x in (train_x, test_x))
    classes = classes or 1 + int(max(y[y != IGNORED].max() for y in (train_y, test_y)))
    epochs = epochs or choose_epochs(len(train_y), _BATCH, _STEPS, _EPOCHS)
    masks = torch.from_numpy(train_y)
    # Convolutions are worth all cores; torch shares them out the same way in every run on a machine.
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        head: PixelHead
        if is_unet:
            head = UNetHead([part.shape[2] for part in parts_of(train_x)], classes, grids)
        else:
            channels, layer, padding = front.parts(torch.from_numpy(train_x[:1]).to(device()))
            head = SegmentationHead(channels, classes, grid, first_layer=layer, padding=padding)
        head = head.to(device())

        def loss(x: Tokens, tiles: torch.Tensor) -> torch.Tensor:
            return head.loss(x, masks[tiles].to(head.mean.device).long())

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
def predict_classes(head: PixelHead, embeddings: Arrays, size: tuple[int, int] | None = None) -> Iterator[ClassMap]:
    """Class numbers uint8 (some tiles, rows, columns) of embeddings (tiles, tokens, channels), in small batches.

    Args:
        head: a trained head.
        embeddings: float32; for a U-Net of several grid scales a tuple of one array a scale.
        size: rows and columns wanted, to which logits are brought bilinearly; the head's own, `UPSAMPLING` a token,
            where it is None.
    """
    head.eval()
    size = size or head.size
    batch = max(1, min(_BATCH, _LOGITS // (head.classes * max(math.prod(size), math.prod(head.size)))))
    parts = parts_of(embeddings)
    for start in range(0, len(parts[0]), batch):
        x = joined(torch.from_numpy(part[start : start + batch]).to(head.mean.device) for part in parts)
        logits = to_size(head(x), size)
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
    train_x: Arrays,
    train_y: ClassMap,
    test_x: Arrays,
    test_y: ClassMap,
    grids: Sequence[Grid],
    epochs: int | None,
) -> None:
    if epochs is not None and epochs < 1:
        raise InputError(f"epochs {epochs}: give 1 or more")
    for name, x, y in (("train", train_x, train_y), ("test", test_x, test_y)):
        if y.ndim != 3 or not len(y) or any(part.ndim != 3 or len(part) != len(y) for part in parts_of(x)):
            raise InputError(
                f"{name} embeddings {_shapes(x)} and masks {y.shape}: give (tiles, tokens, channels), (tiles, rows, "
                "cols)"
            )
    train_shapes, test_shapes = ([part.shape[1:] for part in parts_of(x)] for x in (train_x, test_x))
    if train_shapes != test_shapes or train_y.shape[1:] != test_y.shape[1:]:
        raise CodecMismatch(f"train and test tiles differ in shape: {_shapes(train_x)} and {_shapes(test_x)}")
    if len(grids) != len(train_shapes):
        raise InputError(f"{len(train_shapes)} grid scales and {len(grids)} grids: give the grid of each scale")
    for (rows, cols), (tokens, _) in zip(grids, train_shapes, strict=True):
        if rows * cols != tokens or max(map(math.prod, grids)) < 2:
            raise InputError(
                f"{tokens} tokens on a grid of {rows} x {cols}: segmentation needs one token for each place of a "
                "grid, and two or more"
            )


def _shapes(x: Arrays) -> str:
    return " and ".join(str(part.shape) for part in parts_of(x))

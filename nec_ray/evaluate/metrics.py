"""Metrics of GEO-Bench's tasks (MMEarth, section 5.1): accuracy, mean average precision, micro F1, mean IoU.

They are what torchmetrics and scikit-learn compute under these names; MMEarth's code uses the former. A class that has
nothing to be scored on is left out of a mean: such libraries warn, and differ in what they count it as.
"""

from typing import Any

import numpy as np
import numpy.typing as npt

from nec_ray.errors import InputError

Numbers = npt.NDArray[Any]
Flags = npt.NDArray[np.bool_]


def confusion_counts(truth: Numbers, predicted: Numbers, classes: int) -> npt.NDArray[np.int64]:
    """How often each true class (row) was called each class (column).

    Args:
        truth: class numbers, of any integer type and shape.
        predicted: class numbers of the same shape.
        classes: number of classes.

    Returns:
        int64 (classes, classes).

    Raises:
        InputError: the shapes differ, or a number is no class.
    """
    _check_alike(truth, predicted)
    for numbers in (truth, predicted):
        if numbers.size and not 0 <= numbers.min() <= numbers.max() < classes:
            raise InputError(f"class numbers from {numbers.min()} to {numbers.max()}; there are {classes} classes")
    pairs = truth.ravel().astype(np.int64) * classes + predicted.ravel()
    return np.bincount(pairs, minlength=classes * classes).reshape(classes, classes)


def accuracy(confusion: npt.NDArray[np.int64]) -> float:
    """Share of what was scored whose class is right (micro average)."""
    return float(confusion.diagonal().sum() / confusion.sum())


def class_iou(confusion: npt.NDArray[np.int64]) -> list[float | None]:
    """Intersection over union of each class; None where it is neither in the truth nor among the predictions."""
    right = confusion.diagonal()
    union = confusion.sum(axis=0) + confusion.sum(axis=1) - right
    return [float(r / u) if u else None for r, u in zip(right, union, strict=True)]


def mean_iou(confusion: npt.NDArray[np.int64]) -> float:
    """Mean of `class_iou` over the classes that have one (macro average, over the pixels of all tiles together)."""
    return float(np.mean([value for value in class_iou(confusion) if value is not None]))


def average_precision(truth: Flags, scores: npt.NDArray[np.floating[Any]]) -> float | None:
    """Sum over thresholds of the precision times the step in recall, without interpolation; equal scores are one step.

    Args:
        truth: bool (tiles,).
        scores: float (tiles,), higher where the class is thought to be there.

    Returns:
        0 to 1; None where the class is nowhere.

    Raises:
        InputError: the shapes differ, or a score is NaN.
    """
    _check_alike(truth, scores)
    if np.isnan(scores).any():
        raise InputError(f"{int(np.isnan(scores).sum())} of {scores.size} scores are NaN")
    if not truth.any():
        return None
    order = np.argsort(-scores, kind="stable")
    last = np.append(np.flatnonzero(np.diff(scores[order])), len(order) - 1)  # of each run of equal scores
    found = np.cumsum(truth[order])[last]
    steps = np.diff(found, prepend=0) / found[-1]
    return float(np.sum(steps * found / (last + 1)))


def mean_average_precision(truth: Flags, scores: npt.NDArray[np.floating[Any]]) -> float:
    """Mean of `average_precision` over the classes that are somewhere (macro average; MMEarth's mAP).

    Args:
        truth: bool (tiles, classes).
        scores: float (tiles, classes).

    Raises:
        InputError: the shapes differ, a score is NaN, or no tile has any class.
    """
    _check_alike(truth, scores)
    each = [average_precision(truth[:, i], scores[:, i]) for i in range(truth.shape[1])]
    scored = [value for value in each if value is not None]
    if not scored:
        raise InputError(f"none of {len(truth)} tiles has any class; there is nothing to score")
    return float(np.mean(scored))


def micro_f1(truth: Flags, predicted: Flags) -> float:
    """F1 of all tiles' classes together: 2 right / (2 right + missed + wrongly said); 0 where there are none of them.

    Args:
        truth: bool (tiles, classes).
        predicted: bool (tiles, classes).

    Raises:
        InputError: the shapes differ.
    """
    _check_alike(truth, predicted)
    right = int((truth & predicted).sum())
    said_or_true = int(truth.sum()) + int(predicted.sum())
    return 2 * right / said_or_true if said_or_true else 0.0


def _check_alike(truth: Numbers, other: Numbers) -> None:
    if truth.shape != other.shape or not truth.size:
        raise InputError(f"truth {truth.shape} and predictions {other.shape}: give arrays of the same shape, not empty")

"""Metrics against their definitions written out in loops, and against scikit-learn and torchmetrics."""

from fractions import Fraction
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st

from nec_ray.errors import InputError
from nec_ray.evaluate.metrics import (
    accuracy,
    average_precision,
    class_iou,
    confusion_counts,
    mean_average_precision,
    mean_iou,
    micro_f1,
)

SEEDS = st.integers(0, 2**32 - 1)


def drawn(seed: int) -> tuple[npt.NDArray[np.bool_], npt.NDArray[np.bool_], npt.NDArray[np.float32]]:
    """Truth, predictions and scores (tiles, classes); many scores are equal, and some classes are nowhere."""
    rng = np.random.default_rng(seed)
    shape = int(rng.integers(1, 30)), int(rng.integers(1, 6))
    share = rng.choice([0.05, 0.3, 0.9], shape[1])
    scores = rng.integers(0, 8, shape).astype(np.float32) / 8 - 0.3
    return rng.random(shape) < share, scores > 0.1, scores


def brute_force_ap(truth: list[bool], scores: list[float]) -> Fraction | None:
    """The area under the steps of the precision-recall curve, one threshold after the other."""
    if not any(truth):
        return None
    area, before = Fraction(0), Fraction(0)
    for threshold in sorted(set(scores), reverse=True):
        said = [is_there for is_there, score in zip(truth, scores, strict=True) if score >= threshold]
        recall, precision = Fraction(sum(said), sum(truth)), Fraction(sum(said), len(said))
        area += (recall - before) * precision
        before = recall
    return area


@given(SEEDS)
def test_average_precision_is_the_area_under_the_steps(seed: int) -> None:
    truth, _, scores = drawn(seed)
    expected = [brute_force_ap(truth[:, i].tolist(), scores[:, i].tolist()) for i in range(truth.shape[1])]
    for i, area in enumerate(expected):
        found = average_precision(truth[:, i], scores[:, i])
        assert found is None if area is None else found == pytest.approx(float(area))
    some = [float(area) for area in expected if area is not None]
    if some:
        assert mean_average_precision(truth, scores) == pytest.approx(sum(some) / len(some))
    else:
        with pytest.raises(InputError, match=r"none of \d+ tiles has any class"):
            mean_average_precision(truth, scores)


def test_average_precision_of_published_examples() -> None:
    """Those of scikit-learn's and torchmetrics' documentation."""
    truth, scores = np.array([0, 0, 1, 1], bool), np.array([0.1, 0.4, 0.35, 0.8])
    assert average_precision(truth, scores) == pytest.approx(0.8333, abs=1e-4)
    scores = np.array([[0.75, 0.05, 0.35], [0.45, 0.75, 0.05], [0.05, 0.55, 0.75], [0.05, 0.65, 0.05]])
    truth = np.array([[1, 0, 1], [0, 0, 0], [0, 1, 1], [1, 1, 1]], bool)
    assert mean_average_precision(truth, scores) == pytest.approx(0.7500, abs=1e-4)


@given(SEEDS)
def test_micro_f1_is_the_harmonic_mean_of_precision_and_recall(seed: int) -> None:
    truth, predicted, _ = drawn(seed)
    pairs = list(zip(truth.ravel().tolist(), predicted.ravel().tolist(), strict=True))
    right, said, there = (sum(map(test, pairs)) for test in (all, lambda pair: pair[1], lambda pair: pair[0]))
    found = micro_f1(truth, predicted)
    if not right:
        assert found == 0
        return
    precision, recall = Fraction(right, said), Fraction(right, there)
    assert found == pytest.approx(float(2 * precision * recall / (precision + recall)))


@given(SEEDS)
def test_iou_and_accuracy_by_sets_of_pixels(seed: int) -> None:
    rng = np.random.default_rng(seed)
    classes = int(rng.integers(1, 7))
    truth, predicted = rng.integers(0, rng.integers(1, classes + 1), (2, 3, 4, 5)).astype(
        str(rng.choice(["uint8", "int64"]))
    )
    iou: list[float | None] = []
    for number in range(classes):
        there, said = ({i for i, value in enumerate(mask.ravel()) if value == number} for mask in (truth, predicted))
        iou.append(len(there & said) / len(there | said) if there | said else None)
    confusion = confusion_counts(truth, predicted, classes)
    assert confusion.sum() == truth.size
    assert class_iou(confusion) == pytest.approx(iou)
    some = [value for value in iou if value is not None]
    assert mean_iou(confusion) == pytest.approx(sum(some) / len(some))
    same = sum(a == b for a, b in zip(truth.ravel(), predicted.ravel(), strict=True))
    assert accuracy(confusion) == pytest.approx(same / truth.size)


def test_many_classes_of_a_small_type_do_not_overflow() -> None:
    numbers = np.arange(250, dtype=np.uint8)
    assert np.array_equal(confusion_counts(numbers, numbers[::-1].copy(), 250), np.eye(250, dtype=int)[::-1])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: confusion_counts(np.array([0, 3]), np.array([0, 1]), 3), "class numbers from 0 to 3; there are 3"),
        (lambda: confusion_counts(np.array([0, 1]), np.array([0, -1]), 3), "class numbers from -1 to 0"),
        (lambda: confusion_counts(np.zeros(0, int), np.zeros(0, int), 3), "not empty"),
        (lambda: micro_f1(np.ones((2, 3), bool), np.ones((3, 2), bool)), r"\(2, 3\) and predictions \(3, 2\)"),
        (lambda: average_precision(np.ones(2, bool), np.array([0.1, np.nan])), "1 of 2 scores are NaN"),
        (lambda: mean_average_precision(np.ones((2, 3), bool), np.ones((2, 1))), "give arrays of the same shape"),
    ],
)
def test_what_cannot_be_scored_is_refused(call: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        call()


@given(SEEDS)
def test_metrics_are_those_of_scikit_learn(seed: int) -> None:
    from sklearn import metrics

    truth, predicted, scores = drawn(seed)
    somewhere = truth.any(axis=0)
    if somewhere.any():
        expected = metrics.average_precision_score(truth[:, somewhere], scores[:, somewhere], average="macro")
        assert mean_average_precision(truth, scores) == pytest.approx(expected)
    if truth.any() or predicted.any():
        expected = metrics.f1_score(truth.ravel(), predicted.ravel(), zero_division=0)
        assert micro_f1(truth, predicted) == pytest.approx(expected)
    a, b = np.random.default_rng(seed).integers(0, 4, (2, 40))
    confusion = confusion_counts(a, b, 4)
    assert np.array_equal(confusion, metrics.confusion_matrix(a, b, labels=range(4)))
    assert accuracy(confusion) == pytest.approx(metrics.accuracy_score(a, b))
    assert mean_iou(confusion) == pytest.approx(metrics.jaccard_score(a, b, average="macro"))


@given(SEEDS)
def test_metrics_are_those_of_torchmetrics(seed: int) -> None:
    import torch
    from torchmetrics import functional

    truth, _, scores = drawn(seed)
    scores = scores - scores.min()  # to 0 to 1: outside, torchmetrics takes the sigmoid, which may round two to one
    flags, numbers, count = torch.from_numpy(truth).long(), torch.from_numpy(scores), truth.shape[1]
    somewhere = truth.any(axis=0)
    if somewhere.sum() > 1:
        found = functional.classification.multilabel_average_precision(
            numbers[:, somewhere], flags[:, somewhere], int(somewhere.sum()), average="macro"
        )
        assert mean_average_precision(truth, scores) == pytest.approx(float(found), rel=1e-5)
    if count > 1:
        found = functional.classification.multilabel_f1_score(numbers, flags, count, average="micro")
        assert micro_f1(truth, scores > 0.5) == pytest.approx(float(found), rel=1e-5)
    a, b = np.random.default_rng(seed).integers(0, 3, (2, 40))
    confusion = confusion_counts(a, b, 5)
    pair = torch.from_numpy(b), torch.from_numpy(a)
    assert mean_iou(confusion) == pytest.approx(
        float(functional.jaccard_index(*pair, "multiclass", num_classes=5)), rel=1e-5
    )
    assert accuracy(confusion) == pytest.approx(
        float(functional.accuracy(*pair, "multiclass", num_classes=5)), rel=1e-5
    )

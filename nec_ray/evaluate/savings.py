"""Bytes at equal accuracy: what one curve saves against another, on average over the accuracies that both reach.

Source: Bjontegaard, "Calculation of average PSNR differences between RD-curves", VCEG-M33, 2001, with accuracy in the
place of PSNR, and lines between the points in the place of one cubic: through three or four points that differ by
orders of magnitude in bytes a cubic swings.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

Points = Sequence[tuple[float, float]]
"""Bytes a tile and the score that was reached with them."""
Doubles = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Saving:
    """What a curve's bytes are beside another's."""

    factor: float | None
    """Its bytes divided by the other's, geometric mean over equal scores; None where it cannot be said."""
    low: float | None = None
    """The least of the scores that both reach."""
    high: float | None = None
    """The greatest of them."""
    reason: str | None = None
    """Why it cannot be said."""


def frontier(points: Points) -> tuple[Doubles, Doubles]:
    """Natural logarithms of bytes, and scores, both rising: points that cost more for no better a score are left out.

    Raises:
        ValueError: bytes that are not above 0.
    """
    kept: list[tuple[float, float]] = []
    for n_bytes, score in sorted(points, key=lambda point: (point[0], -point[1])):
        if not kept or score > kept[-1][1]:
            kept.append((math.log(n_bytes), score))
    return np.array([one[0] for one in kept]), np.array([one[1] for one in kept])


def bytes_at(points: Points, score: float) -> float | None:
    """Bytes with which a curve reaches a score, on lines over their logarithm; None beyond its ends."""
    logs, scores = frontier(points)
    if not len(scores) or not scores[0] <= score <= scores[-1]:
        return None
    return math.exp(float(np.interp(score, scores, logs)))


def saving(reference: Points, other: Points) -> Saving:
    """How many times the bytes of `reference` the curve `other` takes at equal scores; a single point at its own."""
    (mine, my_scores), (theirs, their_scores) = frontier(reference), frontier(other)
    if not len(my_scores) or not len(their_scores):
        return Saving(None, reason="not comparable: a curve has no points")
    low, high = max(my_scores[0], their_scores[0]), min(my_scores[-1], their_scores[-1])
    if low > high:
        better = their_scores[0] > my_scores[-1]
        return Saving(None, reason=f"not comparable: it is {'better' if better else 'worse'} at all its rates")
    if low == high and min(len(my_scores), len(their_scores)) > 1:
        return Saving(None, reason="not comparable: the curves share a single score")
    at = np.unique(np.concatenate([[low, high], my_scores, their_scores]))
    at = at[(at >= low) & (at <= high)]
    apart = np.interp(at, their_scores, theirs) - np.interp(at, my_scores, mine)
    if len(at) == 1:
        return Saving(math.exp(float(apart[0])), float(low), float(high))
    area = float(np.sum((apart[1:] + apart[:-1]) / 2 * np.diff(at)))  # exact: both are lines between these scores
    return Saving(math.exp(area / float(high - low)), float(low), float(high))


def savings_rows(summary: Sequence[dict[str, Any]], curves: dict[str, list[str]], reference: str | None) -> list[Any]:
    """Savings of the reference curve against every other one, a row a task, measure and curve.

    `target` is one point (0.01) below the best uncompressed embeddings, `bytes_at_target` what the curve takes for it;
    both are None where there are no such embeddings, or the curve does not reach it.

    Args:
        summary: rows of the largest share of labels, with `method`, `kind`, `task`, `bytes_per_tile` and measures.
        curves: names of each curve's methods.
        reference: the name of a curve; nothing is compared where it is None.
    """
    rows: list[dict[str, Any]] = []
    for task, measure in MEASURES:
        mine = [row for row in summary if row["task"] == task and row[measure] is not None]
        points = {
            curve: [(row["bytes_per_tile"], row[measure]) for row in mine if row["method"] in names]
            for curve, names in curves.items()
        }
        if reference is None or not points.get(reference):
            continue
        whole = [row[measure] for row in mine if row["kind"] == "uncompressed"]
        target = max(whole) - 0.01 if whole else None
        for curve, found in points.items():
            if not found:
                continue
            said = Saving(1.0) if curve == reference else saving(points[reference], found)
            rows.append(
                {
                    "task": task,
                    "measure": measure,
                    "curve": curve,
                    "reference": reference,
                    "factor": said.factor,
                    "low": said.low,
                    "high": said.high,
                    "reason": said.reason,
                    "target": target,
                    "bytes_at_target": None if target is None else cheapest(found, target),
                }
            )
    return rows


def cheapest(points: Points, score: float) -> float | None:
    """Least bytes with which a curve reaches at least a score; None where it does not."""
    logs, scores = frontier(points)
    if not len(scores) or score > scores[-1]:
        return None
    return math.exp(float(logs[0])) if score < scores[0] else bytes_at(points, score)


MEASURES = (
    ("head", "accuracy"),
    ("linear", "accuracy"),
    ("knn", "accuracy"),
    ("retrieval", "recall"),
    ("segmentation", "mean_iou"),
    ("segmentation", "accuracy"),
    ("unet", "mean_iou"),
    ("unet", "accuracy"),
)
"""What tasks are measured by, in the order of pictures."""

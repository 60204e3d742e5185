"""Bytes at equal accuracy, against integrals and inverses that are computed in other ways."""

import math
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nec_ray.evaluate.savings import bytes_at, cheapest, frontier, saving, savings_rows

Curve = list[tuple[float, float]]


def curve(seed: int, low: float, high: float, points: int) -> Curve:
    """Bytes and scores that both rise."""
    rng = np.random.default_rng(seed)
    n_bytes = np.exp(np.cumsum(rng.uniform(0.1, 2, points)))
    scores = np.sort(rng.uniform(low, high, points))
    return list(zip(n_bytes.tolist(), scores.tolist(), strict=True))


def log_bytes(points: Curve, score: float) -> float:
    """By walking along the lines."""
    for (b0, s0), (b1, s1) in pairwise(points):
        if s0 <= score <= s1:
            share = (score - s0) / (s1 - s0)
            return (1 - share) * math.log(b0) + share * math.log(b1)
    raise AssertionError(score)


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 10**6), st.integers(2, 6), st.integers(2, 6))
def test_the_average_is_that_of_many_midpoints(seed: int, n: int, m: int) -> None:
    a, b = curve(seed, 0.2, 0.8, n), curve(seed + 1, 0.3, 0.9, m)
    found = saving(a, b)
    low, high = max(a[0][1], b[0][1]), min(a[-1][1], b[-1][1])
    if low >= high:
        assert found.factor is None
        assert "not comparable" in str(found.reason)
        return
    steps = 20_000
    at = low + (high - low) * (np.arange(steps) + 0.5) / steps
    expected = math.exp(float(np.mean([log_bytes(b, s) - log_bytes(a, s) for s in at[:: max(1, steps // 4000)]])))
    assert found.factor == pytest.approx(expected, rel=5e-3)
    assert (found.low, found.high) == pytest.approx((low, high))
    assert saving(b, a).factor == pytest.approx(1 / expected, rel=5e-3)


def test_curves_that_are_a_constant_factor_apart() -> None:
    a: Curve = [(100, 0.5), (1000, 0.7), (8000, 0.9)]
    assert saving(a, [(4 * n, s) for n, s in a]).factor == pytest.approx(4)
    assert saving(a, [(800, 0.6)]).factor == pytest.approx(800 / math.sqrt(100 * 1000))


def test_what_does_not_overlap_is_not_compared() -> None:
    a: Curve = [(100, 0.5), (1000, 0.7)]
    better, worse = saving(a, [(100, 0.8), (900, 0.9)]), saving(a, [(100, 0.2), (900, 0.4)])
    assert (better.factor, worse.factor) == (None, None)
    assert "better at all its rates" in str(better.reason)
    assert "worse at all its rates" in str(worse.reason)
    assert "share a single score" in str(saving(a, [(10, 0.7), (90, 0.9)]).reason)
    assert saving(a, []).factor is None


def test_points_that_cost_more_for_no_better_a_score_do_not_count() -> None:
    points: Curve = [(100, 0.5), (200, 0.45), (400, 0.6), (400, 0.55), (900, 0.6)]
    logs, scores = frontier(points)
    assert np.exp(logs) == pytest.approx([100, 400])
    assert scores.tolist() == [0.5, 0.6]
    assert bytes_at(points, 0.55) == pytest.approx(200)
    assert bytes_at(points, 0.49) is None
    assert cheapest(points, 0.1) == pytest.approx(100)
    assert cheapest(points, 0.61) is None


def test_the_target_is_a_point_below_the_uncompressed() -> None:
    def row(method: str, kind: str, n_bytes: float, accuracy: float) -> dict[str, object]:
        return {
            "method": method,
            "kind": kind,
            "task": "linear",
            "bytes_per_tile": n_bytes,
            "accuracy": accuracy,
            "recall": None,
            "mean_iou": None,
        }

    summary = [
        row("nec 1", "nec", 100, 0.7),
        row("nec 2", "nec", 400, 0.9),
        row("pca", "pca", 6400, 0.81),
        row("float32", "uncompressed", 100_000, 0.81),
    ]
    curves = {"NEC": ["nec 1", "nec 2"], "pca": ["pca"], "float32": ["float32"]}
    rows = {one["curve"]: one for one in savings_rows(summary, curves, "NEC")}
    assert [one["target"] for one in rows.values()] == pytest.approx([0.8] * 3)
    assert rows["NEC"]["bytes_at_target"] == pytest.approx(200)
    assert rows["pca"]["bytes_at_target"] == pytest.approx(6400)
    assert rows["pca"]["factor"] == pytest.approx(6400 / (100 * 4**0.55))
    assert savings_rows(summary, curves, None) == []

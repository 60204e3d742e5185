"""Probes against their definitions: a gradient of zero, neighbours one by one, scipy's optimum."""

import numpy as np
import pytest
from scipy.optimize import minimize  # type: ignore[import-untyped]

from nec_ray.evaluate.distortion import distortion
from nec_ray.evaluate.probes import (
    linear_probe,
    logistic_regression,
    mean_tokens,
    nearest_neighbours,
    neighbours_vote,
    retrieval_recall,
)

RNG = np.random.default_rng(0)
CLASSES = 3
TARGET = np.arange(90) % CLASSES
CENTRES = RNG.normal(size=(CLASSES, 8)) * 1.2
X = (CENTRES[TARGET] + RNG.normal(size=(90, 8)) * np.geomspace(0.5, 3, 8) + 5).astype(np.float32)


def cosines(base: np.ndarray, query: np.ndarray) -> list[float]:  # type: ignore[type-arg]
    mean = sum(base) / len(base)
    a = query - mean
    return [float(np.dot(a, b - mean) / np.sqrt(np.dot(a, a) * np.dot(b - mean, b - mean))) for b in base]


@pytest.mark.parametrize("strength", [0.3, 1e-3])
def test_logistic_regression_is_at_the_optimum_that_scipy_finds(strength: float) -> None:
    x = X.astype(np.float64)

    def loss(flat: np.ndarray) -> float:  # type: ignore[type-arg]
        weight, bias = flat[:24].reshape(8, 3), flat[24:]
        total = 0.0
        for row, target in zip(x, TARGET, strict=True):
            scores = row @ weight + bias
            total += np.log(np.exp(scores - scores.max()).sum()) + scores.max() - scores[target]
        return float(total / len(x) + strength / 2 * (weight**2).sum())

    weight, bias = logistic_regression(x, TARGET, CLASSES, strength)
    got = loss(np.concatenate([weight.ravel(), bias]))
    best = minimize(loss, np.concatenate([weight.ravel(), bias]) + 0.01, method="BFGS")
    assert got <= best.fun + 1e-6
    assert got < loss(np.zeros(27)) - 0.1


def test_the_linear_probe_tells_classes_apart_whatever_the_scale_of_a_channel() -> None:
    train, test = slice(0, 60), slice(60, None)
    scale = np.geomspace(1e-3, 1e3, 8).astype(np.float32)
    plain = linear_probe(X[train], TARGET[train], X[test], CLASSES)
    scaled = linear_probe(X[train] * scale, TARGET[train], X[test] * scale, CLASSES)
    assert np.mean(plain == scaled) > 0.95
    assert np.mean(plain == TARGET[test]) > 0.7
    constant = np.concatenate([X, np.ones((90, 1), np.float32)], axis=1)
    assert np.array_equal(linear_probe(constant[train], TARGET[train], constant[test], CLASSES), plain)


def test_the_penalty_that_is_chosen_does_better_than_hardly_any() -> None:
    rng = np.random.default_rng(1)
    target = np.arange(800) % 2
    x = rng.normal(size=(800, 150)).astype(np.float32)
    x[:, :5] += 0.8 * target[:, None]
    chosen = np.mean(linear_probe(x[:400], target[:400], x[400:], 2) == target[400:])
    weight, bias = logistic_regression(x[:400].astype(np.float64), target[:400], 2, 1e-6)
    assert chosen > np.mean((x[400:] @ weight + bias).argmax(axis=1) == target[400:]) + 0.02


def test_neighbours_and_votes_are_those_of_one_by_one() -> None:
    base, queries = X[:60], X[60:]
    numbers, found = nearest_neighbours(base, queries, 7)
    said = neighbours_vote(base, TARGET[:60], queries, CLASSES)
    for i, query in enumerate(queries):
        every = cosines(base.astype(np.float64), query.astype(np.float64))
        order = sorted(range(60), key=lambda j: -every[j])
        assert numbers[i].tolist() == order[:7]
        assert found[i] == pytest.approx([every[j] for j in order[:7]], abs=1e-5)
        votes = [sum(np.exp(every[j] / 0.07) for j in order[:20] if TARGET[j] == c) for c in range(CLASSES)]
        assert said[i] == int(np.argmax(votes))
    few, _ = nearest_neighbours(base[:3], queries, 7)
    assert few.shape == (30, 3)


def test_recall_is_the_share_of_true_neighbours_found() -> None:
    blurred = X + RNG.normal(size=X.shape).astype(np.float32)
    got = retrieval_recall(blurred[:60], blurred[60:], X[:60], X[60:], 5)
    shares = []
    for query, true_query in zip(blurred[60:], X[60:], strict=True):
        found, true = cosines(blurred[:60], query), cosines(X[:60], true_query)
        shares.append(len(set(np.argsort(found)[-5:]) & set(np.argsort(true)[-5:])) / 5)
    assert got == pytest.approx(np.mean(shares))
    assert 0.1 < got < 0.95
    assert retrieval_recall(X[:60], X[60:], X[:60], X[60:], 5) == 1


def test_mean_tokens_and_distortion_are_as_written_out() -> None:
    x = RNG.normal(size=(150, 4, 3)).astype(np.float32) * [1, 5, 20] + [0, 100, 0]
    x = x.astype(np.float32)
    np.testing.assert_allclose(mean_tokens(x), sum(x[:, t] for t in range(4)) / 4, rtol=1e-5)
    moved = x + 0.5
    got = distortion(moved, x)
    assert got.mse == pytest.approx(0.25, rel=1e-4)
    variance = np.mean([x[:, :, c].astype(np.float64).var() for c in range(3)])
    assert got.snr_db == pytest.approx(10 * np.log10(variance / 0.25), abs=1e-3)
    assert distortion(x, x).snr_db is None

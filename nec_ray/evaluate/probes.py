"""What is asked of a tile's mean token beside the paper's head: a linear probe, nearest neighbours, retrieval."""

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from nec_ray.codec import Arrays, parts_of
from nec_ray.evaluate.fitting import Floats
from nec_ray.models.threads import one_thread

Targets = npt.NDArray[np.int64]
Doubles = npt.NDArray[np.float64]
NEIGHBOURS = 20
"""That vote on a tile's class."""

_TEMPERATURE = 0.07  # of the votes, as DINO (Caron et al. 2021, arXiv 2104.14294) has it
_STRENGTHS = 10.0 ** np.arange(1, -7, -1)
_HELD_OUT = 0.2
_ITERATIONS = 1000
_QUERIES = 256  # compared with all tiles at a time


def mean_tokens(x: Arrays) -> Floats:
    """Mean token float32 (tiles, channels) of embeddings (tiles, tokens, channels).

    Of several grid scales, a tuple of such, the scales' mean tokens follow one another.
    """
    return np.concatenate([part.mean(axis=1) for part in parts_of(x)], axis=1)


def linear_probe(train: Floats, train_y: Targets, test: Floats, classes: int, seed: int = 0) -> Targets:
    """Classes int64 (test tiles,) by multinomial logistic regression, solved to the optimum.

    Features are standardised by the training tiles; the strength of the L2 penalty is the one of least cross entropy
    on a fifth of the training tiles that are left out, looked for from strong to weak; all are trained on with it in
    the end.

    Args:
        train: features float32 (tiles, channels).
        train_y: classes, 0 and up.
        test: features float32 (tiles, channels).
        classes: number of classes.
        seed: picks the tiles that are left out.
    """
    mean, std = train.mean(axis=0, dtype=np.float64), train.std(axis=0, dtype=np.float64)
    std[std <= 0] = 1
    x, unseen = (train - mean) / std, (test - mean) / std
    order = np.random.default_rng(seed).permutation(len(x))
    out, kept = np.split(order, [max(1, round(_HELD_OUT * len(x)))])
    strength, least, start = _STRENGTHS[0], np.inf, None
    for weaker in _STRENGTHS:
        start = logistic_regression(x[kept], train_y[kept], classes, weaker, start)
        lost = _cross_entropy(_scores(*start, x[out]), train_y[out])
        if lost > least:
            break
        strength, least = weaker, lost
    return _scores(*logistic_regression(x, train_y, classes, strength), unseen).argmax(axis=1)


def logistic_regression(
    x: Doubles, y: Targets, classes: int, strength: float, start: tuple[Doubles, Doubles] | None = None
) -> tuple[Doubles, Doubles]:
    """Weights (channels, classes) and biases (classes,) of least mean cross entropy + strength / 2 * |weights|^2.

    Args:
        x: features float64 (tiles, channels).
        y: classes int64 (tiles,), 0 and up.
        classes: number of classes.
        strength: of the penalty.
        start: weights and biases to begin from; zeros where it is None.
    """
    data, target = torch.from_numpy(np.ascontiguousarray(x)), torch.from_numpy(y)
    first = start or (np.zeros((x.shape[1], classes)), np.zeros(classes))
    weight, bias = (torch.tensor(one, requires_grad=True) for one in first)
    solver = torch.optim.LBFGS(
        [weight, bias],
        max_iter=_ITERATIONS,
        tolerance_grad=1e-6,
        tolerance_change=1e-12,
        history_size=20,
        line_search_fn="strong_wolfe",
    )

    def loss() -> torch.Tensor:
        solver.zero_grad()
        value = nn.functional.cross_entropy(data @ weight + bias, target) + strength / 2 * weight.square().sum()
        torch.autograd.backward(value)
        return value

    with one_thread():
        solver.step(loss)  # type: ignore[no-untyped-call]
    return weight.detach().numpy(), bias.detach().numpy()


def nearest_neighbours(base: Floats, queries: Floats, k: int) -> tuple[Targets, Floats]:
    """Numbers int64 (queries, k) of the tiles of greatest cosine, the greatest first, and the cosines float32.

    Args:
        base: features float32 (tiles, channels); their mean is taken off both before the cosine.
        queries: features float32 (queries, channels).
        k: neighbours wanted; of equal ones the first in `base` come first.
    """
    mean = base.mean(axis=0, dtype=np.float64).astype(np.float32)
    tiles, asked = (_unit(one - mean) for one in (base, queries))
    numbers = np.empty((len(asked), min(k, len(tiles))), np.int64)
    cosines = np.empty(numbers.shape, np.float32)
    for start in range(0, len(asked), _QUERIES):
        part = asked[start : start + _QUERIES] @ tiles.T
        order = np.argsort(-part, axis=1, kind="stable")[:, : numbers.shape[1]]
        numbers[start : start + _QUERIES] = order
        cosines[start : start + _QUERIES] = np.take_along_axis(part, order, axis=1)
    return numbers, cosines


def neighbours_vote(train: Floats, train_y: Targets, test: Floats, classes: int) -> Targets:
    """Classes int64 (test tiles,) that the `NEIGHBOURS` nearest training tiles vote for, the nearer the louder.

    Args:
        train: features float32 (tiles, channels).
        train_y: classes, 0 and up.
        test: features float32 (tiles, channels).
        classes: number of classes.
    """
    return neighbour_votes(train, np.eye(classes, dtype=bool)[train_y], test, NEIGHBOURS).argmax(axis=1)


def neighbour_votes(train: Floats, flags: npt.NDArray[np.bool_], test: Floats, k: int) -> Doubles:
    """Share of the votes of the `k` nearest training tiles that each class has, float64 (test tiles, classes).

    Args:
        train: features float32 (tiles, channels).
        flags: bool (tiles, classes), the classes of each.
        test: features float32 (tiles, channels).
        k: neighbours; the nearer the louder.
    """
    numbers, cosines = nearest_neighbours(train, test, k)
    weights = np.exp(cosines.astype(np.float64) / _TEMPERATURE)
    weights /= weights.sum(axis=1, keepdims=True)
    return np.stack([weight @ flags[near] for weight, near in zip(weights, numbers, strict=True)])


def retrieval_recall(base: Floats, queries: Floats, true_base: Floats, true_queries: Floats, k: int) -> float:
    """Mean share of a query's `k` true neighbours that are among the `k` that are found.

    Args:
        base: features float32 (tiles, channels) to find neighbours among.
        queries: features float32 (queries, channels).
        true_base: the tiles' features before compression, maybe of more channels.
        true_queries: the queries' features before compression.
        k: neighbours.
    """
    found, _ = nearest_neighbours(base, queries, k)
    true, _ = nearest_neighbours(true_base, true_queries, k)
    return float(np.mean([len(np.intersect1d(a, b)) / len(b) for a, b in zip(found, true, strict=True)]))


def _unit(x: Floats) -> Floats:
    length = np.linalg.norm(x, axis=1, keepdims=True)
    return x / np.where(length > 0, length, 1)


def _scores(weight: Doubles, bias: Doubles, x: Doubles) -> Doubles:
    return x @ weight + bias


def _cross_entropy(scores: Doubles, y: Targets) -> float:
    high = scores.max(axis=1)
    log_sum = high + np.log(np.exp(scores - high[:, None]).sum(axis=1))
    return float(np.mean(log_sum - scores[np.arange(len(y)), y]))

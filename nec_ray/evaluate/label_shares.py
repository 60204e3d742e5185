"""Which tiles are tested, and whose labels are used: an experiment's own split and shares of the training labels."""

import math
from dataclasses import replace

import numpy as np
import numpy.typing as npt

from nec_ray.errors import BadLabels
from nec_ray.evaluate.labels import Labels
from nec_ray.evaluate.masks import Masks
from nec_ray.models.dataset import EmbeddingSource, valid_rows


def with_test(known: Labels | Masks, archive: EmbeddingSource, test: str) -> Labels | Masks:
    """Labels or masks of which the tiles that a condition picks are tested, and all others trained on.

    Args:
        known: what is labelled.
        archive: where the condition is asked.
        test: an SQL condition over `embeddings`.

    Raises:
        BadLabels: it picks none or all of the labelled tiles.
    """
    picked = set(valid_rows(archive, ["tile_id"], test)["tile_id"].to_pylist())
    is_test = np.array([name in picked for name in known.tile_ids], bool)
    if not is_test.any() or is_test.all():
        which = "all" if is_test.all() else "none"
        raise BadLabels(f"{archive.url}: test picks {which} of {len(is_test):,} labelled tiles; change the condition")
    return replace(known, is_test=is_test)


def choose_labelled(known: Labels | Masks, share: float, seed: int) -> npt.NDArray[np.bool_]:
    """(tiles,): all test tiles, and of each class's training tiles a share, rounded up; smaller are part of larger.

    Masks are of several classes: theirs are chosen among all training tiles.

    Args:
        known: what is labelled.
        share: above 0, at most 1.
        seed: of the choice.
    """
    groups = known.target if isinstance(known, Labels) else np.zeros(len(known), np.int64)
    used, rng = known.is_test.copy(), np.random.default_rng(seed)
    order = rng.permutation(len(known))
    for group in np.unique(groups[~known.is_test]):
        mine = order[(groups[order] == group) & ~known.is_test[order]]
        used[mine[: math.ceil(round(share * len(mine), 9))]] = True
    return used

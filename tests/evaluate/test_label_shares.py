"""Which labels are used, and masks at equal bytes: counted by hand."""

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nec_ray.evaluate.equal_bytes import at_equal_bytes
from nec_ray.evaluate.label_shares import choose_labelled
from nec_ray.evaluate.labels import Labels


@settings(deadline=None, max_examples=50)
@given(st.lists(st.tuples(st.integers(0, 3), st.booleans()), min_size=1, max_size=60), st.integers(0, 99), st.data())
def test_every_class_keeps_its_share_and_the_smaller_is_part_of_the_larger(
    rows: list[tuple[int, bool]], seed: int, data: st.DataObject
) -> None:
    target, is_test = np.array([row[0] for row in rows]), np.array([row[1] for row in rows])
    known = Labels([str(i) for i in range(len(rows))], list("abcd"), target, is_test, 0)
    small, large = sorted(data.draw(st.tuples(st.integers(1, 100), st.integers(1, 100))))
    few, many = (choose_labelled(known, percent / 100, seed) for percent in (small, large))
    assert few[is_test].all()
    assert not (few & ~many).any()
    for kind in range(4):
        mine = (target == kind) & ~is_test
        assert (few & mine).sum() == math.ceil(small * mine.sum() / 100)
    assert choose_labelled(known, 1.0, seed).all()
    picked = known.pick(few)
    assert picked.tile_ids == [str(i) for i in np.flatnonzero(few)]
    np.testing.assert_array_equal(picked.target, target[few])


def test_seeds_choose_other_tiles() -> None:
    known = Labels([str(i) for i in range(50)], ["a"], np.zeros(50, np.int64), np.zeros(50, bool), 0)
    a, b = (choose_labelled(known, 0.3, seed) for seed in (0, 1))
    assert a.sum() == b.sum() == 15
    assert (a != b).any()


@pytest.mark.parametrize(
    ("sizes", "expected"),
    [
        ({"n1": 100, "n2": 1000, "p1": 150, "p2": 1900, "j1": 800, "q1": 5000}, ["n2", "j1", "p2"]),
        ({"n1": 100, "n2": 1000, "p1": 150, "p2": 9000, "j1": 90, "q1": 5000}, ["n1", "j1", "p1"]),
        ({"n1": 100, "p2": 201}, ["n1"]),
        ({"p1": 100, "q1": 100}, []),
    ],
)
def test_methods_within_a_factor_of_two_are_at_equal_bytes(sizes: dict[str, float], expected: list[str]) -> None:
    curves = {"NEC": ["n1", "n2"], "JPEG": ["j1"], "PCA": ["p1", "p2"], "int8": ["q1"]}
    summary: list[dict[str, Any]] = [{"method": name, "bytes_per_tile": size} for name, size in sizes.items()]
    assert at_equal_bytes(summary, curves, "NEC") == expected

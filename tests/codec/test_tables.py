"""Integer tables against CompressAI's own densities, and refusal of damaged ones."""

import numpy as np
import pytest

from nec_ray.codec import EntropyTables
from nec_ray.errors import CorruptCodec
from tests.codec.make import SCALES, laplacian_pmf, laplacian_tables


def test_frequencies_follow_the_density() -> None:
    pmf = laplacian_pmf(3.0, 100)
    tables = EntropyTables.from_pmf([pmf], np.array([-100]), np.zeros(1), np.zeros(1, bool))
    frequency = np.diff(tables.cdf.astype(float)) / 2**tables.precision
    kept = pmf[int(tables.offset[0]) + 100 :][: len(frequency)]
    assert frequency.sum() == 1
    assert np.abs(frequency - kept / kept.sum()).max() < 2.0**-tables.precision * 1.01


def test_tables_survive_their_tensors() -> None:
    tables = laplacian_tables(SCALES)
    again = EntropyTables.from_tensors(tables.to_tensors())
    assert again.precision == tables.precision
    for name in ("cdf", "start", "offset", "median", "dead"):
        assert np.array_equal(getattr(again, name), getattr(tables, name))


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("cdf", lambda a: a[:-1]),
        ("cdf", lambda a: a[::-1]),
        ("cdf", lambda a: np.where(np.arange(len(a)) == 3, 0, a).astype(np.uint32)),
        ("cdf", lambda a: a.astype(np.int64)),
        ("start", lambda a: a + 1),
        ("start", lambda a: -a),
        ("start", lambda a: a[:-1]),
        ("median", lambda a: a * np.float32("nan")),
        ("offset", lambda a: a - 2**31 + 100),
        ("precision", lambda a: a + 20),
        ("precision", lambda a: a[:0]),
    ],
)
def test_broken_tables_are_refused(name: str, change: object) -> None:
    tensors = laplacian_tables(SCALES).to_tensors()
    assert callable(change)
    tensors[name] = change(tensors[name])
    with pytest.raises(CorruptCodec, match="entropy tables"):
        EntropyTables.from_tensors(tensors)

"""Integer tables against CompressAI's own densities, and refusal of damaged ones."""

import numpy as np
import pytest

from nec_ray.codec import EntropyTables
from nec_ray.codec.quantise import SPARSE_FROM
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
    for name in ("cdf", "start", "offset", "shift", "run_cdf", "run_start", "median", "dead", "sparse"):
        assert np.array_equal(getattr(again, name), getattr(tables, name))


def test_kinds_of_channels() -> None:
    tables = laplacian_tables(SCALES)
    assert np.array_equal(tables.dead, SCALES < 0.06)
    zero = np.array([laplacian_pmf(scale, 60)[60] for scale in SCALES])
    assert np.array_equal(tables.sparse, (zero >= SPARSE_FROM) & ~tables.dead)


def test_entries_follow_one_another() -> None:
    pmf = laplacian_pmf(900.0, 9000)
    tables = EntropyTables.from_pmf([pmf, pmf[8950:9051]], np.array([-9000, -50]), np.zeros(2), np.zeros(2, bool))
    firsts = tables.first_symbols()
    for c in range(2):
        mine = slice(tables.start[c], tables.start[c + 1])
        assert firsts[mine][0] == tables.offset[c]
        assert np.array_equal(np.diff(firsts[mine]), 1 << tables.shift[mine][:-1].astype(int))
    assert tables.shift.any()


@pytest.mark.parametrize("scale", [0.1, 1.0, 30.0, 1000.0])
def test_tables_cost_at_most_half_a_percent_more_than_the_entropy(scale: float) -> None:
    """Of the symbols that have an entry; the payload tests count escapes and all."""
    radius = int(20 * scale) + 3
    pmf = laplacian_pmf(scale, radius)
    tables = EntropyTables.from_pmf([pmf], np.array([-radius]), np.zeros(1), np.zeros(1, bool), 200)
    frequency = np.diff(tables.cdf.astype(float))
    widths = 1 << tables.shift[:-1].astype(int)
    symbols = int(tables.offset[0]) + np.arange(widths.sum())
    p = pmf[np.clip(symbols + radius, 0, 2 * radius)]
    entropy = -np.sum(p * np.log2(p))
    if tables.sparse[0]:
        runs = np.diff(tables.run_cdf.astype(float))
        zero = p[symbols == 0][0]
        length = np.arange(len(runs) - 1)
        chance = np.append((1 - zero) * zero**length, zero ** len(length))
        other = np.where(symbols == 0, 0, p)
        per_run = np.sum(chance * (16 - np.log2(runs)))
        per_value = np.sum(other / other.sum() * np.repeat(16 + np.log2(widths) - np.log2(frequency), widths))
        tokens = np.sum(chance[:-1] * (length + 1)) + chance[-1] * len(length)
        cost = (per_run + (1 - chance[-1]) * per_value) / tokens
    else:
        cost = np.sum(p * np.repeat(tables.precision + np.log2(widths) - np.log2(frequency), widths))
    assert entropy * 0.999 <= cost <= entropy * 1.005


@pytest.mark.parametrize("pmf", [[0.5, np.nan], [0.0, 0.0], [0.7, 0.7], [1.1, -0.1], [np.inf, 0.0], []])
def test_probabilities_that_are_none_are_refused(pmf: list[float]) -> None:
    both = [np.ones(1), np.array(pmf)]
    with pytest.raises(ValueError, match="channel 1: not probabilities"):
        EntropyTables.from_pmf(both, np.zeros(2, int), np.zeros(2), np.zeros(2, bool))
    EntropyTables.from_pmf(both, np.zeros(2, int), np.zeros(2), np.array([False, True]))
    with pytest.raises(ValueError, match="of one length"):
        EntropyTables.from_pmf(both, np.zeros(1, int), np.zeros(2), np.zeros(2, bool))


def test_a_run_table_of_one_entry_is_refused() -> None:
    """Its runs would be of no zeros for ever: a decoder that took it would not come back."""
    tensors = laplacian_tables(np.array([0.1])).to_tensors()
    tensors["run_cdf"] = np.array([0, 1 << 16], np.uint32)
    tensors["run_start"] = np.array([0, 2], np.int64)
    with pytest.raises(CorruptCodec, match="run table has a single entry"):
        EntropyTables.from_tensors(tensors)


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
        ("offset", lambda a: a + 100),
        ("shift", lambda a: a + np.uint8(17)),
        ("shift", lambda a: a[:-1]),
        ("shift", lambda a: np.where(np.arange(len(a)) == len(a) - 1, 1, a).astype(np.uint8)),
        ("run_cdf", lambda a: a[:-1]),
        ("run_cdf", lambda a: a[::-1]),
        ("run_start", lambda a: a[::-1]),
        ("run_start", lambda a: a[:-1]),
        ("precision", lambda a: a + 1),
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

"""From a channel's probabilities to integer frequencies: which symbols get a table entry, which are left to escapes."""

from dataclasses import dataclass

import numba
import numpy as np
import numpy.typing as npt

RUN_PRECISION = 16
"""Bits of the two tables of a sparse channel."""
MAX_ENTRIES = 256
"""Entries of one table at most: an entry's number fits in a byte."""
MAX_SHIFT = 16
SPARSE_FROM = 0.97
"""P(0) from which a channel is coded as runs of zeros: fewer, but slower, coding steps than one a token."""
_ESCAPE_BITS = 52.0
"""About what one escape costs: the entry coded in its place, its position, and its value."""

Pmf = npt.NDArray[np.float64]
Frequencies = npt.NDArray[np.int64]


@dataclass(frozen=True)
class ChannelTables:
    """Integer frequencies of one channel."""

    value: Frequencies
    """Of the entries; in a sparse channel, of the symbols other than 0."""
    shift: npt.NDArray[np.uint8]
    """(entries,) raw low bits of each entry's 2**shift symbols, which follow one another."""
    offset: int
    """The first entry's first symbol."""
    run: Frequencies
    """Of the runs of zeros in a sparse channel: of 0, 1, … zeros before another symbol, then of more; else empty."""
    cost: float
    """Expected bits a symbol."""


def entropy(pmf: Pmf) -> float:
    """Bits a symbol."""
    p = pmf[pmf > 0]
    return float(-np.sum(p * np.log2(p)))


def quantise(pmf: Pmf, offset: int, precision: int, longest_run: int) -> ChannelTables:
    """Tables of one channel.

    Args:
        pmf: P(symbol = offset + i), float64 (alphabet,); what it lacks of 1 is left to escapes.
        offset: the first symbol.
        precision: bits of the frequencies of a channel that is not sparse.
        longest_run: the longest run of zeros that one coding step covers.
    """
    zero = pmf[-offset] if 0 <= -offset < len(pmf) else 0.0
    if zero >= SPARSE_FROM:
        return _sparse(pmf, offset, float(zero), longest_run)
    value, shift, first, cost = _values(pmf, precision, None)
    return ChannelTables(value, shift, offset + first, np.zeros(0, np.int64), cost)


def _sparse(pmf: Pmf, offset: int, zero: float, longest_run: int) -> ChannelTables:
    others = pmf.copy()
    others[-offset] = 0.0
    nonzero = 1.0 - zero
    if others.sum() <= 0:  # all the rest is left to escapes
        others[-offset] = 1.0
    value, shift, first, value_cost = _values(others / others.sum(), RUN_PRECISION, -offset)
    lengths = np.arange(longest_run)
    run_pmf = np.append(nonzero * zero**lengths, zero**longest_run)
    run = _integer_frequencies(run_pmf, RUN_PRECISION)
    # One step codes `length` zeros and the symbol after them, or the longest run and nothing after it;
    # at the end of a tile a run of what is left or more costs what it should.
    bits = float(np.sum(run_pmf * (RUN_PRECISION - np.log2(run)))) + (1 - run_pmf[-1]) * value_cost
    tokens = run_pmf[-1] * longest_run + float(np.sum(run_pmf[:-1] * (lengths + 1)))
    return ChannelTables(value, shift, offset + first, run, bits / tokens)


def _values(pmf: Pmf, precision: int, keep: int | None) -> tuple[Frequencies, npt.NDArray[np.uint8], int, float]:
    """The cheapest of a few ways to leave rare symbols at the ends of the alphabet to escapes.

    Args:
        pmf: P(symbol), float64 (alphabet,).
        precision: bits of the frequencies.
        keep: a symbol that must have an entry, however rare.

    Returns:
        (frequencies, raw bits of each entry, first symbol's index in `pmf`, expected bits a symbol).
    """
    best: tuple[Frequencies, npt.NDArray[np.uint8], int, float] | None = None
    for threshold in (0.0, *(2.0 ** -(precision + extra) for extra in (10, 8, 6, 4, 2, 0))):
        kept = np.flatnonzero(pmf >= threshold) if threshold else np.flatnonzero(pmf > 0)
        if not len(kept):
            continue
        first, last = int(kept[0]), int(kept[-1]) + 1
        if keep is not None:
            first, last = min(first, keep), max(last, keep + 1)
        shift = _shifts(pmf[first:last])
        ends = np.cumsum(1 << shift.astype(np.int64))
        grouped = np.diff(np.concatenate([[0.0], np.cumsum(pmf[first:last])[ends - 1]]))
        frequency = _integer_frequencies(np.maximum(grouped, 0), precision)
        cost = float(np.sum(grouped * (precision + shift - np.log2(frequency)))) + _ESCAPE_BITS * max(
            0.0, 1.0 - float(grouped.sum())
        )
        if best is None or cost < best[3]:
            best = frequency, shift, first, cost
    if best is None:
        raise ValueError("a density without a probability above 0")
    return best


def _shifts(pmf: Pmf) -> npt.NDArray[np.uint8]:
    """Raw bits of at most MAX_ENTRIES entries that cover an alphabet, wide ones only where it is flat or rare.

    Symbols of one entry cost the same. The loss by that is kept below one tolerance for all entries, the smallest
    with which they are few enough.
    """
    if len(pmf) <= MAX_ENTRIES:
        return np.zeros(len(pmf), np.uint8)
    mass = np.concatenate([[0.0], np.cumsum(pmf)])
    own = np.concatenate([[0.0], np.cumsum(pmf * np.log2(np.maximum(pmf, 1e-300)))])
    low, high = 0.0, 32.0
    for _ in range(40):
        middle = (low + high) / 2 if high < 1e-6 else np.sqrt(max(low, 1e-12) * high)
        if len(_cover(mass, own, middle)) > MAX_ENTRIES:
            low = middle
        else:
            high = middle
    return np.asarray(_cover(mass, own, high))


@numba.njit(cache=True)
def _cover(mass, own, tolerance):  # type: ignore[no-untyped-def]
    """From left to right the widest entries whose loss in bits a symbol is at most `tolerance`.

    Args:
        mass: float64 (alphabet + 1,), cumulative probabilities.
        own: float64 (alphabet + 1,), cumulative `p log2 p`.
        tolerance: loss of an entry.
    """
    alphabet = len(mass) - 1
    shifts = np.empty(alphabet, np.uint8)
    count = 0
    at = 0
    while at < alphabet:
        chosen = 0
        for shift in range(1, MAX_SHIFT + 1):
            end = at + (1 << shift)
            if end > alphabet:
                break
            p = mass[end] - mass[at]
            if p > 0 and own[end] - own[at] - p * (np.log2(p) - shift) > tolerance:
                break
            chosen = shift
        shifts[count] = chosen
        count += 1
        at += 1 << chosen
    return shifts[:count]


def _integer_frequencies(pmf: Pmf, precision: int) -> Frequencies:
    """Frequencies of at least 1 that add up to 2**precision, each step taken where it costs least."""
    total = 1 << precision
    exact = pmf / pmf.sum() * total
    frequency = np.maximum(1, np.floor(exact)).astype(np.int64)
    missing = total - int(frequency.sum())
    if missing > 0:
        frequency[np.argsort(frequency - exact, kind="stable")[:missing]] += 1
    while missing < 0:  # the floor of 1 took more than there is
        loss = np.where(frequency > 1, pmf * np.log2(frequency / np.maximum(frequency - 1, 1)), np.inf)
        take = np.argsort(loss, kind="stable")[: min(-missing, int(np.sum(frequency > 1)))]
        frequency[take] -= 1
        missing += len(take)
    return frequency

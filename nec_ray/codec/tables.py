"""Integer entropy tables: all that decoding needs, stored as integers and never rebuilt from floats."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from nec_ray.codec.quantise import MAX_ENTRIES, MAX_SHIFT, RUN_PRECISION, entropy, quantise
from nec_ray.codec.spec import MAX_CHANNELS
from nec_ray.errors import CorruptCodec

MIN_PRECISION = 12
MAX_PRECISION = 16
_TARGET_EXCESS = 0.0025
"""Relative cost of integer frequencies that a higher precision has to undercut."""

Array = npt.NDArray[np.generic]


@dataclass(frozen=True)
class EntropyTables:
    """Integer frequency tables, one channel after the other; schemas/payload.md says how they are used.

    A symbol is `round(latent - median)`, or a rounded coordinate of it (transform.py). There are three kinds of
    channels. A dense one codes every symbol: an entry of its table stands for one symbol or, where it is wide, for the
    next `2**shift` ones, of which the low bits are coded raw. A sparse one, nearly always 0, codes runs of zeros by its
    run table and the symbols between them by its table. A dead one has no table and all its symbols are 0. A symbol
    outside its table is coded as the nearest one inside and corrected by an escape.
    """

    precision: int
    """A dense channel's frequencies add up to 2**precision, a sparse one's to 2**16."""
    cdf: npt.NDArray[np.uint32]
    """(entries,) the channels' cumulative frequencies one after the other, each from 0 to its sum."""
    start: npt.NDArray[np.int64]
    """(channels + 1,) where each channel's table begins in `cdf`; an empty one is a dead channel."""
    offset: npt.NDArray[np.int32]
    """(channels,) the first symbol of a channel's first entry."""
    shift: npt.NDArray[np.uint8]
    """(entries,) raw bits of the entry that begins at the same place of `cdf`; 0 where a table ends."""
    run_cdf: npt.NDArray[np.uint32]
    """(entries,) cumulative frequencies of the sparse channels' runs: entry `r` is `r` zeros before another symbol,
    the last entry zeros alone."""
    run_start: npt.NDArray[np.int64]
    """(channels + 1,) where each channel's run table begins in `run_cdf`; a channel that is not sparse has none."""
    median: npt.NDArray[np.float32]
    """(channels,) what is added to a symbol to give the embedding."""

    def __post_init__(self) -> None:
        fault = _fault(self)
        if fault:
            raise CorruptCodec(f"entropy tables: {fault}")

    @property
    def channels(self) -> int:
        """Number of channels."""
        return len(self.offset)

    @property
    def dead(self) -> npt.NDArray[np.bool_]:
        """(channels,) which channels cost no bytes."""
        return np.asarray(np.diff(self.start) == 0)

    @property
    def sparse(self) -> npt.NDArray[np.bool_]:
        """(channels,) which channels are coded as runs of zeros."""
        return np.asarray(np.diff(self.run_start) > 0)

    @classmethod
    def from_pmf(
        cls,
        pmfs: Sequence[npt.NDArray[np.float64]],
        offset: npt.NDArray[np.integer[Any]],
        median: npt.NDArray[np.floating[Any]],
        dead: npt.NDArray[np.bool_],
        tokens: int = 256,
    ) -> "EntropyTables":
        """Tables of the least precision that costs at most 0.25% more than the model's entropy, or of 16 bits.

        Symbols far more than a table's 256 entries have to share them with their neighbours, and cost more where
        these are not about as likely; the densities of CompressAI, which are smooth, cost less than 0.1% by that.

        Args:
            pmfs: for each channel P(symbol = offset + i), float64 (alphabet,); what the sum lacks of 1 is coded by
                escapes.
            offset: (channels,) integer.
            median: (channels,) float.
            dead: (channels,) true where a channel shall cost nothing.
            tokens: tokens of a tile, which no run of zeros exceeds.

        Raises:
            ValueError: the arrays are not of one length, or a channel's probabilities are none.
        """
        if not len(pmfs) == len(offset) == len(median) == len(dead):
            raise ValueError("pmfs, offset, median and dead must be of one length")
        for c in np.flatnonzero(~dead):
            total = pmfs[c].sum() if len(pmfs[c]) and np.all(pmfs[c] >= 0) else np.nan
            if not 0 < total <= 1 + 1e-6:
                raise ValueError(f"channel {c}: not probabilities of symbols, at least 0 and at most 1 together")
        live = [c for c in range(len(pmfs)) if not dead[c]]
        target = sum(entropy(pmfs[c]) for c in live) * (1 + _TARGET_EXCESS)
        longest_run = max(1, min(tokens, MAX_ENTRIES - 1))
        for precision in range(MIN_PRECISION, MAX_PRECISION + 1):
            made = {c: quantise(pmfs[c], int(offset[c]), precision, longest_run) for c in live}
            if sum(channel.cost for channel in made.values()) <= target:
                break
        channels = len(pmfs)
        cdf, start = _cumulative({c: made[c].value for c in live}, channels)
        shift = [np.append(made[c].shift, 0) for c in live]
        run_cdf, run_start = _cumulative({c: made[c].run for c in live if len(made[c].run)}, channels)
        return cls(
            precision,
            cdf,
            start,
            np.array([made[c].offset if c in made else 0 for c in range(channels)], np.int32),
            np.concatenate([np.zeros(0, np.uint8), *shift]).astype(np.uint8),
            run_cdf,
            run_start,
            np.asarray(median, np.float32),
        )

    def first(self, channels: int) -> "EntropyTables":
        """The tables of the first channels."""
        end, run_end = self.start[channels], self.run_start[channels]
        return EntropyTables(
            self.precision,
            self.cdf[:end],
            self.start[: channels + 1],
            self.offset[:channels],
            self.shift[:end],
            self.run_cdf[:run_end],
            self.run_start[: channels + 1],
            self.median[:channels],
        )

    def equals(self, other: "EntropyTables") -> bool:
        """Whether these are the same numbers, so that they code the same symbols to the same bytes."""
        mine, theirs = self.to_tensors(), other.to_tensors()
        return all(np.array_equal(mine[name], theirs[name]) for name in mine)

    def bits_per_token(self, channels: npt.NDArray[np.int64]) -> float:
        """Expected bits of one token's symbols in some dense channels, were the tables the truth."""
        total = 0.0
        for c in channels:
            p = np.diff(self.cdf[self.start[c] : self.start[c + 1]].astype(np.float64)) / 2**self.precision
            total += float(np.sum(p * (self.shift[self.start[c] : self.start[c + 1] - 1] - np.log2(p))))
        return total

    def first_symbols(self) -> npt.NDArray[np.int32]:
        """(entries,) the first symbol of each entry; where a table ends, the first one after it."""
        width = np.left_shift(1, self.shift.astype(np.int64))
        live = np.diff(self.start) > 0
        width[self.start[1:][live] - 1] = 0
        below = np.cumsum(width) - width
        owner = np.repeat(np.arange(self.channels), np.diff(self.start))
        return (self.offset[owner] + below - below[self.start[owner]]).astype(np.int32)

    def to_tensors(self) -> dict[str, Array]:
        """Arrays by name, as they stand in tables.safetensors."""
        return {"precision": np.array([self.precision], np.int32)} | {name: getattr(self, name) for name in _ARRAYS}

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Array]) -> "EntropyTables":
        """The reverse of `to_tensors`, with every number checked.

        Raises:
            CorruptCodec: an array is missing, of another type, or breaks the tables' rules.
        """
        for name, dtype in {"precision": np.int32, **_ARRAYS}.items():
            array = tensors.get(name)
            if array is None or array.dtype != dtype or array.ndim != 1:
                raise CorruptCodec(f"entropy tables: {name} must be a vector of {np.dtype(dtype).name}")
        if len(tensors["precision"]) != 1:
            raise CorruptCodec("entropy tables: precision must be one number")
        arrays: dict[str, Any] = {name: np.ascontiguousarray(tensors[name]) for name in _ARRAYS}
        return cls(precision=int(tensors["precision"][0]), **arrays)


_ARRAYS = {
    "cdf": np.uint32,
    "start": np.int64,
    "offset": np.int32,
    "shift": np.uint8,
    "run_cdf": np.uint32,
    "run_start": np.int64,
    "median": np.float32,
}


def _cumulative(
    frequencies: Mapping[int, npt.NDArray[np.int64]], channels: int
) -> tuple[npt.NDArray[np.uint32], npt.NDArray[np.int64]]:
    """Cumulative tables of some channels one after the other, and where each channel's begins."""
    parts = [np.concatenate([[0], np.cumsum(frequencies[c])]) for c in sorted(frequencies)]
    lengths = np.zeros(channels + 1, np.int64)
    lengths[[c + 1 for c in sorted(frequencies)]] = [len(part) for part in parts]
    cdf = np.concatenate(parts) if parts else np.zeros(0)
    return cdf.astype(np.uint32), np.cumsum(lengths)


def _fault(tables: EntropyTables) -> str | None:
    """What is wrong with the tables, if anything; a table that passes cannot make the coder leave its bounds."""
    t = tables
    if not MIN_PRECISION <= t.precision <= MAX_PRECISION:
        return f"precision {t.precision} is not {MIN_PRECISION} to {MAX_PRECISION}"
    if not 1 <= t.channels <= MAX_CHANNELS:
        return f"{t.channels} channels, 1 to {MAX_CHANNELS} are allowed"
    if {len(t.start), len(t.run_start)} != {t.channels + 1} or len(t.median) != t.channels:
        return "start, run_start, offset and median are not of one length"
    if len(t.shift) != len(t.cdf) or np.any(t.shift > MAX_SHIFT):
        return f"shift is not a number up to {MAX_SHIFT} for each place of cdf"
    for name, cdf, start in (("cdf", t.cdf, t.start), ("run_cdf", t.run_cdf, t.run_start)):
        lengths = np.diff(start)
        if start[0] != 0 or start[-1] != len(cdf) or np.any((lengths < 2) & (lengths != 0)):
            return f"{name} is not cut into tables"
        if np.any(lengths > MAX_ENTRIES + 1):
            return f"a table of {name} has more than {MAX_ENTRIES} entries"
    if np.any(t.shift[t.start[1:][~t.dead] - 1]):
        return "shift is not 0 where a table ends"
    if np.any(np.abs(t.offset.astype(np.int64)) > 1 << 30):
        return "an offset is out of range"
    ends = np.ones(t.channels, np.int64)
    ends[~t.dead] = t.first_symbols()[t.start[1:][~t.dead] - 1]
    totals = np.where(t.sparse, 1 << RUN_PRECISION, 1 << t.precision)
    rules = {
        "a channel has runs but no symbols": not np.any(t.sparse & t.dead),
        "a run table has a single entry, so that its runs are all of no zeros": not np.any(np.diff(t.run_start) == 2),
        "a sparse channel's table does not hold 0": not np.any(t.sparse & ((t.offset > 0) | (ends <= 0))),
        "a median is not a number": bool(np.all(np.isfinite(t.median))),
        "a cumulative table does not rise from 0 to its sum": _rises(t.cdf, t.start, totals)
        and _rises(t.run_cdf, t.run_start, totals),
    }
    return next((fault for fault, holds in rules.items() if not holds), None)


def _rises(cdf: npt.NDArray[np.uint32], start: npt.NDArray[np.int64], totals: npt.NDArray[np.int64]) -> bool:
    if not len(cdf):
        return True
    live = np.diff(start) > 0
    firsts, lasts = start[:-1][live], start[1:][live] - 1
    inside = np.ones(len(cdf) - 1, bool)
    inside[lasts[:-1]] = False  # the step from one channel's end to the next one's 0
    rising = np.all(np.diff(cdf.astype(np.int64))[inside] > 0)
    return bool(rising and np.all(cdf[firsts] == 0) and np.all(cdf[lasts] == totals[live]))

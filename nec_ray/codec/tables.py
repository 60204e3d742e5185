"""Integer entropy tables: all that decoding needs, stored as integers and never rebuilt from floats."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from nec_ray.codec.spec import MAX_CHANNELS
from nec_ray.errors import CorruptCodec

MIN_PRECISION = 12
MAX_PRECISION = 16
_TARGET_EXCESS = 0.0025
"""Relative cost of integer frequencies that a higher precision has to undercut."""
_ESCAPE_BITS = 32.0
"""About what one escape costs: its position and its value as variable-length integers."""

Array = npt.NDArray[np.generic]


@dataclass(frozen=True)
class EntropyTables:
    """One cumulative frequency table a channel.

    A symbol is `round(latent - median)`. Channel `c` codes the symbols `offset[c] + i` with the integer
    frequencies `cdf[start[c] + i + 1] - cdf[start[c] + i]` of `2**precision`; a symbol outside its table
    is coded as the nearest one inside and corrected by an escape. A dead channel has no table: all its
    symbols are 0 but for escapes.
    """

    precision: int
    cdf: npt.NDArray[np.uint32]
    """(entries,) the channels' cumulative frequencies one after the other, each from 0 to 2**precision."""
    start: npt.NDArray[np.int64]
    """(channels + 1,) where each channel's table begins; an empty one is a dead channel."""
    offset: npt.NDArray[np.int32]
    """(channels,) the symbol that a channel's first entry stands for."""
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

    @classmethod
    def from_pmf(
        cls,
        pmfs: Sequence[npt.NDArray[np.float64]],
        offset: npt.NDArray[np.integer[Any]],
        median: npt.NDArray[np.floating[Any]],
        dead: npt.NDArray[np.bool_],
    ) -> "EntropyTables":
        """Tables that cost at most about 0.25% more than the model's entropy where 16 bits allow it.

        Args:
            pmfs: for each channel P(symbol = offset + i), float64 (alphabet,).
            offset: (channels,) integer.
            median: (channels,) float.
            dead: (channels,) true where a channel shall cost nothing.
        """
        live = [c for c in range(len(pmfs)) if not dead[c]]
        entropy = sum(_entropy(pmfs[c]) for c in live)
        for precision in range(MIN_PRECISION, MAX_PRECISION + 1):
            chosen = {c: _quantise(pmfs[c], precision) for c in live}
            cost = sum(channel.cost for channel in chosen.values())
            if cost <= entropy * (1 + _TARGET_EXCESS):
                break
        parts: list[npt.NDArray[np.uint32]] = []
        offsets = np.zeros(len(pmfs), np.int32)
        start = np.zeros(len(pmfs) + 1, np.int64)
        for c in range(len(pmfs)):
            if c in chosen:
                parts.append(np.concatenate([[0], np.cumsum(chosen[c].frequency)]).astype(np.uint32))
                offsets[c] = int(offset[c]) + chosen[c].first
            start[c + 1] = start[c] + (len(parts[-1]) if c in chosen else 0)
        cdf = np.concatenate(parts) if parts else np.zeros(0, np.uint32)
        return cls(precision, cdf, start, offsets, np.asarray(median, np.float32))

    def bits(self, symbols: npt.NDArray[np.int32]) -> float:
        """Ideal cost in bits of `symbols` int32 (..., channels) under the integer tables, escapes left out."""
        flat = symbols.reshape(-1, self.channels)
        total = 0.0
        for c in np.flatnonzero(~self.dead):
            cdf = self.cdf[self.start[c] : self.start[c + 1]].astype(np.int64)
            index = np.clip(flat[:, c].astype(np.int64) - self.offset[c], 0, len(cdf) - 2)
            total += float(np.sum(self.precision - np.log2(np.diff(cdf)[index])))
        return total

    def to_tensors(self) -> dict[str, Array]:
        """Arrays by name, as they stand in tables.safetensors."""
        return {
            "precision": np.array([self.precision], np.int32),
            "cdf": self.cdf,
            "start": self.start,
            "offset": self.offset,
            "median": self.median,
        }

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Array]) -> "EntropyTables":
        """The reverse of `to_tensors`, with every number checked.

        Raises:
            CorruptCodec: an array is missing, of another type, or breaks the tables' rules.
        """
        types = {
            "precision": np.int32,
            "cdf": np.uint32,
            "start": np.int64,
            "offset": np.int32,
            "median": np.float32,
        }
        for name, dtype in types.items():
            array = tensors.get(name)
            if array is None or array.dtype != dtype or array.ndim != 1:
                raise CorruptCodec(f"entropy tables: {name} must be a vector of {np.dtype(dtype).name}")
        if len(tensors["precision"]) != 1:
            raise CorruptCodec("entropy tables: precision must be one number")
        return cls(
            int(tensors["precision"][0]),
            np.ascontiguousarray(tensors["cdf"], np.uint32),
            np.ascontiguousarray(tensors["start"], np.int64),
            np.ascontiguousarray(tensors["offset"], np.int32),
            np.ascontiguousarray(tensors["median"], np.float32),
        )


@dataclass(frozen=True)
class _Channel:
    frequency: npt.NDArray[np.int64]
    first: int
    cost: float


def _entropy(pmf: npt.NDArray[np.float64]) -> float:
    p = pmf[pmf > 0]
    return float(-np.sum(p * np.log2(p)))


def _quantise(pmf: npt.NDArray[np.float64], precision: int) -> _Channel:
    """The cheapest of a few ways to leave rare symbols at the ends of the alphabet to escapes."""
    best: _Channel | None = None
    for threshold in (0.0, *(2.0 ** -(precision + extra) for extra in (10, 8, 6, 4, 2))):
        kept = np.flatnonzero(pmf >= threshold) if threshold else np.flatnonzero(pmf > 0)
        if not len(kept):
            continue
        first, last = int(kept[0]), int(kept[-1]) + 1
        if last - first > 1 << (precision - 1):
            continue  # too many symbols for frequencies of at least 1 to fit well
        part = pmf[first:last]
        frequency = _integer_frequencies(part, precision)
        cost = float(np.sum(part * (precision - np.log2(frequency)))) + _ESCAPE_BITS * max(0.0, 1.0 - part.sum())
        if best is None or cost < best.cost:
            best = _Channel(frequency, first, cost)
    if best is None:  # a very flat density: keep the most probable stretch
        width = 1 << (precision - 1)
        first = max(0, min(int(np.argmax(pmf)) - width // 2, len(pmf) - width))
        part = pmf[first : first + width]
        frequency = _integer_frequencies(part, precision)
        cost = float(np.sum(part * (precision - np.log2(frequency)))) + _ESCAPE_BITS * (1.0 - part.sum())
        best = _Channel(frequency, first, cost)
    return best


def _integer_frequencies(pmf: npt.NDArray[np.float64], precision: int) -> npt.NDArray[np.int64]:
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


def _fault(tables: EntropyTables) -> str | None:
    """What is wrong with the tables, if anything; a table that passes cannot make the coder leave its bounds."""
    t = tables
    if not MIN_PRECISION <= t.precision <= MAX_PRECISION:
        return f"precision {t.precision} is not {MIN_PRECISION} to {MAX_PRECISION}"
    if not 1 <= t.channels <= MAX_CHANNELS:
        return f"{t.channels} channels, 1 to {MAX_CHANNELS} are allowed"
    if len(t.start) != t.channels + 1 or len(t.median) != t.channels:
        return "start, offset and median are not of one length"
    lengths = np.diff(t.start)
    if t.start[0] != 0 or t.start[-1] != len(t.cdf) or np.any(lengths < 0) or np.any(lengths == 1):
        return "start does not cut cdf into tables"
    if not np.all(np.isfinite(t.median)):
        return "a median is not a number"
    if len(t.cdf):
        live = lengths > 0
        firsts, lasts = t.start[:-1][live], t.start[1:][live] - 1
        steps = np.diff(t.cdf.astype(np.int64))
        inside = np.ones(len(steps), bool)
        inside[lasts[:-1]] = False  # the step from one channel's end to the next one's 0
        if np.any(t.cdf[firsts] != 0) or np.any(t.cdf[lasts] != 1 << t.precision) or np.any(steps[inside] <= 0):
            return "a cumulative table does not rise from 0 to 2**precision"
    if np.any(np.abs(t.offset.astype(np.int64)) > 1 << 30):
        return "an offset is out of range"
    return None

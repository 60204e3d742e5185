"""Times of acquisition that a caller asks for: days, months, years, instants and ranges, as one half-open period."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, date, datetime, timedelta
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from nec_ray.errors import InputError

_HOW = "give an ISO time such as 2020, 2020-05, 2020-05-18 or 2020-05-18T13:46:00Z, or a range such as 2020-05/2020-08"
_YEAR = re.compile(r"([0-9]{4})(?:-([0-9]{2}))?")
_TICK = timedelta(microseconds=1)


@dataclass(frozen=True)
class Period:
    """From `start` on and before `end`, UTC; None where it is open."""

    start: datetime | None
    end: datetime | None

    def condition(self) -> str:
        """SQL condition over `embeddings`; tiles without a time meet it only where both ends are open."""
        tests = [("<=", self.start), (">", self.end)]
        return " AND ".join(f"TIMESTAMPTZ '{at.isoformat()}' {sign} acquired_at" for sign, at in tests if at) or "true"

    def holds(self, times: pa.ChunkedArray) -> npt.NDArray[np.bool_]:
        """Whether each of some times (timestamp, UTC) lies in it."""
        found = pa.chunked_array([pa.array(np.ones(len(times), bool))])
        if self.start:
            found = pc.and_(found, pc.greater_equal(times, pa.scalar(self.start, times.type)))
        if self.end:
            found = pc.and_(found, pc.less(times, pa.scalar(self.end, times.type)))
        return np.asarray(pc.fill_null(found, False).to_numpy(), bool)


def period_of(time: Any) -> Period:
    """The period that somebody means.

    Args:
        time: a year, month, day (the whole of it) or an instant, as ISO text, `date` or `datetime` (UTC where it names
            no zone); or a range of two of them, both included: (first, last), or text with `/` between. None or ".."
            leaves an end open.

    Raises:
        InputError: it is none of these, or the range ends before it begins.
    """
    if isinstance(time, str) and time.count("/") == 1:
        time = time.split("/")
    if isinstance(time, Sequence) and not isinstance(time, str):
        if len(time) != 2:
            raise InputError(f"time {str(time)[:60]!r}: a range has two ends; {_HOW}")
        start, end = (None if one in (None, "", "..") else _one(one) for one in time)
        period = Period(start and start[0], end and end[1])
    else:
        period = Period(*_one(time))
    if period.start and period.end and period.start >= period.end:
        raise InputError(f"time {str(time)[:60]!r}: it ends before it begins; swap the two")
    return period


def _one(given: Any) -> tuple[datetime, datetime]:
    """When a year, month, day or instant begins, and when it is over."""
    try:
        if not isinstance(given, str | date):
            given = str(given)  # numpy's times say themselves in ISO
        if isinstance(given, str):
            given = given.strip()
            coarse = _YEAR.fullmatch(given)
            if coarse:
                year, month = int(coarse[1]), int(coarse[2] or 1)
                after = (year, month + 1) if coarse[2] and month < 12 else (year + 1, 1)
                return datetime(year, month, 1, tzinfo=UTC), datetime(*after, 1, tzinfo=UTC)
            given = date.fromisoformat(given) if len(given) == 10 else datetime.fromisoformat(given)
        if not isinstance(given, datetime):
            start = datetime(given.year, given.month, given.day, tzinfo=UTC)
            return start, start + timedelta(days=1)
        start = given.replace(tzinfo=UTC) if given.tzinfo is None else given.astimezone(UTC)
        return start, start + _TICK
    except (ValueError, TypeError, OverflowError):
        raise InputError(f"time {str(given)[:60]!r}: {_HOW}") from None

"""What a reader of imagery is to the rest, so that a new one is one file of `nec_ray/tiles/readers/`."""

import re
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import numpy.typing as npt

Row = dict[str, Any]
_NUMBERED = re.compile(r"(.+)#([0-9]+)", re.DOTALL)


@dataclass(frozen=True)
class Reader:
    """A reader of files of one kind, or of folders that are one source. It is known by how their names end."""

    ends: tuple[str, ...]
    """Such as `.zarr`; in lower case, whatever the case of the names."""
    rows: Callable[..., Iterable[Row]]
    """Catalog rows of a source: of the store and its name there, with which tile ids begin, and as keywords `tile_size`
    (pixels a side of a window, always given), and `bands`, `nodata`, `sensor` and `acquired_at`, which are None where
    the user does not say. It opens headers only: a catalog of a million tiles must not read their pixels. NotFound,
    BadSource: it cannot be read."""
    opened: Callable[[str, Sequence[str]], AbstractContextManager[Callable[[Row], npt.NDArray[Any]]]]
    """Opens a source whose rows have these bands, once, for a function from a row to pixels (bands, height, width).
    Whatever that raises becomes the row's status `failed` and its reason."""
    several: bool = False
    """Whether a source may hold several images, so that `#n` behind it is a number and no part of its name."""

    def takes(self, source: str) -> bool:
        """Whether a path or URL is, or lies in, a source of this kind."""
        path = numbered(source)[0] if self.several else source
        return any(f"{end}/" in f"{path.lower()}/" for end in self.ends)


def numbered(source: str) -> tuple[str, int]:
    """A source of several images without `#n` at its end, and that number from 0; any other `#` is part of a name."""
    found = _NUMBERED.fullmatch(source)
    return (found[1], int(found[2])) if found else (source, 0)


def window(row: Row) -> tuple[range, range]:
    """Rows and columns of its image that a catalog row is of."""
    x, y = row["x_off"], row["y_off"]
    return range(y, y + row["height"]), range(x, x + row["width"])

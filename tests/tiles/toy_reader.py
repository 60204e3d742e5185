"""A reader of imagery in one file, as `contributing.md` says: arrays (bands, height, width) in NumPy's own format."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np

from nec_ray.errors import BadSource
from nec_ray.storage import Store
from nec_ray.tiles.reader import Reader, window
from nec_ray.tiles.rows import file_row


def _rows(
    store: Store, name: str, *, bands: Sequence[str] | None, sensor: str | None, **_: Any
) -> Iterator[dict[str, Any]]:
    source = f"{store.url}/{name}"
    try:
        header = np.load(source, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError) as error:
        raise BadSource(f"{source}: no array ({error})") from error
    count, height, width = header.shape
    names = bands or [f"B{i}" for i in range(count)]
    yield file_row(store, name, sensor, width=width, height=height, bands=names, dtype=str(header.dtype))


@contextmanager
def _opened(source: str, bands: Sequence[str]) -> Iterator[Any]:
    pixels = np.load(source, mmap_mode="r", allow_pickle=False)
    assert len(pixels) == len(bands)
    yield lambda row: pixels[(slice(None), *(slice(span.start, span.stop) for span in window(row)))]


READER = Reader(ends=(".npy",), rows=_rows, opened=_opened)

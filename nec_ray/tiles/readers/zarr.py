"""Zarr v3: `zarr_rows.py` finds what an array or a group holds, `zarr.py` reads it."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from nec_ray.storage import Store
from nec_ray.tiles.reader import Reader, window
from nec_ray.tiles.rows import stack_number


def _rows(store: Store, name: str, **said: Any) -> Iterator[dict[str, Any]]:
    from nec_ray.tiles.zarr_rows import zarr_windows

    return zarr_windows(f"{store.url}/{name}", **said)


@contextmanager
def _opened(source: str, bands: Sequence[str]) -> Iterator[Any]:
    from nec_ray.tiles.zarr import image

    with image(source, bands) as read:
        yield lambda row: read(stack_number(row["source"]), *window(row))


READER = Reader(ends=(".zarr",), rows=_rows, opened=_opened, several=True)

"""Many small reads of a few immutable objects, by the fastest way that the store has.

What is fast here only ever reads. Whatever goes wrong is left to `Store.read_range`, which tries again and raises
typed errors.
"""

import os
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from types import TracebackType
from typing import Any, Self

from nec_ray.storage.store import Store

_OPEN = 64
"""Files that are kept open; the rest are opened for each read."""
# The first failure hands over to `Store.read_range`, which is patient by itself.
_IMPATIENT = {"max_retries": "2", "retry_timeout": "10s"}


class RangeReader:
    """Ranges of objects of a store, from any number of threads; a context that closes what it opened.

    Args:
        store: where the objects are.
        ends: by name, how far into it an object is read at most; what is not named is read by `Store.read_range`.
    """

    def __init__(self, store: Store, ends: Mapping[str, int]) -> None:
        self._store = store
        self._ends = dict(ends)
        self._lock = threading.Lock()
        self._descriptors: dict[str, int] = {}
        # Handles are lent, not kept by thread: DuckDB's threads end, for Python, with every call.
        self._free: dict[str, list[Any]] = {}
        self._handler: Any = self._connect() if ends and store.scheme == "s3" else None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """Close what is open."""
        with self._lock:
            for descriptor in self._descriptors.values():
                os.close(descriptor)
            self._descriptors.clear()
            self._free.clear()

    def read(self, name: str, start: int, end: int) -> bytes:
        """Bytes `[start, end)` of an object.

        Raises:
            The same as `Store.read_range`.
        """
        data = b""
        with suppress(OSError):
            if self._store.is_local:
                data = self._read_local(name, start, end)
            elif self._handler is not None and end <= self._ends.get(name, 0):
                data = self._fetch(name, start, end)
        return data if len(data) == end - start else self._store.read_range(name, start, end)

    def read_into(self, name: str, start: int, out: memoryview) -> None:
        """Fill `out` with the bytes of an object from `start` on: on a local disk without a copy in between.

        Raises:
            The same as `Store.read_range`.
        """
        if self._store.is_local:
            with suppress(OSError), self._descriptor(name) as descriptor:
                if os.preadv(descriptor, [out], start) == len(out):
                    return
        out[:] = self.read(name, start, start + len(out))

    def _read_local(self, name: str, start: int, end: int) -> bytes:
        with self._descriptor(name) as descriptor:
            return os.pread(descriptor, end - start, start)

    @contextmanager
    def _descriptor(self, name: str) -> Iterator[int]:
        """An open file; one that stays open, as far as there is room."""
        with self._lock:
            descriptor = self._descriptors.get(name)
            if descriptor is None and len(self._descriptors) < _OPEN:
                descriptor = self._descriptors[name] = os.open(self._store.path(name), os.O_RDONLY)
        if descriptor is not None:
            yield descriptor
            return
        descriptor = os.open(self._store.path(name), os.O_RDONLY)
        try:
            yield descriptor
        finally:
            os.close(descriptor)

    def _connect(self) -> Any:
        """delta-rs's object store: a request costs it a tenth of what it costs s3fs."""
        from deltalake.fs import DeltaStorageHandler

        try:
            return DeltaStorageHandler(self._store.url, {**self._store.delta_options(), **_IMPATIENT}, self._ends)
        except Exception:  # whatever it does not know, s3fs may
            return None

    def _fetch(self, name: str, start: int, end: int) -> bytes:
        with self._lock:
            free = self._free.setdefault(name, [])
            file = free.pop() if free else None
        try:
            file = file or self._handler.open_input_file(name)
            file.seek(start)
            data = bytes(file.read(end - start))
        except Exception:
            self._handler = None  # one that fails is not asked again for every range
            return b""
        with self._lock:
            free.append(file)
        return data

"""The read-only file system through which DuckDB sees a pinned version's index files, and nothing else.

One code path for local and remote archives: no listing, no globbing, no writing, and no shared file
position (DuckDB 2.0 seeks and reads one handle from several threads at once).
"""

import threading
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any

from fsspec import AbstractFileSystem

from nec_ray.storage import Store

PROTOCOL = "nec"


class PinnedFiles(AbstractFileSystem):
    """An explicit list of objects below `nec://`.

    Args:
        store: the archive.
        sizes: bytes of each object that may be read, by its name below the archive.
    """

    protocol = PROTOCOL
    cachable = False

    def __init__(self, store: Store, sizes: Mapping[str, int]) -> None:
        super().__init__()
        self._store = store
        self._sizes = dict(sizes)

    def _name(self, path: str) -> str:
        name = str(self._strip_protocol(path)).lstrip("/")
        if name not in self._sizes:
            raise FileNotFoundError(path)
        return name

    def info(self, path: str, **_: Any) -> dict[str, Any]:
        """Size and type of a listed file."""
        name = self._name(path)
        return {"name": name, "size": self._sizes[name], "type": "file"}

    def modified(self, path: str) -> datetime:
        """The files are immutable."""
        self._name(path)
        return datetime.fromtimestamp(0, UTC)

    def exists(self, path: str, **_: Any) -> bool:
        """Whether the file is listed."""
        return str(self._strip_protocol(path)).lstrip("/") in self._sizes

    def glob(self, path: str, **_: Any) -> list[str]:
        """The path itself, where it is listed."""
        return [self._name(path)] if self.exists(path) else []

    def ls(self, path: str, detail: bool = True, **_: Any) -> list[Any]:
        """The path itself, where it is listed."""
        return [self.info(path) if detail else self._name(path)] if self.exists(path) else []

    def open(self, path: str, mode: str = "rb", **_: Any) -> "_RangeFile":
        """A listed file, for reading."""
        if mode != "rb":
            raise PermissionError(f"{path} is read-only")
        name = self._name(path)
        return _RangeFile(self._store, name, self._sizes[name])


class _RangeFile:
    """A file that fetches what is read, with a position of its own for every thread."""

    def __init__(self, store: Store, name: str, size: int) -> None:
        self._store = store
        self._name = name
        self.size = size
        self._local = threading.local()

    def tell(self) -> int:
        return getattr(self._local, "position", 0)

    def seek(self, offset: int, whence: int = 0) -> int:
        base = (0, self.tell(), self.size)[whence]
        self._local.position = base + offset
        return self.tell()

    def read(self, length: int = -1) -> bytes:
        start = min(self.tell(), self.size)
        end = self.size if length < 0 else min(start + length, self.size)
        data = self._store.read_range(self._name, start, end) if end > start else b""
        self._local.position = end
        return data

    def close(self) -> None:
        """Nothing is held open."""

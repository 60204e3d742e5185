"""The read-only file system through which DuckDB sees the index files of pinned versions, and nothing else.

One code path for local and remote archives: no listing, no globbing, no writing, and no shared file
position (DuckDB 2.0 seeks and reads one handle from several threads at once).
"""

import copy
import threading
import weakref
from collections import deque
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from typing import Any

from fsspec import AbstractFileSystem

from nec_ray.archive.datafile import DataFile
from nec_ray.archive.recorded import RecordedCatalog
from nec_ray.errors import NecError, NotFound
from nec_ray.storage import RangeReader, Store

PROTOCOL = "nec"
_LONGEST_FOOTER = 64 << 20
"""Of a longer one, that a log from outside may claim, the rest is fetched when it is asked for."""


class IndexFiles:
    """The data files of a version, or its recorded catalogs; their footers are fetched once, whoever asks.

    Args:
        store: the archive.
        files: what may be read, and nothing else.
        contract: the contract that their columns follow.

    Attributes:
        store: the archive.
        contract: the contract that their columns follow.
        listed: the files.
        sizes: bytes of each file, by its name below the archive.
    """

    def __init__(self, store: Store, files: Sequence[DataFile | RecordedCatalog], contract: str = "index.json") -> None:
        self.store = store
        self.contract = contract
        self.listed = tuple(files)
        self._files = {file.path: file for file in files}
        self.sizes = {file.path: file.size for file in files}
        self._tails: dict[str, bytes] = {}
        self._locks = {name: threading.Lock() for name in self._files}
        self._connecting = threading.Lock()
        self._reader: RangeReader | None = None

    def read(self, name: str, start: int, end: int) -> bytes:
        """Bytes `[start, end)` of a file.

        Raises:
            NotFound: it is gone.
        """
        file = self._files[name]
        first = max(0, file.size - min(file.footer, _LONGEST_FOOTER))
        try:
            if start < first:
                return self._fetch(name, start, end)
            with self._locks[name]:  # several threads ask for a footer at once
                if name not in self._tails:
                    self._tails[name] = self._fetch(name, first, file.size)
            return self._tails[name][start - first : end - first]
        except NotFound:
            raise NotFound(f"{self.store.url}: {name} is gone; gc has removed this version, open a newer one") from None

    def _fetch(self, name: str, start: int, end: int) -> bytes:
        with self._connecting:
            if self._reader is None:
                self._reader = RangeReader(self.store, self.sizes)
                weakref.finalize(self, self._reader.close)
        return self._reader.read(name, start, end)


class PinnedFiles(AbstractFileSystem):
    """The files of versions that are open, each at `nec://TOKEN/NAME`.

    Args:
        find: gives the files that hold the one of a token and a name, or raises FileNotFoundError.
        raised: DuckDB drops the type of what a file system raises; typed errors are kept here for it.
    """

    protocol = PROTOCOL
    cachable = False

    def __init__(self, find: Callable[[str, str], IndexFiles], raised: deque[NecError]) -> None:
        super().__init__()
        self._find_files = find
        self._raised = raised

    def _find(self, path: str) -> tuple[IndexFiles, str]:
        token, _, name = str(self._strip_protocol(path)).lstrip("/").partition("/")
        return self._find_files(token, name), name

    def info(self, path: str, **_: Any) -> dict[str, Any]:
        """Size and type of a listed file."""
        files, name = self._find(path)
        return {"name": path, "size": files.sizes[name], "type": "file"}

    def modified(self, path: str) -> datetime:
        """The files are immutable."""
        self._find(path)
        return datetime.fromtimestamp(0, UTC)

    def exists(self, path: str, **_: Any) -> bool:
        """Whether the file is listed."""
        try:
            self._find(path)
        except FileNotFoundError:
            return False
        return True

    def glob(self, path: str, **_: Any) -> list[str]:
        """The path itself, where it is listed."""
        return [path] if self.exists(path) else []

    def ls(self, path: str, detail: bool = True, **_: Any) -> list[Any]:
        """The path itself, where it is listed."""
        return [self.info(path) if detail else path] if self.exists(path) else []

    def open(self, path: str, mode: str = "rb", **_: Any) -> "_RangeFile":
        """A listed file, for reading."""
        if mode != "rb":
            raise PermissionError(f"{path} is read-only")
        files, name = self._find(path)
        return _RangeFile(files, name, self._raised)


class _RangeFile:
    """A file that fetches what is read, with a position of its own for every thread."""

    def __init__(self, files: IndexFiles, name: str, raised: deque[NecError]) -> None:
        self._files = files
        self._name = name
        self._raised = raised
        self.size = files.sizes[name]
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
        try:
            data = self._files.read(self._name, start, end) if end > start else b""
        except NecError as error:
            self._raised.append(copy.copy(error))
            raise
        self._local.position = end
        return data

    def close(self) -> None:
        """Nothing is held open."""

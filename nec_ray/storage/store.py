"""One folder of objects: read, read ranges, create once, list.

Objects are written whole and never changed, so that a reader sees all of an object or none of it. What passes by
itself (a busy store, a broken connection) is tried again for a minute and a half; all operations here may be repeated.
"""

import io
import os
import secrets
import shutil
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path, PurePosixPath
from typing import IO, Any, TypeVar, cast

import fsspec
from fsspec.implementations.local import LocalFileSystem
from pyarrow.fs import FSSpecHandler, PyFileSystem

from nec_ray.errors import InputError, NotFound, StorageError, TooShort
from nec_ray.storage import s3
from nec_ray.storage.faults import first_byte, is_taken, patiently, typed_errors

_PART_BYTES = 16 << 20
"""Parts of a multipart upload, of which a few are in memory at a time."""
_UPLOADS = 4
_COPY_BYTES = 64 << 20
_READERS = 16
_WEB = ("http", "https")

Range = tuple[str, int, int]
"""(name, first byte, byte after the last)."""
Result = TypeVar("Result")


@dataclass(frozen=True)
class Entry:
    """An object of a listing."""

    name: str
    size: int
    modified: datetime
    """When it was written, by the store's clock."""


class Store:
    """The folder at `url`; names are relative, with `/`, and may not leave it.

    Raises:
        InputError: the URL's scheme is unknown, or cannot do what is asked (nothing is written by https).
        NotFound: (reading) the object, bucket or folder is not there.
        StorageError: the store refused, or was away for too long; TooShort: the object is shorter than asked for.
    """

    def __init__(self, url: str | os.PathLike[str]) -> None:
        self.url = normalise_url(url)
        self.scheme = self.url.partition("://")[0] if "://" in self.url else "file"
        self._fs: Any
        self._root: str
        with typed_errors(self.url):
            self._fs, self._root = s3.connect(self.url) if self.scheme == "s3" else fsspec.url_to_fs(self.url)
        self.is_local = isinstance(self._fs, LocalFileSystem)

    @property
    def lists(self) -> bool:
        """Whether the store can list: plain web servers cannot."""
        return self.scheme not in _WEB

    def path(self, name: str) -> str:
        """The file system's own path of `name`."""
        parts = PurePosixPath(name).parts
        if not parts or ".." in parts or name.startswith("/") or "://" in name:
            raise StorageError(f"{self.url}: {name!r} is no name inside this folder")
        return f"{self._root.rstrip('/')}/{name}"

    def delta_options(self) -> dict[str, str]:
        """Options by which delta-rs reaches this store."""
        with typed_errors(self.url):
            return s3.delta_options(self._fs) if self.scheme == "s3" else {}

    def arrow(self) -> tuple[Any, str]:
        """This folder for libraries that take an Arrow file system: the file system, and the folder's path in it."""
        return PyFileSystem(FSSpecHandler(self._fs)), self._root.rstrip("/")

    def read(self, name: str) -> bytes:
        """All bytes of an object."""
        return bytes(self._call(name, self._fs.cat_file))

    def read_start(self, name: str, most: int) -> bytes:
        """The first `most` bytes of an object, or all of a shorter one that is not empty; one request."""
        return bytes(self._call(name, lambda path: self._fs.cat_file(path, start=0, end=most)))[:most]

    def read_range(self, name: str, start: int, end: int) -> bytes:
        """Bytes `[start, end)` of an object."""

        def read(path: str) -> bytes:
            data = bytes(self._fs.cat_file(path, start=start, end=end))
            if len(data) > end - start:  # a web server that knows no ranges sends the whole object
                data = data[start:end]
            if len(data) < end - start and self._fs.info(path)["size"] >= end:
                raise ConnectionResetError("the answer was cut off")
            return data

        data = self._call(name, read)
        if len(data) != end - start:
            raise TooShort(f"{self.url}/{name}: bytes {start}-{end} asked for, {len(data)} came; the object is shorter")
        return data

    def read_ranges(self, ranges: Sequence[Range]) -> Iterator[bytes]:
        """Bytes of many ranges in the order asked for, some requests at a time."""
        if len(ranges) < 2 or self.is_local:
            yield from (self.read_range(*one) for one in ranges)
            return
        with ThreadPoolExecutor(min(_READERS, len(ranges))) as pool:
            yield from pool.map(lambda one: self.read_range(*one), ranges)

    @contextmanager
    def open(self, name: str) -> Iterator[IO[bytes]]:
        """An object as a seekable file; on object stores a read fetches just the bytes asked for, patiently."""
        with self._call(name, lambda path: self._fs.open(path, "rb")) if self.is_local else self._remote(name) as file:
            yield file

    def local_file(self, name: str, folder: Path) -> Path:
        """A path of an object: its own on a local disk, else that of a copy in `folder`, made in parts."""
        size = self.size(name)
        if self.is_local:
            return Path(self.path(name))
        copy = folder / PurePosixPath(name).name
        with copy.open("wb") as out:
            for start in range(0, size, _COPY_BYTES):
                out.write(self.read_range(name, start, min(start + _COPY_BYTES, size)))
        return copy

    def size(self, name: str) -> int:
        """Length of an object in bytes."""
        return int(self._info(name)["size"])

    def exists(self, name: str) -> bool:
        """Whether an object or folder is there."""
        if self.scheme not in _WEB:
            return bool(self._call(name, self._fs.exists))
        try:  # fsspec's own word is False whatever a web server answers, so that a busy one has nothing
            self._call(name, lambda path: first_byte(self._fs, path))
        except NotFound:
            return False
        return True

    def modified(self, name: str) -> datetime:
        """When an object was written, by the store's clock."""
        return _time(self._info(name), self._where(name))

    def names(self, prefix: str) -> list[str]:
        """Names of all objects below the folder `prefix`, sorted; empty where it is not there."""
        return [entry.name for entry in self.entries(prefix)]

    def entries(self, prefix: str) -> list[Entry]:
        """All objects below the folder `prefix`, by name; empty where it is not there."""
        if not self.lists:
            raise InputError(f"{self.url}: a web server lists nothing; give the archive's s3:// URL or path")
        found = self._call(prefix, lambda path: self._fs.find(path, detail=True))
        start = len(self._root.rstrip("/")) + 1
        return [
            Entry(path[start:], int(info["size"]), _time(info, path))
            for path, info in sorted(found.items())
            # What a killed local writer left, and the folder itself: s3fs names it where nothing was below it in one
            # request and something in the next.
            if not PurePosixPath(path).name.startswith(".") and info.get("type") != "directory"
        ]

    def etag(self, name: str) -> str:
        """Changes when the object changes: the store's ETag, or modification time and size."""
        info = self._info(name)
        if self.is_local:
            return f"{Path(self.path(name)).stat().st_mtime_ns:x}-{info['size']:x}"
        stamp = info.get("ETag") or info.get("etag") or info.get("LastModified") or info.get("mtime") or info["size"]
        return str(stamp).strip('"')

    def create(self, name: str, data: bytes) -> bool:
        """Write an object unless one of that name is there; true if this call wrote it."""

        def local(path: Path) -> None:
            path.write_bytes(data)

        return self._create(name, local, lambda path: self._fs.pipe_file(path, data, mode="create"))

    def create_from(self, name: str, source: Path) -> bool:
        """`create` from a file on a local disk, in parts, so that it never lies in memory as a whole."""

        def local(path: Path) -> None:
            shutil.copyfile(source, path)

        def upload(path: str) -> None:
            self._fs.put_file(os.fspath(source), path, mode="create", chunksize=_PART_BYTES, max_concurrency=_UPLOADS)

        return self._create(name, local, upload)

    def replace(self, name: str, data: bytes) -> None:
        """Write an object whole, in place of one that may be there: for files of the user's, never an archive's."""
        self.check_writable()
        if not self.is_local:
            self._call(name, lambda path: self._fs.pipe_file(path, data))
            return
        path = Path(self.path(name))
        with typed_errors(self._where(name)), _temporary(path, lambda temporary: temporary.write_bytes(data)) as made:
            made.replace(path)

    def delete(self, names: Sequence[str]) -> None:
        """Remove objects; those that are gone already are no error."""
        self.check_writable()
        for name in names:
            try:
                self._call(name, self._fs.rm_file)
            except NotFound:
                continue

    def touch(self, name: str) -> None:
        """Make an object young, as if it had just been written."""
        self.check_writable()
        if self.is_local:
            with typed_errors(self._where(name)):
                os.utime(self.path(name))
        elif self.scheme == "s3":  # which does it without moving the bytes
            self._call(name, lambda path: self._fs.cp_file(path, path, MetadataDirective="REPLACE"))
        else:
            self.replace(name, self.read(name))

    def leftovers(self, prefix: str) -> list[Entry]:
        """What killed writers left on a local disk below the folder `prefix`; stores of objects keep nothing half."""
        folder = Path(self.path(prefix))
        if not self.is_local or not folder.is_dir():
            return []
        found = []
        for path in sorted(folder.rglob(".*.tmp")):
            with suppress(FileNotFoundError):
                state = path.stat()
                name = path.relative_to(self._root).as_posix()
                found.append(Entry(name, state.st_size, datetime.fromtimestamp(state.st_mtime, UTC)))
        return found

    def now(self) -> datetime:
        """The time by the store's own clock, which is what its objects' times are told by."""
        name = f"clocks/{secrets.token_hex(8)}"
        self.create(name, b"")
        try:
            return self.modified(name)
        finally:
            with suppress(StorageError):  # who may not remove things leaves it to gc
                self.delete([name])

    def _create(self, name: str, write: Callable[[Path], object], upload: Callable[[str], object]) -> bool:
        self.check_writable()
        if self.is_local:
            path = Path(self.path(name))
            with typed_errors(self._where(name)), _temporary(path, write) as made:
                try:
                    os.link(made, path)  # fails where the name is taken, so that two writers cannot both win
                except FileExistsError:
                    return False
                return True
        try:
            self._call(name, upload, taken=is_taken)
        except _Taken:
            return False
        return True

    def check_writable(self) -> None:
        """Refuse a store that nothing can be written to.

        Raises:
            InputError: it is a web server.
        """
        if self.scheme in _WEB:
            raise InputError(f"{self.url}: nothing can be written to a web server; give an s3:// URL or a path")

    def _remote(self, name: str) -> IO[bytes]:
        size = self._info(name)["size"]
        if size is None:  # a web server that does not tell it
            return io.BytesIO(self.read(name))
        return cast("IO[bytes]", _Remote(lambda start, end: self.read_range(name, start, end), int(size)))

    def _info(self, name: str) -> dict[str, Any]:
        return dict(self._call(name, self._fs.info))

    def _call(
        self, name: str, operation: Callable[[str], Result], taken: Callable[[OSError], bool] = lambda _: False
    ) -> Result:
        path = self.path(name)
        with typed_errors(self._where(name)):
            try:
                return operation(path) if self.is_local else patiently(lambda: operation(path))
            except OSError as error:
                if taken(error):
                    raise _Taken from error
                raise

    def _where(self, name: str) -> str:
        return f"{self.url.rstrip('/')}/{name}"


class _Taken(Exception):
    """An object of that name is there."""


class _Remote(io.RawIOBase):
    """A remote object as a file. fsspec's own gives up at the first 500 of a restarting store."""

    def __init__(self, fetch: Callable[[int, int], bytes], size: int) -> None:
        self._fetch = fetch
        self._size = size
        self._at = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        start = {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._size}[whence]
        if start + offset < 0:
            raise ValueError(f"position {start + offset} lies before the start")
        self._at = start + offset
        return self._at

    def read(self, size: int | None = -1) -> bytes:
        end = self._size if size is None or size < 0 else min(self._at + size, self._size)
        if end <= self._at:
            return b""
        data = self._fetch(self._at, end)
        self._at = end
        return data

    def readall(self) -> bytes:
        return self.read()

    def readinto(self, buffer: Any) -> int:
        view = memoryview(buffer).cast("B")
        data = self.read(len(view))
        view[: len(data)] = data
        return len(data)


def normalise_url(url: str | os.PathLike[str]) -> str:
    """A URL as it is, a path made absolute; no trailing slash. InputError: it is neither."""
    if not isinstance(url, str | os.PathLike):
        raise InputError(f"{url!r} is no path or URL; give a string or a pathlib.Path")
    text = os.fspath(url)
    if text.startswith("file://"):
        text = text.removeprefix("file://")
    if "://" in text:
        return text.rstrip("/")
    return str(Path(text).expanduser().absolute()).rstrip("/") or "/"


def read_url(url: str | os.PathLike[str]) -> bytes:
    """All bytes of the one object at `url`."""
    text = normalise_url(url)
    folder, _, name = text.rpartition("/")
    return Store(folder or "/").read(name)


@contextmanager
def _temporary(path: Path, write: Callable[[Path], object]) -> Iterator[Path]:
    """What `write` writes, on disk beside `path`; removed again."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}.tmp")
    try:
        write(temporary)
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        yield temporary
    finally:
        temporary.unlink(missing_ok=True)


def _time(info: dict[str, Any], where: str) -> datetime:
    found = next((info[key] for key in ("LastModified", "mtime", "modified", "created") if info.get(key)), None)
    if isinstance(found, int | float):
        return datetime.fromtimestamp(found, UTC)
    if not isinstance(found, datetime):
        raise StorageError(f"{where}: this store does not tell when an object was written")
    return found if found.tzinfo else found.replace(tzinfo=UTC)

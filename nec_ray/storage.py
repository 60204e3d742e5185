"""One folder of objects, on a local disk or any fsspec URL: read, ranged read, create once, list.

Objects are written whole and never changed, so that a reader sees all of an object or none of it.
"""

import errno
import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import IO

import fsspec
from fsspec.implementations.local import LocalFileSystem

from nec_ray.errors import InputError, NotFound, StorageError

_CLIENTS = ("botocore", "aiobotocore", "aiohttp")  # object stores' libraries, whose errors are no OSErrors
_PRECONDITION_STATUS = (409, 412)  # S3 answers either when an object is already there


class Store:
    """The folder at `url`; names are relative, with `/`, and may not leave it.

    Raises:
        InputError: the URL's scheme is unknown.
        NotFound: (reading) the object, bucket or folder is not there.
        StorageError: the store refused or broke off.
    """

    def __init__(self, url: str | os.PathLike[str]) -> None:
        self.url = normalise_url(url)
        with _typed_errors(self.url):
            self._fs, self._root = fsspec.url_to_fs(self.url)
        self.is_local = isinstance(self._fs, LocalFileSystem)

    def path(self, name: str) -> str:
        """The file system's own path of `name`."""
        parts = PurePosixPath(name).parts
        if not parts or ".." in parts or name.startswith("/") or "://" in name:
            raise StorageError(f"{self.url}: {name!r} is no name inside this folder")
        return f"{self._root.rstrip('/')}/{name}"

    def _where(self, name: str) -> str:
        return f"{self.url.rstrip('/')}/{name}"

    def read(self, name: str) -> bytes:
        """All bytes of an object."""
        with _typed_errors(self._where(name)):
            return bytes(self._fs.cat_file(self.path(name)))

    def read_range(self, name: str, start: int, end: int) -> bytes:
        """Bytes `[start, end)` of an object."""
        with _typed_errors(self._where(name)):
            data = bytes(self._fs.cat_file(self.path(name), start=start, end=end))
        if len(data) != end - start:
            raise StorageError(
                f"{self.url}/{name}: bytes {start}-{end} asked for, {len(data)} came; the object is shorter"
            )
        return data

    @contextmanager
    def open(self, name: str) -> Iterator[IO[bytes]]:
        """An object as a seekable file; on object stores a read fetches just the bytes asked for."""
        options = {} if self.is_local else {"cache_type": "none"}
        with _typed_errors(self._where(name)):
            file = self._fs.open(self.path(name), "rb", **options)
        with file:
            yield file

    def size(self, name: str) -> int:
        """Length of an object in bytes."""
        with _typed_errors(self._where(name)):
            return int(self._fs.info(self.path(name))["size"])

    def exists(self, name: str) -> bool:
        """Whether an object or folder is there."""
        with _typed_errors(self._where(name)):
            return bool(self._fs.exists(self.path(name)))

    def list(self, prefix: str) -> list[str]:
        """Names of all objects below the folder `prefix`, sorted; empty where it is not there."""
        with _typed_errors(f"{self.url}/{prefix}"):
            found = self._fs.find(self.path(prefix))
        start = len(self._root.rstrip("/")) + 1
        return sorted(name[start:] for name in found)

    def replace(self, name: str, data: bytes) -> None:
        """Write an object whole, in place of one that may be there: for files of the user's, never an archive's."""
        path = self.path(name)
        with _typed_errors(self._where(name)):
            if not self.is_local:
                self._fs.pipe_file(path, data)
                return
            with _temporary(Path(path), data) as temporary:
                temporary.replace(path)

    def etag(self, name: str) -> str:
        """Changes when the object changes: the store's ETag, or modification time and size."""
        with _typed_errors(self._where(name)):
            info = self._fs.info(self.path(name))
        if self.is_local:
            return f"{Path(self.path(name)).stat().st_mtime_ns:x}-{info['size']:x}"
        stamp = info.get("ETag") or info.get("etag") or info.get("LastModified") or info.get("mtime") or info["size"]
        return str(stamp).strip('"')

    def create(self, name: str, data: bytes) -> bool:
        """Write an object unless one of that name is there; true if this call wrote it."""
        path = self.path(name)
        with _typed_errors(self._where(name)):
            if self.is_local:
                return _create_local(Path(path), data)
            try:
                self._fs.pipe_file(path, data, mode="create")
            except FileExistsError:
                return False
            except OSError as error:
                if _is_precondition_failure(error):
                    return False
                raise
            return True


def normalise_url(url: str | os.PathLike[str]) -> str:
    """A URL as it is, a path made absolute; no trailing slash."""
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


def _create_local(path: Path, data: bytes) -> bool:
    with _temporary(path, data) as temporary:
        try:
            os.link(temporary, path)  # fails where the name is taken, so that two writers cannot both win
        except FileExistsError:
            return False
    return True


@contextmanager
def _temporary(path: Path, data: bytes) -> Iterator[Path]:
    """The data on disk beside `path`, removed again."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}.tmp")
    try:
        with temporary.open("xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        yield temporary
    finally:
        temporary.unlink(missing_ok=True)


def _is_precondition_failure(error: OSError) -> bool:
    # s3fs turns S3's 412 into OSError(EINVAL), see the conditional create of DESIGN.md
    cause = error.__cause__
    response = getattr(cause, "response", None)
    if isinstance(response, dict):
        return response.get("ResponseMetadata", {}).get("HTTPStatusCode") in _PRECONDITION_STATUS
    return error.errno == errno.EINVAL and "precondition" in str(error).lower()


@contextmanager
def _typed_errors(where: str) -> Iterator[None]:
    try:
        yield
    except FileNotFoundError as error:
        raise NotFound(f"{where}: nothing is there; check the path or URL") from error
    except (NotADirectoryError, IsADirectoryError) as error:
        raise NotFound(f"{where}: {error.strerror}; check the path or URL") from error
    except (ValueError, ImportError) as error:
        raise InputError(f"{where}: {error}; use a path, s3:// or another fsspec URL") from error
    except OSError as error:
        raise StorageError(
            f"{where}: {error.strerror or error}; check the store, then run the command again"
        ) from error
    except Exception as error:
        if type(error).__module__.split(".")[0] not in _CLIENTS:
            raise
        raise StorageError(f"{where}: {error}; check the address and the credentials") from error

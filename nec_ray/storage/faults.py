"""What stores raise, as typed errors; which of it passes by itself, so that it is tried again."""

import errno
import logging
import random
import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

from nec_ray.errors import InputError, NoBucket, NotFound, StorageError, without_secrets

_CLIENTS = ("botocore", "aiobotocore", "aiohttp")  # object stores' libraries, whose errors are no OSErrors
_PRECONDITION_STATUS = (409, 412)  # S3 answers either when an object is already there
_PASSING = {
    errno.EBUSY,  # s3fs's word for SlowDown, ServiceUnavailable and OperationAborted
    errno.ETIMEDOUT,
    errno.ECONNREFUSED,
    errno.ECONNRESET,
    errno.EPIPE,
    getattr(errno, "EREMOTEIO", errno.EIO),  # and for InternalError
}
_ABSENT_STATUS = {403, 404, 410}  # 403 is what S3 says of a missing object to those who may not list
_PASSING_STATUS = {408, 429, 500, 502, 503, 504}
_DELTA_PASSING = re.compile(
    r"status (code )?(5\d\d|429)|error sending request|error reading a body|response body|"
    r"connection (reset|closed|refused)|timed out",
    re.IGNORECASE,
)
"""What delta-rs says, which tells its kinds of errors by their words alone."""
_PASSING_NAMES = ("Connection", "Timeout", "IncompleteRead", "Payload", "HTTPClient", "Disconnected")
PATIENCE_S = 90.0
"""For how long an operation is tried again: a store's restart, not its end."""
_MAX_PAUSE_S = 5.0
_SILENT_S = 5.0
_LOG = logging.getLogger(__name__)

Result = TypeVar("Result")


def patiently(call: Callable[[], Result]) -> Result:
    """The result of an operation that may be repeated, tried again while the store is away or busy."""
    began = time.monotonic()
    pause, said = 0.1, False
    while True:
        try:
            return call()
        except Exception as error:
            waited = time.monotonic() - began
            if not is_passing(error) or waited + pause > PATIENCE_S:
                raise
            if waited > _SILENT_S and not said:
                said = True
                _LOG.warning("%s", without_secrets(f"the store is away or busy ({_line(error)}); trying again"))
        time.sleep(pause * random.uniform(0.5, 1.0))  # jitter, so that readers do not come back all at once
        pause = min(2 * pause, _MAX_PAUSE_S)


def is_taken(error: OSError) -> bool:
    """Whether a conditional create failed because the object is there: s3fs makes OSError(EINVAL) of S3's 412."""
    if isinstance(error, FileExistsError):
        return True
    status = _status(error.__cause__)
    if status is not None:
        return status in _PRECONDITION_STATUS
    return error.errno == errno.EINVAL and "precondition" in str(error).lower()


@contextmanager
def typed_errors(where: str) -> Iterator[None]:
    """Turns what file systems raise into one-line typed errors that name `where`."""
    try:
        yield
    except FileNotFoundError as error:
        hidden = _hidden(error)
        if hidden is not None:
            raise StorageError(f"{where}: {_line(hidden)}; check the address and the credentials") from error
        if _is_about_the_bucket(error):
            raise NoBucket(f"{where}: its bucket is not there; check the URL, or create it") from error
        raise NotFound(f"{where}: nothing is there; check the path or URL") from error
    except (NotADirectoryError, IsADirectoryError) as error:
        raise NotFound(f"{where}: {error.strerror}; check the path or URL") from error
    except PermissionError as error:
        raise StorageError(
            f"{where}: access is refused ({_line(error)}); check the credentials and what they allow"
        ) from error
    except (ValueError, ImportError) as error:
        raise InputError(f"{where}: {_line(error)}; use a path, s3:// or another fsspec URL") from error
    except OSError as error:
        if error.errno == errno.ENOSPC:
            raise StorageError(f"{where}: the disk is full; make room, then run the command again") from error
        raise StorageError(f"{where}: {_line(error)}; check the store, then run the command again") from error
    except Exception as error:
        if not _is_clients(error):
            raise
        if _status(error) in _ABSENT_STATUS:
            raise NotFound(f"{where}: nothing is there, or it is not public; check the URL") from error
        raise StorageError(f"{where}: {_line(error)}; check the address and the credentials") from error


def delta_text(error: BaseException) -> str:
    """What delta-rs says, on one line: it breaks its text at 80 columns, wherever that falls, with coloured arrows."""
    return " ".join(re.sub(r"\x1b\[\d*m|↳", "", str(error)).split())


def is_passing(error: BaseException) -> bool:
    """Whether an error passes by itself, so that trying again makes sense."""
    from_delta = type(error).__module__.startswith(("_internal", "deltalake"))
    if from_delta or (type(error) is OSError and error.errno is None):
        return _DELTA_PASSING.search(delta_text(error)) is not None
    status = _status(error) or _status(error.__cause__)
    if status is not None:
        return status in _PASSING_STATUS
    hidden = _hidden(error)
    if hidden is not None:
        return is_passing(hidden)
    if isinstance(error, ConnectionError | TimeoutError):
        return True
    if isinstance(error, OSError) and not isinstance(error, FileNotFoundError | PermissionError):
        return error.errno in _PASSING
    name = type(error).__name__
    return _is_clients(error) and any(word in name for word in _PASSING_NAMES)


def first_byte(fs: Any, path: str) -> bytes:
    """The first byte of a web server's object; nothing of an empty one."""
    try:
        return bytes(fs.cat_file(path, start=0, end=1))
    except Exception as error:
        if _status(error) == 416:  # there is no such byte, but the object
            return b""
        raise


def _status(error: BaseException | None) -> int | None:
    """HTTP status of a client library's error."""
    response = getattr(error, "response", None)
    if isinstance(response, dict):
        status = response.get("ResponseMetadata", {}).get("HTTPStatusCode")
    else:
        status = getattr(error, "status", None)
    return status if isinstance(status, int) else None


def _hidden(error: BaseException) -> BaseException | None:
    """What a web server did that fsspec calls a missing file, as it does whatever the server did."""
    cause = error.__cause__
    if not isinstance(error, FileNotFoundError) or cause is None or not type(cause).__module__.startswith("aiohttp"):
        return None
    return None if _status(cause) in _ABSENT_STATUS else cause


def _is_about_the_bucket(error: BaseException) -> bool:
    response = getattr(error.__cause__, "response", None)
    return isinstance(response, dict) and response.get("Error", {}).get("Code") == "NoSuchBucket"


def _is_clients(error: BaseException) -> bool:
    return type(error).__module__.split(".")[0] in _CLIENTS


def _line(error: BaseException) -> str:
    text = getattr(error, "strerror", None) or str(error) or type(error).__name__
    return " ".join(str(text).split())

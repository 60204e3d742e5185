"""Typed errors, grouped by what a caller would do about them.

NecError
├── InputError            what was asked for is wrong: change the command and run it again
│   ├── NotFound              a file, folder, URL, codec or version that is not there
│   │   └── NoBucket              a bucket that is not there
│   ├── BadSource             a source that cannot be read as tiles
│   ├── BadCatalog            a Parquet file that is not a tile catalog
│   ├── BadRecipe             a recipe or config with an unknown key or an impossible value
│   ├── BadQuery              SQL that does not parse, or that does more than read
│   ├── BadLabels             labels that match no tile, or too few classes
│   ├── BadCheckpoint         a checkpoint that is not what its name says
│   ├── CodecMismatch         a codec, head or archive that does not fit the other
│   ├── MixedCodecs           embeddings of several encoders in one pull
│   ├── TooMuchLoss           a re-encoding that would lose more than is allowed
│   └── MissingDependency     an optional package that this command needs
├── DataError             bytes are damaged: restore them, or encode again
│   ├── CorruptPayload
│   ├── CorruptCodec
│   ├── CorruptPack
│   └── CorruptIndex
├── UnsupportedFormat     written by a later release: update nec_ray
├── ConflictError         somebody else committed first: read the new version and try again
│   ├── LeaseHeld             another run is at work: run the same command again when it is done
│   └── LeaseLost             this run was taken for dead and another may be at work: the same
├── StorageError          the store refused or broke off: check it, then run the same command again
│   └── TooShort              an object that ends before the bytes asked for
└── RunError              a training or encoding run failed as a whole: its message says how to go on
"""

import os
import re
from typing import Any

_HIDDEN = "***"
_USER = re.compile(r"(?<=://)[^/\s@'\"]+@")
_SIGNED = re.compile(
    r"(?<=[?&;])([\w-]*(?:sig|signature|credential|token|secret|password|passwd|key|key_?id|sas))=[^&#\s'\"]+",
    re.IGNORECASE,
)
_SECRET_VARIABLES = ("AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN")


def without_secrets(text: str) -> str:
    """Text without what opens a store: user and password in a URL, its signatures and keys, AWS's secrets."""
    text = _SIGNED.sub(rf"\1={_HIDDEN}", _USER.sub(f"{_HIDDEN}@", text)) if "://" in text else text
    for name in _SECRET_VARIABLES:
        secret = os.environ.get(name)
        if secret and secret in text:
            text = text.replace(secret, _HIDDEN)
    return text


class NecError(Exception):
    """Base of every error that a user can mend; its message is one line: what, where, what to do.

    What opens a store is left out of it, so that it can be printed and logged.
    """

    def __init__(self, *args: Any) -> None:
        super().__init__(*(without_secrets(arg) if isinstance(arg, str) else arg for arg in args))


class InputError(NecError):
    """What was asked for is wrong."""


class NotFound(InputError):
    """A file, folder, URL, codec or version that is not there."""


class NoBucket(NotFound):
    """A bucket that is not there."""


class BadSource(InputError):
    """A source that cannot be read as tiles."""


class BadCatalog(InputError):
    """A Parquet file that is not a tile catalog."""


class BadRecipe(InputError):
    """A recipe or config with an unknown key or an impossible value."""


class BadQuery(InputError):
    """SQL that does not parse, or that does more than read."""


class BadLabels(InputError):
    """Labels that match no tile, or too few classes."""


class BadCheckpoint(InputError):
    """A checkpoint that is not what its name says."""


class CodecMismatch(InputError):
    """A codec, head or archive that does not fit the other."""


class MixedCodecs(InputError):
    """Embeddings of several encoders in one pull."""


class TooMuchLoss(InputError):
    """A re-encoding that would lose more than is allowed."""


class MissingDependency(InputError):
    """An optional package that this command needs is not installed."""


class DataError(NecError):
    """Bytes are damaged."""


class CorruptPayload(DataError):
    """A payload that fails its checksum or does not decode."""

    def __init__(self, message: str, payload: int | None = None) -> None:
        super().__init__(message)
        self.payload = payload
        """Which of several payloads, counted from 0."""


class CorruptCodec(DataError):
    """A codec directory whose hashes, tables or golden payloads do not hold."""


class CorruptPack(DataError):
    """A pack whose header or footer does not read."""


class CorruptIndex(DataError):
    """An index that names files outside the archive, or rows that cannot be."""


class UnsupportedFormat(NecError):
    """A format version that this release does not know."""


class ConflictError(NecError):
    """Another writer changed the same rows first."""


class LeaseHeld(ConflictError):
    """Another run has the lease."""


class LeaseLost(ConflictError):
    """This run no longer has its lease."""


class StorageError(NecError):
    """The store refused, or broke off."""


class TooShort(StorageError):
    """An object that ends before the bytes asked for: damage, not an outage."""


class RunError(NecError):
    """A training or encoding run failed as a whole."""


class Interrupted(KeyboardInterrupt):
    """The user stopped a run (no error, so no NecError); what was finished is committed."""

    def __init__(self, done: int, todo: int) -> None:
        super().__init__(
            f"stopped: {done:,} of {todo:,} tiles are committed; run the same command again to go on with the rest"
        )

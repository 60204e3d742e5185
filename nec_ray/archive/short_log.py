"""A short log of plain commits, read without delta-rs, which takes as long over it as a small query does in all.

Only what this package itself commits is understood. Whatever else a log holds (many commits, another protocol,
deletion vectors, a gap, damage) is not judged here: delta-rs reads it then, and says what is wrong.
"""

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from nec_ray.archive.layout import INDEX
from nec_ray.contracts import arrow_schema
from nec_ray.errors import NotFound, TooShort
from nec_ray.storage import Store

_LOG = f"{INDEX}/_delta_log"
_COMMIT = re.compile(r"([0-9]{20})\.json")
_MOST_COMMITS = 32
_MOST_BYTES = 1 << 20
_LARGEST = 1 << 48


@dataclass(frozen=True)
class State:
    """What a log says of a version; nothing of it is checked yet."""

    version: int
    files: list[tuple[str, int, int]]
    """(name, bytes, rows) of data files."""
    properties: Mapping[str, str]
    """Of the table."""


class _NotPlain(Exception):
    """Something that is left to delta-rs."""


def read_short_log(store: Store, version: int | None = None) -> State | None:
    """A version, or the newest; None where delta-rs has to read the log.

    Raises:
        NotFound: there is no such version.
        StorageError: the store refused, or was away for too long.
    """
    if not store.is_local and store.scheme != "s3":
        return None
    try:
        sizes = {entry.name.rpartition("/")[2]: entry.size for entry in store.entries(_LOG)}
    except NotFound:
        return None
    commits = sorted(name for name in sizes if _COMMIT.fullmatch(name))
    if commits and version is not None and version > int(commits[-1][:20]):  # delta-rs would count up to it
        raise NotFound(f"{store.url}: no version {version}; the newest is {int(commits[-1][:20])}")
    newest = len(commits) - 1 if version is None else version
    wanted = commits[: newest + 1]
    if not wanted or len(wanted) != newest + 1 or wanted[-1] != f"{newest:020}.json":
        return None
    if len(wanted) > _MOST_COMMITS or sum(sizes[name] for name in wanted) > _MOST_BYTES:
        return None
    try:
        found = store.read_ranges([(f"{_LOG}/{name}", 0, sizes[name]) for name in wanted])
        return State(newest, *_replay(action for commit in found for action in _actions(commit)))
    except (_NotPlain, NotFound, TooShort, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None


def _actions(commit: bytes) -> Iterator[tuple[str, Any]]:
    for line in commit.splitlines():
        [(kind, action)] = json.loads(line).items()
        yield kind, action


def _replay(actions: Iterator[tuple[str, Any]]) -> tuple[list[tuple[str, int, int]], dict[str, str]]:
    """Data files and properties after all actions.

    Raises:
        _NotPlain, ValueError, KeyError, TypeError, AttributeError: something here is for delta-rs to read.
    """
    files: dict[str, tuple[str, int, int]] = {}
    properties: dict[str, str] = {}
    kinds = set()
    for kind, action in actions:
        kinds.add(kind)
        if kind == "add":
            size, rows = action["size"], json.loads(action["stats"])["numRecords"]
            _expect(action["partitionValues"] == {} and action.get("deletionVector") is None)
            _expect(all(type(number) is int and 0 <= number < _LARGEST for number in (size, rows)))
            _expect(type(action["path"]) is str and "%" not in action["path"] and action["path"] not in files)
            files[action["path"]] = (action["path"], size, rows)
        elif kind == "remove":
            _expect(action.get("deletionVector") is None)
            del files[action["path"]]
        elif kind == "protocol":
            _expect(action["minReaderVersion"] == 1 and not action.get("readerFeatures"))
        elif kind == "metaData":
            names = [field["name"] for field in json.loads(action["schemaString"])["fields"]]
            _expect(action["format"]["provider"] == "parquet" and action["partitionColumns"] == [])
            _expect(names == arrow_schema("index.json").names)
            properties = action["configuration"]
            _expect(all(type(text) is str for pair in properties.items() for text in pair))
        else:
            _expect(kind in {"commitInfo", "txn"})
    _expect({"protocol", "metaData"} <= kinds)
    return list(files.values()), properties


def _expect(plain: bool) -> None:
    if not plain:
        raise _NotPlain

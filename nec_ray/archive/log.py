"""The Delta log of an index: opened at a version, added to by one commit that lands whole or not at all.

Commits are made on exactly the version they were checked against: delta-rs may not retry by itself, since what it
would check again is files, not tile ids.
"""

import json
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pyarrow as pa
from deltalake import CommitProperties, DeltaTable, PostCommitHookProperties, Schema, Transaction
from deltalake.exceptions import CommitFailedError, DeltaError, TableNotFoundError
from deltalake.transaction import AddAction, RemoveAction

from nec_ray.archive.layout import INDEX
from nec_ray.errors import CorruptIndex, NotFound, StorageError
from nec_ray.storage import Store
from nec_ray.storage.faults import delta_text, is_passing, patiently
from nec_ray.storage.signals import stops_later

_LOG = f"{INDEX}/_delta_log"
_CHECKPOINT_EVERY = 100
_MOST_COMMITS = 100_000
"""Commits behind a checkpoint that are read over a store without listing."""
_READERS = 16
_OPERATION, _COMMIT = "necOperation", "necCommit"
# A checkpoint now and then keeps opening fast; log files are kept, since without them older versions do not open.
_HOOKS = PostCommitHookProperties(create_checkpoint=True, cleanup_expired_logs=False)


@dataclass(frozen=True)
class Entry:
    """One commit of the history."""

    version: int
    time: datetime
    """By the clock of the writer, UTC."""
    operation: str
    """append, delete, compact, reencode, restore, rebuild, catalog, or create."""


class Log:
    """The log of the index at `store`."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self.uri = f"{store.url}/{INDEX}"
        self._delta = store.is_local or store.lists  # delta-rs lists: where that cannot be, it reads a copy
        self._opened: DeltaTable | None = None

    def create(self, schema: pa.Schema, properties: Mapping[str, str]) -> None:
        """Create an empty table, version 0, with these properties, unless one is there."""
        self._store.check_writable()
        try:
            with stops_later():
                DeltaTable.create(
                    self.uri,
                    Schema.from_arrow(schema),
                    mode="error",
                    name="embeddings",
                    configuration={"delta.checkpointInterval": str(_CHECKPOINT_EVERY), **properties},
                    raise_if_key_not_exists=False,  # which is about Delta's own properties
                    storage_options=self._store.delta_options(),
                    commit_properties=CommitProperties(custom_metadata={_OPERATION: "create"}),
                )
        except (DeltaError, OSError) as error:
            if not self.exists():
                raise StorageError(f"{self.uri}: the index cannot be created ({line(error)})") from error

    def exists(self) -> bool:
        """Whether there is a log at all."""
        if not self._delta:
            return self._store.exists(_commit_name(0))
        try:
            return patiently(lambda: DeltaTable.is_deltatable(self.uri, self._store.delta_options()))
        except (DeltaError, OSError) as error:
            raise StorageError(f"{self.uri}: {line(error)}; check the store") from error

    def open(self, version: int | None = None) -> DeltaTable:
        """The table at a version, or at the newest.

        Raises:
            NotFound: no table, or no such version.
            CorruptIndex: the log does not read.
        """
        if not self._delta:
            with tempfile.TemporaryDirectory(prefix="nec-log-") as folder:
                self._copy(Path(folder), version)
                return self._open(folder, version, {})
        self._opened = self._open(self.uri, version, self._store.delta_options())
        return self._opened

    def commit(
        self,
        version: int,
        actions: Sequence[AddAction | RemoveAction],
        operation: str,
        name: str,
        shards: Sequence[str] = (),
    ) -> bool:
        """Commit on top of `version`; false where somebody else's commit came first, or the store was away.

        Args:
            version: what the actions were checked against.
            actions: data files to add and to remove.
            operation: what it is, for the history.
            name: of the commit, the same for every attempt, by which it is known again.
            shards: ids of shards that it finishes, recorded as Delta application transactions.

        Raises:
            StorageError: the store refused, and nothing was committed.
        """
        self._store.check_writable()
        table = self._take(version)
        properties = CommitProperties(
            custom_metadata={_OPERATION: operation, _COMMIT: name},
            max_commit_retries=0,
            app_transactions=[Transaction(f"shard-{shard}", version + 1) for shard in shards],
        )
        try:
            with stops_later():
                table.create_write_transaction(
                    list(actions),
                    "append",
                    table.schema(),
                    commit_properties=properties,
                    post_commithook_properties=_HOOKS,
                )
        except (DeltaError, OSError) as error:
            # A conditional write whose answer was lost is refused when it is tried again: look whose commit it is.
            if self._is_mine(version + 1, name):
                return True
            if isinstance(error, CommitFailedError) or is_passing(error):
                return False
            raise StorageError(f"{self.uri}: the commit failed ({line(error)}); run the command again") from error
        return True

    def set_properties(self, version: int, properties: Mapping[str, str], operation: str) -> bool:
        """Commit table properties on top of `version`; false where somebody else's commit came first.

        Raises:
            StorageError: the store refused, and nothing was committed.
        """
        self._store.check_writable()
        try:
            table = self._take(version)
            with stops_later():
                table.alter.set_table_properties(
                    dict(properties),
                    raise_if_not_exists=False,
                    commit_properties=CommitProperties(custom_metadata={_OPERATION: operation}, max_commit_retries=0),
                    post_commithook_properties=_HOOKS,
                )
        except (DeltaError, OSError) as error:
            if isinstance(error, CommitFailedError) or is_passing(error):  # perhaps it landed and the answer was lost
                return False
            raise StorageError(f"{self.uri}: the commit failed ({line(error)}); run the command again") from error
        return True

    def restore(self, version: int, current: int) -> bool:
        """Commit the files of an older version as the newest; false where somebody else's commit came first."""
        self._store.check_writable()  # of a web server's log there is a copy only, on which a commit would land
        table = self.open(current)
        properties = CommitProperties(custom_metadata={_OPERATION: "restore"}, max_commit_retries=0)
        try:
            table.restore(version, commit_properties=properties)
        except CommitFailedError:
            return False
        except (DeltaError, OSError) as error:
            raise StorageError(f"{self.uri}: cannot be restored to version {version} ({line(error)})") from error
        return True

    def since(self, version: int) -> Iterator[dict[str, Any]]:
        """The actions of all later commits, as the Delta protocol writes them."""
        number = version
        while True:
            number += 1
            try:
                lines = self._store.read(_commit_name(number)).splitlines()
            except NotFound:
                return
            yield from map(json.loads, lines)

    def history(self) -> list[Entry]:
        """All commits, the newest first."""
        if not self._delta:
            with tempfile.TemporaryDirectory(prefix="nec-log-") as folder:
                newest = self._newest()
                self._fetch(Path(folder), [_commit_name(number) for number in range(newest + 1)])
                return self._history(self._open(folder, None, {}))
        return self._history(self.open())

    def _history(self, table: DeltaTable) -> list[Entry]:
        return [
            Entry(
                int(entry["version"]),
                datetime.fromtimestamp(entry["timestamp"] / 1000, UTC),
                str(entry.get(_OPERATION) or entry.get("operation", "")).lower(),
            )
            for entry in patiently(table.history)
        ]

    def _take(self, version: int) -> DeltaTable:
        """The table at a version, to commit on: delta-rs moves it on to whatever the commit meets."""
        opened, self._opened = self._opened, None
        if opened is not None and opened.version() == version:
            return opened
        table, self._opened = self.open(version), None
        return table

    def _open(self, uri: str, version: int | None, options: dict[str, str]) -> DeltaTable:
        try:
            return patiently(lambda: DeltaTable(uri, version=version, storage_options=options))
        except TableNotFoundError:
            raise NotFound(f"{self._store.url}: no index there; check the path or URL") from None
        except (DeltaError, OSError, OverflowError, ValueError) as error:
            if version is not None and self.exists():
                newest = self.open().version()
                if version > newest:
                    raise NotFound(f"{self._store.url}: no version {version}; the newest is {newest}") from None
            kind = StorageError if isinstance(error, OSError) else CorruptIndex
            raise kind(f"{self.uri}: the log does not read ({line(error)})") from error

    def _is_mine(self, version: int, name: str) -> bool:
        try:
            lines = self._store.read(_commit_name(version)).splitlines()
        except NotFound:
            return False
        entries = [json.loads(one) for one in lines]
        return any(entry.get("commitInfo", {}).get(_COMMIT) == name for entry in entries)

    def _copy(self, folder: Path, version: int | None) -> None:
        """The part of the log that opening a version needs: found by names alone, without listing."""
        (folder / "_delta_log").mkdir()
        checkpoint = self._last_checkpoint()
        newest = self._newest(checkpoint)
        wanted = newest if version is None else version
        if wanted > newest:
            raise NotFound(f"{self._store.url}: no version {version}; the newest is {newest}")
        first = checkpoint if 0 <= checkpoint <= wanted else 0
        names = [_commit_name(number) for number in range(first, wanted + 1)]
        if first == checkpoint:
            names += [f"{_LOG}/{checkpoint:020}.checkpoint.parquet", f"{_LOG}/_last_checkpoint"]
        self._fetch(folder, names)

    def _fetch(self, folder: Path, names: Sequence[str]) -> None:
        (folder / "_delta_log").mkdir(exist_ok=True)
        with ThreadPoolExecutor(_READERS) as pool:
            for name, data in zip(names, pool.map(self._store.read, names), strict=True):
                (folder / "_delta_log" / name.rpartition("/")[2]).write_bytes(data)

    def _last_checkpoint(self) -> int:
        """Version of the last checkpoint, -1 where there is none."""
        try:
            found = json.loads(self._store.read(f"{_LOG}/_last_checkpoint"))["version"]
        except NotFound:
            return -1
        except (ValueError, KeyError, TypeError):
            found = None
        if not isinstance(found, int) or found < 0:
            raise CorruptIndex(f"{self.uri}: its last checkpoint does not read; restore _last_checkpoint")
        return found

    def _newest(self, known: int | None = None) -> int:
        known = max(0, self._last_checkpoint() if known is None else known)
        if not self._store.exists(_commit_name(known)):
            raise NotFound(f"{self._store.url}: no index there; check the path or URL")
        for number in range(known + 1, known + _MOST_COMMITS):
            if not self._store.exists(_commit_name(number)):
                return number - 1
        raise CorruptIndex(f"{self.uri}: over {_MOST_COMMITS:,} commits without a checkpoint; compact the archive")


def _commit_name(version: int) -> str:
    return f"{_LOG}/{version:020}.json"


def line(error: Exception) -> str:
    """Start of an error's text, on one line."""
    text = delta_text(error)
    return text[:300] or type(error).__name__

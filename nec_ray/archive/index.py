"""The index: a Delta table whose GeoParquet data files we write, committed one transaction at a time.

Every commit is attempted on exactly the version it was checked against: when another writer came first, the new
version is read, what changed is checked, and the commit is tried again. That makes writers serial where it counts,
so that no tile id is ever there twice.
"""

import hashlib
import json
import random
import re
import secrets
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from functools import partial

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
from deltalake.transaction import AddAction, RemoveAction

from nec_ray.archive.datafile import DataFile, read_file, write_files
from nec_ray.archive.log import Entry, Log
from nec_ray.archive.recorded import RecordedCatalog, recorded_catalogs
from nec_ray.archive.short_log import State, read_short_log
from nec_ray.contracts import arrow_schema
from nec_ray.errors import ConflictError, CorruptIndex, InputError, NotFound
from nec_ray.storage import Store

_DATA_FILE = re.compile(r"part-[0-9a-f]{32}\.parquet")
_ATTEMPTS = 200
_MAX_PAUSE_S = 1.0

Action = AddAction | RemoveAction
Written = dict[tuple[str, bytes], list[AddAction]]
"""Data files written for a commit, by the file that their rows were in before and the number of rows."""
Changes = Mapping[str, datetime]
"""Tile ids, with the `encoded_at` that their rows are known to have: a row with another one was changed."""


@dataclass(frozen=True)
class Version:
    """One committed state of the index: an explicit list of files, so that reading needs no listing."""

    number: int
    files: tuple[DataFile, ...]
    properties: Mapping[str, str] = field(default_factory=dict, compare=False)
    """Of the table: they name the recorded catalogs."""

    @property
    def rows(self) -> int:
        """Rows of all files."""
        return sum(file.rows for file in self.files)


@dataclass(frozen=True)
class Commit:
    """What a commit did."""

    version: int
    added: int
    """Rows that are new or replace an older row."""
    dropped: int
    """Rows that were left out because another writer had committed their tiles first."""
    files: tuple[str, ...] = ()
    """Names of the data files that hold the rows added."""


class Index:
    """The Delta table of the archive at `store`."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._log = Log(store)
        self._known: dict[str, npt.NDArray[np.uint64]] = {}

    def create(self, catalogs: Iterable[RecordedCatalog] = ()) -> None:
        """Create the empty table (version 0), in which these catalogs are recorded, unless there is one."""
        self._log.create(arrow_schema("index.json"), _properties(catalogs))

    def exists(self) -> bool:
        """Whether there is an index."""
        return self._log.exists()

    def version(self, at: int | datetime | None = None) -> Version:
        """The newest version, that of a number, or the newest at a time.

        Raises:
            NotFound: no index, or no such version.
            CorruptIndex: a file lies outside the index, or is listed twice.
        """
        number = self._number_at(at) if isinstance(at, datetime) else at
        return self._checked(read_short_log(self._store, number) or self._opened(number))

    def _opened(self, number: int | None = None) -> State:
        """The same by delta-rs, whose table the next commit is made on."""
        table = self._log.open(number)
        actions = pa.table(table.get_add_actions())
        columns = (actions[name].to_pylist() for name in ("path", "size_bytes", "num_records"))
        return State(table.version(), list(zip(*columns, strict=True)), table.metadata().configuration)

    def _checked(self, state: State) -> Version:
        files = [DataFile(*one) for one in state.files]
        for file in files:
            if not _DATA_FILE.fullmatch(file.name) or file.rows is None or file.size < 0:
                raise CorruptIndex(
                    f"{self._log.uri}: the log names {file.name[:120]!r}, which is no data file of this index"
                )
        if len({file.name for file in files}) < len(files):
            raise CorruptIndex(f"{self._log.uri}: the log names a data file twice")
        return Version(state.version, tuple(sorted(files, key=lambda file: file.name)), state.properties)

    def catalogs(self, version: Version) -> tuple[RecordedCatalog, ...]:
        """The catalogs that are recorded in a version.

        Raises:
            CorruptIndex: a name or value that cannot be.
        """
        return recorded_catalogs(self._log.uri, version.properties)

    def record(self, catalogs: Collection[RecordedCatalog]) -> None:
        """Record catalogs, whose objects are there, in one transaction; those that are recorded are left as they are.

        Raises:
            ConflictError: other writers came first every time.
            StorageError: the store refused.
        """
        for attempt in range(_ATTEMPTS):
            current = self._checked(self._opened())
            new = set(catalogs) - set(self.catalogs(current))
            if not new or self._log.set_properties(current.number, _properties(new), "catalog"):
                return
            _pause(attempt)
        raise self._outrun()

    def history(self) -> list[Entry]:
        """All commits, the newest first."""
        return self._log.history()

    def read(self, files: Sequence[DataFile], columns: Sequence[str]) -> pa.Table:
        """Columns of data files, one after the other."""
        schema = arrow_schema("index.json")
        empty = pa.schema([schema.field(name) for name in columns]).empty_table()
        return pa.concat_tables([empty, *(read_file(self._store, file, columns) for file in files)])

    def append(
        self,
        base: Version,
        rows: pa.Table,
        *,
        replaces: Changes | None = None,
        shards: Sequence[str] = (),
        apart: Collection[str] = (),
    ) -> Commit:
        """Add rows in one transaction, leaving out tiles that somebody else committed since `base`.

        Args:
            base: version that the rows were planned against: it holds none of their tile ids, but for those
                in `replaces`.
            rows: schema `index.json`.
            replaces: tiles whose row in `base` is to be replaced; a row that changed since stays as it is.
            shards: ids of the shards in these rows, recorded as Delta application transactions.
            apart: names of data files added since `base` that hold none of these tile ids, such as
                the same run's.

        Raises:
            ConflictError: other writers came first every time.
            StorageError: the store refused.
        """
        fresh = rows
        written: Written = {}
        known = {*(file.name for file in base.files), *apart}

        def actions(current: Version) -> list[Action]:
            nonlocal fresh
            fresh, outdated = self._split(known, current, rows, replaces or {})
            return self._replace(outdated, fresh, written) if fresh.num_rows else []

        version = self._transact(actions, "append", shards)
        added = written.get(("", _digest(fresh["tile_id"])), []) if fresh.num_rows else []
        return Commit(version, fresh.num_rows, rows.num_rows - fresh.num_rows, tuple(one.path for one in added))

    def swap(
        self,
        changes: Changes,
        rows: pa.Table,
        operation: str,
        *,
        within: Collection[DataFile] | None = None,
    ) -> Commit:
        """Replace or remove rows in one transaction, all of them or none.

        Args:
            changes: the tiles whose rows go.
            rows: what comes in their place, schema `index.json`; a tile without a row here is removed.
            operation: what it is, for the history.
            within: data files known to hold those tiles; they are looked at first.

        Raises:
            ConflictError: another writer changed or removed one of the tiles, or came first every time: read the
                new version and try again.
            StorageError: the store refused.
        """
        if not set(rows["tile_id"].to_pylist()) <= set(changes):
            raise ValueError("a swap brings only tiles that it takes away")

        written: Written = {}

        def actions(current: Version) -> list[Action]:
            return self._replace(self._locate(current, changes, within or ()), rows, written)

        return Commit(self._transact(actions, operation), rows.num_rows, 0)

    def replace_all(self, base: Version, rows: pa.Table, operation: str) -> int:
        """Make these rows the whole of the index; the number of the version made.

        Raises:
            ConflictError: something was committed since `base`.
        """

        def actions(current: Version) -> list[Action]:
            if current.number != base.number:
                raise ConflictError(f"{self._log.uri}: another writer committed meanwhile; run the same command again")
            return [*write_files(self._store, rows), *(file.removal() for file in current.files)]

        return self._transact(actions, operation)

    def needed_since(self, number: int) -> tuple[set[DataFile], set[RecordedCatalog]]:
        """The data files and the recorded catalogs of a version and of all later ones."""
        version = self.version(number)
        files, catalogs = {*version.files}, {*self.catalogs(version)}
        for action in self._log.since(number):
            if added := action.get("add"):
                files.add(DataFile(added["path"], added["size"], json.loads(added["stats"])["numRecords"]))
            if changed := action.get("metaData"):
                catalogs.update(recorded_catalogs(self._log.uri, changed["configuration"]))
        return files, catalogs

    def restore(self, number: int) -> int:
        """Make the files of an older version the newest; the number of the version made.

        Raises:
            NotFound: no such version.
            ConflictError: other writers came first every time.
        """
        for attempt in range(_ATTEMPTS):
            current = self.version()
            if self._log.restore(number, current.number):
                return current.number + 1
            _pause(attempt)
        raise self._outrun()

    def _transact(self, actions: Callable[[Version], list[Action]], operation: str, shards: Sequence[str] = ()) -> int:
        """Commit the actions that a version asks for; the number of the version made, or found with nothing to do."""
        name = secrets.token_hex(16)
        for attempt in range(_ATTEMPTS):
            current = self._checked(self._opened())
            asked = actions(current)
            if not asked:
                return current.number
            if self._log.commit(current.number, asked, operation, name, shards):
                return current.number + 1
            _pause(attempt)
        raise self._outrun()

    def _outrun(self) -> ConflictError:
        return ConflictError(f"{self._log.uri}: other writers came first {_ATTEMPTS} times; run the same command again")

    def _replace(self, outdated: Mapping[DataFile, pa.Array], rows: pa.Table, written: Written) -> list[Action]:
        """Actions that take the ids of `outdated` out of their files and add `rows`.

        What an earlier attempt has written of the same rows is not written again.
        """
        parts: dict[tuple[str, bytes], Callable[[], pa.Table]] = {("", _digest(rows["tile_id"])): lambda: rows}
        for file, ids in outdated.items():
            parts[file.name, _digest(ids)] = partial(self._without, file, ids)
        for key, part in parts.items():
            if key not in written:
                left = part()
                written[key] = list(write_files(self._store, left)) if left.num_rows else []
        added = [action for key in parts for action in written[key]]
        return [*added, *(file.removal() for file in outdated)]

    def _split(
        self, known: Collection[str], current: Version, rows: pa.Table, replaces: Changes
    ) -> tuple[pa.Table, dict[DataFile, pa.Array]]:
        """Rows that may be committed, and the ids that each file of `current` has to give up for them."""
        suspects = current.files if replaces else [file for file in current.files if file.name not in known]
        ids = rows["tile_id"].combine_chunks()
        taken: list[str] = []
        outdated: dict[DataFile, pa.Array] = {}
        for file in self._may_hold(suspects, ids):
            give_up = []
            for tile_id, encoded_at in self._marks(file, ids):
                if replaces.get(tile_id) == encoded_at:
                    give_up.append(tile_id)
                else:
                    taken.append(tile_id)
            if give_up:
                outdated[file] = pa.array(give_up, pa.string())
        return rows.filter(pc.invert(pc.is_in(ids, pa.array(taken, pa.string())))), outdated

    def _locate(self, current: Version, changes: Changes, within: Collection[DataFile]) -> dict[DataFile, pa.Array]:
        """The files of `current` that hold the tiles of `changes`, and which ones each."""
        missing = dict(changes)
        found: dict[DataFile, pa.Array] = {}
        likely = set(within)
        ids = pa.array(changes, pa.string())
        for file in self._may_hold(sorted(current.files, key=lambda file: file not in likely), ids):
            if not missing:
                break
            here = []
            for tile_id, encoded_at in self._marks(file, pa.array(missing, pa.string())):
                if tile_id not in missing:
                    raise CorruptIndex(f"{self._store.url}: tile {tile_id} is there twice; restore an older version")
                if missing.pop(tile_id) != encoded_at:
                    raise ConflictError(
                        f"{self._store.url}: tile {tile_id} was changed by another writer; nothing was committed"
                    )
                here.append(tile_id)
            if here:
                found[file] = pa.array(here, pa.string())
        if missing:
            raise ConflictError(
                f"{self._store.url}: tile {min(missing)} was removed by another writer; nothing was committed"
            )
        return found

    def _may_hold(self, files: Iterable[DataFile], ids: pa.Array) -> Iterator[DataFile]:
        """The files among whose tile ids some of `ids` may be.

        A run commits often and against many files: 8 bytes a tile are remembered, so that it reads each file once.
        """
        wanted = _hashes(ids)
        for file in files:
            if file.name not in self._known:
                self._known[file.name] = _hashes(read_file(self._store, file, ["tile_id"])["tile_id"])
            if np.isin(wanted, self._known[file.name]).any():
                yield file

    def _marks(self, file: DataFile, ids: pa.Array) -> list[tuple[str, datetime]]:
        there = read_file(self._store, file, ["tile_id", "encoded_at"])
        there = there.filter(pc.is_in(there["tile_id"], ids))
        return list(zip(there["tile_id"].to_pylist(), there["encoded_at"].to_pylist(), strict=True))

    def _without(self, file: DataFile, ids: pa.Array) -> pa.Table:
        rows = read_file(self._store, file, arrow_schema("index.json").names)
        return rows.filter(pc.invert(pc.is_in(rows["tile_id"], ids)))

    def _number_at(self, moment: datetime) -> int:
        if moment.tzinfo is None:
            raise InputError(f"version {moment}: give the time with its zone, such as {moment.isoformat()}+00:00")
        # A log object's modification time does not survive a copy; the commit's own timestamp does.
        entries = self.history()
        older = [entry.version for entry in entries if entry.time <= moment]
        if not older:
            first = min(entry.time for entry in entries).isoformat(timespec="seconds") if entries else "none"
            raise NotFound(f"{self._store.url}: no version at {moment.isoformat()}; the archive is younger, of {first}")
        return max(older)


def _properties(catalogs: Iterable[RecordedCatalog]) -> dict[str, str]:
    return {key: value for one in catalogs for key, value in one.properties.items()}


def _digest(ids: pa.Array | pa.ChunkedArray) -> bytes:
    return hashlib.sha256("\n".join(sorted(ids.to_pylist())).encode()).digest()


def _hashes(ids: pa.Array | pa.ChunkedArray) -> npt.NDArray[np.uint64]:
    digests = (hashlib.blake2b(tile_id.encode(), digest_size=8).digest() for tile_id in ids.to_pylist())
    return np.frombuffer(b"".join(digests), np.uint64)


def _pause(attempt: int) -> None:
    # Jitter, because writers that wait equally long collide again.
    time.sleep(random.uniform(0, min(_MAX_PAUSE_S, 0.02 * 2 ** min(attempt, 6))))

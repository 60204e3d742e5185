"""The index: a Delta table whose GeoParquet data files we write, committed one transaction at a time.

Every commit is attempted on exactly the version it was checked against (no retries inside delta-rs): when
another writer came first, the new version is read, what changed is checked, and the commit is tried again.
That makes writers serial where it counts, so that no tile id is ever there twice.
"""

import json
import random
import re
import secrets
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from deltalake import CommitProperties, DeltaTable, Schema, Transaction
from deltalake.exceptions import CommitFailedError, DeltaError, TableNotFoundError
from deltalake.transaction import AddAction, RemoveAction

from nec_ray.archive.layout import INDEX
from nec_ray.contracts import arrow_schema
from nec_ray.errors import ConflictError, CorruptIndex, InputError, NotFound, StorageError
from nec_ray.storage import Store
from nec_ray.tiles.geoparquet import geoparquet_bytes
from nec_ray.tiles.hilbert import spatial_order

_DATA_FILE = re.compile(r"part-[0-9a-f]{32}\.parquet")
_ATTEMPTS = 200
_MAX_PAUSE_S = 1.0
_STATISTICS = ("tile_id", "codec_id", "status", "acquired_at")


@dataclass(frozen=True)
class DataFile:
    """One data file of a version."""

    name: str
    size: int
    rows: int

    @property
    def path(self) -> str:
        """Its name below the archive."""
        return f"{INDEX}/{self.name}"


@dataclass(frozen=True)
class Version:
    """One committed state of the index: an explicit list of files, so that reading needs no listing."""

    number: int
    files: tuple[DataFile, ...]

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


class Index:
    """The Delta table of the archive at `store`."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._uri = f"{store.url}/{INDEX}"

    def create(self) -> None:
        """Create the empty table (version 0) unless it is there."""
        try:
            DeltaTable.create(self._uri, Schema.from_arrow(arrow_schema("index.json")), mode="error", name="embeddings")
        except DeltaError as error:
            if not self._exists():
                raise StorageError(f"{self._uri}: the index cannot be created ({_line(error)})") from error

    def version(self, at: int | datetime | None = None) -> Version:
        """The newest version, that of a number, or the newest at a time.

        Raises:
            NotFound: no index, or no such version.
            CorruptIndex: a file lies outside the index.
        """
        if isinstance(at, datetime):
            at = self._number_at(at)
        table = self._table(at)
        actions = pa.table(table.get_add_actions())
        files = []
        for name, size, rows in zip(
            actions["path"].to_pylist(),
            actions["size_bytes"].to_pylist(),
            actions["num_records"].to_pylist(),
            strict=True,
        ):
            if not _DATA_FILE.fullmatch(name) or rows is None:
                raise CorruptIndex(f"{self._uri}: the log names {name[:120]!r}, which is no data file of this index")
            files.append(DataFile(name, size, rows))
        return Version(table.version(), tuple(sorted(files, key=lambda file: file.name)))

    def read(self, files: Sequence[DataFile], columns: Sequence[str]) -> pa.Table:
        """Columns of data files, one after the other."""
        schema = arrow_schema("index.json")
        empty = pa.schema([schema.field(name) for name in columns]).empty_table()
        return pa.concat_tables([empty, *(self._read_file(file, columns) for file in files)])

    def commit(
        self,
        base: Version,
        rows: pa.Table,
        *,
        replaces: Mapping[str, datetime] | None = None,
        shards: Sequence[str] = (),
    ) -> Commit:
        """Add rows in one transaction, leaving out tiles that somebody else committed since `base`.

        Args:
            base: version that the rows were planned against: it holds none of their tile ids, but for those
                in `replaces`.
            rows: schema `index.json`.
            replaces: tile ids whose row in `base` is to be replaced, with the `encoded_at` it has there; a row
                that changed since stays as it is.
            shards: ids of the shards in these rows, recorded as Delta application transactions.

        Raises:
            ConflictError: other writers came first every time.
            StorageError: the store refused.
        """
        replaces = replaces or {}
        for attempt in range(_ATTEMPTS):
            current = self.version()
            fresh, outdated = self._split(base, current, rows, replaces)
            if not fresh.num_rows:
                return Commit(current.number, 0, rows.num_rows)
            kept = [self._without(file, ids) for file, ids in outdated.items()]
            added = [self._write(part) for part in [fresh, *kept] if part.num_rows]
            removed = [RemoveAction(file.name, True, int(time.time() * 1000)) for file in outdated]
            if self._try_commit(current.number, [*added, *removed], shards):
                return Commit(current.number + 1, fresh.num_rows, rows.num_rows - fresh.num_rows)
            # Jitter, because writers that wait equally long collide again.
            time.sleep(random.uniform(0, min(_MAX_PAUSE_S, 0.02 * 2 ** min(attempt, 6))))
        raise ConflictError(f"{self._uri}: other writers came first {_ATTEMPTS} times; run the same command again")

    def history(self) -> list[dict[str, object]]:
        """Committed versions, newest first: number, time (UTC), operation."""
        return [
            {
                "version": entry["version"],
                "time": datetime.fromtimestamp(entry["timestamp"] / 1000, UTC),
                "operation": entry.get("operation", ""),
            }
            for entry in self._table().history()
        ]

    def _split(
        self, base: Version, current: Version, rows: pa.Table, replaces: Mapping[str, datetime]
    ) -> tuple[pa.Table, dict[DataFile, pa.Array]]:
        """Rows that may be committed, and the ids that each file of `current` has to give up for them."""
        known = set(base.files)
        suspects = current.files if replaces else [file for file in current.files if file not in known]
        ids = rows["tile_id"].combine_chunks()
        taken: list[str] = []
        outdated: dict[DataFile, pa.Array] = {}
        for file in suspects:
            there = self._read_file(file, ["tile_id", "encoded_at"])
            there = there.filter(pc.is_in(there["tile_id"], ids))
            give_up = []
            for tile_id, encoded_at in zip(there["tile_id"].to_pylist(), there["encoded_at"].to_pylist(), strict=True):
                if replaces.get(tile_id) == encoded_at:
                    give_up.append(tile_id)
                else:
                    taken.append(tile_id)
            if give_up:
                outdated[file] = pa.array(give_up, pa.string())
        return rows.filter(pc.invert(pc.is_in(ids, pa.array(taken, pa.string())))), outdated

    def _without(self, file: DataFile, ids: pa.Array) -> pa.Table:
        rows = self._read_file(file, arrow_schema("index.json").names)
        return rows.filter(pc.invert(pc.is_in(rows["tile_id"], ids)))

    def _write(self, rows: pa.Table) -> AddAction:
        rows = rows.take(pa.array(spatial_order(rows)))
        name = f"part-{secrets.token_hex(16)}.parquet"
        data = geoparquet_bytes(rows)
        self._store.create(f"{INDEX}/{name}", data)
        return AddAction(name, len(data), {}, int(time.time() * 1000), True, json.dumps(_statistics(rows)))

    def _try_commit(self, version: int, actions: list[AddAction | RemoveAction], shards: Sequence[str]) -> bool:
        table = self._table(version)
        properties = CommitProperties(
            max_commit_retries=0,
            app_transactions=[Transaction(f"shard-{shard}", version + 1) for shard in shards],
        )
        try:
            table.create_write_transaction(actions, "append", table.schema(), commit_properties=properties)
        except CommitFailedError:
            return self._is_ours(actions)  # a lost answer to a commit that did land looks the same
        except DeltaError as error:
            if self._is_ours(actions):
                return True
            raise StorageError(f"{self._uri}: the commit failed ({_line(error)}); run the command again") from error
        return True

    def _is_ours(self, actions: list[AddAction | RemoveAction]) -> bool:
        mine = {action.path for action in actions if isinstance(action, AddAction)}
        return mine <= {file.name for file in self.version().files}

    def _read_file(self, file: DataFile, columns: Sequence[str]) -> pa.Table:
        schema = arrow_schema("index.json")
        try:
            with self._store.open(file.path) as handle:
                table = pq.read_table(handle, columns=list(columns))
            return table.select(list(columns)).cast(pa.schema([schema.field(name) for name in columns]))
        except (pa.ArrowInvalid, KeyError, ValueError) as error:
            raise CorruptIndex(f"{self._store.url}/{file.path}: {_line(error)}; restore the file from a copy") from None

    def _table(self, version: int | None = None) -> DeltaTable:
        try:
            return DeltaTable(self._uri, version=version)
        except TableNotFoundError:
            raise NotFound(f"{self._store.url}: no index there; check the path or URL") from None
        except DeltaError as error:
            if version is not None and self._exists():
                newest = DeltaTable(self._uri).version()
                raise NotFound(f"{self._store.url}: no version {version}; the newest is {newest}") from None
            raise StorageError(f"{self._uri}: {_line(error)}") from error
        except (OSError, OverflowError) as error:
            raise StorageError(f"{self._uri}: {_line(error)}") from error

    def _exists(self) -> bool:
        try:
            return DeltaTable.is_deltatable(self._uri)
        except DeltaError as error:
            raise StorageError(f"{self._uri}: {_line(error)}") from error

    def _number_at(self, moment: datetime) -> int:
        if moment.tzinfo is None:
            raise InputError(f"version {moment}: give the time with its zone, such as {moment.isoformat()}+00:00")
        # A log object's modification time does not survive a copy; the commit's own timestamp does.
        older = [v for v in self.history() if isinstance(v["time"], datetime) and v["time"] <= moment]
        if not older:
            raise NotFound(f"{self._store.url}: no version at {moment.isoformat()}; the archive is younger")
        return max(int(str(v["version"])) for v in older)


def _statistics(rows: pa.Table) -> dict[str, object]:
    """Delta's per-file statistics, nested for the bounding box, so that readers skip files."""
    low: dict[str, object] = {}
    high: dict[str, object] = {}
    nulls: dict[str, object] = {}
    for name in _STATISTICS:
        limits = pc.min_max(rows[name]).as_py()
        nulls[name] = rows[name].null_count
        for side, value in ((low, limits["min"]), (high, limits["max"])):
            if value is not None:
                side[name] = value.isoformat().replace("+00:00", "Z") if isinstance(value, datetime) else value
    box = pc.struct_field(rows["bbox"].combine_chunks(), "xmin")
    if box.null_count < len(box):
        parts = {key: pc.min_max(pc.struct_field(rows["bbox"].combine_chunks(), key)).as_py() for key in _BOX}
        low["bbox"] = {key: value["min"] for key, value in parts.items()}
        high["bbox"] = {key: value["max"] for key, value in parts.items()}
        nulls["bbox"] = dict.fromkeys(_BOX, box.null_count)
    return {"numRecords": rows.num_rows, "minValues": low, "maxValues": high, "nullCount": nulls}


_BOX = ("xmin", "ymin", "xmax", "ymax")


def _line(error: Exception) -> str:
    return str(error).strip().split("\n", 1)[0]

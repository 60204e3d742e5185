"""What a run was asked for and what the archive holds, joined by DuckDB, which goes to disk where memory is short."""

import os
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import duckdb
import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from nec_ray.archive.index import Index, Version
from nec_ray.archive.recorded import Digest
from nec_ray.tiles import OrderedTiles
from nec_ray.tiles.catalog import repeated, rows_where

_MEMORY_SHARE = 0.25
"""Of the memory that this process may use: beyond it DuckDB writes to disk."""
_CGROUP_LIMITS = (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"))
"""What a container may use, in bytes, by cgroups v2 and v1; `max` or a number past all memory is no limit."""
_INDEX_COLUMNS = ("tile_id", "source_etag", "status", "codec_id", "encoded_at", "encoded_from", "n_bytes")
_SCHEMA = """
CREATE TABLE tiles (n BIGINT, tile_id VARCHAR, source_etag VARCHAR, asked BOOLEAN, raw_bytes BIGINT, dtype VARCHAR);
CREATE TABLE committed (
    tile_id VARCHAR, source_etag VARCHAR, status VARCHAR, codec_id VARCHAR, encoded_at TIMESTAMPTZ,
    encoded_from VARCHAR, n_bytes BIGINT
);
"""
_BATCH = 1 << 18


@dataclass(frozen=True)
class Todo:
    """Tiles that are to be encoded, by their numbers in spatial order."""

    numbers: npt.NDArray[np.int64]
    """Ascending."""
    encoded_at: pa.Array
    """Of the row that is to be replaced, timestamp; null where there is none."""


@dataclass(frozen=True)
class Counts:
    """What became of the tiles that were asked for."""

    status: dict[str, int]
    payload_bytes: int
    raw_bytes: float
    """Mean bytes of a valid tile's pixels in the source's own type."""
    dtypes: str
    sample: list[int]
    """Numbers of valid tiles at even distances, ascending."""


class Ledger:
    """Tables `tiles` and `committed`; a context that closes the database.

    Args:
        tiles: the catalog's tiles.
        folder: where the database may write.
        where: SQL condition over a tile's columns; all tiles where it is None.

    Attributes:
        asked: number of tiles that were asked for.
        digest: of them, by which the archive records them.

    Raises:
        BadCatalog: a tile id stands twice.
        BadQuery: the condition does not parse or does not run.
    """

    def __init__(self, tiles: OrderedTiles, folder: Path, where: str | None) -> None:
        memory = int(usable_memory() * _MEMORY_SHARE)
        self._db = duckdb.connect(
            os.fspath(folder / "ledger.duckdb"),
            config={"memory_limit": f"{memory >> 20}MB", "temp_directory": os.fspath(folder / "spill")},
        )
        self._db.execute(_SCHEMA)
        self._db.execute("SET preserve_insertion_order = false; SET TimeZone = 'UTC'")
        self._tiles = tiles
        self._asked: list[npt.NDArray[np.bool_]] = []
        digest = Digest()
        waiting: list[pa.Table] = []
        start = 0
        for table in tiles.batches():
            asked = _asked(table, where)
            digest.update(table.filter(asked))
            self._asked.append(asked)
            waiting.append(_described(table, start, asked))
            start += table.num_rows
            if start % _BATCH == 0 or start == len(tiles):
                self._insert("tiles", pa.concat_tables(waiting))
                waiting = []
        self._check_unique(tiles.url)
        self.asked = sum(int(asked.sum()) for asked in self._asked)
        self.digest = digest.hexdigest()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._db.close()

    def asked_tiles(self) -> Iterator[pa.Table]:
        """Catalog rows of the tiles that were asked for, in spatial order, some at a time."""
        for asked, table in zip(self._asked, self._tiles.batches(), strict=True):
            yield table.filter(asked)

    def read(self, index: Index, version: Version) -> None:
        """Make `committed` the rows of a version, one file after the other."""
        self._db.execute("TRUNCATE committed")
        for file in version.files:
            self._insert("committed", index.read([file], _INDEX_COLUMNS))

    def other_codec(self, codec_id: str, akin: Sequence[str] = ()) -> str | None:
        """A codec other than this one that some of the tiles asked for are committed under.

        Args:
            codec_id: this one.
            akin: codecs of the same encoder: tiles that were transcoded to one of them do not count.
        """
        (found,) = self._row(
            "SELECT min(codec_id) FROM committed JOIN tiles USING (tile_id) WHERE asked AND codec_id <> ? "
            "AND NOT (encoded_from <> 'pixels' AND list_contains(?::VARCHAR[], codec_id))",
            [codec_id, list(akin)],
        )
        return None if found is None else str(found)

    def todo(self, *, retry_failed: bool) -> Todo:
        """Tiles that were asked for and that are not committed, or not of this source, or (where wanted) failed."""
        found: pa.Table = self._db.sql(
            """
            SELECT tiles.n, committed.encoded_at FROM tiles LEFT JOIN committed USING (tile_id)
            WHERE asked AND (committed.tile_id IS NULL OR committed.source_etag <> tiles.source_etag
                OR (? AND committed.status = 'failed'))
            ORDER BY tiles.n
            """,
            params=[retry_failed],
        ).to_arrow_table()
        older = found["encoded_at"].combine_chunks().cast(pa.timestamp("us", "UTC"))
        return Todo(found["n"].to_numpy(), older)

    def counts(self, sample: int) -> Counts:
        """What `committed` holds of the tiles asked for, with up to `sample` valid ones."""
        rows = self._db.execute(
            "SELECT status, count(*), sum(n_bytes) FROM tiles JOIN committed USING (tile_id) "
            "WHERE asked GROUP BY status"
        ).fetchall()
        valid = {str(status): int(count) for status, count, _ in rows}.get("valid", 0)
        self._db.execute(
            """
            CREATE OR REPLACE TEMP TABLE valid AS
            SELECT tiles.n, raw_bytes, dtype FROM tiles JOIN committed USING (tile_id) WHERE asked AND status = 'valid'
            """
        )
        mean, dtypes = self._row("SELECT avg(raw_bytes), string_agg(DISTINCT dtype, '/' ORDER BY dtype) FROM valid")
        ranks = np.unique(np.linspace(0, valid - 1, sample).astype(int)).tolist() if valid else []
        numbers = self._db.execute(
            "SELECT n FROM (SELECT n, row_number() OVER (ORDER BY n) - 1 AS rank FROM valid) "
            "WHERE list_contains(?, rank) ORDER BY n",
            [ranks],
        ).fetchall()
        return Counts(
            status={str(status): int(count) for status, count, _ in rows},
            payload_bytes=sum(int(size or 0) for _, _, size in rows),
            raw_bytes=float(mean or 0),
            dtypes=str(dtypes or ""),
            sample=[int(n) for (n,) in numbers],
        )

    def _insert(self, table: str, rows: pa.Table) -> None:
        self._db.register("part", rows)
        self._db.execute(f"INSERT INTO {table} BY NAME SELECT * FROM part")
        self._db.unregister("part")

    def _check_unique(self, url: str) -> None:
        twice = self._db.execute(
            "SELECT tile_id FROM tiles GROUP BY tile_id HAVING count(*) > 1 ORDER BY tile_id"
        ).fetchall()
        if twice:
            raise repeated([str(tile_id) for (tile_id,) in twice], url)

    def _row(self, sql: str, params: Sequence[Any] = ()) -> tuple[Any, ...]:
        [row] = self._db.execute(sql, list(params)).fetchall()
        return tuple(row)


def usable_memory() -> int:
    """Bytes that this process may use: the machine's memory, or less where its container has a limit."""
    found = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")]
    for path in _CGROUP_LIMITS:
        with suppress(OSError, ValueError):  # not there, or no number: no limit
            found.append(int(path.read_text()))
    return min(found)


def _asked(table: pa.Table, where: str | None) -> npt.NDArray[np.bool_]:
    asked = np.full(table.num_rows, where is None)
    if where is not None:
        asked[rows_where(table, where).to_numpy()] = True
    return asked


def _described(table: pa.Table, start: int, asked: npt.NDArray[np.bool_]) -> pa.Table:
    n = table.num_rows
    sizes = np.array([np.dtype(name).itemsize for name in table["dtype"].to_pylist()], np.int64)
    pixels = np.multiply(table["width"].to_numpy(), table["height"].to_numpy(), dtype=np.int64)
    bands = pc.list_value_length(table["bands"]).to_numpy()
    return pa.table(
        {
            "n": np.arange(start, start + n),
            "tile_id": table["tile_id"],
            "source_etag": table["source_etag"],
            "asked": asked,
            "raw_bytes": pixels * bands * sizes,
            "dtype": table["dtype"],
        }
    )

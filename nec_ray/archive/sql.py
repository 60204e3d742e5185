"""SQL over one version of the index."""

import atexit
import html
import weakref
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any

import duckdb
import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from nec_ray.archive import intersects  # noqa: F401  (a function of SQL)
from nec_ray.archive.database import connect, heeding, select, sql_function, typed
from nec_ray.archive.datafile import DataFile, read_file
from nec_ray.archive.filesystem import IndexFiles
from nec_ray.archive.guard import check_calls
from nec_ray.archive.hints import sql_hint
from nec_ray.archive.layout import archive_codec
from nec_ray.archive.payloads import decode, fetch, references
from nec_ray.codec import Arrays, Codec, parts_of
from nec_ray.errors import BadQuery, CorruptIndex, CorruptPack, CorruptPayload, InputError, NecError


class Query:
    """A query over the view `embeddings` that has not run yet.

    Nothing but one SELECT is accepted, and it reads nothing but the version's files. Use `to_arrow_table`,
    `to_arrow_reader`, `fetchall` or `df`; Arrow, Polars and pandas also take the object as it is.

    Raises:
        BadQuery: (also when the result is taken) the SQL does not parse, does more than read, or fails.
    """

    def __init__(self, files: IndexFiles, sql: str, params: Sequence[Any] | None = None) -> None:
        with typed_errors():
            check_calls(sql)
        if isinstance(params, str | bytes) or not isinstance(params, Iterable | None):
            raise InputError(f"params {params!r}: give a list of values, one a question mark of the query")
        self._files = files  # which are mounted for as long as somebody holds them
        _queries.add(self)
        self._connection = _check_readable(files, sql)
        with typed_errors():
            _only_a_select(self._connection, sql)
            self._relation = self._connection.sql(sql, params=list(params) if params else None)
            if self._relation is None:
                raise BadQuery("the query returns nothing; ask for columns with SELECT")

    @property
    def columns(self) -> list[str]:
        """Names of the result's columns."""
        return list(self._relation.columns)

    def to_arrow_table(self) -> pa.Table:
        """The whole result."""
        with typed_errors():
            return heeding(self._connection, self._relation.to_arrow_table)

    def to_arrow_reader(self, batch_rows: int = 10_000) -> pa.RecordBatchReader:
        """The result batch by batch, of `batch_rows` rows at most.

        Raises:
            InputError: that is less than one.
        """
        if not isinstance(batch_rows, int) or batch_rows < 1:
            raise InputError(f"batch_rows {batch_rows!r}: give 1 or more rows a batch")
        reader = self.to_arrow_reader_unchecked(batch_rows)

        def batches() -> Any:
            while True:
                with typed_errors():
                    try:
                        batch = heeding(self._connection, reader.read_next_batch)
                    except StopIteration:
                        return
                yield batch

        return pa.RecordBatchReader.from_batches(reader.schema, batches())

    def to_arrow_reader_unchecked(self, batch_rows: int) -> pa.RecordBatchReader:
        """DuckDB's own reader, whose errors are DuckDB's."""
        with typed_errors():
            return heeding(self._connection, lambda: self._relation.to_arrow_reader(batch_rows))

    def fetchall(self) -> list[tuple[Any, ...]]:
        """All rows as Python tuples."""
        table = self.to_arrow_table()  # DuckDB's own fetchall needs pytz for times
        try:
            return list(zip(*(column.to_pylist() for column in table.columns), strict=True))
        except (OverflowError, ValueError, pa.ArrowException) as error:
            raise BadQuery(f"a value of the result is none of Python's ({_line(error)}); cast it to VARCHAR") from None

    def df(self) -> Any:
        """The whole result as a pandas DataFrame; needs pandas."""
        return self.to_arrow_table().to_pandas()

    def __arrow_c_stream__(self, requested_schema: object = None) -> object:
        return self.to_arrow_table().__arrow_c_stream__(requested_schema)

    def __repr__(self) -> str:
        with typed_errors():
            return heeding(self._connection, lambda: str(self._relation))

    def _repr_html_(self) -> str:
        return f"<pre>{html.escape(repr(self))}</pre>"


_queries: "weakref.WeakSet[Query]" = weakref.WeakSet()


@atexit.register
def _let_go() -> None:
    """DuckDB's Python binding reports what a script still holds at its end as leaks, on stderr."""
    for query in list(_queries):
        vars(query).clear()


def find(files: IndexFiles, columns: str, condition: str, params: Sequence[Any] | None = None) -> pa.Table:
    """Columns of the rows that a condition picks.

    Raises:
        BadQuery: the condition does not run.
        CorruptIndex: a file does not read.
    """
    with typed_errors():
        try:
            return select(files, columns, condition, params)
        except duckdb.Error as error:
            if typed(error) is None:
                _check_readable(files, condition)
            raise


def bracketed(where: str | None) -> str:
    """The condition in brackets that it cannot break out of.

    Raises:
        BadQuery: it is no SQL condition.
    """
    if not isinstance(where, str | None):
        raise BadQuery(f"{where!r} is no SQL condition; give one as a string, such as \"status = 'valid'\"")
    if not where or not where.strip():
        return "true"
    try:
        duckdb.SQLExpression(where)
    except duckdb.Error as error:
        raise BadQuery(f"{where}: no SQL condition ({' '.join(str(error).split())})") from None
    check_calls(where)
    return f"({where}\n)"  # the line break ends a comment


@sql_function("nec_decode", "FLOAT[][]")
def _decode(files: IndexFiles, payload: pa.ChunkedArray) -> pa.Array:
    """Embeddings, list(tokens) of list(channels) float32, of payload references.

    Of several grid scales the tokens follow one another, coarse first, each with its own number of channels.
    """
    channels: list[npt.NDArray[np.int64]] = [np.zeros(0, np.int64)] * len(payload)
    parts: list[tuple[list[int], list[npt.NDArray[np.float32]]]] = []
    for numbers, codec, symbols in _symbols(files, payload):
        arrays = parts_of(codec.dequantise(symbols))
        parts.append((numbers, [array.reshape(len(numbers), -1) for array in arrays]))
        of_tile = np.concatenate([np.full(array.shape[1], array.shape[2]) for array in arrays])
        for number in numbers:
            channels[number] = of_tile
    begin = np.concatenate([[0], np.cumsum([of_tile.sum() for of_tile in channels], dtype=np.int64)])
    flat = np.empty(begin[-1], np.float32)
    for numbers, tiles in parts:
        for number, tile in zip(numbers, zip(*tiles, strict=True), strict=True):
            np.concatenate(tile, out=flat[begin[number] : begin[number + 1]])
    every = np.concatenate([np.zeros(0, np.int64), *channels])
    token = np.concatenate([[0], np.cumsum(every)]).astype(np.int32)
    tile_starts = np.concatenate([[0], np.cumsum([len(of_tile) for of_tile in channels])]).astype(np.int32)
    return pa.ListArray.from_arrays(tile_starts, pa.ListArray.from_arrays(token, pa.array(flat)))


@sql_function("nec_pool", "TINYINT[]")
def _pool(files: IndexFiles, payload: pa.ChunkedArray) -> pa.Array:
    """Pooled int8 vectors, computed from the payloads themselves."""
    result: list[Any] = [None] * len(payload)
    for numbers, codec, symbols in _symbols(files, payload):
        for number, vector in zip(numbers, codec.pool(symbols), strict=True):
            result[number] = vector
    return pa.array(result, pa.list_(pa.int8()))


def _symbols(files: IndexFiles, payload: pa.ChunkedArray) -> Iterator[tuple[list[int], Codec, Arrays]]:
    """(row numbers, codec, symbols) of some rows at a time."""
    packs, offsets = (pc.struct_field(payload, name).to_pylist() for name in ("pack", "offset"))
    places = [f"at byte {offset} of {str(pack)[:200]}" for pack, offset in zip(packs, offsets, strict=True)]
    try:
        for batch in fetch(files.store, references(places, payload)):
            codec = archive_codec(files.store, batch.codec_id)
            yield batch.number.tolist(), codec, decode(codec, [places[i] for i in batch.number], batch.payloads)
    except (CorruptIndex, CorruptPack, CorruptPayload) as error:
        text = str(error)
        for number, place in enumerate(places):
            if text.startswith(f"tile {place}: "):
                tile_id = _tile_at(files, packs[number], offsets[number])
                if tile_id is not None:
                    raise type(error)(f"tile {tile_id}: {text.removeprefix(f'tile {place}: ')}") from error
        raise


def _tile_at(files: IndexFiles, pack: str | None, offset: int | None) -> str | None:
    """Whose payload lies there; slow, since all of the index is looked through."""
    with suppress(NecError):  # that something is damaged is the better word
        for file in (one for one in files.listed if isinstance(one, DataFile)):
            rows = read_file(files.store, file, ["tile_id", "payload"])
            here = [
                pc.equal(pc.struct_field(rows["payload"], name), at)
                for name, at in (("pack", pack), ("offset", offset))
            ]
            found = rows["tile_id"].filter(pc.and_(*here))
            if len(found):
                return str(found[0])
    return None


def _only_a_select(connection: duckdb.DuckDBPyConnection, sql: str) -> None:
    statements = connection.extract_statements(sql)
    kinds = [statement.type.name for statement in statements]
    if len(kinds) != 1 or not kinds[0].startswith("SELECT"):
        what = "several statements" if len(kinds) > 1 else (kinds[0].split("_")[0] if kinds else "an empty query")
        raise BadQuery(f"{what}: only one SELECT may be run on an archive; nothing was executed")


@contextmanager
def typed_errors() -> Iterator[None]:
    """Turns DuckDB's errors into typed ones, in one line.

    Raises:
        KeyboardInterrupt: Ctrl-C, which DuckDB takes for itself while a query runs.
    """
    try:
        yield
    except RuntimeError as error:
        if str(error) == "Query interrupted":
            raise KeyboardInterrupt from None
        raise
    except (duckdb.Error, pa.ArrowException) as error:
        cause = typed(error)
        if cause is not None:
            raise cause from error
        hint = sql_hint(_line(error))
        more = "; `DESCRIBE embeddings` lists the columns" if "column" in hint.lower() else ""
        raise BadQuery(f"{hint}{more}") from None


def _check_readable(files: IndexFiles, query: str) -> duckdb.DuckDBPyConnection:
    """A connection to them, or an error that says that it is the files and not the query."""
    try:
        return connect(files, query)
    except duckdb.Error as error:
        unreadable = CorruptIndex(f"{files.store.url}: its index does not read ({_line(error)})")
        raise typed(error) or unreadable from error


def _line(error: Exception) -> str:
    return " ".join(line.strip() for line in str(error).split("\n\nLINE")[0].splitlines() if line.strip())

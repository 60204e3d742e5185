"""SQL over one version of the index: a sandboxed DuckDB connection a query."""

from collections.abc import Callable, Sequence
from typing import Any

import duckdb
import pyarrow as pa
from duckdb.func import ARROW

from nec_ray.archive.filesystem import PROTOCOL, PinnedFiles
from nec_ray.archive.index import Version
from nec_ray.archive.layout import archive_codec, pack_codec
from nec_ray.archive.payloads import decode, fetch, references
from nec_ray.contracts import arrow_schema, contract_text
from nec_ray.errors import BadQuery, CorruptIndex, NecError
from nec_ray.storage import Store

_PAYLOAD = 'STRUCT(pack VARCHAR, "offset" BIGINT, layer_lengths INTEGER[])'


class Query:
    """A query over the view `embeddings` that has not run yet.

    Nothing but one SELECT is accepted, and it reads nothing but the version's files. Use `to_arrow_table`,
    `to_arrow_reader`, `fetchall` or `df`; Arrow, Polars and pandas also take the object as it is.

    Raises:
        BadQuery: (also when the result is taken) the SQL does not parse, does more than read, or fails.
    """

    def __init__(self, store: Store, version: Version, sql: str, params: Sequence[Any] | None = None) -> None:
        self._raised: list[NecError] = []
        try:
            self._connection = _connect(store, version, self._raised)
        except duckdb.Error as error:
            raise CorruptIndex(f"{store.url}: its index does not read ({_line(error)})") from error
        with _TypedErrors(self._raised):
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
        with _TypedErrors(self._raised):
            return self._relation.to_arrow_table()

    def to_arrow_reader(self, batch_rows: int = 10_000) -> pa.RecordBatchReader:
        """The result batch by batch."""
        reader = self.to_arrow_reader_unchecked(batch_rows)

        def batches() -> Any:
            while True:
                with _TypedErrors(self._raised):
                    try:
                        batch = reader.read_next_batch()
                    except StopIteration:
                        return
                yield batch

        return pa.RecordBatchReader.from_batches(reader.schema, batches())

    def to_arrow_reader_unchecked(self, batch_rows: int) -> pa.RecordBatchReader:
        """DuckDB's own reader, whose errors are DuckDB's."""
        with _TypedErrors(self._raised):
            return self._relation.to_arrow_reader(batch_rows)

    def fetchall(self) -> list[tuple[Any, ...]]:
        """All rows as Python tuples."""
        table = self.to_arrow_table()  # DuckDB's own fetchall needs pytz for times
        return list(zip(*(column.to_pylist() for column in table.columns), strict=True))

    def df(self) -> Any:
        """The whole result as a pandas DataFrame; needs pandas."""
        return self.to_arrow_table().to_pandas()

    def __arrow_c_stream__(self, requested_schema: object = None) -> object:
        return self.to_arrow_table().__arrow_c_stream__(requested_schema)

    def __repr__(self) -> str:
        with _TypedErrors(self._raised):
            return str(self._relation)


def _connect(store: Store, version: Version, raised: list[NecError]) -> duckdb.DuckDBPyConnection:
    connection = duckdb.connect(
        ":memory:",
        config={
            "python_enable_replacements": "false",
            "autoinstall_known_extensions": "false",
            "autoload_known_extensions": "false",
            "temp_directory": "",
        },
    )
    connection.register_filesystem(PinnedFiles(store, {file.path: file.size for file in version.files}))
    for name, function, result in _functions(store):
        connection.create_function(name, _keeping(function, raised), [_PAYLOAD], result, type=ARROW)
    urls = [f"{PROTOCOL}://{file.path}" for file in version.files]
    connection.execute("SET TimeZone='UTC'")
    connection.execute("SET GLOBAL enable_geoparquet_conversion=false")
    connection.execute("SET allowed_paths=?", [urls])
    connection.execute("SET enable_external_access=false")
    if urls:
        listed = ", ".join(f"'{url}'" for url in urls)
        source = f"read_parquet([{listed}])"
    else:
        connection.register("no_rows", arrow_schema("index.json").empty_table())
        source = "no_rows"
    connection.execute(contract_text("embeddings.sql").replace("$FILES", source))
    connection.execute("SET lock_configuration=true")
    return connection


def _functions(store: Store) -> list[tuple[str, Callable[[pa.ChunkedArray], pa.Array], str]]:
    return [
        ("nec_decode", lambda payload: _decode(store, payload), "FLOAT[][]"),
        ("nec_pool", lambda payload: _pool(store, payload), "TINYINT[]"),
    ]


def _decode(store: Store, payload: pa.ChunkedArray) -> pa.Array:
    """Embeddings, list(tokens) of list(channels) float32, of payload references."""
    result: list[Any] = []
    for codec, symbols in _symbols(store, payload):
        result.extend(list(tile) for tile in codec.dequantise(symbols))
    return pa.array(result, pa.list_(pa.list_(pa.float32())))


def _pool(store: Store, payload: pa.ChunkedArray) -> pa.Array:
    """Pooled int8 vectors, computed from the payloads themselves."""
    result: list[Any] = []
    for codec, symbols in _symbols(store, payload):
        result.extend(codec.pool(symbols))
    return pa.array(result, pa.list_(pa.int8()))


def _symbols(store: Store, payload: pa.ChunkedArray) -> list[Any]:
    values = payload.to_pylist()
    names = [f"at byte {value['offset']} of {value['pack']}" for value in values]
    wanted = references(names, values)
    data = fetch(store, wanted)
    parts = []
    start = 0
    while start < len(wanted):  # runs of one codec, in the order of the rows
        codec_id = pack_codec(wanted[start].pack)
        end = start
        while end < len(wanted) and pack_codec(wanted[end].pack) == codec_id:
            end += 1
        codec = archive_codec(store, codec_id)
        parts.append((codec, decode(codec, names[start:end], data[start:end])))
        start = end
    return parts


def _keeping(
    function: Callable[[pa.ChunkedArray], pa.Array], raised: list[NecError]
) -> Callable[[pa.ChunkedArray], pa.Array]:
    """DuckDB drops the type of what a function raises: keep it for `_TypedErrors`."""

    def call(payload: pa.ChunkedArray) -> pa.Array:
        try:
            return function(payload)
        except NecError as error:
            raised.append(error)
            raise

    return call


def _only_a_select(connection: duckdb.DuckDBPyConnection, sql: str) -> None:
    statements = connection.extract_statements(sql)
    kinds = [statement.type.name for statement in statements]
    if len(kinds) != 1 or not kinds[0].startswith("SELECT"):
        what = "several statements" if len(kinds) > 1 else (kinds[0].split("_")[0] if kinds else "an empty query")
        raise BadQuery(f"{what}: only one SELECT may be run on an archive; nothing was executed")


class _TypedErrors:
    """Turns DuckDB's errors into typed ones, in one line."""

    def __init__(self, raised: list[NecError]) -> None:
        self._raised = raised

    def __enter__(self) -> None:
        self._raised.clear()

    def __exit__(self, kind: object, error: BaseException | None, traceback: object) -> None:
        if isinstance(error, duckdb.Error | pa.ArrowException):
            if self._raised:
                raise self._raised[0] from error
            raise BadQuery(f"{_line(error)}; `DESCRIBE embeddings` lists the columns") from None


def _line(error: Exception) -> str:
    return " ".join(line.strip() for line in str(error).split("\n\nLINE")[0].splitlines() if line.strip())

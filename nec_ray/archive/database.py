"""The process's one DuckDB: it reads the index files of open archives, and nothing else.

To start a DuckDB takes longer than most queries, so all queries of a process share one, each on a connection of its
own. A connection sees one version of one archive: its view and its functions are temporary, and the name under which
its files are reached cannot be guessed.
"""

import atexit
import copy
import ctypes
import functools
import os
import secrets
import threading
import weakref
from collections import defaultdict, deque
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import duckdb
import pyarrow as pa
from duckdb.func import ARROW

from nec_ray.archive.filesystem import PROTOCOL, IndexFiles, PinnedFiles
from nec_ray.contracts import arrow_schema, contract_text
from nec_ray.errors import InputError, NecError, without_secrets

Function = Callable[[IndexFiles, pa.ChunkedArray], pa.Array]
Result = TypeVar("Result")

_PAYLOAD = 'STRUCT(pack VARCHAR, "offset" BIGINT, layer_lengths INTEGER[])'
_functions: dict[str, tuple[Function, str]] = {}
_plain: dict[str, tuple[Callable[..., pa.Array], Sequence[str], str]] = {}
_macros: dict[str, str] = {}
_mounted: "defaultdict[str, weakref.WeakSet[IndexFiles]]" = defaultdict(weakref.WeakSet)
_raised: deque[NecError] = deque(maxlen=64)
"""What files and functions raised lately, without tracebacks: DuckDB keeps the text of it and drops the type."""
_LET_GO_S = 5.0
"""For how long a query that was told to end is waited for."""
_started: list[duckdb.DuckDBPyConnection] = []
_starting, _mounting = threading.Lock(), threading.Lock()


def sql_function(name: str, returns: str) -> Callable[[Function], Function]:
    """Makes a function of payload references one of SQL, with results of the type `returns`."""

    def add(function: Function) -> Function:
        _functions[name] = (function, returns)
        return function

    return add


def plain_function(
    name: str, takes: Sequence[str], returns: str, macro: str | None = None
) -> Callable[[Callable[..., pa.Array]], Callable[..., pa.Array]]:
    """Makes a function of Arrow columns one of SQL, and a macro `NAME(ARGUMENTS) AS ...` of it."""

    def add(function: Callable[..., pa.Array]) -> Callable[..., pa.Array]:
        _plain[name] = (function, takes, returns)
        if macro:
            _macros[macro.partition("(")[0]] = macro
        return function

    return add


def connect(files: IndexFiles, query: str) -> duckdb.DuckDBPyConnection:
    """A connection with the view `embeddings` over these files, and the functions that a query names.

    Raises:
        duckdb.Error: a file does not read; `typed` may know why.
    """
    connection = _cursor(files, query)
    connection.execute(_view(files, _source(files)))
    return connection


def view_sql(files: IndexFiles) -> str:
    """The same view for a DuckDB that is not ours, over the files' paths or URLs.

    Raises:
        InputError: there are no files.
    """
    if not files.sizes:
        raise InputError(f"{files.store.url}: this version holds no tiles, so there is nothing to make a view of")
    urls = [without_secrets(f"{files.store.url}/{name}").replace("'", "''") for name in files.sizes]
    return _view(files, "read_parquet([{}])".format(", ".join(f"'{url}'" for url in urls)))


def _view(files: IndexFiles, source: str) -> str:
    return (
        contract_text("embeddings.sql").replace("$COLUMNS", _columns(files)).replace("$FILES", source).strip() + ";\n"
    )


def select(files: IndexFiles, columns: str, condition: str, params: Sequence[Any] | None = None) -> pa.Table:
    """Columns of the rows that a condition picks: as a query over the view, but planned once.

    Raises:
        duckdb.Error: a file does not read, or the condition does not run.
    """
    return query(files, "embeddings", f"SELECT {columns} FROM embeddings WHERE {condition}", params)


def query(files: IndexFiles, name: str, sql: str, params: Sequence[Any] | None = None, **tables: pa.Table) -> pa.Table:
    """Result of a query over the files as the table `name`, and over Arrow tables.

    Raises:
        duckdb.Error: a file does not read, or the query does not run.
    """
    connection = _cursor(files, sql)
    for other, table in tables.items():
        connection.register(other, table)
    text = f"WITH {name} AS (SELECT {_columns(files)} FROM {_source(files)}) {sql}"
    relation = connection.sql(text, params=list(params) if params else None)
    return heeding(connection, relation.to_arrow_table)


def typed(error: Exception) -> NecError | None:
    """The typed error behind one of DuckDB's, if there is one; a copy, since what is raised keeps its frames."""
    text = str(error)
    return next((copy.copy(one) for one in reversed(_raised) if str(one) in text), None)


def heeding(connection: duckdb.DuckDBPyConnection, work: Callable[[], Result]) -> Result:
    """What `work` returns, which runs a query on the connection; Ctrl-C ends the query.

    So the main thread, which alone hears signals, does not run it: DuckDB looks for them now and then, or not at all
    while its other threads have the work.
    """
    if threading.current_thread() is not threading.main_thread():
        return work()
    results: list[Result] = []
    errors: list[BaseException] = []

    def run() -> None:
        try:
            results.append(work())
        except BaseException as error:  # goes on in the main thread
            errors.append(error)
        finally:
            ended.set()

    ended = threading.Event()  # Python 3.11 takes a thread for ended whose join was broken off
    threading.Thread(target=run, name="nec-query", daemon=True).start()
    try:
        ended.wait()
    except BaseException:
        connection.interrupt()
        ended.wait(_LET_GO_S)
        raise
    if errors:
        raise errors.pop()
    return results.pop()


@functools.cache
def table_functions() -> frozenset[str]:
    """Names of DuckDB's functions that are called like tables."""
    query = "SELECT DISTINCT function_name FROM duckdb_functions() WHERE function_type IN ('table', 'table_macro')"
    return frozenset(name for (name,) in _database().cursor().execute(query).fetchall())


def prepare() -> None:
    """Start the database in the background, for the query that is to come."""
    if not _started:
        threading.Thread(target=_database, name="nec-duckdb").start()


def _cursor(files: IndexFiles, query: str) -> duckdb.DuckDBPyConnection:
    with _mounting:
        _mounted[_token(files)].add(files)
    connection = _database().cursor()
    if not files.sizes:
        connection.register("no_rows", arrow_schema(files.contract).empty_table())
    named = query.lower()
    for name in (name for name in _functions if name in named):  # each costs a millisecond
        connection.execute(f"CREATE TEMP MACRO {name}(payload) AS {name}_of('{_token(files)}', payload)")
    for macro in (macro for name, macro in _macros.items() if name in named):
        connection.execute(f"CREATE TEMP MACRO {macro}")
    return connection


def _columns(files: IndexFiles) -> str:
    return ", ".join(arrow_schema(files.contract).names)  # files keep them in an order of their own


@functools.cache
def _token_of(url: str) -> str:  # noqa: ARG001  (one for each archive: under it DuckDB keeps footers that it has parsed)
    return secrets.token_hex(16)


def _token(files: IndexFiles) -> str:
    return _token_of(files.store.url)


def _find(token: str, name: str | None = None) -> IndexFiles:
    """Mounted files of an archive, of a version that has the file `name`.

    Raises:
        FileNotFoundError: no open archive has it.
    """
    with _mounting:
        for files in _mounted.get(token, ()):
            if name is None or name in files.sizes:
                return files
    raise FileNotFoundError(name)


def _source(files: IndexFiles) -> str:
    listed = ", ".join(f"'{PROTOCOL}://{_token(files)}/{name}'" for name in files.sizes)
    return f"read_parquet([{listed}])" if listed else "no_rows"


def _database() -> duckdb.DuckDBPyConnection:
    with _starting:
        if not _started:
            _started.append(_start())
        return _started[0]


def _after_fork() -> None:
    """Threads are not forked: a child starts a database of its own, and must never end its parent's."""
    global _starting, _mounting  # another thread may have held them
    _starting, _mounting = threading.Lock(), threading.Lock()
    for connection in _started:
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(connection))
    _started.clear()


@atexit.register
def _end() -> None:
    """DuckDB's Python binding reports what is left at the end as leaks, on stderr."""
    _raised.clear()
    _started.clear()


os.register_at_fork(after_in_child=_after_fork)


def _start() -> duckdb.DuckDBPyConnection:
    connection = duckdb.connect(
        ":memory:",
        config={
            "python_enable_replacements": "false",
            "autoinstall_known_extensions": "false",
            "autoload_known_extensions": "false",
            "temp_directory": "",
        },
    )
    connection.register_filesystem(PinnedFiles(_find, _raised))
    for name, (function, returns) in _functions.items():
        connection.create_function(
            f"{name}_of", _keeping(function), [duckdb.sqltypes.VARCHAR, _PAYLOAD], returns, type=ARROW
        )
    for name, (plain, takes, returns) in _plain.items():
        connection.create_function(name, _kept(plain), list(takes), returns, type=ARROW)
    for setting in (
        "GLOBAL TimeZone='UTC'",
        "GLOBAL enable_geoparquet_conversion=false",
        "GLOBAL parquet_metadata_cache=true",  # the view's binding parses the footers, the query's need not
        f"allowed_directories=['{PROTOCOL}://']",
        "enable_external_access=false",
        "lock_configuration=true",
    ):
        connection.execute(f"SET {setting}")
    return connection


def _keeping(function: Function) -> Callable[[pa.ChunkedArray, pa.ChunkedArray], pa.Array]:
    def call(token: pa.ChunkedArray, payload: pa.ChunkedArray) -> pa.Array:
        return function(_find(token[0].as_py()), payload)

    return _kept(call)


def _kept(function: Callable[..., pa.Array]) -> Callable[..., pa.Array]:
    """The function, its typed errors kept for `typed`."""

    @functools.wraps(function)  # DuckDB counts the parameters
    def call(*columns: pa.ChunkedArray) -> pa.Array:
        try:
            return function(*columns)
        except NecError as error:
            _raised.append(copy.copy(error))
            raise

    return call

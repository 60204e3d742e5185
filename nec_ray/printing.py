"""How the `nec` command prints: facts, tables, results of queries on stdout; progress and notes on stderr."""

import json
import math
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from datetime import datetime
from decimal import Decimal
from enum import StrEnum
from typing import Any

from rich.cells import cell_len
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TextColumn,
    TimeElapsedColumn,
)
from rich.table import Table
from rich.text import Text

from nec_ray.errors import InputError, without_secrets

NOTES = Console(stderr=True, highlight=False, soft_wrap=True)
_OUT = Console(highlight=False, soft_wrap=True)


class Format(StrEnum):
    """How a query's result is printed."""

    table = "table"
    csv = "csv"
    json = "json"
    parquet = "parquet"


_ROWS_SHOWN = 40
_CELL = 120
_LEAST = 12
"""Characters that a column of a table keeps at least; where not all columns can, rows are printed one below another."""
_SECONDS_BETWEEN_LINES = 10.0


def say_unless(quiet: bool) -> Callable[[str], None]:
    """Prints a line of progress to stderr, or nothing."""

    def say(text: str) -> None:
        if not quiet:
            NOTES.print(printable(text), markup=False)

    return say


@contextmanager
def progress_bar(what: str, quiet: bool) -> Iterator[Callable[[int, int], None]]:
    """A progress bar on stderr, or a line now and then where that is no terminal; called with (done, total)."""
    columns = (
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
    )
    if not NOTES.is_terminal:
        said = time.monotonic()

        def say(done: int, total: int) -> None:
            nonlocal said
            if not quiet and time.monotonic() - said > _SECONDS_BETWEEN_LINES:
                said = time.monotonic()
                NOTES.print(f"{what}: {done:,} of {total:,}")

        yield say
        return
    with Progress(*columns, console=NOTES, disable=quiet) as progress:
        task = progress.add_task(what, total=None)
        yield lambda done, total: progress.update(task, completed=done, total=total)


def print_facts(facts: dict[str, Any], as_json: bool, lines: list[str] | None = None) -> None:
    """Facts as one JSON object, or as lines for people."""
    if as_json:
        sys.stdout.write(without_secrets(to_json(facts)) + "\n")
        return
    for line in lines or [f"{key.replace('_', ' ')}: {number(value)}" for key, value in facts.items()]:
        _OUT.print(printable(without_secrets(line)), markup=False)


def number(value: Any) -> str:
    """A number as people read it."""
    if isinstance(value, float):
        return f"{value:,.4g}" if abs(value) < 1000 else f"{value:,.0f}"
    return f"{value:,}" if isinstance(value, int) else str(value)


def _plain(value: Any) -> Any:
    if isinstance(value, bytes):
        return value.hex()
    if isinstance(value, datetime):
        return value.isoformat()
    if isinstance(value, Decimal):  # DuckDB's sums of integers
        return int(value) if value == value.to_integral_value() else float(value)
    return str(value)


def to_json(value: Any) -> str:
    """One line of JSON; NaN becomes null."""
    return json.dumps(_finite(value), default=_plain, allow_nan=False)


def _finite(value: Any) -> Any:
    """JSON has no NaN: null stands for it."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _distinct(names: list[str]) -> list[str]:
    """Column names, the second of one name with _2 and so on: a join gives doubled ones."""
    seen: Counter[str] = Counter()
    distinct = []
    for name in names:
        seen[name] += 1
        distinct.append(name if seen[name] == 1 else f"{name}_{seen[name]}")
    return distinct


def _as_table(rows: Any) -> Table:
    cells = [[_shortened(cell) for cell in _cells(row.values())] for row in rows.to_pylist()]
    return _fitting(rows.column_names, cells)


def printable(text: str) -> str:
    """A text without what would steer a terminal: control characters are written as escapes, but for line breaks."""
    return "".join(c if c.isprintable() or c == "\n" else c.encode("unicode_escape").decode() for c in text)


def _shortened(cell: str) -> str:
    return cell if len(cell) <= _CELL else f"{cell[: _CELL - 3]}..."


def _fitting(names: list[str], rows: list[list[str]]) -> Table:
    """A table no wider than the terminal: cells are folded, or each row is printed as lines `column  value`."""
    longest = [max(map(cell_len, column)) for column in zip(names, *rows, strict=True)]
    least = [min(_LEAST, width) for width in longest]
    if sum(least) + 3 * len(names) + 1 <= _OUT.width:
        table = Table()
        for name, width in zip(names, least, strict=True):
            table.add_column(Text(printable(name)), overflow="fold", min_width=width)
        for row in rows:
            table.add_row(*(Text(printable(cell)) for cell in row))
        return table
    lines = Table.grid(padding=(0, 2, 0, 0))
    lines.add_column(overflow="fold")
    lines.add_column(overflow="fold")
    for row in rows:
        for name, cell in zip(names, row, strict=True):
            lines.add_row(Text(printable(name)), Text(cell))
        lines.add_row()
    return lines


def _cells(values: Iterable[Any]) -> Iterator[str]:
    for value in values:
        if value is None:
            yield ""
        else:
            yield to_json(value) if isinstance(value, dict | list) else str(_plain(value))


def print_result(result: Any, format_: Format) -> None:
    """An Arrow table, in one of the formats.

    Raises:
        InputError: Parquet to a terminal, or a value that only Parquet can hold.
    """
    result = result.rename_columns(_distinct(result.column_names))
    try:
        _print_result(result, format_)
    except (OverflowError, ValueError) as error:  # Arrow's: dates of years that Python does not know, and the like
        raise InputError(f"a value of the result cannot be printed ({error}); cast it to VARCHAR") from None


def _print_result(result: Any, format_: Format) -> None:
    if format_ is Format.table:
        _OUT.print(_as_table(result.slice(0, _ROWS_SHOWN)))
        if result.num_rows > _ROWS_SHOWN:
            NOTES.print(f"{_ROWS_SHOWN} of {result.num_rows:,} rows; --format csv prints all")
    elif format_ is Format.json:
        for row in result.to_pylist():
            sys.stdout.write(to_json(row) + "\n")
    else:
        _write_binary(result, format_)


def _write_binary(result: Any, format_: Format) -> None:
    import pyarrow as pa
    import pyarrow.csv
    import pyarrow.parquet

    sink = pa.PythonFile(sys.stdout.buffer, mode="w")
    if format_ is Format.csv:
        texts = {}
        for field in result.schema:  # CSV has no nested values: they stand as JSON, bytes as hexadecimal digits
            simple = pa.types.is_primitive(field.type) or pa.types.is_string(field.type)
            values = result[field.name]
            if not simple or pa.types.is_interval(field.type):
                cells = _cells(values.to_pylist())
                values = pa.array([cell or None for cell in cells], pa.string())
            texts[field.name] = values
        pyarrow.csv.write_csv(pa.table(texts), sink)
    elif sys.stdout.isatty():
        raise InputError("Parquet is no text; send it to a file: nec query ... --format parquet > result.parquet")
    else:
        pyarrow.parquet.write_table(result, sink)


def print_rows(rows: list[dict[str, Any]], format_: Format = Format.table) -> None:
    """Flat rows of one kind in one of the formats: for people as a table, its numbers with thousands apart."""
    if format_ is Format.table:
        names = [name.replace("_", " ") for name in rows[0]]
        _OUT.print(_fitting(names, [[number(value) for value in row.values()] for row in rows]))
        return
    import pyarrow as pa

    print_result(pa.Table.from_pylist(rows), format_)

"""Which functions SQL from outside may call: those that read, of DuckDB's that are called like tables.

The connection itself reaches no files, extensions or settings (database.py). But a SELECT may call table functions, and
some of these do more than read (`register_external_resource_type`), run SQL that is hidden in text (`query`), or tell
of other connections of the process. Only those that are known to be harmless are allowed, so that what a later DuckDB
adds is refused until somebody has looked at it.
"""

import re
from itertools import pairwise

import duckdb

from nec_ray.archive.database import table_functions
from nec_ray.errors import BadQuery

_HARMLESS = frozenset(
    {
        "duckdb_columns",
        "duckdb_databases",
        "duckdb_functions",
        "duckdb_schemas",
        "duckdb_settings",
        "duckdb_tables",
        "duckdb_types",
        "duckdb_views",
        "generate_series",
        "glob",
        "histogram",
        "histogram_values",
        "json_each",
        "json_tree",
        "parquet_bloom_probe",
        "parquet_file_metadata",
        "parquet_full_metadata",
        "parquet_kv_metadata",
        "parquet_metadata",
        "parquet_scan",
        "parquet_schema",
        "pragma_table_info",
        "pragma_version",
        "range",
        "read_blob",
        "read_csv",
        "read_csv_auto",
        "read_json",
        "read_json_auto",
        "read_parquet",
        "read_text",
        "repeat",
        "repeat_row",
        "summary",
        "unnest",
        "version",
    }
)
"""Readers of files among them see nothing but the index files of the version: the file system says so."""
_OF_VALUES = frozenset({"and", "avg", "count", "in", "max", "min", "not", "or", "sum"})
"""Words before a bracket that SQL itself defines: to ask DuckDB for its table functions takes longer than a query."""
_NO_NAME = re.compile(r"[^0-9A-Za-z_]")
_ALSO_REFUSED = frozenset({"write_log"})
"""Functions of values that do more than give one."""


def check_calls(sql: str) -> None:
    """Refuse SQL that calls what does more than read.

    Raises:
        BadQuery: it calls another table function than those known to be harmless; it names it.
    """
    if not isinstance(sql, str):
        raise BadQuery(f"{sql!r} is no SQL; give one SELECT as a string")
    try:
        raw = sql.encode()
    except UnicodeEncodeError:
        raise BadQuery(f"{sql!r}: SQL with half a character of Unicode (a surrogate); take it out") from None
    tokens = duckdb.tokenize(sql)  # positions are those of bytes
    ends = [*(at for at, _ in tokens[1:]), len(raw)]
    words = [
        raw[at:end].decode(errors="replace").strip()
        for (at, kind), end in zip(tokens, ends[: len(tokens)], strict=True)
        if kind != duckdb.token_type.comment
    ]
    # Neither quotes nor any of Unicode's spaces.
    called = [_NO_NAME.sub("", word).lower() for word, after in pairwise(words) if after.startswith("(")]
    unknown = [name for name in called if name and name not in _HARMLESS | _OF_VALUES]
    refused = table_functions() | _ALSO_REFUSED if unknown else set()
    for name in unknown:
        if name in refused:
            raise BadQuery(f"{name} may not be called on an archive: SQL reads the archive, and nothing else")

"""The tile catalog: a table with one row a tile, kept as one GeoParquet file."""

import json
import os
from collections.abc import Collection, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from nec_ray.contracts import arrow_schema
from nec_ray.errors import BadCatalog, BadQuery, CodecMismatch, UnsupportedFormat
from nec_ray.storage import Store, normalise_url, read_url
from nec_ray.tiles.geoparquet import geoparquet_bytes

FORMAT_VERSION = 1
METADATA_KEY = "nec_ray"
"""Key of the catalog's own metadata among the Parquet file's."""
_SEPARATOR = "\x1f"


@dataclass(frozen=True, slots=True)
class CatalogMetadata:
    """What holds for all tiles of a catalog."""

    version: int = FORMAT_VERSION
    title: str | None = None
    licence: str | None = None
    """Terms of the pixels."""
    attribution: str | None = None
    """Whom to name when the pixels or what is made of them are shown."""


@dataclass(frozen=True, slots=True)
class Catalog:
    """A tile catalog."""

    table: pa.Table
    """Columns of `schemas/catalog.json`, and whatever else its maker added; one row a tile."""
    metadata: CatalogMetadata = field(default_factory=CatalogMetadata)
    url: str | None = None
    """Where it was read from; None for one that was built in memory."""

    def __len__(self) -> int:
        return self.table.num_rows

    def select(self, where: str | None) -> "Catalog":
        """The tiles that an SQL condition over the columns keeps, in the same order; all where it is None.

        Raises:
            BadQuery: the condition does not parse or does not run.
        """
        return self if where is None else replace(self, table=self.table.take(rows_where(self.table, where)))

    def where_ids(self, tile_ids: Sequence[str]) -> "Catalog":
        """The tiles of these ids, in the catalog's order; ids that it lacks are passed over."""
        wanted = pc.is_in(self.table["tile_id"], pa.array(list(tile_ids), pa.string()))
        return replace(self, table=self.table.filter(wanted))


def write_catalog(catalog: Catalog, url: str | os.PathLike[str]) -> None:
    """Write a catalog as one GeoParquet 1.1 file, in place of any file of that name.

    A reader sees the old file or the new one, never a part of one.

    Raises:
        BadCatalog: the table is not a catalog's.
        StorageError: the file cannot be written.
    """
    target = normalise_url(url)
    table = check_table(catalog.table, target)
    document = json.dumps(asdict(catalog.metadata), ensure_ascii=False)
    data = geoparquet_bytes(table, key_value={METADATA_KEY: document})
    folder, _, name = target.rpartition("/")
    Store(folder or "/").replace(name, data)


def read_catalog(url: str | os.PathLike[str]) -> Catalog:
    """Read a catalog and check that it is one.

    Columns beyond those of `schemas/catalog.json` are kept. A column of an equivalent type, such as 64-bit windows, is
    converted.

    Raises:
        NotFound: nothing is at `url`.
        BadCatalog: not a Parquet file, or not a tile catalog.
        UnsupportedFormat: written by a later release.
    """
    where = normalise_url(url)
    try:
        table = pq.ParquetFile(pa.BufferReader(read_url(where))).read()
    except (pa.ArrowException, OSError) as error:
        raise not_parquet(where, error) from error
    return Catalog(check_table(table, where), catalog_metadata(table.schema.metadata or {}, where), where)


def not_parquet(where: str, error: Exception) -> BadCatalog:
    """The error of a file that Parquet readers refuse."""
    return BadCatalog(f"{where}: not a Parquet file ({_line(error)}); make a catalog with `nec tiles build`")


def band_sets(table: pa.Table) -> set[tuple[str, ...]]:
    """The different lists of bands among rows of a catalog."""
    joined = pc.unique(pc.binary_join(table["bands"].combine_chunks(), _SEPARATOR)).to_pylist()
    return {tuple(text.split(_SEPARATOR)) for text in joined}


def check_bands(sets: Collection[Sequence[str]], bands: Sequence[str], where: str) -> None:
    """Check that there are tiles with all of these bands.

    Single tiles that lack one become failed tiles when they are read.

    Args:
        sets: the different lists of bands of a catalog's tiles.
        bands: names of those that are needed.
        where: what to call the catalog in an error.

    Raises:
        CodecMismatch: no tile has all of them; it names those that are missing and what the catalog has.
    """
    if not sets:
        return
    missing = min(([band for band in bands if band not in names] for names in sets), key=len)
    if missing:
        said = "; ".join(sorted(", ".join(names) for names in sets)[:4])
        raise CodecMismatch(
            f"{where}: no tile has the bands {', '.join(missing)} that are asked for; "
            f"it has {said}; rename them with `nec tiles build --bands`, or use another codec"
        )


def check_table(table: pa.Table, where: str, *, unique: bool = True) -> pa.Table:
    """The table, its catalog columns first and of the exact types of `schemas/catalog.json`.

    Args:
        table: a candidate.
        where: what to call it in an error.
        unique: whether tile ids are compared: parts of a catalog cannot tell.

    Raises:
        BadCatalog: a column is missing, of another type, null or impossible in some row, or a tile id stands twice.
    """
    schema = arrow_schema("catalog.json")
    names = table.column_names
    missing = [name for name in schema.names if name not in names]
    if missing:
        raise BadCatalog(
            f"{where}: not a tile catalog, it lacks the columns {', '.join(missing)}; make one with `nec tiles build`"
        )
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise BadCatalog(f"{where}: columns stand twice: {', '.join(twice)}; keep one of each")
    assets = arrow_schema("catalog.json", "optional_columns").field("assets")
    known = [*schema, *([assets] if assets.name in names else [])]
    wrong = [f for f in known if _kind(table.schema.field(f.name).type) != _kind(f.type)]
    if wrong:
        said = ", ".join(f"{f.name} is {table.schema.field(f.name).type}, not {f.type}" for f in wrong)
        raise BadCatalog(f"{where}: columns of another type: {said}; write them as schemas/catalog.json says")
    columns = [_cast(table[f.name], f, where) for f in schema]
    extra = [name for name in names if name not in schema.names]
    checked = pa.table(
        [*columns, *(table[name] for name in extra)],
        schema=pa.schema([*schema, *(table.schema.field(name) for name in extra)]),
    )
    _check_rows(checked, where)
    if unique:
        _check_unique(checked, where)
    return checked


def _check_rows(table: pa.Table, where: str) -> None:
    for column in arrow_schema("catalog.json"):
        if not column.nullable and table[column.name].null_count:
            count = table[column.name].null_count
            raise BadCatalog(f"{where}: {count} of {table.num_rows} rows have no {column.name}; every tile needs one")
    impossible = {
        "a window of no width or height": pc.or_(pc.less_equal(table["width"], 0), pc.less_equal(table["height"], 0)),
        "a window that starts before the image": pc.or_(pc.less(table["x_off"], 0), pc.less(table["y_off"], 0)),
        "no bands": pc.equal(pc.list_value_length(table["bands"]), 0),
        "a nodata_share that is not between 0 and 1": pc.fill_null(
            pc.invert(pc.and_(pc.greater_equal(table["nodata_share"], 0), pc.less_equal(table["nodata_share"], 1))),
            False,
        ),
    }
    for what, rows in impossible.items():
        found = table["tile_id"].filter(rows)
        if len(found):
            raise BadCatalog(
                f"{where}: {len(found)} of {table.num_rows} tiles have {what}, such as {found[0].as_py()!r}"
            )
    if pc.list_flatten(table["bands"]).null_count:
        raise BadCatalog(f"{where}: a band without a name; name every band")
    unknown = [name for name in pc.unique(table["dtype"]).to_pylist() if not _is_pixel_type(name)]
    if unknown:
        raise BadCatalog(f"{where}: {unknown[0]!r} is no type of pixels; use a numpy name such as uint16")


def _check_unique(table: pa.Table, where: str) -> None:
    if pc.count_distinct(table["tile_id"]).as_py() != table.num_rows:
        counts = table.group_by("tile_id").aggregate([([], "count_all")])
        raise repeated(counts["tile_id"].filter(pc.greater(counts["count_all"], 1)).to_pylist(), where)


def repeated(tile_ids: Sequence[str], where: str) -> BadCatalog:
    """The error of a catalog in which these tile ids stand more than once."""
    return BadCatalog(
        f"{where}: {len(tile_ids)} tile ids stand more than once, such as {tile_ids[0]!r}; make them unique"
    )


def _kind(t: Any) -> Any:
    """What a type is, whatever its width and offsets: other writers choose those."""
    types = pa.types
    if types.is_dictionary(t):
        return _kind(t.value_type)
    if types.is_list(t) or types.is_large_list(t):
        return ("list", _kind(t.value_type))
    if types.is_struct(t):
        return tuple((t.field(i).name, _kind(t.field(i).type)) for i in range(t.num_fields))
    if types.is_timestamp(t):
        return ("timestamp", t.tz is not None)
    tests = {
        "string": (types.is_string, types.is_large_string, types.is_string_view),
        "binary": (types.is_binary, types.is_large_binary, types.is_binary_view),
        "integer": (types.is_integer,),
        "float": (types.is_floating,),
    }
    return next((kind for kind, asks in tests.items() if any(ask(t) for ask in asks)), str(t))


def _cast(column: Any, wanted: Any, where: str) -> Any:
    try:
        return column.cast(wanted.type)
    except pa.ArrowException as error:
        raise BadCatalog(f"{where}: column {wanted.name} does not fit {wanted.type} ({_line(error)})") from error


def _is_pixel_type(name: str) -> bool:
    try:
        return np.dtype(name).kind in "uif"
    except TypeError:
        return False


def catalog_metadata(raw: dict[bytes, bytes], where: str) -> CatalogMetadata:
    """What a Parquet file's metadata says about the catalog in it."""
    text = raw.get(METADATA_KEY.encode())
    if text is None:  # another tool wrote the table
        return CatalogMetadata()
    try:
        document = json.loads(text)
        version = int(document["version"])
    except (ValueError, TypeError, KeyError) as error:
        raise BadCatalog(
            f"{where}: its metadata key {METADATA_KEY!r} does not read; build the catalog again"
        ) from error
    if version > FORMAT_VERSION:
        raise UnsupportedFormat(f"{where}: catalog format {version} is from a later release; update nec_ray")
    texts = [document.get(name) for name in ("title", "licence", "attribution")]
    title, licence, attribution = (text if isinstance(text, str) else None for text in texts)
    return CatalogMetadata(version, title, licence, attribution)


def rows_where(table: pa.Table, where: str) -> pa.Array:
    """Numbers of the rows that an SQL condition keeps.

    Raises:
        BadQuery: it does not parse or does not run.
    """
    sql = f"SELECT __row FROM tiles WHERE ({where}\n) ORDER BY __row"  # a comment in it ends with the line
    more = f"{where!r} is more than a condition; give what follows WHERE"
    return query_tiles(table, sql, f"the condition {where!r}", more)["__row"].combine_chunks()


def query_tiles(table: pa.Table, sql: str, what: str, more: str) -> pa.Table:
    """Result of a query over a catalog's columns, as the table `tiles`, and `__row`, the number of a row.

    Args:
        table: of a catalog; all that the query can read.
        sql: one SELECT.
        what: what of it the user gave, for an error.
        more: the error of what closes the SELECT and begins another statement.

    Raises:
        BadQuery: it does not parse or does not run.
    """
    import duckdb

    numbered = table.append_column("__row", pa.array(np.arange(table.num_rows), pa.int64()))
    config: dict[str, str | bool | int | float | list[str]] = {
        "python_enable_replacements": False,
        "autoinstall_known_extensions": False,
    }
    with duckdb.connect(":memory:", config=config) as connection:
        connection.register("tiles", numbered)
        connection.execute("SET enable_external_access = false")
        try:
            statements = connection.extract_statements(sql)
            if len(statements) != 1 or statements[0].type != duckdb.StatementType.SELECT:
                raise BadQuery(more)
            return connection.sql(sql).to_arrow_table()
        except duckdb.Error as error:
            raise BadQuery(f"{what} does not run on the catalog: {_line(error)}") from error


def _line(error: Exception) -> str:
    return " ".join(str(error).split("\n\nLINE")[0].split())[:200]

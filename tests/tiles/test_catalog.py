import json
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from nec_ray.contracts import arrow_schema
from nec_ray.errors import BadCatalog, BadQuery, CodecMismatch, NotFound, UnsupportedFormat
from nec_ray.tiles import Catalog, CatalogMetadata, band_sets, check_bands, read_catalog, write_catalog
from nec_ray.tiles.catalog import METADATA_KEY

SCHEMA = arrow_schema("catalog.json")


def row(tile_id: str, **changes: Any) -> dict[str, Any]:
    plain = {
        "tile_id": tile_id,
        "source": "/images/a.tif",
        "source_etag": "1-2",
        "x_off": 0,
        "y_off": 0,
        "width": 8,
        "height": 8,
        "bands": ["red", "green"],
        "dtype": "uint16",
    }
    return dict.fromkeys(SCHEMA.names) | plain | changes


def table(*rows: dict[str, Any]) -> pa.Table:
    return pa.Table.from_pylist(list(rows), schema=SCHEMA)


def store(path: Path, rows: pa.Table, metadata: dict[str, str] | None = None) -> Path:
    pq.write_table(rows.replace_schema_metadata(metadata), path)
    return path


texts = st.none() | st.text(max_size=12)
rows_strategy = st.lists(
    st.builds(
        row,
        st.text(max_size=12),
        x_off=st.integers(0, 2**31 - 1),
        width=st.integers(1, 2**31 - 1),
        bands=st.lists(st.text(max_size=5), min_size=1, max_size=3),
        nodata=st.none() | st.floats(allow_nan=False),
        nodata_share=st.none() | st.floats(0, 1, width=32),
        acquired_at=st.none() | st.datetimes(min_value=datetime(1900, 1, 1)).map(lambda t: t.replace(tzinfo=UTC)),
        bbox=st.none() | st.just({"xmin": -1.0, "ymin": 0.5, "xmax": 1.0, "ymax": 2.0}),
        transform=st.none() | st.lists(st.floats(-1e6, 1e6), min_size=6, max_size=6),
        label=texts,
    ),
    max_size=6,
    unique_by=lambda r: r["tile_id"],
)


@given(rows=rows_strategy, metadata=st.builds(CatalogMetadata, title=texts, licence=texts, attribution=texts))
def test_what_is_written_is_read(
    tmp_path_factory: pytest.TempPathFactory, rows: list[dict[str, Any]], metadata: CatalogMetadata
) -> None:
    path = tmp_path_factory.getbasetemp() / "round.parquet"  # the second example overwrites the first
    write_catalog(Catalog(table(*rows), metadata), path)
    read = read_catalog(path)
    assert read.table.to_pylist() == rows
    assert read.metadata == metadata
    assert read.url == str(path)
    assert len(read) == len(rows)


def test_extra_columns_are_kept_after_the_catalogs_own(tmp_path: Path) -> None:
    rows = table(row("a"), row("b")).add_column(0, "cloud", pa.array([1, 2], pa.int16()))
    write_catalog(Catalog(rows), tmp_path / "c.parquet")
    read = read_catalog(tmp_path / "c.parquet").table
    assert read.column_names == [*SCHEMA.names, "cloud"]
    assert read["cloud"].to_pylist() == [1, 2]


def test_overwriting_leaves_no_temporary_file(tmp_path: Path) -> None:
    for ids in (["a"], ["b", "c"]):
        write_catalog(Catalog(table(*map(row, ids))), tmp_path / "c.parquet")
    assert [p.name for p in tmp_path.iterdir()] == ["c.parquet"]
    assert read_catalog(tmp_path / "c.parquet").table["tile_id"].to_pylist() == ["b", "c"]


def test_remote_catalog() -> None:
    write_catalog(Catalog(table(row("a"))), "memory://catalogs/c.parquet")
    assert read_catalog("memory://catalogs/c.parquet").table["tile_id"].to_pylist() == ["a"]


def test_other_writers_widths_are_converted(tmp_path: Path) -> None:
    rows = table(row("a", acquired_at=datetime(2020, 5, 18, tzinfo=UTC)))
    wide = rows.schema
    for name, kind in (
        ("width", pa.int64()),
        ("tile_id", pa.large_string()),
        ("dtype", pa.dictionary(pa.int32(), pa.string())),
        ("bands", pa.large_list(pa.large_string())),
        ("acquired_at", pa.timestamp("ms", tz="Europe/Paris")),
        ("nodata_share", pa.float64()),
    ):
        i = wide.get_field_index(name)
        wide = wide.set(i, pa.field(name, kind))
    read = read_catalog(store(tmp_path / "c.parquet", rows.cast(wide))).table
    assert read.schema.equals(SCHEMA)
    assert read.to_pylist() == rows.to_pylist()


def without(name: str) -> pa.Table:
    return table(row("a")).drop_columns([name])


def with_type(name: str, values: pa.Array) -> pa.Table:
    rows = table(row("a"))
    return rows.set_column(rows.column_names.index(name), name, values)


REFUSED: dict[str, tuple[pa.Table, str]] = {
    "missing": (without("bands").drop_columns(["crs"]), "lacks the columns bands, crs"),
    "text window": (with_type("width", pa.array(["8"])), "width is string, not int32"),
    "naive time": (with_type("acquired_at", pa.array([0], pa.timestamp("us"))), "acquired_at is timestamp"),
    "flat bbox": (with_type("bbox", pa.array([{"xmin": 0.0}])), "bbox is struct"),
    "too wide": (with_type("width", pa.array([2**40])), "width does not fit int32"),
    "null id": (with_type("tile_id", pa.array([None], pa.string())), "1 of 1 rows have no tile_id"),
    "twice": (table(row("a"), row("b"), row("a")), "1 tile ids stand more than once, such as 'a'"),
    "empty window": (table(row("a"), row("b", height=0)), "1 of 2 tiles have a window of no width .* 'b'"),
    "negative width": (table(row("a", width=-8)), "window of no width"),
    "negative offset": (table(row("a", y_off=-1)), "starts before the image"),
    "no bands": (table(row("a", bands=[])), "no bands"),
    "nameless band": (table(row("a", bands=["red", None])), "a band without a name"),
    "share": (table(row("a", nodata_share=1.5)), "not between 0 and 1"),
    "NaN share": (table(row("a", nodata_share=float("nan"))), "not between 0 and 1"),
    "dtype": (table(row("a", dtype="pixels")), "'pixels' is no type of pixels"),
    "object dtype": (table(row("a", dtype="object")), "'object' is no type of pixels"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused_on_reading(tmp_path: Path, case: str) -> None:
    rows, said = REFUSED[case]
    path = store(tmp_path / "c.parquet", rows)
    with pytest.raises(BadCatalog, match=said) as caught:
        read_catalog(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_bad_table_is_not_written(tmp_path: Path) -> None:
    with pytest.raises(BadCatalog, match="more than once"):
        write_catalog(Catalog(table(row("a"), row("a"))), tmp_path / "c.parquet")
    assert not list(tmp_path.iterdir())


def test_not_a_parquet_file(tmp_path: Path) -> None:
    path = tmp_path / "c.parquet"
    write_catalog(Catalog(table(row("a"))), path)
    for data in (b"", b"tile_id,source\n", path.read_bytes()[:-40]):
        path.write_bytes(data)
        with pytest.raises(BadCatalog, match="not a Parquet file"):
            read_catalog(path)


def test_missing_catalog(tmp_path: Path) -> None:
    with pytest.raises(NotFound, match=r"none\.parquet"):
        read_catalog(tmp_path / "none.parquet")


def test_metadata_of_a_later_release_is_refused_by_name(tmp_path: Path) -> None:
    document = json.dumps(asdict(CatalogMetadata()) | {"version": 2})
    path = store(tmp_path / "c.parquet", table(row("a")), {METADATA_KEY: document})
    with pytest.raises(UnsupportedFormat, match="catalog format 2"):
        read_catalog(path)


@pytest.mark.parametrize("document", ["{", "[]", '{"version": "x"}', "{}"])
def test_damaged_metadata(tmp_path: Path, document: str) -> None:
    path = store(tmp_path / "c.parquet", table(row("a")), {METADATA_KEY: document})
    with pytest.raises(BadCatalog, match="metadata key"):
        read_catalog(path)


def test_a_table_of_another_tool_has_no_metadata(tmp_path: Path) -> None:
    assert read_catalog(store(tmp_path / "c.parquet", table(row("a")))).metadata == CatalogMetadata()


def test_select_keeps_types_and_order() -> None:
    catalog = Catalog(table(row("c", x_off=3), row("a", x_off=1), row("b", x_off=2)), url="u")
    chosen = catalog.select("x_off >= 2 -- the rest of the line is a comment")
    assert chosen.table.equals(catalog.table.take(pa.array([0, 2])))
    assert chosen.url == "u"
    assert catalog.select(None) is catalog
    assert catalog.where_ids(["a", "none", "c"]).table["tile_id"].to_pylist() == ["c", "a"]


@pytest.mark.parametrize(
    "where",
    [
        "nonsense = 1",
        "x_off >",
        "1=1); DROP TABLE tiles; SELECT (1",
        "1=1); COPY tiles TO 'stolen.csv'; SELECT (1",
        "tile_id IN (SELECT content FROM read_text('pyproject.toml'))",
    ],
)
def test_select_refuses_what_is_no_condition(where: str) -> None:
    with pytest.raises(BadQuery) as caught:
        Catalog(table(row("a"))).select(where)
    assert "\n" not in str(caught.value)
    assert not Path("stolen.csv").exists()


def test_check_bands_names_what_lacks() -> None:
    sets = band_sets(table(row("a"), row("b", bands=["VV", "VH"]), row("c")))
    assert sets == {("red", "green"), ("VV", "VH")}
    check_bands(sets, ["green"], "c")
    check_bands(sets, ["VH", "VV"], "c")
    check_bands(set(), ["nir"], "an empty catalog")
    with pytest.raises(CodecMismatch, match=r"c: no tile has the bands nir .*red, green"):
        check_bands(sets, ["red", "nir"], "c")
    with pytest.raises(CodecMismatch, match="VV"):  # each is there, but no tile has both
        check_bands(sets, ["red", "green", "VV"], "c")

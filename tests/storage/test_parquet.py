"""Columns by ranges against what pyarrow reads from the whole file."""

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from nec_ray.storage import Store
from nec_ray.storage.parquet import read_columns


def table(rows: int) -> pa.Table:
    boxes = [None if n % 7 == 0 else {"xmin": n / 3, "xmax": float(n)} for n in range(rows)]
    return pa.table(
        {
            "tile_id": [f"tile-{n * 7919 % 1000:05d}" for n in range(rows)],
            "payload": [bytes([n % 251]) * (n % 90) for n in range(rows)],
            "label": pa.array([("water", "forest", None)[n % 3] for n in range(rows)]),
            "bbox": pa.array(boxes, pa.struct([("xmin", pa.float64()), ("xmax", pa.float64())])),
            "layers": [[n, n + 1][: n % 3] for n in range(rows)],
        }
    )


@given(
    rows=st.integers(0, 3000),
    columns=st.lists(st.sampled_from(["tile_id", "payload", "label", "bbox", "layers"]), min_size=1, unique=True),
    group=st.integers(50, 4000),
    dictionary=st.booleans(),
    compression=st.sampled_from(["zstd", "none"]),
)
def test_columns_are_those_that_pyarrow_reads(
    tmp_path_factory: pytest.TempPathFactory,
    rows: int,
    columns: list[str],
    group: int,
    dictionary: bool,
    compression: str,
) -> None:
    folder = tmp_path_factory.mktemp("columns")
    path = folder / "rows.parquet"
    pq.write_table(table(rows), path, row_group_size=group, use_dictionary=dictionary, compression=compression)
    found = read_columns(Store(folder), "rows.parquet", columns)
    assert found.equals(pq.read_table(path, columns=columns))


def test_only_the_bytes_of_the_columns_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    payloads = pa.array([bytes([n % 251]) * 5000 for n in range(400)])
    ids = pa.array([f"tile-{n}" for n in range(400)])
    path = tmp_path / "rows.parquet"
    pq.write_table(pa.table({"payload": payloads, "tile_id": ids}), path, compression="none", use_dictionary=False)
    asked: list[int] = []
    read = Store.read_range

    def counted(self: Store, name: str, start: int, end: int) -> bytes:
        asked.append(end - start)
        return read(self, name, start, end)

    monkeypatch.setattr(Store, "read_range", counted)
    assert read_columns(Store(tmp_path), path.name, ["tile_id"])["tile_id"].to_pylist() == ids.to_pylist()
    assert sum(asked) < path.stat().st_size / 10


@pytest.mark.parametrize("column", ["tile_id", "nothing"])
def test_what_is_no_parquet_file_or_has_no_such_column_is_told(tmp_path: Path, column: str) -> None:
    path = tmp_path / "rows.parquet"
    pq.write_table(table(2000), path)
    whole = path.read_bytes()
    if column == "nothing":
        with pytest.raises(pa.ArrowInvalid, match="no column nothing"):
            read_columns(Store(tmp_path), path.name, [column])
    for broken in (b"", b"PAR1", whole[:-1], whole[:100], b"PAR1" + b"\xff" * 4 + b"PAR1", whole[-200:]):
        path.write_bytes(broken)
        with pytest.raises((pa.ArrowException, OSError)):
            read_columns(Store(tmp_path), path.name, [column])

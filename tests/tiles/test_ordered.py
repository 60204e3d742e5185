"""Tiles sorted on disk, a few at a time, against the order of the whole table in memory."""

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nec_ray.errors import BadCatalog, NotFound
from nec_ray.tiles import Catalog, OrderedTiles, ordered, read_catalog, spatial_order, write_catalog
from tests.tiles.test_catalog import row, store, table


def scattered(rows: int, seed: int) -> list[dict[str, Any]]:
    """Tiles all over the world, some in one place, some in none."""
    rng = np.random.default_rng(seed)
    names = rng.permutation(rows)
    found = []
    for n in range(rows):
        lon, lat = rng.uniform(-179, 178), rng.uniform(-80, 79)
        if n % 5 == 0:
            lon, lat = 10.0, 20.0
        box = None if n % 7 == 0 else {"xmin": lon, "ymin": lat, "xmax": lon + 0.01, "ymax": lat + 0.01}
        found.append(row(f"tile-{names[n]:06d}", bbox=box, x_off=n, bands=[("red", "nir")[n % 2]]))
    return found


@settings(deadline=None, max_examples=30)
@given(count=st.integers(0, 600), bucket=st.integers(20, 700), seed=st.integers(0, 9), step=st.integers(7, 200))
def test_the_order_is_that_of_the_whole_table(
    tmp_path_factory: pytest.TempPathFactory, count: int, bucket: int, seed: int, step: int
) -> None:
    folder = tmp_path_factory.mktemp("ordered")
    url = folder / "catalog.parquet"
    rows = table(*scattered(count, seed)).append_column("mine", pa.array(range(count), pa.int64()))
    write_catalog(Catalog(rows), url)
    whole = read_catalog(url).table
    expected = whole.take(pa.array(spatial_order(whole)))
    before, ordered.BATCH = ordered.BATCH, 64
    try:
        tiles = OrderedTiles(url, folder, bucket=bucket)
        assert len(tiles) == count
        assert pa.concat_tables([expected.schema.empty_table(), *tiles.batches()]).equals(expected)
        for start in range(0, count, step):
            assert tiles.rows(start, min(start + 77, count)).equals(expected.slice(start, 77))
        numbers = list(range(0, count, step))
        assert tiles.take(numbers).equals(expected.take(pa.array(numbers, pa.int64())))
    finally:
        ordered.BATCH = before
    assert tiles.band_sets == ({("red",), ("nir",)} if count > 1 else {("red",)} if count else set())
    assert tiles.dtypes == ({"uint16"} if count else set())
    assert sorted(p.name for p in folder.iterdir()) == ["catalog.parquet", "tiles.arrow"]


def test_a_remote_catalog_is_the_same(tmp_path: Path) -> None:
    rows = table(*scattered(300, 1))
    write_catalog(Catalog(rows), "memory://ordered/catalog.parquet")
    tiles = OrderedTiles("memory://ordered/catalog.parquet", tmp_path)
    assert pa.concat_tables(tiles.batches()).equals(rows.take(pa.array(spatial_order(rows))))


def test_what_is_no_catalog_is_told(tmp_path: Path) -> None:
    with pytest.raises(NotFound, match="nothing is there"):
        OrderedTiles(tmp_path / "none.parquet", tmp_path)
    (tmp_path / "text.parquet").write_text("no Parquet")
    with pytest.raises(BadCatalog, match="not a Parquet file"):
        OrderedTiles(tmp_path / "text.parquet", tmp_path)
    with pytest.raises(BadCatalog, match="lacks the columns"):
        OrderedTiles(store(tmp_path / "other.parquet", pa.table({"tile_id": ["a"]})), tmp_path)
    with pytest.raises(BadCatalog, match="no width or height"):
        OrderedTiles(store(tmp_path / "flat.parquet", table(row("a", width=0))), tmp_path)

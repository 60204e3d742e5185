"""Exports of embeddings, read back by geopandas, DuckDB and xarray; what all formats refuse."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import duckdb
import geopandas
import numpy as np
import pyarrow.parquet as pq
import pytest
import xarray as xr
import zarr

from nec_ray import open_archive
from nec_ray.archive import Archive, Pull
from nec_ray.archive.exports import FORMATS, Format, export, selection
from nec_ray.errors import BadQuery, CorruptPayload, InputError, MixedCodecs
from tests.archive.exporting import awkward_archive, expected, mixed_archive
from tests.archive.make import Made, empty_archive, pack

formats = pytest.mark.parametrize("format_", get_args(Format))


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    return awkward_archive(tmp_path_factory.mktemp("awkward"))


@pytest.fixture
def small_batches(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Batches of 10 tiles; how many tiles each pull then gave."""
    monkeypatch.setattr(selection, "_BATCH_TILES", 10)
    sizes: list[int] = []
    pull: Callable[..., Pull] = Archive.pull

    def counted(*args: Any) -> Pull:
        found = pull(*args)
        sizes.append(len(found))
        return found

    monkeypatch.setattr(Archive, "pull", counted)
    return sizes


def test_geoparquet_holds_the_index_and_the_exact_embeddings(
    made: Made, tmp_path: Path, small_batches: list[int]
) -> None:
    calls: list[tuple[int, int]] = []
    out = tmp_path / "tiles.parquet"
    facts = export(open_archive(made.url), out, format="geoparquet", progress=lambda *done: calls.append(done))
    assert facts == {
        "out": str(out),
        "format": "geoparquet",
        "archive": made.url,
        "version": 2,
        "tiles": 44,
        "skipped_nodata": 1,
        "skipped_failed": 1,
        "tokens": 16,
        "channels": 24,
        "bytes": out.stat().st_size,
    }
    assert small_batches == [10, 10, 10, 10, 4]
    assert calls == [(10, 44), (20, 44), (30, 44), (40, 44), (44, 44)]
    assert pq.read_metadata(out).num_row_groups == 5
    frame = geopandas.read_parquet(out)
    assert sorted(frame["tile_id"]) == sorted(made.symbols)
    assert frame.crs == "OGC:CRS84"
    assert frame["tile_id"].iloc[-1] == "nowhere"
    found = np.stack([np.stack(tile) for tile in frame["embedding"]])
    assert np.array_equal(found, expected(made, list(frame["tile_id"])))
    index = open_archive(made.url).sql("SELECT * FROM embeddings WHERE status = 'valid' ORDER BY tile_id")
    table = pq.read_table(out).sort_by("tile_id")
    assert table.drop_columns("embedding").to_pylist() == index.to_arrow_table().to_pylist()


def test_geoparquet_is_filtered_by_place_and_read_by_duckdb(made: Made, tmp_path: Path) -> None:
    out = tmp_path / "tiles.parquet"
    export(open_archive(made.url), out, format="geoparquet", where="starts_with(tile_id, 't')")
    near = geopandas.read_parquet(out, bbox=(0.22, 0.12, 0.28, 0.18))
    assert list(near["tile_id"]) == ["t012"]
    assert near.total_bounds == pytest.approx([0.2, 0.1, 0.3, 0.2])
    query = (
        "SELECT embedding[3][5] FROM read_parquet(?) WHERE bbox.xmin > 0.15 AND bbox.xmax < 0.35 AND bbox.ymax < 0.15"
    )
    [(value,)] = duckdb.execute(query, [str(out)]).fetchall()
    assert value == expected(made, ["t002"])[0, 2, 4]
    geo = json.loads(pq.read_metadata(out).metadata[b"geo"])
    assert geo["version"] == "1.1.0"
    assert geo["columns"]["geometry"]["bbox"] == pytest.approx([0, 0, 1, 0.4])
    facts = json.loads(pq.read_metadata(out).metadata[b"nec_ray"])
    assert facts["codec_ids"] == [made.codec.id]
    assert facts["licence"] == "CC0"


def test_geoparquet_without_any_footprint_is_plain_parquet(made: Made, tmp_path: Path) -> None:
    out = tmp_path / "one.parquet"
    export(open_archive(made.url), out, format="geoparquet", where="tile_id = 'nowhere'")
    table = pq.read_table(out)
    assert b"geo" not in table.schema.metadata
    assert table["embedding"].to_pylist() == expected(made, ["nowhere"]).tolist()


def test_zarr_opens_in_xarray_with_coordinates(made: Made, tmp_path: Path, small_batches: list[int]) -> None:
    out = tmp_path / "tiles.zarr"
    facts = export(open_archive(made.url), out, format="zarr")
    assert (facts["tiles"], facts["shard_tiles"], facts["chunk_tiles"]) == (44, 10, 10)
    assert small_batches == [10, 10, 10, 10, 4]
    with xr.open_zarr(out, consolidated=False) as found:
        assert set(found.coords) == {"tile_id", "lon", "lat", "xmin", "ymin", "xmax", "ymax", "acquired_at"}
        ids = found["tile_id"].to_numpy().tolist()
        assert sorted(ids) == sorted(made.symbols)
        assert found["embeddings"].dims == ("tile", "token", "channel")
        assert found["embeddings"].dtype == np.float32
        assert np.array_equal(found["embeddings"], expected(made, ids))
        by_id = found.set_index(tile="tile_id")
        one = by_id.sel(tile="t012")
        box = [float(one[name]) for name in ("xmin", "ymin", "xmax", "ymax", "lon", "lat")]
        assert box == pytest.approx([0.2, 0.1, 0.3, 0.2, 0.25, 0.15])
        assert np.array_equal(one["embeddings"], expected(made, ["t012"])[0])
        assert one["acquired_at"].to_numpy() == np.datetime64("2020-05-18")
        assert by_id.sel(tile="A1")["acquired_at"].to_numpy() == np.datetime64("2021-01-02T03:04:05.678901")
        assert np.isnat(by_id.sel(tile="untimed")["acquired_at"].to_numpy())
        assert np.isnan(by_id.sel(tile="nowhere")["lon"])
        assert found.attrs["encoder_id"] == made.codec.encoder_id
        assert found.attrs["archive"] == Path(made.url).as_uri()
        assert found.attrs["attribution"] == "nobody"
        assert found.attrs["geoemb:dimensions"] == 24
        assert found.attrs["geoemb:chip_layout"] == {"layout_type": "regular_grid", "chip_size": [8, 8]}


def test_zarr_is_sharded(made: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from nec_ray.archive.exports import zarr as writer

    monkeypatch.setattr(selection, "_BATCH_TILES", 20)
    monkeypatch.setattr(writer, "_CHUNK_BYTES", 3 * 16 * 24 * 4)
    out = tmp_path / "tiles.zarr"
    export(open_archive(made.url), out, format="zarr")
    array = zarr.open_group(str(out), mode="r", zarr_format=3)["embeddings"]
    assert isinstance(array, zarr.Array)
    assert (array.chunks, array.shards) == ((3, 16, 24), (18, 16, 24))
    assert len([path for path in (out / "embeddings" / "c").rglob("*") if path.is_file()]) == 3
    ids = zarr.open_group(str(out), mode="r")["tile_id"][:].tolist()
    assert np.array_equal(np.asarray(array), expected(made, ids))


@pytest.mark.parametrize("format_", ["geoparquet", "zarr"])
def test_a_prefix_of_layers(made: Made, tmp_path: Path, format_: Format) -> None:
    out = tmp_path / "out"
    facts = export(open_archive(made.url), out, format=format_, where="label = 'water' -- dry ones not", layers=1)
    assert facts["channels"] == 8
    if format_ == "zarr":
        with xr.open_zarr(out, consolidated=False) as found:
            ids, embeddings = found["tile_id"].to_numpy().tolist(), found["embeddings"].to_numpy()
    else:
        table = pq.read_table(out)
        ids, embeddings = table["tile_id"].to_pylist(), np.array(table["embedding"].to_pylist(), np.float32)
    assert "t001" not in ids
    assert "t000" in ids
    assert np.array_equal(embeddings, expected(made, ids, 8))


def test_tiles_of_many_commits_are_in_hilbert_order_and_every_batch_finds_its_own(
    tmp_path: Path, small_batches: list[int]
) -> None:
    made = empty_archive(tmp_path)
    for k in range(4):
        made.index.append(made.index.version(), pack(made, [f"c{k}-{i:02}" for i in range(25)], seed=k))
    out = tmp_path / "tiles.parquet"
    assert export(open_archive(made.url), out, format="geoparquet")["tiles"] == 100
    table = pq.read_table(out)
    ids = table["tile_id"].to_pylist()
    assert np.array_equal(np.array(table["embedding"].to_pylist(), np.float32), expected(made, ids))
    assert [tile_id[-2:] for tile_id in ids[::4]] == [tile_id[-2:] for tile_id in ids[3::4]]  # same places together
    assert small_batches == [10] * 10


@formats
def test_a_taken_place_or_a_missing_folder_is_refused_and_left_alone(
    made: Made, tmp_path: Path, format_: Format
) -> None:
    taken = tmp_path / "taken"
    taken.write_text("mine")
    archive = open_archive(made.url)
    with pytest.raises(InputError, match="already there; give another --out"):
        export(archive, taken, format=format_)
    assert taken.read_text() == "mine"
    with pytest.raises(InputError, match="is not there; make it first"):
        export(archive, tmp_path / "no" / "out", format=format_)
    assert list(tmp_path.iterdir()) == [taken]


@formats
@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError(28, "No space left on device")])
def test_an_export_that_ends_early_leaves_nothing(
    made: Made, tmp_path: Path, format_: Format, error: BaseException, small_batches: list[int]
) -> None:
    def stop(done: int, total: int) -> None:
        raise error

    expected_error = InputError if isinstance(error, OSError) else KeyboardInterrupt
    with pytest.raises(expected_error):
        export(open_archive(made.url), tmp_path / "out", format=format_, progress=stop)
    assert list(tmp_path.iterdir()) == []


@formats
def test_what_cannot_be_exported_is_refused_before_anything_is_written(
    made: Made, tmp_path: Path, format_: Format
) -> None:
    archive = open_archive(made.url)
    for where, layers, error, message in (
        ("label = 'moon'", None, InputError, "no valid tile fits label = 'moon'; nothing to export"),
        ("status = 'failed'", None, InputError, "no valid tile fits"),
        ("true); DROP VIEW embeddings; SELECT (true", None, BadQuery, "no SQL condition"),
        (None, 3, InputError, "has 2 layers, not 3"),
    ):
        with pytest.raises(error, match=message.replace("(", r"\(")) as caught:
            export(archive, tmp_path / "out", format=format_, where=where, layers=layers)
        assert "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []


@formats
def test_embeddings_of_two_encoders_are_not_mixed(tmp_path: Path, format_: Format) -> None:
    mixed, foreign = mixed_archive(tmp_path)
    archive = open_archive(mixed.url)
    with pytest.raises(MixedCodecs, match="pick one"):
        export(archive, tmp_path / "out", format=format_)
    assert export(archive, tmp_path / "out", format=format_, where=f"codec_id = '{foreign}'")["tiles"] == 1
    assert (tmp_path / "out").exists()


@pytest.mark.parametrize("format_", ["geoparquet", "zarr"])
def test_a_damaged_payload_stops_the_export_by_name(tmp_path: Path, format_: Format) -> None:
    made = awkward_archive(tmp_path)
    archive = open_archive(made.url)
    [(name, at)] = archive.sql("SELECT payload.pack, payload.offset FROM embeddings WHERE tile_id = 't007'").fetchall()
    data = bytearray((Path(made.url) / name).read_bytes())
    data[at + 9] ^= 4
    (Path(made.url) / name).write_bytes(data)
    with pytest.raises(CorruptPayload, match="tile t007"):
        export(archive, tmp_path / "out", format=format_)
    assert not [path for path in tmp_path.iterdir() if path.name.startswith((".", "out"))]


def test_formats_are_those_of_the_signature() -> None:
    assert tuple(FORMATS) == get_args(Format)


def test_the_shared_source_is_named(made: Made, tmp_path: Path) -> None:
    archive = open_archive(made.url)
    for number, (where, source) in enumerate(
        {
            "label = 'water'": f"{Path(made.url).as_uri()}/index",  # scene.tif and s3://scenes/...
            "starts_with(source, 's3')": "s3://scenes/2021",
            "tile_id = 'A1'": "s3://scenes/2021/1.tif",
        }.items()
    ):
        out = tmp_path / f"{number}.zarr"
        export(archive, out, format="zarr", where=where)
        assert zarr.open_group(str(out), mode="r").attrs["geoemb:source_data"] == [source]

"""What a consumer does with an archive in Python: similar tiles, places and times, coverage, parts, exports."""

import os
import pickle
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pytest

from nec_ray import open_archive
from nec_ray.archive import Archive
from nec_ray.archive.layout import install_codec
from nec_ray.codec import load_codec
from nec_ray.errors import BadQuery, CorruptPayload, InputError, MixedCodecs, NotFound
from nec_ray.models import torch_dataset
from nec_ray.tiles import Catalog, build_catalog, builtin_scene, write_catalog
from tests.archive.make import Made, damage, empty_archive, filled_archive, pack
from tests.codec.make import make_codec, make_transform

Vectors = npt.NDArray[np.int8]


def pooled(rows: pa.Table, vectors: dict[str, list[int] | None]) -> pa.Table:
    """The rows with these pooled vectors."""
    at = rows.schema.get_field_index("pooled")
    field = rows.schema.field(at)
    values = [vectors.get(tile_id) for tile_id in rows["tile_id"].to_pylist()]
    return rows.set_column(at, field, pa.array(values, field.type))


@pytest.fixture(scope="module")
def ranked(tmp_path_factory: pytest.TempPathFactory) -> tuple[Archive, list[str], Vectors]:
    """An archive, its valid tiles and their pooled vectors: two are the same, one is zero."""
    made = empty_archive(tmp_path_factory.mktemp("ranked"))
    names = [f"t{i:02}" for i in range(60)]
    rows = pack(made, names, ["valid"] * 59 + ["failed"])
    vectors = np.random.default_rng(3).integers(-127, 128, (59, 24)).astype(np.int8)
    vectors[20], vectors[30], vectors[40] = vectors[10], 0, -vectors[10]
    given: dict[str, list[int] | None] = dict(zip(names, vectors.tolist(), strict=False))
    made.index.append(made.index.version(), pooled(rows, given))
    return open_archive(made.url), names[:59], vectors


def cosines(vectors: Vectors, like: npt.ArrayLike) -> npt.NDArray[np.float64]:
    a, b = vectors.astype(float), np.asarray(like, float)
    length = np.linalg.norm(a, axis=1) * np.linalg.norm(b)
    return np.divide(a @ b, length, out=np.zeros(len(a)), where=length > 0)


@pytest.mark.parametrize("k", [1, 7, 100])
def test_similar_tiles_are_those_of_the_largest_cosines(ranked: tuple[Archive, list[str], Vectors], k: int) -> None:
    archive, names, vectors = ranked
    found = archive.similar("t10", k)
    expected = cosines(vectors, vectors[10])
    order = [i for i in np.lexsort((np.arange(59), -expected.round(12))) if i != 10][:k]
    assert found["tile_id"].to_pylist() == [names[i] for i in order]
    np.testing.assert_allclose(found["similarity"].to_numpy(), expected[order], atol=1e-12)
    assert found["tile_id"][0].as_py() == "t20"
    if k == 100:
        assert found["tile_id"][-1].as_py() == "t40"
        assert found["similarity"].to_pylist()[found["tile_id"].to_pylist().index("t30")] == 0


def test_similar_to_a_vector_among_some_tiles_with_their_columns(ranked: tuple[Archive, list[str], Vectors]) -> None:
    archive, names, vectors = ranked
    like = np.random.default_rng(4).normal(0, 1, 24)
    found = archive.similar(like, 5, "label = 'water'", within=(0, 0, 1, 0.25), columns=["label", "n_bytes"])
    expected = cosines(vectors, like)
    some = [i for i in range(59) if i % 2 == 0 and i // 10 <= 2]
    best = sorted(some, key=lambda i: -expected[i])[:5]
    assert found["tile_id"].to_pylist() == [names[i] for i in best]
    assert set(found["label"].to_pylist()) == {"water"}
    assert found["n_bytes"].to_pylist() == [len_ for len_ in found["n_bytes"].to_pylist() if len_ > 0]


def test_similar_to_an_embedding_pools_it_as_the_encoder_does(tmp_path: Path) -> None:
    made = empty_archive(tmp_path)
    rows = pack(made, [f"t{i}" for i in range(20)])
    vectors = {tile_id: made.codec.pool(symbols[None])[0].tolist() for tile_id, symbols in made.symbols.items()}
    made.index.append(made.index.version(), pooled(rows, vectors))
    archive = open_archive(made.url)
    pull = archive.pull(tile_ids=["t7"])
    best = archive.similar(pull.embeddings[0], 1).to_pylist()
    assert best[0]["tile_id"] == "t7"
    assert best[0]["similarity"] > 0.99


def test_vectors_and_embeddings_differ_in_length_where_vectors_are_of_principal_axes(tmp_path: Path) -> None:
    """As those of every codec with more than 32 channels."""
    made = empty_archive(tmp_path, transform=make_transform(40))
    rows = pack(made, [f"t{i}" for i in range(20)])
    vectors = {tile_id: made.codec.pool(symbols[None])[0].tolist() for tile_id, symbols in made.symbols.items()}
    made.index.append(made.index.version(), pooled(rows, vectors))
    archive = open_archive(made.url)
    pull = archive.pull(tile_ids="t7")
    center, basis = made.codec.pool_axes()
    assert pull.embeddings.shape[2] == basis.shape[0] == 40
    assert basis.shape[1] < 40
    by_hand = (pull.embeddings[0].mean(axis=0, dtype=float) - center) @ basis
    found = archive.similar(pull.embeddings[0], 5)
    assert found["tile_id"][0].as_py() == "t7"
    assert archive.similar(by_hand, 5)["tile_id"].equals(found["tile_id"])
    for length in (40, 39):
        with pytest.raises(InputError, match=f"{length} numbers where pooled vectors have {basis.shape[1]}"):
            archive.similar(np.ones(length))


@pytest.mark.parametrize(
    ("like", "says"),
    [
        ("t1O", "did you mean 't10'"),
        ("t59", "is failed"),
        (np.ones(23), "23 numbers where pooled vectors have 24"),
        (np.zeros(24), "is zero"),
        (np.full(24, np.nan), "similar to what"),
        (None, "similar to what"),
        (np.ones((2, 3, 24)), "similar to what"),
    ],
)
def test_what_nothing_can_be_similar_to_is_refused(
    ranked: tuple[Archive, list[str], Vectors], like: Any, says: str
) -> None:
    with pytest.raises(InputError, match=says):
        ranked[0].similar(like)
    with pytest.raises(InputError, match="1 or more"):
        ranked[0].similar("t10", 0)


def test_pooled_vectors_of_two_encoders_are_not_compared(tmp_path: Path) -> None:
    made = empty_archive(tmp_path)
    rows = pack(made, ["a1", "a2"])
    make_codec(tmp_path / "other", seed=9)
    install_codec(made.store, load_codec(tmp_path / "other"))
    other = Made(made.url, made.store, made.index, load_codec(tmp_path / "other"), {})
    vectors: dict[str, list[int] | None] = {name: [i, 1, 2] for i, name in enumerate(["a1", "a2", "b1", "b2"])}
    made.index.append(made.index.version(), pooled(rows, vectors))
    made.index.append(made.index.version(), pooled(pack(other, ["b1", "b2"]), vectors))
    archive = open_archive(made.url)
    with pytest.raises(MixedCodecs, match="codec_id = "):
        archive.similar("a1")
    assert archive.similar("a1", 5, f"codec_id = '{made.codec.id}'")["tile_id"].to_pylist() == ["a2"]
    with pytest.raises(MixedCodecs):
        archive.similar("a1", 5, f"codec_id = '{other.codec.id}'")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    return filled_archive(tmp_path_factory.mktemp("filled"))


REGION = (0.05, 0.05, 0.35, 0.15)
"""Meets columns 0 to 3 of rows 0 and 1."""
IN_REGION = [f"t{row}{column}" for row in ("00", "01") for column in range(4)]


def test_a_pull_takes_a_place_and_a_time(made: Made) -> None:
    archive = open_archive(made.url)
    pull = archive.pull("label = 'water'", within=REGION, time="2020-05")
    assert pull.tile_ids == [tile_id for tile_id in IN_REGION if int(tile_id[-1]) % 2 == 0]
    for tile_id, symbols in zip(pull.tile_ids, pull.symbols, strict=True):
        assert np.array_equal(symbols, made.symbols[tile_id])
    same = archive.within(REGION).select("label = 'water' -- a comment", time="2020-05-18").pull(layers=1)
    assert same.tile_ids == pull.tile_ids
    assert np.array_equal(same.symbols, pull.symbols[..., :8])
    assert archive.at(0.25, 0.15, "2020").pull().tile_ids == ["t012"]
    with pytest.raises(BadQuery, match="condition"):
        archive.within(REGION).select("true) OR (true")


def test_a_tile_sets_condition_goes_on_into_sql(made: Made) -> None:
    archive = open_archive(made.url)
    tiles = archive.within(REGION, "2020-05-18")
    query = f"SELECT tile_id FROM embeddings WHERE {tiles.where} ORDER BY tile_id"
    assert [name for (name,) in archive.sql(query).fetchall()] == IN_REGION
    assert archive.rows(["tile_id"], tiles.where)["tile_id"].to_pylist() == IN_REGION
    assert len(archive.select()) == 40
    assert [tile_id for tile_id, _ in torch_dataset(archive, tiles.where, batch_size=3)] == IN_REGION


def test_tile_sets_come_as_frames(made: Made) -> None:
    import geopandas

    tiles = open_archive(made.url).within(REGION)
    frame = tiles.to_geodataframe(["tile_id", "status"])
    assert isinstance(frame, geopandas.GeoDataFrame)
    assert frame["tile_id"].tolist() == tiles.to_pandas()["tile_id"].tolist() == IN_REGION
    assert frame.crs.is_geographic
    assert frame.total_bounds.tolist() == pytest.approx([0, 0, 0.4, 0.2])


def test_nothing_there_is_said_with_what_there_is(made: Made) -> None:
    archive = open_archive(made.url)
    with pytest.raises(InputError, match=r"between longitudes 0 and 1, latitudes 0 and 0\.4") as caught:
        archive.within({"type": "Point", "coordinates": [11.5, 48.1]}).pull()
    assert len(str(caught.value)) < 500
    with pytest.raises(InputError, match="its times are 2020-05-18 to 2020-05-18"):
        archive.pull(time="2021")
    with pytest.raises(InputError, match=f"codec_id is {made.codec.id}"):
        archive.pull("codec_id = 'abc'")
    with pytest.raises(InputError, match="label is forest, water"):
        archive.pull("label = 'moon'")


def test_coverage_counts_what_became_of_the_tiles(made: Made) -> None:
    archive = open_archive(made.url)
    every = archive.coverage()
    assert (every.valid, every.failed, every.nodata, every.absent) == (38, 1, 1, None)
    corner = archive.coverage((0.75, 0.35, 1, 1), "2020")
    assert (corner.valid, corner.failed, corner.nodata) == (1, 1, 1)
    assert corner.tiles["status"].to_pylist() == ["valid", "failed", "nodata"]
    assert archive.coverage((0.75, 0.35, 1, 1), "2021").tiles.num_rows == 0


def test_coverage_knows_what_is_absent_of_catalogs(tmp_path: Path) -> None:
    catalog = build_catalog(builtin_scene(), tile_size=128)
    write_catalog(catalog, tmp_path / "catalog.parquet")
    names = catalog.table["tile_id"].to_pylist()
    made = empty_archive(tmp_path)
    made.index.append(made.index.version(), pack(made, names[:5]))
    archive = open_archive(made.url)
    found = archive.coverage(catalog=tmp_path / "catalog.parquet")
    assert (found.valid, found.absent) == (5, len(names) - 5)
    assert sorted(found.tiles["tile_id"].to_pylist()) == sorted(names)
    assert archive.coverage(catalog=[catalog, tmp_path / "catalog.parquet"]).absent == len(names) - 5
    box = catalog.table["bbox"][7].as_py()
    middle = ((box["xmin"] + box["xmax"]) / 2, (box["ymin"] + box["ymax"]) / 2)
    here = archive.coverage((*middle, *middle), catalog=catalog)
    assert here.tiles.filter(pa.compute.equal(here.tiles["status"], "absent"))["tile_id"].to_pylist() == [names[7]]
    assert archive.coverage((*middle, *middle), "1970", catalog).absent == 0
    with pytest.raises(InputError, match="no catalogs"):
        archive.coverage(catalog=[])
    whole = Catalog(catalog.table.slice(0, 5))
    assert archive.coverage(catalog=whole).absent == 0


def test_parts_of_a_pull_read_nothing_of_the_index(tmp_path: Path) -> None:
    made = filled_archive(tmp_path)
    archive = open_archive(made.url)
    parts = [pickle.loads(pickle.dumps(part)) for part in archive.parts("label = 'water'", layers=1, tiles=6)]  # noqa: S301
    for path in (Path(made.url) / "index").rglob("*.*"):
        path.unlink()
    pulls = [part.pull() for part in parts]
    assert [len(part) for part in parts] == [6, 6, 6, 1] == [len(pull) for pull in pulls]
    water = [tile_id for tile_id in sorted(made.symbols) if int(tile_id[1:]) % 2 == 0]
    assert sorted(name for pull in pulls for name in pull.tile_ids) == water
    for pull in pulls:
        for tile_id, symbols in zip(pull.tile_ids, pull.symbols, strict=True):
            assert np.array_equal(symbols, made.symbols[tile_id][:, :8])


def test_a_damaged_payload_of_a_part_is_named(tmp_path: Path) -> None:
    made = filled_archive(tmp_path)
    damage(made, "t007")
    with pytest.raises(CorruptPayload, match="tile t007"):
        [part.pull() for part in open_archive(made.url).parts(tiles=10)]
    with pytest.raises(InputError, match="1 or more"):
        open_archive(made.url).parts(tiles=0)
    with pytest.raises(InputError, match="has 2 layers, not 3"):
        open_archive(made.url).parts(layers=3)


def test_to_zarr_writes_what_a_place_and_a_time_pick(made: Made, tmp_path: Path) -> None:
    import xarray

    facts = open_archive(made.url).to_zarr(tmp_path / "some.zarr", within=REGION, time="2020", layers=1)
    assert facts["tiles"] == 8
    opened = xarray.open_zarr(tmp_path / "some.zarr", consolidated=False)
    for tile_id, values in zip(opened["tile_id"].values, opened["embeddings"].values, strict=True):
        assert np.allclose(values, made.symbols[tile_id][:, :8] + made.codec.tables.median[:8])
    with pytest.raises(InputError, match="already there"):
        open_archive(made.url).within(REGION).to_zarr(tmp_path / "some.zarr")
    with pytest.raises(InputError, match="nothing to export"):
        open_archive(made.url).to_zarr(tmp_path / "none.zarr", time="1999")


def test_no_such_tile_is_not_found(made: Made) -> None:
    with pytest.raises(NotFound):
        open_archive(made.url).similar("nothing at all")


def test_objects_show_themselves_in_notebooks(made: Made, tmp_path: Path) -> None:
    archive = open_archive(made.url)
    tiles = archive.within(REGION)
    assert repr(tiles).startswith("<TileSet: 8 of 40 tiles of <Archive ")
    assert repr(archive.at(0.05, 0.05).pull()).startswith("<Pull: 1 tiles of 16 tokens (4x4) x 24 channels, ")
    assert repr(archive.coverage()) == "<Coverage: 38 valid, 1 nodata, 1 failed, absent unknown without a catalog>"
    for one in (archive, tiles, tiles.pull(), archive.coverage(), made.codec):
        shown = one._repr_html_()
        assert shown.startswith("<p><b>")
        assert len(shown) < 1500
    assert "<td>CC0</td>" in archive._repr_html_()
    hostile = empty_archive(tmp_path / "<script>")
    assert "<script>" not in open_archive(hostile.url)._repr_html_()


@pytest.mark.parametrize(
    ("query", "says"),
    [
        ("SELECT tile FROM embeddings", "no column 'tile'; did you mean 'tile_id'?"),
        ("SELECT aquired_at FROM embeddings", "no column 'aquired_at'; did you mean 'acquired_at'?"),
        ("SELECT Codec FROM embeddings", "did you mean 'codec_id'?"),
        ("SELECT nec_decod(payload) FROM embeddings", "no function 'nec_decod'; did you mean 'nec_decode'?"),
        ("SELECT tile_id FROM embedings", "no table 'embedings'; an archive has one, `embeddings`"),
        ("SELECT n AS number FROM (SELECT n_bytes AS cost FROM embeddings) WHERE kost > 1", "did you mean 'cost'?"),
    ],
)
def test_a_wrong_name_in_sql_suggests_the_right_one(made: Made, query: str, says: str) -> None:
    with pytest.raises(BadQuery) as caught:
        open_archive(made.url).sql(query.replace("SELECT n AS number", "SELECT cost"))
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_wrong_column_of_a_condition_suggests_the_right_one(made: Made) -> None:
    with pytest.raises(BadQuery, match="no column 'labl'; did you mean 'label'"):
        open_archive(made.url).pull("labl = 'water'")


def test_a_codec_is_found_by_its_first_digits_and_a_wrong_one_suggested(made: Made) -> None:
    archive = open_archive(made.url)
    assert archive.codec(made.codec.id[:6]).id == made.codec.id
    wrong = made.codec.id[:5] + ("0" if made.codec.id[5] != "0" else "1") + made.codec.id[6:]
    for name in (wrong, wrong[:12]):
        with pytest.raises(NotFound, match=f"did you mean '{made.codec.id[:12]}'"):
            archive.codec(name)
    with pytest.raises(NotFound, match=f"there are: {made.codec.id[:12]}"):
        archive.codec("mae")


def test_what_is_no_string_is_refused_by_one_line(made: Made) -> None:
    archive = open_archive(made.url)
    circle: dict[str, Any] = {"type": "Feature"}
    circle["geometry"] = circle
    for wrong, error, says in (
        (lambda: open_archive(None), InputError, "None is no path or URL"),  # type: ignore[arg-type]
        (lambda: load_codec(7), InputError, "7 is no path or URL"),  # type: ignore[arg-type]
        (lambda: archive.codec(None), InputError, "None is no codec's id"),  # type: ignore[arg-type]
        (lambda: archive.pull(where=5), BadQuery, "5 is no SQL condition"),  # type: ignore[arg-type]
        (lambda: archive.pull(layers="a"), InputError, "layers 'a': give 1 or more"),  # type: ignore[arg-type]
        (lambda: archive.sql(None), BadQuery, "None is no SQL"),  # type: ignore[arg-type]
        (lambda: archive.sql("SELECT '\ud800'"), BadQuery, "surrogate"),
        (lambda: archive.sql("SELECT ?", 5), InputError, "params 5: give a list"),  # type: ignore[arg-type]
        (lambda: archive.sql("SELECT ?", "abc"), InputError, "params 'abc': give a list"),
        (lambda: archive.sql("SELECT 1").to_arrow_reader(0), InputError, "batch_rows 0"),
        (lambda: archive.rows([1]), InputError, r"columns \[1\]"),  # type: ignore[list-item]
        (lambda: archive.coverage(catalog=5), InputError, "catalog 5: give paths"),  # type: ignore[arg-type]
        (lambda: archive.within(circle), InputError, "no GeoJSON"),
        (lambda: open_archive(made.url, version=True), InputError, "version True"),
    ):
        with pytest.raises(error, match=says):
            wrong()


def test_a_column_may_be_one_string(ranked: tuple[Archive, list[str], Vectors]) -> None:
    archive, (tile_id, *_), _ = ranked
    assert archive.select().rows("status").column_names == ["status"]
    assert archive.similar(tile_id, 2, columns="status").column_names == ["tile_id", "status", "similarity"]


@pytest.mark.parametrize(
    ("within", "said"),
    [
        ((20, 20, 21, 21.5), "within 20, 20, 21, 21.5;"),
        ('{"type": "Point", "coordinates": [30, 2]}', "within the region;"),
    ],
)
def test_an_empty_place_is_answered_with_what_was_given(made: Made, within: Any, said: str) -> None:
    with pytest.raises(InputError, match=said) as caught:
        open_archive(made.url).within(within).pull()
    assert "bbox" not in str(caught.value)
    with pytest.raises(InputError, match=f"label = 'x' AND {said}"):
        open_archive(made.url).pull("label = 'x'", within=within)


def test_a_region_is_read_from_a_file_and_a_wrong_name_suggested(made: Made, tmp_path: Path) -> None:
    (tmp_path / "region.geojson").write_text('{"type": "Point", "coordinates": [0.05, 0.05]}')
    archive = open_archive(made.url)
    assert len(archive.within(tmp_path / "region.geojson")) == 1
    with pytest.raises(NotFound, match=r"did you mean 'region\.geojson'"):
        archive.within(str(tmp_path / "regoin.geojson"))
    with pytest.raises(InputError, match="no GeoJSON"):  # SQL comes from others: it opens no files
        archive.sql(f"SELECT nec_intersects(geometry, '{tmp_path}/region.geojson') FROM embeddings").fetchall()


def test_a_time_before_the_first_version_is_told_when_that_was(made: Made) -> None:
    first = made.index.history()[-1].time.isoformat(timespec="seconds")
    with pytest.raises(NotFound) as caught:
        open_archive(made.url, version="2001-01-01T00:00:00+00:00")
    assert f"the archive is younger, of {first}" in str(caught.value)


def test_a_pull_tells_how_far_it_is(made: Made) -> None:
    calls: list[tuple[int, int]] = []
    pull = open_archive(made.url).pull(progress=lambda *done: calls.append(done))
    assert calls[-1] == (len(pull), len(pull))
    assert [done for done, _ in calls] == sorted({done for done, _ in calls})


def test_what_cannot_be_pulled_is_said_by_its_name(tmp_path: Path) -> None:
    archive = open_archive(filled_archive(tmp_path).url)
    with pytest.raises(InputError, match="layers 0: give 1 or more"):
        archive.pull(layers=0)
    with pytest.raises(InputError, match=r"no valid tile fits of the tiles 'nope', 'none'; nothing to pull"):
        archive.pull(tile_ids=["nope", "none"])
    with pytest.raises(InputError, match="a ring of fewer than three points"):
        archive.within({"type": "Polygon", "coordinates": [[[0, 0], [1, 1], [0, 0]]]})


def test_a_data_set_is_of_a_place_and_a_time(ranked: tuple[Archive, list[str], Vectors]) -> None:
    archive, names, _ = ranked
    box = archive.rows(["bbox"], "tile_id = 't07'")["bbox"][0].as_py()
    place = (box["xmin"], box["ymin"], box["xmax"], box["ymax"])
    found = torch_dataset(archive, "tile_id <> 't09'", within=place)
    expected = archive.select("tile_id <> 't09' AND status = 'valid'", within=place).rows(["tile_id"])
    assert found.tile_ids == expected["tile_id"].to_pylist()
    assert 0 < len(found) < len(names)


@pytest.fixture
def heard() -> Iterator[None]:
    """Ctrl-C, which shells let processes in the background ignore."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("heard")
@pytest.mark.timeout(60)  # DuckDB alone does not always hear it
@pytest.mark.parametrize("tables", ["range(100000000000) a", "range(10000000000) a, range(1000) b"])
def test_ctrl_c_stops_a_query(tmp_path: Path, tables: str) -> None:
    archive = open_archive(filled_archive(tmp_path).url)
    for ask in (
        lambda: archive.sql(f"SELECT count(*) FROM {tables}").fetchall(),
        lambda: archive.sql(f"SELECT count(*) FROM {tables}").to_arrow_reader().read_all(),
        lambda: archive.rows(["tile_id"], f"(SELECT count(*) FROM {tables}) > 1"),
    ):
        stop = threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGINT))
        stop.start()
        with pytest.raises(KeyboardInterrupt):
            ask()
        stop.join()
    assert len(archive.sql("SELECT tile_id FROM embeddings").fetchall()) == 40

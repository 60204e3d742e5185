"""SQL and pull on a small real archive: exact symbols, typed refusals, nothing but reading."""

from pathlib import Path

import duckdb
import numpy as np
import pyarrow as pa
import pytest
import zarr

from nec_ray import open_archive
from nec_ray.archive.export import write_pull
from nec_ray.errors import (
    BadQuery,
    CorruptIndex,
    CorruptPack,
    CorruptPayload,
    InputError,
    MixedCodecs,
    NotFound,
)
from tests.archive.make import Made, empty_archive, filled_archive, index_rows, pack


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    return filled_archive(tmp_path_factory.mktemp("filled"))


def test_a_pull_gives_the_exact_symbols(made: Made) -> None:
    pull = open_archive(made.url).pull()
    assert pull.tile_ids == sorted(made.symbols)
    for tile_id, symbols, embedding in zip(pull.tile_ids, pull.symbols, pull.embeddings, strict=True):
        assert np.array_equal(symbols, made.symbols[tile_id])
        assert np.allclose(embedding, made.symbols[tile_id] + made.codec.tables.median)
    assert pull.n_bytes.sum() == open_archive(made.url).sql("SELECT sum(n_bytes) FROM embeddings").fetchall()[0][0]


def test_a_pull_takes_a_condition_and_a_prefix_of_layers(made: Made) -> None:
    archive = open_archive(made.url)
    pull = archive.pull("label = 'water' AND bbox.xmin < 0.35 -- a comment", layers=1)
    assert pull.tile_ids == [t for t in sorted(made.symbols) if int(t[1:]) % 10 in (0, 2)]
    assert np.array_equal(pull.symbols[0], made.symbols[pull.tile_ids[0]][:, :8])
    assert pull.n_bytes.sum() < archive.pull("label = 'water' AND bbox.xmin < 0.35").n_bytes.sum()
    assert archive.pull(tile_ids=["t003", "t001", "absent"]).tile_ids == ["t001", "t003"]


def test_sql_decodes(made: Made) -> None:
    query = "SELECT tile_id, nec_decode(payload), nec_pool(payload) FROM embeddings ORDER BY tile_id"
    rows = open_archive(made.url).sql(query).fetchall()
    assert len(rows) == 40
    for tile_id, embedding, pooled in rows:
        if tile_id in made.symbols:
            assert np.allclose(np.array(embedding), made.symbols[tile_id] + made.codec.tables.median)
            assert pooled == made.codec.pool(made.symbols[tile_id][None])[0].tolist()
        else:
            assert embedding is None
            assert pooled is None


def test_results_come_as_arrow_streams(made: Made) -> None:
    query = open_archive(made.url).sql("SELECT tile_id FROM embeddings ORDER BY tile_id")
    assert query.columns == ["tile_id"]
    assert pa.table(query).num_rows == 40
    assert sum(batch.num_rows for batch in query.to_arrow_reader(7)) == 40


@pytest.mark.parametrize(
    "sql",
    [
        "SELEC tile_id FROM embeddings",
        "SELECT no_such_column FROM embeddings",
        "SELECT * FROM read_csv('/etc/passwd')",
        "SELECT * FROM '/etc/passwd'",
        "SELECT * FROM read_text('/etc/passwd')",
        "SELECT * FROM glob('/*')",
        "COPY embeddings TO '/tmp/x.parquet'",
        "CREATE TABLE x AS SELECT 1",
        "SELECT 1; DROP VIEW embeddings",
        "ATTACH '/tmp/x.db'",
        "SET enable_external_access=true",
        "INSTALL httpfs",
        "EXPLAIN ANALYZE COPY embeddings TO '/tmp/x.parquet'",
        "",
        "SELECT tile_id::INTEGER FROM embeddings",
    ],
)
def test_sql_that_does_more_than_read_is_refused_in_one_line(made: Made, sql: str) -> None:
    before = sorted(p.read_bytes() for p in (Path(made.url) / "index").glob("*.parquet"))
    with pytest.raises(BadQuery) as caught:
        open_archive(made.url).sql(sql).to_arrow_table()
    assert "\n" not in str(caught.value)
    assert sorted(p.read_bytes() for p in (Path(made.url) / "index").glob("*.parquet")) == before


def test_a_condition_cannot_smuggle_a_second_statement(made: Made) -> None:
    with pytest.raises(BadQuery):
        open_archive(made.url).pull("true); DROP VIEW embeddings; SELECT (true")


def test_no_tile_fits(made: Made) -> None:
    with pytest.raises(InputError, match="no valid tile fits label = 'moon'"):
        open_archive(made.url).pull("label = 'moon'")
    with pytest.raises(InputError, match="has 2 layers, not 3"):
        open_archive(made.url).pull(layers=3)


def test_no_archive_there(tmp_path: Path) -> None:
    with pytest.raises(NotFound, match="no archive there"):
        open_archive(tmp_path / "nothing")


def test_versions_are_pinned(tmp_path: Path) -> None:
    made = filled_archive(tmp_path)
    pinned = open_archive(made.url)
    made.index.commit(made.index.version(), pack(made, ["later"]))
    assert len(pinned.rows(["tile_id"])) == 40
    assert len(open_archive(made.url).rows(["tile_id"])) == 41
    assert len(open_archive(made.url, version=1).rows(["tile_id"])) == 40
    committed = made.index.history()[1]["time"]
    assert open_archive(made.url, version=str(committed)).version == 1
    with pytest.raises(NotFound, match="no version 99; the newest is 2"):
        open_archive(made.url, version=99)
    with pytest.raises(NotFound, match="younger"):
        open_archive(made.url, version="2001-01-01T00:00:00+00:00")
    with pytest.raises(InputError, match="a number or a time"):
        open_archive(made.url, version="yesterday")


def test_a_damaged_payload_is_reported_by_tile(tmp_path: Path) -> None:
    made = filled_archive(tmp_path)
    [(name, offset)] = (
        open_archive(made.url)
        .sql("SELECT payload.pack, payload.offset FROM embeddings WHERE tile_id = 't007'")
        .fetchall()
    )
    path = Path(made.url) / name
    data = bytearray(path.read_bytes())
    data[offset + 9] ^= 4
    path.write_bytes(data)
    with pytest.raises(CorruptPayload, match="tile t007: layer 1"):
        open_archive(made.url).pull()
    with pytest.raises(CorruptPayload, match="layer 1"):
        open_archive(made.url).sql("SELECT nec_decode(payload) FROM embeddings WHERE tile_id = 't007'").fetchall()
    assert len(open_archive(made.url).pull("tile_id <> 't007'")) == 37


def test_a_missing_pack_is_reported(tmp_path: Path) -> None:
    made = filled_archive(tmp_path)
    [name] = made.store.list("packs")
    (Path(made.url) / name).unlink()
    with pytest.raises(CorruptPack, match="is gone"):
        open_archive(made.url).pull()


@pytest.mark.parametrize(
    "payload",
    [
        {"pack": "../../etc/passwd", "offset": 0, "layer_lengths": [10]},
        {"pack": "/etc/passwd", "offset": 0, "layer_lengths": [10]},
        {"pack": "packs/" + "a" * 64 + "/aa/../../x.pack", "offset": 0, "layer_lengths": [10]},
        {"pack": "s3://elsewhere/x.pack", "offset": 0, "layer_lengths": [10]},
        {"pack": None, "offset": -1, "layer_lengths": [10]},
        {"pack": None, "offset": 0, "layer_lengths": [1 << 30, 1]},
        {"pack": None, "offset": 0, "layer_lengths": [-5, 6]},
        {"pack": None, "offset": 0, "layer_lengths": []},
    ],
)
def test_a_hostile_reference_cannot_leave_the_archive(tmp_path: Path, payload: dict[str, object]) -> None:
    made = filled_archive(tmp_path)
    rows = index_rows(["evil"], made.codec.id)
    [name] = made.store.list("packs")
    position = rows.schema.get_field_index("payload")
    field = rows.schema.field(position)
    evil = pa.array([{**payload, "pack": payload["pack"] or name}], field.type)
    made.index.commit(made.index.version(), rows.set_column(position, field, evil))
    with pytest.raises(CorruptIndex):
        open_archive(made.url).pull()


def test_embeddings_of_two_encoders_are_not_mixed(tmp_path: Path) -> None:
    made = filled_archive(tmp_path)
    other = empty_archive(tmp_path / "other", seed=1)
    other.store, other.index, other.url = made.store, made.index, made.url
    from nec_ray.archive.layout import install_codec

    install_codec(made.store, other.codec)
    made.index.commit(made.index.version(), pack(other, ["foreign"]))
    archive = open_archive(made.url)
    with pytest.raises(MixedCodecs, match="pick one"):
        archive.pull()
    assert archive.pull(f"codec_id = '{other.codec.id}'").tile_ids == ["foreign"]


@pytest.mark.parametrize("ending", ["npz", "zarr", "parquet"])
def test_exports_hold_what_was_pulled(made: Made, tmp_path: Path, ending: str) -> None:
    pull = open_archive(made.url).pull()
    path = tmp_path / f"out.{ending}"
    write_pull(pull, path)
    if ending == "npz":
        with np.load(path) as found:
            ids, embeddings = found["tile_id"].tolist(), found["embeddings"]
    elif ending == "zarr":
        group = zarr.open_group(str(path), mode="r")
        raw = np.asarray(group["tile_id_utf8"])
        ids = [bytes(row).rstrip(b"\0").decode() for row in raw]
        embeddings = np.asarray(group["embeddings"])
    else:
        rows = duckdb.execute("SELECT tile_id, embedding FROM read_parquet(?) ORDER BY tile_id", [str(path)]).fetchall()
        ids, embeddings = [row[0] for row in rows], np.array([row[1] for row in rows])
    assert ids == pull.tile_ids
    assert np.array_equal(embeddings, pull.embeddings)
    with pytest.raises(InputError, match="endings"):
        write_pull(pull, tmp_path / "out.csv")

"""SQL and pull on a small real archive: exact symbols, typed refusals, nothing but reading."""

from pathlib import Path

import duckdb
import numpy as np
import pyarrow as pa
import pytest
import zarr

from nec_ray import load_codec, open_archive
from nec_ray.archive.layout import install_codec
from nec_ray.archive.pack import write_pack
from nec_ray.archive.pull_files import write_pull
from nec_ray.archive.verify import verify
from nec_ray.codec import truncate_codec
from nec_ray.errors import (
    BadQuery,
    CorruptIndex,
    CorruptPack,
    CorruptPayload,
    InputError,
    MixedCodecs,
    NotFound,
)
from nec_ray.models import torch_dataset
from tests.archive.make import TOKENS, Made, damage, empty_archive, filled_archive, index_rows, pack
from tests.codec.make import SCALES, laplacian_symbols


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


def test_sql_ranks_by_similarity_without_decoding(tmp_path: Path) -> None:
    """The nearest tiles by the `pooled` column are the nearest by the pooled vectors of what was encoded."""
    made = empty_archive(tmp_path)
    rows = pack(made, [f"t{i:02}" for i in range(30)])
    vectors = made.codec.pool(np.stack([made.symbols[tile_id] for tile_id in rows["tile_id"].to_pylist()]))
    at = rows.schema.get_field_index("pooled")
    field = rows.schema.field(at)
    made.index.append(made.index.version(), rows.set_column(at, field, pa.array(vectors.tolist(), field.type)))
    found = open_archive(made.url).sql(
        """
        WITH query AS (SELECT pooled FROM embeddings WHERE tile_id = 't07')
        SELECT tile_id FROM embeddings, query
        ORDER BY list_distance(embeddings.pooled::FLOAT[], query.pooled::FLOAT[]), tile_id LIMIT 6
        """
    )
    distance = np.linalg.norm(vectors.astype(float) - vectors[7], axis=1)
    expected = [f"t{i:02}" for i in np.lexsort((np.arange(30), distance))[:6]]
    assert [tile_id for (tile_id,) in found.fetchall()] == expected
    assert expected[0] == "t07"


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
    made.index.append(made.index.version(), pack(made, ["later"]))
    assert len(pinned.rows(["tile_id"])) == 40
    assert len(open_archive(made.url).rows(["tile_id"])) == 41
    assert len(open_archive(made.url, version=1).rows(["tile_id"])) == 40
    committed = made.index.history()[1].time
    assert open_archive(made.url, version=str(committed)).version == 1
    with pytest.raises(NotFound, match="no version 99; the newest is 2"):
        open_archive(made.url, version=99)
    with pytest.raises(NotFound, match="younger"):
        open_archive(made.url, version="2001-01-01T00:00:00+00:00")
    with pytest.raises(InputError, match="a number or a time"):
        open_archive(made.url, version="yesterday")


def test_a_damaged_payload_is_reported_by_tile(tmp_path: Path) -> None:
    made = filled_archive(tmp_path)
    damage(made, "t007")
    with pytest.raises(CorruptPayload, match="tile t007: layer 1"):
        open_archive(made.url).pull()
    with pytest.raises(CorruptPayload, match="layer 1"):
        open_archive(made.url).sql("SELECT nec_decode(payload) FROM embeddings WHERE tile_id = 't007'").fetchall()
    assert len(open_archive(made.url).pull("tile_id <> 't007'")) == 37


def test_a_missing_pack_is_reported(tmp_path: Path) -> None:
    made = filled_archive(tmp_path)
    [name] = made.store.names("packs")
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
    [name] = made.store.names("packs")
    position = rows.schema.get_field_index("payload")
    field = rows.schema.field(position)
    evil = pa.array([{**payload, "pack": payload["pack"] or name}], field.type)
    made.index.append(made.index.version(), rows.set_column(position, field, evil))
    with pytest.raises(CorruptIndex):
        open_archive(made.url).pull()


def test_embeddings_of_two_encoders_are_not_mixed(tmp_path: Path) -> None:
    made = filled_archive(tmp_path)
    other = empty_archive(tmp_path / "other", seed=1)
    other.store, other.index, other.url = made.store, made.index, made.url
    install_codec(made.store, other.codec)
    made.index.append(made.index.version(), pack(other, ["foreign"]))
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


def with_truncated(folder: Path) -> Made:
    """An archive of tiles of a codec of two layers, s000 to s019 cut down to the codec of its first layer."""
    made = filled_archive(folder)
    truncate_codec(made.codec, 1, folder / "cut")
    cut = load_codec(folder / "cut")
    install_codec(made.store, cut)
    ids = [f"s{i:03}" for i in range(20)]
    symbols = laplacian_symbols(np.random.default_rng(9), SCALES, 20, TOKENS)
    whole = made.codec.compress(symbols)
    lengths = made.codec.layer_lengths(whole)[:, :1].tolist()
    payloads = [payload[:length] for payload, [length] in zip(whole, lengths, strict=True)]
    made.index.append(made.index.version(), write_pack(made.store, cut.id, index_rows(ids, cut.id), payloads, lengths))
    made.symbols.update(zip(ids, symbols[:, :, :8], strict=True))
    return made


def test_tiles_of_a_codec_and_of_its_first_layer_are_pulled_together_when_asked_for_that(tmp_path: Path) -> None:
    made = with_truncated(tmp_path)
    archive = open_archive(made.url)
    pull = archive.pull(layers=1)
    assert pull.tile_ids == sorted(made.symbols)
    for tile_id, symbols in zip(pull.tile_ids, pull.symbols, strict=True):
        assert np.array_equal(symbols, made.symbols[tile_id][:, :8])
    with pytest.raises(MixedCodecs, match=r"1 to 2 layers; ask for layers=1, .* or pick one"):
        archive.pull()
    with pytest.raises(InputError, match="of some tiles has 1 layers, not 2"):
        archive.pull(layers=2)
    assert archive.pull("tile_id LIKE 't%'").embeddings.shape[2] == 24
    assert not verify(archive).faults
    assert len(torch_dataset(archive, layers=1)) == 58
    with pytest.raises(MixedCodecs, match="ask for layers=1"):
        torch_dataset(archive)
    assert {tuple(x.shape) for _, x in torch_dataset(archive, "tile_id LIKE 's%'", batch_size=7)} == {(16, 8)}

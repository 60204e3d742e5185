"""Archives of a codec of two grid scales: pulled, queried and written to files, against what was encoded."""

from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import zarr
from safetensors.numpy import load_file

from nec_ray.archive import open_archive
from nec_ray.archive.exports import export
from nec_ray.archive.index import Index
from nec_ray.archive.layout import ArchiveInfo, create_archive, install_codec
from nec_ray.archive.pack import write_pack
from nec_ray.archive.pull import Pull
from nec_ray.archive.pull_files import write_pull
from nec_ray.cli import app
from nec_ray.codec import load_codec, truncate_codec
from nec_ray.errors import CorruptPayload, InputError
from nec_ray.storage import Store
from tests.archive.make import MadeOfScales, damage, index_rows, scaled_archive


@pytest.fixture
def made(tmp_path: Path) -> MadeOfScales:
    return scaled_archive(tmp_path)


def expected(made: MadeOfScales, pull: Pull, scale: int) -> np.ndarray[tuple[int, ...], np.dtype[np.int32]]:
    return np.stack([made.symbols[tile_id][scale] for tile_id in pull.tile_ids])


def test_a_pull_has_an_array_a_scale_coarse_first(made: MadeOfScales) -> None:
    pull = open_archive(made.url).pull("tile_id < 't05'")
    median = load_file(Path(made.store.url) / "codecs" / made.codec.id / "tables.safetensors")["median"]
    assert isinstance(pull.symbols, tuple)
    assert isinstance(pull.embeddings, tuple)
    assert (pull.grid, pull.grids) == ((4, 4), ((2, 2), (4, 4)))
    for scale, medians in enumerate((median[:14], median[14:])):
        symbols = expected(made, pull, scale)
        assert np.array_equal(pull.symbols[scale], symbols)
        assert pull.embeddings[scale].dtype == np.float32
        np.testing.assert_array_equal(pull.embeddings[scale], (symbols + medians).astype(np.float32))
    assert len(pull) == 5


@pytest.mark.parametrize(("layers", "channels"), [(1, 8), (2, 14)])
def test_the_first_layers_are_the_coarse_scale_and_cost_its_bytes(
    made: MadeOfScales, layers: int, channels: int
) -> None:
    archive = open_archive(made.url)
    pull, whole = archive.pull(layers=layers), archive.pull()
    assert np.array_equal(pull.symbols, expected(made, pull, 0)[:, :, :channels])
    assert np.array_equal(pull.embeddings, whole.embeddings[0][:, :, :channels])
    assert (pull.grid, pull.grids) == ((2, 2), ((2, 2),))
    coarse = [made.codec.layer_lengths(made.codec.compress(_of(made, i)))[0, :layers].sum() for i in whole.tile_ids]
    assert pull.n_bytes.tolist() == coarse


def _of(made: MadeOfScales, tile_id: str) -> tuple[np.ndarray[tuple[int, ...], np.dtype[np.int32]], ...]:
    return tuple(part[None] for part in made.symbols[tile_id])


def test_sql_decodes_the_tokens_of_one_scale_after_the_other(made: MadeOfScales) -> None:
    archive = open_archive(made.url)
    rows = archive.sql("SELECT tile_id, nec_decode(payload), nec_pool(payload) FROM embeddings WHERE tile_id > 't08'")
    pull = archive.pull("tile_id > 't08'")
    for tile_id, tokens, pooled in rows.fetchall():
        i = pull.tile_ids.index(tile_id)
        assert tokens == [token for part in pull.embeddings for token in part[i].tolist()]
        assert [len(token) for token in tokens] == [14] * 4 + [10] * 16
        assert pooled == made.codec.pool(_of(made, tile_id))[0].tolist()


def test_damage_is_found_in_any_scale(made: MadeOfScales) -> None:
    damage(made, "t03")
    with pytest.raises(CorruptPayload, match="tile t03"):
        open_archive(made.url).pull()


def test_files_hold_an_array_a_scale(made: MadeOfScales, tmp_path: Path) -> None:
    pull = open_archive(made.url).pull()
    for ending in (".npz", ".zarr", ".parquet"):
        write_pull(pull, tmp_path / f"pull{ending}")
    archive, group = np.load(tmp_path / "pull.npz"), zarr.open_group(tmp_path / "pull.zarr", mode="r")
    table = pq.read_table(tmp_path / "pull.parquet")
    assert archive["grids"].tolist() == group.attrs["grids"] == [[2, 2], [4, 4]]
    assert table.schema.metadata[b"grids"] == b"2,2;4,4"
    assert "embeddings" not in archive
    for number, part in enumerate(pull.embeddings, 1):
        assert np.array_equal(archive[f"embeddings_{number}"], part)
        assert np.array_equal(np.asarray(group[f"embeddings_{number}"]), part)
        assert np.array_equal(np.array(table[f"embedding_{number}"].to_pylist(), np.float32), part)


def test_the_command_tells_each_scale(made: MadeOfScales, tmp_path: Path) -> None:
    from typer.testing import CliRunner

    result = CliRunner().invoke(app, ["pull", made.url, "--out", str(tmp_path / "pull.npz"), "--json"])
    assert '"tokens": [4, 16], "channels": [14, 10]' in result.output


def test_an_archive_cut_to_its_coarse_scale_is_exported(made: MadeOfScales, tmp_path: Path) -> None:
    truncate_codec(made.codec, 2, tmp_path / "cut")
    cut, store = load_codec(tmp_path / "cut"), Store(tmp_path / "short")
    create_archive(store, ArchiveInfo(licence="CC0", attribution="nobody"))
    install_codec(store, cut)
    index, ids = Index(store), sorted(made.symbols)
    index.create()
    payloads = cut.compress(np.stack([made.symbols[tile_id][0] for tile_id in ids]))
    lengths = cut.layer_lengths(payloads).tolist()
    index.append(index.version(), write_pack(store, cut.id, index_rows(ids, cut.id), list(payloads), lengths))
    facts = export(open_archive(store.url), tmp_path / "out", format="zarr")
    assert (facts["tokens"], facts["channels"]) == (4, 14)
    group = zarr.open_group(tmp_path / "out", mode="r")
    assert group.attrs["grid"] == [2, 2]
    pull = open_archive(made.url).pull(layers=2)
    place = {tile_id: i for i, tile_id in enumerate(np.asarray(group["tile_id"]).tolist())}
    found = np.asarray(group["embeddings"])[[place[tile_id] for tile_id in pull.tile_ids]]
    assert np.array_equal(found, pull.embeddings)


@pytest.mark.parametrize("layers", [None, 1])
def test_exports_of_one_grid_refuse_them_by_name(made: MadeOfScales, tmp_path: Path, layers: int | None) -> None:
    with pytest.raises(InputError, match=r"layers of the token grids 2 x 2.*exports hold one grid"):
        export(open_archive(made.url), tmp_path / "out", format="zarr", layers=layers)
    assert not (tmp_path / "out").exists()

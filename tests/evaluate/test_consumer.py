"""Heads on a real archive and a real codec, and on the latents that the archive's symbols were rounded from."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pytest
import torch
from torch import nn

from nec_ray.archive import open_archive
from nec_ray.codec import Codec, InputSpec, LayerSpec, Lineage, load_codec, write_codec
from nec_ray.contracts import arrow_schema
from nec_ray.errors import InputError
from nec_ray.evaluate import compare_with_uncompressed, decoder_layer_of, predict, train_head_on_archive
from nec_ray.models.dataset import torch_dataset
from nec_ray.models.embed import Embedder
from nec_ray.models.mae import FirstDecoderLayer, MaeConfig, MaeEncoder
from nec_ray.tiles import Catalog, build_catalog, builtin_labels, builtin_scene, read_tiles
from tests.archive.make import empty_archive, filled_archive
from tests.codec.make import SCALES, laplacian_symbols, laplacian_tables
from tests.evaluate.sources import MemorySource


def test_head_and_prediction_on_a_real_archive(tmp_path: Path) -> None:
    made = filled_archive(tmp_path, tiles=40)
    archive = open_archive(made.url)
    metrics = train_head_on_archive(archive, None, tmp_path / "head", epochs=2, where="tile_id < 't030'")
    assert metrics["classes"] == ["forest", "water"]
    assert metrics["tiles"] == 30
    pull = archive.pull("tile_id < 't030'")
    assert metrics["bytes_per_tile"] == pytest.approx(pull.n_bytes.mean())
    assert metrics["encoder_id"] == made.codec.encoder_id
    table = predict(archive, tmp_path / "head", None, tmp_path / "said.parquet")
    assert table["tile_id"].to_pylist() == [f"t{i:03}" for i in range(38)]  # the last two are not valid
    layered = train_head_on_archive(archive, None, tmp_path / "coarse", epochs=1, layers=1)
    assert layered["bytes_per_tile"] < metrics["bytes_per_tile"]


def test_a_real_data_set(tmp_path: Path) -> None:
    archive = open_archive(filled_archive(tmp_path, tiles=20).url)
    got = {name: x.numpy() for name, x in torch_dataset(archive, batch_size=7)}
    pull = archive.pull()
    assert list(got) == pull.tile_ids
    for name, expected in zip(pull.tile_ids, pull.embeddings, strict=True):
        assert (got[name] == expected).all()


def test_an_archive_without_tiles_is_refused(tmp_path: Path) -> None:
    archive = open_archive(filled_archive(tmp_path / "a", tiles=40).url)
    train_head_on_archive(archive, None, tmp_path / "head", epochs=1)
    empty = open_archive(empty_archive(tmp_path / "b", seed=1).url)
    with pytest.raises(InputError, match="no valid tile fits"):
        predict(empty, tmp_path / "head", None, tmp_path / "said.parquet")


def arrays(module: nn.Module) -> dict[str, npt.NDArray[np.float32]]:
    return {name: tensor.numpy() for name, tensor in module.state_dict().items()}


def random_mae_codec(folder: Path) -> Codec:
    """A codec whose encoder has random weights: its embeddings are of little use, but of the right kind."""
    torch.manual_seed(0)
    config = MaeConfig(
        size=32, patch=8, bands=3, dim=24, depth=1, heads=2, decoder_dim=16, decoder_depth=1, decoder_heads=2
    )
    write_codec(
        folder,
        family="mae_vit",
        architecture=config.to_architecture(),
        input=InputSpec(bands=["red", "green", "blue"], mean=[8000.0] * 3, std=[1500.0] * 3, size=32),
        grid=(4, 4),
        layers=[LayerSpec(channels=24, tokens=16)],
        lineage=Lineage(data="none", licence="none", beta=0.0, bits_per_symbol=0.0),
        tables=laplacian_tables(SCALES),
        encoder=arrays(MaeEncoder(config)),
        decoder=arrays(FirstDecoderLayer(config)),
        calibration=laplacian_symbols(np.random.default_rng(0), SCALES, 40, 16),
    )
    return load_codec(folder)


@pytest.fixture(scope="module")
def scene(tmp_path_factory: pytest.TempPathFactory) -> tuple[MemorySource, Catalog, Codec]:
    """The built-in scene embedded by a random encoder, not rounded."""
    codec = random_mae_codec(tmp_path_factory.mktemp("codec") / "codec")
    catalog = build_catalog(str(builtin_scene()), tile_size=32)
    batch = read_tiles(catalog.table, bands=["red", "green", "blue"], size=32, fill=[8000.0] * 3)
    rows = catalog.table.take(pa.array(batch.valid))
    constant = {
        "codec_id": codec.id,
        "n_bytes": 100,
        "status": "valid",
        "encoded_from": "pixels",
        "encoded_at": 0,
    }
    columns = [
        rows[f.name].cast(f.type)
        if f.name in rows.column_names and f.name != "transform"
        else pa.array([constant.get(f.name)] * rows.num_rows, f.type)
        for f in arrow_schema("index.json")
    ]
    table = pa.table(columns, schema=arrow_schema("index.json"))
    latents = Embedder(codec).latents(batch.pixels)
    return MemorySource(table, latents, codec.encoder_id, made_by=[codec]), catalog, codec


def test_uncompressed_latents_are_scored_like_an_archives(
    tmp_path: Path, scene: tuple[MemorySource, Catalog, Codec]
) -> None:
    source, catalog, codec = scene
    raw = compare_with_uncompressed(source, builtin_labels(), catalog, codec, epochs=10)
    same = train_head_on_archive(source, builtin_labels(), tmp_path / "a", epochs=10)
    assert {k: same[k] for k in ("accuracy", "balanced_accuracy", "majority", "tiles")} == {
        k: raw[k] for k in ("accuracy", "balanced_accuracy", "majority", "tiles")
    }
    assert raw["bytes_per_tile"] == 16 * 24 * 4
    assert same["classes"] == ["built-up", "cropland", "forest", "water"]
    coarse = replace(source, embeddings=np.zeros_like(source.embeddings))
    worse = train_head_on_archive(coarse, builtin_labels(), tmp_path / "b", epochs=2)
    assert worse["accuracy"] <= worse["majority"] < raw["accuracy"]


def test_labelled_tiles_must_be_in_the_catalog_and_readable(
    scene: tuple[MemorySource, Catalog, Codec],
) -> None:
    source, catalog, codec = scene
    with pytest.raises(InputError, match=r"labelled tile .* is not in it"):
        compare_with_uncompressed(source, builtin_labels(), replace(catalog, table=catalog.table[:20]), codec)
    at = catalog.table.schema.get_field_index("source")
    gone = catalog.table.set_column(at, "source", pa.array(["/nowhere/scene.tif"] * len(catalog)))
    with pytest.raises(InputError, match=r"labelled tile .* cannot be read"):
        compare_with_uncompressed(source, builtin_labels(), replace(catalog, table=gone), codec)


def test_a_head_takes_its_decoder_layer_from_the_codec(
    tmp_path: Path, scene: tuple[MemorySource, Catalog, Codec]
) -> None:
    source, _, codec = scene
    layer = decoder_layer_of(source)
    expected = codec.tensors("decoder")
    for name, tensor in layer.state_dict().items():
        np.testing.assert_array_equal(tensor.numpy(), expected[name])
    metrics = train_head_on_archive(source, builtin_labels(), tmp_path / "head", decoder_layer="trained", epochs=3)
    assert metrics["decoder_layer"] == "trained"
    table = predict(source, tmp_path / "head", None, tmp_path / "said.parquet")
    assert table.num_rows == source.table.num_rows

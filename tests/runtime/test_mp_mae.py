"""MMEarth's weights to an archive: a recipe's model, its codec, tiles encoded and pulled; without Ray."""

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from nec_ray import open_archive
from nec_ray.codec import InputSpec, Lineage, load_codec
from nec_ray.errors import BadCheckpoint, InputError
from nec_ray.evaluate.consumer import train_head_on_archive
from nec_ray.models.embed import Embedder, first_decoder_layer
from nec_ray.models.export import export_codec
from nec_ray.models.head_files import load_head
from nec_ray.models.mmearth_weights import mmearth_tensors, parse_folder
from nec_ray.models.mp_mae import MpMae
from nec_ray.runtime.encode import encode
from nec_ray.runtime.recipe import Recipe
from nec_ray.runtime.train_loop import _export, _Worker, initial_model
from nec_ray.tiles import build_catalog, builtin_scene, read_tiles, write_catalog

BANDS = ["blue", "green", "red"]


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of a whole random atto on three bands, in the published layout."""
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("weights") / "weights.safetensors"
    save_file(mmearth_tensors(MpMae(parse_folder("pt-rgb_atto_1M_64_uncertainty_56-8").config())), path)
    return path


def recipe(weights: Path, **model: object) -> Recipe:
    return Recipe.model_validate(
        {
            "data": {"catalog": "c.parquet", "size": 32},
            "model": {"family": "mp_mae", "size": "atto", "patch": 8, "init": str(weights), **model},
            "train": {"pretrain_epochs": 0, "mask_ratio": 0.6},
        }
    )


@pytest.mark.parametrize(
    ("stages", "says"), [(None, "encoder and optical decoder"), ([3], "encoder, with a new decoder")]
)
def test_a_recipes_model_begins_with_the_checkpoint(weights: Path, stages: list[int] | None, says: str) -> None:
    model, decoder_is_new, line = initial_model(recipe(weights, stages=stages), len(BANDS))
    assert (model.encoder.tokens, model.encoder.channels) == ((64, 160) if stages else (16, 320))
    assert (decoder_is_new, line) == (stages is not None, f"weights of {weights}: {says}")


def test_tiles_are_encoded_with_a_stage_of_mmearths_encoder_and_pulled(weights: Path, tmp_path: Path) -> None:
    model, _, _ = initial_model(recipe(weights, stages=[3], layers=[40, 120]), len(BANDS))
    rows = build_catalog(builtin_scene(), tile_size=64, licence="public domain")
    write_catalog(rows, tmp_path / "catalog.parquet")
    pixels = read_tiles(rows.table.slice(100, 32), bands=BANDS, size=32, fill=[0.0] * 3).pixels
    spec = InputSpec(bands=BANDS, mean=pixels.mean((0, 2, 3)).tolist(), std=pixels.std((0, 2, 3)).tolist(), size=32)
    lineage = Lineage(data="built-in scene", licence="public domain", beta=0.1, bits_per_symbol=0)
    export_codec(model, tmp_path / "codec", input_spec=spec, lineage=lineage, calibration=pixels, half=True)
    names = rows.table["tile_id"].to_pylist()[100:104]
    encode(
        tmp_path / "catalog.parquet",
        tmp_path / "archive",
        codec_url=str(tmp_path / "codec"),
        where=f"tile_id IN ({', '.join(map(repr, names))})",
        local=True,
    )
    archive = open_archive(tmp_path / "archive")
    pull = archive.pull()
    assert (len(pull), pull.grid, pull.embeddings.shape[1:]) == (4, (8, 8), (64, 160))
    assert archive.pull(layers=1).embeddings.shape[2] == 40
    scaled = (pixels[:4] - np.array(spec.mean)[:, None, None]) / np.array(spec.std)[:, None, None]
    with torch.no_grad():
        latent = model.encoder(torch.from_numpy(scaled.astype(np.float32))).numpy()
    assert np.abs(pull.embeddings - latent[[names.index(name) for name in pull.tile_ids]]).max() < 0.5 + 0.01


def test_several_stages_go_from_training_to_an_archive_and_a_head(weights: Path, tmp_path: Path) -> None:
    """Ordered and adapted as a worker does, exported, encoded, pulled; against feature maps rounded by hand."""
    rows = build_catalog(builtin_scene(), tile_size=64, licence="public domain")
    write_catalog(rows, tmp_path / "catalog.parquet")
    chosen = rows.table.slice(100, 16)
    pixels = read_tiles(chosen, bands=BANDS, size=32, fill=[0.0] * 3).pixels
    spec = InputSpec(bands=BANDS, mean=pixels.mean((0, 2, 3)).tolist(), std=pixels.std((0, 2, 3)).tolist(), size=32)
    scaled = ((pixels - np.array(spec.mean)[:, None, None]) / np.array(spec.std)[:, None, None]).astype(np.float32)
    given = recipe(weights, stages=[4, 3], layers=[120, 200, 160])
    how = given.train.model_copy(update={"adapt_epochs": 2, "batch_size": 8})
    given = given.model_copy(update={"train": how})
    model, decoder_is_new, line = initial_model(given, len(BANDS))
    assert line.endswith("encoder, with a new decoder")
    worker = _Worker(model, given, scaled, torch.device("cpu"), 0, 1)
    worker.begin_adaptation()
    with torch.no_grad():
        for latent in model.encoder(torch.from_numpy(scaled)):
            variance = latent.var((0, 1))
            assert (variance[1:] <= variance[:-1] + 1e-6).all()
    worker.begin_phase(adapting=True, decoder_is_new=decoder_is_new)
    history = [worker.epoch(epoch) for epoch in range(2)]
    assert history[1]["mse"] < history[0]["mse"]
    _export(model, scaled, spec, given, {"out": str(tmp_path), "data": "built-in scene", "licence": "public domain"})
    names = chosen["tile_id"].to_pylist()
    where = f"tile_id IN ({', '.join(map(repr, names))})"
    encode(
        tmp_path / "catalog.parquet", tmp_path / "archive", codec_url=str(tmp_path / "codec"), where=where, local=True
    )
    archive, codec = open_archive(tmp_path / "archive"), load_codec(tmp_path / "codec")
    pull, order = archive.pull(), [names.index(name) for name in archive.pull().tile_ids]
    assert pull.grids == ((4, 4), (8, 8))
    with torch.no_grad():
        maps = model.eval().encoder.encoder(torch.from_numpy(scaled))
    for stage, embeddings, median in zip((4, 3), pull.embeddings, np.split(codec.tables.median, [320]), strict=True):
        latent = maps[stage - 1].flatten(2).transpose(1, 2).numpy()[order]
        exact = np.rint(latent - median) + median
        assert np.abs(embeddings - latent).max() < 0.5 + 0.01
        assert np.mean(np.abs(embeddings - exact) > 1e-3) < 1e-3  # a latent just between two integers may go either way
    coarse = archive.pull(layers=2)
    assert np.array_equal(coarse.embeddings, pull.embeddings[0])
    assert (coarse.n_bytes < pull.n_bytes).all()
    labels = tmp_path / "labels.csv"
    labels.write_text("tile_id,label\n" + "".join(f"{name},{'ab'[i % 2]}\n" for i, name in enumerate(names)))
    train_head_on_archive(archive, labels, tmp_path / "head", decoder_layer="frozen", epochs=1)
    assert load_head(tmp_path / "head", lambda: first_decoder_layer(codec)).spec.tokens == 64
    with pytest.raises(InputError, match="the decoder layer reads 64 tokens of 480 channels, not 16 of 480"):
        train_head_on_archive(archive, labels, tmp_path / "coarse", decoder_layer="frozen", layers=2, epochs=1)


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_the_worker_of_a_recipe_adapts_and_exports(weights: Path, tmp_path: Path, precision: str) -> None:
    """What a Ray Train worker does, without Ray: channels ordered by variance, two epochs, the codec."""
    rows = build_catalog(builtin_scene(), tile_size=64, licence="public domain").table.slice(200, 12)
    pixels = read_tiles(rows, bands=BANDS, size=32, fill=[0.0] * 3).pixels
    spec = InputSpec(bands=BANDS, mean=pixels.mean((0, 2, 3)).tolist(), std=pixels.std((0, 2, 3)).tolist(), size=32)
    scaled = ((pixels - np.array(spec.mean)[:, None, None]) / np.array(spec.std)[:, None, None]).astype(np.float16)
    given = recipe(weights, stages=[3], layers=[40, 120])
    how = given.train.model_copy(update={"adapt_epochs": 2, "batch_size": 6, "accumulate": 2, "precision": precision})
    given = given.model_copy(update={"train": how})
    model, decoder_is_new, _ = initial_model(given, len(BANDS))
    frozen = model.encoder.encoder.stages[0][0].dwconv.weight.detach().clone()
    worker = _Worker(model, given, scaled, torch.device("cpu"), 0, 1)
    worker.begin_adaptation()
    with torch.no_grad():
        variance = model.encoder(torch.from_numpy(scaled.astype(np.float32))).var((0, 1))
    assert (variance[1:] <= variance[:-1] + 1e-6).all()
    worker.begin_phase(adapting=True, decoder_is_new=decoder_is_new)
    history = [worker.epoch(epoch) for epoch in range(2)]
    assert history[1]["mse"] < history[0]["mse"]
    assert torch.equal(model.encoder.encoder.stages[0][0].dwconv.weight, frozen)
    _export(model, scaled, spec, given, {"out": str(tmp_path), "data": "built-in scene", "licence": "public domain"})
    codec = load_codec(tmp_path / "codec")
    assert (codec.spec.family, codec.spec.lineage.parent) == ("mp_mae", "weights.safetensors")
    with torch.no_grad():
        latent = model.eval().encoder(torch.from_numpy(scaled.astype(np.float32)))
    # The worker's pixels are float16, the embedder's are not.
    np.testing.assert_allclose(Embedder(codec).latents(pixels), latent.numpy(), atol=0.05)


def test_weights_of_other_bands_or_another_size_are_refused(weights: Path) -> None:
    with pytest.raises(BadCheckpoint, match=r"on 3 bands in patches of 8.*the model has 40 on 12 in patches of 8"):
        initial_model(recipe(weights), 12)
    with pytest.raises(BadCheckpoint, match="the checkpoint has 40 channels first"):
        initial_model(recipe(weights, size="femto"), 3)

"""A foundation model is one file: that of a family which nothing of nec_ray names goes the whole road."""

from pathlib import Path

import numpy as np
import pytest
import torch

from nec_ray import open_archive
from nec_ray.codec import InputSpec, load_codec
from nec_ray.errors import UnsupportedFormat
from nec_ray.evaluate.consumer import train_head_on_archive
from nec_ray.models import families
from nec_ray.models.embed import Embedder, first_decoder_layer
from nec_ray.models.head_files import load_head
from nec_ray.runtime.encode import encode
from nec_ray.runtime.recipe import Recipe
from nec_ray.runtime.train_loop import _export, _Worker, initial_model
from nec_ray.tiles import build_catalog, builtin_scene, read_tiles, write_catalog

BANDS = ["blue", "green", "red"]
TOY = Path(__file__).with_name("toy_family.py")


def test_the_families_are_the_files() -> None:
    assert families.names() == ["mae_vit", "mp_mae"]
    for name in families.names():
        assert families.family(name).encoder.family == name  # type: ignore[attr-defined]


def recipe(**model: object) -> Recipe:
    return Recipe.model_validate(
        {
            "data": {"catalog": "c.parquet", "size": 32},
            "model": {"family": "toy_family", "size": "little", "patch": 8, **model},
            "train": {"pretrain_epochs": 1, "adapt_epochs": 2, "batch_size": 8, "lr": 0.02, "adapt_lr": 0.02},
        }
    )


def test_a_family_in_one_file_goes_from_training_to_a_head(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match=r"model\.family toy_family is none of mae_vit, mp_mae"):
        recipe()
    (tmp_path / "families").mkdir()
    (tmp_path / "families" / TOY.name).write_text(TOY.read_text())
    monkeypatch.setattr(families, "__path__", [*families.__path__, str(tmp_path / "families")])
    with pytest.raises(ValueError, match=r"model\.size tiny is none of toy_family: little, less"):
        recipe(size="tiny")

    rows = build_catalog(builtin_scene(), tile_size=64, licence="public domain")
    write_catalog(rows, tmp_path / "catalog.parquet")
    chosen = rows.table.slice(100, 32)
    pixels = read_tiles(chosen, bands=BANDS, size=32, fill=[0.0] * 3).pixels
    spec = InputSpec(bands=BANDS, mean=pixels.mean((0, 2, 3)).tolist(), std=pixels.std((0, 2, 3)).tolist(), size=32)
    scaled = ((pixels - np.array(spec.mean)[:, None, None]) / np.array(spec.std)[:, None, None]).astype(np.float32)
    given = recipe(layers=[2, 6])
    model, decoder_is_new, line = initial_model(given, len(BANDS))
    assert line == "random weights"
    worker = _Worker(model, given, scaled, torch.device("cpu"), 0, 1)
    worker.begin_phase(adapting=False, decoder_is_new=decoder_is_new)
    first = worker.epoch(0)
    with torch.no_grad():
        before = model.decoder.first(model.encoder(torch.from_numpy(scaled)))
    worker.begin_adaptation()
    with torch.no_grad():
        latent = model.encoder(torch.from_numpy(scaled))
        torch.testing.assert_close(model.decoder.first(latent), before)
    variance = latent.var((0, 1))
    assert (variance[1:] <= variance[:-1] + 1e-6).all()
    worker.begin_phase(adapting=True, decoder_is_new=decoder_is_new)
    assert [worker.epoch(epoch) for epoch in (1, 2)][-1]["mse"] < first["mse"]
    _export(model, scaled, spec, given, {"out": str(tmp_path), "data": "built-in scene", "licence": "public domain"})

    names = chosen["tile_id"].to_pylist()
    where = f"tile_id IN ({', '.join(map(repr, names))})"
    encode(
        tmp_path / "catalog.parquet", tmp_path / "archive", codec_url=str(tmp_path / "codec"), where=where, local=True
    )
    archive, codec = open_archive(tmp_path / "archive"), load_codec(tmp_path / "codec")
    pull = archive.pull()
    with torch.no_grad():
        latent = model.eval().encoder(torch.from_numpy(scaled)).numpy()[[names.index(name) for name in pull.tile_ids]]
    assert np.abs(pull.embeddings - latent).max() < 0.5 + 0.01
    assert archive.pull(layers=1).embeddings.shape[2] == 2
    labels = tmp_path / "labels.csv"
    labels.write_text("tile_id,label\n" + "".join(f"{name},{'ab'[i % 2]}\n" for i, name in enumerate(names)))
    train_head_on_archive(archive, labels, tmp_path / "head", decoder_layer="frozen", epochs=1)
    assert load_head(tmp_path / "head", lambda: first_decoder_layer(codec)).spec.tokens == 16

    monkeypatch.undo()  # who lacks the file reads the archive all the same, and cannot encode
    assert np.array_equal(open_archive(tmp_path / "archive").pull().embeddings, pull.embeddings)
    with pytest.raises(UnsupportedFormat, match="its model is of the family toy_family, of a later release"):
        Embedder(load_codec(tmp_path / "codec"))

"""A foundation model is one file: that of a family which nothing of nec_ray names goes the whole road."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import nec_ray
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

ROOT = Path(__file__).parents[2]
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


@pytest.mark.slow
def test_it_is_pretrained_and_adapted_on_ray(tmp_path: Path) -> None:
    """In a copy of the package with the file in its folder, as workers on other machines would have it."""
    package = tmp_path / "code" / "nec_ray"
    shutil.copytree(ROOT / "schemas", tmp_path / "code" / "schemas")
    shutil.copytree(Path(nec_ray.__file__).parent, package, ignore=shutil.ignore_patterns("__pycache__", "docs"))
    shutil.copy(TOY, package / "models" / "families")
    write_catalog(build_catalog(builtin_scene(), tile_size=64), tmp_path / "catalog.parquet")
    (tmp_path / "recipe.toml").write_text(
        'data = {catalog = "catalog.parquet", size = 32, max_tiles = 32}\n'
        'model = {family = "toy_family", size = "little", patch = 8}\n'
        "train = {pretrain_epochs = 1, adapt_epochs = 1, batch_size = 8}\n"
    )

    run = subprocess.run(
        [sys.executable, "-m", "nec_ray", "train", "recipe.toml", "--out", "run"],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(tmp_path / "code")},
        capture_output=True,
        text=True,
        check=False,
        timeout=600,
    )
    assert run.returncode == 0, run.stderr
    assert load_codec(tmp_path / "run" / "codec").spec.family == "toy_family"
    kept = load_file(tmp_path / "run" / "weights.safetensors")
    assert kept["encoder.project.weight"].shape == (8, 3, 8, 8)


def test_a_family_in_one_file_goes_from_training_to_a_head(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match=r"model\.family toy_family is none of mae_vit, mp_mae"):
        recipe()
    (tmp_path / "families").mkdir()
    (tmp_path / "families" / TOY.name).write_text(TOY.read_text())
    monkeypatch.setattr(families, "__path__", [*families.__path__, str(tmp_path / "families")])
    with pytest.raises(ValueError, match=r"model\.size tiny is none of toy_family: little, less"):
        recipe(size="tiny")
    with pytest.raises(ValueError, match=r"model\.layers \[2, 5\] are 7 channels, the model has 8"):
        recipe(layers=[2, 5])

    rows = build_catalog(builtin_scene(), tile_size=64, licence="public domain")
    write_catalog(rows, tmp_path / "catalog.parquet")
    chosen = rows.table.slice(100, 32)
    pixels = read_tiles(chosen, bands=BANDS, size=32, fill=[0.0] * 3).pixels
    spec = InputSpec(bands=BANDS, mean=pixels.mean((0, 2, 3)).tolist(), std=pixels.std((0, 2, 3)).tolist(), size=32)
    scaled = ((pixels - np.array(spec.mean)[:, None, None]) / np.array(spec.std)[:, None, None]).astype(np.float32)
    given = recipe(layers=[2, 6])
    model, decoder_is_new, line = initial_model(given, len(BANDS))
    assert line == "random weights"
    save_file(families.family("toy_family").weights(model.encoder, model.decoder), tmp_path / "weights.safetensors")
    other = given.model_copy(update={"train": given.train.model_copy(update={"seed": 1})})
    for init, same in ((None, False), (str(tmp_path / "weights.safetensors"), True)):
        begun, _, _ = initial_model(
            other.model_copy(update={"model": recipe(init=init, layers=[2, 6]).model}), len(BANDS)
        )
        for part in ("encoder", "decoder"):
            ours, theirs = (getattr(one, part).state_dict() for one in (model, begun))
            assert all(torch.equal(ours[name], theirs[name]) for name in ours) == same
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

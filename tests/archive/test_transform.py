"""Archives of codecs with a transform: every way to their embeddings gives all of the encoder's channels."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from nec_ray.archive import open_archive
from nec_ray.archive.layout import install_codec
from nec_ray.archive.similar import pool_kind
from nec_ray.archive.verify import verify
from nec_ray.codec import load_codec, truncate_codec
from nec_ray.errors import CodecMismatch, MixedCodecs
from nec_ray.models.dataset import torch_dataset
from nec_ray.models.head_files import load_head, save_head
from nec_ray.models.heads import ClassificationHead
from tests.archive.make import Made, filled_archive, pack
from tests.codec.make import make_codec, make_transform

TRANSFORM = make_transform()


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    return filled_archive(tmp_path_factory.mktemp("made"), transform=TRANSFORM)


@pytest.mark.parametrize("layers", [1, 2, None])
def test_pulled_embeddings_have_all_channels(made: Made, layers: int | None) -> None:
    archive = open_archive(made.url)
    pull = archive.pull(layers=layers)
    channels = 8 if layers == 1 else 24
    for tile_id, symbols, embedding in zip(pull.tile_ids, pull.symbols, pull.embeddings, strict=True):
        assert np.array_equal(symbols, made.symbols[tile_id][:, :channels])
        expected = symbols.astype(float) @ TRANSFORM.basis[:channels] + TRANSFORM.center
        np.testing.assert_allclose(embedding, expected, atol=1e-4)
    assert {tuple(x.shape) for _, x in torch_dataset(archive, layers=layers)} == {(16, 30)}


def test_sql_decodes_them(made: Made) -> None:
    archive = open_archive(made.url)
    rows = archive.sql("SELECT nec_decode(payload) FROM embeddings WHERE status = 'valid' ORDER BY tile_id").fetchall()
    assert np.array_equal(np.array([row[0] for row in rows], np.float32), archive.pull().embeddings)
    assert not verify(archive).faults


def test_codecs_with_and_without_a_transform_are_not_mixed(tmp_path: Path) -> None:
    made = filled_archive(tmp_path, transform=TRANSFORM)
    make_codec(tmp_path / "plain", layers=(8, 16))
    plain = load_codec(tmp_path / "plain")
    install_codec(made.store, plain)
    made.codec = plain
    made.index.append(made.index.version(), pack(made, ["s0", "s1"]))
    with pytest.raises(MixedCodecs, match="coded by a transform, some are not"):
        open_archive(made.url).pull()
    assert open_archive(made.url).pull(tile_ids=["s0", "s1"]).embeddings.shape == (2, 16, 24)


def test_a_head_refuses_embeddings_of_fewer_axes(made: Made, tmp_path: Path) -> None:
    """They are of its encoder and have all its channels; what it learned from is not in them."""
    archive = open_archive(made.url)
    pull = archive.pull()
    facts = {"encoder_id": pull.encoder_id, "tokens": 16, "channels": 30, "coded_channels": pull.coded_channels}
    how: dict[str, Any] = {"classes": ["a", "b"], "layers": None, "decoder_layer": "none", **facts}
    save_head(tmp_path, ClassificationHead(30, 2, 1), **how)
    head = load_head(tmp_path)
    assert np.shape(head.embeddings(made.url, pull)) == (38, 16, 30)
    with pytest.raises(CodecMismatch, match="coded in 8 channels, the head was trained for 24"):
        head.embeddings(made.url, archive.pull(layers=1))


def test_vectors_of_fewer_axes_are_not_ranked_with_those_of_all(made: Made, tmp_path: Path) -> None:
    """A tile's own first axes may be less like it than another tile is."""
    truncate_codec(made.codec, 1, tmp_path / "cut")
    cut = load_codec(tmp_path / "cut")
    symbols = np.stack([made.symbols[f"t{i:03}"] for i in range(38)])
    whole, part = (x.astype(float) for x in (made.codec.pool(symbols), cut.pool(symbols[:, :, :8])))
    like = part @ whole.T / np.outer(np.linalg.norm(part, axis=1), np.linalg.norm(whole, axis=1))
    assert (like.argmax(axis=1) != np.arange(38)).any()
    assert pool_kind(cut) != pool_kind(made.codec)

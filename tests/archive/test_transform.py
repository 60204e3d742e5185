"""Archives of codecs with a transform: every way to their embeddings gives all of the encoder's channels."""

from pathlib import Path

import numpy as np
import pytest

from nec_ray.archive import open_archive
from nec_ray.archive.layout import install_codec
from nec_ray.archive.verify import verify
from nec_ray.codec import load_codec, truncate_codec
from nec_ray.errors import MixedCodecs
from nec_ray.models.dataset import torch_dataset
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


def test_vectors_of_fewer_axes_are_not_ranked_with_those_of_all(tmp_path: Path) -> None:
    """A tile's own first axes may be less like it than another tile is."""
    made = filled_archive(tmp_path, transform=TRANSFORM)
    truncate_codec(made.codec, 1, tmp_path / "cut")
    cut = load_codec(tmp_path / "cut")
    install_codec(made.store, cut)
    whole, made.codec = made.codec.id, cut
    made.index.append(made.index.version(), pack(made, ["s0", "s1"]))
    archive = open_archive(made.url)
    with pytest.raises(MixedCodecs, match="2 kinds"):
        archive.similar("t000", 2)
    assert len(archive.similar("t000", 2, where=f"codec_id = '{whole}'")) == 2

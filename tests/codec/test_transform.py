"""Codecs that round coordinates along some axes: against the same computed with the axes by hand."""

import hashlib
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import load_file

from nec_ray.codec import Codec, Transform, is_prefix, load_codec, truncate_codec
from nec_ray.codec.directory import tensor_bytes, write_directory
from nec_ray.errors import CorruptCodec
from tests.codec.make import SCALES, laplacian_symbols, make_codec, make_transform

TRANSFORM = make_transform()


@pytest.fixture(scope="module")
def codec(tmp_path_factory: pytest.TempPathFactory) -> Codec:
    folder = tmp_path_factory.mktemp("transform") / "codec"
    make_codec(folder, layers=(8, 6, 10), transform=TRANSFORM)
    return load_codec(folder)


def by_hand(symbols: npt.NDArray[np.int32], transform: Transform = TRANSFORM) -> npt.NDArray[np.float64]:
    """Embeddings of symbols (tiles, tokens, channels), added up axis by axis."""
    out = np.zeros((*symbols.shape[:2], transform.basis.shape[1])) + transform.center
    for channel in range(symbols.shape[2]):
        out += symbols[:, :, channel, None] * transform.basis[channel].astype(float)
    return out


@pytest.mark.parametrize("channels", [8, 14, 24])
def test_embeddings_of_a_prefix_have_all_channels(codec: Codec, channels: int) -> None:
    symbols = laplacian_symbols(np.random.default_rng(1), SCALES, 5, 16)[:, :, :channels]
    found = codec.dequantise(symbols)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, by_hand(symbols), atol=1e-4)


def test_a_codec_declares_what_its_embeddings_are(codec: Codec) -> None:
    assert codec.spec.width == 30
    assert codec.spec.embedding_shapes() == codec.spec.embedding_shapes(1) == [(16, 30)]
    assert codec.spec.values == 16 * 30
    assert "4x4 tokens x 30 channels" in repr(codec)


@given(st.integers(0, 2**32 - 1))
def test_symbols_are_the_nearest_ones(seed: int) -> None:
    """No other whole step along any axis comes nearer to the embedding."""
    embeddings = np.random.default_rng(seed).normal(0, 2, (2, 3, 30)).astype(np.float32)
    coordinates = TRANSFORM.forward(embeddings)
    symbols = np.rint(coordinates).astype(np.int32)
    error = np.sum((by_hand(symbols) - embeddings) ** 2, axis=2)
    for channel in range(0, 24, 5):
        for move in (-1, 1):
            moved = symbols.copy()
            moved[:, :, channel] += move
            assert (np.sum((by_hand(moved) - embeddings) ** 2, axis=2) >= error - 1e-5).all()


def test_symbols_of_embeddings_are_theirs(codec: Codec) -> None:
    symbols = laplacian_symbols(np.random.default_rng(2), SCALES, 20, 16)
    assert np.array_equal(codec.quantise(codec.dequantise(symbols)), symbols)


def test_a_cut_decodes_to_the_same_coarser_embeddings(codec: Codec, tmp_path: Path) -> None:
    truncate_codec(codec, 2, tmp_path / "cut")
    cut = load_codec(tmp_path / "cut")
    symbols = laplacian_symbols(np.random.default_rng(3), SCALES, 9, 16)
    assert np.array_equal(cut.dequantise(symbols[:, :, :14]), codec.dequantise(symbols[:, :, :14]))
    assert np.array_equal(cut.pool(symbols[:, :, :14]), codec.pool(symbols[:, :, :14]))
    assert is_prefix(cut, codec)


def test_coordinates_of_a_prefix_are_the_first_ones() -> None:
    """Though the axes' lengths differ a little, as those of float32 do."""
    stretch = np.random.default_rng(4).uniform(0.9999, 1.0001, (24, 1)).astype(np.float32)
    transform = replace(TRANSFORM, basis=TRANSFORM.basis * stretch)
    embeddings = np.random.default_rng(5).normal(0, 9, (2, 3, 30))
    whole = transform.forward(embeddings)
    np.testing.assert_allclose(transform.first(7).forward(embeddings), whole[:, :, :7], rtol=0, atol=1e-9)


def test_other_axes_are_no_prefix(codec: Codec, tmp_path: Path) -> None:
    make_codec(tmp_path / "other", layers=(8, 16), transform=make_transform(seed=1))
    make_codec(tmp_path / "none", layers=(8, 16))
    for name in ("other", "none"):
        truncate_codec(load_codec(tmp_path / name), 1, tmp_path / f"{name}-cut")
        assert not is_prefix(load_codec(tmp_path / f"{name}-cut"), codec)


def test_pooled_vectors_rank_by_the_embeddings_means(codec: Codec) -> None:
    symbols = laplacian_symbols(np.random.default_rng(4), SCALES, 30, 16)
    center, basis = codec.pool_axes()
    expected = np.clip((by_hand(symbols).mean(axis=1) - center) @ basis, -127, 127)
    assert center.shape == (30,)
    assert np.abs(codec.pool(symbols) - expected).max() <= 0.51


def test_codecs_without_a_transform_say_nothing_of_one(tmp_path: Path) -> None:
    make_codec(tmp_path / "codec")
    assert "width" not in json.loads((tmp_path / "codec" / "codec.json").read_bytes())


def broken(what: str) -> dict[str, npt.NDArray[np.float32]]:
    basis, center = TRANSFORM.basis.copy(), TRANSFORM.center.copy()
    if what == "skew":
        basis[3] += 0.1 * basis[4]
    elif what == "length":
        basis[3] *= 1.1
    elif what == "nothing":
        basis *= 0
    elif what == "infinite":
        center[2] = np.inf
    elif what == "no number":
        center[2] = np.nan
    elif what == "huge":
        basis *= np.float32(1e30)
    elif what == "wide":
        basis, center = np.pad(basis, ((0, 0), (0, 1))), np.pad(center, (0, 1))
    elif what == "few":
        basis = basis[:-1]
    found = replace(TRANSFORM, basis=basis, center=center).to_tensors()
    if what == "missing":
        del found["transform_center"]
    return found


@pytest.mark.parametrize(
    "what", ["skew", "length", "nothing", "infinite", "no number", "huge", "wide", "few", "missing"]
)
def test_what_is_no_transform_is_refused(codec: Codec, tmp_path: Path, what: str) -> None:
    data = {name: codec.file(name) for name in codec.spec.files}
    (tmp_path / "tables.safetensors").write_bytes(data["tables.safetensors"])
    tables = {k: v for k, v in load_file(tmp_path / "tables.safetensors").items() if not k.startswith("transform_")}
    data["tables.safetensors"] = tensor_bytes({**tables, **broken(what)})
    files = {name: hashlib.sha256(blob).hexdigest() for name, blob in data.items()}
    write_directory(tmp_path / "codec", codec.spec.model_copy(update={"files": files}), data)
    with pytest.raises(CorruptCodec, match="no transform from 24 to 30 channels"):
        load_codec(tmp_path / "codec")


def test_a_transform_of_several_scales_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="width is for layers of one scale"):
        make_codec(tmp_path / "codec", layers=(8, 16), scales=(2, 1), transform=TRANSFORM)

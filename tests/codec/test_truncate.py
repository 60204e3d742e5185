"""A codec of the first layers of another: its payloads are the other's first bytes, its id depends on nothing else."""

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nec_ray.codec import Codec, LayerSpec, PayloadCoder, is_prefix, load_codec, truncate_codec
from tests.codec.make import SCALES, laplacian_symbols, make_codec, random_tables, symbols_of


@pytest.fixture(scope="module")
def codec(tmp_path_factory: pytest.TempPathFactory) -> Codec:
    folder = tmp_path_factory.mktemp("truncate") / "codec"
    make_codec(folder, layers=(8, 6, 10))
    return load_codec(folder)


@pytest.mark.parametrize("layers", [1, 2])
def test_payloads_are_the_first_bytes(codec: Codec, tmp_path: Path, layers: int) -> None:
    codec_id = truncate_codec(codec, layers, tmp_path / "cut")
    cut = load_codec(tmp_path / "cut")
    channels = (8, 14)[layers - 1]
    symbols = laplacian_symbols(np.random.default_rng(3), SCALES, 50, 16)
    symbols[7, 3] = 10_000  # escapes
    whole = codec.compress(symbols)
    ends = codec.layer_lengths(whole)[:, :layers].sum(axis=1)
    assert list(cut.compress(symbols[:, :, :channels])) == [p[:n] for p, n in zip(whole, ends, strict=True)]
    assert (cut.id, cut.encoder_id, cut.spec.lineage.parent) == (codec_id, codec.encoder_id, codec.id)
    assert (cut.spec.channels, len(cut.spec.layers)) == (channels, layers)
    golden = codec.golden()[:, :, :channels]
    size = sum(len(p[:n]) for p, n in zip(codec.compress(codec.golden()), cut_ends(codec, layers), strict=True))
    assert np.array_equal(cut.golden(), golden)
    assert cut.spec.lineage.bits_per_symbol == pytest.approx(8 * size / golden.size)
    assert is_prefix(cut, codec)
    assert not is_prefix(codec, cut)


def cut_ends(codec: Codec, layers: int) -> list[int]:
    lengths = codec.layer_lengths(codec.compress(codec.golden()))
    return [int(n) for n in lengths[:, :layers].sum(axis=1)]


def test_the_same_cut_has_the_same_id(codec: Codec, tmp_path: Path) -> None:
    assert truncate_codec(codec, 1, tmp_path / "a") == truncate_codec(codec, 1, tmp_path / "b")
    assert truncate_codec(codec, 2, tmp_path / "c") != truncate_codec(codec, 1, tmp_path / "d")
    files = sorted(p.name for p in (tmp_path / "a").iterdir())
    assert all((tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes() for name in files)
    listed = json.loads((tmp_path / "a" / "codec.json").read_bytes())
    assert listed["files"]["encoder.safetensors"] == codec.spec.files["encoder.safetensors"]


def test_a_cut_of_a_cut_keeps_the_medians_of_the_whole_latent(codec: Codec, tmp_path: Path) -> None:
    truncate_codec(codec, 2, tmp_path / "two")
    truncate_codec(load_codec(tmp_path / "two"), 1, tmp_path / "one")
    one = load_codec(tmp_path / "one")
    assert np.array_equal(one.tensors("decoder")["medians"], codec.tables.median)
    assert is_prefix(one, codec)


@pytest.mark.parametrize("layers", [0, 3, 4])
def test_no_fewer_layers_are_refused(codec: Codec, tmp_path: Path, layers: int) -> None:
    with pytest.raises(ValueError, match="has 3 layers"):
        truncate_codec(codec, layers, tmp_path / "cut")


def test_pooled_vectors_of_a_cut_lie_on_the_same_axes(codec: Codec, tmp_path: Path) -> None:
    """Channels that the cut leaves out count as their calibration mean: nothing else moves a vector."""
    truncate_codec(codec, 2, tmp_path / "cut")
    cut = load_codec(tmp_path / "cut")
    symbols = laplacian_symbols(np.random.default_rng(5), SCALES, 30, 16)
    center, basis = codec.pool_axes()
    mean = (symbols + codec.tables.median).mean(axis=1) - center
    mean[:, 14:] = 0
    expected = np.clip(mean @ basis, -127, 127)
    assert np.abs(cut.pool(symbols[:, :, :14]) - expected).max() <= 0.51


def test_other_tables_are_no_prefix(codec: Codec, tmp_path: Path) -> None:
    make_codec(tmp_path / "other", layers=(8, 16))
    other = load_codec(tmp_path / "other")
    assert other.encoder_id == codec.encoder_id
    assert not is_prefix(other, codec)


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(2, 12), st.data())
def test_any_tables_cut_at_any_layer_code_a_prefix(seed: int, channels: int, data: st.DataObject) -> None:
    rng = np.random.default_rng(seed)
    first = data.draw(st.integers(1, channels - 1))
    tables = random_tables(rng, channels, 12, most=20)
    symbols = symbols_of(rng, tables, 5, 9)
    layers = [LayerSpec(channels=first, tokens=9), LayerSpec(channels=channels - first, tokens=9)]
    whole = PayloadCoder(tables, layers).compress(symbols)
    cut = PayloadCoder(tables.first(first), layers[:1]).compress(symbols[:, :, :first])
    assert all(long.startswith(short) for long, short in zip(whole, cut, strict=True))

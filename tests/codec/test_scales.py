"""Codecs whose layers are of several grid scales, against the slow decoder of schemas/ and loops over layers."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from safetensors.numpy import load_file, save_file

from nec_ray.codec import Codec, load_codec, truncate_codec
from nec_ray.errors import CorruptCodec
from tests.codec.make import make_codec, scaled_symbols
from tests.codec.slow_rans import payload_decoder
from tests.codec.test_directory import rewrite_golden

GRID = (5, 4)
LAYERS = (8, 6, 10)
CASES: dict[tuple[int, ...], list[int]] = {(2, 2, 1): [6, 6, 20], (2, 1, 2): [6, 20, 6], (4, 2, 1): [2, 6, 20]}
"""Tokens of the layers by their scales."""


def made(folder: Path, scales: tuple[int, ...]) -> Codec:
    make_codec(folder, grid=GRID, layers=LAYERS, scales=scales)
    return load_codec(folder)


def drawn(scales: tuple[int, ...], tiles: int = 5) -> tuple[npt.NDArray[np.int32], ...]:
    return scaled_symbols(np.random.default_rng(3), LAYERS, scales, CASES[scales], tiles)


def per_layer(parts: tuple[npt.NDArray[Any], ...], scales: tuple[int, ...]) -> list[npt.NDArray[Any]]:
    """The arrays (tiles, tokens, channels) of each layer, cut from those of the scales."""
    order, used = list(dict.fromkeys(scales)), dict.fromkeys(scales, 0)
    cut = []
    for channels, scale in zip(LAYERS, scales, strict=True):
        cut.append(parts[order.index(scale)][:, :, used[scale] : used[scale] + channels])
        used[scale] += channels
    return cut


@pytest.mark.parametrize("scales", CASES)
def test_symbols_come_back_and_the_slow_decoder_agrees(tmp_path: Path, scales: tuple[int, ...]) -> None:
    codec, symbols = made(tmp_path / "codec", scales), drawn(scales)
    payloads = codec.compress(symbols)
    back = codec.decompress(payloads)
    assert isinstance(back, tuple)
    assert len(back) == len(set(scales))
    assert all(np.array_equal(a, b) for a, b in zip(back, symbols, strict=True))
    files = [(tmp_path / "codec" / name).read_bytes() for name in ("codec.json", "tables.safetensors")]
    for tile, payload in enumerate(payloads):
        slow = payload_decoder().decode(payload, *files)
        expected = [layer[tile].tolist() for layer in per_layer(symbols, scales)]
        assert slow == expected


@pytest.mark.parametrize("scales", CASES)
def test_a_prefix_of_layers_is_the_coarser_scales(tmp_path: Path, scales: tuple[int, ...]) -> None:
    codec, symbols = made(tmp_path / "codec", scales), drawn(scales)
    payloads, layers = codec.compress(symbols), per_layer(symbols, scales)
    ends = codec.layer_lengths(payloads).cumsum(axis=1)
    first = codec.decompress([p[:n] for p, n in zip(payloads, ends[:, 0], strict=True)], layers=1)
    assert np.array_equal(first, layers[0])  # one scale: an array, no tuple
    two = codec.decompress(payloads, layers=2)
    if scales[0] == scales[1]:
        assert np.array_equal(two, np.concatenate(layers[:2], axis=2))
    else:
        assert all(np.array_equal(a, b) for a, b in zip(two, layers[:2], strict=True))


@pytest.mark.parametrize("scales", CASES)
def test_embeddings_and_pooled_vectors_take_each_layers_own_channels(tmp_path: Path, scales: tuple[int, ...]) -> None:
    codec, symbols = made(tmp_path / "codec", scales), drawn(scales)
    median, rows = load_file(tmp_path / "codec" / "tables.safetensors")["median"], np.cumsum((0, *LAYERS))
    found = per_layer(codec.dequantise(symbols), scales)
    means = []
    for layer, one in enumerate(per_layer(symbols, scales)):
        expected = one + median[rows[layer] : rows[layer + 1]]
        np.testing.assert_allclose(found[layer], expected, rtol=1e-6)
        means.append(expected.mean(axis=1))
    center, basis = codec.pool_axes()
    exact = np.clip((np.concatenate(means, axis=1) - center) @ basis, -127, 127)
    assert np.abs(codec.pool(symbols) - exact).max() <= 0.51


def test_a_cut_that_leaves_one_scale_is_a_codec_of_one_array(tmp_path: Path) -> None:
    scales = (2, 2, 1)
    codec, symbols = made(tmp_path / "codec", scales), drawn(scales)
    whole = codec.compress(symbols)
    for layers, channels in ((1, 8), (2, 14)):
        truncate_codec(codec, layers, tmp_path / f"cut{layers}")
        cut = load_codec(tmp_path / f"cut{layers}")
        assert cut.spec.grid == GRID
        payloads = cut.compress(symbols[0][:, :, :channels])
        ends = codec.layer_lengths(whole)[:, :layers].sum(axis=1)
        assert list(payloads) == [p[:n] for p, n in zip(whole, ends, strict=True)]
        assert np.array_equal(cut.decompress(payloads), symbols[0][:, :, :channels])
        assert np.array_equal(cut.golden(), codec.golden()[0][:, :, :channels])
        size = 8 * int(codec.layer_lengths(codec.compress(codec.golden()))[:, :layers].sum()) / cut.golden().size
        assert cut.spec.lineage.bits_per_symbol == pytest.approx(size)


def test_a_cut_that_leaves_several_scales_keeps_them(tmp_path: Path) -> None:
    codec = made(tmp_path / "codec", (4, 2, 1))
    truncate_codec(codec, 2, tmp_path / "cut")
    cut = load_codec(tmp_path / "cut")
    assert [scale.shape for scale in cut.scales()] == [(2, 8), (6, 6)]
    assert [part.shape[1:] for part in cut.golden()] == [(2, 8), (6, 6)]


def test_golden_symbols_of_a_finer_scale_are_checked_too(tmp_path: Path) -> None:
    made(tmp_path / "codec", (2, 2, 1))
    path = tmp_path / "codec" / "golden.safetensors"
    golden = load_file(path)
    assert set(golden) == {"payload", "length", "symbols_1", "symbols_2"}
    changed = golden["symbols_2"].copy()
    changed[-1, -1, -1] += 1
    rewrite_golden(tmp_path / "codec", symbols_2=changed)
    with pytest.raises(CorruptCodec, match="decode to other symbols"):
        load_codec(tmp_path / "codec")
    rewrite_golden(tmp_path / "codec", symbols_2=changed[:, :-1])
    with pytest.raises(CorruptCodec, match="not of its shape"):
        load_codec(tmp_path / "codec")
    save_file({name: array for name, array in golden.items() if name != "symbols_2"}, path)
    rewrite_golden(tmp_path / "codec")
    with pytest.raises(CorruptCodec, match="not of its shape"):
        load_codec(tmp_path / "codec")


def test_tokens_that_are_not_the_grids_at_a_layers_scale_are_refused(tmp_path: Path) -> None:
    make_codec(tmp_path / "codec", grid=GRID, layers=LAYERS, scales=(2, 2, 1))
    path = tmp_path / "codec" / "codec.json"
    document = json.loads(path.read_bytes())
    document["layers"][1]["tokens"] = 5
    path.write_text(json.dumps(document))
    with pytest.raises(CorruptCodec, match="not those of the grid at its scale"):
        load_codec(tmp_path / "codec")


def test_arrays_that_are_not_one_a_scale_are_refused(tmp_path: Path) -> None:
    codec, (coarse, fine) = made(tmp_path / "codec", (2, 2, 1)), drawn((2, 2, 1))
    for wrong, says in (
        (coarse, "2 arrays, one a grid scale"),
        ((fine, coarse), "int32"),
        ((coarse[:2], fine), "same"),
    ):
        with pytest.raises(ValueError, match=says):
            codec.compress(wrong)

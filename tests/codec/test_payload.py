"""Payloads against an obvious Python encoder and the decoder in schemas/, under random tables and symbols."""

import hashlib
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import save

from nec_ray.codec import EntropyTables, LayerSpec, PayloadCoder, Payloads
from nec_ray.errors import CorruptPayload
from tests.codec.make import (
    EACH_PATH,
    SCALES,
    coder_on,
    laplacian_pmf,
    laplacian_symbols,
    laplacian_tables,
    random_tables,
    symbols_of,
)
from tests.codec.slow_rans import encode_layer, payload_decoder

GOLDEN = Path(__file__).parent / "golden"
ROOT = Path(__file__).resolve().parents[2]


def two_layers(tokens: int) -> list[LayerSpec]:
    return [LayerSpec(channels=10, tokens=tokens), LayerSpec(channels=14, tokens=tokens)]


def codec_json(layers: list[LayerSpec]) -> bytes:
    return json.dumps({"layers": [layer.model_dump() for layer in layers]}).encode()


def tensors(tables: EntropyTables) -> bytes:
    return save(dict(tables.to_tensors()))


def slow_decode(tables: EntropyTables, layers: list[LayerSpec], payload: bytes) -> npt.NDArray[np.int64]:
    """Symbols (tokens, channels) by the decoder in schemas/."""
    decoded = payload_decoder().decode(payload, codec_json(layers), tensors(tables))
    parts = [np.array(part).reshape(-1, layer.channels) for part, layer in zip(decoded, layers, strict=True)]
    return np.concatenate(parts, axis=1).astype(np.int64)


def slow_encode(coder_layers: list[LayerSpec], tables: EntropyTables, tile: npt.NDArray[np.int32], lanes: int) -> bytes:
    arrays = {name: array.tolist() for name, array in tables.to_tensors().items()}
    channels = [payload_decoder().Channel(arrays, row) for row in range(tables.channels)]
    out, row = b"", 0
    for layer in coder_layers:
        columns = tile.T.tolist()[row : row + layer.channels]
        mine = channels[row : row + layer.channels]
        out += encode_layer(columns, mine, layer.tokens, tables.precision, lanes)
        row += layer.channels
    return out


@pytest.mark.parametrize("tokens", [1, 5, 40])
@pytest.mark.parametrize("lanes", [1, 4, 8, 16])
def test_each_reads_the_others_bytes(tokens: int, lanes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Eleven tiles: the kernels take some of them four at a time, and some alone."""
    tables = laplacian_tables(SCALES)
    assert tables.dead.any()
    assert tables.sparse.any()
    symbols = laplacian_symbols(np.random.default_rng(tokens), SCALES, 11, tokens)
    symbols[0, -1, 5], symbols[1, 0, 0], symbols[2, tokens // 2, 23] = 9999, -(2**31), 2**31 - 1
    layers = two_layers(40)
    coder = PayloadCoder(tables, layers)
    monkeypatch.setattr(type(coder._layers[0]), "lanes_log2", lambda *_: lanes.bit_length() - 1)
    payloads = coder.compress(symbols)
    [all_back] = coder.decompress(payloads)
    assert np.array_equal(all_back, symbols)
    for tile, payload in zip(symbols, payloads, strict=True):
        assert np.array_equal(slow_decode(tables, layers, payload), tile)
        assert slow_encode(layers, tables, tile, lanes) == payload


def test_lanes_that_the_encoder_would_not_take_are_read() -> None:
    tables = laplacian_tables(SCALES)
    layers = two_layers(40)
    symbols = laplacian_symbols(np.random.default_rng(0), SCALES, 10, 40)
    lanes = [1, 2, 4, 8, 16, 1, 1, 1, 1, 2]
    mixed = [slow_encode(layers, tables, tile, n) for tile, n in zip(symbols, lanes, strict=True)]
    assert np.array_equal(PayloadCoder(tables, layers).decompress(mixed)[0], symbols)


@st.composite
def tables_and_symbols(draw: st.DrawFn) -> tuple[EntropyTables, npt.NDArray[np.int32]]:
    """Tables of every kind of channel, and symbols in and out of them."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    channels, tokens = draw(st.integers(1, 40)), draw(st.integers(0, 40))
    widest = draw(st.sampled_from([3, 300, 70_000]))
    pmfs = []
    offset = rng.integers(-1000, 1000, channels)
    for c in range(channels):
        weights = rng.random(rng.integers(1, widest)) ** draw(st.sampled_from([1, 8, 40]))
        if rng.random() < 0.4:  # nearly always 0
            offset[c] = -rng.integers(0, len(weights))
            weights[-offset[c]] += 100 * weights.sum()
        pmfs.append(weights / weights.sum())
    tables = EntropyTables.from_pmf(pmfs, offset, np.zeros(channels), rng.random(channels) < 0.2, max(1, tokens))
    shape = (2, tokens, channels)
    inside = np.where(tables.sparse & (rng.random(shape) < 0.9), 0, offset + rng.integers(0, widest, shape))
    wild = rng.integers(-(2**31), 2**31, shape)
    return tables, np.where(rng.random(shape) < draw(st.sampled_from([0, 0.05])), wild, inside).astype(np.int32)


@given(tables_and_symbols(), st.sampled_from([1e-9, 1e9]), st.integers(0, 3))
@settings(max_examples=150, deadline=None)
def test_any_symbols_come_back_under_any_tables(
    case: tuple[EntropyTables, npt.NDArray[np.int32]], lane_bytes: float, spare: int
) -> None:
    tables, symbols = case
    declared = symbols.shape[1] + spare
    cut = tables.channels // 2
    parts = [n for n in (cut, tables.channels - cut) if n]
    layers = [LayerSpec(channels=n, tokens=max(1, declared)) for n in parts]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("nec_ray.codec.payload._LANE_BYTES", lane_bytes)
        coder = PayloadCoder(tables, layers)
        payloads = coder.compress(symbols)
    [back] = coder.decompress(payloads)
    assert np.array_equal(back, symbols)
    assert np.array_equal(slow_decode(tables, layers, payloads[0]).reshape(symbols[0].shape), symbols[0])


@given(
    st.integers(0, 2**32), st.integers(1, 70), st.integers(0, 40), st.integers(1, 11), st.sampled_from([12, 12, 13, 16])
)
@settings(max_examples=150, deadline=None)
def test_any_integer_tables_code_any_symbols(seed: int, channels: int, tokens: int, tiles: int, precision: int) -> None:
    """Tables that no density would give, batches of any size, every number of lanes."""
    rng = np.random.default_rng(seed)
    tables = random_tables(rng, channels, precision)
    symbols = symbols_of(rng, tables, tiles, tokens)
    layers = [LayerSpec(channels=channels, tokens=max(1, tokens))]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("nec_ray.codec.payload._LANE_BYTES", rng.choice([0.1, 10, 100, 1e9]))
        coder = PayloadCoder(tables, layers)
        payloads = coder.compress(symbols)
    assert np.array_equal(coder.decompress(payloads)[0], symbols)
    [alone] = coder.decompress([payloads[tiles - 1]])
    assert np.array_equal(alone[0], symbols[-1])
    assert np.array_equal(slow_decode(tables, layers, payloads[0]).reshape(symbols[0].shape), symbols[0])


@pytest.mark.parametrize("scale", [0.03, 0.08, 0.15, 0.5, 2.0, 30.0, 3000.0])
@pytest.mark.parametrize("tokens", [16, 196, 3000])
def test_a_payload_costs_little_more_than_the_models_entropy(scale: float, tokens: int) -> None:
    """At most 0.5% + 16 bytes, and 12 for each further layer."""
    radius = int(scale * 15) + 2
    pmf = laplacian_pmf(scale, radius)
    channels = 32
    offset = np.full(channels, -radius)
    tables = EntropyTables.from_pmf([pmf] * channels, offset, np.zeros(channels), np.zeros(channels, bool), tokens)
    rng = np.random.default_rng(2)
    symbols = rng.choice(2 * radius + 1, (8, tokens, channels), p=pmf / pmf.sum()).astype(np.int32) - radius
    model_bits = -np.log2(pmf[symbols + radius]).sum(axis=(1, 2))
    one = [LayerSpec(channels=channels, tokens=tokens)]
    four = [LayerSpec(channels=n, tokens=tokens) for n in (2, 6, 8, 16)]
    for layers in (one, four):
        lengths = PayloadCoder(tables, layers).compress(symbols).length
        assert np.all(lengths <= model_bits / 8 * 1.005 + 16 + 12 * (len(layers) - 1))
        assert lengths.sum() >= model_bits.sum() / 8


def test_tiles_of_no_one_and_very_many_tokens() -> None:
    scales = np.array([0.1, 0.7, 5.0])
    tables = laplacian_tables(scales)
    coder = PayloadCoder(tables, [LayerSpec(channels=3, tokens=65_536)])
    for tokens in (0, 1, 65_536):
        symbols = laplacian_symbols(np.random.default_rng(6), scales, 2, tokens)
        payloads = coder.compress(symbols)
        [back] = coder.decompress(payloads)
        assert back.shape == symbols.shape
        assert np.array_equal(back, symbols)
        if tokens < 2:
            assert payloads.length.max() < 20
            for tile, payload in zip(symbols, payloads, strict=True):
                decoded = slow_decode(tables, [LayerSpec(channels=3, tokens=65_536)], payload)
                assert np.array_equal(decoded.reshape(tile.shape), tile)


@pytest.mark.parametrize("tokens", [64, 196, 1024])
@pytest.mark.parametrize("peak", [0.0, 0.3, 0.9, 0.97])
def test_heavy_tails_cost_little_more_than_the_models_entropy(tokens: int, peak: float) -> None:
    """A peak at 0 and tails of many rare symbols: narrow entries in the middle, wide ones outside."""
    steps = np.arange(-3000, 3001)
    cauchy = 1 / (1 + steps.astype(float) ** 2)
    pmf = (1 - peak) * cauchy / cauchy.sum() + peak * (steps == 0)
    channels = 24
    tables = EntropyTables.from_pmf(
        [pmf] * channels, np.full(channels, -3000), np.zeros(channels), np.zeros(channels, bool), tokens
    )
    rng = np.random.default_rng(4)
    symbols = rng.choice(len(pmf), (8, tokens, channels), p=pmf / pmf.sum()).astype(np.int32) - 3000
    model_bits = -np.log2(pmf[symbols + 3000]).sum(axis=(1, 2))
    coder = PayloadCoder(tables, [LayerSpec(channels=channels, tokens=tokens)])
    payloads = coder.compress(symbols)
    assert np.array_equal(coder.decompress(payloads)[0], symbols)
    assert np.all(payloads.length <= model_bits / 8 * 1.005 + 16)


@pytest.mark.parametrize("precision", [12, 14, 16])
@pytest.mark.parametrize("shift", [0, 3, 16])
def test_the_dearest_symbols_fit_in_the_room_for_their_words(precision: int, shift: int) -> None:
    """Rare symbols only: the state grows a little more than the frequencies say at each of many steps."""
    total = 1 << precision
    cdf = np.array([0, total - 1, total], np.uint32)
    tables = EntropyTables(
        precision=precision,
        cdf=np.tile(cdf, 3),
        start=np.array([0, 3, 6, 9]),
        offset=np.zeros(3, np.int32),
        shift=np.tile(np.array([shift, shift, 0], np.uint8), 3),
        run_cdf=np.zeros(0, np.uint32),
        run_start=np.zeros(4, np.int64),
        median=np.zeros(3, np.float32),
    )
    layers = [LayerSpec(channels=3, tokens=20_000)]
    symbols = np.full((5, 20_000, 3), (2 << shift) - 1, np.int32)
    coder = PayloadCoder(tables, layers)
    payloads = coder.compress(symbols)
    assert np.array_equal(coder.decompress(payloads)[0], symbols)
    assert payloads.length[0] * 8 == pytest.approx(20_000 * 3 * (precision + shift), rel=0.02)


def test_no_tiles_at_all() -> None:
    coder = PayloadCoder(laplacian_tables(SCALES), two_layers(9))
    payloads = coder.compress(np.zeros((0, 9, 24), np.int32))
    assert len(payloads) == 0
    assert coder.decompress(payloads)[0].shape == (0, 9, 24)
    assert coder.layer_lengths(payloads).shape == (0, 2)


def test_dead_channels_cost_nothing() -> None:
    tables = EntropyTables.from_pmf([np.ones(1)] * 500, np.zeros(500, int), np.zeros(500), np.ones(500, bool))
    coder = PayloadCoder(tables, [LayerSpec(channels=500, tokens=64)])
    symbols = np.zeros((2, 64, 500), np.int32)
    symbols[1, 63, 499] = -7
    payloads = coder.compress(symbols)
    assert payloads.length.tolist() == [6, 6 + 5]
    assert np.array_equal(coder.decompress(payloads)[0], symbols)


def test_threads_change_no_byte() -> None:
    tables = laplacian_tables(SCALES)
    coder = PayloadCoder(tables, two_layers(64))
    symbols = laplacian_symbols(np.random.default_rng(8), SCALES, 3001, 64)
    one, four = coder.compress(symbols, threads=1), coder.compress(symbols, threads=4)
    assert list(one) == list(four)
    assert np.array_equal(coder.decompress(one, threads=4)[0], symbols)
    damaged = [*one]
    damaged[2999] = damaged[2999][:-1]
    with pytest.raises(CorruptPayload, match="payload 2999: layer 2: cut off"):
        coder.decompress(damaged, threads=4)


def test_a_prefix_of_layers_decodes_by_itself() -> None:
    coder = PayloadCoder(laplacian_tables(SCALES), two_layers(9))
    symbols = laplacian_symbols(np.random.default_rng(3), SCALES, 2, 9)
    payloads = coder.compress(symbols)
    lengths = coder.layer_lengths(payloads)
    assert np.array_equal(lengths.sum(axis=1), payloads.length)
    prefixes = [payload[:first] for payload, first in zip(payloads, lengths[:, 0].tolist(), strict=True)]
    assert np.array_equal(coder.decompress(prefixes, layers=1)[0], symbols[:, :, :10])


def test_layers_of_two_grid_scales() -> None:
    """7 x 7 tokens of 10 channels, then the same 4 x 4 of 8 and of 6."""
    layers = [
        LayerSpec(channels=10, tokens=49),
        LayerSpec(channels=8, tokens=16, scale=2),
        LayerSpec(channels=6, tokens=16, scale=2),
    ]
    tables = laplacian_tables(SCALES)
    rng = np.random.default_rng(9)
    fine = laplacian_symbols(rng, SCALES[:10], 5, 49)
    coarse = laplacian_symbols(rng, SCALES[10:], 5, 16)
    coder = PayloadCoder(tables, layers)
    payloads = coder.compress([fine, coarse])
    back = coder.decompress(payloads)
    assert np.array_equal(back[0], fine)
    assert np.array_equal(back[1], coarse)
    partly = coder.decompress(payloads, layers=2)
    assert np.array_equal(partly[1], coarse[:, :, :8])
    slow = payload_decoder().decode(payloads[4], codec_json(layers), tensors(tables))
    assert np.array_equal(np.concatenate(slow[1:], axis=1), coarse[4])


@pytest.mark.parametrize(
    ("symbols", "says"),
    [
        (np.zeros((1, 9, 24), np.int64), "int32"),
        (np.zeros((1, 9, 23), np.int32), "24"),
        (np.zeros((9, 24), np.int32), "int32"),
        (np.zeros((1, 10, 24), np.int32), "at most 9 tokens"),
    ],
)
def test_symbols_of_another_shape_are_refused(symbols: npt.NDArray[np.int32], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        PayloadCoder(laplacian_tables(SCALES), two_layers(9)).compress(symbols)


def test_layers_that_do_not_fit_are_refused() -> None:
    tables = laplacian_tables(SCALES)
    with pytest.raises(ValueError, match="add up to the tables' 24"):
        PayloadCoder(tables, two_layers(9)[:1])
    with pytest.raises(ValueError, match="one number of tokens"):
        PayloadCoder(tables, [two_layers(9)[0], two_layers(4)[1]])
    coder = PayloadCoder(tables, two_layers(9))
    for layers in (0, -1, 3):
        with pytest.raises(ValueError, match=f"2 layers, not {layers}"):
            coder.decompress([], layers)
    with pytest.raises(TypeError, match="a list of payloads"):
        coder.decompress(b"one")  # type: ignore[arg-type]


@pytest.mark.parametrize(("start", "length"), [(1 << 42, 1), (-1, 1), (0, 1 << 62), (0, -1), (3, 1)])
def test_payloads_outside_their_buffer_are_refused(start: int, length: int) -> None:
    with pytest.raises(ValueError, match="does not lie in the buffer"):
        Payloads(np.zeros(3, np.uint8), np.array([start]), np.array([length]))


def test_a_list_of_payloads_and_a_slice_of_them_are_payloads_too() -> None:
    coder = PayloadCoder(laplacian_tables(SCALES), two_layers(9))
    symbols = laplacian_symbols(np.random.default_rng(3), SCALES, 6, 9)
    payloads = coder.compress(symbols)
    assert np.array_equal(coder.decompress(payloads[1:5:2])[0], symbols[1:5:2])
    assert np.array_equal(coder.decompress([payloads[-1]])[0], symbols[-1:])
    # However an array lies in memory, it is coded like its values.
    assert list(coder.compress(np.asfortranarray(symbols))) == list(payloads)
    assert [len(p) for p in payloads] == payloads.length.tolist()


_FIRST_CALL = """
import numpy as np
from nec_ray.codec import LayerSpec, PayloadCoder, paths, rans
from tests.codec.make import SCALES, laplacian_symbols, laplacian_tables

coder = PayloadCoder(laplacian_tables(SCALES), [LayerSpec(channels=24, tokens=9)])
symbols = laplacian_symbols(np.random.default_rng(0), SCALES, 4, 9)
frozen = symbols[::2].copy()
frozen.flags.writeable = False
payloads = coder.compress(symbols)
kinds = [payloads, list(payloads), payloads[1:]]
assert [len(coder.decompress(kind)[0]) for kind in kinds] == [4, 4, 3]
for given in (frozen, symbols[::2], np.asfortranarray(symbols)[::2]):
    assert list(coder.compress(given)) == list(payloads)[::2]
many = np.repeat(symbols, 10, axis=0)  # enough for the vector path
assert np.array_equal(coder.decompress(coder.compress(many))[0], many)
kernels = [rans.open_layers, rans.begin_decoding, rans.decode_dense, rans.end_decoding]
kernels += [rans.begin_encoding, rans.encode_dense, rans.end_encoding]
fast = paths.VECTOR.get(paths.chosen())
if fast:
    kernels += [fast.decode_dense, fast.encode_dense]
for kernel in kernels:
    assert len(kernel.signatures) == 1, kernel
    assert not kernel.stats.cache_misses, kernel
"""


def test_a_new_process_compiles_nothing_whatever_arrays_it_is_given() -> None:
    """One compiled kernel serves read-only, strided and sliced arrays, and it comes from numba's cache."""
    for attempt in range(2):
        done = subprocess.run(
            [sys.executable, "-c", _FIRST_CALL], cwd=ROOT, capture_output=True, text=True, check=False
        )
        if attempt:  # the first one may have had to fill the cache
            assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("path", EACH_PATH)
def test_golden_payloads_of_format_1(path: str) -> None:
    """These bytes were written once and are read for ever; see golden/make.py."""
    files = sorted(GOLDEN.glob("*.json"))
    assert len(files) >= 7
    for file in files:
        case = json.loads(file.read_text())
        layers = [LayerSpec(**layer) for layer in case["layers"]]
        arrays = {name: np.array(a["data"], a["dtype"]) for name, a in case["tables"].items()}
        tables = EntropyTables.from_tensors(arrays)
        payloads = [bytes.fromhex(text) for text in case["payloads"]]
        coder = coder_on(path, tables, layers)
        back = coder.decompress(payloads)
        assert [list(part.shape) for part in back] == case["shapes"]
        assert [hashlib.sha256(part.astype("<i4").tobytes()).hexdigest() for part in back] == case["symbols_sha256"]
        assert [p.hex() for p in coder.compress(back)] == case["payloads"]

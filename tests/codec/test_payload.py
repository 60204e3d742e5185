"""Payloads against an obvious Python rANS, under random tables and symbols, and when damaged."""

import itertools

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nec_ray.codec import EntropyTables, LayerSpec
from nec_ray.codec.payload import compress, decompress, layer_lengths
from nec_ray.errors import CorruptPayload
from tests.codec.make import SCALES, laplacian_pmf, laplacian_symbols, laplacian_tables
from tests.codec.slow_rans import Reader, Table, decode_layer, encode_layer

LAYERS = [LayerSpec(channels=10), LayerSpec(channels=14)]


def plain_tables(tables: EntropyTables) -> list[Table]:
    cuts = itertools.pairwise(tables.start.tolist())
    return [
        (int(offset), np.diff(tables.cdf[a:b].astype(int)).tolist())
        for (a, b), offset in zip(cuts, tables.offset, strict=True)
    ]


def test_the_slow_decoder_reads_what_the_fast_encoder_wrote_and_the_other_way_round() -> None:
    tables = laplacian_tables(SCALES)
    symbols = laplacian_symbols(np.random.default_rng(1), SCALES, 3, 16)
    symbols[0, 3, 5], symbols[1, 0, 0], symbols[2, 15, 23] = 9999, -(2**31), 2**31 - 1
    plain = plain_tables(tables)
    for tile, payload in zip(symbols, compress(tables, LAYERS, symbols), strict=True):
        reader = Reader(payload)
        decoded = decode_layer(reader, plain[:10], tables.precision) + decode_layer(
            reader, plain[10:], tables.precision
        )
        assert reader.at == len(payload)
        assert np.array_equal(np.array(decoded).T, tile)
        columns = tile.T.tolist()
        slow = encode_layer(columns[:10], plain[:10], tables.precision)
        slow += encode_layer(columns[10:], plain[10:], tables.precision)
        assert slow == payload
        assert np.array_equal(decompress(tables, LAYERS, 16, slow), tile)


@st.composite
def tables_and_symbols(draw: st.DrawFn) -> tuple[EntropyTables, npt.NDArray[np.int32]]:
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    channels, tokens = draw(st.integers(1, 6)), draw(st.integers(0, 40))
    pmfs = []
    for _ in range(channels):
        weights = rng.random(draw(st.integers(1, 300))) ** draw(st.sampled_from([1, 8, 40]))
        pmfs.append(weights / weights.sum())
    offset = rng.integers(-1000, 1000, channels)
    dead = rng.random(channels) < 0.3
    tables = EntropyTables.from_pmf(pmfs, offset, np.zeros(channels), dead)
    inside = offset + rng.integers(0, 300, (1, tokens, channels))
    wild = rng.integers(-(2**31), 2**31, inside.shape)
    return tables, np.where(rng.random(inside.shape) < 0.05, wild, inside).astype(np.int32)


@given(tables_and_symbols())
@settings(max_examples=200, deadline=None)
def test_any_symbols_come_back_under_any_tables(case: tuple[EntropyTables, npt.NDArray[np.int32]]) -> None:
    tables, symbols = case
    layers = [LayerSpec(channels=tables.channels)]
    [payload] = compress(tables, layers, symbols)
    assert np.array_equal(decompress(tables, layers, symbols.shape[1], payload), symbols[0])


@pytest.mark.parametrize("scale", [0.1, 0.5, 2.0, 30.0])
def test_a_payload_costs_little_more_than_the_models_entropy(scale: float) -> None:
    pmf = laplacian_pmf(scale, 400)
    tables = EntropyTables.from_pmf([pmf] * 32, np.full(32, -400), np.zeros(32), np.zeros(32, bool))
    symbols = np.random.default_rng(2).choice(801, (1, 3000, 32), p=pmf / pmf.sum()).astype(np.int32) - 400
    model_bits = -np.log2(pmf[symbols + 400]).sum()
    [payload] = compress(tables, [LayerSpec(channels=32)], symbols)
    assert model_bits / 8 <= len(payload) <= model_bits / 8 * 1.005 + 16


def test_a_prefix_of_layers_decodes_by_itself() -> None:
    tables = laplacian_tables(SCALES)
    symbols = laplacian_symbols(np.random.default_rng(3), SCALES, 1, 9)
    [payload] = compress(tables, LAYERS, symbols)
    first, second = layer_lengths(payload, 2)
    assert first + second == len(payload)
    assert np.array_equal(decompress(tables, LAYERS[:1], 9, payload[:first]), symbols[0, :, :10])


def test_every_single_bit_flip_is_noticed() -> None:
    tables = laplacian_tables(SCALES)
    [payload] = compress(tables, LAYERS, laplacian_symbols(np.random.default_rng(4), SCALES, 1, 4))
    for bit in range(8 * len(payload)):
        damaged = bytearray(payload)
        damaged[bit // 8] ^= 1 << bit % 8
        with pytest.raises(CorruptPayload, match=r"layer [12]"):
            decompress(tables, LAYERS, 4, bytes(damaged))


def test_every_truncation_is_noticed() -> None:
    tables = laplacian_tables(SCALES)
    [payload] = compress(tables, LAYERS, laplacian_symbols(np.random.default_rng(5), SCALES, 1, 4))
    for length in range(len(payload)):
        with pytest.raises(CorruptPayload):
            decompress(tables, LAYERS, 4, payload[:length])


@given(st.binary(max_size=200))
@settings(max_examples=300, deadline=None)
def test_a_hostile_body_under_a_right_checksum_gives_a_typed_error_or_symbols(body: bytes) -> None:
    import zlib

    from tests.codec.slow_rans import varint

    tables = laplacian_tables(SCALES)
    payload = varint(len(body)) + zlib.crc32(body).to_bytes(4, "little") + body
    try:
        symbols = decompress(tables, LAYERS[:1], 4, payload)
    except CorruptPayload:
        return
    assert symbols.shape == (4, 10)

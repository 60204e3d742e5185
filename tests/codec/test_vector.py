"""The vector paths against the scalar one: the same bytes, the same symbols, the same refusals."""

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nec_ray.codec import EntropyTables, LayerSpec, PayloadCoder, paths, rans, vector, vector512
from nec_ray.errors import CorruptPayload
from tests.codec.make import EACH_VECTOR_PATH, VECTOR_PATHS, coder_on, random_tables, symbols_of
from tests.codec.test_hostile import body_of, framed, mutate

each_path = pytest.mark.parametrize("path", EACH_VECTOR_PATH)
LANES = st.sampled_from([1, 1, 2, 4, 8, 16])


def on(path: str, tables: EntropyTables, tokens: int) -> PayloadCoder:
    return coder_on(path, tables, [LayerSpec(channels=tables.channels, tokens=max(1, tokens))])


def compress(coder: PayloadCoder, symbols: npt.NDArray[np.int32], lanes: int) -> list[bytes]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(coder._layers[0]), "lanes_log2", lambda *_: lanes.bit_length() - 1)
        return list(coder.compress(symbols))


def outcome(coder: PayloadCoder, payloads: list[bytes]) -> "tuple[str, npt.NDArray[np.int32] | None]":
    try:
        return "", coder.decompress(payloads, threads=1)[0]
    except CorruptPayload as error:
        return str(error), None


@each_path
@given(
    st.integers(0, 2**32),
    st.integers(1, 150),
    st.integers(0, 70),
    st.integers(1, 40),
    LANES,
    st.sampled_from([2, 16, 17, 40, 64, 80, 256]),
)
@settings(max_examples=240 // VECTOR_PATHS, deadline=None)
def test_both_paths_write_and_read_the_same_bytes(
    path: str, seed: int, channels: int, tokens: int, tiles: int, lanes: int, most: int
) -> None:
    """Tables for one register, for several, and too wide; symbols without an entry among the others."""
    rng = np.random.default_rng(seed)
    tables = random_tables(rng, channels, 12, most)
    symbols = symbols_of(rng, tables, tiles, tokens)
    wild = rng.random(symbols.shape) < rng.choice([0, 0.02])
    symbols[wild] = rng.integers(-(2**31), 2**31, int(wild.sum()))
    scalar, fast = on("scalar", tables, tokens), on(path, tables, tokens)
    payloads = compress(scalar, symbols, lanes)
    assert compress(fast, symbols, lanes) == payloads
    assert np.array_equal(fast.decompress(payloads, threads=1)[0], symbols)
    assert np.array_equal(scalar.decompress(payloads, threads=1)[0], symbols)


@each_path
def test_tiles_of_several_numbers_of_lanes_are_decoded_together(path: str) -> None:
    rng = np.random.default_rng(5)
    tables = random_tables(rng, 40, 12, 30)
    symbols = symbols_of(rng, tables, 90, 21)
    coder = on(path, tables, 21)
    mixed = [compress(coder, symbols[i : i + 1], int(rng.choice([1, 1, 2, 4, 8, 16])))[0] for i in range(len(symbols))]
    assert np.array_equal(coder.decompress(mixed, threads=1)[0], symbols)


@each_path
@pytest.mark.parametrize("lanes", [1, 8, 16])
def test_both_paths_refuse_the_same_damage(path: str, lanes: int) -> None:
    """Whatever the words are: the same symbols, or the same message about the same tile."""
    rng = np.random.default_rng(lanes)
    refused = read = 0
    for _ in range(60 // VECTOR_PATHS):
        tables = random_tables(rng, int(rng.integers(1, 60)), 12, int(rng.choice([5, 40, 256])))
        tokens = int(rng.integers(1, 60))
        scalar, fast = on("scalar", tables, tokens), on(path, tables, tokens)
        whole = compress(fast, symbols_of(rng, tables, 11, tokens), lanes)
        for _ in range(20):
            batch = list(whole)
            for i in rng.integers(0, len(batch), int(rng.integers(1, 4))).tolist():
                body = mutate(rng, body_of(batch[i]), body_of(whole[0])) if rng.random() < 0.5 else body_of(batch[i])
                # The flags as they are, and other words: as many, more or fewer.
                noise = rng.bytes(max(0, len(body) - 1 + int(rng.integers(-4, 5)) * 2))
                batch[i] = framed(body if rng.random() < 0.5 else body_of(whole[i])[:1] + noise)
            (says, expected), (also, got) = outcome(scalar, batch), outcome(fast, batch)
            assert also == says
            assert (got is None) == (expected is None)
            assert got is None or expected is None or np.array_equal(got, expected)
            refused += got is None
            read += got is not None
    assert refused > 100
    assert read > 20


@each_path
def test_damage_in_the_second_layer_leaves_the_first_readable(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NEC_CODEC_PATH", path)
    rng = np.random.default_rng(11)
    tables = random_tables(rng, 40, 12, 40)
    layers = [LayerSpec(channels=24, tokens=50), LayerSpec(channels=16, tokens=50)]
    scalar, fast = (PayloadCoder(tables, layers, scalar=scalar) for scalar in (True, False))
    symbols = symbols_of(rng, tables, 40, 50)
    whole = list(fast.compress(symbols))
    assert list(scalar.compress(symbols)) == whole
    cut = fast.layer_lengths(whole)[:, 0].tolist()
    refused = 0
    for _ in range(50):
        batch = list(whole)
        for i in rng.integers(0, len(batch), 3).tolist():
            second = mutate(rng, body_of(whole[i][cut[i] :]), body_of(whole[0][cut[0] :]))
            batch[i] = whole[i][: cut[i]] + framed(second or b"\0")
        (says, expected), (also, got) = outcome(scalar, batch), outcome(fast, batch)
        assert also == says
        assert got is None or expected is None or np.array_equal(got, expected)
        assert np.array_equal(fast.decompress(batch, layers=1)[0], symbols[:, :, :24])
        refused += got is None
    assert refused > 20


@each_path
@pytest.mark.parametrize("lanes", [1, 8, 16])
@pytest.mark.parametrize("frequency", [1, 2, 2047, 2048, 2049, 3000, 4094, 4095])
def test_frequencies_at_the_reciprocals_limits(path: str, frequency: int, lanes: int) -> None:
    rng = np.random.default_rng(frequency)
    cdf = np.array([0, frequency, 4096], np.uint32)
    tables = EntropyTables(
        precision=12,
        cdf=np.tile(cdf, 3),
        start=np.array([0, 3, 6, 9]),
        offset=np.zeros(3, np.int32),
        shift=np.zeros(9, np.uint8),
        run_cdf=np.zeros(0, np.uint32),
        run_start=np.zeros(4, np.int64),
        median=np.zeros(3, np.float32),
    )
    symbols = rng.integers(0, 2, (33, 700, 3)).astype(np.int32)
    assert compress(on(path, tables, 700), symbols, lanes) == compress(on("scalar", tables, 700), symbols, lanes)


def test_division_by_every_frequency() -> None:
    """Of the states that a quotient begins and ends with, the first, the last and some between."""
    rng = np.random.default_rng(0)
    for f in range(1, 4097):
        reciprocal, shift, more = vector.divisor(f)
        assert 0 <= reciprocal < 1 << 32
        quotient = np.concatenate([[1, (1 << 20) - 1], rng.integers(0, 1 << 20, 50)]).astype(np.uint64)
        for x in (quotient * np.uint64(f), quotient * np.uint64(f) + np.uint64(f - 1)):
            product = (x + np.uint64(more)) * np.uint64(reciprocal)
            assert np.all(x + np.uint64(more) < 1 << 32)
            assert np.array_equal(product >> np.uint64(32 + shift), quotient)


def test_what_both_files_state_is_the_same() -> None:
    assert (vector.LOWER, vector.WORDS, vector.SPARE) == (rans.LOWER, rans.WORDS, rans.SPARE)


def test_the_path_can_be_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    for has_avx512, has_avx2, best in ((True, True, "avx512"), (False, True, "avx2"), (False, False, "scalar")):
        monkeypatch.setattr(vector512, "available", lambda has=has_avx512: has)
        monkeypatch.setattr(vector, "available", lambda has=has_avx2: has)
        monkeypatch.delenv("NEC_CODEC_PATH", raising=False)
        assert paths.chosen() == best
        monkeypatch.setenv("NEC_CODEC_PATH", "scalar")
        assert paths.chosen() == "scalar"
        for name, has in (("vector", has_avx2), ("avx2", has_avx2), ("avx512", has_avx512)):
            monkeypatch.setenv("NEC_CODEC_PATH", name)
            if has:
                assert paths.chosen() == (best if name == "vector" else name)
            else:
                with pytest.raises(ValueError, match=f"NEC_CODEC_PATH is {name}, but this processor"):
                    paths.chosen()
    monkeypatch.setenv("NEC_CODEC_PATH", "fast")
    with pytest.raises(ValueError, match='or "avx512", not "fast"'):
        paths.chosen()


def test_what_the_processor_lacks_is_neither_compiled_nor_called(monkeypatch: pytest.MonkeyPatch) -> None:
    def called(*_: object) -> None:
        raise AssertionError("the vector path")

    monkeypatch.delenv("NEC_CODEC_PATH", raising=False)
    for kernels in paths.VECTOR.values():
        monkeypatch.setattr(kernels, "available", lambda: False)
        monkeypatch.setattr(kernels, "encode_dense", called)
        monkeypatch.setattr(kernels, "decode_dense", called)
    rng = np.random.default_rng(0)
    tables = random_tables(rng, 9, 12, 20)
    coder = PayloadCoder(tables, [LayerSpec(channels=9, tokens=700)])
    symbols = symbols_of(rng, tables, 40, 700)
    payloads = coder.compress(symbols)
    assert np.array_equal(coder.decompress(payloads)[0], symbols)
    for kernels in paths.VECTOR.values():  # where it is, the same call takes the path
        with monkeypatch.context() as patch:
            patch.setattr(kernels, "available", lambda: True)
            fast = PayloadCoder(tables, [LayerSpec(channels=9, tokens=700)])
        with pytest.raises(AssertionError, match="the vector path"):
            fast.compress(symbols)

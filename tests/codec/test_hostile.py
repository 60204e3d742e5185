"""Damaged and hostile payloads: a typed error or the very symbols, never a crash, a hang or a large allocation.

The kernels run without bounds checks, so many are tried; NEC_FUZZ_SECONDS=3600 goes on for an hour,
and NEC_FUZZ_SEED=7 takes others. Mutants get
right checksums and lengths as often as not, so that what lies behind those is reached.
"""

import os
import subprocess
import sys
import time
import tracemalloc
import zlib
from pathlib import Path

import numpy as np
import pytest

from nec_ray.codec import EntropyTables, LayerSpec, PayloadCoder, paths
from nec_ray.codec.payload import Payloads
from nec_ray.errors import CorruptPayload
from tests.codec.make import (
    SCALES,
    laplacian_pmf,
    laplacian_symbols,
    laplacian_tables,
    random_tables,
    symbols_of,
)
from tests.codec.slow_rans import payload_decoder, varint

ROOT = Path(__file__).resolve().parents[2]
MUTANTS = int(os.environ.get("NEC_FUZZ_MUTANTS", "220000"))
SECONDS = float(os.environ.get("NEC_FUZZ_SECONDS", "0"))


def framed(body: bytes) -> bytes:
    """A layer with a right length and checksum."""
    return varint(len(body)) + zlib.crc32(body).to_bytes(4, "little") + body


def body_of(layer: bytes) -> bytes:
    at = next(i for i, byte in enumerate(layer) if byte < 128) + 1
    return layer[at + 4 :]


class Target:
    """A coder, payloads of it, and the symbols that they stand for."""

    def __init__(self, tables: EntropyTables, layers: list[LayerSpec], symbols: np.ndarray) -> None:  # type: ignore[type-arg]
        self.coder = PayloadCoder(tables, layers)
        self.tokens = layers[0].tokens
        self.channels = tables.channels
        self.payloads = list(self.coder.compress(symbols))
        self.lengths = self.coder.layer_lengths(self.payloads).tolist()
        self.symbols = dict(zip(self.payloads, symbols, strict=True))

    def bodies(self, payload: int) -> list[bytes]:
        bodies, at = [], 0
        for length in self.lengths[payload]:
            bodies.append(body_of(self.payloads[payload][at : at + length]))
            at += length
        return bodies


def targets() -> list[Target]:
    """Every kind of channel; many lanes; raw bits; 16 bits of precision."""
    rng = np.random.default_rng(0)
    mixed = laplacian_symbols(rng, SCALES, 6, 16)
    mixed[0, 3, 2], mixed[1, 5, 20] = 77, -(2**31)
    wide = laplacian_pmf(900.0, 9000)
    raw = EntropyTables.from_pmf([wide] * 6, np.full(6, -9000), np.zeros(6), np.zeros(6, bool), 500)
    many = np.geomspace(0.05, 8, 48)
    rare = np.array([0.9, *[0.1 / 250] * 250])
    fine = EntropyTables.from_pmf([rare] * 4, np.full(4, -30), np.zeros(4), np.zeros(4, bool), 9)
    assert fine.precision > 12
    return [
        Target(laplacian_tables(SCALES), [LayerSpec(channels=10, tokens=16), LayerSpec(channels=14, tokens=16)], mixed),
        Target(laplacian_tables(many), [LayerSpec(channels=48, tokens=900)], laplacian_symbols(rng, many, 2, 900)),
        Target(
            raw,
            [LayerSpec(channels=6, tokens=500)],
            np.rint(rng.laplace(0, 900, (2, 500, 6))).astype(np.int32),
        ),
        Target(fine, [LayerSpec(channels=4, tokens=9)], rng.integers(-30, 240, (4, 9, 4)).astype(np.int32)),
    ]


def mutate(rng: np.random.Generator, data: bytes, other: bytes) -> bytes:
    """Bit flips, truncation, splices, insertions, lying numbers."""
    out = bytearray(data)
    for _ in range(int(rng.integers(1, 4))):
        kind = rng.integers(0, 7)
        at = int(rng.integers(0, max(1, min(len(out), 24) if rng.random() < 0.5 else len(out))))
        if kind == 0 and out:
            out[min(at, len(out) - 1)] ^= 1 << int(rng.integers(0, 8))
        elif kind == 1:
            del out[at:]
        elif kind == 2:
            cut = int(rng.integers(0, len(other) + 1))
            out[at:] = other[cut:]
        elif kind == 3:
            out[at:at] = rng.bytes(int(rng.integers(1, 9)))
        elif kind == 4:
            out[at : at + 1] = varint(int(rng.integers(0, 1 << int(rng.integers(1, 40)))))
        elif kind == 5:
            out[at : at + 4] = [b"\xff\xff\xff\xff", b"\0\0\0\0", b"\0\0\1\0"][int(rng.integers(0, 3))]
        else:
            del out[at : at + int(rng.integers(1, 9))]
    return bytes(out)


def mutant(rng: np.random.Generator, target: Target) -> bytes:
    number, other = rng.integers(0, len(target.payloads), 2)
    if rng.random() < 0.3:
        return mutate(rng, target.payloads[number], target.payloads[other])
    bodies, others = target.bodies(number), target.bodies(other)
    which = int(rng.integers(0, len(bodies)))
    bodies[which] = mutate(rng, bodies[which], others[int(rng.integers(0, len(others)))])
    return b"".join(map(framed, bodies))


@pytest.mark.timeout(int(SECONDS) + 600)
def test_mutated_payloads_give_a_typed_error_or_symbols_of_the_right_shape() -> None:
    """The paths of this processor share the mutants."""
    rng = np.random.default_rng(int(os.environ.get("NEC_FUZZ_SEED", "1")))
    chosen = []
    for path in paths.available():
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("NEC_CODEC_PATH", path)
            chosen += targets()
    started = time.monotonic()
    tried = refused = 0
    while tried < MUTANTS or time.monotonic() - started < SECONDS:
        target = chosen[tried // 500 % len(chosen)]
        for _ in range(500):
            payload = mutant(rng, target)
            tried += 1
            try:
                [symbols] = target.coder.decompress([payload], threads=1)
            except CorruptPayload:
                refused += 1
                continue
            assert symbols.shape[0] == 1
            assert symbols.shape[1] <= target.tokens
            assert symbols.shape[2] == target.channels
            if payload in target.symbols:
                assert np.array_equal(symbols[0], target.symbols[payload])
    assert refused > 0.5 * tried


def test_the_decoder_in_schemas_refuses_what_the_fast_one_refuses() -> None:
    """Both read the same damaged layers to the same symbols, or neither does."""
    rng = np.random.default_rng(3)
    slow = payload_decoder()
    tables = laplacian_tables(SCALES)
    layers = [LayerSpec(channels=24, tokens=7)]
    symbols = laplacian_symbols(rng, SCALES, 4, 7)
    symbols[:, ::2, ::3] += 5000  # escapes can be changed and still be right
    target = Target(tables, layers, symbols)
    arrays = {name: array.tolist() for name, array in tables.to_tensors().items()}
    channels = [slow.Channel(arrays, row) for row in range(24)]
    agreed = 0
    for _ in range(3000):
        body = mutate(rng, target.bodies(int(rng.integers(0, 4)))[0], target.bodies(0)[0])
        if not body:
            continue
        try:
            [fast] = target.coder.decompress([framed(body)])
        except CorruptPayload:
            with pytest.raises(slow.DamagedPayloadError):
                slow.decode_layer(body, channels, 7, tables.precision)
            continue
        expected = np.array(slow.decode_layer(body, channels, 7, tables.precision)).reshape(fast[0].shape)
        assert np.array_equal(fast[0], expected)
        agreed += 1
    assert agreed > 20


def test_damaged_tiles_among_others_do_no_harm_under_any_tables() -> None:
    """Batches are coded four tiles at a time, from one buffer: each tile comes out as it does alone, or is named."""
    rng = np.random.default_rng(int(os.environ.get("NEC_FUZZ_SEED", "2")))
    named: list[bool] = []
    whole = 0
    for _ in range(max(1, MUTANTS // 1100)):
        tables = random_tables(rng, int(rng.integers(1, 90)), int(rng.choice([12, 12, 14, 16])))
        tokens = int(rng.integers(1, 40))
        layers = [LayerSpec(channels=tables.channels, tokens=tokens)]
        target = Target(tables, layers, symbols_of(rng, tables, 11, tokens))
        for _ in range(10):
            batch = [mutant(rng, target) if rng.random() < 0.1 else payload for payload in target.payloads]
            alone = [outcome(target.coder, payload) for payload in batch]
            if any(one is not None and one.shape != alone[0].shape for one in alone if alone[0] is not None):
                continue  # of another number of tokens: refused as a batch
            try:
                [together] = target.coder.decompress(batch)
            except CorruptPayload as error:
                named.append(alone[0] is None or alone[error.payload or 0] is None)
                continue
            assert all(one is not None and np.array_equal(one, many) for one, many in zip(alone, together, strict=True))
            whole += 1
    assert named
    assert all(named)
    assert whole


def outcome(coder: PayloadCoder, payload: bytes) -> "np.ndarray | None":  # type: ignore[type-arg]
    """What a payload decodes to by itself, None where it is refused."""
    try:
        return coder.decompress([payload], threads=1)[0][0]
    except CorruptPayload:
        return None


@pytest.mark.skipif("NUMBA_BOUNDSCHECK" in os.environ, reason="this is that run")
def test_the_kernels_stay_within_their_arrays(tmp_path: Path) -> None:
    """The same mutants with numba's bounds checks on, which make of a step outside an array an IndexError."""
    environment = os.environ | {
        "NUMBA_BOUNDSCHECK": "1",
        "NUMBA_CACHE_DIR": str(tmp_path),
        "NEC_FUZZ_MUTANTS": "20000",
        "NEC_FUZZ_SECONDS": "0",
    }
    files = [f"tests/codec/test_{name}.py" for name in ("hostile", "payload", "vector")]
    command = [sys.executable, "-m", "pytest", "-q", "-x", *files]
    chosen = ["-k", "mutated or damage or golden or integer or dearest or lanes_that or both_paths or frequencies"]
    done = subprocess.run([*command, *chosen], cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-3000:]


def test_every_single_bit_flip_is_noticed() -> None:
    target = targets()[0]
    for bit in range(8 * len(target.payloads[0])):
        damaged = bytearray(target.payloads[0])
        damaged[bit // 8] ^= 1 << bit % 8
        with pytest.raises(CorruptPayload, match=r"layer [12]"):
            target.coder.decompress([bytes(damaged)])


def test_every_truncation_is_noticed() -> None:
    target = targets()[0]
    for length in range(len(target.payloads[0])):
        with pytest.raises(CorruptPayload, match="cut off"):
            target.coder.decompress([target.payloads[0][:length]])


def test_one_damaged_payload_among_many_is_named_and_harms_no_other() -> None:
    """The words of all tiles lie in one buffer: one that asks for too many must not shift its neighbours."""
    target = targets()[1]
    bodies = target.bodies(0)
    short = framed(bodies[0][: len(bodies[0]) // 2 // 2 * 2])
    with pytest.raises(CorruptPayload, match="payload 1: layer 1: its words do not decode") as caught:
        target.coder.decompress([target.payloads[0], short, target.payloads[1]])
    assert caught.value.payload == 1


def test_tiles_of_different_sizes_are_not_mixed() -> None:
    target = targets()[0]
    smaller = target.coder.compress(np.zeros((1, 9, 24), np.int32))
    with pytest.raises(CorruptPayload, match="payload 1: a layer of 9 tokens among ones of 16"):
        target.coder.decompress([target.payloads[0], smaller[0]])


def test_lying_numbers_allocate_nothing() -> None:
    """A short payload that claims a lot costs no more memory than the codec's shape."""
    coder = PayloadCoder(laplacian_tables(SCALES), [LayerSpec(channels=24, tokens=100)])
    lies = [
        varint(2**34) + b"\0\0\0\0" + b"\0" * 8,
        framed(b"\x08" + varint(2**34)),
        framed(b"\x18" + varint(100) + varint(2**34)),
        framed(b"\x10" + varint(2400) + b"\x01\x01"),
        framed(b"\x04" + b"\xff" * 30),
        framed(b"\x05"),
        framed(b"\x20"),
        b"\xff" * 50,
        b"",
    ]
    coder.decompress([])
    for lie in lies:
        tracemalloc.start()
        with pytest.raises(CorruptPayload):
            coder.decompress([lie])
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < 100_000


def test_payloads_cut_from_a_larger_buffer_do_not_read_past_their_end() -> None:
    target = targets()[0]
    joined = Payloads.of(target.payloads)
    shorter = Payloads(joined.data, joined.start, joined.length - 1)
    with pytest.raises(CorruptPayload, match="payload 0: layer 2: cut off"):
        target.coder.decompress(shorter)

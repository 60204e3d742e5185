"""The vector paths on damaged batches, its arrays between pages that no one may touch.

numba's bounds checks do not see into the intrinsics; the processor does: a step outside ends the process. Every tile
is compared with the scalar path's, refused or read.
"""

import ctypes
import os
from types import ModuleType
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from nec_ray.codec import EntropyTables, LayerSpec, PayloadCoder, Payloads, paths, payload, rans
from tests.codec.make import EACH_VECTOR_PATH, VECTOR_PATHS, coder_on, random_tables, symbols_of
from tests.codec.test_hostile import body_of, framed, mutate

TABLES = int(os.environ.get("NEC_FUZZ_TABLES", "250")) // VECTOR_PATHS
BATCHES = 20
PAGE = 4096
_NONE, _READ_WRITE, _PRIVATE_ANONYMOUS = 0, 3, 0x22

libc: Any = ctypes.CDLL(None)
libc.mmap.restype = ctypes.c_void_p
libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
libc.mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]


class Guarded:
    """Copies of arrays, each directly behind or directly before a page without access."""

    def __init__(self, at_end: bool) -> None:
        self._at_end = at_end
        self._maps: list[tuple[int, int]] = []

    def copy(self, array: Any) -> Any:
        if not isinstance(array, np.ndarray) or not array.nbytes:
            return array
        body = -(-array.nbytes // PAGE) * PAGE
        base = libc.mmap(None, body + 2 * PAGE, _READ_WRITE, _PRIVATE_ANONYMOUS, -1, 0)
        libc.mprotect(base, PAGE, _NONE)
        libc.mprotect(base + PAGE + body, PAGE, _NONE)
        self._maps.append((base, body + 2 * PAGE))
        at = base + PAGE + (body - array.nbytes if self._at_end else 0)
        buffer: Any = (ctypes.c_uint8 * array.nbytes).from_address(at)
        made = np.frombuffer(buffer, np.uint8).view(array.dtype).reshape(array.shape)
        made[...] = array
        made.flags.writeable = array.flags.writeable
        return made

    def copies(self, arrays: Any) -> Any:
        return type(arrays)(*map(self.copy, arrays))

    def free(self) -> None:
        for base, size in self._maps:
            libc.munmap(base, size)


def guard(kernels: ModuleType, monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """Guards around what the vector kernels are given; counts their calls."""
    real_decode, real_encode = kernels.decode_dense, kernels.encode_dense
    calls = {"decode": 0, "encode": 0}

    def decode(words, at, stop, state, faults, some, first, channels, dense, narrow, out):  # type: ignore[no-untyped-def]
        calls["decode"] += 1
        guard = Guarded(calls["decode"] % 2 == 0)
        symbols, states = guard.copy(out), guard.copy(state)
        tables = guard.copies(dense), guard.copies(narrow)
        real_decode(guard.copy(words), at, stop, states, faults, some, first, channels, *tables, symbols)
        out[...], state[...] = symbols, states
        del symbols, states, tables
        guard.free()

    def encode(symbols, marks, words, at, state, some, first, channels, dense, narrow):  # type: ignore[no-untyped-def]
        calls["encode"] += 1
        guard = Guarded(calls["encode"] % 2 == 0)
        room, states = guard.copy(words), guard.copy(state)
        tables = guard.copies(dense), guard.copies(narrow)
        real_encode(guard.copy(symbols), marks, room, at, states, some, first, channels, *tables)
        words[...], state[...] = room, states
        del room, states, tables
        guard.free()

    monkeypatch.setattr(kernels, "decode_dense", decode)
    monkeypatch.setattr(kernels, "encode_dense", encode)
    return calls


def compress(coder: PayloadCoder, symbols: npt.NDArray[np.int32], lanes: int) -> list[bytes]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(coder._layers[0]), "lanes_log2", lambda *_: lanes.bit_length() - 1)
        return list(coder.compress(symbols, threads=1))


def decode_each(
    coder: PayloadCoder, batch: list[bytes]
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64], npt.NDArray[np.int32]]:
    """(tiles whose frames hold, what is wrong with each of them, their symbols)."""
    given, layer = Payloads.of(batch), coder._layers[0]
    bodies, faults = np.zeros((len(batch), 5), np.int64), np.zeros(len(batch), np.int64)
    rans.open_layers(given.data, given.start, given.start + given.length, layer.tokens, bodies, faults)
    tiles = np.flatnonzero((faults == rans.FINE) & (bodies[:, 3] == layer.tokens))
    out = np.full((len(tiles), layer.tokens, layer.channels), 12345, np.int32)
    return tiles, payload._decode(layer, given.data, bodies[tiles], out), out


def damaged(rng: np.random.Generator, tile: bytes, other: bytes) -> bytes:
    """Mutated, of noise as words, of endless states, or cut."""
    body, kind = body_of(tile), rng.integers(0, 4)
    if kind == 0:
        return framed(mutate(rng, body, body_of(other)) or b"\0")
    if kind == 1:
        states = np.maximum(rng.integers(0, 2**32, 1 << (body[0] & 7)), rans.LOWER).astype("<u4").tobytes()
        return framed(bytes([body[0] & 15]) + states + rng.bytes(2 * int(rng.integers(0, 30))))
    if kind == 2:
        return framed(bytes([int(rng.choice([0, 3, 4]))]) + b"\0\0\1\0" * 16)
    return framed(body[: len(body) - 2 * int(rng.integers(1, 6))] or b"\0")


@pytest.mark.parametrize("path", EACH_VECTOR_PATH)
def test_damaged_tiles_among_many_leave_no_array_and_harm_no_neighbour(
    path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = guard(paths.VECTOR[path], monkeypatch)
    rng = np.random.default_rng(int(os.environ.get("NEC_FUZZ_SEED", "4")))
    read = refused = 0
    for _ in range(TABLES):
        channels, tokens = int(rng.choice([1, 5, 15, 16, 17, 33, 70])), int(rng.choice([1, 2, 3, 8, 9, 16, 17, 33, 64]))
        tables: EntropyTables = random_tables(rng, channels, 12, int(rng.choice([2, 16, 17, 40, 64, 80, 256])))
        layers = [LayerSpec(channels=channels, tokens=tokens)]
        scalar, fast = coder_on("scalar", tables, layers), coder_on(path, tables, layers)
        symbols = symbols_of(rng, tables, int(rng.integers(33, 71)), tokens)
        by_lanes = [compress(fast, symbols, lanes) for lanes in (1, 2, 4, 8, 16)]
        assert by_lanes[3] == compress(scalar, symbols, 8)
        whole = [by_lanes[int(rng.choice([0, 0, 0, 1, 2, 3, 4]))][i] for i in range(len(symbols))]
        for _ in range(BATCHES):
            hit = set(rng.integers(0, len(whole), int(rng.integers(1, len(whole)))).tolist())
            batch = [damaged(rng, tile, whole[0]) if i in hit else tile for i, tile in enumerate(whole)]
            tiles, faults, expected = decode_each(scalar, batch)
            also, same, found = decode_each(fast, batch)
            assert np.array_equal(also, tiles)
            assert np.array_equal(same, faults)
            fine = faults == rans.FINE
            assert np.array_equal(found[fine], expected[fine])
            for k, i in enumerate(tiles.tolist()):
                assert i in hit or (fine[k] and np.array_equal(found[k], symbols[i]))
            read, refused = read + int(fine.sum()), refused + len(hit)
    assert read > 100
    assert refused > TABLES * BATCHES
    assert min(calls.values()) > TABLES

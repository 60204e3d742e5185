"""An obvious payload encoder in plain Python: the compiled one must write its very bytes."""

import importlib.util
import itertools
import zlib
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Protocol

LOWER = 1 << 16


def payload_decoder() -> ModuleType:
    """The decoder that lies in schemas/, loaded as the lone file that it is."""
    path = Path(__file__).resolve().parents[2] / "schemas" / "payload_decoder.py"
    spec = importlib.util.spec_from_file_location("payload_decoder", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class Channel(Protocol):
    """The tables of one channel, as the decoder in schemas/ holds them."""

    cdf: list[int]
    runs: list[int]
    firsts: list[int]
    shifts: list[int]


def varint(value: int) -> bytes:
    out = []
    while True:
        value, low = divmod(value, 128)
        out.append(low + (128 if value else 0))
        if not value:
            return bytes(out)


class Encoder:
    """One rANS state and the words it wrote, the last one first."""

    def __init__(self, state: int, words: list[int]) -> None:
        self.state, self.words = state, words

    def put(self, below: int, frequency: int, precision: int) -> None:
        while self.state >= frequency * 2 ** (32 - precision):
            self.words.append(self.state % 2**16)
            self.state //= 2**16
        self.state = self.state // frequency * 2**precision + below + self.state % frequency


def encode_layer(
    columns: Sequence[Sequence[int]], channels: Sequence[Channel], declared: int, precision: int, lanes: int
) -> bytes:
    """Bytes of a layer whose symbols are [channel][token]."""
    tokens = len(columns[0])
    escapes, dense, sparse = [], [], []
    for c, channel in enumerate(channels):
        low, high = (channel.firsts[0], channel.firsts[-1] - 1) if channel.cdf else (0, 0)
        coded = [min(max(value, low), high) for value in columns[c]]
        escapes += [(c * tokens + t, v) for t, v in enumerate(columns[c]) if v != coded[t]]
        if channel.runs:
            sparse += run_steps(coded, channel)
        elif channel.cdf:
            for t, value in enumerate(coded):
                dense += [(t % lanes, *one) for one in symbol_steps(value, channel, precision)]
    live = [channel for channel in channels if channel.cdf]
    has_dense = any(not channel.runs for channel in live)
    body = b""
    if escapes:
        body += varint(len(escapes))
        for (before, _), (position, value) in itertools.pairwise([(0, 0), *escapes]):
            body += varint(position - before) + varint(2 * value if value >= 0 else -2 * value - 1)
    if tokens != declared:
        body = varint(tokens) + body
    flags = (8 if tokens != declared else 0) + (16 if escapes else 0)
    if live and tokens:
        stream: list[int] = []
        if any(channel.runs for channel in live):
            one = Encoder(LOWER, stream)
            for (below, frequency), bits in reversed(sparse):
                one.put(below, frequency, bits)
            stream += [one.state % 2**16, one.state // 2**16]
        stream.reverse()
        words: list[int] = []
        states = [Encoder(LOWER + word, words) for word in [*stream, *[0] * lanes][:lanes]] if has_dense else []
        for lane, (below, frequency), bits in reversed(dense):
            states[lane].put(below, frequency, bits)
        flags += lanes.bit_length() - 1 if has_dense else 0
        body += b"".join(one.state.to_bytes(4, "little") for one in states)
        rest = stream[lanes:] if has_dense else stream
        body += b"".join(word.to_bytes(2, "little") for word in [*reversed(words), *rest])
    body = bytes([flags]) + body
    return varint(len(body)) + zlib.crc32(body).to_bytes(4, "little") + body


def step(cdf: Sequence[int], entry: int) -> tuple[int, int]:
    return cdf[entry], cdf[entry + 1] - cdf[entry]


def symbol_steps(value: int, channel: Channel, precision: int) -> list[tuple[tuple[int, int], int]]:
    """((cumulative frequency, frequency), bits) of the entry of a symbol and of its raw bits."""
    entry = next(i for i in range(len(channel.cdf) - 1) if value < channel.firsts[i + 1])
    bits = channel.shifts[entry]
    raw = [((value - channel.firsts[entry], 1), bits)] if bits else []
    return [(step(channel.cdf, entry), precision), *raw]


def run_steps(column: Sequence[int], channel: Channel) -> list[tuple[tuple[int, int], int]]:
    """The steps of each run and each symbol between runs."""
    steps, t = [], 0
    while t < len(column):
        most = min(len(channel.runs) - 2, len(column) - t)
        run = next((r for r in range(most) if column[t + r]), most)
        if run == most:
            steps.append(((channel.runs[most], 2**16 - channel.runs[most]), 16))
            t += most
        else:
            steps += [(step(channel.runs, run), 16), *symbol_steps(column[t + run], channel, 16)]
            t += run + 1
    return steps

"""An obvious rANS decoder and encoder in plain Python: the oracle for the compiled one."""

import zlib
from collections.abc import Sequence

LOWER = 1 << 16


def varint(value: int) -> bytes:
    out = []
    while True:
        value, low = divmod(value, 128)
        out.append(low + (128 if value else 0))
        if not value:
            return bytes(out)


class Reader:
    def __init__(self, data: bytes) -> None:
        self.data, self.at = data, 0

    def varint(self) -> int:
        value, factor = 0, 1
        while True:
            byte = self.data[self.at]
            self.at += 1
            value += (byte % 128) * factor
            factor *= 128
            if byte < 128:
                return value

    def uint(self, size: int) -> int:
        self.at += size
        return int.from_bytes(self.data[self.at - size : self.at], "little")


Table = tuple[int, list[int]]  # first symbol, frequencies; an empty list is a dead channel


def decode_layer(reader: Reader, tables: Sequence[Table], precision: int) -> list[list[int]]:
    """Symbols [channel][token] of the layer at the reader."""
    length = reader.varint()
    checksum = reader.uint(4)
    end = reader.at + length
    assert zlib.crc32(reader.data[reader.at : end]) == checksum
    tokens = reader.varint()
    escapes, position = [], 0
    for _ in range(reader.varint()):
        position += reader.varint()
        coded = reader.varint()
        escapes.append((position, coded // 2 if coded % 2 == 0 else -(coded // 2) - 1))
    out = [[0] * tokens for _ in tables]
    if tokens and any(frequencies for _, frequencies in tables):
        state = reader.uint(4)
        for c, (first, frequencies) in enumerate(tables):
            for t in range(tokens if frequencies else 0):
                slot = state % 2**precision
                below = i = 0
                while below + frequencies[i] <= slot:
                    below += frequencies[i]
                    i += 1
                state = frequencies[i] * (state // 2**precision) + slot - below
                if state < LOWER:
                    state = state * 2**16 + reader.uint(2)
                out[c][t] = first + i
        assert state == LOWER
    assert reader.at == end
    for position, value in escapes:
        out[position // tokens][position % tokens] = value
    return out


def encode_layer(symbols: list[list[int]], tables: Sequence[Table], precision: int) -> bytes:
    """Bytes of a layer whose symbols are [channel][token]."""
    tokens = len(symbols[0])
    escapes, coded = [], []
    for c, (first, frequencies) in enumerate(tables):
        for t, value in enumerate(symbols[c]):
            inside = min(max(value, first), first + len(frequencies) - 1) if frequencies else 0
            if value != inside:
                escapes.append((c * tokens + t, value))
            if frequencies:
                coded.append((sum(frequencies[: inside - first]), frequencies[inside - first]))
    body = varint(tokens) + varint(len(escapes))
    previous = 0
    for position, value in escapes:
        body += varint(position - previous) + varint(2 * value if value >= 0 else -2 * value - 1)
        previous = position
    if coded:
        state, words = LOWER, []
        for below, frequency in reversed(coded):
            while state >= frequency * 2 ** (32 - precision):
                words.append(state % 2**16)
                state //= 2**16
            state = state // frequency * 2**precision + below + state % frequency
        body += state.to_bytes(4, "little") + b"".join(w.to_bytes(2, "little") for w in reversed(words))
    return varint(len(body)) + zlib.crc32(body).to_bytes(4, "little") + body

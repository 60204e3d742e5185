"""Decodes payloads with nothing but Python: the format of payload.md, as code to read and to port.

    python payload_decoder.py CODEC_DIRECTORY PAYLOAD_FILE

prints each layer's symbols as a JSON array [token][channel] on a line of its own.
"""

import json
import struct
import sys
import zlib
from bisect import bisect_right
from pathlib import Path
from typing import Any

LOWER = 1 << 16
RUN_PRECISION = 16
TYPES = {"I32": "i", "I64": "q", "U8": "B", "U32": "I", "F32": "f"}


class DamagedPayloadError(ValueError):
    """A length, a checksum or a word does not hold."""


def read_arrays(data: bytes) -> dict[str, list[Any]]:
    """The one-dimensional arrays of a safetensors file."""
    (size,) = struct.unpack_from("<Q", data)
    arrays = {}
    for name, entry in json.loads(data[8 : 8 + size]).items():
        if name != "__metadata__" and len(entry["shape"]) == 1:
            begin, end = entry["data_offsets"]
            kind = f"<{entry['shape'][0]}{TYPES[entry['dtype']]}"
            arrays[name] = list(struct.unpack(kind, data[8 + size + begin : 8 + size + end]))
    return arrays


class Channel:
    """One channel's tables."""

    def __init__(self, arrays: dict[str, list[Any]], row: int) -> None:
        self.cdf = arrays["cdf"][arrays["start"][row] : arrays["start"][row + 1]]
        self.runs = arrays["run_cdf"][arrays["run_start"][row] : arrays["run_start"][row + 1]]
        self.shifts = arrays["shift"][arrays["start"][row] : arrays["start"][row + 1]]
        self.firsts = [arrays["offset"][row]]
        """First symbol of each entry."""
        for shift in self.shifts[:-1]:
            self.firsts.append(self.firsts[-1] + (1 << shift))
        if len(self.runs) == 2:
            raise DamagedPayloadError("a run table of one entry, by which runs would never end")


class Words:
    """16-bit words in order."""

    def __init__(self, words: list[int]) -> None:
        self.words = words
        self.at = 0

    def next(self) -> int:
        """The next word."""
        if self.at == len(self.words):
            raise DamagedPayloadError("more words are needed than there are")
        self.at += 1
        return self.words[self.at - 1]

    def left(self) -> list[int]:
        """The words that were not asked for."""
        return self.words[self.at :]


class Lane:
    """One rANS state."""

    def __init__(self, state: int, words: Words) -> None:
        if state < LOWER:
            raise DamagedPayloadError("a state is too small")
        self.state = state
        self.words = words

    def entry(self, cdf: list[int], precision: int) -> int:
        """Decode an entry of a table."""
        slot = self.state % (1 << precision)
        i = bisect_right(cdf, slot) - 1
        self.state = (cdf[i + 1] - cdf[i]) * (self.state >> precision) + slot - cdf[i]
        self._refill()
        return i

    def symbol(self, channel: Channel, precision: int) -> int:
        """Decode a symbol: an entry of the channel's table, and its raw bits if it has any."""
        i = self.entry(channel.cdf, precision)
        return channel.firsts[i] + (self.raw(channel.shifts[i]) if channel.shifts[i] else 0)

    def raw(self, bits: int) -> int:
        """Decode raw bits."""
        value = self.state % (1 << bits)
        self.state >>= bits
        self._refill()
        return value

    def _refill(self) -> None:
        if self.state < LOWER:
            self.state = self.state << 16 | self.words.next()


def varint(data: bytes, at: int) -> tuple[int, int]:
    """A number, and where the next byte is."""
    value = 0
    for i in range(5):
        if at + i >= len(data):
            break
        value |= (data[at + i] & 0x7F) << (7 * i)
        if data[at + i] < 0x80:
            return value, at + i + 1
    raise DamagedPayloadError("a number has no end")


def decode(payload: bytes, codec_json: bytes, tables: bytes, layers: int | None = None) -> list[list[list[int]]]:
    """Symbols [layer][token][channel] of a payload, or of its first layers.

    Args:
        payload: at least those layers' bytes.
        codec_json: the codec's codec.json.
        tables: the codec's tables.safetensors.
        layers: how many to decode; all where it is None.

    Raises:
        DamagedPayloadError: the bytes are not of this format.
    """
    arrays = read_arrays(tables)
    [precision] = arrays["precision"]
    at = row = 0
    decoded = []
    for layer in json.loads(codec_json)["layers"][:layers]:
        length, at = varint(payload, at)
        body = payload[at + 4 : at + 4 + length]
        if len(body) != length or not length:
            raise DamagedPayloadError("cut off")
        if zlib.crc32(body) != int.from_bytes(payload[at : at + 4], "little"):
            raise DamagedPayloadError("the checksum does not match")
        at += 4 + length
        channels = [Channel(arrays, row + c) for c in range(layer["channels"])]
        row += layer["channels"]
        decoded.append(decode_layer(body, channels, layer["tokens"], precision))
    return decoded


def decode_layer(body: bytes, channels: list[Channel], tokens: int, precision: int) -> list[list[int]]:
    """Symbols [token][channel] of a layer's bytes after its checksum."""
    flags, at = body[0], 1
    if flags & 7 > 4 or flags >> 5:
        raise DamagedPayloadError("flags of another version")
    if flags & 8:
        declared = tokens
        tokens, at = varint(body, at)
        if tokens > declared:
            raise DamagedPayloadError("more tokens than declared")
    escapes = []
    if flags & 16:
        count, at = varint(body, at)
        if count > tokens * len(channels):
            raise DamagedPayloadError("more escapes than symbols")
        position = 0
        for n in range(count):
            step, at = varint(body, at)
            coded, at = varint(body, at)
            position += step
            if position >= tokens * len(channels) or (n and not step) or coded >= 1 << 32:
                raise DamagedPayloadError("an escape out of range")
            escapes.append((position, -((coded + 1) >> 1) if coded & 1 else coded >> 1))
    columns = [[0] * tokens for _ in channels]
    dense = [(c, channel) for c, channel in enumerate(channels) if channel.cdf and not channel.runs]
    sparse = [(c, channel) for c, channel in enumerate(channels) if channel.runs]
    if tokens and (dense or sparse):
        decode_words(body[at:], 1 << (flags & 7), dense, sparse, columns, tokens, precision)
    elif at != len(body):
        raise DamagedPayloadError("bytes follow the last escape")
    for position, value in escapes:
        columns[position // tokens][position % tokens] = value
    return [[column[t] for column in columns] for t in range(tokens)]


def decode_words(
    data: bytes,
    lanes: int,
    dense: list[tuple[int, Channel]],
    sparse: list[tuple[int, Channel]],
    columns: list[list[int]],
    tokens: int,
    precision: int,
) -> None:
    """Fill the columns of the dense and of the sparse channels."""
    lanes = lanes if dense else 0
    if len(data) < 4 * lanes or len(data) % 2:
        raise DamagedPayloadError("cut off")
    states = struct.unpack_from(f"<{lanes}I", data)
    words = Words(list(struct.unpack_from(f"<{len(data) // 2 - 2 * lanes}H", data, 4 * lanes)))
    lane = [Lane(state, words) for state in states]
    for c, channel in dense:
        for t in range(tokens):
            here = lane[t % lanes]
            columns[c][t] = here.symbol(channel, precision)
    if any(here.state >= 2 * LOWER for here in lane):
        raise DamagedPayloadError("a lane ends in the wrong state")
    stream = Words([here.state - LOWER for here in lane] + words.left())
    if sparse:
        one = Lane(stream.next() << 16 | stream.next(), stream)
        for c, channel in sparse:
            decode_runs(one, channel, columns[c], tokens)
        if one.state != LOWER:
            raise DamagedPayloadError("the sparse channels end in the wrong state")
    if (words.left() and stream.left()) or any(stream.left()):
        raise DamagedPayloadError("words are left over")


def decode_runs(lane: Lane, channel: Channel, column: list[int], tokens: int) -> None:
    """Fill the column of a sparse channel."""
    t = 0
    while t < tokens:
        most = min(len(channel.runs) - 2, tokens - t)
        run = lane.entry([*channel.runs[: most + 1], 1 << RUN_PRECISION], RUN_PRECISION)
        t += run
        if run < most:
            column[t] = lane.symbol(channel, RUN_PRECISION)
            t += 1


def main() -> None:
    """Print the layers of one payload."""
    codec, file = Path(sys.argv[1]), Path(sys.argv[2])
    arrays = (codec / "codec.json").read_bytes(), (codec / "tables.safetensors").read_bytes()
    for layer in decode(file.read_bytes(), *arrays):
        sys.stdout.write(json.dumps(layer) + "\n")


if __name__ == "__main__":
    main()

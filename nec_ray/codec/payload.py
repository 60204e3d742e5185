"""Payloads: the bytes of one tile's symbols, layer after layer. The format is written up in schemas/payload.md."""

import zlib
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from nec_ray.codec import rans
from nec_ray.codec.spec import LayerSpec
from nec_ray.codec.tables import EntropyTables
from nec_ray.errors import CorruptPayload

_CHECKSUM = 4
_STATE = 4
_MAX_VARINT = 10


def compress(tables: EntropyTables, layers: Sequence[LayerSpec], symbols: npt.NDArray[np.int32]) -> list[bytes]:
    """Payloads of `symbols` int32 (tiles, tokens, channels), one a tile.

    Raises:
        ValueError: the array's type or shape is not the codec's.
    """
    if symbols.ndim != 3 or symbols.dtype != np.int32 or symbols.shape[2] != tables.channels:
        raise ValueError(
            f"symbols must be int32 (tiles, tokens, {tables.channels}), not {symbols.dtype} {symbols.shape}"
        )
    bounds = _bounds(layers)
    widest = max(last - first for first, last in bounds)
    room = np.empty(symbols.shape[1] * widest + 1, np.uint16)
    positions = np.empty(symbols.shape[1] * widest, np.int64)
    return [
        b"".join(_layer(tables, tile, first, last, room, positions) for first, last in bounds)
        for tile in np.ascontiguousarray(symbols)
    ]


def decompress(
    tables: EntropyTables, layers: Sequence[LayerSpec], tokens: int, payload: bytes
) -> npt.NDArray[np.int32]:
    """Symbols int32 (tokens, channels of `layers`) of one payload, or of its first layers.

    Args:
        tables: the codec's tables.
        layers: the layers to decode: all, or the first ones.
        tokens: tokens that the codec declares.
        payload: at least these layers' bytes.

    Raises:
        CorruptPayload: a length, checksum or word does not hold.
    """
    bounds = _bounds(layers)
    symbols = np.zeros((tokens, bounds[-1][1]), np.int32)
    begin = 0
    for number, (first, last) in enumerate(bounds):
        body, begin = _checked_body(payload, begin, number)
        try:
            _decode_layer(tables, body, first, last, symbols)
        except _Damaged as error:
            raise CorruptPayload(f"layer {number + 1}: {error}") from None
    return symbols


def layer_lengths(payload: bytes, layers: int) -> list[int]:
    """Bytes of each of a payload's layers.

    Raises:
        CorruptPayload: the payload is shorter, longer, or fails a checksum.
    """
    lengths = []
    begin = 0
    for number in range(layers):
        _, end = _checked_body(payload, begin, number)
        lengths.append(end - begin)
        begin = end
    if begin != len(payload):
        raise CorruptPayload(f"{len(payload) - begin} bytes follow its last layer")
    return lengths


class _Damaged(Exception):
    """What is wrong inside a layer."""


def _bounds(layers: Sequence[LayerSpec]) -> list[tuple[int, int]]:
    ends = np.cumsum([layer.channels for layer in layers]).tolist()
    return list(zip([0, *ends[:-1]], ends, strict=True))


def _layer(
    tables: EntropyTables,
    tile: npt.NDArray[np.int32],
    first: int,
    last: int,
    room: npt.NDArray[np.uint16],
    positions: npt.NDArray[np.int64],
) -> bytes:
    tokens = tile.shape[0]
    count = rans.find_escapes(tile, first, last, tables.start, tables.offset, positions)
    body = bytearray(_varint(tokens) + _varint(count))
    previous = 0
    for position in positions[:count].tolist():
        value = int(tile[position % tokens, first + position // tokens])
        body += _varint(position - previous) + _varint(value * 2 if value >= 0 else -value * 2 - 1)
        previous = position
    if tokens and tables.start[last] > tables.start[first]:
        begin, state = rans.encode(tile, first, last, tables.cdf, tables.start, tables.offset, tables.precision, room)
        body += int(state).to_bytes(_STATE, "little") + room[begin:].astype("<u2").tobytes()
    checksum = zlib.crc32(body).to_bytes(_CHECKSUM, "little")
    return _varint(len(body)) + checksum + bytes(body)


def _checked_body(payload: bytes, begin: int, number: int) -> tuple[memoryview, int]:
    """Body of the layer that starts at `begin`, and where the next one starts."""
    view = memoryview(payload)
    try:
        length, at = _read_varint(view, begin)
    except _Damaged:
        raise CorruptPayload(f"layer {number + 1}: the payload ends before it") from None
    end = at + _CHECKSUM + length
    if end > len(view):
        raise CorruptPayload(f"layer {number + 1}: cut off, {end - len(view)} bytes are missing")
    body = view[at + _CHECKSUM : end]
    if zlib.crc32(body) != int.from_bytes(view[at : at + _CHECKSUM], "little"):
        raise CorruptPayload(f"layer {number + 1}: its checksum does not match its bytes")
    return body, end


def _decode_layer(
    tables: EntropyTables, body: memoryview, first: int, last: int, symbols: npt.NDArray[np.int32]
) -> None:
    tokens = symbols.shape[0]
    stated, at = _read_varint(body, 0)
    if stated != tokens:
        raise _Damaged(f"it holds {stated} tokens, the codec declares {tokens}")
    count, at = _read_varint(body, at)
    size = (last - first) * tokens
    if count > size:
        raise _Damaged(f"{count} escapes among {size} symbols")
    escapes = []
    position = 0
    for _ in range(count):
        step, at = _read_varint(body, at)
        coded, at = _read_varint(body, at)
        position += step
        value = -((coded + 1) >> 1) if coded & 1 else coded >> 1
        if position >= size or not -(1 << 31) <= value < 1 << 31:
            raise _Damaged("an escape lies outside the tile or the range of int32")
        escapes.append((position, value))
    if tokens and tables.start[last] > tables.start[first]:
        rest = len(body) - at - _STATE
        if rest < 0 or rest % 2:
            raise _Damaged("its words are cut off")
        state = int.from_bytes(body[at : at + _STATE], "little")
        words = np.frombuffer(body, "<u2", rest // 2, at + _STATE).astype(np.uint16)
        if state < rans.LOWER or not rans.decode(
            words, state, first, last, tables.cdf, tables.start, tables.offset, tables.precision, symbols
        ):
            raise _Damaged("its words do not decode")
    elif at != len(body):
        raise _Damaged("bytes follow its last escape")
    for position, value in escapes:
        symbols[position % tokens, first + position // tokens] = value


def _varint(value: int) -> bytes:
    """Unsigned LEB128."""
    out = bytearray()
    while value >= 0x80:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


def _read_varint(view: memoryview, at: int) -> tuple[int, int]:
    value = 0
    for i in range(_MAX_VARINT):
        if at + i >= len(view):
            raise _Damaged("it is cut off")
        byte = view[at + i]
        value |= (byte & 0x7F) << (7 * i)
        if byte < 0x80:
            return value, at + i + 1
    raise _Damaged("a number has no end")

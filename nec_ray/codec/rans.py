"""rANS, compiled by numba: many tiles' symbols to payload layers and back. The format: schemas/payload.md.

Duda, "Asymmetric numeral systems" (arXiv 1311.2540), streaming variant with 32-bit states kept in [2**16, 2**32)
and 16-bit words. The encoder goes backwards, so that the decoder reads forwards.

numba checks no bounds, so every kernel here keeps them by itself: what a payload states is compared with what its
bytes and the codec's shape allow before it is used, and the words of all tiles lie one after the other in one buffer
with as many spare words behind the last as one channel can ask for, so that a pointer checked once a channel cannot
leave it. All kernels are in this file: numba's cache does not notice when a function of another file changes.
"""

# ruff: noqa: PLR0912  (a kernel that is cut up for its length hides what keeps it within bounds)

from typing import Any

import numba
import numpy as np

LOWER = 1 << 16
"""A state's lower bound, where the encoder starts."""
RUN_BITS = 16
"""Precision of sparse channels."""
MAX_LANES_LOG2 = 4
BLOCK = 64
"""Channels that are coded before they are written out: whole cache lines, and few visits to each memory page."""
PART = 16
"""Symbols of a block that are looked at one by one where any of them may need it."""
SPARE = 8
"""Words behind the last that may be read in vain: `vector.SPARE`."""
TOGETHER = 8
"""Tiles that a channel's tables serve before the next channel's turn."""

# What can be wrong with a layer; payload.py has the words for them.
FINE, CUT_OFF, CHECKSUM, FLAGS, TOKENS, ESCAPES, WORDS, TRAILING = range(8)

_HAS_TOKENS = 8
_HAS_ESCAPES = 16


def _crc_tables(count: int) -> Any:
    """For CRC-32 (the polynomial of zlib): what a byte leaves after itself and 0 to `count` - 1 bytes of zeros."""
    tables = np.zeros((count, 256), np.uint32)
    for byte in range(256):
        value = byte
        for _ in range(8):
            value = value >> 1 ^ (0xEDB88320 if value & 1 else 0)
        tables[0, byte] = value
    for k in range(1, count):
        tables[k] = tables[k - 1] >> 8 ^ tables[0][tables[k - 1] & 0xFF]
    return tables


_CRC_NEXT, _CRC_SECOND = _crc_tables(16)[:8], _crc_tables(16)[8:]


@numba.njit(forceinline=True)
def _crc_word(value, data, at, tables):  # type: ignore[no-untyped-def]
    """The checksum `value` after eight bytes, and zeros behind them where the tables are for these."""
    word = np.uint64(value)
    for k in range(8):
        word ^= np.uint64(data[at + np.uint64(k)]) << np.uint64(8 * k)
    value = np.uint32(0)
    for k in range(8):
        value ^= tables[7 - k, word >> np.uint64(8 * k) & np.uint64(0xFF)]
    return value


@numba.njit(cache=True, nogil=True)
def crc32(data, begin, end):  # type: ignore[no-untyped-def]
    """CRC-32 of `data[begin:end]` uint8, as zlib computes it.

    Every other eight bytes have a checksum of their own, as if the others were zeros: a step waits for the one before.
    """
    value, other = np.uint32(0xFFFFFFFF), np.uint32(0)
    at, end = np.uint64(begin), np.uint64(end)
    eight, sixteen = np.uint64(8), np.uint64(16)
    while at + sixteen + sixteen <= end:
        value = _crc_word(value, data, at, _CRC_SECOND)
        other = _crc_word(other, data, at + eight, _CRC_SECOND)
        at += sixteen
    while at + eight <= end:
        value = _crc_word(value, data, at, _CRC_NEXT) ^ other
        other = np.uint32(0)
        at += eight
    while at < end:
        value = _CRC_NEXT[0, (value ^ data[at]) & np.uint32(0xFF)] ^ (value >> np.uint32(8))
        at += np.uint64(1)
    return np.uint32(value ^ np.uint32(0xFFFFFFFF))


@numba.njit(cache=True, nogil=True)
def _copy(source, begin, target, at, count):  # type: ignore[no-untyped-def]
    """Copy `count` bytes."""
    source, target = source[begin : begin + count], target[at : at + count]
    for k in range(np.uint64(count)):
        target[k] = source[k]


@numba.njit(cache=True, nogil=True)
def _varint(data, at, end):  # type: ignore[no-untyped-def]
    """(number, where the next byte is) of the LEB128 at `at`; the second is -1 where it has no end."""
    value = np.int64(0)
    for i in range(5):
        if at + i >= end:
            return np.int64(0), np.int64(-1)
        byte = np.int64(data[at + i])
        value |= (byte & 0x7F) << (7 * i)
        if byte < 0x80:
            return value, np.int64(at + i + 1)
    return np.int64(0), np.int64(-1)


@numba.njit(cache=True, nogil=True)
def _put_varint(out, at, value):  # type: ignore[no-untyped-def]
    while value >= 0x80:
        out[at] = np.uint8(value & 0x7F | 0x80)
        value >>= 7
        at += 1
    out[at] = np.uint8(value)
    return at + 1


@numba.njit(cache=True, nogil=True)
def _varint_size(value):  # type: ignore[no-untyped-def]
    size = 1
    while value >= 0x80:
        value >>= 7
        size += 1
    return size


@numba.njit(cache=True, nogil=True)
def _u32(data, at):  # type: ignore[no-untyped-def]
    return (
        np.uint32(data[at])
        | np.uint32(data[at + 1]) << np.uint32(8)
        | np.uint32(data[at + 2]) << np.uint32(16)
        | np.uint32(data[at + 3]) << np.uint32(24)
    )


@numba.njit(cache=True, nogil=True)
def open_layer(data, begin, end, declared, body):  # type: ignore[no-untyped-def]
    """Check the frame of the layer at `begin` and read its head.

    Args:
        data: uint8, all payloads.
        begin: where the layer starts.
        end: where its payload ends.
        declared: tokens that the codec declares, which is also the most there can be.
        body: int64 (5,), filled with (first byte after the head, where the layer ends, log2 of the lanes,
            tokens, 1 where escapes follow).

    Returns:
        What is wrong, FINE where nothing is.
    """
    length, at = _varint(data, begin, end)
    if at < 0 or length < 1 or at + 4 + length > end:
        return CUT_OFF
    stop = at + 4 + length
    if crc32(data, at + 4, stop) != _u32(data, at):
        return CHECKSUM
    at += 4
    flags = np.int64(data[at])
    at += 1
    if (flags & 7) > MAX_LANES_LOG2 or flags >> 5:
        return FLAGS
    tokens = np.int64(declared)
    if flags & _HAS_TOKENS:
        tokens, at = _varint(data, at, stop)
        if at < 0 or tokens > declared:
            return TOKENS
    body[0], body[1], body[2], body[3] = at, stop, flags & 7, tokens
    body[4] = 1 if flags & _HAS_ESCAPES else 0
    return FINE


@numba.njit(cache=True, nogil=True)
def open_layers(data, begin, end, declared, bodies, faults):  # type: ignore[no-untyped-def]
    """`open_layer` for many payloads; leaves those alone that have a fault already."""
    for i in range(len(begin)):
        if faults[i] == FINE:
            faults[i] = open_layer(data, begin[i], end[i], declared, bodies[i])


@numba.njit(cache=True, nogil=True)
def _escapes(data, at, stop, size, columns, tokens, out, apply):  # type: ignore[no-untyped-def]
    """Read the escapes at `at`; put them into `out` (tokens, channels) where `apply`. Where they end, or -1."""
    count, at = _varint(data, at, stop)
    if at < 0 or count > size:
        return np.int64(-1)
    position = np.int64(0)
    for n in range(count):
        step, at = _varint(data, at, stop)
        if at < 0 or (n > 0 and step == 0):
            return np.int64(-1)
        coded, at = _varint(data, at, stop)
        position += step
        if at < 0 or position >= size or coded >= np.int64(1) << 32:
            return np.int64(-1)
        if apply:
            value = -((coded + 1) >> 1) if coded & 1 else coded >> 1
            out[position % tokens, columns + position // tokens] = np.int32(value)
    return at


@numba.njit(cache=True, nogil=True)
def begin_decoding(data, bodies, faults, first_channel, channels, dense, sparse, out):  # type: ignore[no-untyped-def]
    """Read what precedes the symbols of one layer of many tiles, and clear its columns of `out` where need be.

    Args:
        data: uint8, all payloads.
        bodies: int64 (tiles, 5), from `open_layers`; all of `out`'s number of tokens.
        faults: int64 (tiles,), what is wrong with each tile; those that are not FINE are left alone.
        first_channel: the layer's first channel in `out`.
        channels: the layer's channels.
        dense: the dense channels' tables (`payload.Dense`).
        sparse: the sparse channels' tables (`payload.Sparse`).
        out: int32 (tiles, tokens, channels of the scale), where the symbols will go.

    Returns:
        (the tiles' words uint16 with `SPARE` and two words a token behind the last, where each tile's begin int64,
        where they end int64, its lanes int64 (tiles,), their states uint32 (tiles, 16)).
    """
    tiles, tokens = out.shape[0], out.shape[1]
    size = channels * tokens
    if len(dense.column) < channels:
        if channels == out.shape[2]:
            for i in range(tiles):
                out[i] = 0  # in one piece, which is five times as fast
        else:
            out[:, :, first_channel : first_channel + channels] = 0
    coded = tokens > 0 and (len(dense.column) > 0 or len(sparse.column) > 0)
    lanes = np.ones(tiles, np.int64)
    at = np.zeros(tiles, np.int64)
    stop = np.zeros(tiles, np.int64)
    state = np.zeros((tiles, 1 << MAX_LANES_LOG2), np.uint32)
    total = 0
    for i in range(tiles):
        if faults[i] == FINE:
            total += (bodies[i, 1] - bodies[i, 0]) // 2
    # A dense channel reads at most two words a symbol before its pointer is checked.
    words = np.zeros(total + 2 * tokens + SPARE, np.uint16)
    word_bytes = words.view(np.uint8)  # numba runs on little-endian processors alone
    total = 0
    for i in range(tiles):
        if faults[i] != FINE:
            continue
        here, end = bodies[i, 0], bodies[i, 1]
        if bodies[i, 4]:
            here = _escapes(data, here, end, size, 0, tokens, out[i], False)
            if here < 0:
                faults[i] = ESCAPES
                continue
        if not coded:
            if here != end:
                faults[i] = TRAILING
            continue
        if len(dense.column):
            lanes[i] = 1 << bodies[i, 2]
            if end - here < 4 * lanes[i]:
                faults[i] = WORDS
                continue
            for lane in range(lanes[i]):
                state[i, lane] = _u32(data, here)
                here += 4
                if state[i, lane] < LOWER:
                    faults[i] = WORDS
        if (end - here) % 2:
            faults[i] = WORDS
        if faults[i] != FINE:
            continue
        at[i] = total
        _copy(data, here, word_bytes, 2 * total, end - here)
        total += (end - here) // 2
        stop[i] = total
    return words, at, stop, lanes, state


@numba.njit(cache=True, nogil=True)
def end_decoding(words, at, stop, lanes, state, data, bodies, faults, first_channel, channels, dense, sparse, out):  # type: ignore[no-untyped-def]
    """What follows the dense channels: the sparse ones and the escapes. The arguments are `begin_decoding`'s."""
    tiles, tokens = out.shape[0], out.shape[1]
    if tokens > 0 and (len(dense.column) > 0 or len(sparse.column) > 0):
        _decode_sparse(words, at, stop, state, lanes, faults, len(dense.column) > 0, sparse, out)
    for i in range(tiles):
        if faults[i] == FINE and bodies[i, 4]:
            _escapes(data, bodies[i, 0], bodies[i, 1], channels * tokens, first_channel, tokens, out[i], True)


@numba.njit(cache=True, nogil=True)
def _block(column, first_channel, channels):  # type: ignore[no-untyped-def]
    """[left, right) of the block of columns that one is in; blocks are counted from the layer's first channel."""
    left = first_channel + (column - first_channel) // BLOCK * BLOCK
    return left, min(left + BLOCK, first_channel + channels)


@numba.njit(cache=True, nogil=True)
def decode_dense(words, at, stop, lanes, state, faults, order, first_channel, channels, dense, out):  # type: ignore[no-untyped-def]
    """The dense channels of some tiles, block by block, some tiles at a time.

    The arguments are those that `begin_decoding` takes and gives; `order` is which tiles (int64), those of one lane
    first. It moves `at` and `state`, and sets the faults of tiles that take more words than they have.

    What bounds this is the first-level cache: a channel's table of slots is filled anew, so it serves several tiles
    before the next channel's does, and what they decode to is kept as one byte a symbol until the block's cache lines
    are written whole.
    """
    tokens = out.shape[1]
    width = min(BLOCK, channels)
    block = np.zeros((min(TOGETHER, len(order)), tokens, width), np.uint8)
    wide = np.zeros((min(TOGETHER, len(order)), tokens if dense.wide.any() else 0, width), np.int32)
    # Taken out here, for numba counts references by atomic instructions wherever an array is taken or cut.
    entry, columns, starts, wide_channel = dense.entry, dense.column, dense.start, dense.wide
    table = np.empty(4096, np.uint32)
    last = 0
    while last < len(dense.column):
        first = last
        left, right = _block(dense.column[first], first_channel, channels)
        while last < len(dense.column) and dense.column[last] < right:
            last += 1
        block[:] = 0  # for the columns that are not dense
        offset, is_wide = np.zeros(BLOCK, np.int32), np.zeros(BLOCK, np.bool_)
        for j in range(first, last):
            offset[dense.column[j] - left] = dense.first[dense.start[j]]
            is_wide[dense.column[j] - left] = dense.wide[j]
        for begin in range(0, len(order), TOGETHER):
            some = order[begin : begin + TOGETHER]
            for j in range(first, last):
                plain = dense.precision == 12 and not wide_channel[j] and starts[j + 1] - starts[j] > 1
                column = columns[j] - left
                c = np.uint64(column)
                if plain:
                    _expand(table, entry, starts[j], starts[j + 1])
                n = 0
                while n < len(some):
                    if plain and n + 4 <= len(some) and lanes[some[n + 3]] == 1:
                        _decode_four_tiles(words, at, state, some, n, table, block, c)
                        n += 4
                        continue
                    i = some[n]
                    if plain and lanes[i] >= 4:
                        _decode_four_lanes(words, at, state, i, lanes[i], table, block, n, c)
                    else:
                        at[i] = _decode_channel(words, at[i], state[i], lanes[i], j, dense, block[n], wide[n], column)
                    n += 1
                for i in some:
                    if at[i] > stop[i]:
                        faults[i] = WORDS
                        at[i] = stop[i]  # and on with it, to no avail and no harm
            for n in range(len(some)):
                _write_block(block[n], offset, out[some[n]], left, right)
                if is_wide.any():
                    _write_wide(wide[n], is_wide, out[some[n]], left, right)


@numba.njit(cache=True, nogil=True)
def _write_block(block, offset, tile, left, right):  # type: ignore[no-untyped-def]
    """Entries uint8 (tokens, BLOCK) as symbols to columns [left, right) of a tile: whole cache lines if it is full."""
    begin = np.uint64(left)
    if right - left == BLOCK:
        for t in range(np.uint64(block.shape[0])):
            for c in range(np.uint64(BLOCK)):
                tile[t, begin + c] = np.int32(block[t, c]) + offset[c]
        return
    for t in range(np.uint64(block.shape[0])):
        for c in range(np.uint64(right - left)):
            tile[t, begin + c] = np.int32(block[t, c]) + offset[c]


@numba.njit(cache=True, nogil=True)
def _write_wide(wide, is_wide, tile, left, right):  # type: ignore[no-untyped-def]
    """Symbols int32 (tokens, BLOCK) of the channels that have raw bits, to their columns."""
    for c in range(right - left):
        if is_wide[c]:
            tile[:, left + c] = wide[:, c]


@numba.njit(cache=True, nogil=True)
def _expand(table, entry, start, stop):  # type: ignore[no-untyped-def]
    """Fill what a step needs of each of 4096 slots: its entry's frequency, its place in it, and the entry."""
    for k in range(start, stop):
        below, frequency = np.uint64(entry[k] & np.uint32(0xFFFF)), np.uint64(entry[k] >> np.uint32(16))
        value = np.uint32(frequency << np.uint64(20)) | np.uint32(k - start)
        for place in range(frequency):
            table[below + place] = value | np.uint32(place << np.uint64(8))


@numba.njit(cache=True, nogil=True)
def _pull(x, pointer, words, table):  # type: ignore[no-untyped-def]
    """One decoding step at 12 bits: the state, the pointer and the entry after it."""
    e = np.uint64(table[x & np.uint64(4095)])
    x = (e >> np.uint64(20)) * (x >> np.uint64(12)) + (e >> np.uint64(8) & np.uint64(4095))
    refill = (x << np.uint64(16)) | np.uint64(words[pointer])
    short = x < np.uint64(LOWER)
    return refill if short else x, pointer + np.uint64(short), np.uint8(e)


@numba.njit(cache=True, nogil=True)
def _decode_four_tiles(words, at, state, some, n, table, block, c):  # type: ignore[no-untyped-def]
    """One channel of four tiles of one lane each, those at `some[n]`, at 12 bits, to `block[n]` and the next.

    A step waits for the one before it in its lane; four lanes at a time keep the processor busy.
    """
    i0, i1, i2, i3 = some[n], some[n + 1], some[n + 2], some[n + 3]
    x0, x1, x2, x3 = np.uint64(state[i0, 0]), np.uint64(state[i1, 0]), np.uint64(state[i2, 0]), np.uint64(state[i3, 0])
    p0, p1, p2, p3 = np.uint64(at[i0]), np.uint64(at[i1]), np.uint64(at[i2]), np.uint64(at[i3])
    n0 = np.uint64(n)
    n1, n2, n3 = n0 + np.uint64(1), n0 + np.uint64(2), n0 + np.uint64(3)
    for t in range(np.uint64(block.shape[1])):
        x0, p0, block[n0, t, c] = _pull(x0, p0, words, table)
        x1, p1, block[n1, t, c] = _pull(x1, p1, words, table)
        x2, p2, block[n2, t, c] = _pull(x2, p2, words, table)
        x3, p3, block[n3, t, c] = _pull(x3, p3, words, table)
    state[i0, 0], state[i1, 0], state[i2, 0], state[i3, 0] = x0, x1, x2, x3
    at[i0], at[i1], at[i2], at[i3] = p0, p1, p2, p3


@numba.njit(cache=True, nogil=True)
def _decode_four_lanes(words, at, state, i, lanes, table, block, n, c):  # type: ignore[no-untyped-def]
    """One channel of tile `i` of at least four lanes, at 12 bits, four lanes at a time, to `block[n]`."""
    pointer = np.uint64(at[i])
    lane_mask = np.uint64(lanes - 1)
    i, n = np.uint64(i), np.uint64(n)
    one, two, three, four = np.uint64(1), np.uint64(2), np.uint64(3), np.uint64(4)
    tokens = np.uint64(block.shape[1])
    whole = tokens & ~three
    for t in range(np.uint64(0), whole, four):
        lane = t & lane_mask
        x0, x1 = np.uint64(state[i, lane]), np.uint64(state[i, lane + one])
        x2, x3 = np.uint64(state[i, lane + two]), np.uint64(state[i, lane + three])
        x0, pointer, block[n, t, c] = _pull(x0, pointer, words, table)
        x1, pointer, block[n, t + one, c] = _pull(x1, pointer, words, table)
        x2, pointer, block[n, t + two, c] = _pull(x2, pointer, words, table)
        x3, pointer, block[n, t + three, c] = _pull(x3, pointer, words, table)
        state[i, lane], state[i, lane + one], state[i, lane + two], state[i, lane + three] = x0, x1, x2, x3
    for t in range(whole, tokens):
        lane = t & lane_mask
        x0, pointer, block[n, t, c] = _pull(np.uint64(state[i, lane]), pointer, words, table)
        state[i, lane] = x0
    at[i] = pointer


@numba.njit(cache=True, nogil=True)
def _split(entry):  # type: ignore[no-untyped-def]
    """(cumulative frequency, frequency) of an entry of `Dense.entry`; only 2**16 does not fit and stands there as 0."""
    frequency = np.uint64(entry >> np.uint32(16))
    return np.uint64(entry & np.uint32(0xFFFF)), frequency if frequency else np.uint64(1 << 16)


@numba.njit(cache=True, nogil=True)
def _decode_channel(words, at, states, lanes, j, dense, block, wide, column):  # type: ignore[no-untyped-def]
    """One channel of one tile, of any precision, lanes and raw bits; where its words go on."""
    slots, base = dense.slot[j], np.uint64(dense.start[j])
    pointer = np.uint64(at)
    bits = np.uint64(dense.precision)
    coarse = bits - np.uint64(12)
    mask = (np.uint64(1) << bits) - np.uint64(1)
    for t in range(block.shape[0]):
        lane = t & (lanes - 1)
        x = np.uint64(states[lane])
        part = x & mask
        k = slots[part >> coarse]
        below, frequency = _split(dense.entry[base + np.uint64(k)])
        while part >= below + frequency:
            k += np.uint8(1)
            below, frequency = _split(dense.entry[base + np.uint64(k)])
        x = frequency * (x >> bits) + part - below
        if x < np.uint64(LOWER):
            x = (x << np.uint64(16)) | np.uint64(words[pointer])
            pointer += np.uint64(1)
        if dense.wide[j]:
            x, pointer, symbol = _pull_raw(x, pointer, words, dense.first, dense.shift, base + np.uint64(k))
            wide[t, column] = symbol
        states[lane] = x
        block[t, column] = k
    return np.int64(pointer)


@numba.njit(cache=True, nogil=True)
def _pull_raw(x, pointer, words, first, shift, k):  # type: ignore[no-untyped-def]
    """The raw bits of entry `k`, if it has any: the state and the pointer after them, and the symbol."""
    bits = np.uint64(shift[k])
    raw = np.int32(x & ((np.uint64(1) << bits) - np.uint64(1)))
    x >>= bits
    if x < np.uint64(LOWER):
        x = (x << np.uint64(16)) | np.uint64(words[pointer])
        pointer += np.uint64(1)
    return x, pointer, first[k] + raw


@numba.njit(cache=True, nogil=True)
def _pull_sparse(x, used, stream, low, high):  # type: ignore[no-untyped-def]
    """One decoding step at 16 bits, of the entry [low, high): the state and the words used after it."""
    low, high = np.uint64(low), np.uint64(high)
    x = (high - low) * (x >> np.uint64(16)) + (x & np.uint64(0xFFFF)) - low
    refill = (x << np.uint64(16)) | np.uint64(stream[used])
    short = x < np.uint64(LOWER)
    return refill if short else x, used + np.uint64(short)


@numba.njit(cache=True, nogil=True)
def _entry_at(cdf, start, slots, j, part):  # type: ignore[no-untyped-def]
    """The entry of a 16-bit slot of channel `j`: the one that its upper eight bits lead to, or one of the few after."""
    k = np.uint64(slots[j, part >> np.uint64(8)])
    while cdf[start + k + np.uint64(1)] <= part:
        k += np.uint64(1)
    return k


@numba.njit(cache=True, nogil=True)
def _decode_sparse(words, at, stop, state, lanes, faults, filled, sparse, out):  # type: ignore[no-untyped-def]
    """The sparse channels, from the words in the dense lanes' last states (where `filled`) and those that are left.

    A channel's tables serve all tiles before the next channel's: read tile by tile they are not in the cache any more
    when they are needed again. Besides, the processor begins with the next tile before it is done with this one.
    """
    tiles = out.shape[0]
    # All tiles' words, and as many more as a run, a symbol and its raw bits read before `used` is checked.
    stream = np.zeros((lanes.sum() if filled else 0) + len(words) + 3, np.uint16)
    begin, end = np.zeros(tiles, np.uint64), np.zeros(tiles, np.uint64)
    used, x = np.zeros(tiles, np.uint64), np.zeros(tiles, np.uint64)
    total = 0
    for i in range(tiles):
        if faults[i] != FINE:
            continue
        if stop[i] < at[i]:
            faults[i] = WORDS
            continue
        begin[i] = total
        if filled:
            for lane in range(lanes[i]):
                if state[i, lane] >= 2 * LOWER:
                    faults[i] = WORDS
                stream[total] = state[i, lane] & np.uint32(0xFFFF)
                total += 1
        for n in range(at[i], stop[i]):
            stream[total] = words[n]
            total += 1
        used[i], end[i] = begin[i], total
        if len(sparse.column):
            x[i] = np.uint64(stream[used[i]]) << np.uint64(16) | np.uint64(stream[used[i] + np.uint64(1)])
            used[i] += np.uint64(2)
            if x[i] < np.uint64(LOWER) or end[i] < used[i]:
                faults[i] = WORDS
    _decode_sparse_channels(x, used, end, stream, faults, sparse, out)
    for i in range(tiles):
        if faults[i] != FINE:
            continue
        if len(sparse.column) and x[i] != np.uint64(LOWER):
            faults[i] = WORDS
        # Lanes that the sparse stream was too short to fill hold 0; nothing may be left over.
        if stop[i] > at[i] and used[i] != end[i]:
            faults[i] = WORDS
        for n in range(used[i], end[i]):
            if stream[n]:
                faults[i] = WORDS


@numba.njit(cache=True, nogil=True)
def _decode_sparse_channels(x, used, end, stream, faults, sparse, out):  # type: ignore[no-untyped-def]
    """All sparse channels of many tiles: moves their states `x` and where their words go on, sets faults."""
    tiles, tokens = np.uint64(out.shape[0]), np.uint64(out.shape[1])
    # Not cut into channels, for numba counts references by atomic instructions wherever an array is cut.
    runs, run_slot, values, slot = sparse.run, sparse.run_slot, sparse.value, sparse.slot
    first, shift = sparse.first, sparse.shift
    for j in range(np.uint64(len(sparse.column))):
        column, start = np.uint64(sparse.column[j]), np.uint64(sparse.start[j])
        run_start = np.uint64(sparse.run_start[j])
        longest = np.uint64(sparse.run_start[j + np.uint64(1)]) - run_start - np.uint64(2)
        for i in range(tiles):
            state, at, stop = x[i], used[i], end[i]
            t = tokens if faults[i] != FINE else np.uint64(0)
            while t < tokens and at <= stop:
                part = state & np.uint64(0xFFFF)
                # Of the runs that fit, or all that do not in one: zeros alone, up to the end or a whole run.
                k = min(longest, tokens - t)
                if part >= runs[run_start + k]:
                    state, at = _pull_sparse(state, at, stream, runs[run_start + k], np.uint64(1 << RUN_BITS))
                    t += k
                    continue
                run = _entry_at(runs, run_start, run_slot, j, part)
                place = run_start + run
                state, at = _pull_sparse(state, at, stream, runs[place], runs[place + np.uint64(1)])
                t += run
                place = start + _entry_at(values, start, slot, j, state & np.uint64(0xFFFF))
                state, at = _pull_sparse(state, at, stream, values[place], values[place + np.uint64(1)])
                state, at, symbol = _pull_raw(state, at, stream, first, shift, place)
                out[i, t, column] = symbol
                t += np.uint64(1)
            x[i], used[i] = state, at
            if at > stop:
                faults[i] = WORDS


@numba.njit(cache=True, nogil=True)
def begin_encoding(symbols, lanes_log2, first_channel, dense, sparse, lowest, highest, low, high):  # type: ignore[no-untyped-def]
    """Encode the sparse channels of one layer of many tiles, and find what needs an escape.

    Args:
        symbols: int32 (tiles, tokens, channels of the scale), contiguous.
        lanes_log2: log2 of the number of lanes.
        first_channel: the layer's first channel in `symbols`.
        dense: the dense channels' tables (`payload.Dense`).
        sparse: the sparse channels' tables (`payload.Sparse`).
        lowest: int32 (channels of the layer,), the least symbol that needs no escape.
        highest: int32 (channels of the layer,), the greatest one.
        low: int32 (channels of the layer,), `lowest` in dense channels and 0 in all others.
        high: int32 (channels of the layer,), `highest` in dense channels and 0 in all others.

    Returns:
        (the marks as `_find_marks` gives them, without their symbols, what `_find_escapes` gives, what `_encode_sparse`
        gives, without the words that the dense channels' lanes begin with, room for the dense ones' words uint16
        (tiles, room), where they will begin in it int64 (tiles,), for now at its end, the lanes' states uint32
        (tiles, 16)).
    """
    tiles, tokens = symbols.shape[0], symbols.shape[1]
    lanes = 1 << lanes_log2 if len(dense.column) else 0
    mark, mark_symbol, mark_start = _find_marks(symbols, first_channel, low, high)
    escapes, escape_start = _find_escapes(tokens, lowest, highest, mark, mark_symbol, mark_start)
    # A step writes at most one word; the fast ones write ahead.
    dense_room = SPARE
    for j in range(len(dense.column)):
        dense_room += tokens * (1 + np.int64(dense.wide[j]))
    words = np.empty((tiles, dense_room), np.uint16)
    state = np.full((tiles, 1 << MAX_LANES_LOG2), LOWER, np.uint32)
    at = np.full(tiles, dense_room, np.int64)
    streams = np.empty(0, np.uint16), np.zeros(tiles, np.int64), np.zeros(tiles, np.int64)
    if tokens and len(sparse.column):
        streams = _encode_sparse(tokens, first_channel, sparse, mark, mark_symbol, mark_start)
        stream, start, stop = streams
        for i in range(tiles):
            for lane in range(min(lanes, stop[i] - start[i])):
                state[i, lane] |= np.uint32(stream[start[i]])
                start[i] += 1
    return (mark, mark_start), (escapes, escape_start), streams, words, at, state


@numba.njit(cache=True, nogil=True)
def end_encoding(symbols, declared, lanes_log2, first_channel, coded, escaped, sparse, words, at, state):  # type: ignore[no-untyped-def]
    """Put the layer's parts together, once its dense channels are encoded.

    The arguments are those that `begin_encoding` takes and gives (but for the marks), `declared`, the tokens that the
    codec declares, and `coded`: whether it has dense channels, and whether it has words at all.

    Returns:
        (all layers' bytes uint8 one after the other, their lengths int64 (tiles,)).
    """
    tiles, tokens, dense_room = symbols.shape[0], symbols.shape[1], words.shape[1]
    has_dense, has_words = coded
    escapes, escape_start = escaped
    streams, stream_start, stream_stop = sparse
    lanes = 1 << lanes_log2 if has_dense else 0
    nowhere = np.zeros(1, np.uint8)
    sizes = np.zeros(tiles, np.int64)
    body = np.zeros(tiles, np.int64)
    for i in range(tiles):
        size = 1
        if tokens != declared:
            size += _varint_size(tokens)
        mine = escapes[escape_start[i] : escape_start[i + 1]]
        if len(mine):
            size += _put_escapes(symbols[i], first_channel, mine, nowhere, -1)
        if has_words:
            size += 4 * lanes + 2 * (dense_room - at[i]) + 2 * (stream_stop[i] - stream_start[i])
        body[i] = size
        sizes[i] = _varint_size(size) + 4 + size
    out = np.empty(sizes.sum(), np.uint8)
    word_bytes, stream_bytes = words.reshape(words.size).view(np.uint8), streams.view(np.uint8)
    begin = 0
    for i in range(tiles):
        checksum = _put_varint(out, begin, body[i])
        here = checksum + 4
        flags = lanes_log2 if has_words and lanes else 0
        if tokens != declared:
            flags |= _HAS_TOKENS
        mine = escapes[escape_start[i] : escape_start[i + 1]]
        if len(mine):
            flags |= _HAS_ESCAPES
        out[here] = flags
        here += 1
        if tokens != declared:
            here = _put_varint(out, here, tokens)
        if len(mine):
            here += _put_escapes(symbols[i], first_channel, mine, out, here)
        if has_words:
            for lane in range(lanes):
                _put_u32(out, here, state[i, lane])
                here += 4
            _copy(word_bytes, 2 * (i * dense_room + at[i]), out, here, 2 * (dense_room - at[i]))
            here += 2 * (dense_room - at[i])
            _copy(stream_bytes, 2 * stream_start[i], out, here, 2 * (stream_stop[i] - stream_start[i]))
        begin += sizes[i]
        _put_u32(out, checksum, crc32(out, checksum + 4, begin))
    return out, sizes


@numba.njit(forceinline=True)
def _any_outside(symbols, row, low, high, left, count):  # type: ignore[no-untyped-def]
    """Whether any of `count` symbols from `left` on, of a row that begins at `row`, is below `low` or above `high`."""
    seen = np.int32(0)
    for n in range(np.uint64(count)):
        value = symbols[row + left + n]
        seen |= np.int32(value < low[left + n]) | np.int32(value > high[left + n])
    return seen


@numba.njit(cache=True, nogil=True)
def _find_marks(symbols, first_channel, low, high):  # type: ignore[no-untyped-def]
    """The symbols that need a look: those below `low` or above `high`, int32 (channels of the layer,) both.

    One pass over each tile as it lies in memory; most rows of most blocks hold none.

    Returns:
        (their tokens int64, tile by tile and channel by channel and rising, the symbols themselves int32, where those
        of each tile and channel begin int64 (tiles, channels + 1)).
    """
    tiles, tokens, channels = symbols.shape[0], symbols.shape[1], len(low)
    flat = symbols.reshape(symbols.size)  # not cut into rows, as in `_decode_sparse_channels`
    mark, mark_symbol = np.empty(64, np.int64), np.empty(64, np.int32)
    start = np.zeros((tiles, channels + 1), np.int64)
    found_token, found_channel = np.empty(64, np.int64), np.empty(64, np.int64)
    place = np.empty(channels + 1, np.int64)
    total = 0
    for i in range(np.uint64(tiles)):
        count = np.uint64(0)
        for t in range(np.uint64(tokens)):
            if count + np.uint64(channels) > len(found_token):
                more = len(found_token) + channels
                found_token = np.concatenate((found_token, np.empty(more, np.int64)))
                found_channel = np.concatenate((found_channel, np.empty(more, np.int64)))
            row = (i * np.uint64(tokens) + t) * np.uint64(symbols.shape[2]) + np.uint64(first_channel)
            for left in range(np.uint64(0), np.uint64(channels), np.uint64(BLOCK)):
                right = min(left + np.uint64(BLOCK), np.uint64(channels))
                if right - left == BLOCK and not _any_outside(flat, row, low, high, left, BLOCK):
                    continue
                for part in range(left, right, np.uint64(PART)):
                    end = min(part + np.uint64(PART), right)
                    if end - part == PART and not _any_outside(flat, row, low, high, part, PART):
                        continue
                    for c in range(part, end):  # counts only if `count` moves over it: a branch would be mispredicted
                        found_token[count], found_channel[count] = t, c
                        value = flat[row + c]
                        count += np.uint64(value < low[c]) | np.uint64(value > high[c])
        place[:] = 0
        for n in range(count):
            place[found_channel[n] + 1] += 1
        place[0] = total
        for c in range(channels):
            place[c + 1] += place[c]
        start[i] = place
        if total + count > len(mark):
            room = np.int64(total + 2 * count)
            mark = np.concatenate((mark, np.empty(room, np.int64)))
            mark_symbol = np.concatenate((mark_symbol, np.empty(room, np.int32)))
        for n in range(count):
            c = found_channel[n]
            mark[place[c]] = found_token[n]
            mark_symbol[place[c]] = symbols[i, found_token[n], first_channel + c]
            place[c] += 1
        total += np.int64(count)  # type: ignore[assignment]
    return mark[:total], mark_symbol[:total], start


@numba.njit(cache=True, nogil=True)
def _find_escapes(tokens, lowest, highest, mark, mark_symbol, mark_start):  # type: ignore[no-untyped-def]
    """Positions in their layer of the symbols without an entry, among those with a mark.

    Returns:
        (positions int64, rising for each tile, where each tile's begin int64 (tiles + 1,)).
    """
    tiles = len(mark_start)
    position = np.empty(len(mark), np.int64)
    start = np.zeros(tiles + 1, np.int64)
    count = 0
    for i in range(tiles):
        for c in range(len(lowest)):
            for n in range(mark_start[i, c], mark_start[i, c + 1]):
                if mark_symbol[n] < lowest[c] or mark_symbol[n] > highest[c]:
                    position[count] = c * tokens + mark[n]
                    count += 1
        start[i + 1] = count
    return position[:count], start


@numba.njit(cache=True, nogil=True)
def _put_u32(out, at, value):  # type: ignore[no-untyped-def]
    for k in range(4):
        out[at + k] = np.uint8(np.uint64(value) >> np.uint64(8 * k) & np.uint64(0xFF))


@numba.njit(cache=True, nogil=True)
def _put_escapes(tile, first_channel, positions, out, at):  # type: ignore[no-untyped-def]
    """Write the escapes of one tile at `at`, or only count their bytes where it is negative. How many bytes."""
    tokens = tile.shape[0]
    size = _varint_size(len(positions))
    if at >= 0:
        _put_varint(out, at, len(positions))
    previous = 0
    for position in positions:
        value = np.int64(tile[position % tokens, first_channel + position // tokens])
        coded = 2 * value if value >= 0 else -2 * value - 1
        if at >= 0:
            _put_varint(out, _put_varint(out, at + size, position - previous), coded)
        size += _varint_size(position - previous) + _varint_size(coded)
        previous = position
    return size


@numba.njit(cache=True, nogil=True)
def encode_dense(symbols, marks, words, at, state, first_tile, first_channel, channels, dense, lanes):  # type: ignore[no-untyped-def]
    """The dense channels of the tiles from `first_tile` on, backwards; blocks as in `decode_dense`.

    As few tiles as there are lanes to take turns come together: their block stays in the first-level cache.

    The arguments are those that `begin_encoding` takes and gives; `channels` are the layer's, `lanes` the tiles'.
    """
    mark, mark_start = marks
    tiles, tokens = symbols.shape[0], symbols.shape[1]
    together = 4 if lanes == 1 else 1
    block = np.zeros((together, tokens, min(BLOCK, channels)), np.uint8)
    entry, reciprocal = dense.encoding, dense.reciprocal  # taken out here, as in `decode_dense`
    first = len(dense.column)
    while first > 0:
        last = first
        left, right = _block(dense.column[last - 1], first_channel, channels)
        while first > 0 and dense.column[first - 1] >= left:
            first -= 1
        offset = np.zeros(BLOCK, np.int32)
        for j in range(first, last):
            offset[dense.column[j] - left] = dense.first[dense.start[j]]
        for begin in range(first_tile, tiles, together):
            end = min(begin + together, tiles)
            for i in range(begin, end):
                _read_block(block[i - begin], offset, symbols[i], left, right)
                for j in range(first, last):  # what has no entry gets the nearest one's
                    column = dense.column[j]
                    for n in range(mark_start[i, column - first_channel], mark_start[i, column - first_channel + 1]):
                        above = symbols[i, mark[n], column] > dense.first[dense.start[j]]
                        top = np.uint8(dense.start[j + 1] - dense.start[j] - 1)
                        block[i - begin, mark[n], column - left] = top if above else np.uint8(0)
            for j in range(last - 1, first - 1, -1):
                plain = dense.precision == 12 and not dense.wide[j]
                c, base = np.uint64(dense.column[j] - left), np.uint64(dense.start[j])
                i = begin
                while i < end:
                    if plain and lanes == 1 and i + 4 <= end:
                        _encode_four_tiles(words, at, state, i, entry, reciprocal, base, block, i - begin, c)
                        i += 4
                        continue
                    if plain and lanes >= 4:
                        _encode_four_lanes(words, at, state, i, lanes, entry, reciprocal, base, block, i - begin, c)
                    else:
                        at[i] = _encode_channel(words[i], at[i], state[i], lanes, j, dense, symbols[i])
                    i += 1


@numba.njit(cache=True, nogil=True)
def _read_block(block, offset, tile, left, right):  # type: ignore[no-untyped-def]
    """Columns [left, right) of a tile as entries uint8 (tokens, BLOCK); nonsense for symbols without an entry."""
    begin = np.uint64(left)
    if right - left == BLOCK:
        for t in range(np.uint64(block.shape[0])):
            for c in range(np.uint64(BLOCK)):
                block[t, c] = np.uint8(tile[t, begin + c] - offset[c])
        return
    for t in range(np.uint64(block.shape[0])):
        for c in range(np.uint64(right - left)):
            block[t, c] = np.uint8(tile[t, begin + c] - offset[c])


@numba.njit(cache=True, nogil=True)
def _push(x, pointer, words, i, entry, reciprocal):  # type: ignore[no-untyped-def]
    """One encoding step of tile `i` at 12 bits, by an entry of `Dense.encoding`: the state and the pointer after it."""
    words[i, pointer - np.uint64(1)] = x  # counts only if the pointer moves over it
    short = np.uint64(x > entry >> np.uint64(32))
    x >>= short << np.uint64(4)  # a shift, for a branch would be mispredicted at every other word
    # x // frequency, exactly: x < frequency << 20, see schemas/payload.md.
    quotient = (x * reciprocal) >> np.uint64(44)
    x += quotient * (entry >> np.uint64(16) & np.uint64(0xFFFF)) + (entry & np.uint64(0xFFFF))
    return x, pointer - short


@numba.njit(cache=True, nogil=True)
def _encode_four_tiles(words, at, state, i, entry, reciprocal, base, block, n, c):  # type: ignore[no-untyped-def]
    """One channel of four tiles of one lane each, at 12 bits: tile `i` from `block[n]`, and the next ones."""
    i0, n0 = np.uint64(i), np.uint64(n)
    one, two, three = np.uint64(1), np.uint64(2), np.uint64(3)
    i1, i2, i3, n1, n2, n3 = i0 + one, i0 + two, i0 + three, n0 + one, n0 + two, n0 + three
    p0, p1, p2, p3 = np.uint64(at[i0]), np.uint64(at[i1]), np.uint64(at[i2]), np.uint64(at[i3])
    x0, x1, x2, x3 = np.uint64(state[i0, 0]), np.uint64(state[i1, 0]), np.uint64(state[i2, 0]), np.uint64(state[i3, 0])
    tokens = np.uint64(block.shape[1])
    for done in range(tokens):
        t = tokens - one - done
        k0, k1 = base + np.uint64(block[n0, t, c]), base + np.uint64(block[n1, t, c])
        k2, k3 = base + np.uint64(block[n2, t, c]), base + np.uint64(block[n3, t, c])
        x0, p0 = _push(x0, p0, words, i0, entry[k0], reciprocal[k0])
        x1, p1 = _push(x1, p1, words, i1, entry[k1], reciprocal[k1])
        x2, p2 = _push(x2, p2, words, i2, entry[k2], reciprocal[k2])
        x3, p3 = _push(x3, p3, words, i3, entry[k3], reciprocal[k3])
    state[i0, 0], state[i1, 0], state[i2, 0], state[i3, 0] = x0, x1, x2, x3
    at[i0], at[i1], at[i2], at[i3] = p0, p1, p2, p3


@numba.njit(cache=True, nogil=True)
def _encode_four_lanes(words, at, state, i, lanes, entry, reciprocal, base, block, n, c):  # type: ignore[no-untyped-def]
    """One channel of tile `i` of at least four lanes, at 12 bits, from `block[n]`."""
    i, n = np.uint64(i), np.uint64(n)
    lane_mask = np.uint64(lanes - 1)
    pointer = np.uint64(at[i])
    one, two, three, four = np.uint64(1), np.uint64(2), np.uint64(3), np.uint64(4)
    tokens = np.uint64(block.shape[1])
    whole = tokens & ~three
    for done in range(tokens - whole):
        t = tokens - one - done
        lane = t & lane_mask
        k = base + np.uint64(block[n, t, c])
        x0, pointer = _push(np.uint64(state[i, lane]), pointer, words, i, entry[k], reciprocal[k])
        state[i, lane] = x0
    for done in range(np.uint64(0), whole, four):
        t = whole - four - done
        lane = t & lane_mask
        k0, k1 = base + np.uint64(block[n, t, c]), base + np.uint64(block[n, t + one, c])
        k2, k3 = base + np.uint64(block[n, t + two, c]), base + np.uint64(block[n, t + three, c])
        x0, x1 = np.uint64(state[i, lane]), np.uint64(state[i, lane + one])
        x2, x3 = np.uint64(state[i, lane + two]), np.uint64(state[i, lane + three])
        x3, pointer = _push(x3, pointer, words, i, entry[k3], reciprocal[k3])
        x2, pointer = _push(x2, pointer, words, i, entry[k2], reciprocal[k2])
        x1, pointer = _push(x1, pointer, words, i, entry[k1], reciprocal[k1])
        x0, pointer = _push(x0, pointer, words, i, entry[k0], reciprocal[k0])
        state[i, lane], state[i, lane + one], state[i, lane + two], state[i, lane + three] = x0, x1, x2, x3
    at[i] = pointer


@numba.njit(cache=True, nogil=True)
def _encode_channel(words, at, states, lanes, j, dense, tile):  # type: ignore[no-untyped-def]
    """One channel of one tile, of any precision, lanes and raw bits; where the next word goes before."""
    base, bits = dense.start[j], np.uint64(dense.precision)
    last = dense.start[j + 1] - base - 1
    pointer = np.uint64(at)
    for t in range(tile.shape[0] - 1, -1, -1):
        k, raw = _entry_of(tile[t, dense.column[j]], dense.first, dense.shift, base, last)
        shift = np.uint64(dense.shift[base + k])
        x = np.uint64(states[t & (lanes - 1)])
        if shift:
            if x >= np.uint64(1) << (np.uint64(32) - shift):
                pointer -= np.uint64(1)
                words[pointer] = x
                x >>= np.uint64(16)
            x = (x << shift) | np.uint64(raw)
        below, frequency = _split(dense.entry[base + k])
        if x >= frequency << (np.uint64(32) - bits):
            pointer -= np.uint64(1)
            words[pointer] = x
            x >>= np.uint64(16)
        quotient = x // frequency
        states[t & (lanes - 1)] = (quotient << bits) + (x - quotient * frequency) + below
    return np.int64(pointer)


@numba.njit(cache=True, nogil=True)
def _entry_of(symbol, first, shift, start, last):  # type: ignore[no-untyped-def]
    """(entry, raw bits) of a symbol among entries 0 to `last`, from `start` on; the nearest one's where it has none."""
    place = np.int64(symbol) - np.int64(first[start])
    if place <= 0:
        return np.int64(0), np.int64(0)
    if np.int64(first[start + last]) - np.int64(first[start]) == last:  # one symbol each, but for the last entry
        k = min(place, last)
    else:
        k = np.searchsorted(first[start : start + last + 1], symbol, side="right") - 1
    return k, min(np.int64(symbol) - np.int64(first[start + k]), (np.int64(1) << np.int64(shift[start + k])) - 1)


@numba.njit(cache=True, nogil=True)
def _encode_sparse(tokens, first_channel, sparse, mark, mark_symbol, mark_start):  # type: ignore[no-untyped-def]
    """The sparse channels' words of many tiles.

    In sparse channels every symbol but 0 has a mark. A channel's tables serve all tiles, as in decoding.

    Returns:
        (words uint16, where each tile's begin int64 (tiles,), where they end int64 (tiles,)).
    """
    tiles = len(mark_start)
    # At most a word for each mark's run, entry and raw bits, one for each whole run and for a channel's last zeros, two
    # for the state; the fast step writes one ahead.
    room = 3
    for j in range(len(sparse.column)):
        room += 1 + tokens // (sparse.run_start[j + 1] - sparse.run_start[j] - 2)
    stop = np.empty(tiles, np.int64)
    total = 0
    for i in range(tiles):
        total += room + 3 * (mark_start[i, -1] - mark_start[i, 0])
        stop[i] = total
    words = np.empty(total, np.uint16)
    at, x = stop.astype(np.uint64), np.full(tiles, LOWER, np.uint64)
    _encode_sparse_channels(words, at, x, tokens, first_channel, sparse, mark, mark_symbol, mark_start)
    for i in range(tiles):
        at[i] -= np.uint64(2)
        words[at[i]], words[at[i] + np.uint64(1)] = x[i] >> np.uint64(16), x[i] & np.uint64(0xFFFF)
    return words, at.astype(np.int64), stop


@numba.njit(cache=True, nogil=True)
def _encode_sparse_channels(words, at, x, tokens, first_channel, sparse, mark, mark_symbol, mark_start):  # type: ignore[no-untyped-def]
    """All sparse channels of many tiles, backwards: moves their states `x` and where the next word goes before."""
    # Not cut into channels, as in `_decode_sparse_channels`.
    runs, values, first, shift = sparse.run, sparse.value, sparse.first, sparse.shift
    one, sixteen = np.uint64(1), np.uint64(RUN_BITS)
    for j in range(len(sparse.column) - 1, -1, -1):
        channel = sparse.column[j] - first_channel
        start, last = sparse.start[j], sparse.start[j + 1] - sparse.start[j] - 2
        run_start, longest = sparse.run_start[j], sparse.run_start[j + 1] - sparse.run_start[j] - 2
        for i in range(len(x)):
            state, pointer = x[i], np.uint64(at[i])
            begin, n = mark_start[i, channel], mark_start[i, channel + 1]
            end = tokens
            while True:
                # The zeros up to `end`: those behind the last mark, or a mark's run.
                begun = mark[n - 1] + 1 if n > begin else 0
                rest = end - begun
                while rest >= longest:
                    rest -= longest
                place = np.uint64(run_start + rest)
                if end < tokens:
                    state, pointer = _push_sparse(state, pointer, words, runs[place], runs[place + one], sixteen)
                elif rest:
                    state, pointer = _push_sparse(state, pointer, words, runs[place], 1 << RUN_BITS, sixteen)
                for _ in range(begun + rest, end, longest):
                    low = runs[np.uint64(run_start + longest)]
                    state, pointer = _push_sparse(state, pointer, words, low, 1 << RUN_BITS, sixteen)
                if n == begin:
                    break
                n -= 1
                end = mark[n]
                k, raw = _entry_of(mark_symbol[n], first, shift, start, last)
                place = np.uint64(start + k)
                if shift[place]:
                    state, pointer = _push_sparse(state, pointer, words, raw, raw + 1, np.uint64(shift[place]))
                state, pointer = _push_sparse(state, pointer, words, values[place], values[place + one], sixteen)
            x[i], at[i] = state, pointer


@numba.njit(cache=True, nogil=True)
def _push_sparse(x, pointer, words, low, high, bits):  # type: ignore[no-untyped-def]
    """One encoding step of the entry [low, high) among 2**bits: the state and the pointer after it."""
    frequency = np.uint64(high) - np.uint64(low)
    words[pointer - np.uint64(1)] = x  # counts only if the pointer moves over it
    short = np.uint64(x >= frequency << (np.uint64(32) - bits))
    x >>= short << np.uint64(4)
    quotient = np.uint64(np.uint32(x) // np.uint32(frequency))
    return (quotient << bits) + (x - quotient * frequency) + np.uint64(low), pointer - short


@numba.njit(cache=True, nogil=True)
def interleave(left, left_lengths, right, right_lengths):  # type: ignore[no-untyped-def]
    """Each tile's bytes of `left` followed by its bytes of `right`."""
    out = np.empty(len(left) + len(right), np.uint8)
    at, a, b = 0, 0, 0
    for i in range(len(left_lengths)):
        out[at : at + left_lengths[i]] = left[a : a + left_lengths[i]]
        at += left_lengths[i]
        a += left_lengths[i]
        out[at : at + right_lengths[i]] = right[b : b + right_lengths[i]]
        at += right_lengths[i]
        b += right_lengths[i]
    return out

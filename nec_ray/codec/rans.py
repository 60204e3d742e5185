"""rANS, compiled by numba: symbols to 16-bit words and back, one tile and one layer a call.

Duda, "Asymmetric numeral systems" (arXiv 1311.2540), streaming variant with a 32-bit state kept in
[2**16, 2**32) and 16-bit words. Symbols run channel by channel, within a channel token by token; the encoder
goes backwards, so that the decoder reads forwards. All kernels are in this file: numba's cache does not notice
when a function of another file changes.
"""

import numba
import numpy as np

LOWER = 1 << 16
"""The state's lower bound, where the encoder starts and the decoder must end."""


@numba.njit(cache=True, nogil=True)
def encode(symbols, first, last, cdf, start, offset, precision, words):  # type: ignore[no-untyped-def]
    """Encode channels `[first, last)` of `symbols` int32 (tokens, channels) into `words` from its end.

    `words` uint16 must hold tokens x channels + 1 entries: no symbol writes more than one.

    Returns:
        (index of the first word written, final state uint32).
    """
    state = np.uint64(LOWER)
    position = len(words)
    for c in range(last - 1, first - 1, -1):
        base = start[c]
        top = start[c + 1] - base - 2  # index of the table's last symbol
        if top < 0:
            continue
        for t in range(symbols.shape[0] - 1, -1, -1):
            i = np.int64(symbols[t, c]) - np.int64(offset[c])
            i = min(max(i, np.int64(0)), top)
            low = np.uint64(cdf[base + i])
            frequency = np.uint64(cdf[base + i + 1]) - low
            if state >= frequency << np.uint64(32 - precision):
                position -= 1
                words[position] = np.uint16(state & np.uint64(0xFFFF))
                state >>= np.uint64(16)
            state = ((state // frequency) << np.uint64(precision)) + low + state % frequency
    return position, np.uint32(state)


@numba.njit(cache=True, nogil=True)
def decode(words, state, first, last, cdf, start, offset, precision, symbols):  # type: ignore[no-untyped-def]
    """Decode channels `[first, last)` into `symbols` int32 (tokens, channels); dead ones are left as they are.

    Returns:
        True where every word was used and the state came back to its start; otherwise the words are damaged.
    """
    x = np.uint64(state)
    mask = np.uint64((1 << precision) - 1)
    position = 0
    for c in range(first, last):
        base = start[c]
        top = start[c + 1] - base - 2
        if top < 0:
            continue
        for t in range(symbols.shape[0]):
            slot = x & mask
            low, high = np.int64(0), np.int64(top)  # the table's last entry is above every slot
            while low < high:
                middle = (low + high + 1) >> 1
                if np.uint64(cdf[base + middle]) <= slot:
                    low = middle
                else:
                    high = middle - 1
            below = np.uint64(cdf[base + low])
            frequency = np.uint64(cdf[base + low + 1]) - below
            x = frequency * (x >> np.uint64(precision)) + slot - below
            if x < np.uint64(LOWER):
                if position >= len(words):
                    return False
                x = (x << np.uint64(16)) | np.uint64(words[position])
                position += 1
            symbols[t, c] = np.int32(low + offset[c])
    return position == len(words) and x == np.uint64(LOWER)


@numba.njit(cache=True, nogil=True)
def find_escapes(symbols, first, last, start, offset, positions):  # type: ignore[no-untyped-def]
    """Positions (channel-major within the layer) of the symbols outside their table; returns how many."""
    tokens = symbols.shape[0]
    count = 0
    for c in range(first, last):
        top = start[c + 1] - start[c] - 2
        low = np.int64(0)
        high = np.int64(0)
        if top >= 0:
            low = np.int64(offset[c])
            high = low + top
        for t in range(tokens):
            value = np.int64(symbols[t, c])
            if value < low or value > high:
                positions[count] = (c - first) * tokens + t
                count += 1
    return count

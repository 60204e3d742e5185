"""The dense channels on AVX2: the same bytes as rans.py reads and writes, 32 symbols a step.

A step works on four vectors A, B, C, D of eight 32-bit states. They are eight lanes of four tiles, sixteen lanes of
two tiles (A and B the first, C and D the second), or one lane of 32 tiles. What a channel's symbols are decoded to,
or encoded from, lies between in rows of 32 bytes, one a step, whose byte 4 i + s belongs to lane i of A, C, B or D for
s = 0 to 3: that is how the vectors' entries fall together (`_slot`).

No table is looked up in memory: gathers are slow. A channel's entries are compared with the slots one after the other
(`_search`), 16 a register, and what belongs to the entry found comes from registers by byte shuffles. Channels of more
than `MOST_ENTRIES` entries or with raw bits are coded symbol by symbol here, as in rans.py.

Vectors are types of their own for numba, and intrinsics that emit LLVM's vector operations are all that there is for
them. All but `shuffle` are of no particular processor, but `shuffle` aborts the process where there is no AVX2, so
nothing here may be compiled before `available()` said yes. As in rans.py, all kernels are in this file.

numba's bounds checks do not see into the intrinsics. What keeps their loads and stores within arrays, whatever a
payload holds:
- words, decoding: a tile's pointer is within its words before each channel; a channel moves it by at most a word a
  token, two where there are raw bits, and loads reach `SPARE` words further; the buffer is that much longer.
- words, encoding: a tile's room holds a word a symbol (two with raw bits) and `SPARE` more, and is filled from its end,
  by at most a word a symbol; stores reach at most `SPARE` words before the pointer, and none past it.
- rows of entries: a channel's column of a block has a row more than there are steps, and a block has whole sixteens of
  columns, which `transpose` takes.
- symbols: sixteen are stored or loaded only within a block's columns; what is over goes one by one.
- look-ups: the bytes of a shuffle cannot be left by any index, and sets of eight lanes are numbers below 256.
- pointers of 32 bits: `payload.py` gives no buffer of 2**31 words or more to this path.
"""

# ruff: noqa: ARG001, PLR0912  (numba gives intrinsics more than they need; kernels are not cut for length)

from functools import cache
from typing import Any, NamedTuple

import numba
import numpy as np
import numpy.typing as npt
from llvmlite import binding, ir
from numba.core import types
from numba.core.registry import cpu_target
from numba.extending import intrinsic

from nec_ray.codec.simd import (
    Vector,
    add,
    address_of,
    binary,
    bitcast,
    bits_and,
    bits_or,
    call,
    convert,
    count_bits,
    high_products,
    least,
    left,
    llvm_type,
    loader,
    mul,
    prefetch,
    right,
    shuffled,
    splat,
    store,
    sub,
)
from nec_ray.codec.simd import transpose as transposer

LOWER = 1 << 16
"""As in rans.py, which is not imported: numba's cache would not notice its changes."""
WORDS = 6
SLOTS = 32
"""States that are worked on at once."""
LANES = 8
"""States of a vector."""
GROUP = 16
"""Entries that one byte shuffle can choose from."""
MOST_ENTRIES = 64
PRECISION = 12
"""Of the tables; others are left to rans.py."""
SPARE = LANES
"""Words behind the last that a step reads in vain, and before the first that it writes in vain."""
_BLOCK_BYTES = 7 << 16
"""Of entries between the states and the symbols, at most: they stay in a second-level cache of 512 KB."""
_COLUMNS = 16
"""Columns of symbols that are written at once: a cache line."""


@cache
def available() -> bool:
    """Whether the processor has AVX2 and numba uses it."""
    compiled_for = cpu_target.target_context.codegen().magic_tuple()[2].split(",")
    return "+avx2" in compiled_for and bool(binding.get_host_cpu_features().get("avx2"))


# ---- Vectors ----

U8x8, U8x16, U8x32 = Vector(8, 8), Vector(16, 8), Vector(32, 8)
U16x8, U16x16 = Vector(8, 16), Vector(16, 16)
U32x8 = Vector(8, 32)


def _pshufb(builder: Any, table: Any, index: Any) -> Any:
    return call("llvm.x86.avx2.pshuf.b" if table.type.count == 32 else "llvm.x86.ssse3.pshuf.b.128")(
        builder, table, index
    )


add_saturated = binary(call("llvm.uadd.sat.{}"))
less = binary(lambda builder, a, b: builder.sext(builder.icmp_unsigned("<", a, b), a.type))
"""All bits of a lane set where a < b."""
less_signed = binary(lambda builder, a, b: builder.sext(builder.icmp_signed("<", a, b), a.type))
shuffle = binary(_pshufb)
"""Bytes of the first, chosen by the low four bits of the second in each half of 16; 0 where its top bit is set."""
even_words = binary(
    lambda builder, a, b: builder.shuffle_vector(a, b, shuffled(*[i + 16 * (i % 2) for i in range(16)]))
)
"""The words at even places from the first, those at odd places from the second."""
even_bytes = binary(
    lambda builder, a, b: builder.shuffle_vector(a, b, shuffled(*[i + 32 * (i % 2) for i in range(32)]))
)
splat8, splat16, splat32 = splat(U8x32), splat(U16x16), splat(U32x8)
as_bytes, as_words, as_states = bitcast(U8x32), bitcast(U16x16), bitcast(U32x8)
widen = convert(U32x8, lambda builder, a: builder.zext(a, llvm_type(U32x8)))
"""Eight words or bytes as 32-bit numbers."""
as_short_words = bitcast(U16x8)
as_short_bytes = bitcast(U8x16)
low_words = convert(U16x8, lambda builder, a: builder.trunc(a, llvm_type(U16x8)))
low_bytes = convert(U8x8, lambda builder, a: builder.trunc(a, llvm_type(U8x8)))
both_halves = convert(U8x32, lambda builder, a: builder.shuffle_vector(a, a, shuffled(*range(16), *range(16))))
"""Sixteen bytes in both halves."""
twice = convert(U8x32, lambda builder, a: builder.shuffle_vector(a, a, shuffled(*[i // 2 * 2 for i in range(32)])))
"""The low byte of each word in its high one, too."""


@intrinsic
def choose(typingctx, mask, a, b):  # type: ignore[no-untyped-def]
    """`a` where the mask's lane has all bits set, `b` where it has none."""

    def emit(context, builder, signature, args):  # type: ignore[no-untyped-def]
        mask, a, b = args
        return builder.select(builder.icmp_signed("<", mask, ir.Constant(mask.type, None)), a, b)

    return a(mask, a, b), emit


@intrinsic
def sign_bits(typingctx, mask):  # type: ignore[no-untyped-def]
    """The lanes' highest bits as a number, lane 0's the lowest."""

    def emit(context, builder, signature, args):  # type: ignore[no-untyped-def]
        negative = builder.icmp_signed("<", args[0], ir.Constant(args[0].type, None))
        return builder.zext(builder.bitcast(negative, ir.IntType(args[0].type.count)), ir.IntType(64))

    return types.uint64(mask), emit


load_8_bytes, load_16_bytes, load_32_bytes = loader(U8x8), loader(U8x16), loader(U8x32)
load_states = loader(U32x8)
transpose = transposer(U8x32)


@intrinsic
def load_pairs(typingctx, words, pointers, first):  # type: ignore[no-untyped-def]
    """Two words for each lane, the next one in the low half; `pointers[first : first + 8]` say where."""

    def emit(context, builder, signature, args):  # type: ignore[no-untyped-def]
        value: Any = ir.Constant(llvm_type(U32x8), None)
        for lane in range(LANES):
            place = builder.add(args[2], ir.Constant(args[2].type, lane))
            pointer = builder.load(address_of(context, builder, signature.args[1], args[1], place, ir.IntType(32)))
            pointer = builder.zext(pointer, ir.IntType(64))
            address = address_of(context, builder, signature.args[0], args[0], pointer, ir.IntType(32))
            value = builder.insert_element(value, builder.load(address, align=2), ir.Constant(ir.IntType(32), lane))
        return value

    return U32x8(words, pointers, types.uint64), emit


@intrinsic
def store_pairs(typingctx, words, pointers, first, value):  # type: ignore[no-untyped-def]
    """Each lane's two words to where `pointers[first : first + 8]` say that the second ends."""

    def emit(context, builder, signature, args):  # type: ignore[no-untyped-def]
        for lane in range(LANES):
            place = builder.add(args[2], ir.Constant(args[2].type, lane))
            pointer = builder.load(address_of(context, builder, signature.args[1], args[1], place, ir.IntType(32)))
            pointer = builder.sub(builder.zext(pointer, ir.IntType(64)), ir.Constant(ir.IntType(64), 2))
            address = address_of(context, builder, signature.args[0], args[0], pointer, ir.IntType(32))
            builder.store(builder.extract_element(args[3], ir.Constant(ir.IntType(32), lane)), address, align=2)

    return types.void(words, pointers, types.uint64, value), emit


# ---- Tables ----

_FREQUENCY, _DIVISOR, _BELOW, _RECIPROCAL, _ROWS = 0, 2, 4, 6, 10
"""Rows of `Narrow.lookup`: the low one of each pair."""


class Narrow(NamedTuple):
    """The tables of dense channels that a few registers hold, in groups of 16 entries."""

    groups: npt.NDArray[np.uint64]
    """(channels,) how many each has; 0 where it is coded symbol by symbol."""
    begin: npt.NDArray[np.uint64]
    """(channels,) its first group."""
    compared: npt.NDArray[np.uint64]
    """Of all groups: the entries to compare, a multiple of four; the last one is repeated."""
    search: npt.NDArray[np.uint32]
    """Of all groups: 16 times (16 cumulative frequency - number in the group), in the low and high word."""
    lookup: npt.NDArray[np.uint8]
    """Of all groups: `_ROWS` rows of a byte an entry, the lowest byte first. Two of the frequency; two of it with the
    top bit set where the state is taken one greater; two of the cumulative frequency, and in its high four bits a
    shift; four of a reciprocal: see `divisor`."""


def prepare(tables: "list[tuple[npt.NDArray[np.int64], bool]]") -> Narrow | None:
    """Tables of channels from their cumulative frequencies, from 0 to the sum, and whether any entry has raw bits.

    None where no channel suits.
    """
    groups = np.zeros(len(tables), np.uint64)
    begin = np.zeros(len(tables), np.uint64)
    compared: list[int] = []
    search, lookup = [np.zeros((0, GROUP), np.int64)], [np.zeros((0, _ROWS, GROUP), np.int64)]
    for j, (cdf, wide) in enumerate(tables):
        begin[j] = len(compared)
        if wide or len(cdf) - 1 > MOST_ENTRIES:
            continue
        for first in range(0, len(cdf) - 1, GROUP):
            below = cdf[first : first + GROUP + 1]
            below, frequency = below[: min(GROUP, len(cdf) - 1 - first)], np.diff(below)[:GROUP]
            number = np.minimum(np.arange(GROUP), len(below) - 1)
            search.append((16 * below[number] - number)[None] & 0xFFFF)
            lookup.append(_lookup_rows(below[number], frequency[number])[None])
            compared.append((len(below) + 3) // 4 * 4)
            groups[j] += np.uint64(1)
    if not compared:
        return None
    both = np.concatenate(search)
    return Narrow(
        groups=groups,
        begin=begin,
        compared=np.array(compared, np.uint64),
        search=(both | both << 16).astype(np.uint32).ravel(),
        lookup=np.concatenate(lookup).astype(np.uint8).ravel(),
    )


def _lookup_rows(below: npt.NDArray[np.int64], frequency: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    divisors = np.array([divisor(int(f)) for f in frequency], np.int64).T
    reciprocal, shift, more = divisors
    shifted = below | shift << 12
    values = [frequency, frequency >> 8, frequency, frequency >> 8 | more << 7, shifted, shifted >> 8]
    return np.array([*values, *(reciprocal >> 8 * n for n in range(4))]) & 0xFF


def divisor(f: int) -> tuple[int, int, int]:
    """(r, s, more) so that x // f == (x + more) * r >> (32 + s) for all 0 <= x < f << 20, and r < 2**32.

    r is 2**(32 + s) / f rounded up, e = r f - 2**(32 + s) greater than that, or else less than that by e.
    Rounded up, x r / 2**(32 + s) = x / f + x e / (f 2**(32 + s)), which has the same floor if the last part is less
    than 1 / f. Rounded down and with x + 1, it is (x + 1) / f - (x + 1) e / (f 2**(32 + s)), and has the floor of
    x / f if the last part is greater than 0 and at most 1 / f. Since x + 1 <= f << 20, each comes down to f and e, and
    since the two e add up to f and f <= 2**12, one of them always holds.
    """
    s = max(0, (f - 1).bit_length() - 1)
    one = 1 << (32 + s)
    r = -(-one // f)
    if r < 1 << 32 and (r * f - one) * (f << 20) <= one:
        return r, s, 0
    e = one - (r - 1) * f
    assert 0 < e * (f << 20) <= one
    return r - 1, s, 1


def _words_apart() -> "tuple[npt.NDArray[np.uint8], npt.NDArray[np.uint8]]":
    """For each set of lanes, byte shuffles that bring words one after the other to these lanes, and back.

    The first takes them from the beginning, with 0 for the other lanes; the second puts them to the end.
    """
    spread, gather = np.full((256, 16), 0x80, np.uint8), np.zeros((256, 16), np.uint8)
    for mask in range(256):
        lanes = [lane for lane in range(LANES) if mask >> lane & 1]
        for n, lane in enumerate(lanes):
            end = LANES - len(lanes) + n
            for byte in range(2):
                spread[mask, 2 * lane + byte] = 2 * n + byte
                gather[mask, 2 * end + byte] = 2 * lane + byte
    return spread.ravel(), gather.ravel()


SPREAD, GATHER = _words_apart()


class Sets(NamedTuple):
    """Tiles that are coded together, those of a set all of the same number of lanes."""

    tiles: npt.NDArray[np.int64]
    """(sets, 32): as many as there is room for. Where there are fewer, the last one again, which changes nothing."""
    used: npt.NDArray[np.int64]
    """(sets,): how many there are."""
    lanes: npt.NDArray[np.int64]
    """(sets,): of each of their tiles."""


def sets(lanes: npt.NDArray[np.int64], chosen: npt.NDArray[np.int64]) -> "tuple[Sets, npt.NDArray[np.int64]]":
    """Sets of the chosen tiles by their number of lanes, and those that are in none, first those of one lane."""
    by_lanes: dict[int, list[int]] = {1: [], LANES: [], 2 * LANES: []}
    others: list[int] = []
    for i, number in zip(chosen.tolist(), lanes[chosen].tolist(), strict=True):
        by_lanes.get(number, others).append(i)
    tiles, count, of_lanes, rest = [], [], [], []
    for number, mine in by_lanes.items():
        room = SLOTS // number
        for first in range(0, len(mine), room):
            some = mine[first : first + room]
            if len(some) * number < LANES:  # less than a quarter of the states is not worth it
                rest += some
                continue
            tiles.append(some + [some[-1]] * (SLOTS - len(some)))
            count.append(len(some))
            of_lanes.append(number)
    made = Sets(np.array(tiles, np.int64).reshape(-1, SLOTS), np.array(count, np.int64), np.array(of_lanes, np.int64))
    return made, np.array(rest + others, np.int64)


# ---- Decoding ----


@numba.njit(forceinline=True)
def _word_table(lookup, row):  # type: ignore[no-untyped-def]
    """The low and the high bytes of a group's 16 values, in both halves of a register."""
    low = both_halves(load_16_bytes(lookup, row * np.uint64(GROUP)))
    high = both_halves(load_16_bytes(lookup, (row + np.uint64(1)) * np.uint64(GROUP)))
    return low, high


@numba.njit(forceinline=True)
def _choose_words(table, index):  # type: ignore[no-untyped-def]
    """A value a word, by the index in both of its bytes."""
    return as_words(even_bytes(shuffle(table[0], index), shuffle(table[1], index)))


@numba.njit(forceinline=True)
def _closest(v, w, search, group, compared):  # type: ignore[no-untyped-def]
    """For slots times 16 the least of (slot - cumulative frequency) mod 4096 times 16 + entry, of one group.

    For an entry above the slot the difference has 4096 added, so it is greater than the slot, and no entry that is
    right gives that. So the least is the slot's place within its entry, if the group has it.
    """
    at = group * np.uint64(GROUP)
    end = at + compared
    one, two, three = np.uint64(1), np.uint64(2), np.uint64(3)
    low, high = splat16(np.uint32(0xFFFF)), splat16(np.uint32(0xFFFF))
    while at < end:
        a, b = as_words(splat32(search[at])), as_words(splat32(search[at + one]))
        c, d = as_words(splat32(search[at + two])), as_words(splat32(search[at + three]))
        low = least(low, least(least(sub(v, a), sub(v, b)), least(sub(v, c), sub(v, d))))
        high = least(high, least(least(sub(w, a), sub(w, b)), least(sub(w, c), sub(w, d))))
        at += np.uint64(4)
    return low, high


@numba.njit(forceinline=True)
def _index(number):  # type: ignore[no-untyped-def]
    """What chooses bytes by the low four bits of each word."""
    return bits_and(twice(as_bytes(number)), splat8(np.uint32(0x0F)))


@numba.njit(forceinline=True)
def _search(v, w, tables, group, groups):  # type: ignore[no-untyped-def]
    """For slots times 16: 16 times the place in the entry + anything, the entry's frequency, and the entry."""
    fifteen = splat16(np.uint32(15))
    rows = np.uint64(_ROWS)
    v_best, w_best = _closest(v, w, tables.search, group, tables.compared[group])
    table = _word_table(tables.lookup, group * rows + np.uint64(_FREQUENCY))
    v_frequency, w_frequency = _choose_words(table, _index(v_best)), _choose_words(table, _index(w_best))
    v_entry, w_entry = bits_and(v_best, fifteen), bits_and(w_best, fifteen)
    for more in range(np.uint64(1), groups):
        group += np.uint64(1)
        base = splat16(np.uint32(more * np.uint64(GROUP)))
        v_next, w_next = _closest(v, w, tables.search, group, tables.compared[group])
        table = _word_table(tables.lookup, group * rows + np.uint64(_FREQUENCY))
        better = less(v_next, v_best)
        v_frequency = choose(better, _choose_words(table, _index(v_next)), v_frequency)
        v_entry = choose(better, bits_or(bits_and(v_next, fifteen), base), v_entry)
        better = less(w_next, w_best)
        w_frequency = choose(better, _choose_words(table, _index(w_next)), w_frequency)
        w_entry = choose(better, bits_or(bits_and(w_next, fifteen), base), w_entry)
        v_best, w_best = least(v_best, v_next), least(w_best, w_next)
    return v_best, w_best, v_frequency, w_frequency, v_entry, w_entry


@numba.njit(forceinline=True)
def _slots(a, b):  # type: ignore[no-untyped-def]
    """16 times the slots of two vectors of states: those of the first in the even words."""
    return even_words(as_words(left(a, splat32(np.uint32(4)))), as_words(left(b, splat32(np.uint32(20)))))


@numba.njit(forceinline=True)
def _even(words):  # type: ignore[no-untyped-def]
    return bits_and(as_states(words), splat32(np.uint32(0xFFFF)))


@numba.njit(forceinline=True)
def _odd(words):  # type: ignore[no-untyped-def]
    return right(as_states(words), splat32(np.uint32(16)))


@numba.njit(forceinline=True)
def _advance(x, frequency, place):  # type: ignore[no-untyped-def]
    return add(mul(frequency, right(x, splat32(np.uint32(12)))), place)


@numba.njit(forceinline=True)
def _pull(a, b, c, d, tables, group, groups, block, row):  # type: ignore[no-untyped-def]
    """One decoding step without its words: the states after it. The entries go to `block[row : row + 32]`."""
    v, w, f, g, k, n = _search(_slots(a, b), _slots(c, d), tables, group, groups)
    store(block, row, as_bytes(bits_or(k, left(n, splat16(np.uint32(8))))))
    four = splat16(np.uint32(4))
    v, w = right(v, four), right(w, four)
    return (
        _advance(a, _even(f), _even(v)),
        _advance(b, _odd(f), _odd(v)),
        _advance(c, _even(g), _even(w)),
        _advance(d, _odd(g), _odd(w)),
    )


@numba.njit(forceinline=True)
def _refill(x, old, active, words, pointer):  # type: ignore[no-untyped-def]
    """The next words for the active lanes that need one; the other lanes keep their `old` state. And the pointer.

    Eight words are read, used or not: `SPARE`.
    """
    short = bits_and(less(x, splat32(np.uint32(LOWER))), active)
    lanes = sign_bits(short)
    bytes_ = shuffle(load_16_bytes(words, pointer), load_16_bytes(SPREAD, lanes * np.uint64(16)))
    x = bits_or(choose(short, left(x, splat32(np.uint32(16))), x), widen(as_short_words(bytes_)))
    return choose(active, x, old), pointer + count_bits(lanes)


@numba.njit(forceinline=True)
def _refill_own(x, pair, count):  # type: ignore[no-untyped-def]
    """The same for lanes that have a tile each, by pairs of words: the states, the words left, words counted."""
    short = less(x, splat32(np.uint32(LOWER)))
    longer = even_words(as_words(pair), as_words(left(x, splat32(np.uint32(16)))))
    x = choose(short, as_states(longer), x)
    return x, right(pair, bits_and(short, splat32(np.uint32(16)))), sub(count, short)


@numba.njit(forceinline=True)
def _active(tokens, lanes_before):  # type: ignore[no-untyped-def]
    """The lanes that have a token in the last step, of a vector with so many lanes of its tile before it."""
    lane = load_states(_LANE_NUMBERS, np.uint64(0))
    return less(add(lane, splat32(np.uint32(lanes_before))), splat32(np.uint32(tokens)))


_LANE_NUMBERS = np.arange(LANES, dtype=np.uint32)


@numba.njit
def _decode_lanes(words, at, state, tiles, lanes, tokens, tables, group, groups, block, row):  # type: ignore[no-untyped-def]
    """One channel of four tiles of eight lanes, or of two of sixteen."""
    two = lanes > LANES
    ia, ic = tiles[0], tiles[1]
    ib, id_ = (ia, ic) if two else (tiles[2], tiles[3])
    half = LANES if two else 0
    sa, sb = np.uint64(ia * 16), np.uint64(ib * 16 + half)
    sc, sd = np.uint64(ic * 16), np.uint64(id_ * 16 + half)
    a, b, c, d = load_states(state, sa), load_states(state, sb), load_states(state, sc), load_states(state, sd)
    pa, pb, pc, pd = np.uint64(at[ia]), np.uint64(at[ib]), np.uint64(at[ic]), np.uint64(at[id_])
    row = np.uint64(row)
    every = splat32(np.uint32(0xFFFFFFFF))
    for _ in range(tokens // lanes):
        na, nb, nc, nd = _pull(a, b, c, d, tables, group, groups, block, row)
        a, pa = _refill(na, a, every, words, pa)
        pb = pa if two else pb
        b, pb = _refill(nb, b, every, words, pb)
        pa = pb if two else pa
        c, pc = _refill(nc, c, every, words, pc)
        pd = pc if two else pd
        d, pd = _refill(nd, d, every, words, pd)
        pc = pd if two else pc
        row += np.uint64(SLOTS)
    if tokens % lanes:
        na, nb, nc, nd = _pull(a, b, c, d, tables, group, groups, block, row)
        first, second = _active(tokens % lanes, 0), _active(tokens % lanes, half)
        a, pa = _refill(na, a, first, words, pa)
        pb = pa if two else pb
        b, pb = _refill(nb, b, second, words, pb)
        pa = pb if two else pa
        c, pc = _refill(nc, c, first, words, pc)
        pd = pc if two else pd
        d, pd = _refill(nd, d, second, words, pd)
        pc = pd if two else pc
    store(state, sa, a)
    store(state, sb, b)
    store(state, sc, c)
    store(state, sd, d)
    at[ia], at[ib], at[ic], at[id_] = pa, pb, pc, pd


@numba.njit
def _decode_tiles(words, pointers, states, tokens, tables, group, groups, block, row):  # type: ignore[no-untyped-def]
    """One channel of 32 tiles of one lane; two words are fetched for two tokens, which take no more."""
    at_a, at_b, at_c, at_d = np.uint64(0), np.uint64(8), np.uint64(16), np.uint64(24)
    a, b = load_states(states, at_a), load_states(states, at_b)
    c, d = load_states(states, at_c), load_states(states, at_d)
    row = np.uint64(row)
    for t in range(0, tokens, 2):
        wa, wb = load_pairs(words, pointers, at_a), load_pairs(words, pointers, at_b)
        wc, wd = load_pairs(words, pointers, at_c), load_pairs(words, pointers, at_d)
        pa, pb = load_states(pointers, at_a), load_states(pointers, at_b)
        pc, pd = load_states(pointers, at_c), load_states(pointers, at_d)
        for _ in range(min(2, tokens - t)):
            a, b, c, d = _pull(a, b, c, d, tables, group, groups, block, row)
            a, wa, pa = _refill_own(a, wa, pa)
            b, wb, pb = _refill_own(b, wb, pb)
            c, wc, pc = _refill_own(c, wc, pc)
            d, wd, pd = _refill_own(d, wd, pd)
            row += np.uint64(SLOTS)
        store(pointers, at_a, pa)
        store(pointers, at_b, pb)
        store(pointers, at_c, pc)
        store(pointers, at_d, pd)
    store(states, at_a, a)
    store(states, at_b, b)
    store(states, at_c, c)
    store(states, at_d, d)


@numba.njit
def _slot(lane, lanes, n):  # type: ignore[no-untyped-def]
    """The byte of a row that belongs to a lane of a set's tile `n`."""
    return lane % LANES * 4 + lane // LANES * 2 + n


@numba.njit
def _slots_of(lanes, count):  # type: ignore[no-untyped-def]
    """`_slot` of a set's first tiles and their lanes, int64 (tiles, lanes)."""
    slot = np.empty((count, lanes), np.int64)
    for n in range(count):
        for lane in range(lanes):
            slot[n, lane] = _slot(lane, lanes, n)
    return slot


@numba.njit
def _places(tiles, count, lanes, tokens, channels):  # type: ignore[no-untyped-def]
    """For each lane of a set's first tiles: where it is in `transpose`'s rows, and in the symbols (at token 0)."""
    in_rows, in_symbols = np.empty(lanes * count, np.int64), np.empty(lanes * count, np.int64)
    for lane in range(lanes):
        for n in range(count):
            slot = _slot(lane, lanes, n)
            in_rows[lane * count + n] = slot % 16 * SLOTS + slot // 16 * 16
            in_symbols[lane * count + n] = (tiles[n] * tokens + lane) * channels
    return in_rows, in_symbols


@numba.njit
def _block_columns(steps, channels):  # type: ignore[no-untyped-def]
    """Columns whose entries are kept before they are written out: whole cache lines of symbols."""
    most = min(max(1, _BLOCK_BYTES // (SLOTS * (steps + 1) * _COLUMNS)), 8)
    lines = (channels + _COLUMNS - 1) // _COLUMNS
    blocks = (lines + most - 1) // most
    return (lines + blocks - 1) // blocks * _COLUMNS


@numba.njit
def _offsets(first, last, left_column, columns, dense):  # type: ignore[no-untyped-def]
    """The first symbols of a block's channels, int32 (columns,)."""
    offset = np.zeros(columns, np.int32)
    for j in range(first, last):
        offset[dense.column[j] - left_column] = dense.first[dense.start[j]]
    return offset


@numba.njit
def _write(block, stride, lanes, tokens, places, offset, columns, out, column, channels):  # type: ignore[no-untyped-def]
    """A block's entries as symbols, to `columns` columns of the symbols `out` from `column` on.

    A row of a block is written in one go, and the next one asked for: rows are far apart, and tiles may lie so that
    their lines displace each other.
    """
    in_rows, in_symbols = places
    rows = np.empty(len(offset) * SLOTS, np.uint8)
    whole = columns // _COLUMNS * _COLUMNS
    eight, size, ahead = np.uint64(8), np.uint64(SLOTS), np.uint64(lanes * channels)
    for t in range(0, tokens, lanes):
        for c in range(0, columns, _COLUMNS):
            here = np.uint64(c * stride + t // lanes * SLOTS)
            transpose(block, here, np.uint64(stride), rows, np.uint64(c * SLOTS), size)
        for m in range(min(lanes, tokens - t) * (len(in_rows) // lanes)):
            row, line = in_rows[m], in_symbols[m] + t * channels + column
            for c in range(0, whole, _COLUMNS):
                here, there = np.uint64(row + c * SLOTS), np.uint64(line + c)
                prefetch(out, there + ahead)
                low, high = load_states(offset, np.uint64(c)), load_states(offset, np.uint64(c) + eight)
                store(out, there, add(widen(load_8_bytes(rows, here)), low))
                store(out, there + eight, add(widen(load_8_bytes(rows, here + eight)), high))
            for c in range(whole, columns):
                out[line + c] = np.int32(rows[row + whole * SLOTS + c - whole]) + offset[c]


@numba.njit
def decode_one(words, at, states, slot, j, dense, block, row, wide, column):  # type: ignore[no-untyped-def]
    """One channel of one tile at 12 bits, of any number of entries and raw bits; where its words go on.

    `slot[lane]` is the byte of a row of the block that belongs to the lane.
    """
    lanes = len(slot)
    slots, base = dense.slot[j], np.uint64(dense.start[j])
    pointer = np.uint64(at)
    twelve, sixteen = np.uint64(12), np.uint64(16)
    for t in range(wide.shape[0]):
        lane = t % lanes
        x = np.uint64(states[lane])
        part = x & np.uint64(4095)
        k = slots[part]
        e = np.uint64(dense.entry[base + np.uint64(k)])
        x = (e >> sixteen) * (x >> twelve) + part - (e & np.uint64(0xFFFF))
        if x < np.uint64(LOWER):
            x = (x << sixteen) | np.uint64(words[pointer])
            pointer += np.uint64(1)
        if dense.wide[j]:
            bits = np.uint64(dense.shift[base + np.uint64(k)])
            raw = np.int32(x & ((np.uint64(1) << bits) - np.uint64(1)))
            x >>= bits
            if x < np.uint64(LOWER):
                x = (x << sixteen) | np.uint64(words[pointer])
                pointer += np.uint64(1)
            wide[t, column] = dense.first[base + np.uint64(k)] + raw
        states[lane] = x
        block[row + t // lanes * SLOTS + slot[lane]] = k
    return np.int64(pointer)


@numba.njit
def _vector_place(n):  # type: ignore[no-untyped-def]
    """Where tile `n` of 32 is among the states A, B, C, D, for its slot to be `n`."""
    return n % 4 // 2 * 8 + n % 2 * 16 + n // 4


@numba.njit(cache=True, nogil=True)
def decode_dense(words, at, stop, state, faults, some, first_channel, channels, dense, narrow, out):  # type: ignore[no-untyped-def]
    """The dense channels of sets of tiles.

    Args:
        words: uint16, of all tiles; two words a token and `SPARE` more lie behind the last.
        at: int64 (tiles,), where in `words` each tile goes on; moved.
        stop: int64 (tiles,), where its words end.
        state: uint32 (tiles, 16), the lanes' states; moved.
        faults: int64 (tiles,), set where a tile takes more words than it has.
        some: which tiles (`Sets`).
        first_channel: the layer's first channel in `out`.
        channels: the layer's channels.
        dense: the dense channels' tables (`payload.Dense`), of 12 bits of precision.
        narrow: the same for registers.
        out: int32 (tiles, tokens, channels of the scale), 0 in the layer's columns.
    """
    tokens = out.shape[1]
    flat_state, flat_out = state.reshape(state.size), out.reshape(out.size)
    pointers, states = np.empty(SLOTS, np.uint32), np.empty(SLOTS, np.uint32)
    for s in range(len(some.lanes)):
        lanes, count = some.lanes[s], some.used[s]
        tiles = some.tiles[s, : SLOTS // lanes]
        places, slot = _places(tiles, count, lanes, tokens, out.shape[2]), _slots_of(lanes, count)
        steps = (tokens + lanes - 1) // lanes
        # A row more than there are, so that columns do not all fall on the same few lines of the cache.
        stride = (steps + 1) * SLOTS
        columns = _block_columns(steps, channels)
        block = np.empty(columns * stride, np.uint8)
        wide = np.empty((count, tokens, min(columns, channels) if dense.wide.any() else 0), np.int32)
        last = 0
        for begin in range(0, channels, columns):
            end, left_column = min(begin + columns, channels), first_channel + begin
            first = last
            while last < len(dense.column) and dense.column[last] < first_channel + end:
                last += 1
            if first == last:
                continue
            if last - first < columns:
                block[:] = 0  # the columns that are not dense
            for j in range(first, last):
                column = dense.column[j] - left_column
                row = column * stride
                group, groups = narrow.begin[j], narrow.groups[j]
                if groups == 0:
                    for n in range(count):
                        i = tiles[n]
                        at[i] = decode_one(words, at[i], state[i], slot[n], j, dense, block, row, wide[n], column)
                elif lanes == 1:
                    for n in range(SLOTS):
                        place = _vector_place(n)
                        pointers[place], states[place] = at[tiles[n]], state[tiles[n], 0]
                    _decode_tiles(words, pointers, states, tokens, narrow, group, groups, block, row)
                    for n in range(SLOTS):
                        place = _vector_place(n)
                        at[tiles[n]], state[tiles[n], 0] = pointers[place], states[place]
                else:
                    _decode_lanes(words, at, flat_state, tiles, lanes, tokens, narrow, group, groups, block, row)
                for n in range(count):
                    if at[tiles[n]] > stop[tiles[n]]:
                        faults[tiles[n]] = WORDS
                        at[tiles[n]] = stop[tiles[n]]  # and on with it, to no avail and no harm
            offset = _offsets(first, last, left_column, columns, dense)
            _write(block, stride, lanes, tokens, places, offset, end - begin, flat_out, left_column, out.shape[2])
            for j in range(first, last):
                if dense.wide[j]:
                    for n in range(count):
                        out[tiles[n], :, dense.column[j]] = wide[n, :, dense.column[j] - left_column]


# ---- Encoding ----


@numba.njit(forceinline=True)
def _values(lookup, group, index):  # type: ignore[no-untyped-def]
    """What encodes a group's entries, a word each: `Narrow.lookup`. 0 where the index has its top bit set."""
    row = group * np.uint64(_ROWS)
    frequency = _choose_words(_word_table(lookup, row + np.uint64(_DIVISOR)), index)
    below = _choose_words(_word_table(lookup, row + np.uint64(_BELOW)), index)
    low = _choose_words(_word_table(lookup, row + np.uint64(_RECIPROCAL)), index)
    high = _choose_words(_word_table(lookup, row + np.uint64(_RECIPROCAL + 2)), index)
    return frequency, below, low, high


@numba.njit(forceinline=True)
def _codings(index, tables, group, groups):  # type: ignore[no-untyped-def]
    """What encodes entries: (frequency, below, reciprocal) of a vector's, in the even words, and another's."""
    # Entries from 16 on, and those before the group's, get the top bit set by this.
    beyond = splat8(np.uint32(0x80 - GROUP))
    frequency, below, low, high = _values(tables.lookup, group, add_saturated(index, beyond))
    for more in range(np.uint64(1), groups):
        mine = add_saturated(sub(index, splat8(np.uint32(more * np.uint64(GROUP)))), beyond)
        a, b, c, d = _values(tables.lookup, group + more, mine)
        frequency, below, low, high = bits_or(frequency, a), bits_or(below, b), bits_or(low, c), bits_or(high, d)
    sixteen = splat32(np.uint32(16))
    even = even_words(low, as_words(left(as_states(high), sixteen)))
    odd = even_words(as_words(right(as_states(low), sixteen)), high)
    return (_even(frequency), _even(below), as_states(even)), (_odd(frequency), _odd(below), as_states(odd))


@numba.njit(forceinline=True)
def _first_entries(block, row):  # type: ignore[no-untyped-def]
    """The entries of A and B in a row, each in both bytes of a word."""
    return twice(load_32_bytes(block, row))


@numba.njit(forceinline=True)
def _second_entries(block, row):  # type: ignore[no-untyped-def]
    """The entries of C and D."""
    return twice(as_bytes(right(as_words(load_32_bytes(block, row)), splat16(np.uint32(8)))))


@numba.njit(forceinline=True)
def _keeps(x, coding):  # type: ignore[no-untyped-def]
    """Which states need not give up a word before their step."""
    return less_signed(right(x, splat32(np.uint32(20))), bits_and(coding[0], splat32(np.uint32(0x7FFF))))


@numba.njit(forceinline=True)
def _push(x, keep, coding):  # type: ignore[no-untyped-def]
    """One encoding step: the states after it; those not in `keep` have given up their low word."""
    more_and_frequency, shifted, reciprocal = coding
    frequency = bits_and(more_and_frequency, splat32(np.uint32(0x7FFF)))
    below, shift = bits_and(shifted, splat32(np.uint32(0xFFF))), right(shifted, splat32(np.uint32(12)))
    x = choose(keep, x, right(x, splat32(np.uint32(16))))
    more = right(more_and_frequency, splat32(np.uint32(15)))
    quotient = right(high_products(add(x, more), reciprocal), shift)
    return add(add(x, below), mul(quotient, sub(splat32(np.uint32(4096)), frequency)))


@numba.njit(forceinline=True)
def _push_lanes(x, active, coding, words, pointer):  # type: ignore[no-untyped-def]
    """One encoding step of the active lanes, whose words go before `pointer`: the states and the pointer after it.

    Eight words are written, used or not: `SPARE`.
    """
    keep = _keeps(x, coding)
    lanes = sign_bits(bits_and(less(keep, active), active))
    given = shuffle(as_short_bytes(low_words(x)), load_16_bytes(GATHER, lanes * np.uint64(16)))
    store(words, pointer - np.uint64(LANES), given)
    return choose(active, _push(x, keep, coding), x), pointer - count_bits(lanes)


@numba.njit
def _encode_lanes(words, at, room, state, tiles, lanes, tokens, tables, group, groups, block, row):  # type: ignore[no-untyped-def]
    """One channel of four tiles of eight lanes, or of two of sixteen, backwards."""
    two = lanes > LANES
    ia, ic = tiles[0], tiles[1]
    ib, id_ = (ia, ic) if two else (tiles[2], tiles[3])
    half = LANES if two else 0
    sa, sb = np.uint64(ia * 16), np.uint64(ib * 16 + half)
    sc, sd = np.uint64(ic * 16), np.uint64(id_ * 16 + half)
    a, b, c, d = load_states(state, sa), load_states(state, sb), load_states(state, sc), load_states(state, sd)
    pa, pb = np.uint64(ia * room + at[ia]), np.uint64(ib * room + at[ib])
    pc, pd = np.uint64(ic * room + at[ic]), np.uint64(id_ * room + at[id_])
    row = np.uint64(row + (tokens + lanes - 1) // lanes * SLOTS)
    if tokens % lanes:
        row -= np.uint64(SLOTS)
        ca, cb = _codings(_first_entries(block, row), tables, group, groups)
        cc, cd = _codings(_second_entries(block, row), tables, group, groups)
        first, second = _active(tokens % lanes, 0), _active(tokens % lanes, half)
        b, pb = _push_lanes(b, second, cb, words, pb)
        pa = pb if two else pa
        a, pa = _push_lanes(a, first, ca, words, pa)
        pb = pa if two else pb
        d, pd = _push_lanes(d, second, cd, words, pd)
        pc = pd if two else pc
        c, pc = _push_lanes(c, first, cc, words, pc)
        pd = pc if two else pd
    every = splat32(np.uint32(0xFFFFFFFF))
    for _ in range(tokens // lanes):
        row -= np.uint64(SLOTS)
        ca, cb = _codings(_first_entries(block, row), tables, group, groups)
        cc, cd = _codings(_second_entries(block, row), tables, group, groups)
        b, pb = _push_lanes(b, every, cb, words, pb)
        pa = pb if two else pa
        a, pa = _push_lanes(a, every, ca, words, pa)
        pb = pa if two else pb
        d, pd = _push_lanes(d, every, cd, words, pd)
        pc = pd if two else pc
        c, pc = _push_lanes(c, every, cc, words, pc)
        pd = pc if two else pd
    store(state, sa, a)
    store(state, sb, b)
    store(state, sc, c)
    store(state, sd, d)
    at[ia], at[ic] = np.int64(pa) - ia * room, np.int64(pc) - ic * room
    at[ib], at[id_] = np.int64(pb) - ib * room, np.int64(pd) - id_ * room


@numba.njit(forceinline=True)
def _push_one(x, coding, pointer):  # type: ignore[no-untyped-def]
    """One encoding step of lanes that have a tile each: the states, the pointers, the words if kept not, and those."""
    keep = _keeps(x, coding)
    # Where a word is given up, its lane is not kept: -1 + 0, and else -1 + 1.
    moved = sub(splat32(np.uint32(0xFFFFFFFF)), keep)
    return _push(x, keep, coding), add(pointer, moved), keep


@numba.njit(forceinline=True)
def _push_two(x, later, earlier, words, pointers, place):  # type: ignore[no-untyped-def]
    """Two encoding steps of lanes that have a tile each, by the coding of the later token first.

    Both words before the pointer are written, used or not: `SPARE`.
    """
    sixteen = splat32(np.uint32(16))
    pointer = load_states(pointers, place)
    first = left(x, sixteen)
    x, pointer, keep = _push_one(x, later, pointer)
    given = choose(keep, left(x, sixteen), as_states(even_words(as_words(x), as_words(first))))
    store_pairs(words, pointers, place, given)
    x, pointer, _ = _push_one(x, earlier, pointer)
    store(pointers, place, pointer)
    return x


@numba.njit(forceinline=True)
def _push_last(x, coding, words, pointers, place):  # type: ignore[no-untyped-def]
    """`_push_two` for the last token of an odd number."""
    store_pairs(words, pointers, place, left(x, splat32(np.uint32(16))))
    x, pointer, _ = _push_one(x, coding, load_states(pointers, place))
    store(pointers, place, pointer)
    return x


@numba.njit
def _encode_tiles(words, pointers, states, tokens, tables, group, groups, block, row):  # type: ignore[no-untyped-def]
    """One channel of 32 tiles of one lane, backwards, two tokens at a time."""
    at_a, at_b, at_c, at_d = np.uint64(0), np.uint64(8), np.uint64(16), np.uint64(24)
    a, b = load_states(states, at_a), load_states(states, at_b)
    c, d = load_states(states, at_c), load_states(states, at_d)
    size = np.uint64(SLOTS)
    row = np.uint64(row + tokens * SLOTS)
    if tokens % 2:
        row -= size
        first, second = _codings(_first_entries(block, row), tables, group, groups)
        a = _push_last(a, first, words, pointers, at_a)
        b = _push_last(b, second, words, pointers, at_b)
        first, second = _codings(_second_entries(block, row), tables, group, groups)
        c = _push_last(c, first, words, pointers, at_c)
        d = _push_last(d, second, words, pointers, at_d)
    for _ in range(tokens // 2):
        row -= size + size
        later_a, later_b = _codings(_first_entries(block, row + size), tables, group, groups)
        first, second = _codings(_first_entries(block, row), tables, group, groups)
        a = _push_two(a, later_a, first, words, pointers, at_a)
        b = _push_two(b, later_b, second, words, pointers, at_b)
        later_c, later_d = _codings(_second_entries(block, row + size), tables, group, groups)
        first, second = _codings(_second_entries(block, row), tables, group, groups)
        c = _push_two(c, later_c, first, words, pointers, at_c)
        d = _push_two(d, later_d, second, words, pointers, at_d)
    store(states, at_a, a)
    store(states, at_b, b)
    store(states, at_c, c)
    store(states, at_d, d)


@numba.njit
def encode_one(words, at, states, lanes, j, dense, tile):  # type: ignore[no-untyped-def]
    """One channel of one tile at 12 bits, of any number of entries and raw bits; where the next word goes before."""
    base = dense.start[j]
    first, shift = dense.first[base : dense.start[j + 1]], dense.shift[base : dense.start[j + 1]]
    pointer = np.uint64(at)
    twelve, sixteen = np.uint64(12), np.uint64(16)
    for t in range(tile.shape[0] - 1, -1, -1):
        symbol = tile[t, dense.column[j]]
        k, raw = np.int64(0), np.int64(0)
        if symbol > first[0]:  # the nearest one's where it has no entry
            k = np.searchsorted(first, symbol, side="right") - 1
            raw = min(np.int64(symbol) - np.int64(first[k]), (np.int64(1) << np.int64(shift[k])) - 1)
        x = np.uint64(states[t % lanes])
        if shift[k]:
            if x >= np.uint64(1) << np.uint64(32 - shift[k]):
                pointer -= np.uint64(1)
                words[pointer] = x
                x >>= sixteen
            x = (x << np.uint64(shift[k])) | np.uint64(raw)
        e = np.uint64(dense.entry[base + k])
        frequency = e >> sixteen
        if x >= frequency << np.uint64(20):
            pointer -= np.uint64(1)
            words[pointer] = x
            x >>= sixteen
        quotient = x // frequency
        states[t % lanes] = (quotient << twelve) + (x - quotient * frequency) + (e & np.uint64(0xFFFF))
    return np.int64(pointer)


@numba.njit
def _read(block, stride, lanes, tokens, places, offset, columns, symbols, column, channels):  # type: ignore[no-untyped-def]
    """Columns of symbols as a block's entries; nonsense for symbols without an entry. The opposite of `_write`."""
    in_rows, in_symbols = places
    rows = np.zeros(len(offset) * SLOTS, np.uint8)
    whole = columns // _COLUMNS * _COLUMNS
    eight, size, ahead = np.uint64(8), np.uint64(SLOTS), np.uint64(lanes * channels)
    for t in range(0, tokens, lanes):
        for m in range(min(lanes, tokens - t) * (len(in_rows) // lanes)):
            row, line = in_rows[m], in_symbols[m] + t * channels + column
            for c in range(0, whole, _COLUMNS):
                here, there = np.uint64(row + c * SLOTS), np.uint64(line + c)
                prefetch(symbols, there + ahead)
                low, high = load_states(offset, np.uint64(c)), load_states(offset, np.uint64(c) + eight)
                store(rows, here, low_bytes(sub(load_states(symbols, there), low)))
                store(rows, here + eight, low_bytes(sub(load_states(symbols, there + eight), high)))
            for c in range(whole, columns):
                rows[row + whole * SLOTS + c - whole] = np.uint8(symbols[line + c] - offset[c])
        for c in range(0, columns, _COLUMNS):
            here = np.uint64(c * stride + t // lanes * SLOTS)
            transpose(rows, np.uint64(c * SLOTS), size, block, here, np.uint64(stride))


@numba.njit(cache=True, nogil=True)
def encode_dense(symbols, marks, words, at, state, some, first_channel, channels, dense, narrow):  # type: ignore[no-untyped-def]
    """The dense channels of sets of tiles, backwards, into `words` from its end.

    Args:
        symbols: int32 (tiles, tokens, channels of the scale).
        marks: the tokens of symbols that have no entry, among others, int64, and where those of each tile and channel
            begin, int64 (tiles, channels + 1).
        words: uint16 (tiles, room); the room is for all of a tile's words and `SPARE` more.
        at: int64 (tiles,), where each tile's next word goes before; moved.
        state: uint32 (tiles, 16), the lanes' states; moved.
        some: which tiles (`Sets`).
        first_channel: the layer's first channel in `symbols`.
        channels: the layer's channels.
        dense: the dense channels' tables (`payload.Dense`), of 12 bits of precision.
        narrow: the same for registers.
    """
    mark, mark_start = marks
    tokens, room = symbols.shape[1], words.shape[1]
    flat_state, flat_words, flat_symbols = (
        state.reshape(state.size),
        words.reshape(words.size),
        symbols.reshape(symbols.size),
    )
    pointers, states = np.empty(SLOTS, np.uint32), np.empty(SLOTS, np.uint32)
    for s in range(len(some.lanes)):
        lanes, count = some.lanes[s], some.used[s]
        tiles = some.tiles[s, : SLOTS // lanes]
        places = _places(tiles, len(tiles), lanes, tokens, symbols.shape[2])
        steps = (tokens + lanes - 1) // lanes
        stride = (steps + 1) * SLOTS
        columns = _block_columns(steps, channels)
        block = np.empty(columns * stride, np.uint8)
        first = len(dense.column)
        for begin in range((channels - 1) // columns * columns, -1, -columns):
            end, left_column = min(begin + columns, channels), first_channel + begin
            last = first
            while first > 0 and dense.column[first - 1] >= left_column:
                first -= 1
            if first == last:
                continue
            offset = _offsets(first, last, left_column, columns, dense)
            _read(
                block, stride, lanes, tokens, places, offset, end - begin, flat_symbols, left_column, symbols.shape[2]
            )
            for j in range(last - 1, first - 1, -1):
                column = dense.column[j]
                row = (column - left_column) * stride
                group, groups = narrow.begin[j], narrow.groups[j]
                if groups == 0:
                    for n in range(count):
                        i = tiles[n]
                        at[i] = encode_one(words[i], at[i], state[i], lanes, j, dense, symbols[i])
                    continue
                for n in range(len(tiles)):  # what has no entry gets the nearest one's
                    i, c = tiles[n], column - first_channel
                    for m in range(mark_start[i, c], mark_start[i, c + 1]):
                        above = symbols[i, mark[m], column] > dense.first[dense.start[j]]
                        top = np.uint8(dense.start[j + 1] - dense.start[j] - 1)
                        step, lane = mark[m] // lanes, mark[m] % lanes
                        block[row + step * SLOTS + _slot(lane, lanes, n)] = top if above else np.uint8(0)
                if lanes == 1:
                    for n in range(SLOTS):
                        place = _vector_place(n)
                        pointers[place], states[place] = tiles[n] * room + at[tiles[n]], state[tiles[n], 0]
                    _encode_tiles(flat_words, pointers, states, tokens, narrow, group, groups, block, row)
                    for n in range(SLOTS):
                        place = _vector_place(n)
                        at[tiles[n]], state[tiles[n], 0] = np.int64(pointers[place]) - tiles[n] * room, states[place]
                else:
                    _encode_lanes(
                        flat_words, at, room, flat_state, tiles, lanes, tokens, narrow, group, groups, block, row
                    )

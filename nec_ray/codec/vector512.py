"""The dense channels on AVX-512: the same bytes as rans.py reads and writes, 32 symbols a step of a unit.

A unit is two vectors A, B of sixteen 32-bit states: eight lanes of four tiles (A the first two), sixteen lanes of two
tiles, or one lane of 32 tiles, the even ones in A. A step waits for the one before it in its lane for some 70 cycles,
so several units take turns (`_UNITS`); their states lie in memory between, and the processor does the rest. What a
channel's symbols are decoded to, or encoded from, lies between in rows of 32 bytes, one a step, whose byte 2 e + v
belongs to element e of A (v = 0) or B: that is how the vectors' entries fall together (`_slots_of`).

A channel's table of up to 64 entries lies in one or two registers, and a permutation of these by the entries' numbers
looks all of them up at once. Up to 16 entries are compared with the slots one after the other (`_compare`); among more
the entry is searched bit by bit, the highest first (`_find`). Channels of more than 64 entries or with raw bits are
coded symbol by symbol.

Nothing here may be compiled before `available()` said yes: LLVM aborts the process where it meets an instruction that
the processor has not. What keeps loads and stores within arrays, whatever a payload holds, is what does so in
vector.py, with the same `SPARE`: a fetch takes at most eight words from a pointer, and the pointer moves by at most
a word a token, two where there are raw bits. Permutations cannot leave their registers.
"""

# ruff: noqa: ARG001, PLR0912  (numba gives intrinsics more than they need; kernels are not cut for length)

from functools import cache
from typing import Any, NamedTuple

import numba
import numpy as np
import numpy.typing as npt
from llvmlite import binding, ir
from numba.core import cgutils, types
from numba.core.registry import cpu_target
from numba.core.types.containers import UniTuple
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
from nec_ray.codec.vector import (
    GATHER,
    LOWER,
    SLOTS,
    SPREAD,
    WORDS,
    decode_one,
    divisor,
    encode_one,
)

NEEDED = ("avx512f", "avx512bw", "avx512dq", "avx512vl", "avx512vbmi", "avx512vbmi2")
"""What the processor must have: Intel's from Ice Lake on, AMD's from Zen 4 on."""
LANES = 16
"""States of a vector."""
MOST_ENTRIES = 64
_UNITS = 4
"""Units that take turns."""
_BLOCK_BYTES = 7 << 16
"""Of entries between the states and the symbols, at most: they stay in the second-level cache."""
_COLUMNS = 16
"""Columns of symbols that are written at once: a cache line."""


@cache
def available() -> bool:
    """Whether the processor has all of `NEEDED` and numba uses it."""
    compiled_for = cpu_target.target_context.codegen().magic_tuple()[2].split(",")
    host = binding.get_host_cpu_features()
    return all(f"+{name}" in compiled_for and host.get(name) for name in NEEDED)


# ---- Vectors ----

U8x16, U8x32, U8x64 = Vector(16, 8), Vector(32, 8), Vector(64, 8)
U16x16, U16x32, U32x16 = Vector(16, 16), Vector(32, 16), Vector(16, 32)

splat16, splat32 = splat(U16x32), splat(U32x16)
as_words, as_states, as_bytes = bitcast(U16x32), bitcast(U32x16), bitcast(U8x32)
as_short_words = bitcast(U16x16)
widen = convert(U32x16, lambda builder, a: builder.zext(a, llvm_type(U32x16)))
"""Sixteen words or bytes as 32-bit numbers."""
low_words = convert(U16x16, lambda builder, a: builder.trunc(a, llvm_type(U16x16)))
low_bytes = convert(U8x16, lambda builder, a: builder.trunc(a, llvm_type(U8x16)))
words_to_bytes = convert(U8x32, lambda builder, a: builder.trunc(a, llvm_type(U8x32)))
shuffle = binary(call("llvm.x86.avx2.pshuf.b"))
"""Bytes of the first, chosen by the low four bits of the second in each half of 16; 0 where its top bit is set."""
load_16_bytes, load_short_words = loader(U8x16), loader(U16x16)
load_states, load_words = loader(U32x16), loader(U16x32)
transpose = transposer(U8x64)


def _half(which: int) -> Any:
    lanes = shuffled(*range(16 * which, 16 * which + 16))
    return convert(U8x16, lambda builder, a: builder.shuffle_vector(a, a, lanes))


low_half, high_half = _half(0), _half(1)


@intrinsic
def both(typingctx, low, high):  # type: ignore[no-untyped-def]
    """Twice sixteen bytes."""

    def emit(context, builder, signature, args):  # type: ignore[no-untyped-def]
        return builder.shuffle_vector(args[0], args[1], shuffled(*range(32)))

    return U8x32(low, high), emit


@intrinsic
def permute(typingctx, table, index):  # type: ignore[no-untyped-def]
    """Elements of a register by the low bits of the index's: four of 16, five of 32."""

    def emit(context, builder, signature, args):  # type: ignore[no-untyped-def]
        name = {32: "llvm.x86.avx512.permvar.si.512", 16: "llvm.x86.avx512.permvar.hi.512"}
        return call(name[signature.return_type.bits])(builder, *args)

    return table(table, index), emit


@intrinsic
def permute_two(typingctx, low, index, high):  # type: ignore[no-untyped-def]
    """Elements of two registers by the low bits of the index's: five of 32, six of 64."""

    def emit(context, builder, signature, args):  # type: ignore[no-untyped-def]
        names = {32: "llvm.x86.avx512.vpermi2var.d.512", 16: "llvm.x86.avx512.vpermi2var.hi.512"}
        function = ir.FunctionType(args[0].type, [arg.type for arg in args])
        name = names[signature.return_type.bits]
        return builder.call(cgutils.get_or_insert_function(builder.module, function, name), args)

    return low(low, index, high), emit


@intrinsic
def shift_in(typingctx, a, b):  # type: ignore[no-untyped-def]
    """The low word of each 32-bit lane of `a`, followed by the high word of `b`'s."""

    def emit(context, builder, signature, args):  # type: ignore[no-untyped-def]
        function = ir.FunctionType(args[0].type, [args[0].type] * 3)
        function = cgutils.get_or_insert_function(builder.module, function, "llvm.fshl.v16i32")
        return builder.call(function, [*args, ir.Constant(args[0].type, [16] * LANES)])

    return a(a, b), emit


@intrinsic
def less(typingctx, a, b):  # type: ignore[no-untyped-def]
    """The lanes where a < b, as a number, lane 0's bit the lowest."""

    def emit(context, builder, signature, args):  # type: ignore[no-untyped-def]
        lanes = builder.bitcast(builder.icmp_unsigned("<", *args), ir.IntType(signature.args[0].count))
        return builder.zext(lanes, ir.IntType(64))

    return types.uint64(a, b), emit


@intrinsic
def choose(typingctx, lanes, a, b):  # type: ignore[no-untyped-def]
    """`a` in the lanes of a number such as `less` gives, `b` in the others."""

    def emit(context, builder, signature, args):  # type: ignore[no-untyped-def]
        count = signature.return_type.count
        mask = builder.bitcast(builder.trunc(args[0], ir.IntType(count)), ir.VectorType(ir.IntType(1), count))
        return builder.select(mask, args[1], args[2])

    return a(types.uint64, a, b), emit


@intrinsic
def load_fours(typingctx, words, pointers, first):  # type: ignore[no-untyped-def]
    """Four words for each of 16 lanes from `pointers[first :]` on: the first two, and the next, the earlier high."""

    def emit(context, builder, signature, args):  # type: ignore[no-untyped-def]
        half = ir.VectorType(ir.IntType(64), 8)
        halves = []
        for begin in (0, 8):
            value: Any = ir.Constant(half, None)
            for lane in range(8):
                place = builder.add(args[2], ir.Constant(args[2].type, begin + lane))
                pointer = builder.load(address_of(context, builder, signature.args[1], args[1], place, ir.IntType(32)))
                pointer = builder.zext(pointer, ir.IntType(64))
                address = address_of(context, builder, signature.args[0], args[0], pointer, ir.IntType(64))
                value = builder.insert_element(value, builder.load(address, align=2), ir.Constant(ir.IntType(32), lane))
            halves.append(builder.bitcast(value, llvm_type(U32x16)))
        rotate = ir.FunctionType(halves[0].type, [halves[0].type] * 3)
        rotate = cgutils.get_or_insert_function(builder.module, rotate, "llvm.fshl.v16i32")
        sixteen = ir.Constant(halves[0].type, [16] * LANES)
        pairs = [builder.shuffle_vector(*halves, shuffled(*range(which, 32, 2))) for which in range(2)]
        pairs = [builder.call(rotate, [pair, pair, sixteen]) for pair in pairs]
        return context.make_tuple(builder, signature.return_type, pairs)

    return UniTuple(U32x16, 2)(words, pointers, types.uint64), emit


@intrinsic
def store_fours(typingctx, words, pointers, first, low, high):  # type: ignore[no-untyped-def]
    """Four words of each of 16 lanes to where `pointers[first :]` say that they end: the lanes of `low`, of `high`."""

    def emit(context, builder, signature, args):  # type: ignore[no-untyped-def]
        for begin in (0, 8):
            lanes = [begin + i // 2 + LANES * (i % 2) for i in range(LANES)]
            half = builder.shuffle_vector(args[3], args[4], shuffled(*lanes))
            half = builder.bitcast(half, ir.VectorType(ir.IntType(64), 8))
            for lane in range(8):
                place = builder.add(args[2], ir.Constant(args[2].type, begin + lane))
                pointer = builder.load(address_of(context, builder, signature.args[1], args[1], place, ir.IntType(32)))
                pointer = builder.sub(builder.zext(pointer, ir.IntType(64)), ir.Constant(ir.IntType(64), 4))
                address = address_of(context, builder, signature.args[0], args[0], pointer, ir.IntType(64))
                builder.store(builder.extract_element(half, ir.Constant(ir.IntType(32), lane)), address, align=2)

    return types.void(words, pointers, types.uint64, low, high), emit


# ---- Tables ----

GROUP = 16
"""Entries that are compared with a slot one by one; in larger tables it is searched by bits."""
_STARTS, _FREQUENCIES, _ROWS = 6, 7, 8
"""Rows of `Permuted.search`; the first six are for the steps 32, 16, 8, 4, 2 and 1."""
_PARTS, _RECIPROCALS, _LIMITS, _CODING_ROWS = 0, 1, 2, 3
"""Rows of `Permuted.coding`."""


class Permuted(NamedTuple):
    """The tables of dense channels for registers, in rows of 64 elements, one an entry."""

    levels: npt.NDArray[np.uint64]
    """(channels,) bits of an entry's number: 4, 5 or 6; 0 where a channel is coded symbol by symbol."""
    compared: npt.NDArray[np.uint64]
    """(channels,) the entries to compare where there are at most 16, a multiple of four; the last one is repeated."""
    closest: npt.NDArray[np.uint32]
    """(channels * 16,) 16 times (16 cumulative frequency - entry), in the low and high word."""
    search: npt.NDArray[np.uint16]
    """(channels * _ROWS * 64,) of each channel: for each step, at entry i the cumulative frequency from which on the
    entry is at least i + step, which no slot reaches where there is none; cumulative frequencies; frequencies, those
    of the first 16 entries twice where there are no more."""
    coding: npt.NDArray[np.uint32]
    """(channels * _CODING_ROWS * 64,) of each channel: what `_push` takes apart, reciprocals (`vector.divisor`), and
    the greatest states that need give up no word."""


def prepare(tables: "list[tuple[npt.NDArray[np.int64], bool]]") -> Permuted | None:
    """Tables of channels as `vector.prepare` takes them; None where no channel suits."""
    levels, compared = np.zeros(len(tables), np.uint64), np.zeros(len(tables), np.uint64)
    closest = np.zeros((len(tables), GROUP), np.uint32)
    search = np.zeros((len(tables), _ROWS, MOST_ENTRIES), np.uint16)
    coding = np.zeros((len(tables), _CODING_ROWS, MOST_ENTRIES), np.uint32)
    for j, (cdf, wide) in enumerate(tables):
        entries = len(cdf) - 1
        if wide or entries > MOST_ENTRIES:
            continue
        levels[j] = max(4, (entries - 1).bit_length())
        frequency = np.diff(cdf)
        for row in range(6):
            step = 32 >> row
            search[j, row] = np.append(cdf[step:entries], [0xFFFF] * MOST_ENTRIES)[:MOST_ENTRIES]
        search[j, _STARTS, :entries], search[j, _FREQUENCIES, :entries] = cdf[:-1], frequency
        if entries <= GROUP:
            compared[j] = (entries + 3) // 4 * 4
            number = np.minimum(np.arange(GROUP), entries - 1)
            closest[j] = (16 * cdf[number] - number & 0xFFFF) * 0x10001
            search[j, _FREQUENCIES, :32] = np.tile(frequency[number], 2)
        reciprocal, shift, more = np.array([divisor(int(f)) for f in frequency], np.int64).T
        coding[j, _PARTS, :entries] = cdf[:-1] | 4096 - frequency << 12 | more << 24 | shift << 28
        coding[j, _RECIPROCALS, :entries] = reciprocal
        coding[j, _LIMITS, :entries] = (frequency << 20) - 1
    if not levels.any():
        return None
    return Permuted(levels, compared, closest.ravel(), _to_lines(search), _to_lines(coding))


def _to_lines(array: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """An array's elements in one row that begins with a cache line."""
    room = np.empty(array.nbytes + 64, np.uint8)
    begin = -room.ctypes.data % 64
    lines = room[begin : begin + array.nbytes].view(array.dtype)
    lines[:] = array.ravel()
    return lines


# ---- Decoding ----


@numba.njit(forceinline=True)
def _step(v, index, search, row, step):  # type: ignore[no-untyped-def]
    """One step of a search: the index, or `step` more where the slot has reached what follows."""
    pivot = permute(load_words(search, row * np.uint64(MOST_ENTRIES)), index)
    return choose(less(v, pivot), index, add(index, splat16(np.uint32(step))))


@numba.njit(forceinline=True)
def _in_two(search, row, index):  # type: ignore[no-untyped-def]
    at = row * np.uint64(MOST_ENTRIES)
    return permute_two(load_words(search, at), index, load_words(search, at + np.uint64(32)))


@numba.njit(forceinline=True)
def _step_in_two(v, index, search, row, step):  # type: ignore[no-untyped-def]
    return choose(less(v, _in_two(search, row, index)), index, add(index, splat16(np.uint32(step))))


@numba.njit(forceinline=True)
def _compare(v, tables, j):  # type: ignore[no-untyped-def]
    """For slots times 16 the least of (slot - cumulative frequency) mod 4096 times 16 + entry.

    For an entry above the slot the difference has 4096 added, so it is greater than the slot, and no entry that is
    right gives that. So the least is the slot's place within its entry, and the entry.
    """
    at = j * np.uint64(GROUP)
    end = at + tables.compared[j]
    one, two, three = np.uint64(1), np.uint64(2), np.uint64(3)
    best = splat16(np.uint32(0xFFFF))
    while at < end:
        a, b = as_words(splat32(tables.closest[at])), as_words(splat32(tables.closest[at + one]))
        c, d = as_words(splat32(tables.closest[at + two])), as_words(splat32(tables.closest[at + three]))
        best = least(best, least(least(sub(v, a), sub(v, b)), least(sub(v, c), sub(v, d))))
        at += np.uint64(4)
    return best


@numba.njit(forceinline=True)
def _find(v, tables, j):  # type: ignore[no-untyped-def]
    """For slots times 16: their entries, the entries' frequencies, and the slots' places within them."""
    search, row, levels = tables.search, j * np.uint64(_ROWS), tables.levels[j]
    starts, frequencies = row + np.uint64(_STARTS), row + np.uint64(_FREQUENCIES)
    four = splat16(np.uint32(4))
    if levels == np.uint64(4):
        best = _compare(v, tables, j)
        # The permutation looks at five bits, of which the highest is the place's: it chooses among two the same.
        frequency = permute(load_words(search, frequencies * np.uint64(MOST_ENTRIES)), best)
        return bits_and(best, splat16(np.uint32(15))), frequency, right(best, four)
    v, index = right(v, four), splat16(np.uint32(0))
    if levels == np.uint64(5):
        index = _step(v, index, search, row + np.uint64(1), 16)
        index = _step(v, index, search, row + np.uint64(2), 8)
        index = _step(v, index, search, row + np.uint64(3), 4)
        index = _step(v, index, search, row + np.uint64(4), 2)
        index = _step(v, index, search, row + np.uint64(5), 1)
        frequency = permute(load_words(search, frequencies * np.uint64(MOST_ENTRIES)), index)
        return index, frequency, sub(v, permute(load_words(search, starts * np.uint64(MOST_ENTRIES)), index))
    index = _step_in_two(v, index, search, row, 32)
    index = _step_in_two(v, index, search, row + np.uint64(1), 16)
    index = _step_in_two(v, index, search, row + np.uint64(2), 8)
    index = _step_in_two(v, index, search, row + np.uint64(3), 4)
    index = _step_in_two(v, index, search, row + np.uint64(4), 2)
    index = _step_in_two(v, index, search, row + np.uint64(5), 1)
    return index, _in_two(search, frequencies, index), sub(v, _in_two(search, starts, index))


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
def _pull(a, b, tables, j, block, row):  # type: ignore[no-untyped-def]
    """One decoding step without its words: the states after it. The entries go to `block[row : row + 32]`."""
    low, high = left(a, splat32(np.uint32(4))), left(b, splat32(np.uint32(20)))
    slots = bits_or(bits_and(low, splat32(np.uint32(0xFFFF))), bits_and(high, splat32(np.uint32(0xFFFF0000))))
    index, frequency, place = _find(as_words(slots), tables, j)
    store(block, row, words_to_bytes(index))
    return _advance(a, _even(frequency), _even(place)), _advance(b, _odd(frequency), _odd(place))


@numba.njit(forceinline=True)
def _refill(x, old, active, words, pointers, first, second):  # type: ignore[no-untyped-def]
    """The next words for the active lanes that need one; the other lanes keep their `old` state.

    The first eight lanes take them from `pointers[first]`, the others from `pointers[second]`, which may be the same.
    Eight words are read for each, used or not: `SPARE`.
    """
    short = less(x, splat32(np.uint32(LOWER))) & active
    low, high = short & np.uint64(0xFF), short >> np.uint64(8)
    at = np.uint64(pointers[first])
    pointers[first] = at + count_bits(low)
    after = np.uint64(pointers[second])
    pointers[second] = after + count_bits(high)
    sixteen = np.uint64(16)
    spread = both(load_16_bytes(SPREAD, low * sixteen), load_16_bytes(SPREAD, high * sixteen))
    more = shuffle(both(load_16_bytes(words, at), load_16_bytes(words, after)), spread)
    x = bits_or(choose(short, left(x, splat32(np.uint32(16))), x), widen(as_short_words(more)))
    return choose(active, x, old)


@numba.njit(forceinline=True)
def _refill_own(x, four, pointer):  # type: ignore[no-untyped-def]
    """The same for lanes that have a tile each, by two pairs of words: the states, the words left, the pointers."""
    first, second = four
    short = less(x, splat32(np.uint32(LOWER)))
    x = choose(short, shift_in(x, first), x)
    first = choose(short, shift_in(first, second), first)
    second = choose(short, left(second, splat32(np.uint32(16))), second)
    return x, (first, second), choose(short, add(pointer, splat32(np.uint32(1))), pointer)


@numba.njit
def _decode_lanes(words, pointers, states, shape, tables, j, block, row, unit_bytes):  # type: ignore[no-untyped-def]
    """One channel of units of eight or sixteen lanes a tile; `shape` is (units, lanes, tokens)."""
    units, lanes, tokens = shape
    half = np.uint64(LANES)
    second = np.uint64(8) if lanes == 8 else np.uint64(0)
    row = np.uint64(row)
    for t in range(0, tokens, lanes):
        active = _active(tokens - t, lanes)
        for u in range(np.uint64(units)):
            at = u * np.uint64(SLOTS)
            a, b = load_states(states, at), load_states(states, at + half)
            na, nb = _pull(a, b, tables, j, block, row + u * np.uint64(unit_bytes))
            store(states, at, _refill(na, a, active, words, pointers, at, at + second))
            store(states, at + half, _refill(nb, b, active, words, pointers, at + half, at + half + second))
        row += np.uint64(SLOTS)


@numba.njit(forceinline=True)
def _active(tokens, lanes):  # type: ignore[no-untyped-def]
    """The lanes of a vector, of eight or sixteen a tile, that have one of the tokens left."""
    active = (np.uint64(1) << np.uint64(min(tokens, lanes))) - np.uint64(1)
    return active | active << np.uint64(8) if lanes == 8 else active


@numba.njit
def _decode_tiles(words, pointers, states, shape, tables, j, block, row, unit_bytes):  # type: ignore[no-untyped-def]
    """One channel of units of one lane a tile; four words are fetched for four tokens, which take no more."""
    units, _, tokens = shape
    half, size = np.uint64(LANES), np.uint64(SLOTS)
    for t in range(0, tokens, 4):
        for u in range(np.uint64(units)):
            at = u * size
            here = np.uint64(row + t * SLOTS) + u * np.uint64(unit_bytes)
            a, b = load_states(states, at), load_states(states, at + half)
            wa, wb = load_fours(words, pointers, at), load_fours(words, pointers, at + half)
            pa, pb = load_states(pointers, at), load_states(pointers, at + half)
            for _ in range(min(4, tokens - t)):
                a, b = _pull(a, b, tables, j, block, here)
                a, wa, pa = _refill_own(a, wa, pa)
                b, wb, pb = _refill_own(b, wb, pb)
                here += size
            store(states, at, a)
            store(states, at + half, b)
            store(pointers, at, pa)
            store(pointers, at + half, pb)


# ---- Between states and symbols ----


@numba.njit
def _place(lane, lanes, n):  # type: ignore[no-untyped-def]
    """The state, of a unit's 32, that belongs to a lane of its tile `n`."""
    return n % 2 * LANES + n // 2 if lanes == 1 else n * lanes + lane


@numba.njit
def _slots_of(lanes):  # type: ignore[no-untyped-def]
    """The byte of a row that belongs to each tile of a unit and its lanes, int64 (tiles, lanes)."""
    slot = np.empty((SLOTS // lanes, lanes), np.int64)
    for n in range(SLOTS // lanes):
        for lane in range(lanes):
            place = _place(lane, lanes, n)
            slot[n, lane] = place % LANES * 2 + place // LANES
    return slot


@numba.njit
def _units(some, s, steps):  # type: ignore[no-untyped-def]
    """How many sets from `s` on take turns: of as many lanes, and such that a block does not get too large."""
    most = min(_UNITS, max(1, _BLOCK_BYTES // (SLOTS * (steps + 2) * _COLUMNS)))
    units = 1
    while units < most and s + units < len(some.lanes) and some.lanes[s + units] == some.lanes[s]:
        units += 1
    return units


@numba.njit
def _block_columns(column_bytes, channels):  # type: ignore[no-untyped-def]
    """Columns whose entries are kept before they are written out: whole cache lines of symbols."""
    most = min(max(1, _BLOCK_BYTES // (column_bytes * _COLUMNS)), 8)
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
def _rows_of(slot):  # type: ignore[no-untyped-def]
    """Where the symbols of each tile of a unit and of each token of two steps lie in `transpose`'s rows, uint64."""
    lanes = slot.shape[1]
    rows = np.empty((len(slot), 2 * lanes), np.uint64)
    for n in range(len(slot)):
        for step in range(2 * lanes):
            place = slot[n, step % lanes]
            rows[n, step] = place % 16 * 2 * SLOTS + place // 16 * 16 + step // lanes * SLOTS
    return rows


@numba.njit
def _write(block, start, stride, tiles, rows_of, offset, columns, out, column, tokens, channels):  # type: ignore[no-untyped-def]
    """A unit's entries as symbols, to `columns` columns of the symbols `out` from `column` on.

    Two steps at a time; a row of a block is written in one go, and the next one asked for: rows are far apart, and
    tiles may lie so that their lines displace each other.
    """
    two_steps = rows_of.shape[1]
    rows = np.empty(len(offset) * 2 * SLOTS, np.uint8)
    whole, group = np.uint64(columns // _COLUMNS * _COLUMNS), np.uint64(_COLUMNS)
    size, next_row = np.uint64(2 * SLOTS), np.uint64(channels)
    for t in range(0, tokens, two_steps):
        for c in range(0, columns, _COLUMNS):
            here = np.uint64(start + c * stride + t // two_steps * 2 * SLOTS)
            transpose(block, here, np.uint64(stride), rows, np.uint64(c) * size, size)
        for n in range(len(tiles)):
            line = np.uint64((tiles[n] * tokens + t) * channels + column)
            for step in range(np.uint64(min(two_steps, tokens - t))):
                row = rows_of[np.uint64(n), step]
                for c in range(np.uint64(0), whole, group):
                    there = line + c
                    prefetch(out, there + next_row)
                    symbols = add(widen(load_16_bytes(rows, row + c * size)), load_states(offset, c))
                    store(out, there, symbols)
                for c in range(whole, np.uint64(columns)):
                    out[line + c] = np.int32(rows[row + whole * size + c - whole]) + offset[c]
                line += next_row


@numba.njit
def _aligned(count):  # type: ignore[no-untyped-def]
    """Zeros uint32 (count,) that begin with a cache line: a store across two of them takes long to be read again."""
    room = np.zeros(count + 16, np.uint32)
    begin = (64 - room.ctypes.data % 64) % 64 // 4
    return room[begin : begin + count]


@numba.njit
def _gather(tiles, lanes, at, state, pointers, states):  # type: ignore[no-untyped-def]
    """States and pointers of units' tiles to where the kernels have them: a tile's pointer at its lane 0's place."""
    for u in range(len(tiles)):
        for n in range(SLOTS // lanes):
            i, place = tiles[u, n], u * SLOTS + _place(0, lanes, n)
            pointers[place] = at[i]
            for lane in range(lanes):
                states[place + lane] = state[i, lane]


@numba.njit
def _scatter(tiles, lanes, at, state, pointers, states):  # type: ignore[no-untyped-def]
    """The opposite of `_gather`; a tile that is there more than once is the same each time."""
    for u in range(len(tiles)):
        for n in range(SLOTS // lanes):
            i, place = tiles[u, n], u * SLOTS + _place(0, lanes, n)
            at[i] = pointers[place]
            for lane in range(lanes):
                state[i, lane] = states[place + lane]


@numba.njit
def _stop(tiles, lanes, pointers, stops, faults):  # type: ignore[no-untyped-def]
    """Bring pointers that left their tile's words back to the end of these, to no avail and no harm."""
    over = np.uint64(0)
    for p in range(np.uint64(0), np.uint64(len(stops)), np.uint64(LANES)):
        over |= less(load_states(stops, p), load_states(pointers, p))
    if not over:
        return
    for u in range(len(tiles)):
        for n in range(SLOTS // lanes):
            place = u * SLOTS + _place(0, lanes, n)
            if pointers[place] > stops[place]:
                faults[tiles[u, n]] = WORDS
                pointers[place] = stops[place]


@numba.njit(cache=True, nogil=True)
def decode_dense(words, at, stop, state, faults, some, first_channel, channels, dense, tables, out):  # type: ignore[no-untyped-def]
    """The dense channels of sets of tiles. The arguments are those of vector.py's, but for `tables`: `Permuted`."""
    tokens = out.shape[1]
    flat_out = out.reshape(out.size)
    s = 0
    while s < len(some.lanes):
        lanes = some.lanes[s]
        steps = (tokens + lanes - 1) // lanes
        units = _units(some, s, steps)
        tiles = some.tiles[s : s + units]
        used = some.used[s : s + units]
        s += units
        slot = _slots_of(lanes)
        rows_of = _rows_of(slot)
        pointers, states, stops = _aligned(units * SLOTS), _aligned(units * SLOTS), _aligned(units * SLOTS)
        _gather(tiles, lanes, stop, state, stops, states)
        _gather(tiles, lanes, at, state, pointers, states)
        # An even number of rows, which are written two at a time, and one or two more than there are, so that columns
        # do not all fall on the same few lines of the cache.
        unit_bytes = (steps // 2 + 1) * 2 * SLOTS
        stride = units * unit_bytes
        columns = _block_columns(stride, channels)
        block = np.empty(columns * stride, np.uint8)
        wide = np.empty((units, SLOTS // lanes, tokens, min(columns, channels) if dense.wide.any() else 0), np.int32)
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
                row, number, shape = column * stride, np.uint64(j), (units, lanes, tokens)
                if tables.levels[j] == 0:
                    _scatter(tiles, lanes, at, state, pointers, states)
                    for u in range(units):
                        here = row + u * unit_bytes
                        for n in range(used[u]):
                            i, to = tiles[u, n], wide[u, n]
                            at[i] = decode_one(words, at[i], state[i], slot[n], j, dense, block, here, to, column)
                    _gather(tiles, lanes, at, state, pointers, states)
                elif lanes == 1:
                    _decode_tiles(words, pointers, states, shape, tables, number, block, row, unit_bytes)
                else:
                    _decode_lanes(words, pointers, states, shape, tables, number, block, row, unit_bytes)
                _stop(tiles, lanes, pointers, stops, faults)
            offset = _offsets(first, last, left_column, columns, dense)
            for u in range(units):
                mine, start, width = tiles[u, : used[u]], u * unit_bytes, end - begin
                _write(block, start, stride, mine, rows_of, offset, width, flat_out, left_column, tokens, out.shape[2])
                for j in range(first, last):
                    if dense.wide[j]:
                        for n in range(used[u]):
                            out[tiles[u, n], :, dense.column[j]] = wide[u, n, :, dense.column[j] - left_column]
        _scatter(tiles, lanes, at, state, pointers, states)


# ---- Encoding ----


@numba.njit(forceinline=True)
def _look_up(coding, row, index, levels):  # type: ignore[no-untyped-def]
    """A row's elements by the low bits of an index, as many as there are levels."""
    at, half = row * np.uint64(MOST_ENTRIES), np.uint64(LANES)
    if levels == np.uint64(4):
        return permute(load_states(coding, at), index)
    low = permute_two(load_states(coding, at), index, load_states(coding, at + half))
    if levels == np.uint64(5):
        return low
    at += half + half
    high = permute_two(load_states(coding, at), index, load_states(coding, at + half))
    return choose(less(bits_and(index, splat32(np.uint32(63))), splat32(np.uint32(32))), low, high)


@numba.njit(forceinline=True)
def _push(x, index, tables, j):  # type: ignore[no-untyped-def]
    """One encoding step: the states after it, and the lanes whose states have given up their low word."""
    row, levels = j * np.uint64(_CODING_ROWS), tables.levels[j]
    parts = _look_up(tables.coding, row + np.uint64(_PARTS), index, levels)
    reciprocal = _look_up(tables.coding, row + np.uint64(_RECIPROCALS), index, levels)
    given = less(_look_up(tables.coding, row + np.uint64(_LIMITS), index, levels), x)
    twelve, twelve_bits = splat32(np.uint32(12)), splat32(np.uint32(0xFFF))
    more = bits_and(right(parts, splat32(np.uint32(24))), splat32(np.uint32(1)))
    x = choose(given, right(x, splat32(np.uint32(16))), x)
    quotient = right(high_products(add(x, more), reciprocal), right(parts, splat32(np.uint32(28))))
    return add(add(x, bits_and(parts, twelve_bits)), mul(quotient, bits_and(right(parts, twelve), twelve_bits))), given


@numba.njit(forceinline=True)
def _entries(block, row):  # type: ignore[no-untyped-def]
    """The entries of A and B in a row; more bits than an entry's are of no meaning."""
    entries = widen(load_short_words(block, row))
    return entries, right(entries, splat32(np.uint32(8)))


@numba.njit(forceinline=True)
def _push_lanes(x, index, active, tables, j, words, pointers, first, second):  # type: ignore[no-untyped-def]
    """One encoding step of the active lanes, whose words go before their pointers, as in `_refill`: the states.

    Eight words are written for each, used or not: `SPARE`.
    """
    new, given = _push(x, index, tables, j)
    given &= active
    low, high = given & np.uint64(0xFF), given >> np.uint64(8)
    eight, sixteen = np.uint64(8), np.uint64(16)
    gather = both(load_16_bytes(GATHER, low * sixteen), load_16_bytes(GATHER, high * sixteen))
    gathered = shuffle(as_bytes(low_words(x)), gather)
    after = np.uint64(pointers[second])
    store(words, after - eight, high_half(gathered))
    pointers[second] = after - count_bits(high)
    at = np.uint64(pointers[first])
    store(words, at - eight, low_half(gathered))
    pointers[first] = at - count_bits(low)
    return choose(active, new, x)


@numba.njit
def _encode_lanes(words, pointers, states, shape, tables, j, block, row, unit_bytes):  # type: ignore[no-untyped-def]
    """One channel of units of eight or sixteen lanes a tile, backwards; `shape` is (units, lanes, tokens)."""
    units, lanes, tokens = shape
    half = np.uint64(LANES)
    second = np.uint64(8) if lanes == 8 else np.uint64(0)
    for t in range((tokens - 1) // lanes * lanes, -1, -lanes):
        active = _active(tokens - t, lanes)
        for u in range(np.uint64(units)):
            at = u * np.uint64(SLOTS)
            a, b = load_states(states, at), load_states(states, at + half)
            ia, ib = _entries(block, np.uint64(row + t // lanes * SLOTS) + u * np.uint64(unit_bytes))
            b = _push_lanes(b, ib, active, tables, j, words, pointers, at + half, at + half + second)
            a = _push_lanes(a, ia, active, tables, j, words, pointers, at, at + second)
            store(states, at, a)
            store(states, at + half, b)


@numba.njit(forceinline=True)
def _push_own(x, four, pointer, index, tables, j):  # type: ignore[no-untyped-def]
    """One encoding step of lanes that have a tile each: the states, their words so far, the last low, the pointers."""
    low, high = four
    new, given = _push(x, index, tables, j)
    high = choose(given, shift_in(high, low), high)
    low = choose(given, shift_in(low, left(x, splat32(np.uint32(16)))), low)
    return new, (low, high), choose(given, sub(pointer, splat32(np.uint32(1))), pointer)


@numba.njit(forceinline=True)
def _store_own(four, pointer, words, pointers, place):  # type: ignore[no-untyped-def]
    """Store the words given up since the pointers in memory, before these: four a lane, used or not: `SPARE`."""
    low, high = four
    count = sub(load_states(pointers, place), pointer)
    # The first word given up belongs to the top of the four.
    few = less(count, splat32(np.uint32(3)))
    high, low = choose(few, low, high), choose(few, splat32(np.uint32(0)), low)
    odd = less(splat32(np.uint32(0)), bits_and(count, splat32(np.uint32(1))))
    high, low = choose(odd, shift_in(high, low), high), choose(odd, left(low, splat32(np.uint32(16))), low)
    store_fours(words, pointers, place, low, high)
    store(pointers, place, pointer)


@numba.njit
def _encode_tiles(words, pointers, states, shape, tables, j, block, row, unit_bytes):  # type: ignore[no-untyped-def]
    """One channel of units of one lane a tile, backwards, four tokens at a time."""
    units, _, tokens = shape
    half, size = np.uint64(LANES), np.uint64(SLOTS)
    nothing = splat32(np.uint32(0))
    for t in range((tokens - 1) // 4 * 4, -1, -4):
        for u in range(np.uint64(units)):
            at = u * size
            count = min(4, tokens - t)
            here = np.uint64(row + (t + count) * SLOTS) + u * np.uint64(unit_bytes)
            a, b = load_states(states, at), load_states(states, at + half)
            pa, pb = load_states(pointers, at), load_states(pointers, at + half)
            wa, wb = (nothing, nothing), (nothing, nothing)
            for _ in range(count):
                here -= size
                ia, ib = _entries(block, here)
                a, wa, pa = _push_own(a, wa, pa, ia, tables, j)
                b, wb, pb = _push_own(b, wb, pb, ib, tables, j)
            _store_own(wa, pa, words, pointers, at)
            _store_own(wb, pb, words, pointers, at + half)
            store(states, at, a)
            store(states, at + half, b)


@numba.njit
def _read(block, start, stride, tiles, rows_of, offset, columns, symbols, column, tokens, channels):  # type: ignore[no-untyped-def]
    """Columns of symbols as a unit's entries; nonsense for symbols without an entry. The opposite of `_write`."""
    two_steps = rows_of.shape[1]
    rows = np.zeros(len(offset) * 2 * SLOTS, np.uint8)
    whole, group = np.uint64(columns // _COLUMNS * _COLUMNS), np.uint64(_COLUMNS)
    size, next_row = np.uint64(2 * SLOTS), np.uint64(channels)
    for t in range(0, tokens, two_steps):
        for n in range(len(tiles)):
            line = np.uint64((tiles[n] * tokens + t) * channels + column)
            for step in range(np.uint64(min(two_steps, tokens - t))):
                row = rows_of[np.uint64(n), step]
                for c in range(np.uint64(0), whole, group):
                    there = line + c
                    prefetch(symbols, there + next_row)
                    entries = low_bytes(sub(load_states(symbols, there), load_states(offset, c)))
                    store(rows, row + c * size, entries)
                for c in range(whole, np.uint64(columns)):
                    rows[row + whole * size + c - whole] = np.uint8(symbols[line + c] - offset[c])
                line += next_row
        for c in range(0, columns, _COLUMNS):
            here = np.uint64(start + c * stride + t // two_steps * 2 * SLOTS)
            transpose(rows, np.uint64(c) * size, size, block, here, np.uint64(stride))


@numba.njit
def _replace(block, row, unit_bytes, tiles, slot, symbols, mark, mark_start, j, dense, channel):  # type: ignore[no-untyped-def]
    """In a channel's rows the nearest entries for symbols that have none, which are among those with a mark."""
    lanes, base = slot.shape[1], dense.start[j]
    top = np.uint8(dense.start[j + 1] - base - 1)
    for u in range(len(tiles)):
        for n in range(SLOTS // lanes):
            i = tiles[u, n]
            for m in range(mark_start[i, channel], mark_start[i, channel + 1]):
                above = symbols[i, mark[m], dense.column[j]] > dense.first[base]
                place = row + u * unit_bytes + mark[m] // lanes * SLOTS + slot[n, mark[m] % lanes]
                block[place] = top if above else np.uint8(0)


@numba.njit(cache=True, nogil=True)
def encode_dense(symbols, marks, words, at, state, some, first_channel, channels, dense, tables):  # type: ignore[no-untyped-def]
    """The dense channels of sets of tiles. The arguments are those of vector.py's, but for `tables`: `Permuted`."""
    mark, mark_start = marks
    tokens, room = symbols.shape[1], words.shape[1]
    flat_words, flat_symbols = words.reshape(words.size), symbols.reshape(symbols.size)
    for i in range(len(at)):
        at[i] += i * room
    s = 0
    while s < len(some.lanes):
        lanes = some.lanes[s]
        steps = (tokens + lanes - 1) // lanes
        units = _units(some, s, steps)
        tiles, used = some.tiles[s : s + units], some.used[s : s + units]
        s += units
        slot = _slots_of(lanes)
        rows_of = _rows_of(slot)
        pointers, states = _aligned(units * SLOTS), _aligned(units * SLOTS)
        _gather(tiles, lanes, at, state, pointers, states)
        unit_bytes = (steps // 2 + 1) * 2 * SLOTS
        stride = units * unit_bytes
        columns = _block_columns(stride, channels)
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
            for u in range(units):
                mine, start = tiles[u, : SLOTS // lanes], u * unit_bytes
                _read(
                    block,
                    start,
                    stride,
                    mine,
                    rows_of,
                    offset,
                    end - begin,
                    flat_symbols,
                    left_column,
                    tokens,
                    symbols.shape[2],
                )
            for j in range(last - 1, first - 1, -1):
                column, number, shape = dense.column[j], np.uint64(j), (units, lanes, tokens)
                row = (column - left_column) * stride
                if tables.levels[j] == 0:
                    _scatter(tiles, lanes, at, state, pointers, states)
                    for u in range(units):
                        for n in range(used[u]):
                            i = tiles[u, n]
                            at[i] = encode_one(flat_words, at[i], state[i], lanes, j, dense, symbols[i])
                    _gather(tiles, lanes, at, state, pointers, states)
                    continue
                channel = column - first_channel
                _replace(block, row, unit_bytes, tiles, slot, symbols, mark, mark_start, j, dense, channel)
                if lanes == 1:
                    _encode_tiles(flat_words, pointers, states, shape, tables, number, block, row, unit_bytes)
                else:
                    _encode_lanes(flat_words, pointers, states, shape, tables, number, block, row, unit_bytes)
        _scatter(tiles, lanes, at, state, pointers, states)
    for i in range(len(at)):
        at[i] -= i * room

"""Payloads: the bytes of many tiles' symbols, layer after layer. The format is written up in schemas/payload.md."""

import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from types import ModuleType
from typing import Any, NamedTuple, TypeVar, overload

import numpy as np
import numpy.typing as npt

from nec_ray.codec import paths, rans, vector, vector512
from nec_ray.codec.spec import LayerSpec
from nec_ray.codec.tables import EntropyTables
from nec_ray.errors import CorruptPayload

Symbols = npt.NDArray[np.int32]
Bytes = npt.NDArray[np.uint8]
Result = TypeVar("Result")

_GROUP_SYMBOLS = 1 << 20
"""Symbols that one call of a kernel works on: enough tiles to share a channel's table, few enough for its memory."""
_THREAD_SYMBOLS = 1 << 16
"""Symbols below which another thread is not worth its start."""
_FAR = 1 << 31
"""Words from which on the vector path's pointers would not do."""
_LANE_BYTES = 2000
"""Expected bytes of the dense channels for each lane: a lane costs up to three, at most 0.15% of a payload."""

_FAULTS = {
    rans.CUT_OFF: "cut off: bytes are missing",
    rans.CHECKSUM: "its checksum does not match its bytes",
    rans.FLAGS: "its flags are not of this format version",
    rans.TOKENS: "it states more tokens than the codec declares",
    rans.ESCAPES: "its escapes are cut off, or lie outside the tile or the range of int32",
    rans.WORDS: "its words do not decode",
    rans.TRAILING: "bytes follow its last escape",
}


class Payloads(Sequence[bytes]):
    """Payloads of many tiles in one buffer; as a sequence, the bytes of each.

    Attributes:
        data: uint8, the buffer.
        start: int64 (tiles,), where each payload begins in it.
        length: int64 (tiles,), its bytes.
    """

    def __init__(self, data: Bytes, start: npt.NDArray[np.int64], length: npt.NDArray[np.int64]) -> None:
        """Payloads that lie in a buffer.

        Raises:
            ValueError: the arrays are not of these types, or a payload does not lie in the buffer.
        """
        if data.dtype != np.uint8 or (data.ndim, start.ndim, length.ndim) != (1, 1, 1) or len(start) != len(length):
            raise ValueError("payloads are a vector of uint8, and as many starts as lengths")
        if start.dtype != np.int64 or length.dtype != np.int64:
            raise ValueError("starts and lengths of payloads are int64")
        if np.any((start < 0) | (length < 0) | (start > len(data)) | (length > len(data) - start)):
            raise ValueError("a payload does not lie in the buffer")
        # Of one kind, since numba compiles anew for each.
        self.data = np.require(data, requirements=["C", "A"]).view()
        self.data.flags.writeable = False
        self.start = start
        self.length = length

    @classmethod
    def of(cls, payloads: Sequence[bytes]) -> "Payloads":
        """Payloads from any sequence of bytes."""
        if isinstance(payloads, Payloads):
            return payloads
        if isinstance(payloads, bytes | bytearray | memoryview):
            raise TypeError("give a list of payloads, not the bytes of one")
        length = np.fromiter(map(len, payloads), np.int64, len(payloads))
        return cls(np.frombuffer(b"".join(payloads), np.uint8), np.cumsum(length) - length, length)

    def __len__(self) -> int:
        return len(self.length)

    @overload
    def __getitem__(self, index: int) -> bytes: ...
    @overload
    def __getitem__(self, index: slice) -> "Payloads": ...
    def __getitem__(self, index: int | slice) -> "bytes | Payloads":
        if isinstance(index, slice):
            return Payloads(self.data, self.start[index], self.length[index])
        start = int(self.start[index])
        return self.data[start : start + int(self.length[index])].tobytes()

    def __iter__(self) -> Iterator[bytes]:
        return (self[i] for i in range(len(self)))

    def __repr__(self) -> str:
        return f"<{len(self)} payloads, {int(self.length.sum()):,} bytes>"


class Dense(NamedTuple):
    """A layer's dense channels, prepared for the kernels."""

    column: npt.NDArray[np.int64]
    """Their channels in the symbols' array."""
    precision: int
    slot: npt.NDArray[np.uint8]
    """(channels, 4096): the entry that a slot's upper 12 bits lead to, or one of the few before it."""
    entry: npt.NDArray[np.uint32]
    """Of all entries: cumulative frequency in the low 16 bits, frequency in the high ones (2**16 as 0)."""
    encoding: npt.NDArray[np.uint64]
    """The same for the encoder at 12 bits: cumulative frequency in bits 0 to 15, 4096 - frequency in bits 16 to 31,
    and above them the greatest state that needs no word written first."""
    reciprocal: npt.NDArray[np.uint64]
    """Of all entries: 2**44 / frequency, rounded up; what frequencies of 12 bits are divided by."""
    start: npt.NDArray[np.int64]
    """(channels + 1,) where each channel's entries begin."""
    first: npt.NDArray[np.int32]
    """Of all entries: their first symbol."""
    shift: npt.NDArray[np.uint8]
    """Of all entries: their raw bits."""
    wide: npt.NDArray[np.bool_]
    """(channels,) whether any of its entries has raw bits."""


class Sparse(NamedTuple):
    """A layer's sparse channels, prepared for the kernels."""

    column: npt.NDArray[np.int64]
    run: npt.NDArray[np.uint32]
    run_start: npt.NDArray[np.int64]
    value: npt.NDArray[np.uint32]
    start: npt.NDArray[np.int64]
    first: npt.NDArray[np.int32]
    """Of all places of `value`: the first symbol of the entry that begins there."""
    shift: npt.NDArray[np.uint8]
    """Of all places of `value`: the entry's raw bits."""
    slot: npt.NDArray[np.uint8]
    """(channels, 256): the entry of `value` that a slot's upper 8 bits lead to, or one of those before it."""
    run_slot: npt.NDArray[np.uint8]
    """(channels, 256): the same of `run`."""


@dataclass(frozen=True)
class _Layer:
    """One layer, prepared: where its channels are in the arrays of symbols, and their tables."""

    part: int
    """Which array of symbols: one for each grid scale."""
    first: int
    channels: int
    tokens: int
    dense: Dense
    sparse: Sparse
    kernels: ModuleType | None
    """Of the vector path, where there is one and it suits the dense channels."""
    registers: vector.Narrow | vector512.Permuted | None
    """The dense channels' tables for it."""
    lowest: npt.NDArray[np.int32]
    """(channels,) the least symbol that is coded without an escape."""
    highest: npt.NDArray[np.int32]
    """(channels,) the greatest one."""
    marked: tuple[npt.NDArray[np.int32], npt.NDArray[np.int32]]
    """The same, but 0 in sparse and dead channels."""
    bytes_per_token: float
    """Expected, of the dense channels."""

    def lanes_log2(self, tokens: int) -> int:
        """Of 1, 4, 8 or 16 lanes: two are no faster than one, for tiles of one lane are coded four at a time."""
        lanes = max(1, int(self.bytes_per_token * tokens / _LANE_BYTES))
        return min(lanes.bit_length() - 1, rans.MAX_LANES_LOG2) if lanes >= 4 else 0


class PayloadCoder:
    """Codes symbols by one set of tables; made once, used for any number of tiles, from any thread.

    Layers of one grid scale share an array of symbols int32 (tiles, tokens, channels); where the layers have several
    scales, there is one such array a scale, in the order in which the scales appear.
    """

    def __init__(self, tables: EntropyTables, layers: Sequence[LayerSpec], *, scalar: bool = False) -> None:
        """Prepare the tables of some layers, whose channels follow one another in `tables`.

        Args:
            tables: of all channels.
            layers: in their order.
            scalar: code every channel on the scalar path, whatever the processor offers; the bytes are the same.

        Raises:
            ValueError: the layers do not fit the tables, or each other; or NEC_CODEC_PATH cannot be followed.
        """
        kernels = None if scalar else paths.VECTOR.get(paths.chosen())
        if sum(layer.channels for layer in layers) != tables.channels:
            raise ValueError(f"the layers' channels do not add up to the tables' {tables.channels}")
        if len({(layer.scale, layer.tokens) for layer in layers}) != len({layer.scale for layer in layers}):
            raise ValueError("layers of one grid scale must have one number of tokens")
        scales = list(dict.fromkeys(layer.scale for layer in layers))
        used = dict.fromkeys(scales, 0)
        self._layers: list[_Layer] = []
        row = 0
        for layer in layers:
            rows = slice(row, row + layer.channels)
            part = scales.index(layer.scale)
            self._layers.append(_prepare(tables, rows, part, used[layer.scale], layer.tokens, kernels))
            used[layer.scale] += layer.channels
            row += layer.channels

    def compress(self, symbols: Symbols | Sequence[Symbols], *, threads: int | None = None) -> Payloads:
        """Payloads of many tiles.

        Args:
            symbols: int32 (tiles, tokens, channels), tokens at most what the layers declare; where there are several
                grid scales, one such array a scale.
            threads: how many to use; all the cores this process may use where it is None.

        Raises:
            ValueError: an array's type or shape is not the codec's.
        """
        parts = self._parts(symbols)
        groups = self._groups(len(parts[0]), threads)
        made = _map(lambda group: self._compress([part[group] for part in parts]), groups, threads)
        data = [data for data, _ in made]
        length = np.concatenate([np.zeros(0, np.int64), *(length for _, length in made)])
        joined = data[0] if len(data) == 1 else np.concatenate([np.zeros(0, np.uint8), *data])
        return Payloads(joined, np.cumsum(length) - length, length)

    def decompress(
        self, payloads: Sequence[bytes], layers: int | None = None, *, threads: int | None = None
    ) -> list[Symbols]:
        """Symbols of payloads, or of their first layers.

        Args:
            payloads: each at least as long as the wanted layers.
            layers: how many to decode, counted from the first; all where it is None.
            threads: how many to use; all the cores this process may use where it is None.

        Returns:
            One int32 (tiles, tokens, channels) a grid scale.

        Raises:
            CorruptPayload: a length, checksum or word does not hold; the message says which payload, from 0.
            ValueError: there are not as many layers.
        """
        if layers is not None and not 1 <= layers <= len(self._layers):
            raise ValueError(f"there are {len(self._layers)} layers, not {layers}")
        wanted = self._layers[:layers]
        given = Payloads.of(payloads)
        groups = self._groups(len(given), threads)
        bodies = np.zeros((len(wanted), len(given), 5), np.int64)
        self._open(given, wanted, bodies, groups, threads)
        out = []
        for part in range(1 + max(layer.part for layer in wanted)):
            mine = [number for number, layer in enumerate(wanted) if layer.part == part]
            tokens = _one_size(bodies[mine, :, 3], wanted[mine[0]].tokens)
            out.append(np.empty((len(given), tokens, sum(wanted[n].channels for n in mine)), np.int32))

        def decode(group: slice) -> None:
            for number, layer in enumerate(wanted):
                faults = _decode(layer, given.data, bodies[number, group], out[layer.part][group])
                _raise_first(faults, group.start, number)

        _map(decode, groups, threads)
        return out

    def layer_lengths(self, payloads: Sequence[bytes]) -> npt.NDArray[np.int32]:
        """Bytes of each layer of whole payloads, int32 (tiles, layers).

        Raises:
            CorruptPayload: a payload is shorter, longer, or fails a checksum.
        """
        given = Payloads.of(payloads)
        bodies = np.zeros((len(self._layers), len(given), 5), np.int64)
        self._open(given, self._layers, bodies, self._groups(len(given), 1), 1)
        ends = np.concatenate([given.start[None], bodies[:, :, 1]])
        left = given.start + given.length - ends[-1]
        for i in np.flatnonzero(left)[:1]:
            raise CorruptPayload(f"payload {i}: {left[i]} bytes follow its last layer", int(i))
        return np.diff(ends, axis=0).T.astype(np.int32)

    def _compress(self, parts: Sequence[Symbols]) -> tuple[Bytes, npt.NDArray[np.int64]]:
        whole: tuple[Bytes, npt.NDArray[np.int64]] | None = None
        for layer in self._layers:
            made = _encode(layer, parts[layer.part])
            whole = made if whole is None else (rans.interleave(*whole, *made), whole[1] + made[1])
        assert whole is not None
        return whole

    def _parts(self, symbols: Symbols | Sequence[Symbols]) -> list[Symbols]:
        """The arrays of symbols, contiguous and checked."""
        given = [symbols] if isinstance(symbols, np.ndarray) else list(symbols)
        channels: dict[int, int] = {}
        tokens: dict[int, int] = {}
        for layer in self._layers:
            channels[layer.part] = layer.first + layer.channels
            tokens[layer.part] = layer.tokens
        if len(given) != len(channels):
            raise ValueError(f"symbols must be {len(channels)} arrays, one a grid scale, not {len(given)}")
        for part, array in enumerate(given):
            if array.dtype != np.int32 or array.ndim != 3 or array.shape[2] != channels[part]:
                raise ValueError(
                    f"symbols must be int32 (tiles, tokens, {channels[part]}), not {array.dtype} {array.shape}"
                )
            if array.shape[1] > tokens[part]:
                raise ValueError(f"the codec declares at most {tokens[part]} tokens a tile, not {array.shape[1]}")
            if len(array) != len(given[0]):
                raise ValueError("the arrays of symbols must be of the same tiles")
        # Of one kind whatever is given, since numba compiles anew for each: aligned, contiguous, read-only.
        views = [np.require(array, requirements=["C", "A"]).view() for array in given]
        for view in views:
            view.flags.writeable = False
        return views

    def _open(
        self,
        given: Payloads,
        wanted: Sequence[_Layer],
        bodies: npt.NDArray[np.int64],
        groups: Sequence[slice],
        threads: int | None,
    ) -> None:
        """Check frames and heads of the wanted layers and fill `bodies` int64 (layers, tiles, 5)."""

        def check(group: slice) -> None:
            begin, end = given.start[group], (given.start + given.length)[group]
            for number, layer in enumerate(wanted):
                faults = np.zeros(len(begin), np.int64)
                rans.open_layers(given.data, begin, end, layer.tokens, bodies[number, group], faults)
                _raise_first(faults, group.start, number)
                begin = bodies[number, group, 1]

        _map(check, groups, threads)

    def _groups(self, tiles: int, threads: int | None) -> list[slice]:
        symbols = sum(layer.tokens * layer.channels for layer in self._layers)
        wanted = _GROUP_SYMBOLS // symbols
        # Whole sets of tiles for the vector path, unless they are far too large.
        if symbols * vector.SLOTS <= 8 * _GROUP_SYMBOLS:
            wanted = max(1, wanted // vector.SLOTS) * vector.SLOTS
        size = max(1, _THREAD_SYMBOLS // symbols, min(wanted, -(-tiles // _threads(threads))))
        return [slice(start, min(start + size, tiles)) for start in range(0, tiles, size)]


def _encode(layer: _Layer, symbols: Symbols) -> tuple[Bytes, npt.NDArray[np.int64]]:
    """A layer of some tiles from its columns of `symbols`: their bytes, and how many each has."""
    tiles, tokens = symbols.shape[:2]
    lanes_log2, dense = layer.lanes_log2(tokens), layer.dense
    marks, *others = rans.begin_encoding(
        symbols, lanes_log2, layer.first, dense, layer.sparse, layer.lowest, layer.highest, *layer.marked
    )
    words, at, state = others[-3:]
    has_dense = len(dense.column) > 0
    if tokens and has_dense:
        coded = (symbols, marks, words, at, state)
        rest = np.arange(tiles)
        if layer.kernels is not None and words.size < _FAR:
            some, rest = vector.sets(np.full(tiles, 1 << lanes_log2), rest)
            if len(some.lanes):
                layer.kernels.encode_dense(*coded, some, layer.first, layer.channels, dense, layer.registers)
        if len(rest):
            rans.encode_dense(*coded, int(rest[0]), layer.first, layer.channels, dense, 1 << lanes_log2)
    has_words = tokens > 0 and (has_dense or len(layer.sparse.column) > 0)
    return rans.end_encoding(symbols, layer.tokens, lanes_log2, layer.first, (has_dense, has_words), *others)


def _decode(layer: _Layer, data: Bytes, bodies: npt.NDArray[np.int64], out: Symbols) -> npt.NDArray[np.int64]:
    """Decode a layer of some tiles into its columns of `out`; what is wrong with each."""
    faults = np.zeros(len(out), np.int64)
    place, tables = (layer.first, layer.channels), (layer.dense, layer.sparse)
    words, at, stop, lanes, state = rans.begin_decoding(data, bodies, faults, *place, *tables, out)
    if out.shape[1] and len(layer.dense.column):
        order = np.argsort(lanes, kind="stable")
        order = order[faults[order] == rans.FINE]
        if layer.kernels is not None and len(words) < _FAR:
            some, order = vector.sets(lanes, order)
            if len(some.lanes):
                coded = (words, at, stop, state, faults)
                layer.kernels.decode_dense(*coded, some, *place, layer.dense, layer.registers, out)
        if len(order):
            rans.decode_dense(words, at, stop, lanes, state, faults, order, *place, layer.dense, out)
    rans.end_decoding(words, at, stop, lanes, state, data, bodies, faults, *place, *tables, out)
    return faults


def _prepare(
    tables: EntropyTables, rows: slice, part: int, first: int, tokens: int, kernels: ModuleType | None
) -> _Layer:
    """A layer whose channels have the tables `rows`, in the form that the kernels use."""
    number = np.arange(rows.start, rows.stop)
    is_dense = (~tables.dead & ~tables.sparse)[rows]
    symbol = tables.first_symbols()
    lowest, highest = np.zeros(len(number), np.int32), np.zeros(len(number), np.int32)
    registers = _registers(tables, number[is_dense], kernels) if kernels is not None else None
    live = ~tables.dead[rows]  # no symbol of a dead channel other than 0 has an entry
    lowest[live] = tables.offset[rows][live]
    highest[live] = symbol[tables.start[1:][rows][live] - 1] - 1
    return _Layer(
        part=part,
        first=first,
        channels=len(number),
        tokens=tokens,
        dense=_dense(tables, symbol, number[is_dense], first - rows.start),
        kernels=kernels if registers is not None else None,
        registers=registers,
        sparse=_sparse(tables, symbol, number[tables.sparse[rows]], first - rows.start),
        lowest=lowest,
        highest=highest,
        marked=(lowest * is_dense, highest * is_dense),
        bytes_per_token=tables.bits_per_token(number[is_dense]) / 8,
    )


def _dense(tables: EntropyTables, symbol: npt.NDArray[np.int32], chosen: npt.NDArray[np.int64], move: int) -> Dense:
    place, start = _places(tables.start, chosen)
    cdf = tables.cdf[place].astype(np.int64)
    ends = start[1:] - 1  # of each table, where no entry begins
    below = np.delete(cdf, ends)
    frequency = np.delete(np.diff(cdf, append=0), ends)
    shift = np.delete(tables.shift[place], ends)
    begin = start - np.arange(len(start))
    wide = np.array([shift[begin[j] : begin[j + 1]].any() for j in range(len(chosen))], bool)
    return Dense(
        column=chosen + move,
        precision=tables.precision,
        slot=_slots(cdf, start, tables.precision, 12),
        entry=(below | frequency << 16).astype(np.uint32),
        encoding=(below | np.maximum(4096 - frequency, 0) << 16).astype(np.uint64)
        | ((frequency << 20) - 1).astype(np.uint64) << np.uint64(32),
        reciprocal=(-(-(1 << 44) // np.maximum(frequency, 1))).astype(np.uint64),
        start=begin,
        first=np.delete(symbol[place], ends),
        shift=shift,
        wide=wide,
    )


def _registers(
    tables: EntropyTables, chosen: npt.NDArray[np.int64], kernels: ModuleType
) -> vector.Narrow | vector512.Permuted | None:
    """For a vector path, unless no channel suits it."""
    if tables.precision != vector.PRECISION:
        return None
    rows = [slice(tables.start[c], tables.start[c + 1]) for c in chosen]
    made: vector.Narrow | vector512.Permuted | None = kernels.prepare(
        [(tables.cdf[row].astype(np.int64), bool(tables.shift[row].any())) for row in rows]
    )
    return made


def _sparse(tables: EntropyTables, symbol: npt.NDArray[np.int32], chosen: npt.NDArray[np.int64], move: int) -> Sparse:
    place, start = _places(tables.start, chosen)
    run_place, run_start = _places(tables.run_start, chosen)
    value, run = tables.cdf[place], tables.run_cdf[run_place]
    return Sparse(
        column=chosen + move,
        run=run,
        run_start=run_start,
        value=value,
        start=start,
        first=symbol[place],
        shift=tables.shift[place],
        slot=_slots(value, start, 16, 8),
        run_slot=_slots(run, run_start, 16, 8),
    )


def _slots(
    cdf: npt.NDArray[np.integer[Any]], start: npt.NDArray[np.int64], precision: int, bits: int
) -> npt.NDArray[np.uint8]:
    """(channels, 2**bits): of each table the entry in which the slots begin that have these upper bits."""
    slots = np.arange(1 << bits) << (precision - bits)
    found = [np.searchsorted(cdf[start[j] : start[j + 1]], slots, side="right") - 1 for j in range(len(start) - 1)]
    return np.array(found, np.uint8).reshape(-1, 1 << bits)


def _places(
    start: npt.NDArray[np.int64], chosen: npt.NDArray[np.int64]
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Where the chosen channels' tables are in the arrays of all, and where each begins among the chosen."""
    length = np.diff(start)[chosen]
    begin = np.zeros(len(chosen) + 1, np.int64)
    np.cumsum(length, out=begin[1:])
    return np.asarray(np.repeat(start[chosen] - begin[:-1], length) + np.arange(begin[-1]), np.int64), begin


def _one_size(tokens: npt.NDArray[np.int64], declared: int) -> int:
    """The tokens of the tiles, (layers, tiles), which must all be the same."""
    if not tokens.size:
        return declared
    for _, i in np.argwhere(tokens != tokens[0, 0])[:1]:
        raise CorruptPayload(
            f"payload {i}: a layer of {tokens[:, i].max()} tokens among ones of {tokens[0, 0]}; "
            "decode payloads of one size at a time",
            int(i),
        )
    return int(tokens[0, 0])


def _raise_first(faults: npt.NDArray[np.int64], first: int, layer: int) -> None:
    for i in np.flatnonzero(faults)[:1]:
        raise CorruptPayload(f"payload {first + i}: layer {layer + 1}: {_FAULTS[int(faults[i])]}", int(first + i))


def _threads(threads: int | None) -> int:
    if threads is not None:
        return max(1, threads)
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _map(function: Callable[[slice], Result], groups: Sequence[slice], threads: int | None) -> list[Result]:
    """`function` of every group, on several threads: the kernels hold no lock."""
    if len(groups) < 2 or _threads(threads) < 2:
        return [function(group) for group in groups]
    with ThreadPoolExecutor(_threads(threads)) as pool:
        return list(pool.map(function, groups))

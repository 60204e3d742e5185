"""Where payloads are, fetched from packs by coalesced ranges some requests at a time, and decoded."""

from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from nec_ray.archive.layout import archive_spec, pack_codec
from nec_ray.codec import Arrays, Codec, Payloads, parts_of
from nec_ray.errors import CorruptIndex, CorruptPack, CorruptPayload, NotFound, TooShort
from nec_ray.storage import RangeReader, Store

_WASTE = 0.15
"""Bytes between payloads that are read along to save requests, over the bytes wanted."""
_LARGEST_GAP = 1 << 20
_LARGEST_READ = 4 << 20
_LARGEST_PACK = 1 << 48
"""Far more than any pack holds, and little enough that no sum of offsets and lengths overflows."""
_BATCH_BYTES = 16 << 20
_BATCH_TILES = 8192
_READERS = 16
_FEW = 2
"""Reads for which a client of their own would take longer to make than s3fs, which is there, to read."""
_LOCAL_READERS = 2
_LOCAL_SHARE = 64
"""Reads of a local disk that one thread does in a row."""
_AHEAD = 3
"""Batches that are fetched while one is worked on."""

Int64s = npt.NDArray[np.int64]
Bytes = npt.NDArray[np.uint8]


@dataclass(frozen=True)
class References:
    """Where the payloads of some tiles are, checked so that nothing in them reaches outside the archive."""

    tile_ids: list[str]
    packs: list[str]
    """Names of the packs."""
    pack: Int64s
    """(tiles,) number of the pack in `packs`."""
    offset: Int64s
    """(tiles,) first byte."""
    length: Int64s
    """(tiles,) bytes wanted: of all layers, or of the first ones."""

    def __len__(self) -> int:
        return len(self.tile_ids)


class Batch(NamedTuple):
    """Payloads of some tiles, of one codec."""

    codec_id: str
    number: Int64s
    """(tiles,) which of the references they belong to."""
    payloads: Payloads


def references(tile_ids: Sequence[str], payload: Any, layers: int | None = None) -> References:
    """References of index rows.

    Args:
        tile_ids: whose payloads they are.
        payload: the index column `payload`, an Arrow array of structs.
        layers: how many layers are wanted; all where it is None.

    Raises:
        CorruptIndex: a reference cannot be.
    """
    names = list(tile_ids)
    column = payload.combine_chunks() if isinstance(payload, pa.ChunkedArray) else payload
    if not names:
        return References([], [], *(np.zeros(0, np.int64) for _ in range(3)))
    fields = [pc.struct_field(column, name) for name in ("pack", "offset", "layer_lengths")]
    for field in fields:
        for i in _where(pc.is_null(field)):
            raise CorruptIndex(f"tile {names[i]}: the index names no payload of it")
    pack, offset, lengths = fields
    flat = lengths.flatten()
    counts = pc.list_value_length(lengths).to_numpy(zero_copy_only=False).astype(np.int64)
    for i in (*np.flatnonzero(counts == 0), *np.repeat(np.arange(len(names)), counts)[_where(pc.is_null(flat))]):
        raise CorruptIndex(f"tile {names[i]}: the index names no layers of its payload")
    each = flat.to_numpy(zero_copy_only=False).astype(np.int64)
    begin = np.cumsum(counts) - counts
    layer = np.arange(len(each)) - np.repeat(begin, counts)
    taken = each if layers is None else np.where(layer < layers, each, 0)
    for i in np.flatnonzero(np.minimum.reduceat(each, begin) < 1):
        raise CorruptIndex(f"tile {names[i]}: layers of {lengths[int(i)].as_py()[:8]} bytes cannot be")
    return _references(names, pack, offset, np.add.reduceat(taken, begin))


def whole_references(tile_ids: Sequence[str], pack: Any, offset: Any, n_bytes: Any) -> References:
    """References to whole payloads, of the index columns `payload.pack`, `payload.offset` and `n_bytes`.

    Raises:
        CorruptIndex: a reference cannot be.
    """
    names = list(tile_ids)
    for column in (pack, offset, n_bytes):
        for i in _where(pc.is_null(column)):
            raise CorruptIndex(f"tile {names[i]}: the index names no payload of it")
    return _references(names, pack, offset, n_bytes.to_numpy().astype(np.int64))


def _references(tile_ids: list[str], pack: Any, offset: Any, length: Int64s) -> References:
    offsets = np.asarray(offset).astype(np.int64)
    for i in np.flatnonzero((offsets < 0) | (length < 1) | (offsets > _LARGEST_PACK - length)):
        raise CorruptIndex(f"tile {tile_ids[i]}: {length[i]} bytes at {offsets[i]} cannot be a payload")
    coded = pc.dictionary_encode(pack)
    coded = coded.combine_chunks() if isinstance(coded, pa.ChunkedArray) else coded
    packs: list[str] = coded.dictionary.to_pylist()
    number = coded.indices.to_numpy().astype(np.int64)
    for i, name in enumerate(packs):
        try:
            pack_codec(name)
        except CorruptIndex as error:
            raise CorruptIndex(f"tile {tile_ids[int(np.argmax(number == i))]}: {error}") from None
    return References(tile_ids, packs, number, offsets, length)


def fetch(store: Store, wanted: References) -> Iterator[Batch]:
    """The payloads in the order in which they lie in the packs, a few megabytes at a time, reading ahead.

    Raises:
        CorruptIndex: a payload longer than its codec allows.
        CorruptPack: a pack that is gone or too short.
        StorageError: the store refused, or was away for too long.
    """
    _check_lengths(store, wanted)
    plan = _plan(wanted)
    batches = _batches(wanted, plan)
    # On a local disk a small read takes less time than handing it to another thread.
    share = _LOCAL_SHARE if store.is_local else 1

    def start(batch: range) -> tuple[Bytes, list[Future[None]]]:
        ends = np.cumsum(plan.end[batch.start : batch.stop] - plan.start[batch.start : batch.stop])
        data = np.empty(ends[-1], np.uint8)
        begins = np.append(0, ends)
        steps = range(0, len(batch), share)
        if len(batches) == len(steps) == 1:  # there is nothing to do meanwhile
            _read(reader, wanted, plan, batch, data)
            return data, []
        return data, [pool.submit(_read, reader, wanted, plan, batch[i : i + share], data[begins[i] :]) for i in steps]

    pool = ThreadPoolExecutor(_LOCAL_READERS if store.is_local else _READERS)
    reader = RangeReader(store, plan.ends(wanted.packs) if len(plan.start) > _FEW else {})
    try:
        ahead = deque(start(batch) for batch in batches[:_AHEAD])
        for number, batch in enumerate(batches):
            data, futures = ahead.popleft()
            for future in futures:
                future.result()
            if number + _AHEAD < len(batches):
                ahead.append(start(batches[number + _AHEAD]))
            yield _batch(wanted, plan, batch, data)
    finally:
        pool.shutdown(cancel_futures=True)
        reader.close()


def decode(
    codec: Codec,
    tile_ids: Sequence[str],
    payloads: Sequence[bytes],
    layers: int | None = None,
    *,
    threads: int | None = None,
) -> Arrays:
    """Symbols int32 (tiles, tokens, channels), on all cores where no number of threads is given.

    Where the layers are of several grid scales, a tuple of one such array a scale.

    Raises:
        CorruptPayload: naming the tile.
    """
    try:
        symbols = codec.decompress(payloads, layers, threads=threads)
    except CorruptPayload as error:
        number = error.payload or 0
        what = str(error).removeprefix(f"payload {number}: ")
        raise CorruptPayload(f"tile {tile_ids[number]}: {what}; encode it again from its source", number) from None
    for part, scale in zip(parts_of(symbols) if len(payloads) else (), codec.scales(layers), strict=False):
        if part.shape[1] != scale.tokens:
            raise CorruptPayload(f"tile {tile_ids[0]}: {part.shape[1]} tokens, its codec declares {scale.tokens}")
    return symbols


def _check_lengths(store: Store, wanted: References) -> None:
    """A lying index must not make a reader fetch more than its codec can have written."""
    most = np.zeros(len(wanted.packs), np.int64)
    for i, name in enumerate(wanted.packs):
        spec = archive_spec(store, pack_codec(name))
        most[i] = spec.symbols * 16 + 64 * len(spec.layers)
    for i in np.flatnonzero(wanted.length > most[wanted.pack] if len(wanted) else []):
        raise CorruptIndex(
            f"tile {wanted.tile_ids[i]}: a payload of {wanted.length[i]} bytes is longer than its codec can write"
        )


@dataclass(frozen=True)
class _Plan:
    """Reads, each of one range of one pack."""

    order: Int64s
    """(tiles,) references in the order of the reads."""
    first: Int64s
    """(reads + 1,) where each read's references begin in `order`."""
    pack: Int64s
    start: Int64s
    end: Int64s
    """(reads,) number of the pack, and the range in it."""

    def ends(self, packs: Sequence[str]) -> dict[str, int]:
        """By name of a pack, how far into it is read."""
        last = np.zeros(len(packs), np.int64)
        np.maximum.at(last, self.pack, self.end)
        return dict(zip(packs, last.tolist(), strict=True))


def _plan(wanted: References) -> _Plan:
    """Payloads that lie side by side, or nearly, come in one read."""
    order = np.lexsort((wanted.offset, wanted.pack))
    pack, start = wanted.pack[order], wanted.offset[order]
    end = start + wanted.length[order]
    same = pack[1:] == pack[:-1]
    gap = np.where(same, np.maximum(start[1:] - end[:-1], 0), np.iinfo(np.int64).max)
    joined = gap <= _affordable(gap, int(wanted.length.sum()), _WASTE)
    head = np.flatnonzero(np.concatenate([[True], ~joined])[: len(order)])
    # Cut where another full read begins: large ones would make the first batch late.
    part = (start - start[np.repeat(head, np.diff(np.append(head, len(order))))]) // _LARGEST_READ
    cut = np.flatnonzero(np.diff(part, prepend=0) > 0)
    first = np.union1d(head, cut)
    last = np.maximum.reduceat(end, first) if len(first) else end
    return _Plan(order, np.append(first, len(order)), pack[first], start[first], last)


def _affordable(gaps: Int64s, needed: int, waste: float) -> int:
    """The widest gap such that all gaps up to it cost at most `waste` of the bytes needed."""
    # Gaps of one width are joined all or none, so they are counted together.
    narrow, count = np.unique(gaps[gaps <= _LARGEST_GAP], return_counts=True)
    fits = np.searchsorted(np.cumsum(narrow * count), waste * needed, side="right")
    return int(narrow[fits - 1]) if fits else 0


def _read(reader: RangeReader, wanted: References, plan: _Plan, reads: range, out: Bytes) -> None:
    """Read some ranges into the beginning of `out`, one after the other."""
    mine = slice(reads.start, reads.stop)
    room, at = out.data, 0
    for i, pack, start, end in zip(reads, *(a[mine].tolist() for a in (plan.pack, plan.start, plan.end)), strict=True):
        try:
            reader.read_into(wanted.packs[pack], start, room[at : at + end - start])
        except (NotFound, TooShort) as error:  # what else a store does is no damage
            tile_id = wanted.tile_ids[plan.order[plan.first[i]]]
            if isinstance(error, NotFound):
                raise CorruptPack(
                    f"tile {tile_id}: its pack {wanted.packs[pack]} is gone; "
                    "restore it, encode again, or open a newer version"
                ) from None
            raise CorruptPack(f"tile {tile_id}: {error}") from error
        at += end - start


def _batches(wanted: References, plan: _Plan) -> list[range]:
    """Reads that are handed out together: of one codec, and no more than a batch holds."""
    batches: list[range] = []
    codecs = [pack_codec(name) for name in wanted.packs]
    tiles = np.diff(plan.first).tolist()
    sizes = (plan.end - plan.start).tolist()
    held, size, begin = 0, 0, 0
    for read, pack in enumerate(plan.pack.tolist()):
        other = read > begin and codecs[pack] != codecs[plan.pack[begin]]
        if read > begin and (other or held + tiles[read] > _BATCH_TILES or size + sizes[read] > _BATCH_BYTES):
            batches.append(range(begin, read))
            held, size, begin = 0, 0, read
        held, size = held + tiles[read], size + sizes[read]
    return [*batches, range(begin, len(tiles))] if tiles else []


def _batch(wanted: References, plan: _Plan, reads: range, data: Bytes) -> Batch:
    mine = slice(reads.start, reads.stop)
    number = plan.order[plan.first[reads.start] : plan.first[reads.stop]]
    size = plan.end[mine] - plan.start[mine]
    begin = np.cumsum(size) - size - plan.start[mine]
    tiles = np.diff(plan.first[reads.start : reads.stop + 1])
    payloads = Payloads(data, wanted.offset[number] + np.repeat(begin, tiles), wanted.length[number])
    return Batch(pack_codec(wanted.packs[plan.pack[reads.start]]), number, payloads)


def _where(mask: Any) -> Int64s:
    return np.flatnonzero(mask.to_numpy(zero_copy_only=False))

"""Fetches payloads from packs by coalesced ranges, and decodes them."""

from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from nec_ray.archive.layout import archive_codec, pack_codec
from nec_ray.codec import Codec
from nec_ray.errors import CorruptIndex, CorruptPack, CorruptPayload, NotFound, StorageError
from nec_ray.storage import Store

_GAP = 64 * 1024
"""Bytes between two payloads that are read along rather than asked for in two requests."""
_LARGEST_READ = 8 << 20
_READERS = 16


@dataclass(frozen=True)
class Reference:
    """Where a payload is: the index column `payload`, and the tile it belongs to."""

    tile_id: str
    pack: str
    offset: int
    layer_lengths: tuple[int, ...]


def references(tile_ids: Sequence[str], payloads: Iterable[dict[str, object] | None]) -> list[Reference]:
    """References of index rows, checked so that nothing in them reaches outside the archive.

    Raises:
        CorruptIndex: a reference cannot be.
    """
    found = []
    for tile_id, payload in zip(tile_ids, payloads, strict=True):
        if payload is None:
            raise CorruptIndex(f"tile {tile_id}: valid, but the index names no payload")
        pack, offset, lengths = payload["pack"], payload["offset"], payload["layer_lengths"]
        if not isinstance(pack, str) or not isinstance(offset, int) or not isinstance(lengths, list):
            raise CorruptIndex(f"tile {tile_id}: its payload reference is incomplete")
        if offset < 0 or not lengths or any(not isinstance(n, int) or n < 1 for n in lengths):
            raise CorruptIndex(f"tile {tile_id}: its payload reference ({offset}, {lengths[:8]}) cannot be")
        pack_codec(pack)
        found.append(Reference(tile_id, pack, offset, tuple(lengths)))
    return found


def fetch(store: Store, wanted: Sequence[Reference], layers: int | None = None) -> list[bytes]:
    """Bytes of each payload, or of its first `layers`, in the order asked for.

    Raises:
        CorruptIndex: a payload longer than its codec allows.
        CorruptPack: a pack that is gone or too short.
    """
    lengths = [sum(reference.layer_lengths[:layers]) for reference in wanted]
    for reference, length in zip(wanted, lengths, strict=True):
        spec = archive_codec(store, pack_codec(reference.pack)).spec
        if length > spec.tokens * spec.channels * 16 + 64 * len(spec.layers):
            raise CorruptIndex(
                f"tile {reference.tile_id}: a payload of {length} bytes is longer than its codec can write"
            )
    order = sorted(range(len(wanted)), key=lambda i: (wanted[i].pack, wanted[i].offset))
    runs: list[list[int]] = []
    for i in order:
        if runs:
            first, last = wanted[runs[-1][0]], wanted[runs[-1][-1]]
            gap = wanted[i].offset - (last.offset + lengths[runs[-1][-1]])
            span = wanted[i].offset + lengths[i] - first.offset
            if wanted[i].pack == first.pack and gap <= _GAP and span <= _LARGEST_READ:
                runs[-1].append(i)
                continue
        runs.append([i])
    found: list[bytes] = [b""] * len(wanted)

    def read(run: list[int]) -> None:
        start = wanted[run[0]].offset
        end = max(wanted[i].offset + lengths[i] for i in run)
        data = _read_pack(store, wanted[run[0]], start, end)
        for i in run:
            at = wanted[i].offset - start
            found[i] = data[at : at + lengths[i]]

    with ThreadPoolExecutor(min(_READERS, max(1, len(runs)))) as pool:
        list(pool.map(read, runs))
    return found


def decode(
    codec: Codec, tile_ids: Sequence[str], payloads: Sequence[bytes], layers: int | None = None
) -> npt.NDArray[np.int32]:
    """Symbols int32 (tiles, tokens, channels) on all cores.

    Raises:
        CorruptPayload: naming the tile.
    """
    try:
        symbols = codec.decompress(payloads, layers)
    except CorruptPayload as error:
        number = error.payload or 0
        what = str(error).removeprefix(f"payload {number}: ")
        raise CorruptPayload(f"tile {tile_ids[number]}: {what}; encode it again from its source", number) from None
    if len(payloads) and symbols.shape[1] != codec.spec.tokens:
        raise CorruptPayload(f"tile {tile_ids[0]}: {symbols.shape[1]} tokens, its codec declares {codec.spec.tokens}")
    return symbols


def _read_pack(store: Store, reference: Reference, start: int, end: int) -> bytes:
    try:
        return store.read_range(reference.pack, start, end)
    except NotFound:
        raise CorruptPack(
            f"tile {reference.tile_id}: its pack {reference.pack} is gone; restore it or encode again"
        ) from None
    except StorageError as error:
        raise CorruptPack(f"tile {reference.tile_id}: {error}") from error

"""Plans an encoding run: deterministic shards of the whole catalog, less what the index already holds."""

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime

import numpy as np
import pyarrow as pa

from nec_ray.archive.index import Index, Version
from nec_ray.errors import CodecMismatch
from nec_ray.runtime.ledger import Ledger, Todo
from nec_ray.tiles import OrderedTiles

SHARD_TILES = 256


@dataclass(frozen=True)
class Shard:
    """A run of tiles that lie beside each other, encoded and committed together."""

    id: str
    """SHA-256 over the codec and the tiles, 64 hexadecimal digits."""
    rows: pa.Table
    """All of its catalog rows, so that a resumed run makes the same batches as an undisturbed one."""
    todo: frozenset[str]
    """Ids of the tiles that the index still lacks."""
    replaces: Mapping[str, datetime] = field(default_factory=dict)
    """Tiles whose row is to be replaced (their source changed, or they are tried again), and when it was encoded."""


class Plan:
    """What a run has to do, against one version of the index.

    Args:
        tiles: the catalog's tiles.
        todo: those that are to be encoded.
        base: the version.
        asked: number of tiles that were asked for.
        codec_id: codec to encode with.
        shard_tiles: tiles a shard.
    """

    def __init__(
        self, tiles: OrderedTiles, todo: Todo, *, base: Version, asked: int, codec_id: str, shard_tiles: int
    ) -> None:
        self.base = base
        self.tiles = asked
        self.todo = len(todo.numbers)
        self._tiles = tiles
        self._todo = todo
        self._codec_id = codec_id
        self._shard_tiles = shard_tiles
        self._numbers = np.unique(todo.numbers // shard_tiles)

    @property
    def shards_todo(self) -> int:
        """Number of shards with something to encode."""
        return len(self._numbers)

    def shards(self) -> Iterator[Shard]:
        """The shards with something to encode, in spatial order, each made when it is asked for."""
        for number in self._numbers.tolist():
            start = number * self._shard_tiles
            stop = min(start + self._shard_tiles, len(self._tiles))
            rows = self._tiles.rows(start, stop)
            ids = rows["tile_id"].to_pylist()
            digest = hashlib.sha256(self._codec_id.encode())
            for tile_id, etag in zip(ids, rows["source_etag"].to_pylist(), strict=True):
                digest.update(f"\0{tile_id}\0{etag}".encode())
            first, last = np.searchsorted(self._todo.numbers, [start, stop]).tolist()
            wanted = [ids[n - start] for n in self._todo.numbers[first:last].tolist()]
            older = self._todo.encoded_at.slice(first, last - first).to_pylist()
            replaces = {tile_id: at for tile_id, at in zip(wanted, older, strict=True) if at is not None}
            yield Shard(digest.hexdigest(), rows, frozenset(wanted), replaces)


def plan(
    tiles: OrderedTiles,
    ledger: Ledger,
    index: Index | None,
    codec_id: str,
    *,
    retry_failed: bool = False,
    shard_tiles: int = SHARD_TILES,
    akin: Sequence[str] = (),
) -> Plan:
    """Cut the whole catalog into shards and keep those that hold a tile the index lacks.

    Args:
        tiles: the catalog's tiles.
        ledger: of the same tiles, and of what is asked for.
        index: the archive's index; None where there is no archive yet.
        codec_id: codec to encode with.
        retry_failed: encode failed tiles again.
        shard_tiles: tiles a shard.
        akin: codecs of the same encoder: tiles that were transcoded to one of them are not encoded again.

    Raises:
        CodecMismatch: some of the tiles are there under another codec.
    """
    base = index.version() if index else Version(-1, ())
    if index:
        ledger.read(index, base)
    other = ledger.other_codec(codec_id, akin)
    if other:
        raise CodecMismatch(
            f"tiles of this catalog are in the archive under codec {other[:12]}; give that codec, or another archive"
        )
    return Plan(
        tiles,
        ledger.todo(retry_failed=retry_failed),
        base=base,
        asked=ledger.asked,
        codec_id=codec_id,
        shard_tiles=shard_tiles,
    )

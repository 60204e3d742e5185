"""Tiles that are encoded anew from their pixels: shards of the catalog, and packs without what is not taken over."""

from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc

from nec_ray.archive.pack import write_pack
from nec_ray.archive.payloads import fetch, references
from nec_ray.codec import Codec
from nec_ray.errors import StorageError
from nec_ray.runtime.plan import SHARD_TILES, Shard
from nec_ray.storage import Store
from nec_ray.tiles import OrderedTiles, check_bands
from nec_ray.tiles.catalog import repeated

ENCODED_CELL = 4096
"""Tiles that are encoded and swapped together: some minutes of one core."""


class Pixels:
    """The tiles of a move in the catalog of their pixels.

    Args:
        catalog: path or URL.
        tile_ids: of the move.
        codec: to encode with.
        folder: an empty folder on a local disk; whoever made it removes it.

    Raises:
        NotFound: no catalog there.
        BadCatalog: it is none, or one of the tiles stands twice in it.
        CodecMismatch: its tiles lack bands that the codec needs.
    """

    def __init__(self, catalog: str, tile_ids: pa.Array, codec: Codec, folder: Path) -> None:
        self._codec = codec
        self._tiles = OrderedTiles(catalog, folder)
        check_bands(self._tiles.band_sets, codec.spec.input.bands, self._tiles.url)
        self._wanted = frozenset(tile_ids.to_pylist())
        self._todo: dict[int, int] = {}
        seen: set[str] = set()
        for start in range(0, len(self._tiles), SHARD_TILES):
            here = [i for i in self._rows(start)["tile_id"].to_pylist() if i in self._wanted]
            twice = [tile_id for tile_id, count in Counter(here).items() if count > 1 or tile_id in seen]
            if twice:
                raise repeated(twice, self._tiles.url)
            seen.update(here)
            if here:
                self._todo[start] = len(here)
        self.found = len(seen)

    def shards(self) -> Iterator[Shard]:
        """Shards with something to do, each made when it is asked for.

        They are cut from the whole catalog, as those of an encoding run, so that any run makes the same batches.
        """
        for start in self._todo:
            rows = self._rows(start)
            yield Shard(self._id(start), rows, self._wanted.intersection(rows["tile_id"].to_pylist()))

    def groups(self) -> list[list[str]]:
        """Ids of shards that are swapped together."""
        groups: list[list[str]] = []
        size = 0
        for start, tiles in self._todo.items():
            if not groups or size + tiles > ENCODED_CELL:
                groups.append([])
                size = 0
            groups[-1].append(self._id(start))
            size += tiles
        return groups

    def _rows(self, start: int) -> pa.Table:
        return self._tiles.rows(start, min(start + SHARD_TILES, len(self._tiles)))

    def _id(self, start: int) -> str:
        return f"{self._codec.id[:32]}{start:032x}"


def repacked(store: Store, rows: pa.Table, kept: pa.Table) -> pa.Table:
    """Some of the rows that were just packed, in a pack without the others, which `rebuild` would take for newer."""
    payloads: list[bytes | None] = [None] * kept.num_rows
    lengths: list[list[int] | None] = [None] * kept.num_rows
    places = [i for i, status in enumerate(kept["status"].to_pylist()) if status == "valid"]
    ids = [kept["tile_id"][i].as_py() for i in places]
    for batch in fetch(store, references(ids, kept["payload"].take(pa.array(places, pa.int64())))):
        for number, payload in zip(batch.number.tolist(), batch.payloads, strict=True):
            place = places[number]
            payloads[place], lengths[place] = payload, kept["payload"][place].as_py()["layer_lengths"]
    made = write_pack(store, rows["codec_id"][0].as_py(), kept, payloads, lengths)
    discard(store, sorted(set(packs_of(rows)) - set(packs_of(made))))
    return made


def discard(store: Store, packs: Sequence[str]) -> None:
    """Remove packs of this run that will not be committed: `rebuild` would take their rows for the newest."""
    with suppress(StorageError):  # who may not remove things leaves it to gc
        store.delete(packs)


def packs_of(rows: pa.Table) -> list[str]:
    """Names of the packs in which payloads of some rows lie."""
    packs = pc.unique(pc.struct_field(rows["payload"], "pack"))
    return sorted(packs.drop_null().to_pylist())

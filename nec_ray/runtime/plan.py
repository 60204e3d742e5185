"""Plans an encoding run: deterministic shards of the whole catalog, less what the index already holds."""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import datetime

import duckdb
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from nec_ray.archive.index import Index, Version
from nec_ray.contracts import arrow_schema
from nec_ray.errors import CodecMismatch
from nec_ray.tiles import Catalog, spatial_order

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


@dataclass(frozen=True)
class Plan:
    """What a run has to do, against one version of the index."""

    base: Version
    tiles: int
    """Tiles of the catalog that were asked for."""
    todo: int
    """Tiles that are to be encoded."""
    replaces: dict[str, datetime] = field(default_factory=dict)
    """Tiles whose row is to be replaced (their source changed, or they are tried again)."""
    _rows: pa.Table = field(default_factory=lambda: pa.table({}))
    _cuts: list[tuple[int, int]] = field(default_factory=list)
    _wanted: frozenset[str] = frozenset()
    _codec_id: str = ""

    @property
    def shards_todo(self) -> int:
        """Number of shards with something to encode."""
        return len(self._cuts)

    def shards(self) -> Iterator[Shard]:
        """The shards with something to encode, in spatial order."""
        for start, stop in self._cuts:
            rows = self._rows.slice(start, stop - start)
            ids = rows["tile_id"].to_pylist()
            digest = hashlib.sha256(self._codec_id.encode())
            for tile_id, etag in zip(ids, rows["source_etag"].to_pylist(), strict=True):
                digest.update(f"\0{tile_id}\0{etag}".encode())
            yield Shard(digest.hexdigest(), rows, self._wanted.intersection(ids))


def plan(
    catalog: Catalog,
    index: Index | None,
    codec_id: str,
    *,
    where: str | None = None,
    retry_failed: bool = False,
    shard_tiles: int = SHARD_TILES,
) -> Plan:
    """Cut the whole catalog into shards and keep those that hold a tile the index lacks.

    Args:
        catalog: the tiles.
        index: the archive's index; None where there is no archive yet.
        codec_id: codec to encode with.
        where: SQL condition over the catalog's columns; all tiles where it is None.
        retry_failed: encode failed tiles again.
        shard_tiles: tiles a shard.

    Raises:
        CodecMismatch: some of the tiles are there under another codec.
        BadQuery: the condition does not parse.
    """
    base = index.version() if index else Version(-1, ())
    asked = catalog.select(where).table["tile_id"].combine_chunks()
    rows = catalog.table
    rows = rows.take(pa.array(spatial_order(rows)))
    columns = ["tile_id", "source_etag", "status", "codec_id", "encoded_at"]
    committed = index.read(base.files, columns) if index else arrow_schema("index.json").empty_table().select(columns)
    with duckdb.connect(":memory:") as connection:
        connection.register(
            "tiles",
            rows.select(["tile_id", "source_etag"]).append_column("n", pa.array(np.arange(rows.num_rows))),
        )
        connection.register("committed", committed)
        found: pa.Table = connection.sql(
            """
            SELECT tiles.n, tiles.tile_id, committed.encoded_at, committed.codec_id
            FROM tiles LEFT JOIN committed USING (tile_id)
            WHERE committed.tile_id IS NULL OR committed.source_etag <> tiles.source_etag
                OR (? AND committed.status = 'failed') OR committed.codec_id <> ?
            ORDER BY tiles.n
            """,
            params=[retry_failed, codec_id],
        ).to_arrow_table()
    found = found.filter(pc.is_in(found["tile_id"], asked))
    others = {codec for codec in found["codec_id"].to_pylist() if codec is not None} - {codec_id}
    if others:
        raise CodecMismatch(
            f"tiles of this catalog are in the archive under codec {min(others)[:12]}; "
            "give that codec, or another archive"
        )
    ids = found["tile_id"].to_pylist()
    hit = sorted({n // shard_tiles for n in found["n"].to_pylist()})
    return Plan(
        base=base,
        tiles=len(asked),
        todo=len(ids),
        replaces={
            tile_id: at for tile_id, at in zip(ids, found["encoded_at"].to_pylist(), strict=True) if at is not None
        },
        _rows=rows,
        _cuts=[(k * shard_tiles, min((k + 1) * shard_tiles, rows.num_rows)) for k in hit],
        _wanted=frozenset(ids),
        _codec_id=codec_id,
    )

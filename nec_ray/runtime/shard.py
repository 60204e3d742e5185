"""The three pure steps of encoding: read tiles -> embed -> pack. Ray Data composes the same ones."""

from collections.abc import Generator, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa

from nec_ray.archive.pack import write_pack
from nec_ray.codec import Arrays, Codec, CodecSpec
from nec_ray.runtime.plan import Shard
from nec_ray.storage import Store
from nec_ray.tiles import TileBatch, read_tiles

if TYPE_CHECKING:
    from nec_ray.models.embed import Embedder

_CARRIED = ("tile_id", "source", "source_etag", "acquired_at", "sensor", "geometry", "bbox", "crs", "label")


@dataclass(frozen=True)
class Receipt:
    """What encoding a shard left behind: a pack, and the index rows to commit."""

    shard_id: str
    rows: pa.Table
    """Index rows (schema index.json) of the tiles that were to do."""
    replaces: Mapping[str, datetime] = field(default_factory=dict)
    """The shard's own."""
    worker: str = ""
    """Node and process that encoded it, where that was on Ray."""


def read_shard(shard: Shard, codec: CodecSpec, broken: Mapping[int, str] | None = None) -> TileBatch:
    """Pixels of a shard's tiles as the codec's encoder is fed them.

    Args:
        shard: the shard.
        codec: what the encoder is fed.
        broken: rows that are not to be touched, and why: they become failed tiles.
    """
    spec = codec.input

    def read(rows: pa.Table) -> TileBatch:
        return read_tiles(rows, bands=spec.bands, size=spec.size, fill=spec.mean)

    if not broken:
        return read(shard.rows)
    kept = np.array([row for row in range(shard.rows.num_rows) if row not in broken], np.int64)
    batch = read(shard.rows.take(pa.array(kept)))
    there = dict(zip(kept.tolist(), range(len(kept)), strict=True))
    rows = range(shard.rows.num_rows)
    share = np.full(len(rows), np.nan, np.float32)
    share[kept] = batch.nodata_share
    return TileBatch(
        pixels=batch.pixels,
        valid=kept[batch.valid],
        status=[batch.status[there[row]] if row in there else "failed" for row in rows],
        reason=[batch.reason[there[row]] if row in there else broken[row] for row in rows],
        nodata_share=share,
    )


def pack_shard(shard: Shard, batch: TileBatch, symbols: Arrays, codec: Codec, archive: Store) -> Receipt:
    """Entropy-code the symbols int32 (valid tiles, tokens, channels) of a shard and write its pack.

    Where the codec has several grid scales, they are a tuple of one such array a scale.
    """
    payloads: list[bytes | None] = [None] * shard.rows.num_rows
    lengths: list[Sequence[int] | None] = [None] * shard.rows.num_rows
    pooled: list[Sequence[int] | None] = [None] * shard.rows.num_rows
    made = codec.compress(symbols, threads=1)  # as many cores as Ray counted for this process
    layers, vectors = codec.layer_lengths(made), codec.pool(symbols)
    for row, payload, length, vector in zip(batch.valid.tolist(), made, layers, vectors, strict=True):
        payloads[row], lengths[row], pooled[row] = payload, length.tolist(), vector.tolist()
    todo = [i for i, tile_id in enumerate(shard.rows["tile_id"].to_pylist()) if tile_id in shard.todo]
    rows = _index_rows(shard, batch, codec, pooled).take(todo)
    kept = [payloads[i] for i in todo], [lengths[i] for i in todo]
    return Receipt(shard.id, write_pack(archive, codec.id, rows, *kept), shard.replaces)


def encode_shard(
    shard: Shard, codec: Codec, archive: Store, embedder: "Embedder", broken: Mapping[int, str] | None = None
) -> Receipt:
    """The three steps one after the other: what `--local` and tests run; `broken` as `read_shard` takes it."""
    batch = read_shard(shard, codec.spec, broken)
    return pack_shard(shard, batch, embedder.symbols(batch.pixels), codec, archive)


def serially(shards: Iterable[Shard], codec: Codec, archive: Store) -> Generator[Receipt]:
    """Encode shards in this process, one after the other."""
    from nec_ray.models.embed import Embedder

    embedder = Embedder(codec)
    for shard in shards:
        yield encode_shard(shard, codec, archive, embedder)


def _index_rows(shard: Shard, batch: TileBatch, codec: Codec, pooled: Sequence[Sequence[int] | None]) -> pa.Table:
    n = shard.rows.num_rows
    rows, cols = codec.spec.token_grid
    is_valid = np.zeros(n, bool)
    is_valid[batch.valid] = True
    now = datetime.now(UTC)
    columns = {name: shard.rows[name] for name in _CARRIED}
    columns |= {
        "transform": _token_transforms(shard.rows, rows, cols),
        "grid": pa.array([{"rows": rows, "cols": cols} if valid else None for valid in is_valid]),
        "nodata_share": pa.array(batch.nodata_share, pa.float32(), from_pandas=True),
        "codec_id": pa.array([codec.id] * n),
        "status": pa.array(batch.status),
        "reason": pa.array(batch.reason, pa.string()),
        "encoded_at": pa.array([now] * n, pa.timestamp("us", tz="UTC")),
        "encoded_from": pa.array(["pixels"] * n),
        "pooled": pa.array(pooled, pa.list_(pa.int8())),
    }
    return pa.table(columns)


def _token_transforms(rows: pa.Table, grid_rows: int, grid_cols: int) -> pa.Array:
    """Affine transforms of the token grids: a token covers width / columns x height / rows pixels."""
    found: list[list[float] | None] = []
    for transform, width, height in zip(
        rows["transform"].to_pylist(), rows["width"].to_pylist(), rows["height"].to_pylist(), strict=True
    ):
        if transform is None:
            found.append(None)
            continue
        a, b, c, d, e, f = transform
        x, y = width / grid_cols, height / grid_rows
        found.append([a * x, b * y, c, d * x, e * y, f])
    return pa.array(found, pa.list_(pa.float64()))

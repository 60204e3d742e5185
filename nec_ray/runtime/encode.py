"""Encodes a tile catalog into an archive, on Ray Data or serially; resumable at any point."""

import os
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import zstandard

from nec_ray.archive.index import Index
from nec_ray.archive.layout import (
    ARCHIVE_JSON,
    ArchiveInfo,
    archive_codec,
    codec_ids,
    create_archive,
    find_codec,
    install_codec,
    read_info,
)
from nec_ray.codec import Codec, load_codec
from nec_ray.errors import InputError, Interrupted, NotFound
from nec_ray.runtime.plan import SHARD_TILES, Plan, plan
from nec_ray.runtime.shard import Receipt, encode_shard
from nec_ray.storage import Store
from nec_ray.tiles import Catalog, check_bands, read_catalog, read_pixels

COMMIT_SECONDS = 30.0
_STEADY_SECONDS = 5.0
"""Shards have to come in for this long before a rate means anything."""
_ZSTD_TILES = 200
"""Tiles on which the size of zstd-compressed pixels is measured."""

Progress = Callable[[int, int, int], None]
"""Called with (tiles encoded by this run, tiles to do, payload bytes so far)."""


@dataclass(frozen=True)
class Account:
    """Final account of an encoding run: `tiles = valid + nodata + failed` once it is complete."""

    archive: str
    version: int
    codec_id: str
    tiles: int
    """Tiles of the catalog (or of the part that `where` picked)."""
    valid: int
    nodata: int
    failed: int
    missing: int
    """Tiles that are not committed yet: 0 unless the run was interrupted."""
    encoded: int
    """Tiles that this run committed."""
    payload_bytes: int
    bytes_per_tile: float
    bits_per_symbol: float
    raw_bytes_per_tile: float
    """Of the valid tiles' pixels in the source's own type."""
    raw_dtype: str
    zstd_bytes_per_tile: float
    """Of the same pixels under zstd level 3, on a sample of tiles."""
    seconds: float
    tiles_s: float | None
    """Tiles a second from the first finished shard to the last, start-up left out; null for runs too short to tell."""

    def to_dict(self) -> dict[str, Any]:
        """As plain types, for `--json`."""
        return asdict(self)

    def lines(self) -> list[str]:
        """The account as a person reads it."""
        raw, zstd, mean = self.raw_bytes_per_tile, self.zstd_bytes_per_tile, max(self.bytes_per_tile, 1e-9)
        lines = [
            f"archive: {self.archive}, version {self.version}, codec {self.codec_id[:12]}",
            f"tiles: {self.tiles:,} = {self.valid:,} valid + {self.nodata:,} no-data + {self.failed:,} failed"
            + (f" + {self.missing:,} not encoded yet" if self.missing else ""),
            f"payloads: {self.payload_bytes:,} bytes, {self.bytes_per_tile:,.0f} a tile, "
            f"{self.bits_per_symbol:.3f} bits per symbol",
        ]
        if self.valid:
            lines.append(
                f"against the pixels: {raw / mean:,.0f} times smaller than raw {self.raw_dtype} "
                f"({raw:,.0f} bytes a tile)"
                + (f", {zstd / mean:,.0f} times smaller than zstd ({zstd:,.0f})" if zstd else "")
            )
        steady = f", {self.tiles_s:,.0f} tiles/s once started" if self.tiles_s else ""
        lines.append(f"this run: {self.encoded:,} tiles in {self.seconds:.0f} s{steady}")
        if self.failed:
            lines.append(
                f"why tiles failed: nec query {self.archive} "
                "\"SELECT tile_id, reason FROM embeddings WHERE status = 'failed'\""
            )
        return lines


def encode(
    catalog_url: str | os.PathLike[str],
    archive_url: str | os.PathLike[str],
    *,
    codec_url: str | os.PathLike[str] | None = None,
    where: str | None = None,
    workers: int | None = None,
    local: bool = False,
    retry_failed: bool = False,
    commit_seconds: float = COMMIT_SECONDS,
    shard_tiles: int = SHARD_TILES,
    progress: Progress | None = None,
) -> Account:
    """Encode the tiles of a catalog that the archive lacks; the same call again goes on after any stop.

    Args:
        catalog_url: a tile catalog.
        archive_url: the archive; created where it is not there.
        codec_url: a codec directory, or the first digits of the id of one in the archive; the archive's own
            codec where it is None.
        where: SQL condition over the catalog.
        workers: encoder processes; one a core where it is None.
        local: run in this process, without Ray.
        retry_failed: encode failed tiles again.
        commit_seconds: how often finished shards are committed.
        shard_tiles: tiles a shard.
        progress: called after every shard.

    Raises:
        NotFound: the catalog or codec is not there.
        CodecMismatch: the codec does not fit the catalog's bands, or the archive's tiles.
        Interrupted: Ctrl-C; finished shards are committed.
    """
    catalog, codec, todo, store, index = prepare(
        catalog_url,
        archive_url,
        codec_url=codec_url,
        where=where,
        retry_failed=retry_failed,
        shard_tiles=shard_tiles,
    )
    started = time.monotonic()
    committer = _Committer(index, todo, commit_seconds, progress)
    if todo.shards_todo:
        if local:
            receipts = _serially(todo, codec, store)
        else:
            from nec_ray.runtime.pipeline import on_ray

            receipts = on_ray(todo, codec, store, workers)
        committer.run(receipts)
    return _account(catalog.select(where), codec, store, index, committer, time.monotonic() - started)


def prepare(
    catalog_url: str | os.PathLike[str],
    archive_url: str | os.PathLike[str],
    *,
    codec_url: str | os.PathLike[str] | None = None,
    where: str | None = None,
    retry_failed: bool = False,
    shard_tiles: int = SHARD_TILES,
    create: bool = True,
) -> tuple[Catalog, Codec, Plan, Store, Index]:
    """Open or create everything a run needs and plan it; with `create` false nothing is written."""
    catalog = read_catalog(catalog_url)
    store = Store(archive_url)
    codec = _choose_codec(codec_url, store)
    check_bands(catalog, codec.spec.input.bands)
    index = Index(store)
    exists = store.exists(ARCHIVE_JSON)
    if exists:
        read_info(store)
    todo = plan(
        catalog, index if exists else None, codec.id, where=where, retry_failed=retry_failed, shard_tiles=shard_tiles
    )
    if create:  # only now: what plan() refuses must leave no trace
        licence, attribution = catalog.metadata.licence, catalog.metadata.attribution
        create_archive(store, ArchiveInfo(licence=licence, attribution=attribution))
        index.create()
        install_codec(store, codec)
        codec = archive_codec(store, codec.id)
        if not exists:
            todo = plan(catalog, index, codec.id, where=where, retry_failed=retry_failed, shard_tiles=shard_tiles)
    return catalog, codec, todo, store, index


class _Committer:
    """Collects receipts and commits them every so often, and always before it stops."""

    def __init__(self, index: Index, todo: Plan, seconds: float, progress: Progress | None) -> None:
        self._index = index
        self._plan = todo
        self._seconds = seconds
        self._progress = progress
        self._waiting: list[Receipt] = []
        self._last = time.monotonic()
        self.encoded = 0
        self.committed = 0
        self._bytes = 0
        self._first: tuple[float, int] | None = None
        self.tiles_s = 0.0  # stays 0 where the run was too short to tell

    def run(self, receipts: Iterator[Receipt]) -> None:
        try:
            for receipt in receipts:
                self._take(receipt)
                if time.monotonic() - self._last >= self._seconds:
                    self._commit()
        except KeyboardInterrupt:
            self._commit()
            raise Interrupted(self._plan.tiles - self._plan.todo + self.committed, self._plan.tiles) from None
        except BaseException:
            self._commit()  # what is finished is not lost with the run
            raise
        self._commit()

    def _take(self, receipt: Receipt) -> None:
        now = time.monotonic()
        self._waiting.append(receipt)
        self.encoded += receipt.rows.num_rows
        self._bytes += pc.sum(receipt.rows["n_bytes"]).as_py() or 0
        if self._first is None:
            self._first = (now, self.encoded)
        elif now > self._first[0] + _STEADY_SECONDS:
            self.tiles_s = (self.encoded - self._first[1]) / (now - self._first[0])
        if self._progress:
            self._progress(self.encoded, self._plan.todo, self._bytes)

    def _commit(self) -> None:
        self._last = time.monotonic()
        if not self._waiting:
            return
        rows = pa.concat_tables([receipt.rows for receipt in self._waiting])
        replaces = self._plan.replaces
        done = self._index.commit(
            self._plan.base,
            rows,
            replaces={i: replaces[i] for i in rows["tile_id"].to_pylist() if i in replaces},
            shards=[receipt.shard_id for receipt in self._waiting],
        )
        self.committed += done.added
        self._waiting = []


def _serially(todo: Plan, codec: Codec, store: Store) -> Iterator[Receipt]:
    from nec_ray.models.embed import Embedder

    embedder = Embedder(codec)
    for shard in todo.shards():
        yield encode_shard(shard, codec, store, embedder)


def _choose_codec(url: str | os.PathLike[str] | None, store: Store) -> Codec:
    if url is None:
        ids = codec_ids(store) if store.exists("codecs") else []
        if len(ids) != 1:
            what = "holds several codecs" if ids else "holds no codec yet"
            raise InputError(f"{store.url} {what}; name one with --codec (`nec train` makes one)")
        return find_codec(store, ids[0])
    text = os.fspath(url)
    try:
        return load_codec(text)
    except NotFound:
        if len(text) >= 6 and set(text) <= set("0123456789abcdef"):
            return find_codec(store, text)
        if Store(text).exists("codec/codec.json"):
            return load_codec(f"{text.rstrip('/')}/codec")  # the folder that `nec train --out` made
        raise


def _account(
    catalog: Catalog, codec: Codec, store: Store, index: Index, committer: _Committer, seconds: float
) -> Account:
    version = index.version()
    rows = index.read(version.files, ["tile_id", "status", "n_bytes"])
    rows = rows.filter(pc.is_in(rows["tile_id"], catalog.table["tile_id"].combine_chunks()))
    counts = {entry["values"]: entry["counts"] for entry in pc.value_counts(rows["status"]).to_pylist()}
    valid = counts.get("valid", 0)
    total = pc.sum(rows["n_bytes"]).as_py() or 0
    valid_ids = rows.filter(pc.equal(rows["status"], "valid"))["tile_id"].combine_chunks()
    tiles = catalog.table.filter(pc.is_in(catalog.table["tile_id"], valid_ids))
    raw, zstd = _raw_sizes(tiles)
    return Account(
        archive=store.url,
        version=version.number,
        codec_id=codec.id,
        tiles=len(catalog),
        valid=valid,
        nodata=counts.get("nodata", 0),
        failed=counts.get("failed", 0),
        missing=len(catalog) - rows.num_rows,
        encoded=committer.committed,
        payload_bytes=total,
        bytes_per_tile=total / max(1, valid),
        bits_per_symbol=8 * total / max(1, valid * codec.spec.tokens * codec.spec.channels),
        raw_bytes_per_tile=raw,
        raw_dtype="/".join(sorted(set(tiles["dtype"].to_pylist()))),
        zstd_bytes_per_tile=zstd,
        seconds=seconds,
        tiles_s=committer.tiles_s or None,
    )


def _raw_sizes(tiles: pa.Table) -> tuple[float, float]:
    """Bytes a tile of the pixels as they are, and under zstd level 3 on an even sample."""
    if not tiles.num_rows:
        return 0.0, 0.0
    pixels = np.multiply(tiles["width"].to_numpy(), tiles["height"].to_numpy(), dtype=np.int64)
    bands = pc.list_value_length(tiles["bands"]).to_numpy()
    itemsize = np.array([np.dtype(name).itemsize for name in tiles["dtype"].to_pylist()])
    sample = np.unique(np.linspace(0, tiles.num_rows - 1, _ZSTD_TILES).astype(int))
    compressor = zstandard.ZstdCompressor(level=3)
    sizes = [len(compressor.compress(array.tobytes())) for array in read_pixels(tiles.take(pa.array(sample)))]
    return float((pixels * bands * itemsize).mean()), float(np.mean(sizes)) if sizes else 0.0

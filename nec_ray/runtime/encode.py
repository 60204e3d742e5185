"""Encodes a tile catalog into an archive, on Ray Data or serially; resumable at any point."""

import logging
import os
import tempfile
import time
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import zstandard

from nec_ray.archive.index import Index
from nec_ray.archive.layout import (
    ARCHIVE_JSON,
    ArchiveInfo,
    archive_codec,
    create_archive,
    install_codec,
    read_info,
)
from nec_ray.archive.recorded import RecordedCatalog, check_recorded, write_recorded
from nec_ray.codec import Codec
from nec_ray.errors import BadQuery
from nec_ray.runtime.choose import akin_codecs, choose_codec
from nec_ray.runtime.commit import Committer, Progress
from nec_ray.runtime.ledger import Ledger
from nec_ray.runtime.plan import SHARD_TILES, Plan, plan
from nec_ray.runtime.shard import serially
from nec_ray.storage import Store
from nec_ray.tiles import OrderedTiles, read_pixels

COMMIT_SECONDS = 30.0
WAIT_SECONDS = 900.0
_ZSTD_TILES = 200
"""Tiles on which the size of zstd-compressed pixels is measured."""

_LOG = logging.getLogger(__name__)


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
    encoders_per_gpu: int = 1,
    cores: int = 0,
    gpus: int = 0,
    wait_seconds: float = WAIT_SECONDS,
    progress: Progress | None = None,
) -> Account:
    """Encode the tiles of a catalog that the archive lacks; the same call again goes on after any stop.

    Args:
        catalog_url: a tile catalog.
        archive_url: the archive; created where it is not there.
        codec_url: what `choose_codec` takes; the archive's own codec where it is None.
        where: SQL condition over the catalog.
        workers: encoder processes; one a core where it is None, or `encoders_per_gpu` a GPU where Ray has some.
        local: run in this process, without Ray.
        retry_failed: encode failed tiles again.
        commit_seconds: how often finished shards are committed.
        shard_tiles: tiles a shard.
        encoders_per_gpu: models that share one GPU.
        cores: that the cluster's autoscaler is asked for, until the run ends.
        gpus: likewise.
        wait_seconds: how long to wait for all of these before beginning with what there is.
        progress: called after every shard.

    Raises:
        NotFound: the catalog or codec is not there.
        BadQuery: the condition is blank, or does not run.
        CodecMismatch: the codec does not fit the catalog's bands, or the archive's tiles.
        Interrupted: Ctrl-C; finished shards are committed.
    """
    with prepare(
        catalog_url,
        archive_url,
        codec_url=codec_url,
        where=where,
        retry_failed=retry_failed,
        shard_tiles=shard_tiles,
    ) as run:
        started = time.monotonic()
        planned = {"tiles": run.plan.tiles, "to_encode": run.plan.todo, "shards": run.plan.shards_todo}
        _LOG.info("planned", extra={"facts": {"archive": run.store.url, "codec": run.codec.id, **planned}})
        committer = Committer(run.index, run.plan, run.codec, commit_seconds, progress)
        if run.plan.shards_todo:
            if local:
                receipts = serially(run.plan.shards(), run.codec, run.store)
            else:
                from nec_ray.runtime.pipeline import Ask, on_ray

                ask = Ask(cores, gpus, wait_seconds)
                receipts = on_ray(
                    run.plan.shards(), run.codec, run.store, workers, encoders_per_gpu=encoders_per_gpu, ask=ask
                )
            committer.run(receipts)
        return _account(run, committer, time.monotonic() - started)


@dataclass(frozen=True)
class Prepared:
    """Everything a run needs."""

    tiles: OrderedTiles
    ledger: Ledger
    codec: Codec
    plan: Plan
    store: Store
    index: Index


@contextmanager
def prepare(
    catalog_url: str | os.PathLike[str],
    archive_url: str | os.PathLike[str],
    *,
    codec_url: str | os.PathLike[str] | None = None,
    where: str | None = None,
    retry_failed: bool = False,
    shard_tiles: int = SHARD_TILES,
    create: bool = True,
) -> Iterator[Prepared]:
    """Open or create everything a run needs and plan it; with `create` false nothing is written to the archive."""
    if where is not None and not where.strip():  # an unset variable of a shell must not encode everything
        raise BadQuery(f"{catalog_url}: where: is blank; give a condition, or leave it out for all tiles")
    store = Store(archive_url)
    with tempfile.TemporaryDirectory(prefix="nec-plan-") as name:
        folder = Path(name)
        tiles = OrderedTiles(catalog_url, folder)
        codec = choose_codec(codec_url, store, tiles)
        index = Index(store)
        exists = store.exists(ARCHIVE_JSON)
        if exists:
            read_info(store)
            # Without an index and a pack a first run died here; without an index alone, the index was lost.
            exists = index.exists() or bool(store.names("packs"))
        with Ledger(tiles, folder, where) as ledger:

            def planned(index: Index | None) -> Plan:
                akin = akin_codecs(store, codec) if exists else []
                return plan(
                    tiles, ledger, index, codec.id, retry_failed=retry_failed, shard_tiles=shard_tiles, akin=akin
                )

            todo = planned(index if exists else None)
            if create:  # only now: what plan() refuses must leave no trace
                metadata = tiles.metadata
                known = index.catalogs(todo.base)
                asked = _recorded(store, ledger, known, folder)
                create_archive(store, ArchiveInfo(licence=metadata.licence, attribution=metadata.attribution))
                index.create(asked)
                install_codec(store, codec)
                if not set(asked) <= set(known):
                    index.record(asked)
                codec = archive_codec(store, codec.id)
                if not exists:
                    todo = planned(index)
            yield Prepared(tiles, ledger, codec, todo, store, index)


def _recorded(store: Store, ledger: Ledger, known: Collection[RecordedCatalog], folder: Path) -> list[RecordedCatalog]:
    """The tiles that are asked for as a recorded catalog, whose object is there; none where no tile is asked for.

    Before the first of them is encoded, so that also an interrupted run leaves behind what is absent.
    """
    found = [one for one in known if one.digest == ledger.digest and store.exists(one.path)]
    if found or not ledger.asked:
        return found
    path = folder / "recorded.parquet"
    made = write_recorded(ledger.asked_tiles(), path)
    if store.create_from(made.path, path):
        return [made]
    store.touch(made.path)  # or gc might take what nobody had use for so far
    return [check_recorded(store, made.path)]  # which another release of Arrow may have written


def _account(run: Prepared, committer: Committer, seconds: float) -> Account:
    version = run.index.version()
    run.ledger.read(run.index, version)
    counts = run.ledger.counts(_ZSTD_TILES)
    valid, nodata, failed = (counts.status.get(name, 0) for name in ("valid", "nodata", "failed"))
    spec = run.codec.spec
    return Account(
        archive=run.store.url,
        version=version.number,
        codec_id=run.codec.id,
        tiles=run.ledger.asked,
        valid=valid,
        nodata=nodata,
        failed=failed,
        missing=run.ledger.asked - valid - nodata - failed,
        encoded=committer.committed,
        payload_bytes=counts.payload_bytes,
        bytes_per_tile=counts.payload_bytes / max(1, valid),
        bits_per_symbol=8 * counts.payload_bytes / max(1, valid * spec.symbols),
        raw_bytes_per_tile=counts.raw_bytes,
        raw_dtype=counts.dtypes,
        zstd_bytes_per_tile=_zstd_bytes(run.tiles.take(counts.sample)),
        seconds=seconds,
        tiles_s=committer.tiles_s or None,
    )


def _zstd_bytes(sample: pa.Table) -> float:
    """Mean bytes of the tiles' pixels under zstd level 3."""
    compressor = zstandard.ZstdCompressor(level=3)
    sizes = [len(compressor.compress(array.tobytes())) for array in read_pixels(sample)]
    return float(np.mean(sizes)) if sizes else 0.0

"""Compaction: small index files become large ones, small and half-dead packs are rewritten in Hilbert order."""

import hashlib
import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from nec_ray.archive.change import until_no_conflict
from nec_ray.archive.datafile import FILE_ROWS, DataFile
from nec_ray.archive.index import Index, Version
from nec_ray.archive.layout import is_pack, pack_codec
from nec_ray.archive.pack import MAX_BYTES, PackWriter, payload_bytes
from nec_ray.archive.payloads import fetch, references
from nec_ray.contracts import arrow_schema
from nec_ray.errors import CorruptIndex, CorruptPayload
from nec_ray.storage import Store
from nec_ray.tiles.hilbert import spatial_order

SMALL_PACK = 64 << 20
SMALL_FILE = FILE_ROWS // 4
_HALF_DEAD = 0.5
_COPY_BYTES = 32 << 20
"""Payload bytes that are in memory at a time."""


@dataclass(frozen=True)
class Compaction:
    """What was done, or would be."""

    version: int
    files: int
    """Index files that were replaced."""
    packs: int
    """Packs whose payloads were copied; `gc` removes them."""
    tiles: int
    """Rows rewritten."""
    copied_bytes: int


@dataclass(frozen=True)
class _Plan:
    version: Version
    files: list[DataFile]
    packs: set[str]
    copied_bytes: int


def compact(
    store: Store,
    *,
    dry_run: bool = False,
    small_pack: int = SMALL_PACK,
    most_bytes: int = MAX_BYTES,
    progress: Callable[[int, int], None] | None = None,
) -> Compaction:
    """Rewrite what is small or half dead, as one swap; readers of older versions are not disturbed.

    Args:
        store: the archive.
        dry_run: only say what would be done.
        small_pack: packs of fewer bytes are merged.
        most_bytes: payload bytes of a new pack at most.
        progress: called with (payload bytes copied, payload bytes to copy).

    Raises:
        ConflictError: other writers changed these rows every time.
        CorruptPayload: a payload is not the one that was written; nothing is committed.
        CorruptIndex: a row names a payload that cannot be; nothing is committed.
    """
    index = Index(store)

    def change() -> Compaction:
        plan = _plan(store, index, small_pack)
        done = Compaction(
            plan.version.number,
            len(plan.files),
            len(plan.packs),
            sum(file.rows for file in plan.files),
            plan.copied_bytes,
        )
        if dry_run or not plan.files:
            return done
        rows = index.read(plan.files, arrow_schema("index.json").names)
        rows = rows.take(pa.array(spatial_order(rows)))
        changes = dict(zip(rows["tile_id"].to_pylist(), rows["encoded_at"].to_pylist(), strict=True))
        moved = _move(store, rows, plan, most_bytes, progress)
        commit = index.swap(changes, moved, "compact", within=plan.files)
        return Compaction(commit.version, done.files, done.packs, done.tiles, done.copied_bytes)

    return until_no_conflict(change)


def _plan(store: Store, index: Index, small_pack: int) -> _Plan:
    version = index.version()
    live: dict[str, int] = {}
    holders: dict[str, set[DataFile]] = {}
    for file in version.files:
        rows = index.read([file], ["payload", "n_bytes"])
        packs = pc.struct_field(rows["payload"], "pack")
        sums = pa.table({"pack": packs, "n": rows["n_bytes"]}).filter(pc.is_valid(packs)).group_by("pack")
        for one in sums.aggregate([("n", "sum")]).to_pylist():
            live[one["pack"]] = live.get(one["pack"], 0) + one["n_sum"]
            holders.setdefault(one["pack"], set()).add(file)
    size = {entry.name: entry.size for entry in store.entries("packs")}
    chosen: set[str] = set()
    by_codec: dict[str, list[str]] = {}
    for name, used in live.items():
        if not is_pack(name):
            rows = index.read(list(holders[name]), ["tile_id", "payload"])
            tile_id = rows["tile_id"].filter(pc.equal(pc.struct_field(rows["payload"], "pack"), name))[0]
            raise CorruptIndex(
                f"{store.url}: tile {tile_id}: the index names {name[:120]!r}, which is no pack of this archive; "
                "delete its row, then compact again"
            )
        # The size counts the footer too, so the pack itself is asked where it may be half dead.
        if used < _HALF_DEAD * size.get(name, 0) and used < _HALF_DEAD * payload_bytes(store, name):
            chosen.add(name)
        if used < small_pack:
            by_codec.setdefault(pack_codec(name), []).append(name)
    for small in by_codec.values():
        if len(small) > 1:  # one alone has nobody to be merged with
            chosen.update(small)
    files = {file for name in chosen for file in holders[name]}
    tiny = [file for file in version.files if file.rows < SMALL_FILE]
    if len(tiny) > 1:
        files.update(tiny)
    return _Plan(version, sorted(files, key=lambda file: file.name), chosen, sum(live[name] for name in chosen))


def _move(
    store: Store, rows: pa.Table, plan: _Plan, most_bytes: int, progress: Callable[[int, int], None] | None
) -> pa.Table:
    """The rows, the payloads of the chosen packs copied into new ones."""
    packs = pc.struct_field(rows["payload"], "pack")
    chosen = pc.fill_null(pc.is_in(packs, pa.array(sorted(plan.packs), pa.string())), False)
    parts = [rows.filter(pc.invert(chosen))]
    moving = rows.filter(chosen)
    copied = 0
    for codec_id in moving["codec_id"].unique().to_pylist():
        with PackWriter(store, codec_id, most_bytes) as writer:
            for part in _slices(moving.filter(pc.equal(moving["codec_id"], codec_id))):
                try:
                    writer.add(part, *_copy(store, part))
                except CorruptIndex as error:
                    raise CorruptIndex(f"{store.url}: {error}; delete its row, then compact again") from None
                copied += pc.sum(part["n_bytes"]).as_py()
                if progress:
                    progress(copied, plan.copied_bytes)
            parts.append(writer.close())
    return pa.concat_tables(parts)


def _slices(rows: pa.Table) -> Iterator[pa.Table]:
    ends = np.cumsum(rows["n_bytes"].to_numpy().astype(np.int64)) // _COPY_BYTES
    cuts = [0, *(np.flatnonzero(np.diff(ends)) + 1).tolist(), rows.num_rows]
    for start, stop in itertools.pairwise(cuts):
        yield rows.slice(start, stop - start)


def _copy(store: Store, rows: pa.Table) -> tuple[list[bytes], list[list[int]]]:
    """Payloads and layers' lengths of the rows, each payload the one whose hash the index has."""
    ids, hashes = rows["tile_id"].to_pylist(), rows["sha256"].to_pylist()
    payloads: list[bytes] = [b""] * len(ids)
    for batch in fetch(store, references(ids, rows["payload"])):
        for i, payload in zip(batch.number.tolist(), batch.payloads, strict=True):
            if hashlib.sha256(payload).digest() != hashes[i]:
                raise CorruptPayload(f"tile {ids[i]}: its payload is not the one that was written; run verify")
            payloads[i] = payload
    return payloads, pc.struct_field(rows["payload"], "layer_lengths").to_pylist()

"""Makes an archive what a policy says: transcodes tiles, or encodes them anew, and swaps them cell by cell.

Each swap is one transaction that readers do not notice, so that a run may be killed anywhere and run again. One run
at a time has the archive's lease.
"""

import logging
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, nullcontext
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from nec_ray.archive import open_archive
from nec_ray.archive.change import ATTEMPTS
from nec_ray.archive.index import Index
from nec_ray.codec import Codec
from nec_ray.errors import ConflictError, Interrupted, RunError, TooMuchLoss
from nec_ray.runtime.cluster import connect
from nec_ray.runtime.metrics import ReencodeMetrics
from nec_ray.runtime.policy import Policy
from nec_ray.runtime.reencode_account import Reencoding, add_up, move_account, new_account
from nec_ray.runtime.reencode_pixels import ENCODED_CELL, Pixels, discard, packs_of, repacked
from nec_ray.runtime.reencode_plan import CELL_TILES, Cell, CellRows, Move, Selection, bytes_after, cells, load_target
from nec_ray.runtime.reencode_plan import select as select_tiles
from nec_ray.runtime.shard import Receipt
from nec_ray.runtime.shard import serially as encode_serially
from nec_ray.runtime.stop import check_stop
from nec_ray.runtime.transcode import CHUNK_TILES, Chunk, Loss, Transcoded, on_ray, serially
from nec_ray.storage import Store
from nec_ray.storage.lease import Lease

LEASE = "leases/reencode"
_LOG = logging.getLogger(__name__)
Progress = Callable[[int, int], None]
"""Called with (tiles done, tiles to do)."""


def dry_run(policy: Policy) -> Reencoding:
    """What `reencode` would do; writes nothing.

    Raises:
        The same as `reencode`.
    """
    store = Store(policy.archive)
    selection = select_tiles(policy, store)
    account = new_account(policy, selection)
    account.dry_run = True
    for move in selection.moves:
        after, exact, distortion = bytes_after(move, selection, store)
        mine = move_account(move, after, exact)
        mine.distortion = mine.largest_distortion = distortion
        if move.encodes:
            with TemporaryDirectory(prefix="nec-plan-") as folder:
                target = load_target(move, store, install=False)
                wanted = selection.tile_ids(move, Index(store))
                mine.not_in_catalog = move.tiles - Pixels(move.rule.tiles or "", wanted, target, Path(folder)).found
        mine.cells = -(-move.tiles // (ENCODED_CELL if move.encodes else CELL_TILES))
        account.moves.append(mine)
    add_up(account, policy, selection)
    return account


def reencode(
    policy: Policy,
    *,
    workers: int | None = None,
    local: bool = False,
    cell_tiles: int = CELL_TILES,
    progress: Progress | None = None,
) -> Reencoding:
    """Make an archive what a policy says; the same call again goes on after any stop, and does nothing once it is so.

    Args:
        policy: what it should be.
        workers: tasks or encoder processes at a time; one a core where it is None.
        local: run in this process, without Ray; so does a run that is a single task.
        cell_tiles: tiles that are transcoded, measured and swapped together, at most.
        progress: called after every cell.

    Raises:
        NotFound: no archive, codec or catalog there.
        BadQuery: a condition does not parse or run.
        InputError: a command (`one_rule`) asks for more layers than its tiles have.
        CodecMismatch: tiles of another encoder, without a catalog of pixels.
        LeaseHeld: another run is at work.
        LeaseLost: this run was taken for dead; what was swapped stays.
        TooMuchLoss: cells would lose more than their rule allows; they are as they were, all other rules are done.
        Interrupted: Ctrl-C; what was swapped stays.
    """
    started = time.monotonic()
    store = Store(policy.archive)
    selection = select_tiles(policy, store)
    if not selection.moves:  # a look writes nothing, not even a lease
        account = new_account(policy, selection)
        add_up(account, policy, selection)
        return account
    store.check_writable()
    with Lease(store, LEASE, policy.lease.seconds) as lease:
        selection = select_tiles(policy, store)  # another run may just have ended
        planned = {"tiles": len(selection.owner), "to_reencode": selection.todo, "moves": len(selection.moves)}
        _LOG.info("planned", extra={"facts": {"archive": store.url, **planned}})
        run = _Run(store, lease, selection, progress)
        if selection.todo <= CHUNK_TILES and not any(move.encodes for move in selection.moves):
            local = True  # one task: Ray takes longer to start
        try:
            with nullcontext() if local else connect():
                run.transcode(cell_tiles, workers, local=local)
                run.encode(workers, local=local)
        except KeyboardInterrupt:
            raise Interrupted(run.swapped, selection.todo) from None
    if run.refusals:
        others = f" (and {len(run.refusals) - 1} more like it)" if len(run.refusals) > 1 else ""
        raise TooMuchLoss(f"{run.refusals[0]}{others}")
    account = new_account(policy, selection)
    account.version, account.swapped = Index(store).version().number, run.swapped
    account.moves = list(run.accounts.values())
    add_up(account, policy, selection)
    account.seconds = time.monotonic() - started
    return account


@dataclass
class _Pending:
    """A cell of which some chunks are not back yet."""

    cell: Cell
    marks: pa.Table
    """`tile_id`, `encoded_at`, `n_bytes` and `status` of its old rows."""
    missing: int
    done: list[Transcoded] = field(default_factory=list)


class _Run:
    """One run: cells come back from whoever does the work, and are swapped here."""

    def __init__(self, store: Store, lease: Lease, selection: Selection, progress: Progress | None) -> None:
        self._store = store
        self._index = Index(store)
        self._lease = lease
        self._selection = selection
        self._progress = progress
        self._seen = 0
        self._metrics = ReencodeMetrics()
        self._losses: dict[int, Loss] = {}
        self._pending: dict[int, _Pending] = {}
        self._refused: set[int] = set()
        self.refusals: list[str] = []
        self.swapped = 0
        self.accounts = {id(move): move_account(move, move.n_bytes, True) for move in selection.moves}
        for move in selection.moves:
            self.accounts[id(move)].target = load_target(move, store).id

    def transcode(self, cell_tiles: int, workers: int | None, *, local: bool) -> None:
        """Do the moves from payloads."""
        if all(move.encodes for move in self._selection.moves):
            return
        chunks = self._chunks(cell_tiles)
        with closing(serially(chunks, self._store) if local else on_ray(chunks, self._store, workers)) as results:
            for number, done in results:
                check_stop()
                pending = self._pending[number]
                pending.done.append(done)
                if len(pending.done) == pending.missing:
                    self._finish(self._pending.pop(number))
        if self._pending:
            raise RunError(
                f"{self._store.url}: {len(self._pending)} cells did not come back; run the same command again to go on"
            )

    def encode(self, workers: int | None, *, local: bool) -> None:
        """Do the moves from pixels."""
        for move in self._selection.moves:
            if move.encodes:
                self._encode(move, load_target(move, self._store), workers, local=local)

    def _chunks(self, cell_tiles: int) -> Iterator[Chunk]:
        reader = CellRows(self._index, self._selection)
        for cell in cells(self._selection, cell_tiles):
            if cell.move.number in self._refused:
                self._pass_over(cell.move, cell.tiles)
                continue
            rows = reader.read(cell)
            starts = range(0, rows.num_rows, CHUNK_TILES)
            self._pending[cell.number] = _Pending(cell, _marks(rows), len(starts))
            target = self.accounts[id(cell.move)].target
            for start in starts:
                yield Chunk(cell.number, cell.move.source, target, rows.slice(start, CHUNK_TILES))

    def _finish(self, pending: _Pending) -> None:
        """Measure a whole cell and swap it, or refuse it."""
        cell, move = pending.cell, pending.cell.move
        account, allowed = self.accounts[id(move)], move.rule.max_distortion
        rows = pa.concat_tables([done.rows for done in pending.done])
        loss = sum((done.loss for done in pending.done[1:]), pending.done[0].loss)
        lost = loss.distortion
        if allowed is not None and lost is not None and lost > allowed:
            self.refusals.append(
                f"{self._store.url}: rule {move.rule.name!r}: cell {cell.number} ({cell.tiles:,} tiles, of them "
                f"{pending.marks['tile_id'][0].as_py()}) would lose {lost:.4g} of its embeddings' variance, "
                f"{allowed:g} is allowed; it was not swapped: allow more, or keep more layers"
            )
            self._refused.add(move.number)
            self._metrics.cell(account.target, "refused")
            _LOG.warning("cell refused", extra={"facts": self._facts(move, cell.tiles) | {"distortion": lost}})
        if move.number in self._refused:
            discard(self._store, packs_of(rows))
            self._pass_over(move, cell.tiles)
            return
        before = self._losses.get(id(move))
        self._losses[id(move)] = loss if before is None else before + loss
        account.distortion = self._losses[id(move)].distortion
        account.largest_distortion = max((x for x in (account.largest_distortion, lost) if x is not None), default=None)
        for done in pending.done:
            self._fail(move, done.damaged)
        self._swap(move, pending.marks, rows)

    def _encode(self, move: Move, codec: Codec, workers: int | None, *, local: bool) -> None:
        with TemporaryDirectory(prefix="nec-plan-") as folder:
            wanted = self._selection.tile_ids(move, self._index)
            pixels = Pixels(move.rule.tiles or "", wanted, codec, Path(folder))
            account = self.accounts[id(move)]
            account.not_in_catalog = move.tiles - pixels.found
            self._advance(account.not_in_catalog)
            groups = pixels.groups()
            owner = {shard_id: n for n, group in enumerate(groups) for shard_id in group}
            waiting: dict[int, list[Receipt]] = {}
            shards = pixels.shards()
            if local:
                receipts = encode_serially(shards, codec, self._store)
            else:
                from nec_ray.runtime.pipeline import on_ray as encode_on_ray

                receipts = encode_on_ray(shards, codec, self._store, workers)
            with closing(receipts):
                for receipt in receipts:
                    check_stop()
                    number = owner[receipt.shard_id]
                    done = waiting.setdefault(number, [])
                    done.append(receipt)
                    if len(done) == len(groups[number]):
                        self._finish_encoded(move, waiting.pop(number))

    def _finish_encoded(self, move: Move, receipts: Sequence[Receipt]) -> None:
        """Swap tiles that were encoded; a valid embedding is not given up for a row that is not valid."""
        rows = pa.concat_tables([receipt.rows for receipt in receipts])
        marks = _newest_marks(self._selection.archive.sql, rows["tile_id"].to_pylist())
        valid_before = marks.filter(pc.equal(marks["status"], "valid"))["tile_id"].combine_chunks()
        keeps = pc.and_(pc.not_equal(rows["status"], "valid"), pc.is_in(rows["tile_id"], valid_before))
        kept = rows.filter(keeps)
        if kept.num_rows:
            self._fail(move, dict(zip(kept["tile_id"].to_pylist(), kept["reason"].to_pylist(), strict=True)))
            rows = repacked(self._store, rows, rows.filter(pc.invert(keeps)))
        self._swap(move, marks, rows)

    def _swap(self, move: Move, marks: pa.Table, rows: pa.Table) -> None:
        """Put rows in the place of the old ones, as one transaction; tiles that others changed meanwhile are left."""
        account = self.accounts[id(move)]
        asked = rows.num_rows
        known = {mark["tile_id"]: mark for mark in marks.to_pylist()}
        for _ in range(ATTEMPTS):
            if not rows.num_rows:
                break
            changes = {tile_id: known[tile_id]["encoded_at"] for tile_id in rows["tile_id"].to_pylist()}
            self._lease.check()
            began = time.monotonic()
            try:
                done = self._index.swap(changes, rows, "reencode")
            except ConflictError:
                rows = self._unchanged(changes, rows)
                continue
            account.swapped += rows.num_rows
            size, seconds = pc.sum(rows["n_bytes"]).as_py(), time.monotonic() - began
            account.bytes_after += size - sum(known[i]["n_bytes"] for i in changes)
            account.cells += 1
            self.swapped += rows.num_rows
            account.left += asked - rows.num_rows
            self._advance(asked)
            self._metrics.tiles(account.target, "swapped", rows.num_rows)
            self._metrics.tiles(account.target, "left", asked - rows.num_rows)
            self._metrics.swapped(account.target, size, seconds)
            facts = {"version": done.version, "left": asked - rows.num_rows, "payload_bytes": size, "seconds": seconds}
            _LOG.info("cell swapped", extra={"facts": self._facts(move, rows.num_rows) | facts})
            return
        self._metrics.cell(account.target, "left")
        _LOG.warning("cell left, others changed it", extra={"facts": self._facts(move, asked)})
        self._pass_over(move, asked)

    def _facts(self, move: Move, tiles: int) -> dict[str, Any]:
        """Of a log line about a cell."""
        target = self.accounts[id(move)].target
        return {"rule": move.rule.name, "codec": target, "tiles": tiles, "done": self._seen, "of": self._selection.todo}

    def _unchanged(self, changes: dict[str, datetime], rows: pa.Table) -> pa.Table:
        """Rows of tiles that in the newest version are what they were."""
        now = _newest_marks(open_archive(self._store.url).sql, list(changes))
        same = [mark["tile_id"] for mark in now.to_pylist() if mark["encoded_at"] == changes[mark["tile_id"]]]
        return rows.filter(pc.is_in(rows["tile_id"], pa.array(same, pa.string())))

    def _fail(self, move: Move, reasons: dict[str, str]) -> None:
        if not reasons:
            return
        account = self.accounts[id(move)]
        account.failed += len(reasons)
        for tile_id, reason in reasons.items():
            if len(account.reasons) < 10:
                account.reasons[tile_id] = reason
            _LOG.warning("tile failed", extra={"facts": {"tile_id": tile_id, "reason": reason}})
        self._metrics.tiles(account.target, "failed", len(reasons))
        self._advance(len(reasons))

    def _pass_over(self, move: Move, tiles: int) -> None:
        account = self.accounts[id(move)]
        account.left += tiles
        self._metrics.tiles(account.target, "left", tiles)
        self._advance(tiles)

    def _advance(self, tiles: int) -> None:
        self._seen += tiles
        if self._progress:
            self._progress(self._seen, self._selection.todo)


_MARKS = ["tile_id", "encoded_at", "n_bytes", "status"]


def _marks(rows: pa.Table) -> pa.Table:
    return rows.select(_MARKS)


def _newest_marks(sql: Callable[..., Any], tile_ids: list[str]) -> pa.Table:
    query = f"SELECT {', '.join(_MARKS)} FROM embeddings WHERE tile_id IN (SELECT unnest(?))"
    return sql(query, [tile_ids]).to_arrow_table()

"""Collects the receipts of shards and commits them every so often, and always before it stops."""

import logging
import time
from collections.abc import Callable, Generator
from contextlib import closing

import pyarrow as pa
import pyarrow.compute as pc

from nec_ray.archive.index import Index
from nec_ray.codec import Codec
from nec_ray.errors import Interrupted
from nec_ray.runtime.metrics import EncodeMetrics
from nec_ray.runtime.plan import Plan
from nec_ray.runtime.shard import Receipt
from nec_ray.runtime.stop import check_stop

_STEADY_SECONDS = 5.0
"""Shards have to come in for this long before a rate means anything."""
_LOG = logging.getLogger(__name__)

Progress = Callable[[int, int, int], None]
"""Called with (tiles encoded by this run, tiles to do, payload bytes so far)."""


class Committer:
    """Takes receipts until they end, or the run does.

    Args:
        index: the archive's index.
        todo: the plan.
        codec: what is encoded with.
        seconds: how often it commits.
        progress: called after every shard.
    """

    def __init__(self, index: Index, todo: Plan, codec: Codec, seconds: float, progress: Progress | None) -> None:
        self._index = index
        self._plan = todo
        self._seconds = seconds
        self._progress = progress
        self._metrics = EncodeMetrics(codec.id, codec.spec.symbols)
        self._waiting: list[Receipt] = []
        self._written: set[str] = set()
        self._last = time.monotonic()
        self._shards = 0
        self.encoded = 0
        self.committed = 0
        self._bytes = 0
        self._first: tuple[float, int] | None = None
        self.tiles_s = 0.0  # stays 0 where the run was too short to tell

    def run(self, receipts: Generator[Receipt]) -> None:
        """Commit what comes in, and close where it comes from, which a traceback would keep alive, and Ray with it.

        Raises:
            Interrupted: Ctrl-C; what had come in is committed.
        """
        with closing(receipts):
            try:
                for receipt in receipts:
                    self._take(receipt)
                    check_stop()
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
        self._shards += 1
        self.encoded += receipt.rows.num_rows
        self._bytes += pc.sum(receipt.rows["n_bytes"]).as_py() or 0
        if self._first is None:
            self._first = (now, self.encoded)
        elif now > self._first[0] + _STEADY_SECONDS:
            self.tiles_s = (self.encoded - self._first[1]) / (now - self._first[0])
        self._metrics.encoded(receipt, self._plan.shards_todo - self._shards, len(self._waiting))
        for row in receipt.rows.filter(pc.equal(receipt.rows["status"], "failed")).to_pylist():
            _LOG.warning("tile failed", extra={"facts": {"tile_id": row["tile_id"], "reason": row["reason"]}})
        if self._progress:
            self._progress(self.encoded, self._plan.todo, self._bytes)

    def _commit(self) -> None:
        self._last = time.monotonic()
        if not self._waiting:
            return
        done = self._index.append(
            self._plan.base,
            pa.concat_tables([receipt.rows for receipt in self._waiting]),
            replaces={tile_id: at for receipt in self._waiting for tile_id, at in receipt.replaces.items()},
            shards=[receipt.shard_id for receipt in self._waiting],
            apart=self._written,
        )
        seconds = time.monotonic() - self._last
        self._written.update(done.files)
        self.committed += done.added
        self._waiting = []
        self._metrics.committed(seconds, self._plan.shards_todo - self._shards)
        facts = {"version": done.version, "tiles": done.added, "already_there": done.dropped, "seconds": seconds}
        _LOG.info("committed", extra={"facts": {**facts, "tiles_s": self.tiles_s, "payload_bytes": self._bytes}})

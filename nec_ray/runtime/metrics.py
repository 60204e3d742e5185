"""Prometheus metrics of an encoding run, served by Ray on every node (`--metrics-export-port`)."""

import sys
from typing import Any

import pyarrow.compute as pc

from nec_ray.runtime.shard import Receipt

_COMMIT_SECONDS = [0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 30, 60]


class EncodeMetrics:
    """What a run has done and what waits; silent where the process is not connected to Ray.

    `nec_tiles_total{status}`, `nec_payload_bytes_total`, `nec_bits_per_symbol`, `nec_shards{queue}` (to_encode,
    to_commit) and `nec_commit_seconds`, each with the codec as a tag.

    Args:
        codec_id: the codec.
        symbols: of a tile.
    """

    def __init__(self, codec_id: str, symbols: int) -> None:
        self._tags = {"codec": codec_id[:12]}
        self._symbols = symbols
        self._valid = self._bytes = 0
        self._metrics: dict[str, Any] = {}

    def encoded(self, receipt: Receipt, to_encode: int, to_commit: int) -> None:
        """A shard came back."""
        if not self._connected():
            return
        for entry in pc.value_counts(receipt.rows["status"]).to_pylist():
            self._metrics["tiles"].inc(entry["counts"], {**self._tags, "status": entry["values"]})
            self._valid += entry["counts"] if entry["values"] == "valid" else 0
        size = pc.sum(receipt.rows["n_bytes"]).as_py() or 0
        self._bytes += size
        if size:
            self._metrics["bytes"].inc(size, self._tags)
        if self._valid:
            self._metrics["bits"].set(8 * self._bytes / (self._valid * self._symbols), self._tags)
        self._queues(to_encode, to_commit)

    def committed(self, seconds: float, to_encode: int) -> None:
        """What waited is in the index."""
        if self._connected():
            self._metrics["commit"].observe(seconds, self._tags)
            self._queues(to_encode, 0)

    def _queues(self, to_encode: int, to_commit: int) -> None:
        for queue, count in (("to_encode", to_encode), ("to_commit", to_commit)):
            self._metrics["shards"].set(count, {**self._tags, "queue": queue})

    def _connected(self) -> bool:
        ray = sys.modules.get("ray")
        if ray is None or not ray.is_initialized():
            return False
        if not self._metrics:
            from ray.util.metrics import Counter, Gauge, Histogram

            self._metrics = {
                "tiles": Counter("nec_tiles_total", "Tiles encoded, by status.", ("codec", "status")),
                "bytes": Counter("nec_payload_bytes_total", "Bytes of payloads.", ("codec",)),
                "bits": Gauge("nec_bits_per_symbol", "Payload bits a symbol in this run.", ("codec",)),
                "shards": Gauge("nec_shards", "Shards that wait.", ("codec", "queue")),
                "commit": Histogram("nec_commit_seconds", "Time of a commit.", _COMMIT_SECONDS, ("codec",)),
            }
        return True

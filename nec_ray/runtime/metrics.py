"""Prometheus metrics of runs that encode and re-encode, served by Ray on every node (`--metrics-export-port`)."""

import sys
from abc import ABC, abstractmethod
from typing import Any

import pyarrow.compute as pc

from nec_ray.runtime.shard import Receipt

_COMMIT_SECONDS = [0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 30, 60]


class _Metrics(ABC):
    """Metrics that are made when the process is first seen to be connected to Ray."""

    def __init__(self) -> None:
        self._metrics: dict[str, Any] = {}

    @abstractmethod
    def _make(self) -> dict[str, Any]: ...

    def _connected(self) -> bool:
        ray = sys.modules.get("ray")
        if ray is None or not ray.is_initialized():
            return False
        self._metrics = self._metrics or self._make()
        return True


class EncodeMetrics(_Metrics):
    """What a run has done and what waits; silent where the process is not connected to Ray.

    `nec_tiles_total{status}`, `nec_payload_bytes_total`, `nec_bits_per_symbol`, `nec_shards{queue}` (to_encode,
    to_commit) and `nec_commit_seconds`, each with the codec as a tag.

    Args:
        codec_id: the codec.
        symbols: of a tile.
    """

    def __init__(self, codec_id: str, symbols: int) -> None:
        super().__init__()
        self._tags = {"codec": codec_id[:12]}
        self._symbols = symbols
        self._valid = self._bytes = 0

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

    def _make(self) -> dict[str, Any]:
        from ray.util.metrics import Counter, Gauge, Histogram

        return {
            "tiles": Counter("nec_tiles_total", "Tiles encoded, by status.", ("codec", "status")),
            "bytes": Counter("nec_payload_bytes_total", "Bytes of payloads.", ("codec",)),
            "bits": Gauge("nec_bits_per_symbol", "Payload bits a symbol in this run.", ("codec",)),
            "shards": Gauge("nec_shards", "Shards that wait.", ("codec", "queue")),
            "commit": Histogram("nec_commit_seconds", "Time of a commit.", _COMMIT_SECONDS, ("codec",)),
        }


class ReencodeMetrics(_Metrics):
    """What a re-encoding has done; silent where the process is not connected to Ray, as in a run of a single task.

    `nec_reencoded_tiles_total{result}` (swapped, left, failed), `nec_reencoded_bytes_total`,
    `nec_reencoded_cells_total{result}` (swapped, left, refused) and `nec_swap_seconds`, each with the codec that the
    tiles are brought under as a tag.
    """

    def tiles(self, codec_id: str, result: str, count: int) -> None:
        """What became of some tiles."""
        if count and self._connected():
            self._metrics["tiles"].inc(count, {"codec": codec_id[:12], "result": result})

    def cell(self, codec_id: str, result: str) -> None:
        """What became of a cell."""
        if self._connected():
            self._metrics["cells"].inc(1, {"codec": codec_id[:12], "result": result})

    def swapped(self, codec_id: str, payload_bytes: int, seconds: float) -> None:
        """A cell's rows are in the index."""
        self.cell(codec_id, "swapped")
        if self._connected():
            tags = {"codec": codec_id[:12]}
            self._metrics["seconds"].observe(seconds, tags)
            if payload_bytes:
                self._metrics["bytes"].inc(payload_bytes, tags)

    def _make(self) -> dict[str, Any]:
        from ray.util.metrics import Counter, Histogram

        by_result = ("codec", "result")
        return {
            "tiles": Counter("nec_reencoded_tiles_total", "Tiles of a re-encoding, by what became of them.", by_result),
            "cells": Counter("nec_reencoded_cells_total", "Cells of a re-encoding, likewise.", by_result),
            "bytes": Counter("nec_reencoded_bytes_total", "Bytes of the new payloads.", ("codec",)),
            "seconds": Histogram("nec_swap_seconds", "Time of a swap.", _COMMIT_SECONDS, ("codec",)),
        }

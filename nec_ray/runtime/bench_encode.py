"""`nec bench encode`: the Ray job beside plain processes that do the same work on the same cores, and its memory."""

import multiprocessing
import os
import queue
import tempfile
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from nec_ray.errors import RunError
from nec_ray.evaluate.bench import cores, machine
from nec_ray.runtime.commit import Committer
from nec_ray.runtime.encode import COMMIT_SECONDS, Prepared, prepare
from nec_ray.runtime.messages import shard_message, shard_of
from nec_ray.runtime.pipeline import on_ray
from nec_ray.runtime.shard import Receipt, encode_shard
from nec_ray.runtime.standin import standin_codec
from nec_ray.storage import Store
from nec_ray.tiles import Catalog, build_catalog, builtin_scene, write_catalog

_WINDOW = 64
"""Pixels a side of a tile of the built-in scene; the encoder's input is resized from it."""
_SHARD = 64
_SAMPLE_S = {"memory": 0.5, "speed": 5.0}
"""Looking at all processes takes time, above all at Ray's many."""
_MEMORY_TILES = (10_000, 100_000)

Say = Callable[[str], None]


@dataclass
class _Timeline:
    """When shards were finished, by the worker that did."""

    started: float = field(default_factory=time.monotonic)
    finished: dict[str, list[tuple[float, int]]] = field(default_factory=lambda: defaultdict(list))

    def add(self, worker: str, tiles: int) -> None:
        self.finished[worker].append((time.monotonic(), tiles))

    @property
    def startup_s(self) -> float:
        """Until every worker has finished a shard."""
        return max(shards[0][0] for shards in self.finished.values()) - self.started

    @property
    def tiles_s(self) -> float:
        """Tiles a second once all workers are at work and until the first has nothing left; NaN for too few tiles."""
        begin = max(shards[0][0] for shards in self.finished.values())
        end = min(shards[-1][0] for shards in self.finished.values())
        done = sum(tiles for shards in self.finished.values() for at, tiles in shards if begin < at <= end)
        return done / (end - begin) if end > begin else float("nan")


def bench_encode(
    codec_url: str | None, tiles: int = 2048, *, repeats: int = 2, memory: bool = True, say: Say = lambda _: None
) -> dict[str, Any]:
    """Measure tiles a second, start-up and memory of encoding on Ray and of the bare loop, in turn.

    The bare loop is read, forward, entropy-code, write, in as many plain processes as Ray has encoders, each on a
    share of the same shards: windows of the built-in scene. The rows of `what` = `memory` show the peak of an encoding
    run with an encoder of next to no work, at two numbers of tiles.

    Args:
        codec_url: a codec for red, green and blue; a ViT-Ti/16 of random weights at 128 px where it is None.
        tiles: tiles of a run.
        repeats: of which the median counts.
        memory: measure memory too, which takes some minutes.
        say: told what is being done.

    Returns:
        `{"machine": {...}, "rows": [...]}`; the rows' keys are DESIGN.md's. `peak_mb` is the sum of the proportional
        set sizes of all processes of a run, null where /proc does not tell them; `tiles_s` is null for too few tiles.
    """
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(prefix="nec-bench-encode-") as name:
        folder = Path(name)
        if not codec_url:
            standin_codec(folder / "codec", size="tiny", pixels=128)
        catalog = folder / "catalog.parquet"
        write_catalog(_windows(tiles), catalog)
        found: dict[tuple[str, int], list[tuple[float, float, float | None]]] = defaultdict(list)
        for turn in range(repeats):
            for workers in range(1, cores() + 1):
                for runner in ("bare", "ray"):
                    say(f"{runner}, {workers} workers, {turn + 1} of {repeats}")
                    archive = folder / f"{runner}-{workers}-{turn}"
                    codec = codec_url or folder / "codec"
                    timeline = _Timeline()
                    with _peak("speed") as peak, prepare(catalog, archive, codec_url=codec, shard_tiles=_SHARD) as run:
                        (_bare if runner == "bare" else _ray)(run, workers, timeline)
                    found[runner, workers].append((timeline.tiles_s, timeline.startup_s, peak()))
        for (runner, workers), runs in found.items():
            tiles_s, startup_s, peak_mb = _median(runs)
            row = {"what": "speed", "runner": runner, "workers": workers, "tiles": tiles, "tiles_s": tiles_s}
            rows.append({**row, "startup_s": startup_s, "peak_mb": peak_mb})
        if memory:
            rows += _memory(folder, say)
    return {"machine": machine(), "rows": rows}


def _bare(run: Prepared, workers: int, timeline: _Timeline) -> None:
    shards = [shard_message(shard) for shard in run.plan.shards()]
    context = multiprocessing.get_context("spawn")
    results: Any = context.Queue()
    processes = [
        context.Process(target=_loop, args=(str(n), shards[n::workers], run.store.url, run.codec.id, results))
        for n in range(workers)
    ]
    for process in processes:
        process.start()
    left = len(shards)
    while left:
        try:
            timeline.add(*results.get(timeout=5))
            left -= 1
        except queue.Empty:
            if not any(process.is_alive() for process in processes):
                raise RunError("a process of the bare loop died; run the benchmark again") from None
    for process in processes:
        process.join()


def _loop(name: str, shards: Sequence[dict[str, Any]], archive_url: str, codec_id: str, results: Any) -> None:
    from nec_ray.archive.layout import archive_codec
    from nec_ray.models.embed import Embedder

    store = Store(archive_url)
    codec = archive_codec(store, codec_id)
    embedder = Embedder(codec)
    for message in shards:
        results.put((name, encode_shard(shard_of(message), codec, store, embedder).rows.num_rows))


def _ray(run: Prepared, workers: int | None, timeline: _Timeline) -> None:
    def watched() -> Generator[Receipt]:
        for receipt in on_ray(run.plan.shards(), run.codec, run.store, workers):
            timeline.add(receipt.worker, receipt.rows.num_rows)
            yield receipt

    Committer(run.index, run.plan, run.codec, COMMIT_SECONDS, None).run(watched())


def _memory(folder: Path, say: Say) -> Iterator[dict[str, Any]]:
    """Peaks of runs that differ in nothing but the number of tiles."""
    standin_codec(folder / "standin", size="standin", pixels=16)
    for tiles in _MEMORY_TILES:
        say(f"memory of a run over {tiles:,} tiles")
        catalog = folder / f"catalog-{tiles}.parquet"
        write_catalog(_windows(tiles, 16), catalog)
        timeline = _Timeline()
        with _peak("memory") as peak, prepare(catalog, folder / f"memory-{tiles}", codec_url=folder / "standin") as run:
            _ray(run, None, timeline)
        row = {"what": "memory", "runner": "ray", "workers": len(timeline.finished), "tiles": tiles}
        yield {**row, "tiles_s": timeline.tiles_s, "startup_s": timeline.startup_s, "peak_mb": peak()}


def _windows(count: int, size: int = _WINDOW) -> Catalog:
    """So many overlapping windows of the built-in scene."""
    whole = build_catalog(builtin_scene(), tile_size=size)
    full = whole.select(f"width = {size} AND height = {size} AND nodata_share = 0").table
    places = np.random.default_rng(0).integers(0, full.num_rows, count)
    table = full.take(pa.array(places))
    ids = pa.array([f"{n:08d}" for n in range(count)])
    return Catalog(table.set_column(table.column_names.index("tile_id"), table.schema.field("tile_id"), ids))


@contextmanager
def _peak(what: str) -> Iterator[Callable[[], float | None]]:
    """Samples the memory of this process and all below it; call what it gives for the peak, in MB."""
    samples: list[int] = []
    ended = threading.Event()

    def sample() -> None:
        while not ended.wait(_SAMPLE_S[what] if len(samples) > 1 else 1.0):
            samples.append(_tree_bytes(os.getpid()))

    thread = threading.Thread(target=sample, daemon=True)
    thread.start()
    try:
        yield lambda: max(samples) / 1e6 if any(samples) else None
    finally:
        ended.set()
        thread.join()


def _tree_bytes(root: int) -> int:
    """Sum of the proportional set sizes of a process and all below it; 0 where the system does not tell."""
    below: dict[int, list[int]] = defaultdict(list)
    for entry in Path("/proc").glob("[0-9]*/stat"):
        try:
            parent = int(entry.read_text().rpartition(")")[2].split()[1])
        except (OSError, ValueError, IndexError):
            continue
        below[parent].append(int(entry.parent.name))
    total, waiting = 0, [root]
    while waiting:
        pid = waiting.pop()
        waiting += below[pid]
        try:
            lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
        except OSError:
            continue
        total += sum(int(line.split()[1]) * 1024 for line in lines if line.startswith("Pss:"))
    return total


def _median(runs: Sequence[tuple[float, float, float | None]]) -> tuple[float | None, float, float | None]:
    known = [peak for _, _, peak in runs if peak is not None]
    speed, startup = (float(np.median(values)) for values in ([run[0] for run in runs], [run[1] for run in runs]))
    return None if np.isnan(speed) else speed, startup, max(known) if known else None

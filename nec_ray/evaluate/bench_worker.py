"""One pull in a process of its own, so that nothing of an earlier one is remembered: JSON in, JSON out."""

import json
import sys
import time
import zlib
from pathlib import Path
from typing import Any

from nec_ray.evaluate.bench_layouts import LAYOUTS, Ask, Batch, Layout


def main() -> None:
    """Read `{"layout", "url", "warm", "ask"}` from stdin and print what a pull of it took.

    The process first does the same on the tiny data set `warm`: that leaves out of the figures what every process
    pays once (imports, clients, connections) and nothing of what belongs to the data that is measured.
    """
    asked = json.load(sys.stdin)
    layout, ask = LAYOUTS[asked["layout"]], Ask.from_json(asked["ask"])
    _measure(layout, asked["warm"], Ask(ask.pull))
    json.dump(_measure(layout, asked["url"], ask), sys.stdout)


def _measure(layout: Layout, url: str, ask: Ask) -> dict[str, Any]:
    read, calls = _read_so_far()
    started = time.perf_counter()
    first, batches, tiles = 0.0, [], 0
    if ask.pull == "count":
        tiles = layout.count(url, ask)
    else:
        for batch in layout.pull(url, ask):
            first = first or time.perf_counter() - started
            batches.append(batch)
    seconds = time.perf_counter() - started
    read_then, calls_then = _read_so_far()
    if ask.pull != "count":
        tiles = sum(len(ids) for ids, _ in batches)
    needed, digest = _content(batches)
    total = read_then - read
    fetched = layout.fetched([payloads for _, payloads in batches])
    return {
        "seconds": seconds,
        "first_batch_s": first or seconds,
        "tiles": tiles,
        "bytes_needed": needed,
        "digest": digest,
        "bytes_read": total,
        "index_bytes": None if fetched is None else total - fetched,
        "requests": calls_then - calls,
    }


def _content(batches: list[Batch]) -> tuple[int, int]:
    """Payload bytes, and a checksum of ids and payloads that is the same in any order."""
    needed = digest = 0
    for ids, payloads in batches:
        for tile_id, payload in zip(ids, payloads, strict=True):
            data = bytes(payload)
            needed += len(data)
            digest = (digest + zlib.crc32(data, zlib.crc32(tile_id.encode()))) % (1 << 53)
    return needed, digest


def _read_so_far() -> tuple[int, int]:
    """Bytes that this process has read by system calls, and their number; mapped memory is not seen."""
    path = Path("/proc/self/io")
    if not path.exists():
        return 0, 0
    found = dict(line.split(": ") for line in path.read_text().splitlines())
    return int(found["rchar"]), int(found["syscr"])


if __name__ == "__main__":
    main()

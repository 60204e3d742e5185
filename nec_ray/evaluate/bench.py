"""What all benchmarks share: the machine, and the best of a few timings."""

import os
import platform
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

Result = TypeVar("Result")
_SECONDS = 0.4
"""A measurement is repeated for at least this long, and three times, and the fastest run counts."""


def machine() -> dict[str, Any]:
    """The machine in words and numbers, for the head of a benchmark's report."""
    import numba
    import numpy as np

    return {
        "cpu": _cpu(),
        "cores": cores(),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "numpy": np.__version__,
        "numba": numba.__version__,
    }


def cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def best_seconds(work: Callable[[], Result]) -> tuple[float, Result]:
    """(seconds of the fastest of some runs, what the first run gave); the first run is not timed."""
    result = work()
    times: list[float] = []
    while len(times) < 3 or sum(times) < _SECONDS:
        started = time.perf_counter()
        work()
        times.append(time.perf_counter() - started)
    return min(times), result


def _cpu() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()

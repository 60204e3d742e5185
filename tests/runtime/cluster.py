"""A Ray cluster of several nodes on this machine, and commands that run on it."""

import os
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil

ROOT = Path(__file__).parents[2]


@contextmanager
def nodes(count: int, **resources: float) -> Iterator[Any]:
    """A cluster whose head has no cores, and `count` nodes of one core each."""
    from ray.cluster_utils import Cluster

    # A port of its own choice: where the default one is taken Ray leaves a socket open.
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "dashboard_port": None})
    try:
        for _ in range(count):
            cluster.add_node(num_cpus=1, **resources)
        yield cluster
    finally:
        cluster.shutdown()


def command(address: str | None, *words: str, shard_tiles: int, commit_seconds: float) -> "subprocess.Popen[str]":
    """`nec WORDS` in a process of its own, with small shards."""
    code = (
        "import sys; from nec_ray import cli; from nec_ray.runtime import encode as e;"
        f"e.encode.__kwdefaults__.update(shard_tiles={shard_tiles}, commit_seconds={commit_seconds});"
        "sys.argv[0] = 'nec'; cli.main()"
    )
    environment: Mapping[str, str] = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]),
        **({"RAY_ADDRESS": address} if address else {}),
    }
    return subprocess.Popen(
        [sys.executable, "-c", code, *words],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
        start_new_session=True,
    )


def workers(name: str) -> list[psutil.Process]:
    """Ray's workers below this process that run something of this name."""
    found = []
    for process in psutil.Process().children(recursive=True):
        try:
            if name in " ".join(process.cmdline()):
                found.append(process)
        except psutil.Error:
            continue
    return found

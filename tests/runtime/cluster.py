"""A Ray cluster of several nodes on this machine, in processes of its own, and commands that run on it."""

import os
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil

from nec_ray.runtime.cluster import NODE_ENVIRONMENT

ROOT = Path(__file__).parents[2]
_KEEPER = """
import sys
from ray.cluster_utils import Cluster
# A port of its own choice: where the default one is taken Ray leaves a socket open.
cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "dashboard_port": None})
nodes = []
print(cluster.address, flush=True)
for line in sys.stdin:
    if line == "add\\n":
        nodes.append(cluster.add_node(num_cpus=1))
    else:
        cluster.remove_node(nodes.pop(int(line)), allow_graceful=False)
    print("done", flush=True)
cluster.shutdown()
"""
"""Keeps the nodes. Not this process: Ray's reapers would end it with the nodes."""


class Cluster:
    """A head without cores, and nodes of one core that come and go as machines do."""

    def __init__(self) -> None:
        self.size = 0
        self._keeper = subprocess.Popen(
            [sys.executable, "-W", "ignore", "-c", _KEEPER],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | NODE_ENVIRONMENT,
            start_new_session=True,
        )
        self.address = self._line()

    def add_node(self) -> None:
        """One more node, which has joined when this returns."""
        self._ask("add")
        self.size += 1

    def lose_node(self, which: int) -> None:
        """All processes of a node are gone at once."""
        self._ask(str(which))
        self.size -= 1

    def workers(self) -> list[psutil.Process]:
        """The processes that read or encode tiles, by their numbers; not the agents of nodes, which end with them."""
        found = []
        for process in psutil.Process(self._keeper.pid).children(recursive=True):
            with suppress(psutil.Error):
                title = " ".join(process.cmdline())
                if title.startswith("ray::") and "Map" in title:
                    found.append(process)
        return sorted(found, key=lambda process: process.pid)

    def stop(self) -> None:
        """End what was started."""
        with self._keeper as keeper:
            assert keeper.stdin
            keeper.stdin.close()
            keeper.wait(120)

    def _ask(self, words: str) -> None:
        print(words, file=self._keeper.stdin, flush=True)
        assert self._line() == "done"

    def _line(self) -> str:
        assert self._keeper.stdout
        return self._keeper.stdout.readline().strip()


@contextmanager
def nodes(count: int) -> Iterator[Cluster]:
    """A cluster of `count` nodes."""
    cluster = Cluster()
    try:
        for _ in range(count):
            cluster.add_node()
        yield cluster
    finally:
        cluster.stop()


def command(
    address: str | None, *words: str, shard_tiles: int, commit_seconds: float, before: str = "pass"
) -> "subprocess.Popen[str]":
    """`nec WORDS` in a process of its own, with small shards; other Python comes first."""
    code = (
        f"{before}; import sys; from nec_ray import cli; from nec_ray.runtime import encode as e;"
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

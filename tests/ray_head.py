"""Ray's head with its job server, in processes of its own."""

import os
import shutil
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from tests.s3 import free_ports


@dataclass(frozen=True)
class RayHead:
    """A head that answers."""

    url: str
    """Of the job server."""
    metrics_url: str
    """What Prometheus would read."""
    environment: dict[str, str]
    """Of commands that are to reach it."""


@contextmanager
def ray_head(cpus: int, environment: Mapping[str, str]) -> Iterator[RayHead]:
    """Start a head with these variables, on ports of its own; `ray.init` would give its agent a fixed one."""
    folder = tempfile.mkdtemp(prefix="nec-ray-")  # short, since paths of sockets may have 107 characters
    gcs, dashboard, agent, client, metrics = free_ports(5)
    url = f"http://127.0.0.1:{dashboard}"
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    variables = {**os.environ, "PATH": path, **environment}
    start = f"ray start --head --block --num-cpus={cpus} --node-ip-address=127.0.0.1 --temp-dir={folder} --port={gcs}"
    start += f" --dashboard-port={dashboard} --dashboard-agent-listen-port={agent} --ray-client-server-port={client}"
    start += f" --metrics-export-port={metrics} --min-worker-port=0 --max-worker-port=0 --disable-usage-stats"
    with subprocess.Popen(start.split(), env=variables, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as head:
        try:
            deadline = time.monotonic() + 600
            while not _answers(url):
                assert head.poll() is None
                assert time.monotonic() < deadline
                time.sleep(0.3)
            yield RayHead(url, f"http://127.0.0.1:{metrics}/metrics", variables | {"RAY_ADDRESS": url})
        finally:
            head.terminate()  # which ends what it has started, and nothing else
            head.wait(120)
            shutil.rmtree(folder, ignore_errors=True)


def _answers(url: str) -> bool:
    """Whether the job server is there, if only to ask for a token."""
    try:
        urllib.request.urlopen(f"{url}/api/jobs/", timeout=5).close()
    except urllib.error.HTTPError as error:
        return error.code == 401
    except OSError:
        return False
    return True

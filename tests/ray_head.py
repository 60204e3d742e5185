"""Ray's head with its job server, in processes of its own."""

import json
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
    address: str
    """Of drivers on this machine."""


def _autoscaling(gcs: int, workers: int) -> dict[str, object]:
    """A cluster of up to so many nodes of one core, which Ray's own stand-in for a cloud starts on this machine."""
    provider: dict[str, object] = {"type": "fake_multinode", "gcs_address": f"127.0.0.1:{gcs}"}
    provider |= {"use_node_id_as_ip": True, "disable_node_updaters": True, "disable_launch_config_check": True}
    types = {
        "ray.head.default": {"resources": {"CPU": 0}, "node_config": {}, "max_workers": 0},
        "worker": {"resources": {"CPU": 1}, "node_config": {}, "min_workers": 0, "max_workers": workers},
    }
    commands = ("initialization", "setup", "head_setup", "worker_setup", "head_start_ray", "worker_start_ray")
    empty = [f"{kind}_commands" for kind in commands] + ["cluster_synced_files", "file_mounts_sync_continuously"]
    return {name: [] for name in empty} | {
        "cluster_name": "tests",
        "max_workers": workers,
        "upscaling_speed": 1,
        "idle_timeout_minutes": 0.1,
        "provider": provider,
        "auth": {"ssh_user": "nobody"},
        "docker": {},
        "file_mounts": {},
        "available_node_types": types,
        "head_node_type": "ray.head.default",
    }


@contextmanager
def ray_head(cpus: int, environment: Mapping[str, str], *, autoscale: int = 0) -> Iterator[RayHead]:
    """Start a head with these variables, on ports of its own; `ray.init` would give its agent a fixed one.

    With `autoscale` an autoscaler starts up to so many nodes of one core when they are asked for, and ends idle ones.
    """
    folder = tempfile.mkdtemp(prefix="nec-ray-")  # short, since paths of sockets may have 107 characters
    gcs, dashboard, agent, client, metrics = free_ports(5)
    url = f"http://127.0.0.1:{dashboard}"
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    variables = {**os.environ, "PATH": path, **environment}
    start = f"ray start --head --block --num-cpus={cpus} --node-ip-address=127.0.0.1 --temp-dir={folder} --port={gcs}"
    start += f" --dashboard-port={dashboard} --dashboard-agent-listen-port={agent} --ray-client-server-port={client}"
    start += f" --metrics-export-port={metrics} --min-worker-port=0 --max-worker-port=0 --disable-usage-stats"
    if autoscale:
        config = Path(folder) / "autoscaling.json"
        config.write_text(json.dumps(_autoscaling(gcs, autoscale)))
        start += f" --autoscaling-config={config}"
        variables |= {"RAY_FAKE_CLUSTER": "1", "AUTOSCALER_UPDATE_INTERVAL_S": "1"}
    with subprocess.Popen(start.split(), env=variables, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as head:
        try:
            deadline = time.monotonic() + 600
            while not _answers(url):
                assert head.poll() is None
                assert time.monotonic() < deadline
                time.sleep(0.3)
            yield RayHead(
                url, f"http://127.0.0.1:{metrics}/metrics", variables | {"RAY_ADDRESS": url}, f"127.0.0.1:{gcs}"
            )
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

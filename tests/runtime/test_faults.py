"""Encoding on several nodes while they, the driver and the object store fail: nothing lost, nothing twice."""

import json
import os
import random
import time
from collections.abc import Iterator
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from typing import Any

import psutil
import pytest
import s3fs

from nec_ray import open_archive
from nec_ray.runtime.encode import encode
from nec_ray.storage import Store
from nec_ray.tiles import build_catalog, builtin_scene, write_catalog
from tests.faults import FaultyProxy
from tests.runtime.cluster import Cluster, command, nodes
from tests.runtime.make import random_codec
from tests.runtime.test_encode import hashes
from tests.s3 import Server

SHARD, COMMIT_S = 8, 1.0
SLACK_S, LONGEST_S = 10.0, 30.0
"""From a pack to its receipt, and of a commit, on a machine with two cores and three nodes."""
IN_HAND = 2
"""Shards of a worker at most: one that it encodes, and one whose receipt is on its way."""


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A codec, a catalog of real tiles, and the archive of an undisturbed run."""
    folder = tmp_path_factory.mktemp("faults")
    codec = random_codec(folder / "codec")
    write_catalog(build_catalog(builtin_scene(), tile_size=40), folder / "catalog.parquet")
    encode(folder / "catalog.parquet", folder / "whole", codec_url=codec._store.url, local=True, shard_tiles=SHARD)
    return folder


@pytest.fixture(scope="module")
def proxy(s3_server: Server) -> Iterator[FaultyProxy]:
    proxy = FaultyProxy(s3_server.endpoint, 0.0, ("busy", "error"))
    before = os.environ["AWS_ENDPOINT_URL"]
    os.environ["AWS_ENDPOINT_URL"] = proxy.endpoint
    s3fs.S3FileSystem.clear_instance_cache()
    yield proxy
    os.environ["AWS_ENDPOINT_URL"] = before
    s3fs.S3FileSystem.clear_instance_cache()
    proxy.stop()


@pytest.fixture(scope="module")
def cluster(proxy: FaultyProxy) -> Iterator[Cluster]:
    with nodes(2) as cluster:
        yield cluster


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_whatever_fails_at_random_moments_the_archive_is_that_of_an_undisturbed_run(
    work: Path,
    s3_server: Server,
    proxy: FaultyProxy,
    cluster: Cluster,
    fault_seed: int,
    request: pytest.FixtureRequest,
) -> None:
    rng = random.Random(fault_seed)
    archive = f"s3://{s3_server.bucket()}/archive"
    words = ["encode", str(work / "catalog.parquet"), archive, "--codec", str(work / "codec"), "--json"]

    def start() -> Any:
        return command(cluster.address, *words, shard_tiles=SHARD, commit_seconds=COMMIT_S)

    drivers = [start()]
    request.addfinalizer(lambda: end(drivers))
    wait_for_packs(archive, drivers[-1], 1)
    faults = ["worker", "node", "store", "driver"]
    rng.shuffle(faults)
    for done, fault in enumerate(faults):
        wait_for_workers(cluster, drivers[-1])
        time.sleep(rng.uniform(0, 1))
        if fault == "worker":
            for worker in rng.sample(found := cluster.workers(), min(1, len(found))):
                with suppress(psutil.NoSuchProcess):  # it may just have ended
                    worker.kill()
        elif fault == "node":
            cluster.add_node()
            cluster.lose_node(rng.randrange(cluster.size))
        elif fault == "store":
            proxy.share = 1.0
            time.sleep(rng.uniform(0.5, 2))
            proxy.share = 0.0
        else:
            drivers[-1].kill()
            drivers[-1].communicate(timeout=60)
            only_recent_work_is_lost(archive, IN_HAND * len({"worker", "node"} & {*faults[:done]}))
            while cluster.workers():  # Ray ends those of a driver that is gone
                time.sleep(0.1)
            drivers.append(start())
    for _ in range(3):  # a run that lost too much says so, and that the same command goes on
        out, problems = drivers[-1].communicate(timeout=600)
        if drivers[-1].returncode == 0:
            break
        assert "run the same command again" in problems, problems
        drivers.append(start())
    assert drivers[-1].returncode == 0, problems
    account = json.loads(out)
    assert (account["missing"], account["failed"]) == (0, 0)
    assert hashes(archive) == hashes(work / "whole")


def end(drivers: list[Any]) -> None:
    for driver in drivers:
        driver.kill()
        with driver:  # closes its pipes and waits
            pass


def wait_for_packs(archive: str, driver: Any, count: int) -> None:
    deadline = time.monotonic() + 600
    while time.monotonic() < deadline:
        assert driver.poll() is None, driver.communicate()
        if len(Store(archive).names("packs")) >= count:
            return
        time.sleep(0.2)
    raise AssertionError("no pack")


def wait_for_workers(cluster: Cluster, driver: Any) -> None:
    """A fault is to meet a run at work, unless it has ended."""
    deadline = time.monotonic() + 600
    while not cluster.workers() and driver.poll() is None:
        assert time.monotonic() < deadline
        time.sleep(0.1)


def only_recent_work_is_lost(archive: str, again: int) -> None:
    """What is not in the index was written after the last commit had begun, and within one commit interval.

    But for the packs of shards whose worker was lost, `again` at most: these are there before they are encoded again.
    """
    store = Store(archive)
    commits = [entry.modified for entry in store.entries("index/_delta_log") if entry.name.endswith(".json")]
    used = {payload["pack"] for payload in open_archive(archive).rows(["payload"])["payload"].to_pylist() if payload}
    lost = sorted(entry.modified for entry in store.entries("packs") if entry.name not in used)[again:]
    if lost:
        assert lost[0] > max(commits) - timedelta(seconds=SLACK_S)
        assert lost[-1] - lost[0] < timedelta(seconds=COMMIT_S + LONGEST_S)

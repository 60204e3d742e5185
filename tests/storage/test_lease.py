"""Leases: one holder at a time, whoever is killed, stopped or late, on a local disk and on a real S3 server."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path

import pytest
import s3fs

from nec_ray.errors import ConflictError, LeaseHeld, LeaseLost, StorageError
from nec_ray.storage import Store
from nec_ray.storage.lease import Lease
from tests.faults import FaultyProxy
from tests.s3 import Server

ROOT = Path(__file__).resolve().parents[2]
FOLDER = "leases/test"


@pytest.fixture(params=["local", pytest.param("s3", marks=pytest.mark.slow)])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Store:
    if request.param == "local":
        return Store(tmp_path / "store")
    return Store(f"s3://{request.getfixturevalue('s3_server').bucket()}/store")


def start(store: Store, seconds: float, *what: str) -> "subprocess.Popen[str]":
    command = [sys.executable, "-m", "tests.storage.holder", store.url, str(seconds), *what]
    return subprocess.Popen(
        command, cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)}, stdout=subprocess.PIPE, text=True
    )


@contextmanager
def holding(store: Store, seconds: float) -> "Iterator[subprocess.Popen[str]]":
    """A process that has the lease."""
    with start(store, seconds, "hold") as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == "have\n"
            yield process
        finally:
            process.kill()


def wait_for(store: Store, seconds: float, most: float = 30) -> Lease:
    """The lease, as soon as it can be had; not released."""
    deadline = time.monotonic() + most
    while True:
        lease = Lease(store, FOLDER, seconds)
        try:
            return lease.__enter__()
        except LeaseHeld:
            assert time.monotonic() < deadline
            time.sleep(0.05)


def test_one_has_it_until_it_lets_go(store: Store) -> None:
    with Lease(store, FOLDER, 60) as first:
        first.check()
        with pytest.raises(LeaseHeld, match=r"has the lease leases/test until 2.*run the same command again") as caught:
            Lease(store, FOLDER, 60).__enter__()
        assert first.holder in str(caught.value)
        assert isinstance(caught.value, ConflictError)  # which jobs try again
    with Lease(store, FOLDER, 60) as second:
        second.check()
        assert second.holder != first.holder
        with pytest.raises(LeaseLost):
            first.check()
    assert len(store.names(FOLDER)) == 1


def test_a_lease_is_renewed_for_as_long_as_it_is_held(store: Store) -> None:
    with Lease(store, FOLDER, 0.6) as held:
        [first] = store.names(FOLDER)
        time.sleep(2.2)  # the last second is the clock's
        held.check()
        with pytest.raises(LeaseHeld):
            Lease(store, FOLDER, 0.6).__enter__()
        assert max(store.names(FOLDER)) > first
        assert len(store.names(FOLDER)) <= 2


@pytest.mark.slow
def test_processes_hold_it_one_after_the_other(store: Store) -> None:
    workers = [start(store, 30, "count", "3") for _ in range(3)]
    assert [worker.wait(120) for worker in workers] == [0, 0, 0]
    assert int(store.read("counter")) == 9
    for worker in workers:
        assert worker.stdout is not None
        worker.stdout.close()


@pytest.mark.slow
def test_the_lease_of_a_killed_process_ends_and_not_before(store: Store) -> None:
    with holding(store, 2) as process:
        process.kill()
        process.wait()
    last = store.modified(max(store.names(FOLDER)))
    with pytest.raises(LeaseHeld):
        Lease(store, FOLDER, 2).__enter__()
    taken = wait_for(store, 2)
    try:
        assert store.modified(max(store.names(FOLDER))) - last >= timedelta(seconds=2)
    finally:
        taken.__exit__(None, None, None)


@pytest.mark.slow
def test_a_process_that_was_stopped_finds_that_it_lost_it(store: Store) -> None:
    with holding(store, 1.5) as process:
        process.send_signal(signal.SIGSTOP)
        taken = wait_for(store, 60)
        process.send_signal(signal.SIGCONT)
        assert process.stdout is not None
        assert process.stdout.readline() == "lost\n"
        process.wait(30)
        taken.check()  # what the late one did on its way out harmed nobody
        with pytest.raises(LeaseHeld, match=taken.holder):
            Lease(store, FOLDER, 60).__enter__()
        taken.__exit__(None, None, None)


def test_who_looked_long_ago_cannot_take_an_old_number_again(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """Numbers below the newest are removed, so that creating one would work."""
    with Lease(store, FOLDER, 60):
        pass  # numbers 1 and 2
    with Lease(store, FOLDER, 60) as holder:
        late = Lease(store, FOLDER, 60)
        real = late._newest
        seen = [None]  # an empty folder, before all this
        monkeypatch.setattr(late, "_newest", lambda: seen.pop() if seen else real())
        with pytest.raises(LeaseHeld, match=holder.holder):
            late.__enter__()
        holder.check()
        assert len(store.names(FOLDER)) == 1


def test_a_store_that_is_away_for_too_long_loses_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = Store(tmp_path)
    lease = Lease(store, FOLDER, 1).__enter__()

    def away(*_: object) -> bool:
        raise StorageError("away")

    monkeypatch.setattr(store, "create", away)
    time.sleep(1.2)
    with pytest.raises(LeaseLost, match="could not be renewed in time"):
        lease.check()
    lease.__exit__(None, None, None)


@pytest.mark.parametrize("content", [b"", b"[]", b'{"holder": "x"}', b'{"holder": "x", "seconds": 1e999}', b"\xff"])
def test_what_is_no_lease_is_refused_in_one_line(tmp_path: Path, content: bytes) -> None:
    store = Store(tmp_path)
    store.create(f"{FOLDER}/{7:012}.json", content)
    store.create(f"{FOLDER}/notes.txt", b"is looked over")
    with pytest.raises(LeaseHeld, match="no lease of this release; remove it") as caught:
        Lease(store, FOLDER, 1).__enter__()
    assert "\n" not in str(caught.value)


@pytest.mark.slow
def test_answers_that_are_lost_lose_no_lease(s3_server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """A create that worked and said nothing is tried again, and must know itself."""
    store = f"s3://{s3_server.bucket()}/store"
    proxy = FaultyProxy(s3_server.endpoint, 0.3, ("lost answer", "error"), seed=3)
    monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.endpoint)
    s3fs.S3FileSystem.clear_instance_cache()
    try:
        for _ in range(4):
            with Lease(Store(store), FOLDER, 300) as lease:
                lease.check()
    finally:
        proxy.stop()
        s3fs.S3FileSystem.clear_instance_cache()
    assert proxy.met["lost answer"] > 3


def test_who_may_not_remove_things_can_hold_a_lease(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*_: object) -> None:
        raise StorageError("AccessDenied")

    monkeypatch.setattr(Store, "delete", refused)
    for _ in range(3):
        with Lease(Store(tmp_path), FOLDER, 60) as lease:
            lease.check()
            with pytest.raises(LeaseHeld, match=lease.holder):
                Lease(Store(tmp_path), FOLDER, 60).__enter__()
    assert len(Store(tmp_path).names(FOLDER)) == 6

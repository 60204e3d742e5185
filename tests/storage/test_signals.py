"""Ctrl-C that comes while delta-rs, in the middle of a commit, calls Python."""

import json
import os
import signal
import threading
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pytest
from deltalake import DeltaTable

from nec_ray.archive.log import Log
from nec_ray.storage import Store
from nec_ray.storage.signals import stops_later

SCHEMA = pa.schema([("tile_id", pa.string())])


@pytest.fixture
def ctrl_c(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[object]]:
    """Pressed whenever delta-rs has metadata of a commit written as JSON."""
    dumps = json.dumps
    pressed: list[object] = []

    def press(*given: object, **options: object) -> str:
        pressed.append(given)
        os.kill(os.getpid(), signal.SIGINT)
        return dumps(*given, **options)  # type: ignore[arg-type]

    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    monkeypatch.setattr(json, "dumps", press)
    yield pressed
    signal.signal(signal.SIGINT, before)


def test_a_commit_is_whole_before_ctrl_c_is_heard(tmp_path: Path, ctrl_c: list[object]) -> None:
    log = Log(Store(tmp_path))
    with pytest.raises(KeyboardInterrupt):
        log.create(SCHEMA, {})
    with pytest.raises(KeyboardInterrupt):
        log.commit(0, [], "append", "a name")
    with pytest.raises(KeyboardInterrupt):
        log.set_properties(1, {"nec.key": "value"}, "catalog")
    assert len(ctrl_c) == 4
    table = DeltaTable(log.uri)
    assert table.version() == 2
    assert table.metadata().configuration["nec.key"] == "value"
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_both_signals_wait_and_the_first_is_heard() -> None:
    heard: list[int] = []
    before = {stop: signal.signal(stop, lambda n, _: heard.append(n)) for stop in (signal.SIGINT, signal.SIGTERM)}
    try:
        with stops_later():
            os.kill(os.getpid(), signal.SIGTERM)
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGTERM)
            assert heard == []
        assert heard == [signal.SIGTERM]
        os.kill(os.getpid(), signal.SIGINT)
        assert heard == [signal.SIGTERM, signal.SIGINT]
    finally:
        for stop, handler in before.items():
            signal.signal(stop, handler)


def test_other_threads_and_ignored_signals_are_left_alone() -> None:
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with stops_later():
            assert signal.getsignal(signal.SIGINT) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)
    seen: list[object] = []

    def elsewhere() -> None:
        with stops_later():
            seen.append(signal.getsignal(signal.SIGINT))

    thread = threading.Thread(target=elsewhere)
    thread.start()
    thread.join()
    assert seen == [before]

"""A log read without delta-rs names what delta-rs names; what is not plain is left to delta-rs."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from deltalake import DeltaTable

from nec_ray import open_archive
from nec_ray.archive.compact import compact
from nec_ray.archive.recorded import RecordedCatalog
from nec_ray.archive.short_log import State, read_short_log
from nec_ray.errors import CorruptIndex, NotFound
from nec_ray.storage import Store
from tests.archive.make import Made, filled_archive, pack

Log = list[dict[str, Any]]


def by_delta(url: str, version: int | None = None) -> tuple[int, list[tuple[str, int, int]], dict[str, str]]:
    table = DeltaTable(f"{url}/index", version=version)
    actions = pa.table(table.get_add_actions())
    columns = (actions[name].to_pylist() for name in ("path", "size_bytes", "num_records"))
    return table.version(), sorted(zip(*columns, strict=True)), table.metadata().configuration


def changed_often(folder: Path) -> Made:
    """Appends, replacements (which remove files), a compaction and a restored version."""
    made = filled_archive(folder)
    for number in range(3):
        made.index.append(made.index.version(), pack(made, [f"u{number}"], seed=number))
    compact(made.store)
    made.index.restore(2)
    made.index.record([RecordedCatalog("ab" * 32, 3, 99, "cd" * 32)])
    made.index.append(made.index.version(), pack(made, ["v"], seed=9), shards=["s"])
    return made


def test_every_version_is_the_one_that_delta_reads(tmp_path: Path) -> None:
    made = changed_often(tmp_path)
    newest = DeltaTable(f"{made.url}/index").version()
    assert newest >= 6
    for version in [None, *range(newest + 1)]:
        found = read_short_log(made.store, version)
        assert found is not None
        assert (found.version, sorted(found.files), found.properties) == by_delta(made.url, version)
    assert any(name.startswith("nec.catalog.") for name in by_delta(made.url, None)[2])


def test_no_version_is_counted_up_to(tmp_path: Path) -> None:
    made = filled_archive(tmp_path)
    for version in (2, 1 << 62):  # with which delta-rs would be busy for years
        with pytest.raises(NotFound, match=f"no version {version}; the newest is 1"):
            open_archive(made.url, version)
    assert read_short_log(Store(tmp_path / "nothing")) is None


def edit(made: Made, change: Callable[[Log], object]) -> None:
    """Change the actions of the last commit."""
    path = sorted(Path(made.url, "index/_delta_log").glob("*.json"))[-1]
    actions: Log = [json.loads(line) for line in path.read_text().splitlines()]
    change(actions)
    path.write_text("".join(f"{json.dumps(action)}\n" for action in actions))


def add_of(log: Log) -> dict[str, Any]:
    found: dict[str, Any] = next(action["add"] for action in log if "add" in action)
    return found


@pytest.mark.parametrize(
    "change",
    [
        lambda log: log.append({"protocol": {"minReaderVersion": 3, "minWriterVersion": 7, "readerFeatures": ["x"]}}),
        lambda log: log.append({"remove": {"path": "part-0.parquet", "dataChange": True}}),
        lambda log: log.append({"domainMetadata": {"domain": "x", "configuration": "", "removed": False}}),
        lambda log: log.append({"add": add_of(log)}),
        lambda log: add_of(log).update(deletionVector={"storageType": "u", "pathOrInlineDv": "x", "sizeInBytes": 1}),
        lambda log: add_of(log).update(path="part%2D0.parquet"),
        lambda log: add_of(log).update(partitionValues={"x": "1"}),
        lambda log: add_of(log).update(size=-1),
        lambda log: add_of(log).update(size=True),
        lambda log: add_of(log).update(size=1 << 70),
        lambda log: add_of(log).update(stats=None),
        lambda log: add_of(log).update(stats='{"numRecords": "many"}'),
        lambda log: add_of(log).update(stats="[" * 100_000),
        lambda log: log.append({"add": 1}),
        lambda log: log.append({"add": add_of(log), "remove": {}}),
        lambda log: log.append({}),
    ],
)
def test_what_is_not_plain_is_left_to_delta(tmp_path: Path, change: Callable[[Log], object]) -> None:
    made = filled_archive(tmp_path)
    edit(made, change)
    assert read_short_log(made.store) is None
    assert read_short_log(made.store, 0) == State(0, [], {"delta.checkpointInterval": "100"})


def test_gaps_damage_and_long_logs_are_left_to_delta(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = filled_archive(tmp_path)
    log = Path(made.url, "index/_delta_log")
    first, last = sorted(log.glob("*.json"))
    whole = last.read_bytes()
    last.write_bytes(whole[:-40])
    assert read_short_log(made.store) is None
    with pytest.raises(CorruptIndex, match="the log does not read"):
        open_archive(made.url)
    last.write_bytes(whole)
    for limit in ("_MOST_COMMITS", "_MOST_BYTES"):
        with monkeypatch.context() as patch:
            patch.setattr(f"nec_ray.archive.short_log.{limit}", 1)
            assert read_short_log(made.store) is None
            assert len(open_archive(made.url)) == 40
    first.unlink()
    assert read_short_log(made.store) is None

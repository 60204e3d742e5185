"""The ledger's memory: of the container, not of the node that it runs on."""

import os
from pathlib import Path
from typing import Any

import duckdb
import pytest

from nec_ray.runtime import ledger
from nec_ray.runtime.ledger import Ledger, usable_memory
from nec_ray.tiles import OrderedTiles, build_catalog, builtin_scene, write_catalog

MACHINE = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


@pytest.mark.parametrize(
    ("v2", "v1", "expected"),
    [
        (None, None, MACHINE),
        ("max\n", None, MACHINE),
        ("2147483648\n", None, 2 << 30),
        (None, "1073741824\n", 1 << 30),
        (None, "9223372036854771712\n", MACHINE),  # as v1 writes that there is none
        ("2147483648\n", "1073741824\n", 1 << 30),
    ],
)
def test_memory_is_the_least_of_machine_and_container(
    v2: str | None, v1: str | None, expected: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    paths = tmp_path / "memory.max", tmp_path / "memory.limit_in_bytes"
    for path, text in zip(paths, (v2, v1), strict=True):
        if text is not None:
            path.write_text(text)
    monkeypatch.setattr(ledger, "_CGROUP_LIMITS", paths)
    assert usable_memory() == expected


def test_duckdb_is_given_a_quarter_of_the_containers_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "memory.max").write_text(str(1 << 30))
    monkeypatch.setattr(ledger, "_CGROUP_LIMITS", (tmp_path / "memory.max",))
    write_catalog(build_catalog(builtin_scene(), tile_size=64), tmp_path / "catalog.parquet")
    given: list[str] = []
    connect = duckdb.connect

    def note(path: str, config: Any) -> duckdb.DuckDBPyConnection:
        given.append(config["memory_limit"])
        return connect(path, config=config)

    monkeypatch.setattr(duckdb, "connect", note)
    with Ledger(OrderedTiles(tmp_path / "catalog.parquet", tmp_path), tmp_path, None):
        assert given[-1] == "256MB"

"""The benchmarks of encoding: that they measure what they say, on few tiles."""

import math
from pathlib import Path

import pytest

from nec_ray.runtime import bench_planning as planning
from nec_ray.runtime.bench_encode import bench_encode
from nec_ray.runtime.standin import standin_codec


@pytest.mark.slow
def test_ray_and_the_bare_loop_do_the_same_tiles(tmp_path: Path, local_ray: None) -> None:
    standin_codec(tmp_path / "codec", size="standin", pixels=16)
    report = bench_encode(str(tmp_path / "codec"), 1024, repeats=1, memory=False)
    rows = {(row["runner"], row["workers"]): row for row in report["rows"]}
    cores = report["machine"]["cores"]
    assert set(rows) == {(runner, n + 1) for runner in ("bare", "ray") for n in range(cores)}
    for row in rows.values():
        assert row["what"] == "speed"
        assert row["tiles"] == 1024
        assert row["tiles_s"] is None or row["tiles_s"] > 0  # few tiles: a worker may have been too late for any
        assert row["startup_s"] > 0
        assert row["peak_mb"] > 100
    assert rows["bare", 1]["tiles_s"]


@pytest.mark.slow
def test_planning_finds_the_tiles_of_a_place(tmp_path: Path) -> None:
    """Counted on the grid that the catalog is made of."""
    tiles = 30_000
    report = planning.bench_planning(tiles, tmp_path)
    rows = {row["step"]: row for row in report["rows"]}
    assert list(rows) == ["catalog", "plan", "encode", "query", "pull", "reencode"]
    side = math.ceil(math.sqrt(tiles))
    columns = sum(1 for n in range(side) if -18 + 70 / side * n > 10 and -18 + 70 / side * (n + 1) < 11)
    lines = [n for n in range(side) if -35 + 72 / side * n > 5 and -35 + 72 / side * (n + 1) < 6]
    assert rows["query"]["found"] == rows["pull"]["found"] == columns * len(lines) > 0
    assert rows["plan"]["shards"] == math.ceil(tiles / planning.SHARD_TILES)
    assert rows["reencode"]["payload_bytes"] < rows["query"]["payload_bytes"] <= 128
    assert all(row["seconds"] > 0 and row["peak_mb"] > 10 for row in rows.values())
    assert list(tmp_path.iterdir()) == []

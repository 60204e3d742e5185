"""The pull benchmark: figures that an independent count confirms, and bytes within their bounds."""

import json
import subprocess
import sys
import urllib.request
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest

from nec_ray import open_archive
from nec_ray.errors import InputError, RunError
from nec_ray.evaluate import bench_pull
from nec_ray.evaluate.bench_data import Tiles, make_tiles
from nec_ray.evaluate.bench_layouts import LAYOUTS, Ask
from nec_ray.evaluate.bench_proxy import Proxy
from nec_ray.evaluate.bench_worker import _content
from tests.s3 import Server

TILES = 9000
KEYS = [
    "pull",
    "store",
    "layout",
    "tiles",
    "bytes_read",
    "index_bytes",
    "bytes_needed",
    "requests",
    "first_batch_s",
    "tiles_s",
]
PULLS = ["count", "neighbours", "scattered", "single", "all"]


@pytest.fixture(scope="module")
def tiles(tmp_path_factory: pytest.TempPathFactory) -> Tiles:
    return make_tiles(TILES, tmp_path_factory.mktemp("pull") / "codec")


@pytest.fixture(scope="module")
def report() -> dict[str, Any]:
    """What the command prints, in one run, with a server of its own; two layouts of five, which take minutes."""
    program = [sys.executable, "-c", "from nec_ray.cli import main; main()", "bench", "pull"]
    done = subprocess.run(
        [*program, "--tiles", str(TILES), "--repeats", "1", "--layout", "nec", "--layout", "npy", "--json"],
        capture_output=True,
        text=True,
        check=False,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def rows_of(report: dict[str, Any], pull: str, store: str) -> dict[str, dict[str, Any]]:
    return {row["layout"]: row for row in report["rows"] if (row["pull"], row["store"]) == (pull, store)}


@pytest.mark.slow
def test_every_pull_is_measured(report: dict[str, Any], tiles: Tiles) -> None:
    assert report["machine"]["tiles"] == TILES
    assert report["machine"]["payload_bytes"] == tiles.payloads.length.sum()
    assert [list(row) for row in report["rows"]] == [KEYS] * len(report["rows"])
    found = {(row["pull"], row["store"], row["layout"]) for row in report["rows"]}
    assert found == {(pull, store, layout) for pull in PULLS for store in ("local", "s3") for layout in ("nec", "npy")}
    labelled = tiles.rows["label"].to_pylist().count("class 17")
    expected = {"count": TILES // 100, "neighbours": 500, "scattered": labelled, "single": 1, "all": TILES}
    for row in report["rows"]:
        sampled = (row["layout"], row["pull"], row["store"]) == ("npy", "all", "s3")
        assert row["tiles"] == (TILES // 4 if sampled else expected[row["pull"]])
        assert row["bytes_read"] > row["bytes_needed"]
        assert row["requests"] > 0
        assert 0 < row["first_batch_s"] <= 1.01 * row["tiles"] / row["tiles_s"] + 1e-4


@pytest.mark.slow
def test_bytes_needed_are_those_of_the_tiles_asked_for(report: dict[str, Any], tiles: Tiles) -> None:
    label = np.array(tiles.rows["label"].to_pylist()) == "class 17"
    assert rows_of(report, "scattered", "s3")["nec"]["bytes_needed"] == tiles.payloads.length[label].sum()
    assert rows_of(report, "all", "local")["npy"]["bytes_needed"] == tiles.payloads.length.sum()
    assert rows_of(report, "count", "s3")["nec"]["bytes_needed"] == 0


@pytest.mark.slow
@pytest.mark.parametrize("store", ["local", "s3"])
def test_payload_bytes_read_stay_within_their_bounds(report: dict[str, Any], store: str) -> None:
    for pull, most in (("neighbours", 1.2), ("scattered", 2.0), ("single", 1.2), ("all", 1.2)):
        row = rows_of(report, pull, store)["nec"]
        assert row["bytes_needed"] <= row["bytes_read"] - row["index_bytes"] <= most * row["bytes_needed"]


@pytest.mark.slow
def test_a_request_a_tile_is_counted_as_such(report: dict[str, Any]) -> None:
    """One .npy a tile: as many GETs as tiles, 128 bytes of header each, and the catalog."""
    row = rows_of(report, "neighbours", "s3")["npy"]
    assert 500 < row["requests"] < 500 + 40
    assert row["bytes_read"] - row["index_bytes"] == row["bytes_needed"] + 500 * 128


def test_payloads_are_real_and_of_the_size_of_real_ones(tiles: Tiles) -> None:
    length = tiles.payloads.length
    assert 1900 < np.median(length) < 2200
    assert np.std(np.log(length)) == pytest.approx(0.3, abs=0.05)
    assert tiles.codec.decompress(tiles.payloads[:50]).shape == (50, 196, 24)
    assert np.array_equal(tiles.lengths.sum(axis=1), length)
    assert tiles.rows["n_bytes"].to_pylist() == length.tolist()


def test_tiles_are_the_same_for_the_same_seed(tmp_path: Path) -> None:
    one, two = (make_tiles(1000, tmp_path / name) for name in ("a", "b"))
    assert one.rows.equals(two.rows)
    assert one.codec.id == two.codec.id
    assert np.array_equal(one.payloads.data, two.payloads.data)


def test_the_pulls_ask_for_what_they_are_named_for(tiles: Tiles) -> None:
    asks = {ask.pull: ask for ask in bench_pull._asks(tiles)}
    assert list(asks) == PULLS
    edges = bench_pull._edges(tiles)
    for pull, count in (("count", TILES // 100), ("neighbours", 500), ("single", 1)):
        fits = np.ones(TILES, bool)
        for side, (op, value) in asks[pull].limits.items():
            fits &= edges[side] <= value if op == "<=" else edges[side] >= value
        assert fits.sum() == count
    near = asks["neighbours"].limits
    assert near["xmax"][1] - near["xmin"][1] < 1.0
    assert near["ymax"][1] - near["ymin"][1] < 0.6
    assert Ask.from_json(json.loads(json.dumps(asks["neighbours"].to_json()))) == asks["neighbours"]


def test_every_layout_brings_back_what_was_written(tmp_path: Path) -> None:
    few = make_tiles(1500, tmp_path / "codec")
    expected = _content([(few.rows["tile_id"].to_pylist(), few.payloads)])
    for layout in LAYOUTS.values():
        layout.write(tmp_path / layout.name, few)
        url = str(tmp_path / layout.name)
        assert _content(list(layout.pull(url, Ask("all")))) == expected
        assert layout.count(url, Ask("count", {"ymin": (">=", 0.0)})) == 1500


def test_a_small_box_reads_its_row_groups_boxes_and_no_more(tmp_path: Path) -> None:
    """Beside the footer: of the row groups that meet the box, the columns of the condition."""
    many = make_tiles(40_000, tmp_path / "codec")
    LAYOUTS["nec"].write(tmp_path / "a", many)
    archive = open_archive(tmp_path / "a")
    [file] = archive.files
    read: list[tuple[int, int]] = []
    fetch = archive._files._fetch

    def spy(name: str, start: int, end: int) -> bytes:
        read.append((start, end))
        return fetch(name, start, end)

    archive._files._fetch = spy  # type: ignore[method-assign]
    ask = Ask("count", bench_pull._box_of(bench_pull._edges(many), 400))
    assert archive.sql(f"SELECT count(*) FROM embeddings WHERE {ask.sql()}").fetchall() == [(400,)]
    tail, *chunks = sorted(read, key=lambda one: -one[1])
    meta = pq.read_metadata(tmp_path / "a" / file.path)
    expected = met = 0
    for group in map(meta.row_group, range(meta.num_row_groups)):
        boxes = {c.path_in_schema: c for c in map(group.column, range(meta.num_columns)) if "bbox" in c.path_in_schema}
        limits = {name: (c.statistics.min, c.statistics.max) for name, c in boxes.items()}
        if all(
            limits[f"bbox.{side}"][1] >= value if op == ">=" else limits[f"bbox.{side}"][0] <= value
            for side, (op, value) in ask.limits.items()
        ):
            met += 1
            expected += sum(chunk.total_compressed_size for chunk in boxes.values())
    assert 1 <= met < meta.num_row_groups
    assert sum(end - start for start, end in chunks) <= 1.05 * expected
    assert tail[1] == file.size == archive._files.store.size(file.path)
    assert tail[1] - tail[0] < 0.02 * file.size


def test_the_columns_that_a_pull_needs_take_few_bytes(tiles: Tiles, tmp_path: Path) -> None:
    LAYOUTS["nec"].write(tmp_path / "a", tiles)
    [file] = open_archive(tmp_path / "a").files
    meta = pq.read_metadata(tmp_path / "a" / file.path)
    size = 0
    for group in range(meta.num_row_groups):
        for n in range(meta.num_columns):
            chunk = meta.row_group(group).column(n)
            if chunk.path_in_schema == "tile_id" or chunk.path_in_schema.startswith(("payload.", "n_bytes")):
                size += chunk.total_compressed_size
    assert size / TILES <= 24


def test_the_proxy_counts_what_went_through_it(s3_server: Server) -> None:
    path = s3_server.bucket().replace("tests/", "public/")
    body = bytes(range(256)) * 5000
    s3_server.files().pipe_file(f"{path}/x", body)
    with Proxy(s3_server.endpoint).running() as proxy:
        request = urllib.request.Request(f"{proxy.endpoint}/{path}/x", headers={"Range": "bytes=100-1099"})
        with urllib.request.urlopen(request) as answer:
            assert answer.read() == body[100:1100]
        with urllib.request.urlopen(f"{proxy.endpoint}/{path}/x") as answer:
            assert answer.read() == body
        with urllib.request.urlopen(
            f"{proxy.endpoint}/public?list-type=2&prefix={path.removeprefix('public/')}"
        ) as one:
            listing = one.read()
        part, whole, names = proxy.take()
        assert not proxy.take()
    assert (part.method, part.path, part.start, part.size) == ("GET", f"{path}/x", 100, 1000)
    assert (whole.start, whole.size) == (0, len(body))
    assert (names.path, names.size) == (path, len(listing))
    split = {"x": [(0, 600), (2000, 3000)]}
    assert bench_pull._outside([part, whole, names], path, split) == 500 + len(body) - 1600 + len(listing)


def test_layouts_that_disagree_are_no_result() -> None:
    row = {"pull": "all", "tiles": 5, "bytes_needed": 10, "digest": 1}
    bench_pull._check_same([row, row])
    with pytest.raises(RunError, match="all: the layouts did not bring the same"):
        bench_pull._check_same([row, {**row, "digest": 2}])


def test_what_cannot_be_measured_is_refused() -> None:
    with pytest.raises(InputError, match="too few"):
        bench_pull.bench_pull(999)
    with pytest.raises(InputError, match="csv: no layout; there are nec, "):
        bench_pull.bench_pull(1000, layouts=["csv"])
    with pytest.raises(InputError, match="not an s3:// prefix"):
        bench_pull.bench_pull(1000, "/tmp/x")


def test_condition_in_sql_and_in_arrow_are_the_same(tiles: Tiles) -> None:
    ask = Ask("x", {"xmin": (">=", -7.0), "ymax": ("<=", 37.0)}, "class 17")
    assert ask.sql() == "bbox.xmin >= -7.0 AND bbox.ymax <= 37.0 AND label = 'class 17'"
    rows = tiles.rows.select(["bbox", "label"])
    found = rows.filter(ask.arrow())
    box = rows["bbox"].combine_chunks()
    fits = pc.and_(
        pc.greater_equal(pc.struct_field(box, "xmin"), -7.0), pc.less_equal(pc.struct_field(box, "ymax"), 37.0)
    )
    assert found.num_rows == pc.sum(pc.and_(fits, pc.equal(rows["label"], "class 17"))).as_py() > 0

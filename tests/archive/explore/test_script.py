"""What the explorer's script computes, run by Node.js without a page: beside archive.similar, DuckDB and Python."""

import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
import pytest

from nec_ray import open_archive
from nec_ray.archive import Archive
from nec_ray.archive.explore import pack_columns
from nec_ray.archive.explore.page import part
from tests.archive.explore.scenes import EVIL, small_archive
from tests.archive.make import Made

NODE = shutil.which("node")
pytestmark = pytest.mark.skipif(NODE is None, reason="there is no Node.js (node) to run the explorer's script")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    return small_archive(tmp_path_factory.mktemp("script"))


@pytest.fixture(scope="module")
def archive(made: Made) -> Archive:
    return open_archive(made.url)


def run(folder: Path, archive: Archive, body: str, where: str | None = None) -> Any:
    """What a function body returns to which `tiles` is known."""
    (folder / "tiles.bin").write_bytes(pack_columns(archive.select(where)))
    script = (
        f"{part('explore.js')}\nunpack(require('fs').readFileSync({json.dumps(str(folder / 'tiles.bin'))}))"
        f".then((tiles) => {{ {body} }}).then((x) => console.log(JSON.stringify(x)));"
    )
    (folder / "script.js").write_text(script)
    done = subprocess.run([NODE or "", folder / "script.js"], capture_output=True, text=True, check=False, timeout=120)
    assert not done.stderr
    return json.loads(done.stdout)


def test_similar_tiles_are_those_of_the_archive(archive: Archive, tmp_path: Path) -> None:
    found = run(
        tmp_path,
        archive,
        """const id = tiles.columns.tile_id;
        return id.map((name, i) => [name, similarTiles(tiles, i, 50).map(([n, cosine]) => [id[n], cosine])])""",
    )
    assert len(found) == 49
    for name, tiles in found:
        if name in {"zfailed", "znodata", "t30"}:  # without embedding, and one whose vector is zero
            assert tiles == []
            continue
        expected = archive.similar(name, 50)
        # The last digit is not the same on both roads, and decides between tiles that are as similar.
        np.testing.assert_allclose([cosine for _, cosine in tiles], expected["similarity"].to_numpy(), atol=1e-12)
        assert [tile for tile, _ in tiles] == expected["tile_id"].to_pylist()


def test_its_sql_and_python_pull_the_tile(archive: Archive, tmp_path: Path) -> None:
    for where in (None, "label <> 'it''s'"):
        found = run(
            tmp_path,
            archive,
            """return tiles.columns.tile_id.map((id, i) => [id, sqlOf(tiles, i), pythonOf(tiles, i)])
            .filter(([id]) => !/^t[0-24-9]/.test(id))""",
            where,
        )
        for tile_id, sql, python in found if where is None else found[:1]:
            [row] = archive.sql(sql).to_arrow_table().to_pylist()
            assert row["tile_id"] == tile_id
            known: dict[str, Any] = {}
            exec(python, known)
            if tile_id in {"zfailed", "znodata"}:
                assert (known["status"], known["reason"]) == (row["status"], row["reason"]) == (tile_id[1:], EVIL[0])
                continue
            assert known["pull"].tile_ids == [tile_id]
            np.testing.assert_array_equal(known["embedding"], archive.pull(tile_ids=[tile_id]).embeddings[0])
            np.testing.assert_array_equal(np.float32(row["embedding"]), known["embedding"])
            if tile_id != "t30":
                assert known["similar"].equals(archive.similar(tile_id, 10, where))


def test_any_text_is_a_literal_that_shows_all_of_it(archive: Archive, tmp_path: Path) -> None:
    texts = [*EVIL, "", "\\", "'", "''", "\u202e'; --", "\x00\x07\x7f\x85", "\u2028\u2029", "\U000e0041", "a\u200bb"]
    body = f"return {json.dumps(texts)}.map((text) => [pythonText(text), sqlText(text)])"
    for text, (python, sql) in zip(texts, run(tmp_path, archive, body), strict=True):
        assert eval(python, {}) == text
        assert archive.sql(f"SELECT {sql}").fetchall() == [(text,)]
        for code in (python, sql):
            assert code.isprintable()


def test_the_tile_drawn_is_the_last_acquired_of_those_shown(archive: Archive, tmp_path: Path) -> None:
    found = run(
        tmp_path,
        archive,
        """const all = new Uint8Array(tiles.count).fill(1), id = (i) => tiles.columns.tile_id[i];
        const twin = tiles.columns.tile_id.indexOf("twin"), without = all.slice();
        without[twin] = 0;
        const at = tiles.footprint[twin];
        const here = (shown, reach = 0, lon = 0.05) =>
          tilesAt(tiles, shown, topTiles(tiles, shown), lon, 0.05, reach).map(id);
        return [id(topTiles(tiles, all)[at]), id(topTiles(tiles, without)[at]), here(all), here(without),
          here(all, 0, 360.05), here(all, 0, -0.01), here(all, 0.02, -0.01), tiles.footprints.length];""",
    )
    twins = ["twin", "t00"]
    assert found == ["twin", "t00", twins, ["t00"], twins, [], twins, 47]


def test_colours_are_viridis_between_the_usual_values(archive: Archive, tmp_path: Path) -> None:
    [colours, status, [low, high]] = run(
        tmp_path,
        archive,
        """const { colours, range } = coloursOf(tiles, "bytes", -1);
        return [[...colours], [...coloursOf(tiles, "status", -1).colours], range]""",
    )
    rows = archive.rows(["status", "n_bytes"]).to_pylist()
    sizes = sorted(row["n_bytes"] for row in rows if row["status"] == "valid")
    assert (low, high) == (sizes[0], sizes[-1])
    for i, row in enumerate(rows):
        drawn = colours[3 * i : 3 * i + 3]
        if row["status"] != "valid":
            assert drawn == [150, 155, 160]
            continue
        share = (row["n_bytes"] - low) / (high - low)
        expected = np.array(mpl.colormaps["viridis"](share)[:3]) * 255
        assert np.abs(expected - drawn).max() < 8  # eleven colours of it, and straight lines between
    okabe_ito = {"valid": [0, 114, 178], "nodata": [240, 228, 66], "failed": [213, 94, 0]}
    assert [status[3 * i : 3 * i + 3] for i in range(49)] == [okabe_ito[row["status"]] for row in rows]

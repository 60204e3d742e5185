"""`nec tiles` for MMEarth: generate, build, encode, balance, scenes."""

import json
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from nec_ray.contracts import arrow_schema
from nec_ray.tiles import read_catalog
from tests.command import nec_here
from tests.runtime.make import random_codec


def test_the_road_of_mmearth(tmp_path: Path) -> None:
    made = nec_here("tiles", "generate", tmp_path / "in", "--samples", "60", "--side", "16", "--seed", "2", "--json")
    file = json.loads(made.stdout)["file"]
    assert file == f"{tmp_path}/in/data_invented.h5", made.stderr
    built = nec_here("tiles", "build", file, "--out", tmp_path / "tiles.parquet", "--json")
    assert json.loads(built.stdout)["tiles"] == 60, built.stderr

    random_codec(tmp_path / "codec", bands=("B4", "B3", "B2"), mean=1500)
    encode = nec_here(
        "encode", tmp_path / "tiles.parquet", tmp_path / "a", "--codec", tmp_path / "codec", "--local", "--json"
    )
    account = json.loads(encode.stdout)
    assert account["valid"] == 60 == account["tiles"], encode.stderr

    balance: list[str | Path] = ["tiles", "balance", tmp_path / "tiles.parquet", "--samples", "14"]
    balance += ["--out", tmp_path / "few.parquet"]
    account = json.loads(nec_here(*balance, "--json").stdout)
    few = read_catalog(tmp_path / "few.parquet").table
    assert account["tiles"] == few.num_rows == len(set(few["biome"].to_pylist())) <= 14
    assert few.num_rows == len(set(read_catalog(tmp_path / "tiles.parquet").table["biome"].to_pylist()))

    everywhere = np.array([[-400, -90], [400, -90], [400, 90], [-400, 90], [-400, -90]], "<f8").tobytes()
    footprint = b"\x01" + (3).to_bytes(4, "little") + (1).to_bytes(4, "little") + (5).to_bytes(4, "little") + everywhere
    rows = [
        {
            "scene_id": f"{product} {year}",
            "product": product,
            "acquired_at": datetime(year, 5, 1, tzinfo=UTC),
            "cloud_percent": 1.0,
            "footprint": footprint,
        }
        for product in ("sentinel2_l1c", "dynamic_world")
        for year in (2017, 2018, 2019)
    ]
    pq.write_table(pa.Table.from_pylist(rows, schema=arrow_schema("scenes.json")), tmp_path / "scenes.parquet")
    arguments: list[str | Path] = ["tiles", "scenes", tmp_path / "tiles.parquet", tmp_path / "scenes.parquet"]
    done = nec_here(*arguments, "--out", tmp_path / "choice.parquet", "--json")
    choice = pq.read_table(tmp_path / "choice.parquet").to_pylist()
    assert json.loads(done.stdout)["without_scene"] == sum(row["year"] == 2020 for row in choice) > 0, done.stderr
    assert all(row["sentinel2"] == f"sentinel2_l1c {row['year']}" for row in choice if row["year"] < 2020)


def test_a_picture_of_the_first_samples(tmp_path: Path) -> None:
    picture = tmp_path / "pictures" / "some.png"
    done = nec_here(
        "tiles", "generate", tmp_path / "in", "--samples", "2", "--side", "16", "--name", "mine", "--picture", picture
    )
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "in" / "mine_band_stats.json").is_file()
    with Image.open(picture) as image:
        assert min(image.size) > 200


def test_mistakes_give_one_line(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    nec_here("tiles", "generate", tmp_path / "in", "--samples", "1", "--side", "8")
    nec_here("tiles", "build", tmp_path / "in" / "data_invented.h5", "--out", tmp_path / "tiles.parquet")
    catalog, out = tmp_path / "tiles.parquet", tmp_path / "o"
    mistakes: list[tuple[list[str | Path], str]] = [
        (["generate", tmp_path / "in", "--samples", "1"], "is there already"),
        (["generate", tmp_path / "x", "--side", "4"], "4 pixels a side"),
        (["generate", tmp_path / "x", "--name", "../x"], "no name of a file"),
        (["balance", catalog, "--samples", "13", "--out", out], "one a biome or more"),
        (["scenes", catalog, catalog, "--out", out], "lacks the columns"),
    ]
    for arguments, message in mistakes:
        done = nec_here("tiles", *arguments)
        assert (done.returncode, done.stdout, len(done.stderr.splitlines())) == (1, "", 1), done
        assert message in done.stderr
    assert not (tmp_path / "x").exists()
    assert not (tmp_path / "o").exists()

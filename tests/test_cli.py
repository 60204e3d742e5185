"""The `nec` command as a user meets it: one clear line and exit code 1 for a mistake, plain results otherwise."""

import csv
import io
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from nec_ray.tiles import build_catalog, builtin_scene, write_catalog
from tests.archive.make import Made, filled_archive
from tests.command import nec, nec_here
from tests.runtime.make import random_codec


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    return filled_archive(tmp_path_factory.mktemp("cli"))


@pytest.fixture(scope="module")
def road(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Catalog and codec of the built-in scene, and an archive made of them by commands."""
    folder = tmp_path_factory.mktemp("road")
    random_codec(folder / "codec")
    built = nec("tiles", "build", builtin_scene(), "--tile-size", "32", "--out", folder / "catalog.parquet", "--json")
    assert json.loads(built.stdout)["tiles"] == 870, built.stderr
    done = nec(
        "encode", folder / "catalog.parquet", folder / "archive", "--codec", folder / "codec", "--local", "--json"
    )
    account = json.loads(done.stdout)
    assert account["tiles"] == 870 == account["valid"] + account["nodata"] + account["failed"], done.stderr
    return folder


def test_query_prints_every_format(made: Made) -> None:
    sql = "SELECT tile_id, status, payload.layer_lengths AS lengths, sha256 FROM embeddings ORDER BY tile_id LIMIT 3"
    assert "t001" in nec("query", made.url, sql).stdout
    rows = list(csv.DictReader(io.StringIO(nec("query", made.url, sql, "--format", "csv").stdout)))
    lines = nec("query", made.url, sql, "--format", "json").stdout.splitlines()
    assert [row["tile_id"] for row in rows] == ["t000", "t001", "t002"] == [json.loads(x)["tile_id"] for x in lines]
    assert json.loads(rows[0]["lengths"]) == json.loads(lines[0])["lengths"]
    assert rows[0]["sha256"] == json.loads(lines[0])["sha256"]
    raw = subprocess.run(
        [sys.executable, "-c", "from nec_ray.cli import main; main()", "query", made.url, sql, "--format", "parquet"],
        capture_output=True,
        check=True,
    ).stdout
    assert pq.read_table(io.BytesIO(raw))["tile_id"].to_pylist() == ["t000", "t001", "t002"]


def test_pull_head_and_predict(road: Path) -> None:
    from nec_ray.tiles import builtin_labels

    archive = road / "archive"
    pulled = nec("pull", archive, "--where", "bbox.ymin > -25.3", "--out", road / "some.npz", "--json")
    assert json.loads(pulled.stdout)["channels"] == 16, pulled.stderr
    trained = nec("head", archive, "--labels", builtin_labels(), "--out", road / "head", "--json")
    metrics = json.loads(trained.stdout)
    assert {"accuracy", "majority", "tiles", "bytes_per_tile"} <= metrics.keys(), trained.stderr
    assert metrics["accuracy"] > metrics["majority"] - 0.1
    done = nec("predict", archive, "--head", road / "head", "--out", road / "classes.parquet", "--json")
    assert json.loads(done.stdout)["tiles"] == len(pq.read_table(road / "classes.parquet")), done.stderr


def test_a_place_and_a_time_pick_tiles(road: Path) -> None:
    from nec_ray import open_archive

    archive = road / "archive"
    [(west, south, east, north)] = (
        open_archive(archive)
        .sql("SELECT min(bbox.xmin), min(bbox.ymin), median(bbox.xmax), median(bbox.ymax) FROM embeddings")
        .fetchall()
    )
    (road / "region.geojson").write_text(
        json.dumps({"type": "Polygon", "coordinates": [[[west, south], [east, south], [east, north], [west, south]]]})
    )
    place: list[str | Path] = ["--within", road / "region.geojson"]
    everything = json.loads(nec_here("archive", "coverage", archive, "--json").stdout)
    counted = nec_here("archive", "coverage", archive, *place, "--catalog", road / "catalog.parquet", "--json")
    facts = json.loads(counted.stdout)
    assert 0 < facts["valid"] < everything["valid"] / 2
    assert (facts["absent"], everything["absent"]) == (0, 0)
    pulled = nec_here("pull", archive, *place, "--out", road / "place.npz", "--json")
    exported = nec_here(
        "archive", "export", archive, *place, "--format", "zarr", "--out", road / "place.zarr", "--json"
    )
    assert json.loads(pulled.stdout)["tiles"] == json.loads(exported.stdout)["tiles"] == facts["valid"]
    box = nec_here("pull", archive, f"--within={west},{south},{east},{north}", "--out", road / "box.npz", "--json")
    assert json.loads(box.stdout)["tiles"] > facts["valid"]
    none = nec_here("pull", archive, "--time", "1970", "--out", road / "none.npz")
    assert none.returncode == 1
    assert "its times are" in none.stderr or "no tile of it has a time" in none.stderr
    tile_id = open_archive(archive).rows(["tile_id"], "status = 'valid'")["tile_id"][0].as_py()
    near = nec_here("archive", "similar", archive, tile_id, "-k", "3", "--format", "json")
    scores = [json.loads(line)["similarity"] for line in near.stdout.splitlines()]
    assert len(scores) == 3
    assert scores == sorted(scores, reverse=True)


def test_a_dry_run_writes_nothing(road: Path) -> None:
    done = nec("encode", road / "catalog.parquet", road / "new", "--codec", road / "codec", "--dry-run", "--json")
    assert json.loads(done.stdout)["to_encode"] == 870
    assert not (road / "new").exists()


def mistakes(made: Made, folder: Path) -> dict[str, tuple[list[str | Path], str]]:
    recipe = folder / "recipe.toml"
    recipe.write_text('[data]\ncatalog = "none.parquet"\nsize = 32\n[train]\nbetta = 1\n')
    good = folder / "good.toml"
    good.write_text('[data]\ncatalog = "none.parquet"\nsize = 32\n')
    shutil.copy(builtin_scene(), folder / "ok.tif")
    write_catalog(build_catalog(builtin_scene(), tile_size=256), folder / "ok.parquet")
    random_codec(folder / "codec", bands=("nir",))
    random_codec(folder / "rgb")
    text = folder / "text.txt"
    text.write_text("no image")
    broken = folder / "broken.tif"
    broken.write_bytes(b"II*\0 but nothing more")
    return {
        "no such source": (["tiles", "build", folder / "none", "--out", folder / "c"], "nothing is there"),
        "no image": (["tiles", "build", text, "--out", folder / "c"], "no GeoTIFF, JPEG, PNG"),
        "broken image": (["tiles", "build", broken, "--out", folder / "c"], "cannot be read as an image"),
        "no such catalog": (["encode", folder / "none", folder / "a"], "none"),
        "no catalog": (["encode", text, folder / "a"], "Parquet"),
        "no such archive": (["query", folder / "none", "SELECT 1"], "no archive there"),
        "unknown scheme": (["query", "gopher://x", "SELECT 1"], "gopher"),
        "bad SQL": (["query", made.url, "SELEKT 1"], "syntax error"),
        "unknown column": (["query", made.url, "SELECT cloud FROM embeddings"], "cloud"),
        "mistyped column": (["query", made.url, "SELECT tile FROM embeddings"], "did you mean 'tile_id'"),
        "mistyped region": (
            ["pull", made.url, "--within", folder / "ok.tiff", "--out", folder / "x.npz"],
            "did you mean 'ok.tif'",
        ),
        "mistyped tile": (["archive", "similar", made.url, "t00O"], "did you mean 't000'"),
        "a place elsewhere": (["pull", made.url, "--within", "50,50,51,51", "--out", folder / "x.npz"], "longitudes 0"),
        "writing SQL": (["query", made.url, "COPY embeddings TO 'x'"], "only one SELECT"),
        "no such version": (["query", made.url, "SELECT 1", "--version", "77"], "no version 77"),
        "nothing to pull": (["pull", made.url, "--where", "false", "--out", folder / "x.npz"], "no valid tile"),
        "broken condition": (["pull", made.url, "--where", "true) OR (1=1", "--out", folder / "x.npz"], "condition"),
        "no credentials": (["query", "s3://no-such-bucket-of-ours/x", "SELECT 1"], "s3://no-such-bucket-of-ours"),
        "URL for a folder": (["pull", made.url, "--out", "s3://bucket/x.npz"], "local path"),
        "unwritable output": (["pull", made.url, "--out", "/proc/x.npz"], "/proc/x.npz"),
        "catalog in a folder": (["tiles", "build", broken.parent / "ok.tif", "--out", folder], str(folder)),
        "codec for other bands": (
            ["encode", folder / "ok.parquet", folder / "a", "--codec", folder / "codec", "--local"],
            "bands nir",
        ),
        "bad condition": (
            ["encode", folder / "ok.parquet", folder / "a", "--codec", folder / "rgb", "--where", "nope = 1"],
            "nope",
        ),
        "blank condition": (
            ["encode", folder / "ok.parquet", folder / "a", "--codec", folder / "rgb", "--where", ""],
            "where: is blank",
        ),
        "mistyped catalog": (["train", good, "--out", folder / "run"], "nothing is there"),
        "unknown ending": (["pull", made.url, "--out", folder / "x.csv"], ".npz"),
        "no such recipe": (["train", folder / "none.toml"], "no recipe there"),
        "unknown key": (["train", recipe], "train.betta"),
        "no such labels": (["head", made.url, "--labels", folder / "none", "--out", folder / "h"], "none"),
        "a grace for ever": (["archive", "gc", made.url, "--grace", "999999999w"], "no duration"),
        "digits of another script": (["query", made.url, "SELECT 1", "--version", "²"], "a number or a time"),
        "an empty condition": (["archive", "delete", made.url, "--where", ""], "an empty condition"),
        "no value of Python's": (["query", made.url, "SELECT DATE '290000-01-01'"], "cast it to VARCHAR"),
        "a web page": (["archive", "export", made.url, "--format", "stac", "--out", "s3://b/x"], "local folder"),
        "no such head": (["predict", made.url, "--head", folder / "none", "--out", folder / "p"], "none"),
    }


def test_a_mistake_gives_one_clear_line_and_exit_code_1(made: Made, tmp_path: Path) -> None:
    before = {path: path.read_bytes() for path in Path(made.url).rglob("*") if path.is_file()}
    environment = {k: v for k, v in os.environ.items() if not k.startswith("AWS_")}
    os.environ.update({**environment, "AWS_EC2_METADATA_DISABLED": "true"})
    for name, (arguments, says) in mistakes(made, tmp_path).items():
        done = nec_here(*arguments)
        assert done.returncode == 1, (name, done)
        assert done.stdout == "", name
        assert len(done.stderr.splitlines()) == 1, (name, done.stderr)
        line = done.stderr.strip()
        assert line.startswith("nec: error: "), (name, line)
        assert says in line, (name, line)
    assert before == {path: path.read_bytes() for path in Path(made.url).rglob("*") if path.is_file()}
    assert not (tmp_path / "a").exists()
    assert not (tmp_path / "run").exists()


_STOPPED_WHILE_LOADING = """
import os, signal, sys

class Loading:
    def find_spec(self, name, path, target=None):
        if name == sys.argv[1]:
            os.kill(os.getpid(), signal.SIGINT)

sys.meta_path.insert(0, Loading())
from nec_ray.__main__ import main
main()
"""


@pytest.mark.parametrize("module", ["nec_ray.cli", "typer", "rich.console"])
def test_ctrl_c_while_the_command_is_loaded_is_one_line(module: str) -> None:
    command = [sys.executable, "-c", _STOPPED_WHILE_LOADING, module]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "nec: stopped; nothing was done\n")


def test_odd_but_legal_results_are_printed(made: Made) -> None:
    sql = (
        "SELECT 1 AS a, 2 AS a, '[/x]' AS b, 'nan'::FLOAT AS c, sum(n_bytes) AS d, interval 1 day AS e FROM embeddings"
    )
    assert "[/x]" in nec("query", made.url, sql).stdout
    row = json.loads(nec("query", made.url, sql, "--format", "json").stdout)
    assert (row["a"], row["a_2"], row["c"], type(row["d"])) == (1, 2, None, int)
    [cells] = csv.DictReader(io.StringIO(nec("query", made.url, sql, "--format", "csv").stdout))
    assert (cells["a_2"], cells["b"], int(cells["d"])) == ("2", "[/x]", row["d"])


def test_wrong_usage_is_exit_code_2(made: Made) -> None:
    assert nec("query", made.url).returncode == 2
    assert nec("query", made.url, "SELECT 1", "--format", "xml").returncode == 2
    assert nec("nonsense").returncode == 2


def test_the_upkeep_of_an_archive_by_commands(tmp_path: Path) -> None:
    url = filled_archive(tmp_path).url
    facts = json.loads(nec_here("archive", "info", url, "--json").stdout)
    assert (facts["tiles"], facts["valid"], facts["version"]) == (40, 38, 1)
    assert "38 valid" in nec_here("archive", "info", url).stdout
    dry = json.loads(nec_here("archive", "delete", url, "--where", "status <> 'valid'", "--dry-run", "--json").stdout)
    assert (dry["tiles"], dry["done"], dry["version"]) == (2, False, 1)
    assert "deleted: 2 tiles" in nec_here("archive", "delete", url, "--where", "status <> 'valid'").stdout
    versions = json.loads(nec_here("archive", "history", url, "--json").stdout)["versions"]
    assert [(row["version"], row["operation"]) for row in versions] == [(2, "delete"), (1, "append"), (0, "create")]
    assert "40 tiles" in nec_here("archive", "restore", url, "--version", "1").stdout
    verified = nec_here("archive", "verify", url, "--json")
    assert (verified.returncode, json.loads(verified.stdout)["checked"]) == (0, 38)
    assert json.loads(nec_here("archive", "compact", url, "--json").stdout)["packs"] == 0
    garbage = json.loads(nec_here("archive", "gc", url, "--grace", "0s", "--dry-run", "--json").stdout)
    assert (garbage["removed"], garbage["packs"], garbage["index_files"]) == (False, 0, 1)
    exported = nec_here("archive", "export", url, "--format", "geoparquet", "--out", tmp_path / "out.parquet", "--json")
    assert json.loads(exported.stdout)["tiles"] == 38
    [pack] = (Path(url) / "packs").rglob("*.pack")
    data = bytearray(pack.read_bytes())
    data[50] ^= 1
    pack.write_bytes(data)
    damaged = nec_here("archive", "verify", url)
    assert damaged.returncode == 1
    assert "SHA-256 differs" in damaged.stdout
    shutil.rmtree(Path(url) / "index")
    assert "no index there" in nec_here("archive", "info", url).stderr
    assert "40 tiles" in nec_here("archive", "rebuild", url).stdout
    wrong = nec_here("archive", "gc", url, "--grace", "soon")
    assert (wrong.returncode, wrong.stderr) == (
        1,
        "nec: error: soon: no duration; give a number and s, m, h, d or w, such as 7d\n",
    )
    for command in (
        ["history"],
        ["verify"],
        ["gc"],
        ["compact"],
        ["delete", "--where", "true"],
        ["restore", "--version", "1"],
    ):
        absent = nec_here("archive", command[0], tmp_path / "nothing", *command[1:])
        assert (absent.returncode, absent.stdout) == (1, ""), command
        assert "no archive there" in absent.stderr


def test_reencode_looks_and_then_does(tmp_path: Path) -> None:
    made = filled_archive(tmp_path)
    command = ["reencode", made.url, "--layers", "1", "--where", "label = 'water'", "--local"]
    text = nec_here(*command, "--dry-run").stdout
    assert "20 tiles" in text
    assert "nothing was written" in text
    looked = json.loads(nec_here(*command, "--dry-run", "--json").stdout)
    done = json.loads(nec_here(*command, "--json").stdout)
    assert (looked["todo"], done["swapped"]) == (20, 20)
    assert looked["bytes_after"] == done["bytes_after"]
    assert "nothing to do" in nec_here(*command).stdout


def test_reencode_takes_a_policy_for_its_own_archive_alone(made: Made, tmp_path: Path) -> None:
    policy = tmp_path / "policy.toml"
    policy.write_text(f'archive = "{made.url}"\n[[rules]]\nname = "all"\nlayers = 1\n')
    command = ["--policy", str(policy), "--dry-run", "--json"]
    assert json.loads(nec_here("reencode", f"file://{made.url}", *command).stdout)["todo"] > 0
    done = nec_here("reencode", tmp_path / "other", *command)
    assert done.returncode == 1
    assert f"it is for {made.url}, not for {tmp_path / 'other'}" in done.stderr
    assert len(done.stderr.splitlines()) == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "give one of --codec, --layers and --policy"),
        (["--codec", "x", "--layers", "1"], "give one of --codec, --layers and --policy"),
        (["--layers", "1", "--from-tiles", "c"], "tiles is for a codec"),
        (["--layers", "1", "--max-distortion", "-1"], "max_distortion"),
        (["--layers", "1", "--where", "   "], "where: is blank"),
        (["--layers", "9"], "9 layers are asked for"),
        (["--policy", "none.toml"], "no policy there"),
        (["--policy", "none.toml", "--where", "true"], "leave --where"),
    ],
)
def test_reencode_refuses_what_cannot_be(made: Made, options: list[str], message: str) -> None:
    done = nec_here("reencode", made.url, *options)
    assert done.returncode == 1
    assert message in done.stderr
    assert len(done.stderr.splitlines()) == 1

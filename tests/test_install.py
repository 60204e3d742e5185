"""The package as it is published: what its wheel and sdist hold, and that the wheel alone does the consumer's road."""

import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path

import numpy as np
import pytest
import yaml
from packaging.metadata import Metadata

from tests.archive.make import filled_archive

ROOT = Path(__file__).resolve().parent.parent
LARGEST_INSTALL = 850_000_000
"""Bytes of the environment, bytecode of every module included."""
LARGEST_WHEEL = 25e6
"""Unpacked; of it the built-in scene and the shipped codec's encoder are 14 MB."""
LARGEST_TESTS = 5e6

ROAD = """
import sys
import numpy as np
import nec_ray

archive = nec_ray.open_archive("archive")
assert archive.sql("SELECT count(*) FROM embeddings").fetchall() == [(40,)]
pull = archive.pull("label = 'water'")
np.savez("pull.npz", tile_ids=pull.tile_ids, symbols=pull.symbols)
place = archive.within((0.01, 0.01, 0.19, 0.09), time="2020-05")
assert place.rows(["tile_id"])["tile_id"].to_pylist() == ["t000", "t001"]
assert archive.coverage().failed == 1
place.to_zarr("place.zarr")
heavy = {"torch", "ray", "timm", "compressai", "rasterio", "matplotlib", "pandas"} & set(sys.modules)
assert not heavy, heavy
"""


def run(command: Sequence[str | Path], folder: Path, **environment: str) -> "subprocess.CompletedProcess[str]":
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "VIRTUAL_ENV"))}
    return subprocess.run(
        list(map(str, command)), cwd=folder, env=clean | environment, capture_output=True, text=True, check=False
    )


@pytest.fixture(scope="module")
def uv() -> str:
    found = shutil.which("uv")
    if not found:
        pytest.skip("no uv here: it builds and installs the wheel")
    return found


@pytest.fixture(scope="module")
def built(uv: str, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The wheel, which is made from the sdist, and the sdist."""
    out = tmp_path_factory.mktemp("dist")
    done = run([uv, "build", "--quiet", "--out-dir", out], ROOT)
    assert done.returncode == 0, done.stderr
    [wheel], [sdist] = out.glob("*.whl"), out.glob("*.tar.gz")
    return wheel, sdist


def size_on_disk(folder: Path) -> int:
    """Bytes of all files below, as `du` counts them: one with several names once."""
    stats = {stat.st_ino: stat for stat in (path.lstat() for path in folder.rglob("*"))}
    return sum(512 * stat.st_blocks for stat in stats.values())


@pytest.mark.slow
def test_the_wheel_alone_does_the_consumers_road(uv: str, built: tuple[Path, Path], tmp_path: Path) -> None:
    environment = tmp_path / "environment"
    python = environment / "bin" / "python"
    done = run([uv, "venv", "--quiet", "--python", sys.executable, environment], tmp_path)
    assert done.returncode == 0, done.stderr
    done = run([uv, "pip", "install", "--quiet", "--compile-bytecode", "--python", python, built[0]], tmp_path)
    assert done.returncode == 0, done.stderr
    made = filled_archive(tmp_path)
    road = run([python, "-c", ROAD], tmp_path)
    assert road.returncode == 0, road.stderr
    with np.load(tmp_path / "pull.npz") as pulled:
        assert pulled["tile_ids"].tolist() == [f"t{i:03}" for i in range(0, 38, 2)]
        assert np.array_equal(pulled["symbols"], np.stack([made.symbols[name] for name in pulled["tile_ids"]]))
    nec = environment / "bin" / "nec"
    query = run([nec, "query", "archive", "SELECT count(*) AS n FROM embeddings", "--format", "csv"], tmp_path)
    assert (query.returncode, query.stdout) == (0, '"n"\n40\n'), query.stderr
    out = tmp_path / "tiles.parquet"
    exported = run([nec, "archive", "export", "archive", "--format", "geoparquet", "--out", out, "--json"], tmp_path)
    assert (exported.returncode, out.exists()) == (0, True), exported.stderr
    head = run([nec, "head", "archive", "--out", "head"], tmp_path)
    assert (head.returncode, head.stdout) == (1, "")
    assert head.stderr.strip() == "nec: error: this command needs torch; install it with pip install 'nec-ray[train]'"
    assert size_on_disk(environment) < LARGEST_INSTALL


def test_the_wheel_holds_what_runs_and_nothing_else(built: tuple[Path, Path]) -> None:
    with zipfile.ZipFile(built[0]) as wheel:
        sizes = {entry.filename: entry.file_size for entry in wheel.infolist()}
    ours = {name for name in sizes if ".dist-info/" not in name}
    kept = run(["git", "ls-files", "nec_ray", "schemas"], ROOT).stdout.splitlines()
    expected = {name if name.startswith("nec_ray/") else f"nec_ray/{name}" for name in kept}
    assert {"nec_ray/py.typed", "nec_ray/schemas/index.json", "nec_ray/data/landsat8_itaipu.tif"} <= expected
    assert ours == expected
    assert sum(sizes.values()) < LARGEST_WHEEL


def test_the_sdist_is_small_and_builds_the_wheel(built: tuple[Path, Path]) -> None:
    with tarfile.open(built[1]) as sdist:
        sizes = {member.name.partition("/")[2]: member.size for member in sdist.getmembers()}
    assert {"pyproject.toml", "README.md", "LICENSE", "CHANGELOG.md", "tests/test_install.py", "jobs/encode.py"} <= set(
        sizes
    )
    assert not [name for name in sizes if name.startswith((".ci", ".github", ".venv")) or "__pycache__" in name]
    assert sum(sizes.values()) < LARGEST_WHEEL + LARGEST_TESTS
    assert sum(size for name, size in sizes.items() if name.startswith("tests/")) < LARGEST_TESTS


def test_the_metadata_are_what_an_index_takes(built: tuple[Path, Path]) -> None:
    with zipfile.ZipFile(built[0]) as wheel:
        [name] = [name for name in wheel.namelist() if name.endswith(".dist-info/METADATA")]
        metadata = Metadata.from_email(wheel.read(name), validate=True)
        script = wheel.read(name.replace("METADATA", "entry_points.txt")).decode()
    assert str(metadata.version) == version("nec-ray")
    assert metadata.license_expression == "Apache-2.0"
    assert metadata.description_content_type == "text/markdown"
    assert metadata.description == (ROOT / "README.md").read_text()
    assert "Typing :: Typed" in (metadata.classifiers or [])
    assert "nec = nec_ray.__main__:main" in script
    heavy = {"torch", "ray", "timm", "compressai", "rasterio"}
    light = [one for one in metadata.requires_dist or [] if not one.marker]
    assert not heavy & {one.name for one in light}


def test_the_version_stands_in_one_place() -> None:
    import nec_ray

    assert nec_ray.__version__ == version("nec-ray")
    assert f"## {nec_ray.__version__} " in (ROOT / "CHANGELOG.md").read_text()
    files = [ROOT / "cluster" / "Dockerfile", *(ROOT / "cluster").rglob("*.yaml")]
    images = {found for file in files for found in re.findall(r"nec-ray:([\w.]+)", file.read_text())}
    assert images == {nec_ray.__version__}
    written = [path for path in (ROOT / "nec_ray").rglob("*.py") if f'"{nec_ray.__version__}"' in path.read_text()]
    assert written == []


def test_a_release_publishes_what_was_built_and_keeps_no_token() -> None:
    text = (ROOT / ".github" / "workflows" / "release.yml").read_text()
    workflow = yaml.safe_load(text)
    assert workflow[True] == {"push": {"tags": ["v*"]}}  # YAML 1.1 reads `on` as true
    build, publish = workflow["jobs"]["build"], workflow["jobs"]["publish"]
    assert workflow["permissions"] == {"contents": "read"}
    assert "permissions" not in build
    assert publish["permissions"] == {"id-token": "write"}
    assert publish["needs"] == "build"
    assert "checkout" not in str(publish)  # what is published is what was built and tried
    names = [
        step["with"]["name"] for job in (build, publish) for step in job["steps"] if "artifact" in str(step.get("uses"))
    ]
    assert names == ["dist", "dist"]
    assert "secrets." not in text
    assert "password" not in text

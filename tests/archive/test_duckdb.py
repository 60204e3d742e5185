"""SQL and pull on the oldest DuckDB that is supported; the newest one is what all other tests run on."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import duckdb
import pytest

from tests.archive.make import filled_archive

ROOT = Path(__file__).resolve().parents[2]
OLDEST = "1.5.6"

_USE = """
import sys, duckdb
from nec_ray import open_archive
from nec_ray.errors import BadQuery
assert duckdb.__version__ == sys.argv[2], duckdb.__version__
for url in sys.argv[1:2]:
    archive = open_archive(url)
    assert len(archive.pull("bbox.ymin > 0.05 AND label = 'water'")) == 14
    [(tokens, channels, pooled)] = archive.sql(
        "SELECT len(nec_decode(payload)), len(nec_decode(payload)[1]), len(nec_pool(payload)) FROM embeddings "
        "WHERE tile_id = 't007'"
    ).fetchall()
    assert (tokens, channels, pooled) == (16, 24, 24), (tokens, channels, pooled)
    for query in ("COPY (SELECT 1) TO 'x'", "SELECT * FROM '/etc/passwd'", "SELECT * FROM read_csv('/etc/passwd')"):
        try:
            archive.sql(query).fetchall()
        except BadQuery:
            continue
        raise AssertionError(query)
"""


@pytest.fixture(scope="module")
def oldest(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with that DuckDB alone, before everything else on the path."""
    if duckdb.__version__ == OLDEST:
        pytest.skip("all tests run on it already")
    folder = tmp_path_factory.mktemp("duckdb")
    uv = shutil.which("uv")
    installer = [uv, "pip", "install"] if uv else [sys.executable, "-m", "pip", "install"]
    done = subprocess.run(
        [*installer, "--quiet", "--no-deps", "--target", str(folder), f"duckdb=={OLDEST}"],
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        pytest.skip(f"DuckDB {OLDEST} cannot be installed here: {done.stderr.strip()[-200:]}")
    return folder


@pytest.mark.slow
def test_queries_and_pulls_on_the_oldest_duckdb(oldest: Path, tmp_path: Path) -> None:
    made = filled_archive(tmp_path)
    done = subprocess.run(
        [sys.executable, "-c", _USE, made.url, OLDEST],
        env=os.environ | {"PYTHONPATH": os.pathsep.join([str(oldest), str(ROOT)])},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr

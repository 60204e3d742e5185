"""The one DuckDB of a process: archives beside each other, and nothing of one seen from another's queries."""

import gc
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import pytest

from nec_ray import open_archive
from nec_ray.archive.change import delete
from nec_ray.errors import BadQuery, CorruptIndex, CorruptPayload, NecError, NotFound
from tests.archive.make import Made, damage, empty_archive, filled_archive, pack

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def two(tmp_path: Path) -> tuple[Made, Made]:
    """One of 40 tiles, and one of 3."""
    first, second = filled_archive(tmp_path / "a"), empty_archive(tmp_path / "b")
    second.index.append(second.index.version(), pack(second, ["x1", "x2", "x3"]))
    return first, second


def test_queries_on_several_archives_at_once_see_their_own(two: tuple[Made, Made]) -> None:
    expected = {made.url: count for made, count in zip(two, (40, 3), strict=True)}

    def ask(number: int) -> bool:
        archive = open_archive(two[number % 2].url)
        count = expected[archive.url]
        query = "SELECT count(*), count(nec_pool(payload)) FROM embeddings"
        valid = len(archive.pull())
        return archive.sql(query).fetchall() == [(count, valid)] and valid <= count

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(ask, range(24)))


def test_an_error_is_that_of_the_query_that_met_it(two: tuple[Made, Made]) -> None:
    """One archive has a damaged payload, the other lost a file; asked in turn from several threads."""
    first, second = two
    damage(first, "t007")
    broken = open_archive(second.url)
    (Path(second.url) / broken.files[0].path).unlink()

    def ask(number: int) -> str:
        archive = (open_archive(first.url), broken, open_archive(first.url))[number % 3]
        sql = ("SELECT nec_decode(payload) FROM embeddings", "SELECT sum(n_bytes) FROM embeddings", "SELECT nothing")
        try:
            archive.sql(sql[number % 3]).to_arrow_table()
        except NecError as error:
            return type(error).__name__
        return "none"

    with ThreadPoolExecutor(6) as pool:
        found = list(pool.map(ask, range(30)))
    assert found == [CorruptPayload.__name__, NotFound.__name__, BadQuery.__name__] * 10


def test_a_query_reads_only_files_of_versions_that_are_open(two: tuple[Made, Made]) -> None:
    """Even one that has found out the name under which its archive is mounted."""
    first, _ = two
    old = open_archive(first.url).files[0].path
    delete(first.store, "tile_id < 't010'")
    gc.collect()
    archive = open_archive(first.url)
    [(view,)] = archive.sql("SELECT sql FROM duckdb_views() WHERE view_name = 'embeddings'").fetchall()
    own = view.split("'")[1]
    assert own.endswith(archive.files[0].path)
    assert archive.sql(f"SELECT count(*) FROM read_parquet('{own}')").fetchall() == [(30,)]
    mount = own.removesuffix(archive.files[0].path)
    other = f"nec://{'0' * 32}/{archive.files[0].path}"
    for path in (*(f"{mount}{name}" for name in (old, "archive.json", "../../etc/passwd", "packs", "")), other):
        with suppress(BadQuery):
            assert archive.sql(f"SELECT * FROM read_text('{path}')").fetchall() == []
        with pytest.raises(BadQuery):
            archive.sql(f"SELECT * FROM read_parquet('{path}')").fetchall()
    assert archive.sql("SELECT count(*) FROM glob('nec://*')").fetchall() == [(0,)]


def test_conditions_may_use_the_view_and_the_functions(two: tuple[Made, Made]) -> None:
    archive = open_archive(two[0].url)
    largest = archive.pull("n_bytes = (SELECT max(n_bytes) FROM embeddings) AND len(nec_pool(payload)) = 24")
    assert largest.n_bytes[0] == max(n for (n,) in archive.sql("SELECT n_bytes FROM embeddings").fetchall() if n)


def test_opening_an_archive_again_and_again_takes_no_more_memory(two: tuple[Made, Made]) -> None:
    def resident() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    def use(times: int) -> None:
        for _ in range(times):
            assert open_archive(two[0].url).sql("SELECT count(*) FROM embeddings").fetchall() == [(40,)]

    use(30)
    before = resident()
    use(150)
    assert resident() - before < 20 << 20  # a database for each would take 300 MB


_SCRIPT = """
import sys
from nec_ray import open_archive
archive = open_archive(sys.argv[1])
held = archive.sql("SELECT nec_pool(payload) FROM embeddings")
also = archive.sql("SELECT * FROM embeddings")
print(len(held.fetchall()), len(also.columns))
"""


def test_a_script_that_holds_queries_at_its_end_ends_in_silence(two: tuple[Made, Made]) -> None:
    done = subprocess.run(
        [sys.executable, "-c", _SCRIPT, two[0].url], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert (done.stdout, done.stderr) == ("40 21\n", "")


def test_a_forked_process_has_a_database_of_its_own(two: tuple[Made, Made]) -> None:
    """Threads are not forked: a query on the parent's database would wait for them for ever."""
    archive = open_archive(two[0].url)
    assert archive.sql("SELECT 1").fetchall() == [(1,)]
    child = os.fork()
    if not child:
        ok = archive.sql("SELECT count(*) FROM embeddings").fetchall() == [(40,)]
        os._exit(0 if ok else 1)
    assert os.waitpid(child, 0)[1] == 0
    assert archive.sql("SELECT 1").fetchall() == [(1,)]


def test_files_are_let_go_with_the_archive_and_never_more_than_some_are_open(tmp_path: Path) -> None:
    def descriptors() -> int:
        return len(list(Path("/proc/self/fd").iterdir()))

    made = empty_archive(tmp_path)
    for n in range(80):
        made.index.append(made.index.version(), pack(made, [f"t{n}"], seed=n))
    gc.collect()
    before = descriptors()
    for _ in range(3):
        archive = open_archive(made.url)
        assert archive.sql("SELECT count(*) FROM embeddings").fetchall() == [(80,)]
        assert len(archive.pull()) == 80
        assert descriptors() <= before + 70
        del archive
        gc.collect()
    assert descriptors() <= before + 4


_FAILING = """
import sys
from nec_ray import open_archive
from nec_ray.errors import NecError
archive = open_archive(sys.argv[1])
try:
    archive.sql("SELECT nec_decode(payload) FROM embeddings").fetchall()
except NecError as error:
    print(type(error).__name__)
"""


def test_a_script_that_met_an_error_ends_in_silence(two: tuple[Made, Made]) -> None:
    path = next(Path(two[0].url).rglob("*.pack"))
    data = bytearray(path.read_bytes())
    data[60] ^= 4
    path.write_bytes(data)
    done = subprocess.run(
        [sys.executable, "-c", _FAILING, two[0].url], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert (done.stdout, done.stderr) == ("CorruptPayload\n", "")


def test_values_that_are_none_of_pythons_are_a_typed_error(two: tuple[Made, Made]) -> None:
    with pytest.raises(BadQuery, match="cast it to VARCHAR"):
        open_archive(two[0].url).sql("SELECT DATE '290000-01-01' AS d").fetchall()


def test_a_file_that_does_not_read_is_no_mistake_of_the_query(two: tuple[Made, Made]) -> None:
    for path in (Path(two[1].url) / "index").glob("*.parquet"):
        path.write_bytes(b"x" * path.stat().st_size)
    archive = open_archive(two[1].url)
    with pytest.raises(CorruptIndex, match="its index does not read"):
        archive.pull()
    with pytest.raises(CorruptIndex, match="its index does not read"):
        archive.sql("SELECT 1")

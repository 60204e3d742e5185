"""The SQL that opens an archive's index in a DuckDB that knows nothing of nec_ray."""

from pathlib import Path

import duckdb
import pytest

from nec_ray import open_archive
from nec_ray.errors import InputError
from tests.archive.make import empty_archive, filled_archive, pack
from tests.command import nec_here


def test_any_duckdb_reads_the_index_by_it(tmp_path: Path) -> None:
    made = filled_archive(tmp_path / "it's here")
    made.index.append(made.index.version(), pack(made, ["later"], seed=3))
    archive, first = open_archive(made.url), open_archive(made.url, 1)
    with duckdb.connect() as connection:
        connection.execute("SET TimeZone='UTC'")
        for one, tiles in ((archive, 41), (first, 40)):
            connection.execute(one.view_sql())
            names = connection.execute("SELECT tile_id, status, n_bytes, payload.pack FROM embeddings ORDER BY 1")
            ours = one.sql("SELECT tile_id, status, n_bytes, payload.pack FROM embeddings ORDER BY 1").fetchall()
            assert names.fetchall() == ours
            assert len(ours) == tiles
            connection.execute("DROP VIEW embeddings")


def test_the_command_prints_it(tmp_path: Path) -> None:
    made = filled_archive(tmp_path)
    done = nec_here("archive", "sql", made.url, "--version", "1")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == open_archive(made.url, 1).view_sql()
    with duckdb.connect() as connection:
        connection.execute(done.stdout)
        assert connection.execute("SELECT count(*) FROM embeddings").fetchall() == [(40,)]


def test_an_archive_without_tiles_has_none(tmp_path: Path) -> None:
    made = empty_archive(tmp_path)
    with pytest.raises(InputError, match="holds no tiles"):
        open_archive(made.url).view_sql()

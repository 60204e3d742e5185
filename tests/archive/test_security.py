"""SQL from users that tries to leave the archive, and secrets that try to get into what people read."""

import gc
import json
import logging
import socket
import sys
import traceback
from collections.abc import Iterator
from pathlib import Path

import pytest

from nec_ray import open_archive
from nec_ray.archive import Archive
from nec_ray.archive.exports import export
from nec_ray.archive.info import describe
from nec_ray.cli import main
from nec_ray.errors import BadQuery, InputError, NecError, NotFound, StorageError, without_secrets
from nec_ray.models import torch_dataset
from nec_ray.runtime.job import JsonLines
from tests.archive.make import filled_archive
from tests.storage.web import serve

SECRET = "wJalrXUtnFEMI7MDENGbPxRfiCY"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two archives, and what lies beside them and is none of a query's business."""
    folder = tmp_path_factory.mktemp("secure")
    (folder / "secret.csv").write_text(f"a\n{SECRET}\n")
    (folder / "secret.json").write_text(json.dumps({"a": SECRET}))
    filled_archive(folder / "own")
    filled_archive(folder / "other", tiles=7)
    return folder


@pytest.fixture(scope="module")
def archive(folder: Path) -> Iterator[Archive]:
    """One of the two; the other is open, too, and has been read."""
    other = open_archive(folder / "other" / "archive")
    assert len(other.pull()) == 5
    yield open_archive(folder / "own" / "archive")
    assert other.sql("SELECT count(*) FROM embeddings").fetchall() == [(7,)]


def listener() -> tuple[socket.socket, int]:
    server = socket.create_server(("127.0.0.1", 0))
    server.settimeout(0.2)
    return server, server.getsockname()[1]


READING = [
    "SELECT * FROM read_csv('{0}/secret.csv')",
    "SELECT * FROM '{0}/secret.csv'",
    'SELECT * FROM "{0}/secret.csv"',
    "FROM read_text('{0}/secret.csv')",
    "FROM read_blob('file://{0}/secret.csv')",
    "FROM read_json('{0}/secret.json')",
    "FROM sniff_csv('{0}/secret.csv')",
    "FROM parquet_metadata('{0}/secret.csv')",
    "FROM read_text('/etc/passwd')",
    "FROM read_text('/proc/self/environ')",
    "FROM read_text(['/etc/passwd', '/etc/hostname'])",
    "FROM read_duckdb('{0}/x.db')",
    "FROM query('SELECT * FROM read_text(''/etc/passwd'')')",
    "FROM query('FROM register_external_resource' || '_type(''x'', kind := ''y'')')",
    "FROM query /* a word */ ('SELECT 1')",
    "FROM \"QUERY\"('SELECT 1')",
    "FROM system.main.query('SELECT 1')",
    "SELECT 'éàü€', x FROM query('SELECT 1 AS x')",
    "FROM query\u00a0('SELECT 1')",
    "FROM query\u2003\n('SELECT 1')",
    "FROM query\u200b('SELECT 1')",
    "SELECT $$ -- $$, * FROM query('SELECT 1')",
    "SELECT 'a''b', E'\\'', * FROM query('SELECT 1')",
    "FROM query_table('{0}/secret.csv')",
    "FROM json_execute_serialized_sql(json_serialize_sql('SELECT 1'))",
    "SELECT (SELECT content FROM read_text('{0}/secret.csv'))",
    "WITH x AS (FROM read_text('{0}/secret.csv')) FROM x",
    "SELECT getenv('HOME')",
    "FROM duckdb_secrets()",
    "FROM which_secret('s3://x', 's3')",
    "FROM 'http://127.0.0.1:{1}/x.parquet'",
    "FROM read_parquet('https://127.0.0.1:{1}/x.parquet')",
    "FROM read_csv('s3://bucket/x.csv')",
    "SELECT * FROM SECRET",
    "FROM globals",
    "FROM duckdb_logs()",
    "FROM duckdb_external_file_cache()",
    "FROM duckdb_prepared_statements()",
    "FROM pandas_scan(1)",
]
DOING = [
    "COPY (SELECT 1) TO '{0}/out.csv'",
    "COPY embeddings TO '{0}/out.parquet'",
    "COPY (SELECT 1) TO 'http://127.0.0.1:{1}/x'",
    "EXPORT DATABASE '{0}/out'",
    "IMPORT DATABASE '{0}/out'",
    "ATTACH '{0}/out.db'",
    "ATTACH '{0}/out.db' AS x (TYPE sqlite)",
    "DETACH memory",
    "INSTALL httpfs",
    "LOAD httpfs",
    "LOAD '{0}/evil.duckdb_extension'",
    "FORCE INSTALL spatial FROM 'http://127.0.0.1:{1}'",
    "CREATE SECRET (TYPE s3, KEY_ID 'a', SECRET 'b')",
    "CREATE TABLE x AS SELECT 1",
    "CREATE OR REPLACE TEMP VIEW embeddings AS SELECT 1",
    "CREATE MACRO nec_decode(x) AS 1",
    "DROP VIEW embeddings",
    "INSERT INTO embeddings SELECT * FROM embeddings",
    "DELETE FROM embeddings",
    "PRAGMA database_list",
    "PRAGMA enable_profiling='json'",
    "SET enable_external_access=true",
    "SET GLOBAL lock_configuration=false",
    "SET allowed_directories=['/']",
    "SET VARIABLE x = 1",
    "RESET ALL",
    "CALL enable_logging()",
    "FROM enable_logging()",
    "FROM register_external_resource_type('x', kind := 'service', create_function := 'range')",
    "SELECT * FROM register_external_resource_type ('x', kind := 'service')",
    "SELECT write_log('x')",
    "SELECT 'x'.write_log()",
    "FROM checkpoint()",
    "SELECT 1; COPY (SELECT 1) TO '{0}/out.csv'",
    "EXPLAIN ANALYZE COPY (SELECT 1) TO '{0}/out.csv'",
    "PREPARE x AS COPY (SELECT 1) TO '{0}/out.csv'",
    "EXECUTE x",
    "BEGIN",
    "VACUUM",
    "CHECKPOINT",
    "USE system",
]


@pytest.mark.parametrize("attempt", READING + DOING)
def test_a_query_does_not_leave_the_archive(archive: Archive, folder: Path, attempt: str) -> None:
    """Refused in one line, nothing written anywhere, nobody called; the same as a condition."""
    server, port = listener()
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    query = attempt.format(folder, port)
    with server:
        for sql in (query, f"SELECT tile_id FROM embeddings WHERE EXISTS ({query})"):
            with pytest.raises(BadQuery) as caught:
                archive.sql(sql).fetchall()
            assert "\n" not in str(caught.value)
            assert SECRET not in str(caught.value)
        with pytest.raises(BadQuery) as caught:
            archive.pull(f"EXISTS ({query})")
        assert SECRET not in str(caught.value)
        with pytest.raises(TimeoutError):
            server.accept()
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == before
    assert archive.sql("SELECT count(*) FROM embeddings").fetchall() == [(40,)]


def test_nothing_tells_under_which_name_another_archive_is_reached(archive: Archive, folder: Path) -> None:
    gc.collect()
    told = [
        str(archive.sql(query).fetchall())
        for query in (
            "FROM duckdb_views()",
            "FROM duckdb_functions()",
            "FROM duckdb_settings()",
            "FROM duckdb_tables()",
            "FROM duckdb_columns()",
            "FROM information_schema.tables",
            "FROM pg_catalog.pg_views",
            "SELECT current_query()",
        )
    ]
    tokens = {part.split("/")[0] for text in told for part in text.split("nec://")[1:] if part[0] in "0123456789abcdef"}
    assert len(tokens) == 1  # its own
    assert archive.files[0].path in "".join(told)
    assert open_archive(folder / "other" / "archive").files[0].path not in "".join(told)


def test_what_is_refused_is_there_to_be_called(archive: Archive, monkeypatch: pytest.MonkeyPatch) -> None:
    """Otherwise it would be refused for not being there, and the tests above would show nothing."""
    monkeypatch.setattr("nec_ray.archive.sql.check_calls", lambda _: None)
    for query in ("FROM query('SELECT 1')", "FROM query\u00a0('SELECT 1')", "SELECT 'é€' FROM query('SELECT 1')"):
        assert len(archive.sql(query).fetchall()) == 1


def test_harmless_functions_may_be_called(archive: Archive) -> None:
    query = "WITH query AS (SELECT * FROM embeddings) SELECT count(*), max(i) FROM query, range(3) AS r(i)"
    assert archive.sql(query).fetchall() == [(120, 2)]
    assert archive.sql("SELECT 'é query(1)', count(*) FROM embeddings -- query(1)").fetchall()[0][1] == 40
    assert archive.sql("DESCRIBE embeddings").fetchall()[0][0] == "tile_id"


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        (f"https://user:{SECRET}@host/a", "https://***@host/a"),
        (f"https://{SECRET}@host/a", "https://***@host/a"),
        (f"s3://key:{SECRET}@bucket/a: refused", "s3://***@bucket/a: refused"),
        (f"https://h/a?X-Amz-Signature={SECRET}&x=1", "https://h/a?X-Amz-Signature=***&x=1"),
        (f"https://h/a?se=2026&sig={SECRET}", "https://h/a?se=2026&sig=***"),
        ("s3://bucket/a@b/c", "s3://bucket/a@b/c"),
        ("https://h/a?label=water&key_count=3", "https://h/a?label=water&key_count=3"),
        ("nothing to hide: a@b", "nothing to hide: a@b"),
    ],
)
def test_urls_are_shown_without_secrets(text: str, shown: str) -> None:
    assert without_secrets(text) == shown == str(NotFound(text))
    assert SECRET not in repr(NotFound(text))


def test_awss_secrets_are_left_out_of_errors(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", SECRET)
    assert str(StorageError(f"refused with {SECRET}")) == "refused with ***"


def test_an_s3_url_with_a_key_is_refused_before_anybody_hears_of_it() -> None:
    with pytest.raises(InputError, match="an s3 URL holds a user or a key") as caught:
        open_archive(f"s3://KEY:{SECRET}@bucket/archive")
    assert SECRET not in "".join(traceback.format_exception(caught.value))


@pytest.fixture
def web(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """URL of an archive with a user and a password in it."""
    monkeypatch.setattr("nec_ray.storage.faults.PATIENCE_S", 0.2)
    made = filled_archive(tmp_path / "served")
    with serve(Path(made.url)) as server:
        yield server.url.replace("http://", f"http://user:{SECRET}@")


def test_a_password_in_a_url_is_in_nothing_that_people_read(
    web: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    archive = open_archive(web)
    facts = describe(archive)
    done = export(archive, tmp_path / "out.zarr", format="zarr", where="tile_id < 't003'")
    shown = [repr(archive), archive._repr_html_(), repr(archive.select()), json.dumps(facts), json.dumps(done)]
    shown += [repr(archive.parts()), repr(torch_dataset(archive))]
    with pytest.raises(InputError, match="local folder") as elsewhere:
        archive.to_zarr(f"https://user:{SECRET}@127.0.0.1:1/x")
    shown.append(str(elsewhere.value))
    written = [path.read_bytes() for path in (tmp_path / "out.zarr").rglob("*") if path.is_file()]
    for where in ("tile_id = 'x'", "nothing = 1"):
        with pytest.raises(NecError) as caught:
            archive.pull(where)
        shown.append(str(caught.value))
    with pytest.raises(NotFound) as absent:
        open_archive(f"{web}/nothing")
    record = logging.LogRecord("nec_ray", logging.INFO, "x", 1, "reading", (), None)
    record.facts = {"archive": web}
    shown += [str(absent.value), JsonLines().format(record)]
    for command in (["archive", "info", web], ["archive", "info", web, "--json"], ["query", f"{web}/x", "SELECT 1"]):
        monkeypatch.setattr(sys, "argv", ["nec", *command])
        with pytest.raises(SystemExit):
            main()
    shown += list(capsys.readouterr())
    assert "127.0.0.1" in shown[0]
    assert not any(SECRET in text for text in shown)
    assert not any(SECRET.encode() in data for data in written)


def test_reading_needs_no_right_to_write_or_list(web: str, tmp_path: Path) -> None:
    """The server answers GET and HEAD, and nothing else."""
    archive = open_archive(web)
    assert len(archive.pull()) == len(archive.select("status = 'valid'")) == archive.coverage().valid == 38
    assert archive.sql("SELECT count(nec_decode(payload)) FROM embeddings").fetchall() == [(38,)]
    assert archive.to_zarr(tmp_path / "out.zarr")["tiles"] == sum(len(part.pull()) for part in archive.parts())

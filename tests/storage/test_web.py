"""Archives over plain http: an answer that is no answer is never taken for one."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from nec_ray import open_archive
from nec_ray.archive.change import restore
from nec_ray.archive.index import Index
from nec_ray.archive.verify import verify
from nec_ray.errors import InputError, NotFound, StorageError
from nec_ray.storage import Store
from tests.archive.make import Made, empty_archive, pack
from tests.storage.web import FOREVER, Web, serve

_COMMIT = f"{2:020}.json"


@pytest.fixture
def made(tmp_path: Path) -> Made:
    """Three versions after the empty one."""
    made = empty_archive(tmp_path)
    for n in range(3):
        made.index.append(made.index.version(), pack(made, [f"t{n}"], seed=n))
    return made


@pytest.fixture
def web(made: Made, monkeypatch: pytest.MonkeyPatch) -> Iterator[Web]:
    monkeypatch.setattr("nec_ray.storage.faults.PATIENCE_S", 0.5)
    with serve(Path(made.url)) as web:
        yield web


@pytest.mark.parametrize("status", [503, 500, 429])
def test_a_commit_that_a_busy_server_holds_back_once_is_seen(web: Web, status: int) -> None:
    web.status = status
    web.failures[_COMMIT] = 1
    assert open_archive(web.url).version == 3
    web.failures[_COMMIT] = 2
    assert len(Index(Store(web.url)).history()) == 4
    assert web.failures[_COMMIT] == 0


@pytest.mark.parametrize("status", [503, 401])
def test_a_server_that_stays_away_is_no_older_version(web: Web, status: int) -> None:
    web.status = status
    web.failures[_COMMIT] = FOREVER
    with pytest.raises(StorageError, match=_COMMIT):
        open_archive(web.url)


@pytest.mark.parametrize("status", [403, 404, 410])
def test_what_is_not_there_is_not_there(web: Web, status: int) -> None:
    web.status = status
    web.failures["missing"] = FOREVER
    store = Store(web.url)
    assert store.exists("archive.json")
    assert not store.exists("missing")
    with pytest.raises(NotFound):
        store.read("missing")
    with pytest.raises(NotFound), store.open("missing"):
        pass


@pytest.mark.parametrize("status", [503, 401])
def test_the_size_of_an_object_is_asked_for_patiently_too(web: Web, status: int) -> None:
    web.status = status
    store = Store(web.url)
    web.failures["archive.json"] = FOREVER
    with pytest.raises(StorageError, match=r"archive\.json: "):
        store.size("archive.json")
    web.status = 503
    web.failures["archive.json"] = 3  # fsspec asks twice each time
    assert store.size("archive.json") > 0


def test_an_outage_is_no_damage(web: Web) -> None:
    archive = open_archive(web.url)
    web.failures["packs/"] = FOREVER
    with pytest.raises(StorageError, match="503"):
        verify(archive)
    with pytest.raises(StorageError, match="503"):
        archive.pull()
    web.status = 404
    faults = verify(archive).faults
    assert sorted(fault.tile_id for fault in faults) == ["t0", "t1", "t2"]
    assert "is gone" in faults[0].what


def test_nothing_is_written_to_a_web_server(web: Web, made: Made) -> None:
    store = Store(web.url)
    rows = open_archive(web.url).rows(["tile_id", "encoded_at"])
    changes = dict(zip(rows["tile_id"].to_pylist(), rows["encoded_at"].to_pylist(), strict=True))
    for change in (
        lambda: restore(store, 1),
        lambda: Index(store).create(),
        lambda: Index(store).swap(changes, pack(made, [])[:0], "delete"),
    ):
        with pytest.raises(InputError, match="nothing can be written to a web server"):
            change()
    assert made.index.version().number == 3

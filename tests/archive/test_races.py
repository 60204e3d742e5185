"""Writers, restores and garbage collection that meet at the worst moment: nothing is lost, nothing there twice."""

import os
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest

from nec_ray import open_archive
from nec_ray.archive import collect as collecting
from nec_ray.archive.change import delete, rebuild, restore
from nec_ray.archive.collect import GRACE, collect
from nec_ray.archive.compact import compact
from nec_ray.archive.index import Index
from nec_ray.archive.layout import install_codec
from nec_ray.archive.log import Log
from nec_ray.archive.verify import verify
from nec_ray.errors import InputError
from nec_ray.storage import Store
from tests.archive.make import Made, empty_archive, filled_archive, pack


def ids(made: Made) -> list[str]:
    return sorted(open_archive(made.url).rows(["tile_id"])["tile_id"].to_pylist())


def age(made: Made) -> None:
    """As if everything had been written a month ago."""
    then = time.time() - 30 * 86_400
    for entry in (entry for folder in ("packs", "codecs", "index") for entry in made.store.entries(folder)):
        os.utime(made.store.path(entry.name), (then, then))


def once_before(patch: pytest.MonkeyPatch, owner: Any, name: str, happens: Callable[[], object]) -> None:
    """Something happens directly before the first call of a function."""
    real = getattr(owner, name)

    def call(*arguments: Any, **options: Any) -> Any:
        patch.setattr(owner, name, real)
        happens()
        return real(*arguments, **options)

    patch.setattr(owner, name, call)


def test_an_append_that_is_tried_again_writes_what_is_left_then(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As many rows are left as at the first attempt, but others."""
    made = empty_archive(tmp_path)
    base = made.index.version()
    rows = pack(made, ["x", "y", "z"], seed=1)
    other = Index(Store(made.url))
    other.append(base, pack(made, ["x"], seed=2))

    def meanwhile() -> None:
        delete(made.store, "tile_id = 'x'")
        other.append(other.version(), pack(made, ["y"], seed=3))

    once_before(monkeypatch, Log, "commit", meanwhile)
    made.index.append(base, rows)
    assert ids(made) == ["x", "y", "z"]


def test_gc_spares_an_old_pack_that_a_compaction_makes_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = empty_archive(tmp_path)
    for n in range(3):
        made.index.append(made.index.version(), pack(made, [f"{n}{i}" for i in range(5)], seed=n))

    class Killed(BaseException):
        pass

    def kill() -> None:
        raise Killed

    with monkeypatch.context() as patch:
        once_before(patch, Index, "swap", kill)
        with pytest.raises(Killed):
            compact(made.store)
    age(made)
    once_before(monkeypatch, Index, "swap", lambda: collect(made.store, GRACE))
    compact(made.store)
    assert not verify(open_archive(made.url)).faults
    assert len(ids(made)) == 15


@pytest.mark.parametrize("moment", ["find_garbage", "_is_touched"])
def test_gc_spares_what_a_restore_needs_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moment: str) -> None:
    made = filled_archive(tmp_path)
    delete(made.store, "true")
    age(made)
    real = collecting.find_garbage
    if moment == "find_garbage":  # between its look at the archive and the first removal

        def late(store: Store, grace: timedelta) -> collecting.Garbage:
            found = real(store, grace)
            assert found.packs
            restore(made.store, 1)
            return found

        monkeypatch.setattr(collecting, "find_garbage", late)
    else:
        once_before(monkeypatch, collecting, "_is_touched", lambda: restore(made.store, 1))
    collect(made.store, GRACE)
    assert len(ids(made)) == 40
    assert not verify(open_archive(made.url)).faults


def test_gc_spares_the_whole_of_a_codec_that_is_installed_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made, other = filled_archive(tmp_path / "a"), empty_archive(tmp_path / "b", seed=1)
    install_codec(made.store, other.codec)
    age(made)
    real = collecting.find_garbage

    def late(store: Store, grace: timedelta) -> collecting.Garbage:
        found = real(store, grace)
        assert found.codecs == [other.codec.id]
        install_codec(made.store, other.codec)
        return found

    monkeypatch.setattr(collecting, "find_garbage", late)
    collect(made.store, GRACE)
    left = made.store.names(f"codecs/{other.codec.id}")
    assert left == other.store.names(f"codecs/{other.codec.id}")
    assert len(left) > 1


def test_a_rebuild_keeps_what_is_committed_while_it_reads_the_packs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = filled_archive(tmp_path)
    other = Index(Store(made.url))
    once_before(monkeypatch, Index, "replace_all", lambda: other.append(other.version(), pack(made, ["new"], seed=5)))
    rebuild(made.store)
    assert len(ids(made)) == 41
    assert "new" in ids(made)


@pytest.mark.parametrize("where", ["", "  "])
def test_an_empty_condition_deletes_nothing(tmp_path: Path, where: str) -> None:
    made = filled_archive(tmp_path)
    with pytest.raises(InputError, match="an empty condition"):
        delete(made.store, where)
    assert len(ids(made)) == 40


def test_gc_removes_what_killed_writers_left_half_written(tmp_path: Path) -> None:
    made = filled_archive(tmp_path)
    [one] = made.store.names("packs")[:1]
    folder = Path(made.store.path(one)).parent
    old, young = folder / ".x.pack.0011.tmp", folder / ".y.pack.2233.tmp"
    for path in (old, young):
        path.write_bytes(b"half")
    then = time.time() - 30 * 86_400
    os.utime(old, (then, then))
    collect(made.store, GRACE)
    assert (old.exists(), young.exists()) == (False, True)
    assert len(ids(made)) == 40


def test_gc_removes_all_but_the_newest_state_of_a_lease(tmp_path: Path) -> None:
    made = filled_archive(tmp_path)
    for number in range(8, 12):
        made.store.create(f"leases/reencode/{number:012}.json", b"{}")
        made.store.create(f"leases/other/{number:012}.json", b"{}")
    collect(made.store, timedelta(0))
    assert made.store.names("leases") == ["leases/other/000000000011.json", "leases/reencode/000000000011.json"]

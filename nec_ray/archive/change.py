"""Swaps of rows: delete, restore, rebuild. Each is one transaction, tried again from the new version on a conflict."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime
from typing import TypeVar

import pyarrow as pa
import pyarrow.compute as pc

from nec_ray.archive.archive import open_archive
from nec_ray.archive.index import Commit, Index, Version
from nec_ray.archive.layout import ARCHIVE_JSON, INDEX, ArchiveInfo, create_archive, is_pack, pack_codec
from nec_ray.archive.pack import read_footer
from nec_ray.archive.recorded import FOLDER, RecordedCatalog, check_recorded, is_recorded
from nec_ray.contracts import arrow_schema
from nec_ray.errors import ConflictError, CorruptIndex, CorruptPack, InputError, NotFound
from nec_ray.storage import Store

ATTEMPTS = 10
_READERS = 16
Result = TypeVar("Result")


def until_no_conflict(change: Callable[[], Result]) -> Result:
    """The result of a change that reads the newest version, made again when another writer was faster."""
    for _ in range(ATTEMPTS - 1):
        try:
            return change()
        except ConflictError:
            continue
    return change()


def delete(store: Store, where: str, *, dry_run: bool = False) -> Commit:
    """Remove the rows that a condition picks; their payloads stay until `gc`.

    Raises:
        InputError: the condition is empty.
        BadQuery: it does not parse.
        ConflictError: other writers changed these rows every time.
    """
    if not where.strip():  # an unset variable of a shell must not remove everything
        raise InputError(
            f"{store.url}: an empty condition; give one, such as \"status = 'failed'\" (true is all tiles)"
        )

    def change() -> Commit:
        archive = open_archive(store.url)
        rows = archive.rows(["tile_id", "encoded_at"], where)
        changes = dict(zip(rows["tile_id"].to_pylist(), rows["encoded_at"].to_pylist(), strict=True))
        if not changes or dry_run:
            return Commit(archive.version, 0, len(changes))
        done = Index(store).swap(changes, arrow_schema("index.json").empty_table(), "delete")
        return Commit(done.version, 0, len(changes))

    return until_no_conflict(change)


def restore(store: Store, version: int | datetime) -> Commit:
    """Make an older version the newest one; nothing is lost, the versions between stay.

    Raises:
        NotFound: no such version, or `gc` has removed what it needs.
    """
    store.check_writable()
    index = Index(store)
    target = index.version(version)
    there = {entry.name for folder in ("packs", "codecs", INDEX, FOLDER) for entry in store.entries(folder)}
    needed = _needed(store.url, index, target, there)
    catalogs = {one.path for one in index.catalogs(target)}
    for name in sorted((needed | catalogs) - there):
        raise NotFound(f"{store.url}: version {target.number} is no longer whole, gc has removed {name}")
    with ThreadPoolExecutor(_READERS) as pool:  # a gc at work must not take what is old and about to be needed again
        dormant = needed - _needed(store.url, index, index.version(), there)
        list(pool.map(store.touch, sorted(dormant | catalogs)))
    return Commit(index.restore(target.number), target.rows, 0)


def _needed(where: str, index: Index, version: Version, there: set[str]) -> set[str]:
    """Names of a version's index files and packs, and of their codecs' files among `there`.

    Raises:
        NotFound: an index file is gone.
    """
    for file in version.files:
        if file.path not in there:
            raise NotFound(f"{where}: version {version.number} is no longer whole, gc has removed {file.path}")
    payload = index.read(version.files, ["payload"])["payload"]
    packs = set(pc.drop_null(pc.unique(pc.struct_field(payload, "pack"))).to_pylist())
    codecs = {f"codecs/{pack_codec(name)}" for name in packs}
    files = {name for name in there if name.rpartition("/")[0] in codecs}
    return {file.path for file in version.files} | packs | files | {f"{codec}/codec.json" for codec in codecs}


def rebuild(store: Store, progress: Callable[[int, int], None] | None = None) -> tuple[Commit, list[str]]:
    """Make the index anew from the packs' footers: the newest row of each tile.

    Rows that were deleted and whose packs are still there come back. Rows of tiles that are not valid lie in the
    footers alone: those whose pack `gc` has taken are gone, and `nec encode` looks at their tiles again. All recorded
    catalogs that are there are recorded again.

    Returns:
        The commit, and what is wrong with each pack and each recorded catalog that was left out.

    Raises:
        NotFound: there are no packs.
        CorruptIndex: there is an index that does not read; it has to be moved away first.
    """
    if not any(map(is_pack, store.names("packs"))):
        raise NotFound(f"{store.url}: no packs there to rebuild an index from; check the path or URL")
    if not store.exists(ARCHIVE_JSON):
        create_archive(store, ArchiveInfo())
    index = Index(store)
    if not index.exists():
        index.create()
    catalogs, wrong = _whole_catalogs(store)
    index.record(catalogs)
    commit, faults = until_no_conflict(lambda: _rebuild(store, index, progress))
    return commit, [*faults, *wrong]


def _whole_catalogs(store: Store) -> tuple[list[RecordedCatalog], list[str]]:
    """The recorded catalogs that lie in the archive, and what is wrong with the others."""
    catalogs, faults = [], []
    for name in filter(is_recorded, store.names(FOLDER)):
        try:
            catalogs.append(check_recorded(store, name))
        except CorruptIndex as error:
            faults.append(str(error))
    return catalogs, faults


def _rebuild(store: Store, index: Index, progress: Callable[[int, int], None] | None) -> tuple[Commit, list[str]]:
    base = index.version()  # before the packs are listed: what is committed after may have packs that are not
    names = [name for name in store.names("packs") if is_pack(name)]
    faults, tables = [], []
    with ThreadPoolExecutor(_READERS) as pool:
        for n, found in enumerate(pool.map(lambda name: _footer(store, name), names), 1):
            if isinstance(found, str):
                faults.append(found)
            else:
                tables.append(found)
            if progress:
                progress(n, len(names))
    rows = pa.concat_tables([arrow_schema("index.json").empty_table(), *tables]).combine_chunks()
    order = pc.sort_indices(rows, [("tile_id", "ascending"), ("encoded_at", "descending")])
    rows = rows.take(order)
    ids = rows["tile_id"].combine_chunks()
    first = pc.not_equal(ids[1:], ids[:-1]) if len(ids) > 1 else pa.array([], pa.bool_())
    rows = rows.filter(pa.concat_arrays([pa.array([True] * min(1, len(ids))), first]))
    return Commit(index.replace_all(base, rows, "rebuild"), rows.num_rows, 0), faults


def _footer(store: Store, name: str) -> pa.Table | str:
    try:
        return read_footer(store, name)
    except CorruptPack as error:
        return str(error)

"""Garbage collection: removes what no kept version needs, once it is older than a grace period by the store's clock.

Kept are the newest version and those that were the newest within the grace period: a reader that opened one of them
goes on undisturbed. Young objects are left alone, since a writer may be about to commit them.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from datetime import timedelta

import pyarrow.compute as pc

from nec_ray.archive.index import Index
from nec_ray.archive.layout import INDEX, is_pack
from nec_ray.archive.recorded import FOLDER, is_recorded
from nec_ray.errors import NotFound
from nec_ray.storage import Entry, Store

GRACE = timedelta(days=7)
"""Longer than the longest reader and the longest time between a pack and its commit."""


@dataclass(frozen=True)
class Garbage:
    """What was removed, or would be."""

    kept_versions: tuple[int, int]
    """The oldest version that is kept, and the newest."""
    packs: list[Entry]
    codecs: list[str]
    """Their ids."""
    codec_files: list[Entry]
    index_files: list[Entry]
    catalogs: list[Entry]
    """Recorded catalogs."""
    leftovers: list[Entry]
    """What others left: files half written, probes of the store's time, states of leases that newer ones replaced."""

    @property
    def entries(self) -> list[Entry]:
        """Everything, codec.json before a codec's other files, so that no half codec looks whole."""
        files = sorted(self.codec_files, key=lambda entry: not entry.name.endswith("/codec.json"))
        return [*self.index_files, *self.packs, *files, *self.catalogs, *self.leftovers]


def find_garbage(store: Store, grace: timedelta = GRACE) -> Garbage:
    """What `collect` removes.

    Raises:
        InputError: the store cannot list.
    """
    index = Index(store)
    entries = {folder: store.entries(folder) for folder in ("packs", "codecs", INDEX, FOLDER, "clocks", "leases")}
    horizon = store.now() - grace
    newest = index.version()
    oldest = newest.number
    log = {entry.name: entry for entry in entries[INDEX] if "/_delta_log/" in entry.name}
    # A version was the newest until the next commit landed.
    while oldest > 0:
        following = log.get(f"{INDEX}/_delta_log/{oldest:020}.json")
        if following is None or following.modified <= horizon:
            break
        oldest -= 1
    files, catalogs = index.needed_since(oldest)
    columns = index.read(sorted(files, key=lambda file: file.name), ["codec_id", "payload"])
    packs = set(pc.drop_null(pc.unique(pc.struct_field(columns["payload"], "pack"))).to_pylist())
    codecs = set(columns["codec_id"].unique().to_pylist()) | {name.split("/")[1] for name in packs}
    names = {file.path for file in files} | {one.path for one in catalogs}

    def old(entries: Iterable[Entry]) -> list[Entry]:
        return [entry for entry in entries if entry.modified <= horizon]

    by_codec: dict[str, list[Entry]] = {}
    for entry in entries["codecs"]:
        by_codec.setdefault(entry.name.split("/")[1], []).append(entry)
    dead = [codec_id for codec_id, mine in by_codec.items() if codec_id not in codecs and len(old(mine)) == len(mine)]
    return Garbage(
        kept_versions=(oldest, newest.number),
        packs=old(entry for entry in entries["packs"] if is_pack(entry.name) and entry.name not in packs),
        codecs=sorted(dead),
        codec_files=[entry for codec_id in dead for entry in by_codec[codec_id]],
        index_files=old(
            entry
            for entry in entries[INDEX]
            if entry.name.endswith(".parquet") and "/_delta_log/" not in entry.name and entry.name not in names
        ),
        catalogs=old(one for one in entries[FOLDER] if is_recorded(one.name) and one.name not in names),
        leftovers=old(
            [
                *entries["clocks"],
                *_outdated(entries["leases"]),
                *(one for folder in entries for one in store.leftovers(folder)),
            ]
        ),
    )


def collect(store: Store, grace: timedelta = GRACE, progress: Callable[[int, int], None] | None = None) -> Garbage:
    """Remove the garbage; safe while others read and write, as long as none takes longer than the grace period."""
    garbage = find_garbage(store, grace)
    entries = garbage.entries
    spared: set[str] = set()
    for n, entry in enumerate(entries, 1):
        # Whoever has use for an old object, a writer of the same content or a restore, makes it young again.
        folder = entry.name.rpartition("/")[0]
        if folder in spared or _is_touched(store, entry):
            spared |= {folder} if entry in garbage.codec_files else set()
        else:
            store.delete([entry.name])
        if progress:
            progress(n, len(entries))
    return garbage


def _outdated(leases: list[Entry]) -> list[Entry]:
    """All but the newest object of each lease, which says by its number what the next one is."""
    newest = {entry.name.rpartition("/")[0]: entry.name for entry in leases}  # they come by name
    return [entry for entry in leases if entry.name != newest[entry.name.rpartition("/")[0]]]


def _is_touched(store: Store, entry: Entry) -> bool:
    try:
        return store.modified(entry.name) > entry.modified
    except NotFound:
        return True

"""Checks that every payload and recorded catalog of an archive's version is there and is the one that was written."""

import hashlib
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass

import pyarrow as pa

from nec_ray.archive.archive import Archive
from nec_ray.archive.layout import archive_codec
from nec_ray.archive.payloads import References, decode, fetch, references
from nec_ray.archive.recorded import REMEDY, check_recorded
from nec_ray.codec import Codec, Payloads
from nec_ray.errors import CorruptIndex, CorruptPack, DataError, NotFound
from nec_ray.storage import Store

Progress = Callable[[int, int], None]
_SLICE = 50_000


@dataclass(frozen=True)
class Fault:
    """What is wrong with a tile."""

    tile_id: str
    what: str


@dataclass(frozen=True)
class Verified:
    """Result of a check."""

    tiles: int
    """Rows of the version."""
    checked: int
    """Payloads that were fetched, hashed and decoded, or could not be."""
    payload_bytes: int
    faults: list[Fault]
    catalogs: list[str]
    """What is wrong with recorded catalogs."""


def verify(archive: Archive, *, sample: int | None = None, seed: int = 0, progress: Progress | None = None) -> Verified:
    """Check the rows, and every payload or a random sample of them; and the recorded catalogs.

    Args:
        archive: what to check.
        sample: how many payloads, and of catalogs nothing but their size; everything where it is None.
        seed: of the sample.
        progress: called with (payloads checked, payloads to check).

    Raises:
        CorruptCodec: a codec does not reproduce its golden payloads.
        StorageError: the store refused, or was away for too long: that says nothing about the tiles.
    """
    faults = [
        Fault(tile_id, f"there {count} times")
        for tile_id, count in archive.sql(
            "SELECT tile_id, count(*) FROM embeddings GROUP BY tile_id HAVING count(*) > 1 ORDER BY tile_id"
        ).fetchall()
    ]
    picked = f"USING SAMPLE reservoir({int(sample)} ROWS) REPEATABLE ({int(seed)})" if sample is not None else ""
    rows = archive.sql(
        "SELECT * FROM (SELECT tile_id, codec_id, payload, sha256, n_bytes FROM embeddings WHERE status = 'valid') "
        f"{picked}"
    ).to_arrow_table()
    checked = size = 0
    store = Store(archive.url)
    for start in range(0, rows.num_rows, _SLICE):
        part = rows.slice(start, _SLICE)
        for mine in _by_pack(part):
            good, wrong = _sound(mine)
            wanted = references(good["tile_id"].to_pylist(), good["payload"])
            faults += [*wrong, *_check(store, wanted, good["sha256"].to_pylist()), *_wrong_rows(good)]
            size += int(wanted.length.sum())
            checked += mine.num_rows
            if progress:
                progress(checked, rows.num_rows)
    return Verified(len(archive), checked, size, faults, _wrong_catalogs(archive, whole=sample is None))


def _wrong_catalogs(archive: Archive, *, whole: bool) -> list[str]:
    try:
        catalogs = archive.catalogs
    except CorruptIndex as error:
        return [str(error)]
    store, wrong = Store(archive.url), []
    for one in catalogs:
        try:
            if store.size(one.path) != one.size or (whole and check_recorded(store, one.path) != one):
                wrong.append(f"{store.url}: {one.path} is not the object that the index names; {REMEDY}")
        except NotFound:
            wrong.append(f"{store.url}: {one.path} is gone; encode its catalog again")
        except CorruptIndex as error:
            wrong.append(str(error))
    return wrong


def _wrong_rows(rows: pa.Table) -> list[Fault]:
    """Rows whose columns contradict each other."""
    found = []
    for row in rows.select(["tile_id", "codec_id", "payload", "n_bytes"]).to_pylist():
        payload = row["payload"] or {}
        if not str(payload.get("pack")).startswith(f"packs/{row['codec_id']}/"):
            found.append(Fault(row["tile_id"], "its payload lies in a pack of another codec"))
        elif sum(payload["layer_lengths"] or [0]) != row["n_bytes"]:
            found.append(Fault(row["tile_id"], "its layers do not add up to its bytes"))
    return found


def _by_pack(rows: pa.Table) -> list[pa.Table]:
    """The rows pack by pack, so that a pack that is gone takes no other with it."""
    groups: dict[str, list[int]] = {}
    for i, payload in enumerate(rows["payload"].to_pylist()):
        groups.setdefault(str((payload or {}).get("pack")), []).append(i)
    return [rows.take(pa.array(numbers)) for numbers in groups.values()]


def _sound(rows: pa.Table) -> tuple[pa.Table, list[Fault]]:
    """Rows whose references can be, and what is wrong with the others."""
    with suppress(CorruptIndex):  # which names the first of them only
        references(rows["tile_id"].to_pylist(), rows["payload"])
        return rows, []
    good, wrong = [], []
    for i, tile_id in enumerate(rows["tile_id"].to_pylist()):
        try:
            references([tile_id], rows["payload"].slice(i, 1))
            good.append(i)
        except CorruptIndex as error:
            wrong.append(Fault(tile_id, str(error).removeprefix(f"tile {tile_id}: ")))
    return rows.take(pa.array(good, pa.int64())), wrong


def _check(store: Store, wanted: References, hashes: Sequence[bytes | None]) -> list[Fault]:
    faults: list[Fault] = []
    try:
        for batch in fetch(store, wanted):
            ids = [wanted.tile_ids[i] for i in batch.number]
            good = []
            for n, (i, payload) in enumerate(zip(batch.number.tolist(), batch.payloads, strict=True)):
                if hashlib.sha256(payload).digest() == hashes[i]:
                    good.append(n)
                else:
                    faults.append(Fault(ids[n], "its bytes are not the ones that were written (SHA-256 differs)"))
            codec = archive_codec(store, batch.codec_id)
            faults += _undecodable(codec, [ids[n] for n in good], batch.payloads, good)
    except (CorruptPack, CorruptIndex, NotFound) as error:
        if len(wanted) == 1:
            return [Fault(wanted.tile_ids[0], str(error).removeprefix(f"tile {wanted.tile_ids[0]}: "))]
        # A pack that is cut off still holds some of them.
        for i in range(len(wanted)):
            one = References(
                [wanted.tile_ids[i]], wanted.packs, *(a[i : i + 1] for a in (wanted.pack, wanted.offset, wanted.length))
            )
            faults += _check(store, one, [hashes[i]])
        return list(dict.fromkeys(faults))
    return faults


def _undecodable(codec: Codec, ids: Sequence[str], payloads: Payloads, good: Sequence[int]) -> list[Fault]:
    chosen = [payloads[n] for n in good]
    try:
        decode(codec, ids, chosen)
    except DataError:
        found = []
        for tile_id, payload in zip(ids, chosen, strict=True):
            try:
                decode(codec, [tile_id], [payload])
            except DataError as error:
                found.append(Fault(tile_id, str(error).removeprefix(f"tile {tile_id}: ")))
        return found
    return []

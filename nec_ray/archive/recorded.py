"""Recorded catalogs: the tiles that encodings were asked for, by which an archive knows what is absent.

Each is one immutable Parquet object, `catalogs/<digest>.parquet` (schemas/recorded_catalog.json), that a table property
of the index's Delta log names. The log is where a version's state is: it is committed by one writer at a time, pinned
with the version, and read without listing. The digest is of the rows and not of the file, so that a run of the same
tiles finds it there whatever release of Arrow wrote it.
"""

import hashlib
import json
import re
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from nec_ray.contracts import arrow_schema
from nec_ray.errors import CorruptIndex
from nec_ray.storage import Store
from nec_ray.tiles.geoparquet import parquet_writer

CONTRACT = "recorded_catalog.json"
FOLDER = "catalogs"
PROPERTY = "nec.catalog."
REMEDY = "remove it and encode its catalog again"
_DIGEST = re.compile(r"[0-9a-f]{64}")
_NAME = re.compile(rf"{FOLDER}/([0-9a-f]{{64}})\.parquet")
_ROW_GROUP = 8192
"""What a place reads some of: a few hundred KB; of each, 0.7 KB of the footer, which is always read."""
_FOOTER, _FOOTER_GROUP = 4 << 10, 900
"""Bytes of the footer, about: of its schema, and of each row group."""
_EDGES = ("xmin", "ymin", "xmax", "ymax")
_MOST = 1 << 50
"""More tiles or bytes are no numbers of a catalog."""


@dataclass(frozen=True, order=True)
class RecordedCatalog:
    """One of the catalogs that were encoded."""

    digest: str
    """SHA-256 of its rows, 64 hexadecimal digits."""
    tiles: int
    size: int
    """Bytes of the object."""
    sha256: str
    """Of the object."""

    @property
    def path(self) -> str:
        """Its name below the archive."""
        return f"{FOLDER}/{self.digest}.parquet"

    @property
    def footer(self) -> int:
        """Bytes of its footer, about."""
        return _FOOTER + _FOOTER_GROUP * -(-self.tiles // _ROW_GROUP)

    @property
    def properties(self) -> dict[str, str]:
        """The table property that names it."""
        facts = {"bytes": self.size, "sha256": self.sha256, "tiles": self.tiles}
        return {f"{PROPERTY}{self.digest}": json.dumps(facts)}


def recorded_catalogs(where: str, properties: Mapping[str, str]) -> tuple[RecordedCatalog, ...]:
    """The recorded catalogs that table properties name, by digest.

    Args:
        where: what to call the table in an error.
        properties: all of the table's.

    Raises:
        CorruptIndex: a name or value that cannot be.
    """
    named = {key: value for key, value in properties.items() if key.startswith(PROPERTY)}
    return tuple(sorted(_named(where, key.removeprefix(PROPERTY), value) for key, value in named.items()))


def _named(where: str, digest: str, value: str) -> RecordedCatalog:
    try:
        facts = json.loads(value)
        tiles, size, sha256 = facts["tiles"], facts["bytes"], facts["sha256"]
        texts = all(_DIGEST.fullmatch(text) for text in (digest, sha256))
        good = texts and all(type(n) is int and 0 < n < _MOST for n in (tiles, size))
    except (ValueError, KeyError, TypeError, RecursionError):
        good = False
    if not good:
        raise CorruptIndex(
            f"{where}: the log names {digest[:120]!r} ({value[:60]}), which is no recorded catalog of this archive; "
            "restore an older version, or give coverage the catalogs"
        )
    return RecordedCatalog(digest, tiles, size, sha256)


def is_recorded(name: str) -> bool:
    """Whether a name is one of a recorded catalog."""
    return _NAME.fullmatch(name) is not None


class Digest:
    """The digest of rows that come some at a time; how they are cut does not matter."""

    def __init__(self) -> None:
        names = ("tile_id lengths", "tile_id", "acquired_at", *_EDGES, "geometry lengths", "geometry")
        self._streams = {name: hashlib.sha256() for name in names}

    def update(self, rows: pa.Table) -> None:
        """Add rows with the columns of schemas/recorded_catalog.json, of its types; others are passed over."""
        for name in ("tile_id", "geometry"):
            column = rows[name].combine_chunks().cast(pa.large_binary())
            self._add(f"{name} lengths", pc.fill_null(pc.binary_length(column), -1), "<i4")
            full = pc.fill_null(column, b"")
            offsets = np.frombuffer(full.buffers()[1], np.int64, len(full) + 1, 8 * full.offset)
            if offsets[-1] > offsets[0]:
                self._streams[name].update(memoryview(full.buffers()[2])[offsets[0] : offsets[-1]])
        micros = rows["acquired_at"].combine_chunks().cast(pa.int64())
        self._add("acquired_at", pc.fill_null(micros, np.iinfo(np.int64).min), "<i8")
        box = rows["bbox"].combine_chunks()
        for edge in _EDGES:
            values = pc.fill_null(pc.struct_field(box, edge), np.nan).to_numpy(zero_copy_only=False)
            self._add(edge, np.where(np.isnan(values), np.nan, values), "<f8")

    def hexdigest(self) -> str:
        """The digest of what was added so far."""
        return hashlib.sha256(b"".join(stream.digest() for stream in self._streams.values())).hexdigest()

    def _add(self, name: str, values: pa.Array | npt.NDArray[Any], dtype: str) -> None:
        self._streams[name].update(np.ascontiguousarray(np.asarray(values), dtype).tobytes())


def write_recorded(tables: Iterable[pa.Table], path: Path) -> RecordedCatalog:
    """Write rows that come some at a time to a local file; memory does not grow with their number."""
    schema, digest, rows = arrow_schema(CONTRACT), Digest(), 0
    with parquet_writer(path, schema) as writer:
        for table in _groups(table.select(schema.names).cast(schema) for table in tables):
            digest.update(table)
            rows += table.num_rows
            writer.write_table(table, row_group_size=_ROW_GROUP)
    return _described(path, digest, rows)


def _described(path: Path, digest: Digest, rows: int) -> RecordedCatalog:
    with path.open("rb") as file:
        sha256 = hashlib.file_digest(file, "sha256").hexdigest()
    return RecordedCatalog(digest.hexdigest(), rows, path.stat().st_size, sha256)


def _groups(tables: Iterable[pa.Table]) -> Iterator[pa.Table]:
    """The same rows, as many as a row group at a time."""
    left = arrow_schema(CONTRACT).empty_table()
    for table in tables:
        left = pa.concat_tables([left, table])
        while left.num_rows >= _ROW_GROUP:
            yield left.slice(0, _ROW_GROUP)
            left = left.slice(_ROW_GROUP)
    if left.num_rows:
        yield left


def check_recorded(store: Store, name: str) -> RecordedCatalog:
    """Read a recorded catalog whole, and hold it against its name.

    Raises:
        NotFound: it is not there.
        CorruptIndex: it does not read, or is not what its name says.
    """
    schema, digest, rows = arrow_schema(CONTRACT), Digest(), 0
    with tempfile.TemporaryDirectory(prefix="nec-catalog-") as folder:
        path = store.local_file(name, Path(folder))
        try:
            with pq.ParquetFile(path) as file:
                for batch in file.iter_batches(_ROW_GROUP, columns=schema.names):
                    table = pa.Table.from_batches([batch]).select(schema.names).cast(schema)
                    digest.update(table)
                    rows += table.num_rows
        except (pa.ArrowException, OSError, KeyError, ValueError) as error:
            text = " ".join(str(error).split())[:200]
            raise CorruptIndex(f"{store.url}: {name} does not read ({text}); {REMEDY}") from None
        found = _described(path, digest, rows)
    if not rows or name != found.path:
        raise CorruptIndex(f"{store.url}: {name} does not hold the tiles that its name says; {REMEDY}")
    return found

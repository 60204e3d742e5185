"""A catalog's tiles in spatial order on the local disk, so that memory does not grow with their number."""

import os
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from nec_ray.contracts import arrow_schema
from nec_ray.storage import Store, normalise_url
from nec_ray.tiles.catalog import CatalogMetadata, band_sets, catalog_metadata, check_table, not_parquet
from nec_ray.tiles.hilbert import hilbert_keys

BATCH = 8192
"""Rows that are read at once."""
_BUCKET = 1 << 20
"""Rows that are sorted at once."""
_ZSTD = pa.ipc.IpcWriteOptions(compression="zstd")


class OrderedTiles:
    """The rows of a tile catalog, by number in Hilbert order; ties, and tiles without a place, by `tile_id`.

    They are sorted into a file of `folder`, a million at a time: the order depends on nothing but the tiles.

    Args:
        url: a tile catalog.
        folder: an empty folder on a local disk; whoever made it removes it.

    Raises:
        NotFound: nothing is at `url`.
        BadCatalog: not a Parquet file, or not a tile catalog. Ids that stand twice are not looked for.
        UnsupportedFormat: written by a later release.
    """

    def __init__(self, url: str | os.PathLike[str], folder: Path, bucket: int = _BUCKET) -> None:
        self.url = normalise_url(url)
        self.band_sets: set[tuple[str, ...]] = set()
        self.dtypes: set[str] = set()
        try:
            place, _, name = self.url.rpartition("/")
            source = pq.ParquetFile(Store(place or "/").local_file(name, folder))
            self.metadata: CatalogMetadata = catalog_metadata(source.schema_arrow.metadata or {}, self.url)
            self._path = folder / "tiles.arrow"
            self._sort(source, folder, bucket)
        except (pa.ArrowException, OSError) as error:
            raise not_parquet(self.url, error) from error
        self._file = pa.ipc.open_file(pa.memory_map(os.fspath(self._path)))
        self._cached: tuple[int, pa.RecordBatch] | None = None

    def __len__(self) -> int:
        return self._rows

    def rows(self, start: int, stop: int) -> pa.Table:
        """Rows `[start, stop)`: columns of `schemas/catalog.json`, and whatever else the catalog's maker added."""
        first = start // BATCH
        parts = [self._batch(i) for i in range(first, -(-stop // BATCH))]
        table = pa.Table.from_batches(parts, self._file.schema)
        return table.slice(start - first * BATCH, stop - start).combine_chunks()

    def take(self, numbers: Sequence[int]) -> pa.Table:
        """Rows of these numbers, ascending."""
        parts = [self.rows(n, n + 1) for n in numbers]
        return pa.concat_tables([self._file.schema.empty_table(), *parts])

    def batches(self) -> Iterator[pa.Table]:
        """All rows, some at a time."""
        for start in range(0, len(self), BATCH):
            yield self.rows(start, min(start + BATCH, len(self)))

    def _batch(self, number: int) -> pa.RecordBatch:
        if self._cached is None or self._cached[0] != number:
            self._cached = number, self._file.get_batch(number)
        return self._cached[1]

    def _sort(self, source: pq.ParquetFile, folder: Path, bucket: int) -> None:
        schema = check_table(source.schema_arrow.empty_table(), self.url).schema
        borders = _borders(_keys(source), bucket)
        buckets: Sequence[list[pa.Table] | _Spool]
        with pa.OSFile(os.fspath(self._path), "wb") as sink, pa.ipc.new_file(sink, schema, options=_ZSTD) as out:
            if not len(borders):
                buckets = [[]]
            else:
                buckets = [_Spool(folder / f"bucket-{n}.arrow", schema) for n in range(len(borders) + 1)]
            for table, keys in self._checked(source):
                number = np.searchsorted(borders, keys, side="right")
                for n in np.unique(number):
                    buckets[n].append(table.filter(pa.array(number == n)))
            left = schema.empty_table()
            self._rows = 0
            for parts in buckets:
                left = pa.concat_tables([left, _sorted(pa.concat_tables([schema.empty_table(), *parts]))])
                full = left.num_rows - left.num_rows % BATCH
                out.write_table(left.slice(0, full).combine_chunks(), BATCH)
                left = left.slice(full)
                self._rows += full
            out.write_table(left.combine_chunks(), BATCH)
            self._rows += left.num_rows

    def _checked(self, source: pq.ParquetFile) -> Iterator[tuple[pa.Table, npt.NDArray[np.int64]]]:
        for batch in source.iter_batches(1 << 16):
            table = check_table(pa.Table.from_batches([batch]), self.url, unique=False)
            self.band_sets |= band_sets(table)
            self.dtypes |= set(table["dtype"].unique().to_pylist())
            yield table, hilbert_keys(table["bbox"])


class _Spool:
    """Rows that wait on disk to be sorted; they can be read once."""

    def __init__(self, path: Path, schema: pa.Schema) -> None:
        self._path = path
        self._out = pa.ipc.new_file(os.fspath(path), schema, options=_ZSTD)

    def append(self, table: pa.Table) -> None:
        self._out.write_table(table)

    def __iter__(self) -> Iterator[pa.Table]:
        self._out.close()
        with pa.OSFile(os.fspath(self._path)) as file:
            yield pa.ipc.open_file(file).read_all()
        self._path.unlink()


def _keys(source: pq.ParquetFile) -> npt.NDArray[np.int64]:
    box = arrow_schema("catalog.json").field("bbox").type
    parts = [hilbert_keys(batch["bbox"].cast(box)) for batch in source.iter_batches(1 << 18, columns=["bbox"])]
    return np.concatenate([np.empty(0, np.int64), *parts])


def _borders(keys: npt.NDArray[np.int64], bucket: int) -> npt.NDArray[np.int64]:
    """Keys at which buckets of about so many rows begin; equal keys are never parted."""
    if len(keys) <= bucket:
        return np.empty(0, np.int64)
    keys = np.sort(keys)
    return np.unique(keys[bucket::bucket])


def _sorted(table: pa.Table) -> pa.Table:
    keyed = table.select(["tile_id"]).append_column("key", pa.array(hilbert_keys(table["bbox"])))
    order = pc.sort_indices(keyed, sort_keys=[("key", "ascending"), ("tile_id", "ascending")])
    return table.take(order)

"""The layouts that `nec bench pull` compares: the same tiles written five ways, and read by each one's fastest API."""

import asyncio
import functools
import io
import os
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.dataset as pads
import pyarrow.parquet as pq

from nec_ray.codec import Payloads
from nec_ray.evaluate.bench_data import Tiles
from nec_ray.storage import Store

Batch = tuple[list[str], Sequence[Any]]
"""Tile ids and their payloads, each something that has bytes."""
Split = dict[str, list[tuple[int, int]]]
"""By name of an object, the bytes in it that are payloads."""
_BOX = ("xmin", "ymin", "xmax", "ymax")


@dataclass(frozen=True)
class Ask:
    """What is asked for, as a condition on the tiles' metadata: limits of the bbox, a label, or nothing."""

    pull: str
    """count, neighbours, scattered, single or all."""
    limits: dict[str, tuple[str, float]] = field(default_factory=dict)
    """By side of the bbox, `<=` or `>=` and a number."""
    label: str | None = None

    def sql(self) -> str | None:
        """The condition in SQL; None where there is none."""
        parts = [f"bbox.{side} {op} {value!r}" for side, (op, value) in self.limits.items()]
        parts += [f"label = '{self.label}'"] if self.label is not None else []
        return " AND ".join(parts) or None

    def arrow(self) -> pads.Expression | None:
        """The condition for pyarrow."""
        parts = [
            pads.field("bbox", side) <= value if op == "<=" else pads.field("bbox", side) >= value
            for side, (op, value) in self.limits.items()
        ]
        parts += [pads.field("label") == self.label] if self.label is not None else []
        whole = None
        for part in parts:
            whole = part if whole is None else whole & part
        return whole

    def to_json(self) -> dict[str, Any]:
        """As JSON."""
        return asdict(self)

    @staticmethod
    def from_json(found: dict[str, Any]) -> "Ask":
        """From JSON."""
        limits = {side: (str(op), float(value)) for side, (op, value) in found["limits"].items()}
        return Ask(found["pull"], limits, found["label"])


class Layout(ABC):
    """One way of storing tiles."""

    name: str

    @abstractmethod
    def write(self, folder: Path, tiles: Tiles) -> None:
        """Write the tiles to a local folder."""

    @abstractmethod
    def count(self, url: str, ask: Ask) -> int:
        """How many tiles fit."""

    @abstractmethod
    def pull(self, url: str, ask: Ask) -> Iterator[Batch]:
        """Ids and payloads of the tiles that fit."""

    def split(self, folder: Path) -> Split | None:  # noqa: ARG002
        """Where the payload bytes are in the objects; None where the layout does not tell."""
        return None

    def fetched(self, payloads: list[Any]) -> int | None:  # noqa: ARG002
        """Payload bytes read for the payloads of a pull, with what was read between them; None if it does not tell."""
        return None


class Nec(Layout):
    """This package's: an archive of one commit, as `nec archive compact` leaves it; `open_archive` and `payloads`."""

    name = "nec"

    def write(self, folder: Path, tiles: Tiles) -> None:
        """Write the tiles."""
        from nec_ray.archive.index import Index
        from nec_ray.archive.layout import ArchiveInfo, create_archive, install_codec
        from nec_ray.archive.pack import write_pack

        store = Store(folder)
        create_archive(store, ArchiveInfo(licence="none", attribution="nobody"))
        install_codec(store, tiles.codec)
        index = Index(store)
        index.create()
        rows = write_pack(store, tiles.codec.id, tiles.rows, list(tiles.payloads), tiles.lengths.tolist())
        index.append(index.version(), rows)

    def count(self, url: str, ask: Ask) -> int:
        """How many tiles fit."""
        from nec_ray.archive.archive import open_archive

        query = open_archive(url).sql(f"SELECT count(*) FROM embeddings WHERE {ask.sql() or 'true'}")
        return int(query.fetchall()[0][0])

    def pull(self, url: str, ask: Ask) -> Iterator[Batch]:
        """Ids and payloads of the tiles that fit."""
        from nec_ray.archive.archive import open_archive

        for ids, _, payloads in open_archive(url).payloads(ask.sql()):
            yield ids, payloads

    def split(self, folder: Path) -> Split | None:
        """Where the payload bytes are."""
        return {str(path.relative_to(folder)): [(0, path.stat().st_size)] for path in folder.rglob("*.pack")}

    def fetched(self, payloads: list[Any]) -> int | None:
        """Bytes of the ranges that the payloads came in."""
        return sum(len(batch.data) for batch in payloads)  # a batch's buffer is what the ranges brought


class Parquet(Layout):
    """One Parquet file with a payload column, row groups of 1,024 tiles (2 MB of payloads); pyarrow.dataset."""

    name = "parquet"
    _ROW_GROUP = 1024
    _FILE = "tiles.parquet"

    def write(self, folder: Path, tiles: Tiles) -> None:
        """Write the tiles."""
        folder.mkdir(parents=True)
        table = tiles.rows.append_column("payload", _binary(tiles.payloads))
        columns = [name for name in table.column_names if name != "payload"]
        # Payloads do not compress; to try would only slow this layout down.
        _write_parquet(folder / self._FILE, table, self._ROW_GROUP, columns)

    def count(self, url: str, ask: Ask) -> int:
        """How many tiles fit."""
        return int(_dataset(url, self._FILE).count_rows(filter=ask.arrow()))

    def pull(self, url: str, ask: Ask) -> Iterator[Batch]:
        """Ids and payloads of the tiles that fit."""
        yield from _scan(_dataset(url, self._FILE), ask, ["tile_id", "payload"])

    def split(self, folder: Path) -> Split | None:
        """Where the payload bytes are."""
        meta = pq.read_metadata(folder / self._FILE)
        number = [meta.row_group(0).column(i).path_in_schema for i in range(meta.num_columns)].index("payload")
        chunks = [meta.row_group(i).column(number) for i in range(meta.num_row_groups)]
        starts = [chunk.dictionary_page_offset or chunk.data_page_offset for chunk in chunks]
        spans = [(start, start + chunk.total_compressed_size) for start, chunk in zip(starts, chunks, strict=True)]
        return {self._FILE: spans}


class Lance(Layout):
    """A Lance data set with a payload column, and scalar indices on what is asked for.

    A box finds row numbers by the zone maps and takes them: a scan by them would read the payloads of whole zones.
    """

    name = "lance"

    def write(self, folder: Path, tiles: Tiles) -> None:
        """Write the tiles."""
        import lance

        data = lance.write_dataset(tiles.rows.append_column("payload", _binary(tiles.payloads)), str(folder))
        data.create_scalar_index("label", "BITMAP")
        for side in _BOX:
            data.create_scalar_index(f"bbox.{side}", "ZONEMAP")

    def count(self, url: str, ask: Ask) -> int:
        """How many tiles fit."""
        return int(_lance(url).count_rows(filter=ask.sql()))

    def pull(self, url: str, ask: Ask) -> Iterator[Batch]:
        """Ids and payloads of the tiles that fit."""
        data = _lance(url)
        if ask.limits:
            found = data.scanner(columns=["tile_id"], filter=ask.sql(), with_row_id=True).to_table()
            taken = data.take(found["_rowid"].to_pylist(), columns=["payload"])  # one fragment: ids are positions
            yield found["tile_id"].to_pylist(), _payloads(taken["payload"].combine_chunks())
            return
        late = ask.label is not None
        for batch in data.scanner(
            columns=["tile_id", "payload"], filter=ask.sql(), late_materialization=late
        ).to_batches():
            if batch.num_rows:
                yield batch["tile_id"].to_pylist(), _payloads(batch["payload"])


class _Catalogued(Layout):
    """A layout without queries of its own: a GeoParquet catalog beside it says which tiles fit.

    It is what a careful user writes by hand: in Hilbert order, zstd, bounding boxes, pyarrow's own encodings.
    """

    FILE = "catalog.parquet"
    _ROW_GROUP = 8192

    def _write_catalog(self, folder: Path, rows: pa.Table) -> None:
        _write_parquet(folder / self.FILE, rows, self._ROW_GROUP, rows.column_names)

    def count(self, url: str, ask: Ask) -> int:
        """How many tiles fit."""
        return int(_dataset(url, self.FILE).count_rows(filter=ask.arrow()))

    def _find(self, url: str, ask: Ask, columns: list[str]) -> pa.Table:
        return _dataset(url, self.FILE).to_table(columns=columns, filter=ask.arrow())


class Zarr(_Catalogued):
    """Sharded Zarr v3: all payloads end to end in one uint8 array, the first byte of each in a second one."""

    name = "zarr"
    _CHUNK, _SHARD = 1 << 15, 1 << 23
    _ROWS = 4096
    _BATCH_BYTES = 16 << 20

    def write(self, folder: Path, tiles: Tiles) -> None:
        """Write the tiles."""
        import zarr

        group = zarr.open_group(str(folder), mode="w", zarr_format=3)
        payloads = tiles.payloads
        size = len(payloads.data)
        shard = min(self._SHARD, -(-size // self._CHUNK) * self._CHUNK)
        made = group.create_array(
            "payload", shape=(size,), dtype="uint8", chunks=(self._CHUNK,), shards=(shard,), compressors=None
        )
        made[:] = payloads.data
        ends = np.append(payloads.start, size)
        group.create_array("start", shape=ends.shape, dtype="int64", chunks=(self._ROWS,))[:] = ends
        number = pa.array(np.arange(len(payloads)), pa.int32())
        self._write_catalog(folder, tiles.rows.append_column("number", number))

    def pull(self, url: str, ask: Ask) -> Iterator[Batch]:
        """Ids and payloads of the tiles that fit."""
        found = self._find(url, ask, ["tile_id", "number"])
        number = found["number"].to_numpy()
        ids = found["tile_id"].to_pylist()
        run = self._loop().run
        array, start = run(self._open(url, number))
        first, last = start[number], start[number + 1]
        cuts = np.flatnonzero(np.diff(np.cumsum(last - first) // self._BATCH_BYTES)) + 1
        for part in np.split(np.arange(len(number)), cuts):
            # Neighbours lie end to end: what touches is one read.
            runs = np.split(part, np.flatnonzero(first[part][1:] != last[part][:-1]) + 1)
            spans = [(int(first[each[0]]), int(last[each[-1]])) for each in runs]
            data = np.concatenate(run(self._read(array, spans)))
            length = last[part] - first[part]
            yield [ids[i] for i in part], Payloads(data, np.cumsum(length) - length, length)

    @staticmethod
    @functools.cache
    def _loop() -> asyncio.Runner:
        """One event loop for the process: s3fs keeps the connections of the loop that it was made in."""
        return asyncio.Runner()

    async def _open(self, url: str, number: npt.NDArray[np.int32]) -> tuple[Any, npt.NDArray[np.int64]]:
        """The payload array, and the starts of the tiles asked for (the others' are 0)."""
        import zarr.api.asynchronous as zarr

        options = {"asynchronous": True, "default_cache_type": "none"} if url.startswith("s3://") else None
        array, start = await asyncio.gather(
            *(
                zarr.open_array(store=f"{url}/{name}", mode="r", storage_options=options)
                for name in ("payload", "start")
            )
        )
        out = np.zeros(start.shape[0], np.int64)
        chunks = np.unique(np.concatenate([number // self._ROWS, (number + 1) // self._ROWS]))
        spans = [(int(n) * self._ROWS, min(int(n + 1) * self._ROWS, len(out))) for n in chunks]
        for (begin, end), values in zip(spans, await self._read(start, spans), strict=True):
            out[begin:end] = values
        return array, out

    @staticmethod
    async def _read(array: Any, spans: Sequence[tuple[int, int]]) -> list[Any]:
        return list(await asyncio.gather(*(array.getitem(slice(*span)) for span in spans)))

    def split(self, folder: Path) -> Split | None:
        """Where the payload bytes are."""
        shards = [path for path in (folder / "payload").rglob("*") if path.is_file() and path.name != "zarr.json"]
        return {
            str(path.relative_to(folder)): [(0, path.stat().st_size // self._CHUNK * self._CHUNK)] for path in shards
        }


class Npy(_Catalogued):
    """One .npy a tile, in folders by grid row; numpy on local disks, s3fs over S3."""

    name = "npy"
    _AT_ONCE = 1000

    def write(self, folder: Path, tiles: Tiles) -> None:
        """Write the tiles."""
        folder.mkdir(parents=True)
        self._write_catalog(folder, tiles.rows)
        for tile_id, payload in zip(tiles.rows["tile_id"].to_pylist(), tiles.payloads, strict=True):
            path = folder / self.path(tile_id)
            path.parent.mkdir(exist_ok=True)
            np.save(path, np.frombuffer(payload, np.uint8))

    @staticmethod
    def path(tile_id: str) -> str:
        """Where a tile lies."""
        return f"{tile_id.partition('_')[0]}/{tile_id}.npy"

    def pull(self, url: str, ask: Ask) -> Iterator[Batch]:
        """Ids and payloads of the tiles that fit."""
        ids = self._find(url, ask, ["tile_id"])["tile_id"].to_pylist()
        for start in range(0, len(ids), self._AT_ONCE):
            part = ids[start : start + self._AT_ONCE]
            yield part, self._load(url, [f"{url}/{self.path(tile_id)}" for tile_id in part])

    @staticmethod
    def _load(url: str, paths: list[str]) -> list[Any]:
        if not url.startswith("s3://"):
            return [np.load(path) for path in paths]
        import fsspec

        files = fsspec.filesystem("s3", default_cache_type="none", use_listings_cache=False)
        # `cat` would ask for each object's head first: twice the requests.
        keys = [path.removeprefix("s3://") for path in paths]
        found = files.cat_ranges(keys, None, None, on_error="raise", max_concurrency=1)
        return [np.load(io.BytesIO(body)) for body in found]

    def split(self, folder: Path) -> Split | None:
        """Where the payload bytes are."""
        return {str(path.relative_to(folder)): [(0, path.stat().st_size)] for path in folder.rglob("*.npy")}


LAYOUTS: dict[str, Layout] = {layout.name: layout for layout in (Nec(), Parquet(), Lance(), Zarr(), Npy())}


def upload(folder: Path, store: Store, names: Sequence[str]) -> None:
    """Copy files of a local folder, some at a time."""
    with ThreadPoolExecutor(8) as pool:
        for _ in pool.map(lambda name: store.create_from(name, folder / name), names):
            pass


def _binary(payloads: Payloads) -> pa.Array:
    ends = np.append(payloads.start, len(payloads.data)).astype(np.int64)
    return pa.LargeBinaryArray.from_buffers(
        pa.large_binary(), len(payloads), [None, pa.py_buffer(ends), pa.py_buffer(payloads.data)]
    )


def _payloads(column: Any) -> Payloads:
    """An Arrow array's bytes, where they lie."""
    column = column.cast(pa.large_binary())
    ends = np.frombuffer(column.buffers()[1], np.int64)[column.offset : column.offset + len(column) + 1]
    data = np.frombuffer(column.buffers()[2] or b"", np.uint8)
    return Payloads(data, ends[:-1], np.diff(ends))


def _write_parquet(path: Path, table: pa.Table, row_group: int, packed: list[str]) -> None:
    leaves = [name for name in table.column_names if name in packed]
    compression = dict.fromkeys(_leaf_names(table.schema), "zstd") | {
        name: "none" for name in table.column_names if name not in leaves
    }
    dictionary = ["source", "source_etag", "sensor", "crs", "label", "codec_id", "status"]
    pq.write_table(table, path, row_group_size=row_group, compression=compression, use_dictionary=dictionary)


def _leaf_names(schema: pa.Schema) -> list[str]:
    meta = io.BytesIO()
    pq.write_table(schema.empty_table(), meta)
    found = pq.read_metadata(meta).schema
    return [found.column(i).path for i in range(len(found.names))]


def _dataset(url: str, name: str) -> pads.Dataset:
    options = pads.ParquetFragmentScanOptions(pre_buffer=True)
    form = pads.ParquetFileFormat(default_fragment_scan_options=options)
    if not url.startswith("s3://"):
        return pads.dataset(f"{url}/{name}", format=form)
    from pyarrow.fs import S3FileSystem

    endpoint = urlsplit(os.environ.get("AWS_ENDPOINT_URL", ""))
    files = S3FileSystem(
        region=os.environ.get("AWS_DEFAULT_REGION"), scheme=endpoint.scheme or None, endpoint_override=endpoint.netloc
    )
    return pads.dataset(f"{url}/{name}".removeprefix("s3://"), filesystem=files, format=form)


def _scan(dataset: pads.Dataset, ask: Ask, columns: list[str]) -> Iterator[Batch]:
    for batch in dataset.to_batches(columns=columns, filter=ask.arrow()):
        if batch.num_rows:
            yield batch["tile_id"].to_pylist(), _payloads(batch["payload"])


def _lance(url: str) -> Any:
    import lance

    if not url.startswith("s3://"):
        return lance.dataset(url)
    endpoint = os.environ.get("AWS_ENDPOINT_URL", "")
    options = {"aws_region": os.environ.get("AWS_DEFAULT_REGION", "us-east-1")}
    if endpoint:
        options |= {"aws_endpoint": endpoint, "allow_http": str(endpoint.startswith("http://")).lower()}
    return lance.dataset(url, storage_options=options)

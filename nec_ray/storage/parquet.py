"""Some columns of a Parquet object, by ranges.

Arrow reads a Python file from its own threads, and one that still holds the file when the interpreter ends aborts the
process. So the ranges are fetched here, and Arrow is given memory of its own.
"""

from collections.abc import Iterator, Sequence

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from nec_ray.storage.store import Store

_TAIL = 1 << 16
_GAP = 1 << 16
"""A gap that is read along: about what a request of its own would cost."""


def read_columns(store: Store, name: str, columns: Sequence[str]) -> pa.Table:
    """Columns of a Parquet object, in as few requests as their places allow.

    Raises:
        pa.ArrowException, OSError: it is no Parquet file that reads, or a column is not in it.
        StorageError: it cannot be reached, or is shorter than its footer says.
    """
    size = store.size(name)
    memory = pa.allocate_buffer(size)  # pages that nothing is written to take no memory
    view = np.frombuffer(memory, np.uint8)
    tail = max(0, size - _TAIL)
    view[tail:] = np.frombuffer(store.read_range(name, tail, size), np.uint8)
    footer = size - 8 - int.from_bytes(bytes(view[-8:-4]), "little")
    if view[-4:].tobytes() != b"PAR1" or footer < 4:
        raise pa.ArrowInvalid("no Parquet footer at its end")
    if footer < tail:
        view[footer:tail] = np.frombuffer(store.read_range(name, footer, tail), np.uint8)
    file = pq.ParquetFile(pa.BufferReader(memory))
    missing = sorted(set(columns) - set(file.schema_arrow.names))
    if missing:
        raise pa.ArrowInvalid(f"no column {', '.join(missing)}")
    wanted = list(_joined(sorted(_chunks(file.metadata, set(columns), footer))))
    for (start, end), data in zip(wanted, store.read_ranges([(name, *one) for one in wanted]), strict=True):
        view[start:end] = np.frombuffer(data, np.uint8)
    return file.read(columns=list(columns))


def _chunks(metadata: pq.FileMetaData, columns: set[str], limit: int) -> Iterator[tuple[int, int]]:
    """Where the column chunks lie; the footer comes from outside."""
    for group in range(metadata.num_row_groups):
        for index in range(metadata.num_columns):
            chunk = metadata.row_group(group).column(index)
            if chunk.path_in_schema.split(".")[0] in columns:
                start = chunk.data_page_offset
                if chunk.has_dictionary_page and chunk.dictionary_page_offset is not None:
                    start = min(start, chunk.dictionary_page_offset)
                end = start + chunk.total_compressed_size
                if not 0 <= start <= end <= limit:
                    raise pa.ArrowInvalid("its footer names bytes that it does not have")
                yield start, end


def _joined(ranges: Sequence[tuple[int, int]]) -> Iterator[tuple[int, int]]:
    """Sorted ranges, neighbours in one."""
    current: tuple[int, int] | None = None
    for start, end in ranges:
        if current is not None and start <= current[1] + _GAP:
            current = current[0], max(end, current[1])
        else:
            if current is not None:
                yield current
            current = start, end
    if current is not None:
        yield current

"""HDF5 files from outside: nothing that they say about other files or programs is followed, nor any size believed."""

import io
import itertools
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import h5py
import numpy as np

from nec_ray.errors import BadSource
from nec_ray.storage import Store

MOST_BYTES = 1 << 28
"""Of a chunk, and of one sample of a data set: hundreds of times the largest of the published files."""
_MOST_INFLATION = 1100
"""Deflate makes nothing more than 1032 times smaller."""
_SLACK = 1024  # bytes that a packed chunk may be longer than a plain one, beside a hundredth
_BUFFER = 1 << 16


@contextmanager
def opened(store: Store, name: str) -> Iterator[Any]:
    """An HDF5 file for reading.

    Raises:
        BadSource: it is none.
        NotFound: nothing is there.
    """
    where = f"{store.url}/{name}"
    with store.open(name) as data:
        # HDF5 reads its trees some bytes at a time, each a request on an object store.
        source = data if store.is_local or not isinstance(data, io.RawIOBase) else io.BufferedReader(data, _BUFFER)
        try:
            file = h5py.File(source, "r")
        except (OSError, ValueError, KeyError, RuntimeError) as error:
            raise BadSource(f"{where}: cannot be read as HDF5 ({line(error)})") from None
        with file:
            yield file


def dataset(file: Any, name: str, where: str) -> Any:
    """A data set that lies in the file itself: HDF5 can refer to other files, and to programs that decode.

    Raises:
        BadSource: it is not there, lies elsewhere, or one sample of it or one chunk would fill the memory.
    """
    try:
        link = file.get(name, getlink=True)
        found = file.get(name) if isinstance(link, h5py.HardLink) else None
        if not isinstance(found, h5py.Dataset):
            raise BadSource(f"{where}: no MMEarth file, it has no data set {name} of its own")
        if found.external or found.is_virtual:
            raise BadSource(f"{where}: its data set {name} lies in other files, which are not read")
        filters = found.id.get_create_plist()
        known = {h5py.h5z.FILTER_DEFLATE, h5py.h5z.FILTER_SHUFFLE, h5py.h5z.FILTER_FLETCHER32}
        if any(filters.get_filter(i)[0] not in known for i in range(filters.get_nfilters())):
            raise BadSource(
                f"{where}: its data set {name} is compressed by another filter than gzip; write it with gzip"
            )
        if found.dtype.hasobject or found.id.get_type().get_size() != found.dtype.itemsize:
            raise BadSource(f"{where}: its data set {name} holds no plain numbers or texts of one length")
        shapes = {"a chunk": found.chunks or (1,), "a sample": found.shape[1:]}
        for what, shape in shapes.items():
            whole = int(np.prod(shape, dtype=object)) * found.dtype.itemsize
            if whole > MOST_BYTES:
                raise BadSource(f"{where}: {what} of {name} has {whole:,} bytes, {MOST_BYTES:,} are the most")
    except (OSError, ValueError, KeyError, RuntimeError, TypeError) as error:
        raise BadSource(f"{where}: its data set {name} does not read ({line(error)})") from None
    return found


def whole(found: Any, name: str, where: str) -> Any:
    """All of a small data set.

    Raises:
        BadSource: it claims more than the bytes that the file holds of it can be, or does not read.
    """
    claimed = int(np.prod(found.shape, dtype=object)) * found.dtype.itemsize
    if claimed > _MOST_INFLATION * found.id.get_storage_size():
        raise BadSource(f"{where}: its data set {name} claims {claimed:,} bytes, which the file does not hold")
    return part(found, 0, found.shape[0], name, where)


def part(found: Any, start: int, stop: int, name: str, where: str) -> Any:
    """Samples `start` to `stop` of a data set that `dataset` gave.

    Chunks are unpacked here: HDF5's own code unpacks what is in them, whatever the size that a chunk should have.

    Raises:
        BadSource: they do not read, or a chunk holds more or less than it should.
    """
    try:
        if found.chunks is None:
            return found[start:stop]
        made = np.full((stop - start, *found.shape[1:]), found.fillvalue, found.dtype)
        firsts = [range(start // found.chunks[0] * found.chunks[0], stop, found.chunks[0])]
        firsts += [range(0, size, chunk) for size, chunk in zip(found.shape[1:], found.chunks[1:], strict=True)]
        filters = _filters(found)
        for corner in itertools.product(*firsts):
            values = _chunk(found, corner, filters)
            if values is not None:
                begin = max(corner[0], start)
                values = values[begin - corner[0] : stop - corner[0]]
                to = made[(slice(begin - start, None), *(slice(first, None) for first in corner[1:]))]
                to = to[tuple(slice(0, size) for size in values.shape)]
                to[...] = values[tuple(slice(0, size) for size in to.shape)]  # what juts out at the edges is cut off
    except (OSError, ValueError, KeyError, RuntimeError, TypeError, zlib.error) as error:
        raise BadSource(f"{where}: samples from {start} of {name} do not read ({line(error)})") from None
    return made


def _filters(found: Any) -> list[int]:
    made = found.id.get_create_plist()
    return [made.get_filter(i)[0] for i in range(made.get_nfilters())]


def _chunk(found: Any, corner: tuple[int, ...], filters: list[int]) -> Any:
    """The chunk that begins at a corner; None where the file has none."""
    size = int(np.prod(found.chunks)) * found.dtype.itemsize
    stored = found.id.get_chunk_info_by_coord(corner)
    if stored.byte_offset is None:
        return None
    if stored.size > size + size // 100 + _SLACK:
        raise ValueError(f"a chunk of {size:,} bytes takes {stored.size:,} packed")
    left_out, data = found.id.read_direct_chunk(corner)
    for i, kind in reversed(list(enumerate(filters))):
        if left_out >> i & 1:
            continue
        if kind == h5py.h5z.FILTER_FLETCHER32:
            data = data[:-4]
        elif kind == h5py.h5z.FILTER_DEFLATE:
            data = zlib.decompressobj().decompress(data, size + _SLACK)
        elif kind == h5py.h5z.FILTER_SHUFFLE:
            data = np.frombuffer(data, np.uint8).reshape(found.dtype.itemsize, -1).T.tobytes()
    if len(data) != size:
        raise ValueError(f"a chunk of {size:,} bytes holds {len(data):,} or more")
    return np.frombuffer(data, found.dtype).reshape(found.chunks)


def line(error: Exception) -> str:
    """An error of a library in one line."""
    return " ".join(str(error).split())[:200] or type(error).__name__

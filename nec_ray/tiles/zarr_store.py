"""Folders of our stores as Zarr's own kind of store: read-only, with our patience and our errors."""

import asyncio
from collections.abc import AsyncIterator, Iterable

from zarr.abc.store import ByteRequest, OffsetByteRequest, RangeByteRequest
from zarr.abc.store import Store as ZarrStore
from zarr.core.buffer import Buffer, BufferPrototype, default_buffer_prototype

from nec_ray.errors import NotFound
from nec_ray.storage import Store


def read_only(store: Store, path: str) -> ZarrStore:
    """The folder `path` of a store for Zarr; objects that are not there are chunks that were never written."""
    return _ReadOnly(store, path)


class _ReadOnly(ZarrStore):
    supports_writes = supports_deletes = False
    supports_listing = True

    def __init__(self, store: Store, path: str) -> None:
        super().__init__(read_only=True)
        self._is_open = True
        self._store = store
        self._start = f"{path}/"
        self._names: list[str] | None = None

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _ReadOnly) and (other._store.url, other._start) == (self._store.url, self._start)

    def __hash__(self) -> int:
        return hash((self._store.url, self._start))

    async def get(
        self, key: str, prototype: BufferPrototype | None = None, byte_range: ByteRequest | None = None
    ) -> Buffer | None:
        try:
            data = await asyncio.to_thread(self._read, self._start + key, byte_range)
        except NotFound:
            return None  # a chunk that was never written
        return (prototype or default_buffer_prototype()).buffer.from_bytes(data)

    def _read(self, name: str, part: ByteRequest | None) -> bytes:
        if part is None:
            return self._store.read(name)
        if isinstance(part, RangeByteRequest):
            return self._store.read_range(name, part.start, part.end)
        size = self._store.size(name)
        start = part.offset if isinstance(part, OffsetByteRequest) else max(0, size - part.suffix)
        return self._store.read_range(name, start, size)

    async def get_partial_values(
        self, prototype: BufferPrototype, key_ranges: Iterable[tuple[str, ByteRequest | None]]
    ) -> list[Buffer | None]:
        return list(await asyncio.gather(*(self.get(key, prototype, part) for key, part in key_ranges)))

    async def exists(self, key: str) -> bool:
        return await asyncio.to_thread(self._store.exists, self._start + key)

    async def list(self) -> AsyncIterator[str]:
        async for name in self.list_prefix(""):
            yield name

    async def list_prefix(self, prefix: str) -> AsyncIterator[str]:
        if self._names is None:  # of a large store that takes a while
            names = await asyncio.to_thread(self._store.names, self._start.rstrip("/"))
            self._names = [name.removeprefix(self._start) for name in names]
        for name in self._names:
            if name.startswith(prefix):
                yield name

    async def list_dir(self, prefix: str) -> AsyncIterator[str]:
        start = f"{prefix.rstrip('/')}/" if prefix else ""
        seen = set()
        async for name in self.list_prefix(start):
            if (first := name.removeprefix(start).partition("/")[0]) not in seen:
                seen.add(first)
                yield first

    async def set(self, key: str, value: Buffer) -> None:
        raise PermissionError(f"{key}: {len(value)} bytes for a store that is only read")

    async def delete(self, key: str) -> None:
        raise PermissionError(key)

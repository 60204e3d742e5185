"""Packs: immutable objects of many payloads that describe themselves, so that the index can be rebuilt.

bytes 0-7      magic NECPACK1
bytes 8-39     codec id, 32 bytes
payloads       one after the other
footer         index rows of the pack's tiles as an Arrow IPC stream, payload.pack empty, in one zstd frame
               (plain in packs of before)
last 20 bytes  CRC-32 of the footer, uint32; its length, uint64 (little-endian); magic NECPACK1
"""

import hashlib
import tempfile
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self

import pyarrow as pa
import pyarrow.compute as pc
import zstandard

from nec_ray.archive.layout import pack_name
from nec_ray.contracts import arrow_schema
from nec_ray.errors import CorruptPack
from nec_ray.storage import Store
from nec_ray.storage.faults import typed_errors

MAX_BYTES = 256 << 20
"""Payload bytes of a pack at most."""

_MAGIC = b"NECPACK1"
_HEADER = len(_MAGIC) + 32
_TRAILER = 4 + 8 + len(_MAGIC)
_MAX_FOOTER = 1 << 30


class PackWriter:
    """Writes payloads of one codec as packs; a context that leaves no file of its own behind.

    Payloads are spooled on a local disk, so that a pack never lies in memory as a whole; it is there once it is
    complete, under the hash of its content. An equal one that is already there is success.
    """

    def __init__(self, store: Store, codec_id: str, most_bytes: int = MAX_BYTES) -> None:
        self._store = store
        self._codec_id = codec_id
        self._most_bytes = most_bytes
        self._rows: list[pa.Table] = []
        self._done: list[pa.Table] = []
        self._spool: Any = None
        self._start()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._spool.close()

    def add(self, rows: pa.Table, payloads: Sequence[bytes | None], lengths: Sequence[Sequence[int] | None]) -> None:
        """Add tiles.

        Args:
            rows: index rows; their `payload`, `sha256` and `n_bytes` are not looked at and may be missing.
            payloads: one a row, None for tiles that are not valid.
            lengths: bytes of each payload's layers.
        """
        start, size = 0, 0
        for n, payload in enumerate(payloads):
            if self._offset + size + len(payload or b"") > self._most_bytes and (self._rows or n > start):
                self._add(rows.slice(start, n - start), payloads[start:n], lengths[start:n])
                self._finish()
                start, size = n, 0
            size += len(payload or b"")
        self._add(rows.slice(start), payloads[start:], lengths[start:])

    def close(self) -> pa.Table:
        """Finish the last pack; whole index rows (schema index.json) of all tiles, in the order added."""
        if self._rows:
            self._finish()
        return pa.concat_tables([arrow_schema("index.json").empty_table(), *self._done])

    def _add(self, rows: pa.Table, payloads: Sequence[bytes | None], lengths: Sequence[Sequence[int] | None]) -> None:
        if not rows.num_rows:
            return
        references: list[dict[str, object] | None] = []
        with typed_errors(self._spool.name):
            for payload, layers in zip(payloads, lengths, strict=True):
                if payload is None:
                    references.append(None)
                    continue
                references.append({"pack": "", "offset": self._offset, "layer_lengths": layers})
                self._write(payload)
        columns = {
            "sha256": [None if p is None else hashlib.sha256(p).digest() for p in payloads],
            "n_bytes": [len(p or b"") for p in payloads],
            "payload": references,
        }
        schema = arrow_schema("index.json")
        arrays = [
            pa.array(columns[field.name], field.type) if field.name in columns else rows[field.name].cast(field.type)
            for field in schema
        ]
        self._rows.append(pa.table(arrays, schema=schema))

    def _start(self) -> None:
        self._spool = tempfile.NamedTemporaryFile(prefix="nec-pack-")  # noqa: SIM115  (closed by __exit__ and _finish)
        self._hash = hashlib.sha256()
        self._offset = 0
        self._write(_MAGIC + bytes.fromhex(self._codec_id))

    def _write(self, data: bytes) -> None:
        self._spool.write(data)
        self._hash.update(data)
        self._offset += len(data)

    def _finish(self) -> None:
        rows = pa.concat_tables(self._rows).combine_chunks()
        sink = pa.BufferOutputStream()
        with pa.ipc.new_stream(sink, rows.schema) as writer:
            writer.write_table(rows)
        footer = zstandard.ZstdCompressor().compress(sink.getvalue().to_pybytes())
        with typed_errors(self._spool.name):
            self._write(footer)
            self._write(zlib.crc32(footer).to_bytes(4, "little") + len(footer).to_bytes(8, "little") + _MAGIC)
            self._spool.flush()
        name = pack_name(self._codec_id, self._hash.hexdigest())
        if not self._store.create_from(name, Path(self._spool.name)):
            self._store.touch(name)  # an old one, which no version needs, might be gc's next
        self._spool.close()
        self._done.append(_with_pack(rows, name))
        self._rows = []
        self._start()


def write_pack(
    store: Store,
    codec_id: str,
    rows: pa.Table,
    payloads: Sequence[bytes | None],
    lengths: Sequence[Sequence[int] | None],
) -> pa.Table:
    """Write tiles as one pack, `PackWriter.add`'s arguments; their whole index rows, schema `index.json`."""
    with PackWriter(store, codec_id) as writer:
        writer.add(rows, payloads, lengths)
        return writer.close()


def read_footer(store: Store, name: str) -> pa.Table:
    """Index rows of a pack's tiles, schema `index.json`.

    Raises:
        CorruptPack: its header, trailer or footer does not read.
    """
    end, length, checksum = _trailer(store, name)
    footer = store.read_range(name, end - length, end)
    if zlib.crc32(footer) != checksum:
        raise CorruptPack(f"{store.url}/{name}: its footer's checksum does not match; restore the pack")
    try:
        with pa.ipc.open_stream(_unpacked(footer)) as reader:
            rows = reader.read_all()
        if not rows.schema.equals(arrow_schema("index.json")):
            raise CorruptPack(f"{store.url}/{name}: its footer has another schema")
        rows.validate(full=True)
    except (pa.ArrowException, zstandard.ZstdError, ValueError, OSError) as error:
        raise CorruptPack(f"{store.url}/{name}: its footer does not read ({error})") from None
    return _with_pack(rows, name)


def _unpacked(footer: bytes) -> bytes:
    if not footer.startswith(zstandard.FRAME_HEADER):
        return footer
    size = zstandard.frame_content_size(footer)
    if not 0 <= size <= _MAX_FOOTER:
        raise ValueError(f"{size} bytes, more than a footer may have")
    return zstandard.ZstdDecompressor().decompress(footer)


def payload_bytes(store: Store, name: str) -> int:
    """Bytes of the payloads in a pack, dead ones too.

    Raises:
        CorruptPack: its trailer does not read.
    """
    end, length, _ = _trailer(store, name)
    return end - length - _HEADER


def _trailer(store: Store, name: str) -> tuple[int, int, int]:
    """(where the footer ends, its length, its checksum)."""
    size = store.size(name)
    if size < _HEADER + _TRAILER:
        raise CorruptPack(f"{store.url}/{name}: {size} bytes are too few for a pack")
    trailer = store.read_range(name, size - _TRAILER, size)
    checksum, length = int.from_bytes(trailer[:4], "little"), int.from_bytes(trailer[4:12], "little")
    if trailer[12:] != _MAGIC or length > min(size - _HEADER - _TRAILER, _MAX_FOOTER):
        raise CorruptPack(f"{store.url}/{name}: not a pack, or cut off")
    return size - _TRAILER, length, checksum


def _with_pack(rows: pa.Table, name: str) -> pa.Table:
    """The rows, their payloads' pack filled in."""
    payload = rows["payload"].combine_chunks()
    valid = pc.is_valid(payload)
    position = rows.schema.get_field_index("payload")
    field = rows.schema.field(position)
    filled = pa.StructArray.from_arrays(
        [
            pc.if_else(valid, pa.scalar(name), pa.scalar(None, pa.string())),
            pc.struct_field(payload, "offset"),
            pc.struct_field(payload, "layer_lengths"),
        ],
        fields=list(field.type),
        mask=pc.invert(valid),
    )
    return rows.set_column(position, field, filled)

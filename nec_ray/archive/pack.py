"""Packs: immutable objects of many payloads that describe themselves, so that the index can be rebuilt.

bytes 0-7      magic NECPACK1
bytes 8-39     codec id, 32 bytes
payloads       one after the other
footer         index rows of the pack's tiles as an Arrow IPC stream, payload.pack empty
last 20 bytes  CRC-32 of the footer, uint32; its length, uint64 (little-endian); magic NECPACK1
"""

import hashlib
import zlib
from collections.abc import Sequence

import pyarrow as pa

from nec_ray.archive.layout import pack_name
from nec_ray.contracts import arrow_schema
from nec_ray.errors import CorruptPack
from nec_ray.storage import Store

_MAGIC = b"NECPACK1"
_HEADER = len(_MAGIC) + 32
_TRAILER = 4 + 8 + len(_MAGIC)
_MAX_FOOTER = 1 << 30


def write_pack(
    store: Store,
    codec_id: str,
    rows: pa.Table,
    payloads: Sequence[bytes | None],
    lengths: Sequence[Sequence[int] | None],
) -> pa.Table:
    """Write one pack; an equal one that is already there is success.

    Args:
        store: the archive.
        codec_id: codec of the payloads.
        rows: index rows without `payload`, `sha256` and `n_bytes`.
        payloads: one a row, None for tiles that are not valid.
        lengths: bytes of each payload's layers.

    Returns:
        The whole index rows, schema `index.json`.
    """
    offset = _HEADER
    references: list[dict[str, object] | None] = []
    for payload, layers in zip(payloads, lengths, strict=True):
        references.append(None if payload is None else {"pack": "", "offset": offset, "layer_lengths": layers})
        offset += len(payload or b"")
    schema = arrow_schema("index.json")
    columns = {
        "sha256": [None if p is None else hashlib.sha256(p).digest() for p in payloads],
        "n_bytes": [len(p or b"") for p in payloads],
        "payload": references,
    }
    whole = pa.table(
        [
            pa.array(columns[field.name], field.type) if field.name in columns else rows[field.name].cast(field.type)
            for field in schema
        ],
        schema=schema,
    )
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, schema) as writer:
        writer.write_table(whole)
    footer = sink.getvalue().to_pybytes()
    data = b"".join(
        [
            _MAGIC,
            bytes.fromhex(codec_id),
            *(p for p in payloads if p is not None),
            footer,
            zlib.crc32(footer).to_bytes(4, "little"),
            len(footer).to_bytes(8, "little"),
            _MAGIC,
        ]
    )
    name = pack_name(codec_id, hashlib.sha256(data).hexdigest())
    store.create(name, data)
    return _with_pack(whole, name)


def read_footer(store: Store, name: str) -> pa.Table:
    """Index rows of a pack's tiles, schema `index.json`.

    Raises:
        CorruptPack: its header, trailer or footer does not read.
    """
    size = store.size(name)
    if size < _HEADER + _TRAILER:
        raise CorruptPack(f"{store.url}/{name}: {size} bytes are too few for a pack")
    trailer = store.read_range(name, size - _TRAILER, size)
    checksum, length = int.from_bytes(trailer[:4], "little"), int.from_bytes(trailer[4:12], "little")
    if trailer[12:] != _MAGIC or length > min(size - _HEADER - _TRAILER, _MAX_FOOTER):
        raise CorruptPack(f"{store.url}/{name}: not a pack, or cut off")
    footer = store.read_range(name, size - _TRAILER - length, size - _TRAILER)
    if zlib.crc32(footer) != checksum:
        raise CorruptPack(f"{store.url}/{name}: its footer's checksum does not match; restore the pack")
    try:
        with pa.ipc.open_stream(footer) as reader:
            rows = reader.read_all()
        if not rows.schema.equals(arrow_schema("index.json")):
            raise CorruptPack(f"{store.url}/{name}: its footer has another schema")
        rows.validate(full=True)
    except (pa.ArrowInvalid, OSError) as error:
        raise CorruptPack(f"{store.url}/{name}: its footer does not read ({error})") from None
    return _with_pack(rows, name)


def _with_pack(rows: pa.Table, name: str) -> pa.Table:
    position = rows.schema.get_field_index("payload")
    field = rows.schema.field(position)
    filled = [None if p is None else {**p, "pack": name} for p in rows["payload"].to_pylist()]
    return rows.set_column(position, field, pa.array(filled, field.type))

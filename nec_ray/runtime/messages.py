"""Shards and tables as what Ray carries between processes."""

from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from nec_ray.runtime.plan import Shard


def shard_message(shard: Shard) -> dict[str, Any]:
    """A shard as plain values; what it replaces stays with the driver. A byte a tile says whether it is to do."""
    todo = pc.is_in(shard.rows["tile_id"], pa.array(shard.todo, pa.string())).to_numpy()
    return {"id": shard.id, "tiles": to_ipc(shard.rows), "todo": todo.astype(np.uint8).tobytes()}


def shard_of(message: dict[str, Any]) -> Shard:
    """The shard of a message."""
    rows = from_ipc(message["tiles"])
    todo = rows["tile_id"].filter(pa.array(np.frombuffer(message["todo"], np.uint8) > 0))
    return Shard(message["id"], rows, frozenset(todo.to_pylist()))


def to_ipc(table: pa.Table) -> bytes:
    """A table as an Arrow IPC stream."""
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    return bytes(sink.getvalue().to_pybytes())


def from_ipc(data: bytes) -> pa.Table:
    """The table of an Arrow IPC stream."""
    with pa.ipc.open_stream(data) as reader:
        return reader.read_all()

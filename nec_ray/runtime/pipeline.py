"""Encoding on Ray Data: shards -> pixels (CPU tasks) -> symbols, payloads, packs (an elastic actor pool)."""

import logging
from collections.abc import Iterator
from typing import Any

import numpy as np
import pyarrow as pa

from nec_ray.codec import Codec
from nec_ray.errors import RunError
from nec_ray.runtime.cluster import connect
from nec_ray.runtime.plan import Plan, Shard
from nec_ray.runtime.shard import Receipt, pack_shard, read_shard
from nec_ray.storage import Store
from nec_ray.tiles import TileBatch

# Encoder actors never hold all of a core: actors that hold every CPU starve the readers, without an error
# (ray-project/ray #44687), and reading a shard takes far less time than encoding it.
_ENCODER_CPUS = 0.75
_READER_CPUS = 0.25


def on_ray(todo: Plan, codec: Codec, store: Store, workers: int | None) -> Iterator[Receipt]:
    """Receipts of the plan's shards as they are finished, in no order.

    Args:
        todo: the plan.
        codec: the archive's copy of the codec, so that every worker can load it.
        store: the archive.
        workers: encoder actors; one a core where it is None.

    Raises:
        RunError: the cluster has too few cores, or lost its workers too often.
    """
    import ray
    from ray.data import ActorPoolStrategy, DataContext

    with connect():
        # The command line has a progress bar of its own; Ray Data sets its loggers' levels when it is imported.
        DataContext.get_current().enable_progress_bars = False
        logging.getLogger("ray.data").setLevel(logging.ERROR)
        cores = ray.cluster_resources().get("CPU", 0)
        most = int((cores - _READER_CPUS) // _ENCODER_CPUS)
        wanted = workers or int(cores)
        if wanted > most:
            needed = wanted * _ENCODER_CPUS + _READER_CPUS
            raise RunError(f"{wanted} encoders need {needed:g} cores, Ray has {cores:g}; use --workers {most}")
        shards = [_shard_row(shard) for shard in todo.shards()]
        size = min(wanted, len(shards))
        results = (
            ray.data.from_items(shards, override_num_blocks=len(shards))
            .map(_Read(codec.spec.model_dump_json()), num_cpus=_READER_CPUS)
            .map_batches(
                _Encode,
                fn_constructor_args=(store.url, codec.id),
                batch_size=1,
                compute=ActorPoolStrategy(min_size=1, max_size=size, initial_size=size),
                num_cpus=_ENCODER_CPUS,
            )
        )
        try:
            for row in results.iter_rows():
                yield Receipt(row["id"], _from_ipc(row["rows"]))
        except ray.exceptions.RayError as error:
            cause = str(error).strip().splitlines()[-1]
            raise RunError(f"the encoding run broke off ({cause}); run the same command again to go on") from error


class _Read:
    """CPU task: the pixels of one shard."""

    def __init__(self, spec: str) -> None:
        self._spec = spec

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        from nec_ray.codec import CodecSpec

        batch = read_shard(_shard(row), CodecSpec.model_validate_json(self._spec))
        return {
            **row,
            "pixels": np.ascontiguousarray(batch.pixels).tobytes(),
            "shape": list(batch.pixels.shape),
            "valid": batch.valid.tolist(),
            "status": list(batch.status),
            "reason": [reason or "" for reason in batch.reason],
            "nodata_share": batch.nodata_share.tobytes(),
        }


class _Encode:
    """Actor: one shard a call; the model is loaded once."""

    def __init__(self, archive_url: str, codec_id: str) -> None:
        from nec_ray.archive.layout import archive_codec
        from nec_ray.models.embed import Embedder

        self._store = Store(archive_url)
        self._codec = archive_codec(self._store, codec_id)
        self._embedder = Embedder(self._codec)

    def __call__(self, block: dict[str, Any]) -> dict[str, Any]:
        row = {name: values[0] for name, values in block.items()}
        pixels = np.frombuffer(row["pixels"], np.float32).reshape([int(n) for n in row["shape"]])
        batch = TileBatch(
            pixels=pixels,
            valid=np.array(row["valid"], np.int64),
            status=list(row["status"]),
            reason=[reason or None for reason in row["reason"]],
            nodata_share=np.frombuffer(row["nodata_share"], np.float32),
        )
        symbols = self._embedder.symbols(pixels)
        receipt = pack_shard(_shard(row), batch, symbols, self._codec, self._store)
        return {"id": [receipt.shard_id], "rows": [_to_ipc(receipt.rows)]}


def _shard_row(shard: Shard) -> dict[str, Any]:
    return {"id": shard.id, "tiles": _to_ipc(shard.rows), "todo": sorted(shard.todo)}


def _shard(row: dict[str, Any]) -> Shard:
    return Shard(row["id"], _from_ipc(row["tiles"]), frozenset(str(tile_id) for tile_id in row["todo"]))


def _to_ipc(table: pa.Table) -> bytes:
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    return bytes(sink.getvalue().to_pybytes())


def _from_ipc(data: bytes) -> pa.Table:
    with pa.ipc.open_stream(data) as reader:
        return reader.read_all()

"""Encoding on Ray Data: shards -> pixels (CPU tasks) -> symbols, payloads, packs (an elastic actor pool).

The plan is run in waves, so that neither the driver nor the object store ever holds more of it than one; a wave's pool
is sized by the nodes that are there when it begins, and grows with those that were asked for. Shards that a wave could
not finish are looked into one by one (isolate.py).
"""

import gc
import os
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass, replace
from itertools import chain, islice
from typing import Any

import numpy as np
import pyarrow.compute as pc

from nec_ray.codec import Codec
from nec_ray.errors import RunError
from nec_ray.runtime.cluster import RETRIES, asked_for, broke_off, connect, raise_own, ray_data, rows_of
from nec_ray.runtime.isolate import isolate
from nec_ray.runtime.messages import from_ipc, shard_message, shard_of, to_ipc
from nec_ray.runtime.plan import Shard
from nec_ray.runtime.shard import Receipt, pack_shard, read_shard
from nec_ray.storage import Store
from nec_ray.tiles import TileBatch

# Encoder actors never hold all of a core: actors that hold every CPU starve the readers, without an error
# (ray-project/ray #44687), and reading a shard takes far less time than encoding it.
_ENCODER_CPUS = 0.75
_GPU_ENCODER_CPUS = 0.25
_READER_CPUS = 0.25
_WAVE_TILES = 1 << 19
"""For up to 8 encoders; starting a pool takes seconds, so larger ones get larger waves."""
_LOST_SHARDS, _LOST_SHARE = 16, 0.05
"""That many of a wave may be left over, whichever is more; beyond it the cluster is more likely at fault, and the wave
is tried again."""
_ATTEMPTS = 3


Stages = tuple[Callable[[str], Callable[[dict[str, Any]], dict[str, Any]]], type]
"""A reader, made from a codec's spec as JSON, and an actor, made from the archive's URL, the codec's id and whether
there is a GPU: both take and give shard messages."""


@dataclass(frozen=True)
class Ask:
    """Nodes that the cluster's autoscaler is to bring."""

    cores: int = 0
    gpus: int = 0
    seconds: float = 0
    """How long to wait for all of them before beginning with what there is."""


NOTHING = Ask()


@dataclass(frozen=True)
class Pool:
    """Encoder actors: their number, and what each of them holds."""

    size: int
    """As many as fit the cluster now."""
    most: int
    """As many as fit once all nodes have come."""
    cpus: float
    gpus: float


def on_ray(
    shards: Iterator[Shard],
    codec: Codec,
    store: Store,
    workers: int | None,
    *,
    encoders_per_gpu: int = 1,
    ask: Ask = NOTHING,
    stages: Stages | None = None,
) -> Generator[Receipt]:
    """Receipts of shards as they are finished, in no order.

    Args:
        shards: what is to be encoded.
        codec: the archive's copy of the codec, so that every worker can load it.
        store: the archive.
        workers: encoder actors; one a core, or `encoders_per_gpu` a GPU where there are any, if it is None.
        encoders_per_gpu: models that share one GPU.
        ask: what the cluster's autoscaler is asked for.
        stages: other steps than reading and encoding, for measuring.

    Raises:
        RunError: the cluster has too few cores, or lost its workers too often.
    """
    with connect(), asked_for(ask.cores, ask.gpus, ask.seconds):
        for first in shards:
            pool = _pool(workers, encoders_per_gpu, ask)
            tiles = _WAVE_TILES * max(1, pool.most // 8)
            wave = {s.id: s for s in chain([first], islice(shards, tiles // max(1, first.rows.num_rows)))}
            yield from _finish(wave, codec, store, pool, stages or (_Read, _Encode))


def _finish(wave: dict[str, Shard], codec: Codec, store: Store, pool: Pool, stages: Stages) -> Generator[Receipt]:
    """Receipts of all shards of a wave."""
    import ray

    finished = False
    for attempt in range(_ATTEMPTS):
        lost = max(_LOST_SHARDS, int(_LOST_SHARE * len(wave)))
        if attempt == _ATTEMPTS - 1:
            lost = len(wave)  # a whole scene may be broken: then that is for `isolate` to say
        try:
            for receipt in _run(list(wave.values()), codec, store, pool, stages, lost):
                yield replace(receipt, replaces=wave.pop(receipt.shard_id).replaces)
                finished = True
            break
        except ray.exceptions.RayError as error:
            raise_own(error)  # such as a store that refuses: it will be the same the next time
            if attempt == _ATTEMPTS - 1:
                raise broke_off(error) from error
        finally:
            gc.collect()  # the pool's actors are part of a cycle, and keep their cores until then: for a minute or two
    fatal = 0
    for shard in wave.values():
        receipt = isolate(shard, codec, store, num_cpus=pool.cpus, num_gpus=pool.gpus)
        fatal += pc.all(pc.equal(receipt.rows["status"], "failed")).as_py()
        finished = finished or not fatal
        yield receipt
        if fatal >= _LOST_SHARDS and not finished:
            raise RunError(
                f"the processes that read or encode tiles die at every tile of {fatal} shards, and none was finished: "
                "see whether the nodes have the memory for this codec, then run the same command again"
            )


def _run(shards: list[Shard], codec: Codec, store: Store, pool: Pool, stages: Stages, lost: int) -> Generator[Receipt]:
    """One Ray Data run; as many shards as `lost` whose process dies again and again are left out."""
    import ray
    from ray.data import ActorPoolStrategy

    read, encode = stages
    most = min(pool.most, len(shards))
    messages = [shard_message(shard) for shard in shards]
    # A dropped block is a shard without a receipt: it is isolated. A pool may hang with -1 (ray-project/ray #62746).
    with ray_data(lost_blocks=lost):
        blocks = ray.data.from_items(messages, override_num_blocks=len(messages))
        pixels = blocks.map(read(codec.spec.model_dump_json()), num_cpus=_READER_CPUS, max_retries=RETRIES)
        results = pixels.map_batches(
            encode,
            fn_constructor_args=(store.url, codec.id, pool.gpus > 0),
            batch_size=1,
            compute=ActorPoolStrategy(min_size=1, max_size=most, initial_size=min(pool.size, most)),
            num_cpus=pool.cpus,
            num_gpus=pool.gpus or None,
            max_task_retries=RETRIES,
        )
    for row in rows_of(results):
        yield Receipt(row["id"], from_ipc(row["rows"]), worker=row["worker"])


class _Read:
    """CPU task: the pixels of one shard."""

    def __init__(self, spec: str) -> None:
        self._spec = spec

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        from nec_ray.codec import CodecSpec

        batch = read_shard(shard_of(row), CodecSpec.model_validate_json(self._spec))
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

    def __init__(self, archive_url: str, codec_id: str, gpu: bool) -> None:
        import ray

        from nec_ray.archive.layout import archive_codec
        from nec_ray.models.embed import Embedder

        self._worker = f"{ray.get_runtime_context().get_node_id()[:12]}/{os.getpid()}"
        self._store = Store(archive_url)
        self._codec = archive_codec(self._store, codec_id)
        self._embedder = Embedder(self._codec, "cuda" if gpu else "cpu")

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
        receipt = pack_shard(shard_of(row), batch, symbols, self._codec, self._store)
        return {"id": [receipt.shard_id], "rows": [to_ipc(receipt.rows)], "worker": [self._worker]}


def _pool(workers: int | None, encoders_per_gpu: int, ask: Ask) -> Pool:
    import ray

    there = ray.cluster_resources()
    cores, gpus = float(there.get("CPU", 0)), float(there.get("GPU", 0))
    cpus = _GPU_ENCODER_CPUS if gpus else _ENCODER_CPUS

    def encoders(cores: float, gpus: float) -> tuple[int, int]:
        """As many as there are by themselves, and at most."""
        fit = int((cores - _READER_CPUS) // cpus)
        return (int(gpus * encoders_per_gpu), min(fit, int(gpus * encoders_per_gpu))) if gpus else (int(cores), fit)

    now, later = encoders(cores, gpus), encoders(max(cores, ask.cores), max(gpus, ask.gpus) if gpus else 0)
    if later[1] < 1:
        raise RunError("Ray has no core for an encoder; add nodes, or ask the autoscaler for them (`cores` of the job)")
    wanted = workers or later[0]
    if wanted > later[1]:
        needed = f"{wanted * cpus + _READER_CPUS:g} cores" + (
            f" and {wanted / encoders_per_gpu:g} GPUs" if gpus else ""
        )
        there_are = f"{cores:g}" + (f" and {gpus:g}" if gpus else "")
        raise RunError(f"{wanted} encoders need {needed}, Ray has {there_are}; use --workers {later[1]}")
    return Pool(max(1, min(wanted, now[1])), wanted, cpus, 1 / encoders_per_gpu if gpus else 0)

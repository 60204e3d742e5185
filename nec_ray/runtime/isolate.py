"""Finds the tiles that kill the process which reads or encodes them, by bisection, and encodes the rest of their shard.

A broken file can crash a decoder, or ask for more memory than a node has: no exception tells of it, the process is
gone. Every step runs in a Ray task of its own, so that only that one dies.
"""

from typing import Any

from nec_ray.codec import Codec
from nec_ray.errors import RunError
from nec_ray.runtime.cluster import broke_off, raise_own
from nec_ray.runtime.messages import from_ipc, shard_message, shard_of, to_ipc
from nec_ray.runtime.plan import Shard
from nec_ray.runtime.shard import Receipt, encode_shard, read_shard
from nec_ray.storage import Store

_DEATHS = 2
"""Of processes that had the same tiles, before these are to blame: one may have been a node that went."""
_DIED = object()
_REASON = "the process that read or encoded it died without an exception, as often as it was tried"


def isolate(shard: Shard, codec: Codec, store: Store, *, num_cpus: float, num_gpus: float) -> Receipt:
    """Encode a shard whose tiles may kill the process; those that do become failed tiles with a reason.

    The others are encoded as if those had been unreadable: the same batch, the same payloads on every run.

    Args:
        shard: the shard.
        codec: the archive's copy of the codec.
        store: the archive.
        num_cpus: cores that Ray counts for a process.
        num_gpus: GPUs, or shares of one.

    Raises:
        RunError: processes die, but no single tile is to blame: too little memory for a shard, say.
    """
    import ray

    options = {"num_cpus": num_cpus, "num_gpus": num_gpus, "max_retries": 0}
    read, embed, encode = (ray.remote(**options)(step) for step in (_read, _embed, _encode))
    message = shard_message(shard)

    def attempt(deaths: int, task: Any, *args: Any) -> Any:
        """The task's result; `_DIED` where its process died so often."""
        for _ in range(deaths):
            try:
                return ray.get(task.remote(message, *args))
            except (ray.exceptions.WorkerCrashedError, ray.exceptions.OutOfMemoryError):
                continue
            except ray.exceptions.RayError as error:
                raise_own(error)
                raise broke_off(error) from error
        return _DIED

    def bisect(task: Any, rows: list[int], *args: Any) -> list[int]:
        if attempt(_DEATHS if len(rows) == 1 else 1, task, rows, *args) is not _DIED:
            return []
        if len(rows) == 1:
            return rows
        half = len(rows) // 2
        return bisect(task, rows[:half], *args) + bisect(task, rows[half:], *args)

    everything = list(range(shard.rows.num_rows))
    spec = codec.spec.model_dump_json()
    model = (store.url, codec.id, num_gpus > 0)
    # Reading needs no model: its processes start in a fraction of the time.
    broken = bisect(read, everything, spec)
    rows = attempt(_DEATHS, encode, *model, broken)
    if rows is _DIED:
        broken += bisect(embed, [row for row in everything if row not in broken], *model)
        rows = attempt(_DEATHS, encode, *model, broken)
    if rows is not _DIED:
        return Receipt(shard.id, from_ipc(rows), shard.replaces)
    raise RunError(
        f"the processes that encode a shard of {len(everything)} tiles die, though of no single tile, beginning with "
        f"{shard.rows['tile_id'][0].as_py()}; give the nodes more memory, then run the same command again"
    )


def _read(message: dict[str, Any], rows: list[int], spec: str) -> None:
    from nec_ray.codec import CodecSpec

    read_shard(_part(message, rows), CodecSpec.model_validate_json(spec))


def _embed(message: dict[str, Any], rows: list[int], archive_url: str, codec_id: str, gpu: bool) -> None:
    from nec_ray.archive.layout import archive_codec
    from nec_ray.models.embed import Embedder

    codec = archive_codec(Store(archive_url), codec_id)
    Embedder(codec, "cuda" if gpu else "cpu").symbols(read_shard(_part(message, rows), codec.spec).pixels)


def _encode(message: dict[str, Any], archive_url: str, codec_id: str, gpu: bool, broken: list[int]) -> bytes:
    from nec_ray.archive.layout import archive_codec
    from nec_ray.models.embed import Embedder

    store = Store(archive_url)
    codec = archive_codec(store, codec_id)
    embedder = Embedder(codec, "cuda" if gpu else "cpu")
    return to_ipc(encode_shard(shard_of(message), codec, store, embedder, dict.fromkeys(broken, _REASON)).rows)


def _part(message: dict[str, Any], rows: list[int]) -> Shard:
    shard = shard_of(message)
    return Shard(shard.id, shard.rows.take(rows), shard.todo)

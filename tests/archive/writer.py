"""A writer process for tests: appends shards until all are there, as an encoding run does; may be killed anywhere.

python -m tests.archive.writer URL WORKER SHARDS [SHARED]
"""

import sys

import numpy as np

from nec_ray import load_codec
from nec_ray.archive.index import Index
from nec_ray.archive.layout import codec_ids
from nec_ray.archive.pack import write_pack
from nec_ray.storage import Store
from tests.archive.make import TOKENS, index_rows
from tests.codec.make import SCALES, laplacian_symbols

TILES = 10


def tile_ids(worker: int, shard: int, shared: int) -> list[str]:
    """Tiles of a shard: its own, and some that every writer tries to commit."""
    return [f"w{worker}-{shard}-{i}" for i in range(TILES)] + [f"shared-{shard}-{i}" for i in range(shared)]


def symbols(tile_id: str) -> "np.ndarray":  # type: ignore[type-arg]
    """What a tile's payload holds, whoever encodes it."""
    rng = np.random.default_rng(np.frombuffer(tile_id.encode(), np.uint8))
    return laplacian_symbols(rng, SCALES, 1, TOKENS)[0]


def main(url: str, worker: int, shards: int, shared: int = 0) -> None:
    store = Store(url)
    codec = load_codec(f"{url}/codecs/{codec_ids(store)[0]}")
    index = Index(store)
    base = index.version()
    there = set(index.read(base.files, ["tile_id"])["tile_id"].to_pylist())
    sys.stdout.write("started\n")
    sys.stdout.flush()
    for shard in range(shards):
        todo = [tile_id for tile_id in tile_ids(worker, shard, shared) if tile_id not in there]
        if not todo:
            continue
        payloads = codec.compress(np.stack([symbols(tile_id) for tile_id in todo]))
        lengths = codec.layer_lengths(payloads).tolist()
        rows = write_pack(store, codec.id, index_rows(todo, codec.id), list(payloads), lengths)
        index.append(base, rows, shards=[f"{worker}-{shard}"])


if __name__ == "__main__":
    main(sys.argv[1], *map(int, sys.argv[2:]))

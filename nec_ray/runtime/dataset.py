"""An archive's embeddings as a Ray data set: blocks decoded in Ray tasks, from ranges of the packs of one version."""

from typing import TYPE_CHECKING, Any

from nec_ray.archive import Archive, Part
from nec_ray.codec import parts_of
from nec_ray.errors import InputError
from nec_ray.runtime.cluster import ray_data

if TYPE_CHECKING:
    from ray.data import Dataset


def ray_dataset(
    archive: Archive,
    where: str | None = None,
    layers: int | None = None,
    tiles: int = 1024,
    *,
    within: Any = None,
    time: Any = None,
) -> "Dataset":
    """An archive's valid tiles as a Ray data set with the columns `tile_id` and `embedding`.

    `embedding` is a float32 tensor (tokens, channels); of several grid scales there is one a scale, `embedding_0` the
    coarsest. Where the payloads are is looked up once, here: tasks read
    them and nothing of the index, so that all blocks are of the version that `archive` is pinned to.

    Args:
        archive: what `nec_ray.open_archive` gives, at a URL that all nodes reach.
        where: an SQL condition over `embeddings`; all tiles where it is None.
        layers: only the first layers of each payload; all where it is None.
        tiles: tiles a block.
        within: a region, see `Archive.select`.
        time: of acquisition, see `Archive.select`.

    Raises:
        InputError: no tile fits, a codec has fewer layers, or `tiles` is below 1.
        MixedCodecs: the tiles are of several encoders, or of codecs that do not all have the layers asked for.
    """
    import ray

    parts = archive.parts(where, layers, tiles, within=within, time=time)
    if not ray.is_initialized():
        raise InputError(f"{archive.url}: no Ray to read it with; call ray.init() first")
    with ray_data():
        return ray.data.read_datasource(_source(parts), override_num_blocks=len(parts))


def _source(parts: list[Part]) -> Any:
    from ray.data import Datasource, ReadTask
    from ray.data.block import BlockMetadata

    class Parts(Datasource):
        """A read task a part."""

        def estimate_inmemory_data_size(self) -> int | None:
            return None

        def get_read_tasks(
            self,
            parallelism: int,  # noqa: ARG002  (parts are what they are)
            per_task_row_limit: int | None = None,
            data_context: Any = None,  # noqa: ARG002
        ) -> list[Any]:
            return [
                ReadTask(
                    lambda part=part: [_block(part)],
                    BlockMetadata(len(part), None, None, None),
                    per_task_row_limit=per_task_row_limit,
                )
                for part in parts
            ]

    return Parts()


def _block(part: Part) -> Any:
    from ray.data.block import BlockAccessor

    pull = part.pull()
    scales = parts_of(pull.embeddings)
    names = ["embedding"] if len(scales) == 1 else [f"embedding_{i}" for i in range(len(scales))]
    return BlockAccessor.batch_to_block({"tile_id": pull.tile_ids, **dict(zip(names, scales, strict=True))})

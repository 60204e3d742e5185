"""Tiles for training: read once by Ray Data on all nodes, a fixed share for every worker, kept on the worker's disk."""

import tempfile
from collections.abc import Iterable
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from nec_ray.codec import InputSpec
from nec_ray.errors import BadSource
from nec_ray.runtime.cluster import ray_data
from nec_ray.runtime.recipe import Recipe
from nec_ray.tiles import Catalog, read_tiles

_STATISTICS_TILES = 1024
_READ_TILES = 128
_CONSTANT = 1e-6
"""A band whose standard deviation is below this share of its mean carries nothing, and is not blown up."""
_LARGEST_INPUT = 1e4
"""Standard deviations from the mean at which pixels are cut off, within the range of float16."""
_MOST_NODATA = 0.5
"""A tile with more missing pixels than this teaches nothing."""
_IMAGENET = {"mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225]}
_UINT8 = 255.0


def bands_of(recipe: Recipe, catalog: Catalog) -> list[str]:
    """The bands that are trained on: the recipe's, those of MP-MAE's inputs, or all of the catalog's first tile.

    Raises:
        BadSource: the catalog is empty.
    """
    if recipe.data.bands:
        return list(recipe.data.bands)
    if recipe.pretrains_mp_mae:
        from nec_ray.models.pretext import BANDS

        return list(BANDS[recipe.model.inputs or "s2"])
    if not catalog.table.num_rows:
        raise BadSource(f"{recipe.data.catalog}: no tiles in it; build a catalog with nec tiles build")
    first: list[str] = catalog.table["bands"][0].as_py()
    return first


def input_of(recipe: Recipe, catalog: Catalog) -> InputSpec:
    """What the encoder is fed, with the statistics that scale it.

    Raises:
        BadSource: no tile of a sample is whole, or the statistics that are asked for are of another number of bands.
    """
    bands, size = bands_of(recipe, catalog), recipe.data.size
    if recipe.data.mean and recipe.data.std:
        if len(bands) != len(recipe.data.mean):
            raise BadSource(f"{recipe.data.catalog}: {len(bands)} bands; data.mean has {len(recipe.data.mean)} numbers")
        return InputSpec(bands=bands, mean=recipe.data.mean, std=recipe.data.std, size=size)
    if recipe.data.normalise == "imagenet":
        if len(bands) != 3:
            raise BadSource(f"{recipe.data.catalog}: {len(bands)} bands; data.normalise imagenet is for three")
        scaled = {name: [value * _UINT8 for value in values] for name, values in _IMAGENET.items()}
        return InputSpec(bands=bands, size=size, **scaled)
    rows = sample_of(catalog.table, _STATISTICS_TILES)
    # From tiles without missing pixels, so that what these are filled with does not enter.
    probe = read_tiles(rows, bands=bands, size=size, fill=[0.0] * len(bands))
    whole = probe.pixels[probe.nodata_share[probe.valid] == 0]
    if not len(whole):
        raise BadSource(f"{recipe.data.catalog}: no tile of the sample is whole; the statistics need some")
    mean = whole.mean(axis=(0, 2, 3), dtype=np.float64)
    std = whole.std(axis=(0, 2, 3), dtype=np.float64)
    std = np.where(std > _CONSTANT * np.maximum(1, np.abs(mean)), std, 1.0)
    return InputSpec(bands=bands, mean=mean.tolist(), std=std.tolist(), size=size)


def shares(recipe: Recipe, catalog: Catalog, spec: InputSpec) -> list[Any]:
    """A materialised Ray data set for each worker, of equally many tiles: column `pixels`, normalised, float16.

    Which tiles are whose depends on the seed and the number of workers alone. Ray keeps them in its object store,
    which spills to disk.

    Raises:
        BadSource: fewer usable tiles than workers.
    """
    import ray

    rows = sample_of(catalog.table, recipe.data.max_tiles)
    rows = rows.take(pa.array(np.random.default_rng(recipe.train.seed).permutation(rows.num_rows)))
    with ray_data(ordered=True):
        starts = [{"start": start} for start in range(0, rows.num_rows, _READ_TILES)]
        read = _Read(ray.put(rows), spec.model_dump_json())
        tiles = ray.data.from_items(starts, override_num_blocks=len(starts)).map_batches(read, batch_size=1)
        tiles = tiles.materialize()
        count, workers = tiles.count(), recipe.train.workers
        if count < workers:
            raise BadSource(f"{recipe.data.catalog}: {count} usable tiles for {workers} workers")
        share = count // workers
        return list(tiles.split_at_indices([share * (i + 1) for i in range(workers)])[:workers])


def local_copy(batches: Iterable[dict[str, npt.NDArray[np.float16]]]) -> npt.NDArray[np.float16]:
    """Pixels float16 (tiles, bands, size, size) of a share, mapped from a temporary file that ends with the process."""
    tiles, shape = 0, tuple[int, ...]()
    with tempfile.TemporaryFile(prefix="nec-train-") as file:
        for batch in batches:
            pixels = np.ascontiguousarray(batch["pixels"], np.float16)
            pixels.tofile(file)
            tiles, shape = tiles + len(pixels), pixels.shape[1:]
        file.flush()
        return np.memmap(file, np.float16, "r", shape=(tiles, *shape))


class _Read:
    """Ray task: the pixels of some tiles; those that cannot be used are left out."""

    def __init__(self, rows: Any, spec: str) -> None:
        self._rows = rows
        self._spec = spec

    def __call__(self, block: dict[str, Any]) -> dict[str, Any]:
        import ray

        spec = InputSpec.model_validate_json(self._spec)
        rows = ray.get(self._rows).slice(int(block["start"][0]), _READ_TILES)
        return {"pixels": normalised(rows, spec)}


def normalised(rows: pa.Table, spec: InputSpec) -> npt.NDArray[np.float16]:
    """Pixels float16 (usable tiles, bands, size, size) of catalog rows, scaled."""
    batch = read_tiles(rows, bands=spec.bands, size=spec.size, fill=spec.mean)
    good = batch.pixels[batch.nodata_share[batch.valid] <= _MOST_NODATA]
    mean, std = (np.array(values)[:, None, None] for values in (spec.mean, spec.std))
    return np.clip((good - mean) / std, -_LARGEST_INPUT, _LARGEST_INPUT).astype(np.float16)


def sample_of(rows: pa.Table, most: int) -> pa.Table:
    """At most so many rows, evenly of all."""
    if rows.num_rows <= most:
        return rows
    return rows.take(pa.array(np.linspace(0, rows.num_rows - 1, most).astype(np.int64)))

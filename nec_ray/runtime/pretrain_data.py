"""MMEarth's modalities for pretraining: read once by Ray Data, a fixed share for every worker, kept on its disk."""

import tempfile
from collections.abc import Iterable
from contextlib import AbstractContextManager, ExitStack
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from nec_ray.codec import InputSpec
from nec_ray.errors import BadSource
from nec_ray.runtime.cluster import ray_data
from nec_ray.runtime.recipe import Recipe
from nec_ray.runtime.train_data import bands_of, sample_of
from nec_ray.storage import Store
from nec_ray.tiles import Catalog
from nec_ray.tiles.mmearth import EXTRA_COLUMNS, read_modalities
from nec_ray.tiles.mmearth_reader import BandStatistics, MMEarthFile, open_mmearth
from nec_ray.tiles.modalities import MODALITIES
from nec_ray.tiles.reader import numbered
from nec_ray.tiles.rows import is_hdf5

Values = dict[str, npt.NDArray[Any]]

OPTICAL = "sentinel2"
_READ_TILES = 32
_PROBED = 8
_LARGEST = 1e4
"""Standard deviations from the mean at which values are cut off, within the range of float16."""
_MOST_MISSING = 0.5
"""A tile with more missing optical pixels than this teaches nothing."""


def modalities_of(recipe: Recipe) -> tuple[str, ...]:
    """Names of the modalities that a recipe's pretraining reads, the optical one first."""
    from nec_ray.models.pretext import mmearth_outputs

    return tuple(output.name for output in mmearth_outputs(recipe.model.targets or "all"))


def check_modalities(recipe: Recipe, catalog: Catalog) -> int:
    """Pixels a side of a catalog's tiles, before Ray starts.

    Raises:
        BadSource: it is no catalog of MMEarth's, its tiles are of several sizes or smaller than `data.size`, or its
            first ones cannot be read.
    """
    where, rows = recipe.data.catalog, catalog.table
    columns = [name for name in EXTRA_COLUMNS if name not in rows.column_names]
    sources = rows["source"].to_pylist()
    if columns or not sources or not all(is_hdf5(source) for source in sources):
        raise BadSource(f"{where}: no catalog of MMEarth's HDF5 files; build one of them with nec tiles build")
    sides = sorted({*rows["width"].unique().to_pylist(), *rows["height"].unique().to_pylist()})
    if len(sides) > 1 or sides[0] < recipe.data.size:
        raise BadSource(
            f"{where}: tiles of {', '.join(map(str, sides))} pixels a side; pretraining takes windows of data.size "
            f"{recipe.data.size} of tiles that are all of one size"
        )
    probe = read_modalities(rows.slice(0, _PROBED), modalities_of(recipe), standardised=True)
    if not len(probe.valid):
        raise BadSource(f"{where}: its first tiles cannot be read ({probe.reason[0]})")
    return int(sides[0])


def statistics_of(recipe: Recipe, catalog: Catalog) -> dict[str, BandStatistics]:
    """What the continuous modalities were standardised by in the file of the first tile, l2a's of Sentinel-2."""
    with _file_of(catalog) as file:
        continuous = [one for one in modalities_of(recipe) if MODALITIES[one].kind == "continuous"]
        return {one: file.statistics(MODALITIES[one]) for one in continuous}


def optical_input(recipe: Recipe, catalog: Catalog) -> InputSpec:
    """What an encoder that is pretrained on a catalog of MMEarth is fed when it is adapted: scaled as in pretraining.

    A codec has one mean and deviation a band: those of L2A, or of L1C in a file that has nothing else.
    """
    modality, bands = MODALITIES[OPTICAL], bands_of(recipe, catalog)
    places = [modality.bands.index(band) for band in bands]
    with _file_of(catalog) as file:
        both = [file.statistics(modality, level) for level in ("l2a", "l1c")]
    found = next((one for one in both if np.isfinite(one.std[places]).all()), both[0])
    mean, std = found.mean[places].tolist(), found.std[places].tolist()
    return InputSpec(bands=bands, mean=mean, std=std, size=recipe.data.size)


def _file_of(catalog: Catalog) -> AbstractContextManager[MMEarthFile]:
    """The file of the first tile."""
    folder, _, name = numbered(catalog.table["source"][0].as_py())[0].rpartition("/")
    return open_mmearth(Store(folder or "/"), name)


def modality_shares(recipe: Recipe, catalog: Catalog) -> list[Any]:
    """A materialised Ray data set for each worker, of equally many tiles: a column a modality, see `compact`.

    Which tiles are whose depends on the seed and the number of workers alone.

    Raises:
        BadSource: fewer usable tiles than workers.
    """
    import ray

    side = check_modalities(recipe, catalog)
    rows = sample_of(catalog.table, recipe.data.max_tiles)
    rows = rows.take(pa.array(np.random.default_rng(recipe.train.seed).permutation(rows.num_rows)))
    with ray_data(ordered=True):
        starts = [{"start": start} for start in range(0, rows.num_rows, _READ_TILES)]
        read = _Read(ray.put(rows), modalities_of(recipe), bands_of(recipe, catalog), side)
        tiles = ray.data.from_items(starts, override_num_blocks=len(starts)).map_batches(read, batch_size=1)
        tiles = tiles.materialize()
        count, workers = tiles.count(), recipe.train.workers
        if count < workers:
            raise BadSource(f"{recipe.data.catalog}: {count} usable tiles for {workers} workers")
        share = count // workers
        return list(tiles.split_at_indices([share * (i + 1) for i in range(workers)])[:workers])


def local_modalities(batches: Iterable[Values]) -> Values:
    """A share's modalities, each mapped from a temporary file that ends with the process."""
    tiles, files, first = 0, dict[str, Any](), Values()
    with ExitStack() as stack:
        for batch in batches:
            first = first or {name: values[:0] for name, values in batch.items()}
            for name, values in batch.items():
                if name not in files:
                    files[name] = stack.enter_context(tempfile.TemporaryFile(prefix="nec-train-"))
                np.ascontiguousarray(values, first[name].dtype).tofile(files[name])
            tiles += len(batch[OPTICAL])
        mapped = Values()
        for name, file in files.items():
            file.flush()
            mapped[name] = np.memmap(file, first[name].dtype, "r", shape=(tiles, *first[name].shape[1:]))
        return mapped


def compact(rows: pa.Table, names: Iterable[str], bands: list[str], side: int) -> Values:
    """Modalities of the usable tiles among catalog rows, as workers keep them.

    Args:
        rows: of a catalog of MMEarth.
        names: of the modalities.
        bands: of Sentinel-2, which are taken by their names.
        side: pixels of a tile.

    Returns:
        (tiles, channels, side, side) of pixel and (tiles, channels) of image modalities: float16, standardised, NaN
        where missing; int16 class numbers, -1 where missing.
    """
    names = tuple(names)
    read = read_modalities(rows, names, standardised=True)
    place = [MODALITIES[OPTICAL].bands.index(band) for band in bands]
    values = Values()
    for name in names:
        modality = MODALITIES[name]
        found = read.values.get(name, np.empty((0, *modality.shape(side, side))))
        if modality.kind == "categorical":
            found = found.astype(np.int16)
        else:
            found = np.clip(found, -_LARGEST, _LARGEST).astype(np.float16)
        values[name] = found[:, None] if found.ndim == 1 else found
    values[OPTICAL] = values[OPTICAL][:, place]
    good = np.isnan(values[OPTICAL]).mean(axis=(1, 2, 3)) <= _MOST_MISSING
    return {name: found[good] for name, found in values.items()}


class _Read:
    """Ray task: the modalities of some tiles; those that cannot be used are left out."""

    def __init__(self, rows: Any, names: tuple[str, ...], bands: list[str], side: int) -> None:
        self._rows, self._names, self._bands, self._side = rows, names, bands, side

    def __call__(self, block: dict[str, Any]) -> dict[str, Any]:
        import ray

        rows = ray.get(self._rows).slice(int(block["start"][0]), _READ_TILES)
        return compact(rows, self._names, self._bands, self._side)

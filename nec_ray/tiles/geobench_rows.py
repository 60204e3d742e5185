"""GEO-Bench's data sets as tile catalogs: a sample is a tile."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
from rasterio.crs import CRS
from rasterio.errors import CRSError
from rasterio.transform import Affine

from nec_ray.errors import BadSource, NecError
from nec_ray.storage import Store
from nec_ray.tiles.geobench import SPLITS, GeobenchDataset, Label
from nec_ray.tiles.geobench_sample import file_names, open_sample
from nec_ray.tiles.pickled import Name, Record
from nec_ray.tiles.place import NOWHERE, place_of
from nec_ray.tiles.rows import SAMPLE, unreadable_row

EXTRA_COLUMNS = {"split": pa.string(), "partitions": pa.list_(pa.string()), "labels": pa.list_(pa.string())}
"""Columns that a catalog of GEO-Bench has beside the usual."""
_EVERY = 50


def geobench_rows(url: str, progress: Callable[[int, int], None] | None = None) -> Iterator[dict[str, Any]]:
    """Catalog rows of the samples of a data set, with `EXTRA_COLUMNS` beside the usual.

    `label` is the class of a classification task, `labels` are the classes that a sample of a multi-label task has;
    masks are read by `GeobenchDataset.sample`. `split` is that of the default partition: of a sample that stands in
    several, the first of train, valid and test, so that nothing is tested on what was trained on. `partitions` names
    those that train on the sample.

    Args:
        url: the data set's folder.
        progress: called with (samples done, samples).

    Raises:
        BadSource: no data set of GEO-Bench, or none of its samples can be read.
    """
    dataset = GeobenchDataset(url)
    split_of, trained_by = _splits(dataset)
    refused = 0
    for done, name in enumerate(dataset.samples, 1):
        try:
            row = _row(dataset, name)
        except BadSource:
            # Encoding records it as failed, with the reason; the others are not lost with it.
            row = unreadable_row(dataset.store, name + SAMPLE, None) | {"bands": list(dataset.bands)}
            row["labels"] = None
            refused += 1
        row |= {"tile_id": f"{dataset.name}/{name}", "split": split_of.get(name), "partitions": trained_by.get(name)}
        yield row
        if progress and (done % _EVERY == 0 or done == len(dataset.samples)):
            progress(done, len(dataset.samples))
    if refused == len(dataset.samples):
        raise BadSource(f"{dataset.store.url}: none of its {refused} samples can be read; fetch the data set again")


@contextmanager
def sample_window(store: Store, name: str, bands: Sequence[str]) -> Iterator[Any]:
    """A function (rows, columns) that gives the pixels of a sample, all of them, as (bands, height, width).

    Raises:
        BadSource: no sample of GEO-Bench, or it lacks a band; (by the function) the sample has another size.
    """
    with open_sample(store, name, file_names(store.url.rpartition("/")[2])) as file:
        pixels = file.pixels(bands)

    def window(rows: range, columns: range) -> npt.NDArray[Any]:
        height, width = pixels.shape[1:]
        if (rows, columns) != (range(height), range(width)):
            raise BadSource(f"the sample has {width} x {height} pixels, its catalog says {len(columns)} x {len(rows)}")
        return pixels

    yield window


def _splits(dataset: GeobenchDataset) -> tuple[dict[str, str], dict[str, list[str]]]:
    """The split of each sample, and the partitions that train on it."""
    split_of: dict[str, str] = {}
    trained_by: dict[str, list[str]] = {}
    for partition in dataset.partitions:
        if dataset.is_dangling(partition):  # the tiles are there all the same
            continue
        splits = dataset.splits(partition)
        for name in splits["train"]:
            trained_by.setdefault(name, []).append(partition)
        if partition == "default":
            split_of = {name: split for split in reversed(SPLITS) for name in splits[split]}
    return split_of, trained_by


def _row(dataset: GeobenchDataset, name: str) -> dict[str, Any]:
    store, where = dataset.store, f"{dataset.store.url}/{name}{SAMPLE}"
    with open_sample(store, name + SAMPLE, dataset.file_names) as file:
        file.check_names()
        height, width, dtype = file.size(dataset.bands)
        label = None if dataset.task == "segmentation" else dataset.label_of(file)
        about = next((value for value in file.attributes.values() if isinstance(value, dict)), {})
    return {
        "tile_id": name,
        "source": where,
        "source_etag": store.etag(name + SAMPLE),
        "x_off": 0,
        "y_off": 0,
        "width": width,
        "height": height,
        "bands": list(dataset.bands),
        "dtype": dtype,
        "nodata": None,
        "nodata_share": None,
        "acquired_at": _time(about.get("date")),
        "sensor": "Sentinel-2" if "B2" in dataset.bands else None,
        **_labels(dataset, label),
        **_place(about, height, width, where),
    }


def _labels(dataset: GeobenchDataset, label: Label | None) -> dict[str, Any]:
    one = dataset.classes[label] if isinstance(label, int) else None
    several = None if isinstance(label, int) or label is None else [dataset.classes[i] for i in np.flatnonzero(label)]
    return {"label": one, "labels": several}


def _time(value: Any) -> datetime | None:
    """UTC; a pickled date has its year, month and day as bytes, a time its hour, minute and second behind them."""
    match value:
        case Record(name=Name(module="datetime"), args=(bytes(raw), *_)) if len(raw) >= 4:
            parts = [int.from_bytes(raw[:2], "big"), *raw[2:4], *raw[4:7]]
            try:
                return datetime(parts[0], parts[1], parts[2], *parts[3:], tzinfo=UTC)  # type: ignore[misc]
            except ValueError:
                return None
    return None


def _place(about: dict[str, Any], height: int, width: int, where: str) -> dict[str, Any]:
    crs, transform = about.get("crs"), about.get("transform")
    match crs, transform:
        case Record(name=Name(name="CRS"), state=str(wkt)), Record(name=Name(name="Affine"), args=numbers):
            try:
                affine = Affine(*(float(number) for number in numbers[:6]))
                return place_of(CRS.from_wkt(wkt), affine, width, height, where)
            except (TypeError, ValueError, CRSError, NecError):
                return NOWHERE
    return NOWHERE

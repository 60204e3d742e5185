"""Reads GEO-Bench's data sets (Lacoste et al. 2023; version 1.0 as its `dataset.py` and `task.py` write it).

A data set is a folder: `task_specs.pkl`, `band_stats.json`, `*_partition.json`, and one HDF5 file a sample, see
`geobench_sample`. Its pickles are read as plain data by `pickled`.
"""

import functools
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from nec_ray.errors import BadSource, InputError
from nec_ray.storage import Store, normalise_url, read_url
from nec_ray.tiles.geobench_sample import FILE_NAMES, SampleFile, file_names, misnamed, open_sample, stand_ins
from nec_ray.tiles.modalities import S2_TYPES, SENTINEL2_BANDS
from nec_ray.tiles.pickled import Record, parse
from nec_ray.tiles.rows import SAMPLE, TASK_SPECS

SPLITS = ("train", "valid", "test")
Task = Literal["classification", "multi-label", "segmentation"]
StatisticsOf = Literal["data set", "l1c", "l2a"]
Label = int | npt.NDArray[np.bool_] | npt.NDArray[np.uint8]

_TASKS: dict[str, Task] = {
    "Classification": "classification",
    "MultiLabelClassification": "multi-label",
    "SegmentationClasses": "segmentation",
    "SemanticSegmentation": "segmentation",
}
_PARTITION = "_partition.json"
_MOST_CLASSES = 255


@dataclass(frozen=True)
class Statistics:
    """Of some bands, float64 (bands,)."""

    mean: npt.NDArray[np.float64]
    std: npt.NDArray[np.float64]

    def standardise(self, pixels: npt.NDArray[Any]) -> npt.NDArray[np.float32]:
        """Pixels (bands, rows, columns), or (samples, bands, rows, columns), with mean 0 and deviation 1, float32."""
        shape = (-1, 1, 1)
        return ((pixels - self.mean.reshape(shape)) / self.std.reshape(shape)).astype(np.float32)


@dataclass(frozen=True)
class Sample:
    """One sample."""

    name: str
    pixels: npt.NDArray[Any]
    """(bands, rows, columns), in the file's units; So2Sat's are multiplied by 10,000."""
    label: Label
    """A class number; bool (classes,), whether each class is there; or uint8 (rows, columns) class numbers."""


class GeobenchDataset:
    """One data set of GEO-Bench.

    Args:
        url: its folder.
        as_published: leave the wrong names of EuroSAT's and Brick Kiln's bands, on which published results rest.

    Raises:
        NotFound: nothing is there.
        BadSource: (here and in all methods) a file is missing, damaged, or holds what GEO-Bench's do not.
    """

    def __init__(self, url: str | os.PathLike[str], *, as_published: bool = False) -> None:
        self.store = Store(normalise_url(url))
        where = self._where(TASK_SPECS)
        specs = _fields(parse(self.store.read(TASK_SPECS), where), "TaskSpecifications", where)
        self.name = self.store.url.rpartition("/")[2]
        """Of the folder."""
        said = str(specs.get("dataset_name"))
        if misnamed(said) not in (None, misnamed(self.name)):
            raise BadSource(
                f"{where}: is of {said[:40]}, some of whose bands are renamed; name its folder m-{misnamed(said)}"
            )
        self.file_names = dict(FILE_NAMES) if as_published else file_names(self.name)
        """GEO-Bench's name of each Sentinel-2 band."""
        kind = specs.get("label_type")
        self.task: Task
        """What is predicted."""
        self.classes: list[str]
        """Names of the classes, in the order of their numbers; the numbers where they have no names."""
        self.task, self.classes = _task(kind, where)
        self.bands = _bands(specs.get("bands_info"), self.file_names, where)
        """Names of the bands that a sample may be asked for, in the file's order."""
        self._label_map = specs.get("label_map")

    @functools.cached_property
    def samples(self) -> list[str]:
        """Names of the samples whose files are there, sorted."""
        return [name.removesuffix(SAMPLE) for name in self._names if name.endswith(SAMPLE)]

    @functools.cached_property
    def partitions(self) -> list[str]:
        """Names of the partitions, sorted: `default`, and those with a part of the training samples (`0.01x_train`)."""
        return [name.removesuffix(_PARTITION) for name in self._names if name.endswith(_PARTITION)]

    @functools.cached_property
    def _names(self) -> list[str]:
        """Of the files in the folder, sorted."""
        folder, _, base = self.store.url.rpartition("/")
        names = (name.removeprefix(f"{base}/") for name in Store(folder or "/").names(base))
        return [name for name in names if "/" not in name]

    def splits(self, partition: str = "default") -> dict[str, list[str]]:
        """Names of the samples of `SPLITS`; `0.01x` is short for `0.01x_train`.

        Raises:
            InputError: there is no such partition.
        """
        name = next((name for name in (partition, f"{partition}_train") if name in self.partitions), None)
        if name is None:
            raise InputError(f"{self.store.url}: no partition {partition!r}; it has {', '.join(self.partitions)}")
        where, text = self._where(name + _PARTITION), self._text(name + _PARTITION)
        if (target := _link(text)) is not None:
            if not self._has(target, name):
                raise BadSource(f"{where}: is a link to {target}, which is not there; fetch the data set again")
            where, text = self._where(target), self._text(target)
        document = _object(text, where)
        for split, names in document.items():
            if split not in SPLITS or not isinstance(names, list) or not all(map(_is_name, names)):
                raise BadSource(f"{where}: {str(split)[:40]!r} is no list of samples of train, valid or test")
        return {split: document.get(split, []) for split in SPLITS}

    def is_dangling(self, partition: str) -> bool:
        """Whether a partition is but a link to another that is not there, as in a copy of a part of the data set."""
        target = _link(self._text(partition + _PARTITION))
        return target is not None and not self._has(target, partition)

    def label_map(self) -> dict[str, int] | None:
        """The class number of each sample, read without opening it; None where the data set has no such list."""
        if self.task != "classification":
            return None
        where, found = self._where(TASK_SPECS), self._label_map
        if self.store.exists("label_map.json"):
            where = self._where("label_map.json")
            found = _object(self._text("label_map.json"), where)
        if not found:
            return None
        numbers = {str(number): number for number in range(len(self.classes))}
        if not isinstance(found, dict) or not all(isinstance(names, list) for names in found.values()):
            raise BadSource(f"{where}: its label map lists no samples by class")
        if unknown := sorted(str(key)[:40] for key in found if str(key) not in numbers):
            raise BadSource(f"{where}: its label map has the class {unknown[0]!r}, the task {len(numbers)} classes")
        return {str(name): numbers[str(key)] for key, names in found.items() for name in names}

    def statistics(
        self,
        bands: Sequence[str],
        *,
        of: StatisticsOf = "data set",
        pretraining: str | os.PathLike[str] | None = None,
    ) -> Statistics:
        """Mean and standard deviation of bands, in the units of `Sample.pixels` (the choice of MMEarth, table A4).

        Args:
            bands: names, of `bands`.
            of: the data set's own (`band_stats.json`), or those of MMEarth's L1C or L2A images.
            pretraining: MMEarth's `*_band_stats.json`, for the latter.

        Raises:
            InputError: a band that the data set lacks, or that MMEarth does, or no file of statistics.
        """
        self._check_bands(bands)
        pairs: list[Any]
        if of == "data set":
            where = self._where("band_stats.json")
            document = _object(self._text("band_stats.json"), where)
            filled = stand_ins(self.bands)
            held = [filled.get(band, band) for band in bands]
            named = [document.get(self.file_names.get(band, band)) for band in held]
            pairs = [(one.get("mean"), one.get("std")) if isinstance(one, dict) else (None, None) for one in named]
        else:
            if of not in S2_TYPES or pretraining is None:
                raise InputError(f"statistics of {of!r}: give 'data set', or l1c or l2a and MMEarth's band statistics")
            where = normalise_url(pretraining)
            found = _object(_decoded(read_url(where), where), where).get(f"sentinel2_{of}")
            lists: list[Any] = [found.get(what) for what in ("mean", "std")] if isinstance(found, dict) else []
            if [len(one) for one in lists if isinstance(one, list)] != [len(SENTINEL2_BANDS)] * 2:
                raise BadSource(f"{where}: has no mean and std of the {len(SENTINEL2_BANDS)} bands of sentinel2_{of}")
            if missing := [band for band in bands if band not in SENTINEL2_BANDS]:
                raise InputError(f"{where}: has no statistics of {', '.join(missing)}; ask for Sentinel-2 bands")
            pairs = [tuple(one[SENTINEL2_BANDS.index(band)] for one in lists) for band in bands]
        for band, (mean, std) in zip(bands, pairs, strict=True):
            if not (_is_finite(mean) and _is_finite(std) and std > 0):
                raise BadSource(f"{where}: has no mean and no standard deviation above 0 of {band}")
        return Statistics(*np.array(pairs, np.float64).reshape(-1, 2).T)

    def sample(self, name: str, bands: Sequence[str] | None = None) -> Sample:
        """Pixels and label of a sample.

        Args:
            name: of `samples`.
            bands: which, in this order; `bands` where it is None.

        Raises:
            InputError: a band that the data set lacks.
            NotFound: there is no such sample.
        """
        bands = self.bands if bands is None else bands
        self._check_bands(bands)
        with open_sample(self.store, name + SAMPLE, self.file_names) as file:
            file.check_names()
            return Sample(name, file.pixels(bands), self.label_of(file))

    def label_of(self, file: SampleFile) -> Label:
        """The label of an open sample."""
        count = len(self.classes)
        if self.task == "segmentation":
            mask = file.mask()
            if not 0 <= mask.min() <= mask.max() < count:
                raise BadSource(f"{file.where}: its mask holds other numbers than those of {count} classes")
            return mask.astype(np.uint8)
        numbers = file.label_numbers(count)
        if self.task == "multi-label":
            if numbers.shape != (count,) or not np.isin(numbers, (0, 1)).all():
                raise BadSource(f"{file.where}: its label is no 0 or 1 for each of {count} classes")
            return numbers.astype(bool)
        if numbers.size != 1 or not 0 <= numbers.flat[0] < count:
            raise BadSource(f"{file.where}: its label is no number of one of {count} classes")
        return int(numbers.flat[0])

    def _check_bands(self, bands: Sequence[str]) -> None:
        if missing := [band for band in bands if band not in self.bands]:
            raise InputError(f"{self.store.url}: no band {', '.join(missing)}; it has {', '.join(self.bands)}")

    def _has(self, target: str, partition: str) -> bool:
        return target != partition + _PARTITION and self.store.exists(target)

    def _text(self, name: str) -> str:
        return _decoded(self.store.read(name), self._where(name))

    def _where(self, name: str) -> str:
        return f"{self.store.url}/{name}"


def _link(text: str) -> str | None:
    """The file's name that a link says which was copied as a text: the published `default_partition.json` is one."""
    target = text.strip().rpartition("/")[2]
    return target if target.endswith(_PARTITION) and _is_name(target) else None


def _fields(value: Any, name: str, where: str) -> dict[str, Any]:
    """The attributes of an object of this class."""
    if not isinstance(value, Record) or value.name.name != name or not isinstance(value.state, dict):
        raise BadSource(f"{where}: holds no {name} of GEO-Bench")
    return value.state


def _task(kind: Any, where: str) -> tuple[Task, list[str]]:
    if not isinstance(kind, Record) or kind.name.name not in _TASKS or not isinstance(kind.state, dict):
        said = kind.name.name if isinstance(kind, Record) else "nothing"
        raise BadSource(f"{where}: its labels are of the type {said}; classes, several of them, or masks are read")
    count = kind.state.get("n_classes")
    if not isinstance(count, int) or not 1 <= count <= _MOST_CLASSES:
        raise BadSource(f"{where}: has {str(count)[:20]} classes; 1 to {_MOST_CLASSES} are read")
    # geobench's MultiLabelClassification has it without the underscore
    names = kind.state.get("_class_names") or kind.state.get("class_name") or [str(i) for i in range(count)]
    good = isinstance(names, list | tuple) and len(names) == count and all(isinstance(name, str) for name in names)
    if not good or len(set(names)) != count:
        raise BadSource(f"{where}: its class names are not {count} different texts")
    return _TASKS[kind.name.name], list(names)


def _bands(infos: Any, file_names: Mapping[str, str], where: str) -> tuple[str, ...]:
    """Names of the task's bands in the file's order, those that stand in for others beside the ones that they copy."""
    own = {name: band for band, name in file_names.items()}
    names: list[str] = []
    for info in infos if isinstance(infos, list | tuple) else []:
        name = info.state.get("name") if isinstance(info, Record) and isinstance(info.state, dict) else None
        if not isinstance(name, str):
            raise BadSource(f"{where}: a band of the task has no name")
        names.append(own.get(name, name) if info.name.name == "Sentinel2" else name)
    if not names or len(set(names)) != len(names):
        raise BadSource(f"{where}: the bands of the task are none, or two have the same name")
    for band, source in stand_ins(names).items():
        if band not in names and source in names:
            names.insert(names.index(source), band)
    return tuple(names)


def _object(text: str, where: str) -> dict[str, Any]:
    try:
        document = json.loads(text)
    except (ValueError, RecursionError):
        raise BadSource(f"{where}: does not read as JSON; fetch the data set again") from None
    if not isinstance(document, dict):
        raise BadSource(f"{where}: holds no JSON object")
    return document


def _decoded(data: bytes, where: str) -> str:
    try:
        return data.decode()
    except UnicodeDecodeError:
        raise BadSource(f"{where}: is no text; fetch the data set again") from None


def _is_name(value: Any) -> bool:
    return isinstance(value, str) and value not in ("", ".", "..") and "/" not in value and value.isprintable()


def _is_finite(value: Any) -> bool:
    return isinstance(value, int | float) and abs(value) < 1e300  # also of numbers that no float holds

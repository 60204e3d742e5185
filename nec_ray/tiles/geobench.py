"""Reads GEO-Bench's data sets (Lacoste et al. 2023; version 1.0 as its `dataset.py` and `task.py` write it).

A data set is a folder: `task_specs.pkl`, `band_stats.json`, `*_partition.json`, and one HDF5 file a sample, with a data
set for each band and one named `label` where the label is a mask. Its pickles are read as plain data by `pickled`.

Sentinel-2 bands have MMEarth's names here (B1 to B12), so that whatever reads bands by name takes the right ones; other
bands keep GEO-Bench's. Three data sets need more:
- So2Sat has reflectances from 0 to 1 and 10 bands: they are multiplied by 10,000, as all others are, and B1 and B9 are
  copies of B2 and B8A (MMEarth, supplement B; `geobenchdataset.py` of MMEarth-train).
- EuroSAT's last five bands and most of Brick Kiln's have other names in GEO-Bench than they are (its issues 28 and 29).
  They are known by the folder's name, and get the right ones.
"""

import ast
import functools
import json
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import h5py
import numpy as np
import numpy.typing as npt

from nec_ray.errors import BadSource, InputError
from nec_ray.storage import Store, normalise_url, read_url
from nec_ray.tiles import hdf5
from nec_ray.tiles.modalities import S2_TYPES, SENTINEL2_BANDS
from nec_ray.tiles.pickled import Name, Record, parse
from nec_ray.tiles.rows import SAMPLE, TASK_SPECS

SPLITS = ("train", "valid", "test")
Task = Literal["classification", "multi-label", "segmentation"]
StatisticsOf = Literal["data set", "l1c", "l2a"]
Label = int | npt.NDArray[np.bool_] | npt.NDArray[np.uint8]

_FILE_NAME = {
    "B1": "01 - Coastal aerosol",
    "B2": "02 - Blue",
    "B3": "03 - Green",
    "B4": "04 - Red",
    "B5": "05 - Vegetation Red Edge",
    "B6": "06 - Vegetation Red Edge",
    "B7": "07 - Vegetation Red Edge",
    "B8": "08 - NIR",
    "B8A": "08A - Vegetation Red Edge",
    "B9": "09 - Water vapour",
    "B10": "10 - SWIR - Cirrus",
    "B11": "11 - SWIR",
    "B12": "12 - SWIR",
}
_EUROSAT = {
    "B8A": "12 - SWIR",
    "B9": "08A - Vegetation Red Edge",
    "B10": "09 - Water vapour",
    "B11": "10 - SWIR - Cirrus",
    "B12": "11 - SWIR",
}
_BRICK_KILN = {
    "B7": "06 - Vegetation Red Edge",
    "B8A": "07 - Vegetation Red Edge",
    "B8": "08 - NIR",
    "B11": "08A - Vegetation Red Edge",
    "B12": "09 - Water vapour",
    "TCI_R": "10 - SWIR - Cirrus",
    "TCI_G": "11 - SWIR",
    "TCI_B": "12 - SWIR",
}
_MISNAMED = {"eurosat": _EUROSAT, "brick-kiln": _BRICK_KILN}
_FILLED = {"B1": "B2", "B9": "B8A"}
"""In So2Sat: the band of the closest wavelength stands for each that it lacks."""
_OF_SO2SAT = "01 - VH.Real"
"""The first of its Sentinel-1 bands; no other data set of GEO-Bench has any."""
_SO2SAT_SCALE = 10_000
_TASKS: dict[str, Task] = {
    "Classification": "classification",
    "MultiLabelClassification": "multi-label",
    "SegmentationClasses": "segmentation",
    "SemanticSegmentation": "segmentation",
}
_LABEL = "label"
_PARTITION = "_partition.json"
_MOST_CLASSES = 255
_MOST_TEXT = 1 << 22
_BYTES = re.compile(
    r"""b(?:'(?:[ -&(-\[\]-~]|\\[ntr\\']|\\x[0-9a-f]{2})*'|"(?:[ !#-\[\]-~]|\\[ntr\\"]|\\x[0-9a-f]{2})*")"""
)
"""What Python writes for bytes."""


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


def file_names(folder: str) -> dict[str, str]:
    """GEO-Bench's name of each Sentinel-2 band, for the data set whose folder has this name."""
    misnamed = _MISNAMED.get(_known(folder) or "", {})
    right = {band: name for band, name in _FILE_NAME.items() if name not in misnamed.values()}
    return right | misnamed


def _known(name: str) -> str | None:
    """Which of `_MISNAMED` a data set is, such as m-eurosat."""
    plain = name.lower().replace("_", "-").removeprefix("m-")
    return next((known for known in _MISNAMED if plain.startswith(known)), None)


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
        if _known(said) not in (None, _known(self.name)):
            raise BadSource(
                f"{where}: is of {said[:40]}, some of whose bands are renamed; name its folder m-{_known(said)}"
            )
        self.file_names = dict(_FILE_NAME) if as_published else file_names(self.name)
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
            named = [document.get(self.file_names.get(self._source_of(band), band)) for band in bands]
            pairs = [(one.get("mean"), one.get("std")) if isinstance(one, dict) else (None, None) for one in named]
        else:
            if of not in S2_TYPES or pretraining is None:
                raise InputError(f"statistics of {of!r}: give 'data set', or l1c or l2a and MMEarth's band statistics")
            where = normalise_url(pretraining)
            found = _object(_decoded(read_url(where), where), where).get(f"sentinel2_{of}")
            lists = [found.get(what) for what in ("mean", "std")] if isinstance(found, dict) else []
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
        where = self._where(name + SAMPLE)
        with hdf5.opened(self.store, name + SAMPLE) as file:
            attributes = sample_attributes(file, where)
            self.check_names(file, attributes, where)
            return Sample(name, read_bands(file, bands, self.file_names, where), self.label_of(file, attributes, where))

    def label_of(self, file: Any, attributes: dict[str, Any], where: str) -> Label:
        """The label of an open sample."""
        if self.task == "segmentation":
            mask = _read(_band(file, _LABEL, where), _LABEL, where)
            if mask.dtype.kind not in "iu" or not 0 <= mask.min() <= mask.max() < len(self.classes):
                raise BadSource(f"{where}: its mask holds other numbers than those of {len(self.classes)} classes")
            return mask.astype(np.uint8)
        value = attributes.get(_LABEL)
        if self.task == "multi-label":
            flags = _integers(value, where)
            if flags.shape != (len(self.classes),) or not np.isin(flags, (0, 1)).all():
                raise BadSource(f"{where}: its label is no 0 or 1 for each of {len(self.classes)} classes")
            return flags.astype(bool)
        numbers = _integers(value, where)
        if numbers.size != 1 or not 0 <= numbers.flat[0] < len(self.classes):
            raise BadSource(f"{where}: its label is no number of one of {len(self.classes)} classes")
        return int(numbers.flat[0])

    def check_names(self, file: Any, attributes: dict[str, Any], where: str) -> None:
        """Check that each band's data set is named as its description says: none is taken for another."""
        for name in file:
            about = attributes.get(name)
            info = about.get("band_info") if isinstance(about, dict) else None
            said = info.state.get("name") if isinstance(info, Record) and isinstance(info.state, dict) else None
            if not isinstance(said, str) or _without_date(name) != said:
                raise BadSource(f"{where}: its data set {name[:60]!r} is described as {str(said)[:60]!r}")

    def size_of(self, file: Any, where: str) -> tuple[int, int, str]:
        """Height, width and numpy type of what `read_bands` gives of an open sample, without reading its pixels."""
        found = [_band(file, name, where) for name in _files_of(file, self.bands, self.file_names, where)]
        height, width = _one_size(found, where)
        kinds = [
            np.dtype(np.float32) if _is_scaled(file, band) else one.dtype
            for band, one in zip(self.bands, found, strict=True)
        ]
        return height, width, np.result_type(*kinds).newbyteorder("=").name

    def _source_of(self, band: str) -> str:
        """The band itself, or the one that stands for it."""
        own = _OF_SO2SAT in self.bands and band in _FILLED
        return _FILLED[band] if own else band

    def _check_bands(self, bands: Sequence[str]) -> None:
        if missing := [band for band in bands if band not in self.bands]:
            raise InputError(f"{self.store.url}: no band {', '.join(missing)}; it has {', '.join(self.bands)}")

    def _has(self, target: str, partition: str) -> bool:
        return target != partition + _PARTITION and self.store.exists(target)

    def _text(self, name: str) -> str:
        return _decoded(self.store.read(name), self._where(name))

    def _where(self, name: str) -> str:
        return f"{self.store.url}/{name}"


def sample_attributes(file: Any, where: str) -> dict[str, Any]:
    """What an open sample says of its bands, its label and their order.

    Raises:
        BadSource: it says nothing, or its pickle is none of plain data.
    """
    try:
        found = file.attrs.get_id("pickle")
        is_text = found.shape == () and h5py.check_string_dtype(found.dtype) is not None
        text = file.attrs["pickle"] if is_text else None
    except (OSError, KeyError, ValueError, TypeError, RuntimeError):
        raise BadSource(f"{where}: no sample of GEO-Bench, it has no attribute pickle") from None
    if not isinstance(text, str) or len(text) > _MOST_TEXT or not _BYTES.fullmatch(text):
        raise BadSource(f"{where}: its attribute pickle is no text of bytes")
    attributes = parse(ast.literal_eval(text), where)
    if not isinstance(attributes, dict):
        raise BadSource(f"{where}: its attribute pickle is no dict")
    return attributes


def read_bands(file: Any, bands: Sequence[str], file_names: Mapping[str, str], where: str) -> npt.NDArray[Any]:
    """Pixels (bands, rows, columns) of an open sample, found by the names of its data sets.

    Raises:
        BadSource: a band is missing, there for several times, of another size, or no image.
    """
    found = [_band(file, name, where) for name in _files_of(file, bands, file_names, where)]
    _one_size(found, where)
    planes = []
    for band, one in zip(bands, found, strict=True):
        plane = _read(one, band, where)
        planes.append(plane.astype(np.float32) * np.float32(_SO2SAT_SCALE) if _is_scaled(file, band) else plane)
    return np.stack(planes)


def _files_of(file: Any, bands: Iterable[str], file_names: Mapping[str, str], where: str) -> list[str]:
    """The name of the data set of each band."""

    def find(band: str) -> list[str]:
        return [name for name in names if _without_date(name) == file_names.get(band, band)]

    names = list(file)
    result = []
    for band in bands:
        found = find(band)
        if not found and _OF_SO2SAT in names:
            found = find(_FILLED.get(band, band))
        if len(found) != 1:
            said = f"{len(found)} data sets, of several times," if found else "no data set"
            raise BadSource(f"{where}: has {said} for the band {band}")
        result += found
    return result


def _is_scaled(file: Any, band: str) -> bool:
    return band in _FILE_NAME and _OF_SO2SAT in file


def _one_size(found: Sequence[Any], where: str) -> tuple[int, int]:
    sizes = sorted({one.shape for one in found})
    if len(sizes) > 1:
        raise BadSource(f"{where}: its bands are of several sizes, such as {sizes[0]} and {sizes[-1]}")
    height, width = sizes[0]
    return int(height), int(width)


def _link(text: str) -> str | None:
    """The file's name that a link says which was copied as a text: the published `default_partition.json` is one."""
    target = text.strip().rpartition("/")[2]
    return target if target.endswith(_PARTITION) and _is_name(target) else None


def _without_date(name: str) -> str:
    """A data set's name is its band's, with the date behind it where that is known."""
    return re.sub(r"_\d{4}-\d\d-\d\d$", "", name)


def _band(file: Any, name: str, where: str) -> Any:
    """A data set of the file's root, of plain numbers (rows, columns)."""
    own = "/" not in name and isinstance(file.get(name, getlink=True), h5py.HardLink)
    if not own or not isinstance(file.get(name), h5py.Dataset):
        raise BadSource(f"{where}: has no data set {name[:60]!r} of its own")
    found = hdf5.dataset(file, name, where)
    if found.ndim != 2 or found.dtype.kind not in "iuf" or 0 in found.shape:
        raise BadSource(f"{where}: its data set {name} is {found.dtype} {found.shape}, no image of one band")
    if found.size * found.dtype.itemsize > hdf5.MOST_BYTES:
        raise BadSource(f"{where}: its data set {name} is of {found.shape} pixels, too many for a sample")
    return found


def _read(found: Any, name: str, where: str) -> npt.NDArray[Any]:
    values: npt.NDArray[Any] = np.asarray(hdf5.whole(found, name, where))
    return values


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
    own = {name: band for band, name in file_names.items()}
    names: list[str] = []
    for info in infos if isinstance(infos, list | tuple) else []:
        name = info.state.get("name") if isinstance(info, Record) and isinstance(info.state, dict) else None
        if not isinstance(name, str):
            raise BadSource(f"{where}: a band of the task has no name")
        names.append(own.get(name, name) if info.name.name == "Sentinel2" else name)
    if not names or len(set(names)) != len(names):
        raise BadSource(f"{where}: the bands of the task are none, or two have the same name")
    if _OF_SO2SAT in names:
        for band, source in _FILLED.items():
            if band not in names and source in names:
                names.insert(names.index(source) + (band == "B9"), band)
    return tuple(names)


def _integers(value: Any, where: str) -> npt.NDArray[np.int64]:
    """Whole numbers: plain ones, a list of them, or what numpy pickles of its scalars and vectors."""
    if isinstance(value, int):
        return np.array(value, np.int64)
    if isinstance(value, list | tuple) and all(isinstance(one, int) for one in value) and len(value) <= _MOST_CLASSES:
        return np.array(value, np.int64)
    raw, dtype, shape = _numpy(value)
    if dtype is None or len(raw) > _MOST_CLASSES * 8 or len(raw) != dtype.itemsize * int(np.prod(shape)):
        raise BadSource(f"{where}: its label is no whole number and no list of them")
    return np.frombuffer(raw, dtype).reshape(shape).astype(np.int64)


def _numpy(value: Any) -> tuple[bytes, np.dtype[Any] | None, tuple[int, ...]]:
    """Bytes, type and shape of a pickled scalar or vector of whole numbers; no type for anything else."""
    nothing = b"", None, ()
    match value:
        case Record(name=Name(name="scalar"), args=(Record() as kind, bytes(raw)), state=None):
            shape: tuple[int, ...] = ()
        case Record(name=Name(name="_reconstruct"), state=(int(), (int(length),), Record() as kind, False, bytes(raw))):
            shape = (length,)
        case _:
            return nothing
    match kind:
        case Record(name=Name("numpy", "dtype"), args=(str(code), *_), state=state):
            order = state[1] if isinstance(state, tuple) and len(state) > 1 else "|"
            if re.fullmatch(r"[iu][1248]|b1", code) and order in ("<", "|"):
                return raw, np.dtype(code).newbyteorder("<"), shape
    return nothing


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
    return isinstance(value, str) and value not in ("", ".", "..") and "/" not in value


def _is_finite(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and bool(np.isfinite(value))

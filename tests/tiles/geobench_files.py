"""Writes data sets in GEO-Bench's format, as its `dataset.py` and `task.py` do: the pickles are real ones.

Classes of the same names stand in for GEO-Bench's, which is not installed: what is pickled of an object is its class's
name and its attributes.
"""

import json
import pickle
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import date
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest import mock

import h5py
import numpy as np
import numpy.typing as npt

_S2 = (
    ("01 - Coastal aerosol", ("1", "01"), 60, 0.443),
    ("02 - Blue", ("2", "02", "blue"), 10, 0.49),
    ("03 - Green", ("3", "03", "green"), 10, 0.56),
    ("04 - Red", ("4", "04", "red"), 10, 0.665),
    ("05 - Vegetation Red Edge", ("5", "05"), 20, 0.705),
    ("06 - Vegetation Red Edge", ("6", "06"), 20, 0.74),
    ("07 - Vegetation Red Edge", ("7", "07"), 20, 0.783),
    ("08 - NIR", ("8", "08", "NIR"), 20, 0.842),
    ("08A - Vegetation Red Edge", ("8A", "08A"), 20, 0.865),
    ("09 - Water vapour", ("9", "09"), 60, 0.945),
    ("10 - SWIR - Cirrus", ("10",), 60, 1.375),
    ("11 - SWIR", ("11",), 20, 1.61),
    ("12 - SWIR", ("12",), 20, 2.19),
)
S2_NAMES = tuple(name for name, *_ in _S2)
S1_NAMES = (
    "01 - VH.Real",
    "02 - VH.Imaginary",
    "03 - VV.Real",
    "04 - VV.Imaginary",
    "05 - VH.LEE Filtered",
    "06 - VV.LEE Filtered",
    "07 - VH.LEE Filtered.Real",
    "08 - VV.LEE Filtered.Imaginary",
)
SO2SAT_NAMES = (*S1_NAMES, *S2_NAMES[1:9], *S2_NAMES[11:])
_SIZES = {"0.01x": 0.01, "0.02x": 0.02, "0.05x": 0.05, "0.10x": 0.1, "0.20x": 0.2, "0.50x": 0.5, "1.00x": 1.0}


class _Plain:
    """An object with these attributes, in this order."""

    def __init__(self, **attributes: Any) -> None:
        self.__dict__.update(attributes)


def _class(name: str, module: str) -> Any:
    return type(name, (_Plain,), {"__module__": module})


_DATASET, _LABELS, _TASKS = (f"geobench.io.{name}" for name in ("dataset", "label", "task"))
Sentinel1, Sentinel2, CloudProbability, SegmentationClasses = (
    _class(name, _DATASET) for name in ("Sentinel1", "Sentinel2", "CloudProbability", "SegmentationClasses")
)
Classification, MultiLabelClassification = (
    _class(name, _LABELS) for name in ("Classification", "MultiLabelClassification")
)
TaskSpecifications = _class("TaskSpecifications", _TASKS)


@contextmanager
def installed() -> Iterator[None]:
    """Pickle looks its classes up in their modules."""
    modules = {name: ModuleType(name) for name in ("geobench", "geobench.io", _DATASET, _LABELS, _TASKS)}
    for one in (
        Sentinel1,
        Sentinel2,
        CloudProbability,
        SegmentationClasses,
        Classification,
        MultiLabelClassification,
        TaskSpecifications,
    ):
        setattr(modules[one.__module__], one.__name__, one)
    with mock.patch.dict(sys.modules, modules):
        yield


def sentinel2(name: str) -> Any:
    """GEO-Bench's description of a Sentinel-2 band."""
    _, alternatives, resolution, wavelength = _S2[S2_NAMES.index(name)]
    return Sentinel2(name=name, alt_names=alternatives, spatial_resolution=resolution, wavelength=wavelength)


def band_info(name: str) -> Any:
    """GEO-Bench's description of a band."""
    if name in S1_NAMES:
        return Sentinel1(name=name, alt_names=(), spatial_resolution=10, wavelength=None)
    if name == "Cloud Probability":
        return CloudProbability(name=name, alt_names=("CPL", "CLM"), spatial_resolution=None)
    return sentinel2(name)


def mask_info(classes: int, names: Sequence[str] | None = None) -> Any:
    """GEO-Bench's description of masks."""
    return SegmentationClasses(
        name="label", alt_names=(), spatial_resolution=10, n_classes=classes, _class_names=names and list(names)
    )


def task_specs(name: str, infos: Sequence[Any], label_type: Any, size: int) -> bytes:
    """What `TaskSpecifications.save` writes."""
    specs = TaskSpecifications(
        dataset_name=name,
        benchmark_name=None,
        patch_size=(size, size),
        n_time_steps=1,
        bands_info=list(infos),
        bands_stats=None,
        label_type=label_type,
        spatial_resolution=10,
    )
    with installed():
        return pickle.dumps(specs, protocol=4)


def write_sample(
    path: Path,
    bands: Sequence[tuple[Any, npt.NDArray[Any]]],
    label: Any = None,
    mask: tuple[Any, npt.NDArray[Any]] | None = None,
    date: date | None = None,
    **place: Any,
) -> None:
    """What `write_sample_hdf5` writes.

    Args:
        path: of the file.
        bands: description and pixels (rows, columns) of each.
        label: a number, or a vector of 0 and 1.
        mask: its description and the class numbers (rows, columns).
        date: of the bands.
        place: their `transform` and `crs`, which the samples at hand have not.
    """
    attributes: dict[str, Any] = {} if mask else {"label": label}
    order = []
    with h5py.File(path, "w") as file:
        for info, pixels in [*bands, mask] if mask else bands:
            name = info.name if date is None or info.name == "label" else f"{info.name}_{date:%Y-%m-%d}"
            file.create_dataset(name, data=pixels)
            attributes[name] = {
                "date": date,
                "date_id": date,
                "spatial_resolution": 10,
                "band_info": info,
                "meta_info": None,
                **place,
            }
            order.append(name)
        attributes["bands_order"] = order
        with installed():
            file.attrs["pickle"] = str(pickle.dumps(attributes, protocol=4))


def write_dataset(
    folder: Path,
    task: str,
    *,
    samples: int = 12,
    classes: int = 4,
    size: int = 8,
    names: Sequence[str] = S2_NAMES,
    seed: int = 0,
    noise: float = 1.0,
) -> dict[str, Any]:
    """Write a data set: half its samples to train on, a quarter each for validation and test.

    Args:
        folder: to make.
        task: classification, multi-label or segmentation.
        samples: how many.
        classes: how many.
        size: rows and columns of a sample.
        names: of its bands.
        seed: of everything that is drawn.
        noise: share of a pixel that is drawn; the rest is its class's, where samples are of one class.

    Returns:
        The label of each sample, by its name.
    """
    rng = np.random.default_rng(seed)
    folder.mkdir()
    infos = {name: band_info(name) for name in names}
    class_names = [f"class {i}, of {classes}" for i in range(classes)]
    label_type = {
        "classification": Classification(n_classes=classes, _class_names=class_names),
        "multi-label": MultiLabelClassification(n_classes=classes, class_name=class_names),
        "segmentation": mask_info(classes),
    }[task]
    (folder / "task_specs.pkl").write_bytes(task_specs(folder.name, list(infos.values()), label_type, size))
    labels: dict[str, Any] = {}
    shades = np.random.default_rng([seed, 1]).integers(1, 9000, (classes, len(names)))
    planes: dict[str, list[npt.NDArray[Any]]] = {name: [] for name in names}
    for number in range(samples):
        sample = f"id_{number:04d}"
        for name, shade in zip(names, shades[number % classes], strict=True):
            drawn_pixels = rng.integers(1, 9000, (size, size), np.int16)
            plane = (noise * drawn_pixels + (1 - noise) * shade).astype(np.int16)
            planes[name].append(plane / np.float32(10_000) if names == SO2SAT_NAMES else plane)
        bands = [(infos[name], kept[-1]) for name, kept in planes.items()]
        path = folder / f"{sample}.hdf5"
        if task == "segmentation":
            labels[sample] = rng.integers(0, classes, (size, size), np.int16)
            write_sample(path, bands, mask=(label_type, labels[sample]))
        else:
            several = (rng.random(classes) < 0.4).astype(np.int64)
            labels[sample] = number % classes if task == "classification" else several
            write_sample(path, bands, label=labels[sample])
    drawn = rng.permutation(list(labels)).tolist()
    half, part = samples // 2, samples // 4
    splits = {"train": drawn[:half], "valid": drawn[half : half + part], "test": drawn[half + part :]}
    for name, share in _SIZES.items():
        kept = rng.permutation(splits["train"]).tolist()[: max(1, int(half * share))]
        _dump(folder / f"{name}_train_partition.json", splits | {"train": kept})
    _dump(folder / "original_partition.json", splits)
    (folder / "default_partition.json").symlink_to("original_partition.json")
    scale = 10_000 if names == SO2SAT_NAMES else 1
    stats = {name: np.stack(kept).astype(np.float64) * scale for name, kept in planes.items()}
    _dump(folder / "band_stats.json", {k: {"mean": v.mean(), "std": v.std(), "max": v.max()} for k, v in stats.items()})
    if task == "classification":
        by_class = {str(i): [name for name, label in labels.items() if label == i] for i in range(classes)}
        _dump(folder / "label_map.json", by_class)
    return labels


def _dump(path: Path, document: Any) -> None:
    path.write_text(json.dumps(document, indent=2), encoding="utf-8")

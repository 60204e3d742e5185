"""GEO-Bench's data sets: read and encoded as what they are, and refused where they are something else."""

import ast
import io
import json
import os
import pickle
from collections.abc import Callable
from datetime import UTC, date, datetime
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rasterio.crs import CRS
from rasterio.transform import from_origin
from rasterio.warp import transform

from nec_ray.errors import BadSource, InputError, NotFound
from nec_ray.tiles import build_catalog, read_catalog, read_tiles, write_catalog
from nec_ray.tiles.geobench import GeobenchDataset
from nec_ray.tiles.geobench_sample import pickle_of
from nec_ray.tiles.modalities import SENTINEL2_BANDS
from tests.tiles import geobench_files as files

GEOBENCH = {
    "01 - Coastal aerosol": "B1",
    "02 - Blue": "B2",
    "03 - Green": "B3",
    "04 - Red": "B4",
    "05 - Vegetation Red Edge": "B5",
    "06 - Vegetation Red Edge": "B6",
    "07 - Vegetation Red Edge": "B7",
    "08 - NIR": "B8",
    "08A - Vegetation Red Edge": "B8A",
    "09 - Water vapour": "B9",
    "10 - SWIR - Cirrus": "B10",
    "11 - SWIR": "B11",
    "12 - SWIR": "B12",
}
"""What each band is in a data set that names its bands rightly."""
TWELVE = [band for band in SENTINEL2_BANDS if band != "B10"]


def stored(folder: Path, sample: str) -> dict[str, Any]:
    """All data sets of a sample, as h5py reads them."""
    with h5py.File(folder / f"{sample}.hdf5") as file:
        return {name: file[name][...] for name in file}


class Unpickler(pickle.Unpickler):
    """Python's own, with the classes of the writer: what the samples hold."""

    def find_class(self, module: str, name: str) -> Any:
        return getattr(files, name) if module.startswith("geobench") else super().find_class(module, name)


def unpickled(path: Path) -> Any:
    if path.suffix == ".pkl":
        return Unpickler(io.BytesIO(path.read_bytes())).load()
    with h5py.File(path) as file:
        return Unpickler(io.BytesIO(ast.literal_eval(file.attrs["pickle"]))).load()


def test_the_writer_writes_what_geobench_does(data: Path, tmp_path: Path) -> None:
    """The pickles of the real samples come out to the byte, from their pixels and what Python unpickles of them."""
    names = ["Industrial Buildings", "Residential Buildings", "Annual Crop", "Permanent Crop", "River", "Sea and Lake"]
    names += ["Herbaceous Vegetation", "Highway", "Pasture", "Forest"]
    for folder, size, mask in (("eurosat", 64, None), ("southAfricaCropType", 256, files.mask_info(10))):
        real = sorted((data / "geobench_samples" / folder).glob("*.hdf5"))[0]
        made = tmp_path / real.name
        pixels = stored(real.parent, real.stem)
        order = [name for name in unpickled(real)["bands_order"] if name != "label"]
        infos = [files.band_info(name) for name in order]
        bands = [(info, pixels[info.name]) for info in infos]
        files.write_sample(made, bands, label=0, mask=None if mask is None else (mask, pixels["label"]))
        with h5py.File(real) as theirs, h5py.File(made) as ours:
            assert ours.attrs["pickle"] == theirs.attrs["pickle"]
            assert {n: (d.shape, d.dtype, d.chunks) for n, d in ours.items()} == {
                n: (d.shape, d.dtype, d.chunks) for n, d in theirs.items()
            }
            kinds = [file.attrs.get_id("pickle").get_type() for file in (ours, theirs)]
            assert kinds[0] == kinds[1]
        kind = mask or files.Classification(n_classes=10, _class_names=names)
        assert files.task_specs(folder, infos, kind, size) == (real.parent / "task_specs.pkl").read_bytes()


@pytest.mark.parametrize("folder", ["eurosat", "southAfricaCropType"])
def test_real_samples_are_read_as_python_unpickles_them(data: Path, folder: str) -> None:
    root = data / "geobench_samples" / folder
    dataset, specs = GeobenchDataset(root, as_published=True), unpickled(root / "task_specs.pkl")
    assert dataset.classes == (specs.label_type._class_names or [str(i) for i in range(10)])
    assert [GEOBENCH.get(info.name, info.name) for info in specs.bands_info] == list(dataset.bands)
    assert len(dataset.samples) == 5
    statistics = json.loads((root / "band_stats.json").read_text())
    for name in dataset.samples:
        sample, truth, held = dataset.sample(name), unpickled(root / f"{name}.hdf5"), stored(root, name)
        for band, pixels in zip(dataset.bands, sample.pixels, strict=True):
            [own] = [key for key in held if GEOBENCH.get(key, key) == band]
            assert np.array_equal(pixels, held[own])
            found = dataset.statistics([band]) if band != "Cloud Probability" else None
            assert found is None or found.mean[0] == statistics[own]["mean"]
        label = held["label"] if dataset.task == "segmentation" else truth["label"]
        assert np.array_equal(sample.label, label)


def test_eurosat_and_brick_kiln_get_the_bands_that_they_hold(data: Path) -> None:
    """B8A is about as bright as B8, B10 nearly black, and a true-colour image goes with its bands."""
    root = data / "geobench_samples"
    eurosat = GeobenchDataset(root / "eurosat")
    b8, b8a, b9, b10, b11, b12 = eurosat.statistics(["B8", "B8A", "B9", "B10", "B11", "B12"]).mean
    assert abs(b8a / b8 - 1) < 0.15
    assert b10 < 20 < b9 < b12 < b11
    near = eurosat.sample("id_0000", ["B8", "B8A"]).pixels.reshape(2, -1)
    assert np.corrcoef(near)[0, 1] > 0.95
    published = GeobenchDataset(root / "eurosat", as_published=True)
    assert np.array_equal(published.sample("id_0000", ["B12"]).pixels, eurosat.sample("id_0000", ["B8A"]).pixels)
    kiln = GeobenchDataset(root / "brick_kiln")
    pixels = kiln.sample(kiln.samples[0], ["B4", "TCI_R", "B2", "TCI_B"]).pixels.reshape(4, -1)
    assert np.corrcoef(pixels[:2])[0, 1] > 0.9
    assert np.corrcoef(pixels[2:])[0, 1] > 0.9
    assert "B10" not in kiln.bands
    tiles = build_catalog(root / "eurosat").table
    batch = read_tiles(tiles, bands=["B8A", "B8"], size=64, fill=[0, 0])
    for sample, read in zip(eurosat.samples, batch.pixels, strict=True):
        held = stored(root / "eurosat", sample)
        assert np.array_equal(read, [held["12 - SWIR"], held["08 - NIR"]])


def test_brick_kiln_has_the_twelve_bands_of_mmearth(tmp_path: Path) -> None:
    """Two of them are copies; by GEO-Bench's names, which are wrong, two are of a true-colour image."""
    folder = tmp_path / "m-brick-kiln"
    files.write_dataset(folder, "classification", samples=4)
    kiln, held = GeobenchDataset(folder), stored(folder, "id_0001")
    # as the notebook exported them that made the images (GEO-Bench's issue 29)
    order = ["B1", "B2", "B3", "B4", "B5", "B7", "B8A", "B8", "B11", "B12", "TCI_R", "TCI_G", "TCI_B"]
    own = dict(zip(order, GEOBENCH, strict=True))
    expected = [held[own[{"B6": "B7", "B9": "B8A"}.get(band, band)]] for band in TWELVE]
    assert np.array_equal(kiln.sample("id_0001", TWELVE).pixels, expected)
    statistics = json.loads((folder / "band_stats.json").read_text())
    means = [statistics[own[band]]["mean"] for band in ("B7", "B12", "B8A")]
    assert kiln.statistics(["B6", "B12", "B9"]).mean.tolist() == means
    batch = read_tiles(build_catalog(folder).table, bands=TWELVE, size=8, fill=[0] * 12)
    assert np.array_equal(batch.pixels[1], expected)
    with pytest.raises(InputError, match="no band B10"):
        kiln.sample("id_0001", ["B10"])
    published = GeobenchDataset(folder, as_published=True).sample("id_0001", TWELVE).pixels
    assert np.array_equal(published, [held[name] for band in TWELVE for name in GEOBENCH if GEOBENCH[name] == band])


def test_the_band_that_stands_for_b6_goes_with_it(data: Path) -> None:
    cities = GeobenchDataset(data / "geobench_samples" / "eurosat")
    pixels = [cities.sample(name, ["B6", "B5", "B7"]).pixels.reshape(3, -1) for name in cities.samples]
    assert np.corrcoef(np.concatenate(pixels, axis=1))[0, 1:] == pytest.approx([0.0, 0.98], abs=0.05)
    kiln = GeobenchDataset(data / "geobench_samples" / "brick_kiln")
    assert kiln.sample(kiln.samples[0], TWELVE).pixels.shape == (12, 64, 64)


def test_a_misnamed_data_set_is_not_read_from_a_folder_of_another_name(tmp_path: Path) -> None:
    files.write_dataset(tmp_path / "m-eurosat", "classification")
    GeobenchDataset(tmp_path / "m-eurosat")
    (tmp_path / "m-eurosat").rename(tmp_path / "cities")
    with pytest.raises(BadSource, match="is of m-eurosat, some of whose bands are renamed; name its folder m-eurosat"):
        GeobenchDataset(tmp_path / "cities")


@pytest.mark.parametrize("task", ["classification", "multi-label", "segmentation"])
def test_samples_become_tiles_with_labels_and_splits(task: str, tmp_path: Path) -> None:
    folder = tmp_path / "m-made"
    labels = files.write_dataset(folder, task, samples=8)
    seen: list[tuple[int, int]] = []
    write_catalog(build_catalog(folder, licence="x", progress=lambda *at: seen.append(at)), tmp_path / "c.parquet")
    tiles = read_catalog(tmp_path / "c.parquet").table
    assert seen[-1] == (8, 8)
    assert tiles["tile_id"].to_pylist() == [f"m-made/{name}" for name in labels]
    names = [f"class {i}, of 4" for i in range(4)]
    one = [names[label] if task == "classification" else None for label in labels.values()]
    several = [[names[i] for i in range(4) if label[i]] if task == "multi-label" else None for label in labels.values()]
    assert tiles["label"].to_pylist() == one
    assert tiles["labels"].to_pylist() == several
    splits = json.loads((folder / "original_partition.json").read_text())
    side = {name: split for split, kept in splits.items() for name in kept}
    assert tiles["split"].to_pylist() == [side[name] for name in labels]
    half = json.loads((folder / "0.50x_train_partition.json").read_text())["train"]
    assert [
        name for name, row in zip(labels, tiles["partitions"].to_pylist(), strict=True) if "0.50x_train" in (row or ())
    ] == sorted(half)
    assert all(
        ("default" in (row or ())) == (side[name] == "train")
        for name, row in zip(labels, tiles["partitions"].to_pylist(), strict=True)
    )
    batch = read_tiles(tiles, bands=TWELVE, size=8, fill=[0] * 12)
    assert batch.status == ["valid"] * 8
    dataset = GeobenchDataset(folder)
    assert dataset.task == task
    for number, (name, label) in enumerate(labels.items()):
        held = stored(folder, name)
        expected = [next(held[key] for key in held if GEOBENCH.get(key) == band) for band in TWELVE]
        assert np.array_equal(batch.pixels[number], expected)
        sample = dataset.sample(name, TWELVE)
        assert np.array_equal(sample.pixels, expected)
        assert np.array_equal(sample.label, label)
        assert (
            np.asarray(sample.label).dtype
            == {"classification": int, "multi-label": bool, "segmentation": np.uint8}[task]
        )


def test_partitions_statistics_and_label_map(tmp_path: Path) -> None:
    folder = tmp_path / "made"
    labels = files.write_dataset(folder, "classification", samples=40)
    dataset = GeobenchDataset(str(folder))
    parts = [f"{part}_train" for part in ("0.01x", "0.02x", "0.05x", "0.10x", "0.20x", "0.50x", "1.00x")]
    assert dataset.partitions == [*parts, "default", "original"]
    assert dataset.label_map() == labels
    whole = dataset.splits()
    assert whole == json.loads((folder / "original_partition.json").read_text())
    assert [len(dataset.splits(part)["train"]) for part in parts] == [1, 1, 1, 2, 4, 10, 20]
    assert dataset.splits("0.20x") == dataset.splits("0.20x_train")
    assert dataset.splits("0.01x")["test"] == whole["test"]
    with pytest.raises(InputError, match=r"no partition '0\.03x'; it has 0\.01x_train, "):
        dataset.splits("0.03x")
    own = dataset.statistics(["B8A", "B2"])
    samples = np.stack([dataset.sample(name, ["B8A", "B2"]).pixels for name in labels])
    assert own.mean == pytest.approx(samples.mean(axis=(0, 2, 3)))
    scaled = own.standardise(samples)
    assert scaled.dtype == np.float32
    assert scaled.mean(axis=(0, 2, 3)) == pytest.approx([0, 0], abs=1e-5)
    assert scaled.std(axis=(0, 2, 3)) == pytest.approx([1, 1], abs=1e-5)
    mean, std = list(range(100, 113)), list(range(1, 14))
    document = {
        f"sentinel2_{kind}": {"mean": [m + add for m in mean], "std": std} for kind, add in (("l1c", 0), ("l2a", 50))
    }
    (tmp_path / "stats.json").write_text(json.dumps(document))
    for kind, add in (("l1c", 0), ("l2a", 50)):
        found = dataset.statistics(["B8", "B8A"], of=kind, pretraining=tmp_path / "stats.json")  # type: ignore[arg-type]
        assert found.mean.tolist() == [108 + add, 107 + add], "MMEarth has B8A before B8"
        assert found.std.tolist() == [9, 8]
    with pytest.raises(InputError, match="give 'data set', or l1c or l2a and MMEarth's"):
        dataset.statistics(["B8"], of="l1c")
    with pytest.raises(InputError, match="no band B99; it has B1, B2"):
        dataset.sample("id_0000", ["B99"])
    with pytest.raises(NotFound):
        dataset.sample("id_9999")


def test_so2sat_gets_the_bands_it_lacks_and_the_units_of_all_others(tmp_path: Path) -> None:
    folder = tmp_path / "m-so2sat"
    files.write_dataset(folder, "classification", names=files.SO2SAT_NAMES)
    dataset, held = GeobenchDataset(folder), stored(folder, "id_0003")
    batch = read_tiles(build_catalog(folder).table, bands=TWELVE, size=8, fill=[0] * 12)
    # as MMEarth-train's BAND_NAMES_v1_full.json lists them, in this order
    sources = {"B1": "02 - Blue", "B9": "08A - Vegetation Red Edge"}
    for band, read, pixels in zip(TWELVE, batch.pixels[3], dataset.sample("id_0003", TWELVE).pixels, strict=True):
        name = sources.get(band) or next(key for key, short in GEOBENCH.items() if short == band)
        assert read == pytest.approx(held[name] * 10_000, rel=1e-6)
        assert np.array_equal(read, pixels)
    assert np.array_equal(dataset.sample("id_0003", ["01 - VH.Real"]).pixels[0], held["01 - VH.Real"])
    assert "B10" not in dataset.bands
    # the published data set's statistics are those of its pixels, times 10,000
    statistics = dataset.statistics(TWELVE)
    pixels = np.stack([dataset.sample(name, TWELVE).pixels for name in dataset.samples])
    assert statistics.mean == pytest.approx(pixels.mean(axis=(0, 2, 3)), rel=1e-4)


def test_place_and_time_are_taken_where_samples_have_them(tmp_path: Path) -> None:
    folder = tmp_path / "made"
    files.write_dataset(folder, "classification", samples=2)
    infos = [files.sentinel2(name) for name in files.S2_NAMES]
    bands = [(info, np.full((8, 8), number, np.int16)) for number, info in enumerate(infos)]
    place = {"transform": from_origin(500_000, 4_400_000, 10, 10), "crs": CRS.from_epsg(32632)}
    files.write_sample(folder / "id_0000.hdf5", bands, label=np.int64(1), date=date(2019, 5, 17), **place)
    dated, plain = build_catalog(folder).table.to_pylist()
    assert dated["acquired_at"] == datetime(2019, 5, 17, tzinfo=UTC)
    assert dated["crs"] == "EPSG:32632"
    (west,), (north,) = transform("EPSG:32632", "EPSG:4326", [500_000], [4_400_000])
    assert (dated["bbox"]["xmin"], dated["bbox"]["ymax"]) == (pytest.approx(west), pytest.approx(north, abs=1e-5))
    assert (plain["acquired_at"], plain["crs"], plain["bbox"]) == (None, None, None)
    assert GeobenchDataset(folder).sample("id_0000", ["B8A", "B3"]).pixels[:, 0, 0].tolist() == [8, 2]


def test_a_link_that_was_copied_as_a_text_is_followed_within_the_folder(tmp_path: Path) -> None:
    folder = tmp_path / "made"
    files.write_dataset(folder, "classification")
    link = folder / "default_partition.json"
    for text in ("original_partition.json", "/elsewhere/made/original_partition.json"):
        link.unlink()
        link.write_text(text)
        assert GeobenchDataset(folder).splits() == json.loads((folder / "original_partition.json").read_text())
    (folder / "original_partition.json").unlink()
    with pytest.raises(BadSource, match=r"is a link to original_partition\.json, which is not there"):
        GeobenchDataset(folder).splits()
    assert build_catalog(folder).table["split"].null_count == 12, "the tiles are there all the same"


def test_a_sample_of_several_splits_is_never_tested_on(tmp_path: Path) -> None:
    folder = tmp_path / "made"
    files.write_dataset(folder, "classification", samples=4)
    splits = {"train": ["id_0000"], "valid": ["id_0000", "id_0001"], "test": ["id_0000", "id_0001", "id_0002"]}
    (folder / "original_partition.json").write_text(json.dumps(splits))
    assert build_catalog(folder).table["split"].to_pylist() == ["train", "valid", "test", None]


def test_what_the_data_set_says_itself_is_not_given(tmp_path: Path) -> None:
    files.write_dataset(tmp_path / "made", "classification")
    with pytest.raises(InputError, match="GEO-Bench's data set says its tile size, sensor itself; leave that out"):
        build_catalog(tmp_path / "made", tile_size=4, sensor="x")


class Bomb:
    def __reduce__(self) -> Any:
        return os.system, ("touch ran",)


def test_damaged_and_hostile_samples_fail_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "made"
    files.write_dataset(folder, "classification", samples=12)
    pixels = np.ones((8, 8), np.int16)
    good = [(files.sentinel2(name), pixels) for name in files.S2_NAMES]

    def spoil(number: int, change: Callable[[h5py.File], None]) -> None:
        with h5py.File(folder / f"id_{number:04d}.hdf5", "r+") as file:
            change(file)

    def linked(file: h5py.File) -> None:
        del file["02 - Blue"]
        file["02 - Blue"] = h5py.ExternalLink("id_0000.hdf5", "03 - Green")

    def swapped(file: h5py.File) -> None:
        file.move("02 - Blue", "x")
        file.move("03 - Green", "02 - Blue")
        file.move("x", "03 - Green")
        text = file.attrs["pickle"]
        file.attrs["pickle"] = text.replace("02 - Blue", "02 - Blux")

    def larger(file: h5py.File) -> None:
        del file["04 - Red"]
        file.create_dataset("04 - Red", (1 << 20, 1 << 20), np.int16, chunks=(64, 64), compression="gzip")

    def other_size(file: h5py.File) -> None:
        del file["04 - Red"]
        file["04 - Red"] = np.ones((8, 9), np.int16)

    spoil(1, lambda file: file.attrs.__setitem__("pickle", str(pickle.dumps({"label": Bomb()}))))
    spoil(2, lambda file: file.attrs.__setitem__("pickle", "__import__('os').system('touch ran')"))
    spoil(3, linked)
    spoil(4, swapped)
    spoil(5, larger)
    spoil(6, other_size)
    spoil(7, lambda file: file.__delitem__("08 - NIR"))
    spoil(8, lambda file: file.attrs.__setitem__("pickle", np.zeros(3)))
    (folder / "id_0009.hdf5").write_bytes((folder / "id_0009.hdf5").read_bytes()[:900])
    files.write_sample(folder / "id_0010.hdf5", good, label=4)
    files.write_sample(folder / "id_0011.hdf5", good, label="1")
    rows = build_catalog(folder).table
    reasons = {
        1: "its pickle holds the name 'posix.system', which is more than plain data; it is not read",
        2: "its attribute pickle is no text of bytes",
        3: "has no data set '02 - Blue' of its own",
        4: "is described as",
        5: "too many for a sample",
        6: "its bands are of 2 sizes",
        7: "has no data set for the band B8",
        8: "its attribute pickle is no text of bytes",
        9: "cannot be read as HDF5",
        10: "its label is no number of one of 4 classes",
        11: "its label is no whole number",
    }
    assert rows["width"].to_pylist() == [8] + [1] * 11
    dataset = GeobenchDataset(folder)
    for number, reason in reasons.items():
        with pytest.raises(BadSource, match=reason) as caught:
            dataset.sample(f"id_{number:04d}")
        assert "\n" not in str(caught.value)
    batch = read_tiles(rows, bands=["B2", "B3", "B4", "B8"], size=8, fill=[0] * 4)
    assert batch.status == ["valid"] + ["failed"] * 11
    assert batch.reason[1] == "the sample has 8 x 8 pixels, its catalog says 1 x 1"
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("label", "task"),
    [
        (np.array([0, 1, 2, 0]), "multi-label"),
        (np.array([0, 1, 1]), "multi-label"),
        (np.array([0.0, 1.0, 0.0, 1.0]), "multi-label"),
        (np.array([[0, 1], [1, 0]]), "multi-label"),
        (None, "multi-label"),
        (-1, "classification"),
        (2**80, "classification"),
        ([1, 2], "classification"),
        (np.float64(1), "classification"),
        ({"label": 1}, "classification"),
    ],
)
def test_labels_of_no_class_are_refused(label: Any, task: str, tmp_path: Path) -> None:
    folder = tmp_path / "made"
    files.write_dataset(folder, task, samples=1)
    bands = [(files.sentinel2(name), np.ones((8, 8), np.int16)) for name in files.S2_NAMES]
    files.write_sample(folder / "id_0000.hdf5", bands, label=label)
    with pytest.raises(BadSource, match="its label is no"):
        GeobenchDataset(folder).sample("id_0000")
    with pytest.raises(BadSource, match="none of its 1 samples can be read"):
        build_catalog(folder)


def test_masks_of_other_classes_are_refused(tmp_path: Path) -> None:
    folder = tmp_path / "made"
    files.write_dataset(folder, "segmentation", samples=1)
    for wrong in (4, -1):
        with h5py.File(folder / "id_0000.hdf5", "r+") as file:
            file["label"][3, 3] = wrong
        with pytest.raises(BadSource, match="its mask holds other numbers than those of 4 classes"):
            GeobenchDataset(folder).sample("id_0000")


def test_statistics_that_are_no_numbers_are_refused(tmp_path: Path) -> None:
    folder = tmp_path / "made"
    files.write_dataset(folder, "classification", samples=1)
    for wrong in ("NaN", "1e999", "-1", "0", '"3"', "null", "9" * 400):
        (folder / "band_stats.json").write_text(f'{{"02 - Blue": {{"mean": 1, "std": {wrong}}}}}')
        with pytest.raises(BadSource, match="no mean and no standard deviation above 0 of B2"):
            GeobenchDataset(folder).statistics(["B2"])
    for text in ("[]", "{", '{"sentinel2_l1c": {"mean": [1], "std": [1]}}', '{"sentinel2_l1c": 3}'):
        (tmp_path / "stats.json").write_text(text)
        with pytest.raises(BadSource, match=r"stats\.json: "):
            GeobenchDataset(folder).statistics(["B2"], of="l1c", pretraining=tmp_path / "stats.json")


def test_other_tasks_and_partitions_that_are_none_are_refused(tmp_path: Path) -> None:
    folder = tmp_path / "made"
    files.write_dataset(folder, "classification", samples=2)
    infos = [files.sentinel2(name) for name in files.S2_NAMES]
    for label_type, message in (
        (files.CloudProbability(n_classes=3), "its labels are of the type CloudProbability"),
        (files.Classification(n_classes=0, _class_names=None), "has 0 classes; 1 to 255 are read"),
        (files.Classification(n_classes=2, _class_names=["a", "a"]), "its class names are not 2 different texts"),
        (files.Classification(n_classes=2, _class_names=["a"]), "its class names are not 2 different texts"),
        (None, "its labels are of the type nothing"),
    ):
        (folder / "task_specs.pkl").write_bytes(files.task_specs("made", infos, label_type, 8))
        with pytest.raises(BadSource, match=message):
            GeobenchDataset(folder)
    kind = files.Classification(n_classes=2, _class_names=None)
    (folder / "task_specs.pkl").write_bytes(files.task_specs("made", [*infos, infos[0]], kind, 8))
    with pytest.raises(BadSource, match="two have the same name"):
        GeobenchDataset(folder)
    (folder / "task_specs.pkl").write_bytes(files.task_specs("made", infos, kind, 8))
    for text in ("[", "[]", '{"train": ["../../etc/passwd"]}', '{"train": "id_0000"}', '{"more": []}', '{"test": [1]}'):
        (folder / "0.50x_train_partition.json").write_text(text)
        with pytest.raises(BadSource, match=r"0\.50x_train_partition\.json: "):
            GeobenchDataset(folder).splits("0.50x")
    (folder / "task_specs.pkl").unlink()
    with pytest.raises(NotFound):
        GeobenchDataset(folder)


@settings(max_examples=40, derandomize=True)  # HDF5 itself never ends on some damaged files: always the same ones
@given(st.binary(min_size=1, max_size=40), st.floats(0, 1))
def test_a_damaged_sample_is_read_or_refused(
    tmp_path_factory: pytest.TempPathFactory, damage: bytes, at: float
) -> None:
    folder = tmp_path_factory.mktemp("made")
    bands = [(files.sentinel2(name), np.ones((4, 4), np.int16)) for name in files.S2_NAMES[:2]]
    kind = files.Classification(n_classes=2, _class_names=None)
    (folder / "task_specs.pkl").write_bytes(files.task_specs("made", [info for info, _ in bands], kind, 4))
    files.write_sample(folder / "a.hdf5", bands, label=1)
    raw = bytearray((folder / "a.hdf5").read_bytes())
    start = int(at * (len(raw) - len(damage)))
    raw[start : start + len(damage)] = damage
    (folder / "a.hdf5").write_bytes(raw)
    try:
        GeobenchDataset(folder).sample("a")
    except BadSource as error:
        assert "\n" not in str(error)  # noqa: PT017


@given(st.binary(max_size=60), st.text(max_size=60) | st.builds("b{!r}".format, st.text(max_size=20)))
def test_only_the_text_of_bytes_stands_for_a_pickle(data: bytes, text: str) -> None:
    assert pickle_of(repr(data), "f") == data
    try:
        found = pickle_of(text, "f")
    except BadSource:
        return
    assert found == ast.literal_eval(text)

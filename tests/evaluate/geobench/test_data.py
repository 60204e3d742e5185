"""Which samples are used, and what encoders are given of them."""

from pathlib import Path

import numpy as np
import pytest

from nec_ray.errors import BadLabels, InputError
from nec_ray.evaluate.geobench.data import GeobenchTask, Images, few_shot_order
from nec_ray.evaluate.geobench.experiment import Dataset
from nec_ray.tiles import resize
from nec_ray.tiles.geobench import GeobenchDataset
from tests.tiles.geobench_files import SO2SAT_NAMES, write_dataset


@pytest.mark.parametrize("seed", [0, 1])
def test_every_beginning_has_all_classes_alike(seed: int) -> None:
    target = np.random.default_rng(9).choice(5, 200, p=[0.5, 0.3, 0.1, 0.08, 0.02])
    order = few_shot_order(target, 6, seed)  # class 5 has no sample
    assert sorted(order) == list(range(200))
    there = np.bincount(target, minlength=6)
    for count in range(1, 201):
        taken = np.bincount(target[order[:count]], minlength=6)
        short = taken < taken.max() - 1
        assert (taken[short] == there[short]).all(), "only a class that is used up has fewer"
    assert not np.array_equal(order, few_shot_order(target, 6, seed + 10))


def test_samples_of_several_classes_are_each_class_s_turn() -> None:
    """MMEarth's `stratified_subsample_multilabel`: each class has its share of samples of its own, or all it has."""
    rng = np.random.default_rng(3)
    flags = rng.random((300, 8)) < np.geomspace(0.5, 0.01, 8)
    order = few_shot_order(flags, 8, 0)
    assert sorted(order) == list(range(300))
    for count in (8, 40, 120):
        share = count // 8
        has = flags[order[:count]].sum(axis=0)
        assert (has >= np.minimum(share, flags.sum(axis=0))).all()
    none = np.flatnonzero(~flags.any(axis=1))
    assert set(order[len(order) - len(none) :]) == set(none), "samples of no class come last"


def test_fewer_samples_are_part_of_more(tmp_path: Path) -> None:
    labels = write_dataset(tmp_path / "m-eurosat", "classification", samples=24, classes=3)
    task = GeobenchTask(Dataset(folder="m-eurosat"), str(tmp_path / "m-eurosat"))
    assert (task.paper, task.kind, task.classes) == ("EuroSat16k", "classification", 3)
    assert task.train_y.tolist() == [labels[name] for name in task.train]
    assert task.test_y.tolist() == [labels[name] for name in task.test]
    assert not task.overlap
    some = [set(task.choose(count, 4).tolist()) for count in (3, 6, 12, 100)]
    assert [len(one) for one in some] == [3, 6, 12, 12]
    assert some[0] < some[1] < some[2] == some[3]
    assert sorted(task.train_y[list(some[0])]) == [0, 1, 2]


def test_images_are_what_the_reader_gives_standardised(tmp_path: Path) -> None:
    write_dataset(tmp_path / "m-so2sat", "classification", names=SO2SAT_NAMES)
    task = GeobenchTask(Dataset(folder="m-so2sat"), str(tmp_path / "m-so2sat"))
    bands = ["B1", "B2", "B8A", "B8"]
    pixels = task.images(task.test, bands, None)
    dataset = GeobenchDataset(tmp_path / "m-so2sat")
    assert np.array_equal(pixels[1], dataset.sample(task.test[1], bands).pixels)
    statistics = task.statistics(bands)
    images = Images(pixels, statistics)
    expected = (pixels[1] - statistics.mean[:, None, None]) / statistics.std[:, None, None]
    assert np.allclose(images.batch(np.array([1]))[0], expected, atol=1e-5)
    assert np.array_equal(pixels[:, 0], pixels[:, 1]), "B1 is B2's copy"
    larger = task.images(task.test[:2], bands, 12)
    assert np.array_equal(larger[0], resize(pixels[0].astype(np.float32), 12, 12))
    with pytest.raises(InputError, match="no band B10"):
        task.images(task.test, ["B10"], None)


def test_a_data_set_without_a_partition_can_be_tried(tmp_path: Path) -> None:
    write_dataset(tmp_path / "m-x", "segmentation", samples=4)
    for path in (tmp_path / "m-x").glob("*_partition.json"):
        path.unlink()
    url = str(tmp_path / "m-x")
    with pytest.raises(InputError, match="no partition 'default'"):
        GeobenchTask(Dataset(folder="m-x"), url)
    task = GeobenchTask(Dataset(folder="m-x", partition="every sample"), url)
    assert task.overlap == len(task.train) == 4
    assert task.train_y.shape == (4, 8, 8)
    (tmp_path / "m-x" / "default_partition.json").write_text('{"train": [], "test": ["id_0000"]}')
    with pytest.raises(BadLabels, match="0 samples to train on, 1 to test"):
        GeobenchTask(Dataset(folder="m-x"), url)

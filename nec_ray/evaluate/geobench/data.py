"""A data set of GEO-Bench as arrays, and which of its training samples are used."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from nec_ray.errors import BadLabels
from nec_ray.evaluate.geobench.experiment import EVERY_SAMPLE, Dataset
from nec_ray.tiles import resize
from nec_ray.tiles.geobench import GeobenchDataset, Statistics, Task

Target = npt.NDArray[Any]
"""Class numbers int64 (samples,); bool (samples, classes); or masks uint8 (samples, rows, columns)."""
_FOLDERS = {
    "m-bigearthnet": "BigEarth20k",
    "m-so2sat": "So2Sat20k",
    "m-eurosat": "EuroSat16k",
    "m-cashew-plant": "Cashew1k",
    "m-cashew-plantation": "Cashew1k",
    "m-sa-crop-type": "SAcrop3k",
}


@dataclass(frozen=True)
class Images:
    """Pixels as the files have them; encoders are given them standardised, a batch at a time."""

    pixels: npt.NDArray[Any]
    """(samples, bands, rows, columns)."""
    statistics: Statistics
    """Of the bands."""

    def __len__(self) -> int:
        return len(self.pixels)

    def batch(self, chosen: npt.NDArray[np.int64] | slice) -> npt.NDArray[np.float32]:
        """Some samples, standardised; all in float32, since every epoch does it."""
        mean, std = (one.astype(np.float32)[:, None, None] for one in (self.statistics.mean, self.statistics.std))
        found = self.pixels[chosen].astype(np.float32)
        found -= mean
        found /= std
        return found

    def pick(self, chosen: npt.NDArray[np.int64]) -> "Images":
        """Of some samples."""
        return Images(self.pixels[chosen], self.statistics)


@dataclass
class GeobenchTask:
    """Training and test samples of a data set, their labels read once.

    Samples of the split `valid` are not used: the paper tests the last weights.

    Args:
        settings: which part of it.
        url: its folder.

    Raises:
        NotFound, BadSource, InputError: see `GeobenchDataset`.
        BadLabels: no sample to train on, or none to test.
    """

    settings: Dataset
    url: str
    dataset: GeobenchDataset = field(init=False)
    train: list[str] = field(init=False)
    """Names of the samples."""
    test: list[str] = field(init=False)
    train_y: Target = field(init=False)
    test_y: Target = field(init=False)

    def __post_init__(self) -> None:
        self.dataset = GeobenchDataset(self.url, as_published=self.settings.band_names == "published")
        if self.settings.partition == EVERY_SAMPLE:
            self.train = self.test = self.dataset.samples
        else:
            splits = self.dataset.splits(self.settings.partition)
            self.train, self.test = splits["train"], splits["test"]
        if not self.train or not self.test:
            raise BadLabels(
                f"{self.url}: {len(self.train)} samples to train on, {len(self.test)} to test; both are needed"
            )
        self.train_y, self.test_y = (self._labels(names) for names in (self.train, self.test))

    @property
    def name(self) -> str:
        """The folder's, and which part of it."""
        part = "" if self.settings.partition == "default" else f", {self.settings.partition}"
        of = "" if self.settings.statistics == "data set" else f", statistics of {self.settings.statistics}"
        names = "" if self.settings.band_names == "corrected" else ", GEO-Bench's band names"
        return f"{self.dataset.name}{part}{of}{names}"

    @property
    def paper(self) -> str | None:
        """What the papers' tables call it."""
        return self.settings.paper or _FOLDERS.get(self.dataset.name.lower())

    @property
    def kind(self) -> Task:
        """What is predicted."""
        return self.dataset.task

    @property
    def classes(self) -> int:
        """Number of classes."""
        return len(self.dataset.classes)

    @property
    def overlap(self) -> int:
        """Test samples that are trained on, as in GEO-Bench's own small samples."""
        return len(set(self.train) & set(self.test))

    def tile_ids(self, names: Sequence[str]) -> list[str]:
        """What `nec tiles build` calls samples."""
        return [f"{self.dataset.name}/{name}" for name in names]

    def images(self, names: Sequence[str], bands: Sequence[str], pixels: int | None) -> npt.NDArray[Any]:
        """Pixels (samples, bands, rows, columns) in the file's type; float32 where they are resized.

        Args:
            names: of samples.
            bands: which, in this order.
            pixels: a side wanted; as they are where it is None.

        Raises:
            InputError: a band that the data set lacks.
        """
        found = [self._pixels(name, bands, pixels) for name in names]
        sizes = sorted({image.shape[1:] for image in found})
        if len(sizes) > 1:
            raise BadLabels(f"{self.url}: samples of several sizes, such as {sizes[0]} and {sizes[-1]}; give pixels")
        return np.stack(found)

    def statistics(self, bands: Sequence[str]) -> Statistics:
        """Mean and deviation of bands, of the choice that was made."""
        own = self.settings
        return self.dataset.statistics(bands, of=own.statistics, pretraining=own.band_statistics)

    def choose(self, samples: int, seed: int) -> npt.NDArray[np.int64]:
        """Numbers of so many training samples, see `few_shot_order`; of all where there are no more."""
        if samples >= len(self.train):
            return np.arange(len(self.train))
        return np.sort(few_shot_order(self.train_y, self.classes, seed)[:samples])

    def _pixels(self, name: str, bands: Sequence[str], pixels: int | None) -> npt.NDArray[Any]:
        image = self.dataset.sample(name, bands).pixels
        if image.dtype == np.float64:
            image = image.astype(np.float32)
        return image if pixels is None else resize(image.astype(np.float32), pixels, pixels)

    def _labels(self, names: Sequence[str]) -> Target:
        first = self.dataset.bands[:1]
        found = [self.dataset.sample(name, first).label for name in names]
        return np.stack([np.asarray(label) for label in found]).astype(_TYPES[self.kind])


_TYPES: dict[Task, type[np.generic]] = {
    "classification": np.int64,
    "multi-label": np.bool_,
    "segmentation": np.uint8,
}


def few_shot_order(target: Target, classes: int, seed: int) -> npt.NDArray[np.int64]:
    """All samples in an order whose every beginning has the classes as evenly as can be.

    Classes take turns, and each takes a sample of its own that no class has taken yet, at random; a class without one
    sits out. MMEarth's `subsample.py` gives each class its share so, rarer classes first, and the rest in turns; here
    the smaller choices are part of the larger ones too. Masks are taken at random.

    Args:
        target: class numbers int64 (samples,), bool (samples, classes), or masks.
        classes: number of classes.
        seed: of what is random.

    Returns:
        int64 (samples,) numbers of the samples.
    """
    rng = np.random.default_rng(seed)
    order = rng.permutation(len(target))
    if target.ndim > 2:
        return order
    has = target if target.ndim == 2 else target[:, None] == np.arange(classes)
    queues = [order[has[order, number]] for number in np.argsort(has.sum(axis=0), kind="stable")]
    places = np.zeros(len(queues), np.int64)
    taken = np.zeros(len(target), bool)
    chosen: list[int] = []
    while True:
        before = len(chosen)
        for number, queue in enumerate(queues):
            while places[number] < len(queue) and taken[queue[places[number]]]:
                places[number] += 1
            if places[number] < len(queue):
                chosen.append(int(queue[places[number]]))
                taken[chosen[-1]] = True
        if len(chosen) == before:
            break
    return np.array([*chosen, *order[~taken[order]]], np.int64)  # then those of no class

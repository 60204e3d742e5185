"""The protocols: what an encoder, or a pull of an archive, scores on a task (MMEarth, sections 5.1 and 5.2)."""

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from nec_ray.archive import open_archive
from nec_ray.codec import load_codec, parts_of
from nec_ray.evaluate.fitting import Floats, align, device
from nec_ray.evaluate.geobench.data import GeobenchTask, Images, Target
from nec_ray.evaluate.geobench.encoders import Features, PixelSource, build, input_of
from nec_ray.evaluate.geobench.experiment import (
    ArchiveEmbeddings,
    CodecEncoder,
    FineTuning,
    Knn,
    Linear,
    LinearFirstLayer,
    Segmentation,
    SegmentationFrozen,
    is_random,
)
from nec_ray.evaluate.geobench.training import (
    Classifier,
    Inputs,
    Loss,
    Segmenter,
    class_loss,
    fit,
    labels_loss,
    to_device,
)
from nec_ray.evaluate.metrics import (
    accuracy,
    confusion_counts,
    mean_average_precision,
    mean_iou,
    micro_f1,
)
from nec_ray.evaluate.probes import neighbour_votes
from nec_ray.models.segmentation import IGNORED, mask_loss, to_size

_SCORED = 64  # samples at a time
Numbers = npt.NDArray[np.int64]
Settings = FineTuning | Linear | LinearFirstLayer | Knn | Segmentation | SegmentationFrozen


class FromPixels:
    """A task's images, as an encoder takes them.

    Args:
        task: whose.
        source: the encoder.

    Raises:
        InputError: the data set lacks a band of the encoder.
    """

    def __init__(self, task: GeobenchTask, source: PixelSource) -> None:
        bands, pixels, statistics = input_of(source)
        self.statistics = statistics or task.statistics(bands)
        self.source = source
        self.train = Images(task.images(task.train, bands, pixels), self.statistics)
        self.test = Images(task.images(task.test, bands, pixels), self.statistics)
        self._features: dict[int, tuple[Floats, Floats]] = {}

    @property
    def facts(self) -> dict[str, Any]:
        """What rows of results say of it: shape of the input, and bytes of what a consumer would fetch."""
        return {"pixels": self.train.pixels.shape[2], "bands": self.train.pixels.shape[1], **self._fetched}

    @cached_property
    def _fetched(self) -> dict[str, Any]:
        """Of the embeddings before compression, where they are a codec's."""
        if not isinstance(self.source, CodecEncoder):
            return {"bytes_per_tile": None, "encoder_id": None}
        spec = load_codec(self.source.codec).spec
        return {"bytes_per_tile": 4.0 * spec.values, "encoder_id": spec.encoder_id}

    def features(self, seed: int) -> tuple[Floats, Floats]:
        """Mean features float32 (samples, dim) of the training and test samples; with random weights, of a seed."""
        key = seed if is_random(self.source) else 0
        if key not in self._features:
            encoder = self.encoder(seed).to(device()).eval()
            self._features[key] = _features(encoder, self.train), _features(encoder, self.test)
        return self._features[key]

    def encoder(self, seed: int, drop_path: float = 0.0) -> Features:
        """The encoder, as it is before anything is trained."""
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            return build(self.source, drop_path)


class FromArchive:
    """A task's embeddings, pulled from an archive.

    Args:
        task: whose.
        source: the archive, and how many layers.

    Raises:
        BadLabels: the archive lacks a sample's tile.
        MixedCodecs: see `Archive.pull`.
    """

    def __init__(self, task: GeobenchTask, source: ArchiveEmbeddings) -> None:
        archive = open_archive(source.archive, source.version)
        names = [task.tile_ids(part) for part in (task.train, task.test)]
        pull = archive.pull(layers=source.layers, tile_ids=sorted({name for part in names for name in part}))
        train, test = (align(archive.url, pull, part) for part in names)
        maps = [
            part.transpose(0, 2, 1).reshape(len(part), part.shape[2], *grid)
            for part, grid in zip(parts_of(pull.embeddings), pull.grids, strict=True)
        ]
        self._maps = [[one[part] for one in reversed(maps)] for part in (train, test)]
        self.facts = {
            "pixels": None,
            "bands": None,
            "bytes_per_tile": float(pull.n_bytes[np.unique(np.concatenate([train, test]))].mean()),
            "encoder_id": pull.encoder_id,
        }

    @property
    def widths(self) -> tuple[int, ...]:
        """Channels of each scale, the finest first."""
        return tuple(one.shape[1] for one in self._maps[0])

    def features(self, seed: int) -> tuple[Floats, Floats]:
        """Mean tokens float32 (samples, channels) of the training and test samples: of all scales, coarse first."""
        del seed  # nothing is random
        train, test = (np.concatenate([one.mean(axis=(2, 3)) for one in reversed(maps)], axis=1) for maps in self._maps)
        return train, test

    def maps(self, *, test: bool) -> list[Floats]:
        """Embeddings float32 (samples, channels, rows, columns) of each scale, the finest first."""
        return self._maps[1] if test else self._maps[0]


Material = FromPixels | FromArchive


@dataclass(frozen=True)
class Run:
    """One protocol on some training samples, with one seed."""

    task: GeobenchTask
    material: Material
    chosen: Numbers
    """Of the training samples."""
    seed: int

    def scores(self, settings: Settings) -> dict[str, float]:
        """Do it.

        Returns:
            Of one class `accuracy`; of several `map` and `micro_f1`; of masks `mean_iou` and `accuracy`.
        """
        with torch.random.fork_rng():
            torch.manual_seed(self.seed)
            if isinstance(settings, Knn):
                return self._vote(settings)
            if isinstance(settings, SegmentationFrozen):
                return self._segment(settings)
            if isinstance(settings, Linear):
                return self._probe(settings)
            return self._tune(settings)

    @property
    def _train_y(self) -> Target:
        return self.task.train_y[self.chosen]

    def _vote(self, settings: Knn) -> dict[str, float]:
        train, test = self.material.features(self.seed)
        flags = (
            self._train_y if self.task.kind == "multi-label" else np.eye(self.task.classes, dtype=bool)[self._train_y]
        )
        votes = neighbour_votes(train[self.chosen], flags, test, settings.neighbours)
        if self.task.kind == "classification":
            return _score_classes(self.task.test_y, votes.argmax(axis=1), self.task.classes)
        return _score_labels(self.task.test_y, votes, votes > 0.5)

    def _probe(self, settings: Linear) -> dict[str, float]:
        """Mean features do not change while the encoder is frozen, so they are computed once."""
        train, test = self.material.features(self.seed)
        model = Classifier(None, train.shape[1], self.task.classes).to(device())
        mine = train[self.chosen]
        fit(model, lambda some: mine[some], self._target(), self._loss(settings), settings, trained=[model.head])
        return self._score(model, lambda some: test[some])

    def _tune(self, settings: FineTuning | LinearFirstLayer) -> dict[str, float]:
        material = self.material
        assert isinstance(material, FromPixels)  # the experiment has checked
        whole = isinstance(settings, FineTuning)
        encoder = material.encoder(self.seed, settings.drop_path if isinstance(settings, FineTuning) else 0.0)
        model = Classifier(encoder, encoder.dim, self.task.classes).to(device())
        mine = material.train.pick(self.chosen)
        fit(
            model,
            mine.batch,
            self._target(),
            self._loss(settings),
            settings,
            trained=[model] if whole else [model.head, encoder.first_layer()],
            layer_decay=settings.layer_decay if isinstance(settings, FineTuning) else 1.0,
            drop_path=whole,
        )
        return self._score(model, material.test.batch)

    def _segment(self, settings: SegmentationFrozen) -> dict[str, float]:
        material, classes = self.material, self.task.classes
        target = torch.from_numpy(self._train_y)
        if isinstance(material, FromArchive):
            maps, unseen = material.maps(test=False), material.maps(test=True)
            model = Segmenter(None, material.widths, classes).to(device())
            mine = [one[self.chosen] for one in maps]
            fit(model, lambda some: [one[some] for one in mine], target, mask_loss, settings, trained=[model.decoder])
            return self._score_masks(model, lambda some: [one[some] for one in unseen])
        two = settings if isinstance(settings, Segmentation) else None
        encoder = material.encoder(self.seed, two.drop_path if two else 0.0)
        model = Segmenter(encoder, encoder.widths, classes).to(device())
        fit(
            model,
            material.train.pick(self.chosen).batch,
            target,
            mask_loss,
            settings,
            trained=[model.decoder],
            frozen_epochs=two.frozen_epochs if two else settings.epochs,
            thawed=[encoder] if two else None,
            layer_decay=two.layer_decay if two else 1.0,
        )
        return self._score_masks(model, material.test.batch)

    def _target(self) -> torch.Tensor:
        return torch.from_numpy(self._train_y)

    def _loss(self, settings: FineTuning | Linear | LinearFirstLayer) -> Loss:
        make = labels_loss if self.task.kind == "multi-label" else class_loss
        return make(settings.label_smoothing)

    def _score(self, model: nn.Module, inputs: Inputs) -> dict[str, float]:
        logits = np.concatenate([part.cpu().numpy() for part in _outputs(model, inputs, len(self.task.test))])
        if self.task.kind == "classification":
            return _score_classes(self.task.test_y, logits.argmax(axis=1), self.task.classes)
        return _score_labels(self.task.test_y, logits, logits > 0)

    def _score_masks(self, model: nn.Module, inputs: Inputs) -> dict[str, float]:
        classes, masks = self.task.classes, self.task.test_y
        confusion = np.zeros((classes, classes), np.int64)
        start = 0
        for logits in _outputs(model, inputs, len(masks)):
            said = to_size(logits, masks.shape[1:]).argmax(1).cpu().numpy()
            true = masks[start : start + len(said)]
            start += len(said)
            counts = true != IGNORED
            confusion += confusion_counts(true[counts], said[counts], classes)
        return {"mean_iou": mean_iou(confusion), "accuracy": accuracy(confusion)}


def material_of(task: GeobenchTask, source: PixelSource | ArchiveEmbeddings) -> Material:
    """What an encoder's runs on a task need."""
    return FromArchive(task, source) if isinstance(source, ArchiveEmbeddings) else FromPixels(task, source)


@torch.no_grad()
def _outputs(model: nn.Module, inputs: Inputs, count: int) -> Any:
    """Logits of test samples, in batches."""
    where = next(model.parameters()).device
    for part in np.array_split(np.arange(count), -(-count // _SCORED)):
        yield model(to_device(inputs(part), where))


@torch.no_grad()
def _features(encoder: Features, images: Images) -> Floats:
    where = next(encoder.parameters()).device
    parts = np.array_split(np.arange(len(images)), -(-len(images) // _SCORED))
    return np.concatenate([encoder(to_device(images.batch(part), where)).cpu().numpy() for part in parts])


def _score_classes(truth: Target, said: Numbers, classes: int) -> dict[str, float]:
    return {"accuracy": accuracy(confusion_counts(truth, said, classes))}


def _score_labels(truth: Target, scores: npt.NDArray[Any], said: npt.NDArray[np.bool_]) -> dict[str, float]:
    return {"map": mean_average_precision(truth, scores), "micro_f1": micro_f1(truth, said)}

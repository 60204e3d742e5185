"""Trains and scores the same head on what several methods make of the same tiles: rate against accuracy.

Source: NEC, section 5 and Fig. 3; bytes are those that a consumer fetches, heads are trained with several seeds.
"""

import hashlib
import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from nec_ray.archive import Archive, open_archive
from nec_ray.codec import Codec, load_codec
from nec_ray.errors import InputError
from nec_ray.evaluate.bench import machine
from nec_ray.evaluate.consumer import read_tile_labels, score_latents, train_head_on_archive
from nec_ray.evaluate.experiment import Embeddings, Experiment, Method, Task, curves, tasks_of, trains_encoder
from nec_ray.evaluate.finetune import evaluate_pixels
from nec_ray.evaluate.head import score
from nec_ray.evaluate.labels import Labels
from nec_ray.evaluate.methods import Coded, Encodings
from nec_ray.evaluate.probes import linear_probe, mean_tokens, neighbours_vote, retrieval_recall
from nec_ray.evaluate.rate_accuracy import draw_rate_accuracy, draw_rate_distortion

RESULTS_JSON, HEADS = "results.json", "heads"
RATE_ACCURACY_PNG, RATE_DISTORTION_PNG = "rate_accuracy.png", "rate_distortion.png"
FORMAT_VERSION = 1
_KEPT = ("accuracy", "balanced_accuracy", "majority", "recall")

Progress = Callable[[int, int], None]
"""Called with (scores done, scores in all)."""
Row = dict[str, Any]


@dataclass(frozen=True)
class _Work:
    """A method, and all that its tasks need."""

    experiment: Experiment
    method: Method
    archive: Archive
    labels: Labels
    encodings: Encodings
    codec: Codec
    coded: Coded

    @classmethod
    def of(
        cls, experiment: Experiment, method: Method, archive: Archive, labels: Labels, encodings: Encodings
    ) -> "_Work":
        """With all tiles coded and decoded."""
        named = None if isinstance(method, Embeddings) else method.codec
        codec = load_codec(named) if named else archive.codecs(experiment.where)[0]
        return cls(experiment, method, archive, labels, encodings, codec, encodings.code(method, archive, codec))

    @cached_property
    def facts(self) -> Row:
        """What all rows of the method say."""
        return self.encodings.facts(self.method, self.coded, self.codec)

    def scores(self, task: Task, seed: int, head: Path) -> dict[str, Any]:
        """Do one task; the head of an archive's embeddings is written to the folder `head`."""
        if task == "head":
            return self._head(seed, head)
        test, classes = self.labels.is_test, len(self.labels.classes)
        x, y = mean_tokens(self.coded.x), self.labels.target
        if task == "retrieval":
            assert self.method.catalog is not None  # the experiment has checked
            true = mean_tokens(self.encodings.uncompressed(self.method.catalog, self.codec))
            k = self.experiment.retrieval_k
            return {"recall": retrieval_recall(x[~test], x[test], true[~test], true[test], k)}
        if task == "linear":
            predicted = linear_probe(x[~test], y[~test], x[test], classes, seed)
        else:
            predicted = neighbours_vote(x[~test], y[~test], x[test], classes)
        return asdict(score(y[test], predicted, y[~test], classes))

    def _head(self, seed: int, folder: Path) -> dict[str, Any]:
        how: dict[str, Any] = {"epochs": self.experiment.epochs, "seed": seed}
        method, x, y, test = self.method, self.coded.x, self.labels.target, self.labels.is_test
        if isinstance(method, Embeddings):
            return train_head_on_archive(
                self.archive,
                self.experiment.labels,
                folder,
                decoder_layer=method.decoder_layer,
                layers=method.layers,
                where=self.experiment.where,
                **how,
            )
        if trains_encoder(method):
            classes = len(self.labels.classes)
            return asdict(evaluate_pixels(x[~test], y[~test], x[test], y[test], self.codec, classes=classes, **how))
        return score_latents(x, self.labels, **how)


def compare(experiment: Experiment, out: Path, progress: Progress | None = None) -> dict[str, Any]:
    """Run an experiment; what an earlier run of the same experiment finished is not done again.

    Args:
        experiment: what is compared.
        out: folder for results.json, rate_accuracy.png, rate_distortion.png, and the heads that were trained.
        progress: called after each score.

    Returns:
        What results.json holds: `results`, a row a method, task and seed, and `summary`, a row a method and task.

    Raises:
        NotFound, BadLabels, BadQuery: see `train_head_on_archive`.
        InputError: the methods' archives do not hold the same labelled tiles; or see `Encodings.code`.
    """
    archives = [open_archive(m.archive, m.version if isinstance(m, Embeddings) else None) for m in experiment.methods]
    labels = [read_tile_labels(archive, experiment.labels, experiment.where) for archive in archives]
    for method, own in zip(experiment.methods[1:], labels[1:], strict=True):
        _check_same(labels[0], own, experiment.methods[0].name, method)
    out.mkdir(parents=True, exist_ok=True)
    digest = _digest(labels[0])
    known = {row["key"]: row for row in _earlier(out / RESULTS_JSON)}
    encodings = Encodings(labels[0])
    runs = [list(_runs(method, experiment)) for method in experiment.methods]
    rows: list[Row] = []
    document: dict[str, Any] = {}
    for method, archive, mine in zip(experiment.methods, archives, runs, strict=True):
        work: _Work | None = None  # and that of the method before leaves the memory
        for task, seed in mine:
            asked = _asked(experiment, method, archive.version, task, seed)
            key = hashlib.sha256(json.dumps([asked, digest]).encode()).hexdigest()
            found = known.get(key)
            if found is None:
                started = time.monotonic()
                work = work or _Work.of(experiment, method, archive, labels[0], encodings)
                scores = work.scores(task, seed, out / HEADS / key[:16])
                kept = {name: scores.get(name) for name in _KEPT} | {"tiles": len(labels[0])}
                found = {**asked, **kept, **work.facts, "seconds": time.monotonic() - started, "key": key}
            rows.append({**found, "method": method.name})
            document = _write(out, experiment, rows)
            if progress:
                progress(len(rows), sum(map(len, runs)))
    by_curve = curves(experiment)
    draw_rate_accuracy(document["summary"], by_curve, experiment.title, out / RATE_ACCURACY_PNG)
    if any(row["snr_db"] is not None for row in document["summary"]):
        draw_rate_distortion(document["summary"], by_curve, experiment.title, out / RATE_DISTORTION_PNG)
    return document


def _runs(method: Method, experiment: Experiment) -> Iterator[tuple[Task, int]]:
    """Each task and seed; neighbours are the same with all seeds."""
    for task in tasks_of(method, experiment.tasks):
        for seed in experiment.seeds[:1] if task in {"knn", "retrieval"} else experiment.seeds:
            yield task, seed


def _asked(experiment: Experiment, method: Method, version: int, task: Task, seed: int) -> Row:
    """All that a score depends on beside the tiles, and that rows say of it."""
    asked = {**method.model_dump(exclude={"name", "curve"}), "version": version, "task": task, "seed": seed}
    if task == "head":
        asked["epochs"] = experiment.epochs
    if task == "retrieval":
        asked["k"] = experiment.retrieval_k
    return asked


def _summary(rows: Sequence[Row]) -> Iterator[Row]:
    """A row a method and task: mean and spread (sample standard deviation) over seeds."""
    for name, task in dict.fromkeys((row["method"], row["task"]) for row in rows):
        mine = [row for row in rows if (row["method"], row["task"]) == (name, task)]
        measure = "recall" if task == "retrieval" else "accuracy"
        values = np.array([row[measure] for row in mine])
        shared = ("bytes_per_tile", "shared_bytes", "bits_per_channel", "bits_per_pixel", "mse", "snr_db", "majority")
        yield {
            "method": name,
            "task": task,
            "accuracy": None,
            "recall": None,
            measure: float(values.mean()),
            f"{measure}_std": float(values.std(ddof=1)) if len(mine) > 1 else None,
            **{key: mine[0][key] for key in shared},
            "seeds": len(mine),
        }


def _write(out: Path, experiment: Experiment, rows: Sequence[Row]) -> dict[str, Any]:
    document = {
        "format": FORMAT_VERSION,
        "experiment": experiment.model_dump(),
        "machine": machine(),
        "results": list(rows),
        "summary": list(_summary(rows)),
    }
    temporary = out / f".{RESULTS_JSON}"
    temporary.write_text(json.dumps(document, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    temporary.replace(out / RESULTS_JSON)
    return document


def _earlier(path: Path) -> list[Mapping[str, Any]]:
    """Rows of an earlier run."""
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
        if document["format"] != FORMAT_VERSION:
            raise InputError(f"{path}: results of format {document['format']}; give another --out")
        return [row for row in document["results"] if isinstance(row["key"], str)]
    except FileNotFoundError:
        return []
    except (ValueError, TypeError, KeyError):
        raise InputError(f"{path}: no results of `nec evaluate`; give another --out, or remove it") from None


def _check_same(first: Labels, other: Labels, name: str, method: Method) -> None:
    if _digest(first) == _digest(other):
        return
    apart = sorted(set(first.tile_ids) ^ set(other.tile_ids))
    said = f"{len(apart)} of them only in one, such as {apart[0]}" if apart else "with other labels or another split"
    raise InputError(
        f"{method.archive}: method {method.name!r} is on other labelled tiles than {name!r} ({said}); encode the same "
        "catalog, or choose tiles that all have with `where`"
    )


def _digest(labels: Labels) -> str:
    rows = zip(labels.tile_ids, labels.target.tolist(), labels.is_test.tolist(), strict=True)
    return hashlib.sha256(json.dumps([labels.classes, list(rows)]).encode()).hexdigest()

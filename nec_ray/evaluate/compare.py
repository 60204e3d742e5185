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
from nec_ray.codec import Arrays, Codec, load_codec, of_tiles, parts_of
from nec_ray.errors import InputError
from nec_ray.evaluate.bench import machine
from nec_ray.evaluate.consumer import read_tile_labels, read_tile_masks, score_latents, train_on_labels
from nec_ray.evaluate.equal_bytes import draw_equal_bytes, sample_tiles, write_sample
from nec_ray.evaluate.experiment import (
    OF_HEADS,
    OF_MASKS,
    Embeddings,
    Experiment,
    Method,
    Task,
    Uncompressed,
    curves,
    reference_curve,
    tasks_of,
    trains_encoder,
)
from nec_ray.evaluate.finetune import evaluate_pixels, segment_pixels
from nec_ray.evaluate.head import score
from nec_ray.evaluate.label_shares import choose_labelled, with_test
from nec_ray.evaluate.labels import Labels
from nec_ray.evaluate.masks import Masks
from nec_ray.evaluate.methods import Coded, Encodings
from nec_ray.evaluate.probes import linear_probe, mean_tokens, neighbours_vote, retrieval_recall
from nec_ray.evaluate.rate_accuracy import draw_label_efficiency, draw_rate_accuracy, draw_rate_distortion
from nec_ray.evaluate.report import REPORT_HTML, write_report
from nec_ray.evaluate.savings import MEASURES, savings_rows
from nec_ray.evaluate.segment import evaluate_segmentation, predict_classes
from nec_ray.models.dataset import on_finest
from nec_ray.models.embed import first_decoder_layer
from nec_ray.models.head_files import load_head
from nec_ray.models.segmentation import PixelHead, SegmentationDecoder

RESULTS_JSON, HEADS, MASKS = "results.json", "heads", "masks"
MASKS_PNG, LABELS_PNG = "masks.png", "label_efficiency.png"
RATE_ACCURACY_PNG, RATE_DISTORTION_PNG = "rate_accuracy.png", "rate_distortion.png"
FORMAT_VERSION = 1
_KEPT = ("accuracy", "balanced_accuracy", "majority", "recall", "mean_iou", "iou")

Progress = Callable[[int, int], None]
"""Called with (scores done, scores in all)."""
Row = dict[str, Any]


@dataclass(frozen=True)
class _Work:
    """A method, and all that its tasks need."""

    experiment: Experiment
    method: Method
    archive: Archive
    labels: Labels | Masks
    encodings: Encodings
    codec: Codec
    coded: Coded

    @classmethod
    def of(
        cls, experiment: Experiment, method: Method, archive: Archive, labels: Labels | Masks, encodings: Encodings
    ) -> "_Work":
        """With all tiles coded and decoded.

        Raises:
            InputError: the codec has several grid scales, and the method codes none or one.
        """
        named = None if isinstance(method, Embeddings) else method.codec
        codec = load_codec(named) if named else archive.codecs(experiment.where)[0]
        if len(codec.scales()) > 1 and not isinstance(method, Embeddings | Uncompressed):
            raise InputError(
                f"method {method.name}: codec {codec.id[:12]} has several grid scales; methods of kind nec and "
                "uncompressed are compared on these"
            )
        return cls(experiment, method, archive, labels, encodings, codec, encodings.code(method, archive, codec))

    @cached_property
    def facts(self) -> Row:
        """What all rows of the method say."""
        return self.encodings.facts(self.method, self.coded, self.codec)

    def scores(self, task: Task, seed: int, share: float, folder: Path) -> dict[str, Any]:
        """Do one task with a share of the labels; the head of an archive's embeddings is written to `folder`."""
        used = choose_labelled(self.labels, share, seed)
        known, x = self.labels.pick(used), of_tiles(self.coded.x, used)
        if isinstance(known, Masks) and task in OF_MASKS:
            return self._segment(known, x, OF_MASKS[task], seed, folder)
        if task == "retrieval":
            return self._retrieve()
        assert isinstance(known, Labels)  # the experiment has checked
        if task == "head":
            return self._head(known, x, seed, folder)
        test, classes = known.is_test, len(known.classes)
        x, y = mean_tokens(x), known.target
        if task == "linear":
            predicted = linear_probe(x[~test], y[~test], x[test], classes, seed)
        else:
            predicted = neighbours_vote(x[~test], y[~test], x[test], classes)
        return asdict(score(y[test], predicted, y[~test], classes))

    def _retrieve(self) -> dict[str, Any]:
        assert self.method.catalog is not None  # the experiment has checked
        x, test = mean_tokens(self.coded.x), self.labels.is_test
        true = mean_tokens(self.encodings.uncompressed(self.method.catalog, self.codec))
        return {"recall": retrieval_recall(x[~test], x[test], true[~test], true[test], self.experiment.retrieval_k)}

    def _on_archive(
        self, known: Labels | Masks, seed: int, folder: Path, decoder: SegmentationDecoder | None = None
    ) -> dict[str, Any]:
        assert isinstance(self.method, Embeddings)
        return train_on_labels(
            self.archive,
            known,
            folder,
            decoder=decoder,
            decoder_layer=self.method.decoder_layer,
            layers=self.method.layers,
            where=self.experiment.where,
            epochs=self.experiment.epochs,
            seed=seed,
        )

    def _head(self, known: Labels, x: Arrays, seed: int, folder: Path) -> dict[str, Any]:
        how: dict[str, Any] = {"epochs": self.experiment.epochs, "seed": seed}
        y, test = known.target, known.is_test
        if isinstance(self.method, Embeddings):
            return self._on_archive(known, seed, folder)
        if trains_encoder(self.method):
            classes = len(known.classes)
            return asdict(evaluate_pixels(x[~test], y[~test], x[test], y[test], self.codec, classes=classes, **how))
        return score_latents(on_finest(x, self.coded.grids), known, self.codec, **how)

    def _segment(
        self, known: Masks, x: Arrays, decoder: SegmentationDecoder, seed: int, folder: Path
    ) -> dict[str, Any]:
        """Scores, and under `prediction` what was said of the `sample_tiles`."""
        test, y = known.is_test, known.masks
        some, shape = sample_tiles(int(test.sum())), (y.shape[1], y.shape[2])
        if isinstance(self.method, Embeddings):
            scores = self._on_archive(known, seed, folder, decoder)
            head = load_head(folder, lambda: first_decoder_layer(self.codec))
            assert isinstance(head.module, PixelHead)
            drawn = head.as_read(of_tiles(x, np.flatnonzero(test)[some]), self.coded.grids)
            return scores | {"prediction": np.concatenate(list(predict_classes(head.module, drawn, shape)))}
        how: dict[str, Any] = {"classes": len(known.classes), "epochs": self.experiment.epochs, "seed": seed}
        how["decoder"] = decoder
        if trains_encoder(self.method):
            found, said = segment_pixels(x[~test], y[~test], x[test], y[test], self.codec, **how)
        else:
            how |= {"grid": self.codec.spec.token_grid, "grids": self.coded.grids}
            result = evaluate_segmentation(of_tiles(x, ~test), y[~test], of_tiles(x, test), y[test], **how)
            found, said = result.scores, result.predicted
        return asdict(found) | {"prediction": said[some]}


def compare(experiment: Experiment, out: Path, progress: Progress | None = None) -> dict[str, Any]:
    """Run an experiment; what an earlier run of the same experiment finished is not done again.

    Args:
        experiment: what is compared.
        out: folder for results.json, report.html, rate_accuracy.png, rate_distortion.png, masks.png, and the heads that
            were trained.
        progress: called after each score.

    Returns:
        What results.json holds: `results`, a row a method, task, share of labels and seed; `summary`, a row a method,
        task and share; `savings`, see `savings_rows`; `bits_by_channel` of each codec whose embeddings were pulled.

    Raises:
        NotFound, BadLabels, BadQuery: see `train_head_on_archive`.
        InputError: the methods' archives do not hold the same labelled tiles; or see `Encodings.code`.
    """
    archives = [open_archive(m.archive, m.version if isinstance(m, Embeddings) else None) for m in experiment.methods]
    labels = [_labels(archive, experiment) for archive in archives]
    for method, own in zip(experiment.methods[1:], labels[1:], strict=True):
        _check_same(labels[0], own, experiment.methods[0].name, method)
    out.mkdir(parents=True, exist_ok=True)
    digest = _digest(labels[0])
    earlier = _earlier(out / RESULTS_JSON)
    known = {row["key"]: row for row in earlier.get("results", [])}
    bits: dict[str, list[float]] = earlier.get("bits_by_channel", {})
    encodings = Encodings(labels[0])
    runs = [list(_runs(method, experiment)) for method in experiment.methods]
    rows: list[Row] = []
    document: dict[str, Any] = {}
    for method, archive, mine in zip(experiment.methods, archives, runs, strict=True):
        work: _Work | None = None  # and that of the method before leaves the memory
        for task, share, seed in mine:
            asked = _asked(experiment, method, archive.version, task, share, seed)
            key = hashlib.sha256(json.dumps([asked, digest]).encode()).hexdigest()
            found = known.get(key)
            if found is None:
                started = time.monotonic()
                work = work or _Work.of(experiment, method, archive, labels[0], encodings)
                if isinstance(method, Embeddings) and work.codec.id not in bits:
                    bits |= _bits_by_channel(work)
                scores = work.scores(task, seed, share, out / HEADS / key[:16])
                if "prediction" in scores:
                    write_sample(out / MASKS / f"{key[:16]}.npz", scores["prediction"])
                kept = {name: scores.get(name) for name in _KEPT} | {"tiles": len(labels[0])}
                found = {**asked, **kept, **work.facts, "seconds": time.monotonic() - started, "key": key}
            rows.append({**found, "method": method.name})
            document = _write(out, experiment, rows, bits)
            if progress:
                progress(len(rows), sum(map(len, runs)))
    _draw(document, experiment, labels[0], out)
    return document


def _draw(document: dict[str, Any], experiment: Experiment, labels: Labels | Masks, out: Path) -> None:
    """Pictures and the page."""
    by_curve, summary = curves(experiment), most_labels(document["summary"])
    draw_rate_accuracy(summary, by_curve, experiment.title, out / RATE_ACCURACY_PNG)
    if len(experiment.label_shares) > 1:
        trained = len(labels) - int(labels.is_test.sum())
        draw_label_efficiency(document["summary"], by_curve, trained, experiment.title, out / LABELS_PNG)
    if any(row["snr_db"] is not None for row in summary):
        draw_rate_distortion(summary, by_curve, experiment.title, out / RATE_DISTORTION_PNG)
    masks = None
    of_masks = [task for task in experiment.tasks if task in OF_MASKS]
    if isinstance(labels, Masks) and of_masks:
        keys: dict[str, str] = {}
        for row in document["results"]:
            if row["task"] == of_masks[0] and row["label_share"] == max(experiment.label_shares):
                keys.setdefault(row["method"], row["key"])
        files = {name: out / MASKS / f"{key[:16]}.npz" for name, key in keys.items()}
        drawn = [row for row in summary if row["task"] == of_masks[0]]
        masks = draw_equal_bytes(drawn, by_curve, reference_curve(experiment), labels, files, out / MASKS_PNG)
    write_report(document, by_curve, len(labels) - int(labels.is_test.sum()), masks, out / REPORT_HTML)


def _labels(archive: Archive, experiment: Experiment) -> Labels | Masks:
    """Labels, or masks where they are segmented, with the experiment's own split if it has one."""
    found: Labels | Masks
    if any(task in OF_MASKS for task in experiment.tasks):
        found = read_tile_masks(archive, str(experiment.labels), experiment.classes, experiment.where)
    else:
        found = read_tile_labels(archive, experiment.labels, experiment.where)
    return found if experiment.test is None else with_test(found, archive, experiment.test)


def _bits_by_channel(work: _Work) -> dict[str, list[float]]:
    """Entropy of each channel's symbols over all tiles, bits, by codec id; none where layers were left out."""
    x, codec = work.coded.x, work.codec
    left_out = isinstance(work.method, Embeddings) and work.method.layers not in {None, len(codec.spec.layers)}
    if left_out or sum(part.shape[2] for part in parts_of(x)) < codec.spec.channels:
        return {}
    bits = [0.0] * codec.spec.channels
    for symbols, scale in zip(parts_of(codec.quantise(x)), codec.scales(), strict=True):
        for channel, row in enumerate(scale.rows):
            counts = np.unique(symbols[:, :, channel], return_counts=True)[1]
            share = counts / counts.sum()
            bits[row] = max(0.0, float(-(share * np.log2(share)).sum()))
    return {codec.id: bits}


def _runs(method: Method, experiment: Experiment) -> Iterator[tuple[Task, float, int]]:
    """Each task, share of labels and seed; neighbours among all tiles are the same with all seeds."""
    for task in tasks_of(method, experiment.tasks):
        for share in [1.0] if task == "retrieval" else experiment.label_shares:
            once = task == "retrieval" or (task == "knn" and share == 1)
            for seed in experiment.seeds[:1] if once else experiment.seeds:
                yield task, share, seed


def _asked(experiment: Experiment, method: Method, version: int, task: Task, share: float, seed: int) -> Row:
    """All that a score depends on beside the tiles, and that rows say of it."""
    asked = {**method.model_dump(exclude={"name", "curve"}), "version": version, "task": task, "seed": seed}
    asked["label_share"] = share
    if task in OF_HEADS:
        asked["epochs"] = experiment.epochs
    if task == "retrieval":
        asked["k"] = experiment.retrieval_k
    return asked


def most_labels(summary: Sequence[Row]) -> list[Row]:
    """Of each task the rows of the largest share of labels."""
    most: dict[str, float] = {}
    for row in summary:
        most[row["task"]] = max(row["label_share"], most.get(row["task"], 0.0))
    return [row for row in summary if row["label_share"] == most[row["task"]]]


def _summary(rows: Sequence[Row]) -> Iterator[Row]:
    """A row a method, task and share of labels: mean and spread (sample standard deviation) over seeds."""
    for name, task, share in dict.fromkeys((row["method"], row["task"], row["label_share"]) for row in rows):
        mine = [row for row in rows if (row["method"], row["task"], row["label_share"]) == (name, task, share)]
        shared = ("bytes_per_tile", "shared_bytes", "bits_per_channel", "bits_per_pixel", "mse", "snr_db", "majority")
        measured: Row = {}
        for measure in ("accuracy", "recall", "mean_iou"):
            measured[measure] = measured[f"{measure}_std"] = None
            if (task, measure) in MEASURES:
                values = np.array([row[measure] for row in mine])
                measured[measure] = float(values.mean())
                measured[f"{measure}_std"] = float(values.std(ddof=1)) if len(mine) > 1 else None
        yield {
            "method": name,
            "kind": mine[0]["kind"],
            "task": task,
            "label_share": share,
            **measured,
            **{key: mine[0][key] for key in (*shared, "codec_id", "encoder_id")},
            "seeds": len(mine),
        }


def _write(out: Path, experiment: Experiment, rows: Sequence[Row], bits: Mapping[str, list[float]]) -> dict[str, Any]:
    summary = list(_summary(rows))
    document = {
        "format": FORMAT_VERSION,
        "experiment": experiment.model_dump(),
        "machine": machine(),
        "results": list(rows),
        "summary": summary,
        "savings": savings_rows(most_labels(summary), curves(experiment), reference_curve(experiment)),
        "bits_by_channel": dict(bits),
    }
    temporary = out / f".{RESULTS_JSON}"
    temporary.write_text(json.dumps(document, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    temporary.replace(out / RESULTS_JSON)
    return document


def _earlier(path: Path) -> dict[str, Any]:
    """Results of an earlier run; nothing where there was none."""
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
        if document["format"] != FORMAT_VERSION:
            raise InputError(f"{path}: results of format {document['format']}; give another --out")
        rows = [row for row in document["results"] if isinstance(row["key"], str)]
        return {"results": rows, "bits_by_channel": dict(document["bits_by_channel"])}
    except FileNotFoundError:
        return {}
    except (ValueError, TypeError, KeyError):
        raise InputError(f"{path}: no results of `nec evaluate`; give another --out, or remove it") from None


def _check_same(first: Labels | Masks, other: Labels | Masks, name: str, method: Method) -> None:
    if _digest(first) == _digest(other):
        return
    apart = sorted(set(first.tile_ids) ^ set(other.tile_ids))
    said = f"{len(apart)} of them only in one, such as {apart[0]}" if apart else "with other labels or another split"
    raise InputError(
        f"{method.archive}: method {method.name!r} is on other labelled tiles than {name!r} ({said}); encode the same "
        "catalog, or choose tiles that all have with `where`"
    )


def _digest(labels: Labels | Masks) -> str:
    if isinstance(labels, Masks):
        target = [hashlib.sha256(mask.tobytes()).hexdigest() for mask in labels.masks]
        target.append(str(labels.masks.shape))
    else:
        target = labels.target.tolist()
    rows = [labels.classes, labels.tile_ids, target, labels.is_test.tolist()]
    return hashlib.sha256(json.dumps(rows).encode()).hexdigest()

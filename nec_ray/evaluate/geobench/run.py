"""Runs an evaluation on GEO-Bench: every encoder, protocol, number of samples and seed, and the page of it."""

import hashlib
import json
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from nec_ray.archive import open_archive
from nec_ray.codec import load_codec
from nec_ray.errors import InputError
from nec_ray.evaluate.bench import machine
from nec_ray.evaluate.fitting import device
from nec_ray.evaluate.geobench.data import GeobenchTask
from nec_ray.evaluate.geobench.experiment import (
    ArchiveEmbeddings,
    CodecEncoder,
    Dataset,
    Encoder,
    GeobenchExperiment,
    Protocol,
    is_random,
    protocols_of,
)
from nec_ray.evaluate.geobench.papers import MEASURES, papers
from nec_ray.evaluate.geobench.protocols import Material, Run, material_of
from nec_ray.evaluate.geobench.report import write_pictures, write_report
from nec_ray.storage import Store, normalise_url

RESULTS_JSON, REPORT_HTML = "results.json", "report.html"
FORMAT_VERSION = 1
_KIND = "geobench"
_ALL_MEASURES = tuple(dict.fromkeys(name for names in MEASURES.values() for name in names))

Progress = Callable[[int, int], None]
"""Called with (scores done, scores in all)."""
Row = dict[str, Any]


def run_geobench(experiment: GeobenchExperiment, out: Path, progress: Progress | None = None) -> dict[str, Any]:
    """Run an evaluation; what an earlier run finished is not done again.

    Args:
        experiment: what is evaluated.
        out: folder for results.json, report.html and pictures.
        progress: called after each score.

    Returns:
        What results.json holds: `results`, a row an encoder, data set, protocol, number of samples and seed; `summary`,
        a row for all seeds together.

    Raises:
        NotFound, BadSource, BadLabels: of a data set; see `GeobenchTask`.
        BadCheckpoint: weights that do not fit their encoder.
        InputError: an encoder for which there is nothing to do, or that no row of the papers' tables is; two data
            sets of one name.
    """
    _check_papers(experiment)
    tasks = [GeobenchTask(dataset, _url(experiment, dataset)) for dataset in experiment.geobench]
    names = [task.name for task in tasks]
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise InputError(f"two data sets are named {twice}, after their folders; make two evaluations")
    plan = [
        (task, encoder, list(_asked(experiment, task, encoder))) for task in tasks for encoder in experiment.encoders
    ]
    for encoder in experiment.encoders:
        if not any(asked for _, one, asked in plan if one is encoder):
            raise InputError(f"encoder {encoder.name!r}: none of the protocols can be done with it on these data sets")
    out.mkdir(parents=True, exist_ok=True)
    known = {row["key"]: row for row in _earlier(out / RESULTS_JSON)}
    total = sum(len(asked) for *_, asked in plan)
    rows: list[Row] = []
    document: dict[str, Any] = {}
    for task, encoder, asked in plan:
        material: Material | None = None  # and that of the encoder before leaves the memory
        for row in asked:
            found = known.get(row["key"])
            if found is None:
                started = time.monotonic()
                material = material or material_of(task, encoder)
                chosen = task.choose(row["samples"], row["seed"])
                scores = Run(task, material, chosen, row["seed"]).scores(getattr(experiment, row["protocol"]))
                measures = {name: scores.get(name) for name in _ALL_MEASURES}
                found = {**row, **measures, **material.facts, "device": device().type}
                found["seconds"] = time.monotonic() - started
            rows.append({**found, **_names(task, encoder)})
            document = _write(out, experiment, rows)
            if progress:
                progress(len(rows), total)
    write_report(document, write_pictures(document, experiment.curves(), out), out / REPORT_HTML)
    return document


def _url(experiment: GeobenchExperiment, dataset: Dataset) -> str:
    folder = dataset.folder
    return normalise_url(folder if experiment.root is None else f"{experiment.root.rstrip('/')}/{folder}")


def _check_papers(experiment: GeobenchExperiment) -> None:
    known = papers().encoders()
    for encoder in experiment.encoders:
        paper = getattr(encoder, "paper", None)
        if paper is not None and paper not in known:
            rows = ", ".join(sorted(known))
            raise InputError(f"encoder {encoder.name!r}: no row {paper!r} in the papers' tables; there are {rows}")


def _asked(experiment: GeobenchExperiment, task: GeobenchTask, encoder: Encoder) -> Iterator[Row]:
    """All that each score depends on; nearest neighbours of all samples are the same with all seeds."""
    digest, identity = _digest(task), _identity(encoder)
    for protocol in protocols_of(experiment, encoder, of_masks=task.kind == "segmentation"):
        settings = getattr(experiment, protocol)
        most = len(task.train)
        for count in dict.fromkeys(
            most if samples == "all" else min(samples, most) for samples in task.settings.samples
        ):
            once = protocol == "knn" and count == most and not is_random(encoder)
            for seed in experiment.seeds[:1] if once else experiment.seeds:
                row: Row = {
                    "encoder": encoder.model_dump(exclude={"name", "curve", "paper"}) | identity,
                    "dataset": task.settings.model_dump(exclude={"folder", "paper", "samples"}),
                    "protocol": protocol,
                    "settings": settings.model_dump(),
                    "samples": count,
                    "seed": seed,
                }
                row["key"] = hashlib.sha256(json.dumps([row, digest]).encode()).hexdigest()
                yield row


def _identity(encoder: Encoder) -> Row:
    """What is at the paths that it names: other weights there are another encoder."""
    if isinstance(encoder, ArchiveEmbeddings):
        return {"version": open_archive(encoder.archive, encoder.version).version}
    if isinstance(encoder, CodecEncoder):
        return {"codec_id": load_codec(encoder.codec).id}
    if encoder.weights is None:
        return {}
    folder, _, name = normalise_url(encoder.weights).rpartition("/")
    return {"weights_etag": Store(folder or "/").etag(name)}


def _names(task: GeobenchTask, encoder: Encoder) -> Row:
    """What rows say of data set and encoder beside what their scores depend on."""
    return {
        "method": encoder.name,
        "kind": encoder.kind,
        "weights": "random" if is_random(encoder) else "pretrained",
        "paper": getattr(encoder, "paper", None),
        "task_name": task.name,
        "paper_dataset": task.paper,
        "task": task.kind,
        "classes": task.classes,
        "statistics": task.settings.statistics,
        "train_samples": len(task.train),
        "test_samples": len(task.test),
        "overlap": task.overlap,
    }


def _digest(task: GeobenchTask) -> str:
    labels = [hashlib.sha256(np.ascontiguousarray(y).tobytes()).hexdigest() for y in (task.train_y, task.test_y)]
    text = json.dumps([task.dataset.classes, task.train, task.test, labels])
    return hashlib.sha256(text.encode()).hexdigest()


def _summary(rows: Sequence[Row]) -> Iterator[Row]:
    """A row for all seeds of a run: mean and spread (sample standard deviation)."""
    groups: dict[tuple[str, str, Protocol, int], list[Row]] = {}
    for row in rows:
        groups.setdefault((row["method"], row["task_name"], row["protocol"], row["samples"]), []).append(row)
    for mine in groups.values():
        scores: Row = {}
        for name in _ALL_MEASURES:
            values = [row[name] for row in mine if row[name] is not None]
            scores[name] = float(np.mean(values)) if values else None
            scores[f"{name}_std"] = float(np.std(values, ddof=1)) if len(values) > 1 else None
        kept = {key: value for key, value in mine[0].items() if key not in {*_ALL_MEASURES, "seed", "key", "seconds"}}
        yield {**kept, **scores, "seeds": len(mine), "seconds": sum(row["seconds"] for row in mine)}


def _write(out: Path, experiment: GeobenchExperiment, rows: Sequence[Row]) -> dict[str, Any]:
    document = {
        "format": FORMAT_VERSION,
        "kind": _KIND,
        "experiment": experiment.model_dump(exclude_none=True),
        "machine": machine(),
        "results": list(rows),
        "summary": list(_summary(rows)),
    }
    temporary = out / f".{RESULTS_JSON}"
    temporary.write_text(json.dumps(document, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    temporary.replace(out / RESULTS_JSON)
    return document


def _earlier(path: Path) -> list[Row]:
    """Rows of an earlier run; none where there was none."""
    if not path.exists():
        return []
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
        if (document["kind"], document["format"]) == (_KIND, FORMAT_VERSION):
            return [row for row in document["results"] if isinstance(row["key"], str)]
    except (ValueError, TypeError, KeyError):
        pass
    raise InputError(f"{path}: no results of GEO-Bench by this release; give another --out, or remove it")

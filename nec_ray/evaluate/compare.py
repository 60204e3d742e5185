"""Trains and scores the same head on what several methods make of the same tiles: rate against accuracy.

Source: NEC, section 5 and Fig. 3; bytes are those that a consumer fetches, heads are trained with several seeds.
"""

import hashlib
import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np

from nec_ray.archive import open_archive
from nec_ray.errors import InputError
from nec_ray.evaluate.bench import machine
from nec_ray.evaluate.consumer import read_tile_labels, score_latents, train_head_on_archive, uncompressed_latents
from nec_ray.evaluate.experiment import Embeddings, Experiment, Method, curves
from nec_ray.evaluate.fitting import Floats
from nec_ray.evaluate.labels import Labels
from nec_ray.evaluate.rate_accuracy import draw_rate_accuracy
from nec_ray.tiles import read_catalog

RESULTS_JSON, RATE_ACCURACY_PNG, HEADS = "results.json", "rate_accuracy.png", "heads"
FORMAT_VERSION = 1
_KEPT = ("accuracy", "balanced_accuracy", "majority", "tiles", "bytes_per_tile")

Progress = Callable[[int, int], None]
"""Called with (heads trained, heads in all)."""
Row = dict[str, Any]


def compare(experiment: Experiment, out: Path, progress: Progress | None = None) -> dict[str, Any]:
    """Run an experiment; what an earlier run of the same experiment finished is not done again.

    Args:
        experiment: what is compared.
        out: folder for results.json, rate_accuracy.png, and the heads that were trained.
        progress: called after each head.

    Returns:
        What results.json holds: `results`, a row a method and seed, and `summary`, a row a method.

    Raises:
        NotFound, BadLabels, BadQuery: see `train_head_on_archive`.
        InputError: the methods' archives do not hold the same labelled tiles.
    """
    archives = [open_archive(m.archive, m.version if isinstance(m, Embeddings) else None) for m in experiment.methods]
    labels = [read_tile_labels(archive, experiment.labels, experiment.where) for archive in archives]
    for method, own in zip(experiment.methods[1:], labels[1:], strict=True):
        _check_same(labels[0], own, experiment.methods[0].name, method)
    out.mkdir(parents=True, exist_ok=True)
    digest = _digest(labels[0])
    known = {row["key"]: row for row in _earlier(out / RESULTS_JSON)}
    rows: list[Row] = []
    latents: tuple[Method, Floats] | None = None
    document: dict[str, Any] = {}
    heads = len(experiment.methods) * len(experiment.seeds)
    for (method, archive, own), seed in product(
        zip(experiment.methods, archives, labels, strict=True), experiment.seeds
    ):
        facts = {**method.model_dump(exclude={"name", "curve"}), "version": archive.version, "seed": seed}
        key = hashlib.sha256(json.dumps([facts, experiment.epochs, digest]).encode()).hexdigest()
        found = known.get(key)
        if found is None:
            started = time.monotonic()
            codec = archive.codecs(experiment.where)[0]
            if isinstance(method, Embeddings):
                scores = train_head_on_archive(
                    archive,
                    experiment.labels,
                    out / HEADS / key[:16],
                    decoder_layer=method.decoder_layer,
                    layers=method.layers,
                    where=experiment.where,
                    epochs=experiment.epochs,
                    seed=seed,
                )
            else:
                if latents is None or latents[0] is not method:
                    latents = method, uncompressed_latents(own, read_catalog(method.catalog), codec)
                scores = score_latents(latents[1], own, codec, epochs=experiment.epochs, seed=seed)
            kept = {name: scores[name] for name in _KEPT}
            found = {**facts, **kept, "codec_id": codec.id, "seconds": time.monotonic() - started, "key": key}
        rows.append({**found, "method": method.name})
        document = _write(out, experiment, rows)
        if progress:
            progress(len(rows), heads)
    draw_rate_accuracy(document["summary"], curves(experiment), experiment.title, out / RATE_ACCURACY_PNG)
    return document


def _summary(rows: Sequence[Row]) -> Iterator[Row]:
    """A row a method: mean and spread (sample standard deviation) over seeds."""
    for name in dict.fromkeys(row["method"] for row in rows):
        mine = [row for row in rows if row["method"] == name]
        accuracy = np.array([row["accuracy"] for row in mine])
        yield {
            "method": name,
            "bytes_per_tile": float(np.mean([row["bytes_per_tile"] for row in mine])),
            "accuracy": float(accuracy.mean()),
            "accuracy_std": float(accuracy.std(ddof=1)) if len(mine) > 1 else None,
            "majority": mine[0]["majority"],
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

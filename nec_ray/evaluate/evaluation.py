"""What `nec evaluate` does: methods on one task of an archive's tiles, or GEO-Bench's data sets, by the file's keys."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from nec_ray.config import check, override, read_toml
from nec_ray.evaluate.experiment import Experiment
from nec_ray.evaluate.geobench.experiment import GeobenchExperiment

Evaluation = Experiment | GeobenchExperiment


def read_evaluation(path: Path, overrides: Sequence[str] = ()) -> Evaluation:
    """The evaluation of a TOML file; one with data sets under `geobench` is of GEO-Bench.

    Args:
        path: the file.
        overrides: see `config.override`.

    Raises:
        NotFound: no such file.
        BadRecipe: it is no TOML, or a key is unknown or its value impossible; the message names the key.
    """
    document = read_toml(path, "evaluation")
    for text in overrides:
        override(document, text)
    if "geobench" in document:
        return check(GeobenchExperiment, document, path, "geobench evaluation")
    return check(Experiment, document, path, "evaluation")


def run_evaluation(
    evaluation: Evaluation, out: Path, progress: Callable[[int, int], None] | None = None
) -> dict[str, Any]:
    """Do it, and leave results.json, report.html and pictures in a folder; a run that was stopped goes on.

    Raises:
        The same as `compare` and `run_geobench`.
    """
    if isinstance(evaluation, GeobenchExperiment):
        from nec_ray.evaluate.geobench.run import run_geobench

        return run_geobench(evaluation, out, progress)
    from nec_ray.evaluate.compare import compare

    return compare(evaluation, out, progress)


def summary_lines(document: dict[str, Any]) -> list[str]:
    """What a document's summary says, a line a row."""
    return [_line(row) for row in document["summary"]]


def _line(row: dict[str, Any]) -> str:
    of_geobench = "protocol" in row
    order = ("map", "mean_iou", "accuracy") if of_geobench else ("recall", "mean_iou", "accuracy")
    measure = next(name for name in order if row[name] is not None)
    spread = row[f"{measure}_std"]
    said = [
        f"{row['method']}, {row['task_name'] + ', ' + row['protocol'] if of_geobench else row['task']}",
        f"{measure.replace('_', ' ')} {row[measure]:.3f}"
        + (f" (spread {spread:.3f} over {row['seeds']} seeds)" if spread is not None else ""),
    ]
    said = [": ".join(said)]
    if row["bytes_per_tile"] is not None:
        said.append(f"{row['bytes_per_tile']:,.0f} bytes a tile")
    if of_geobench:
        said.append(f"{row['samples']:,} training samples")
    elif row["label_share"] != 1:
        said.append(f"{row['label_share']:.3g} of the labels")
    return ", ".join(said)

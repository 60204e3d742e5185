"""The page of an evaluation on GEO-Bench: what was run, beside the papers' numbers, and label efficiency."""

import json
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from nec_ray.evaluate.geobench.experiment import Protocol
from nec_ray.evaluate.geobench.papers import MEASURES, PaperRow, PaperTable, measured, papers
from nec_ray.evaluate.page import image, table, write_page
from nec_ray.evaluate.rate_accuracy import NAMES, draw_label_efficiency, draw_rate_accuracy

_SHORT: dict[Protocol, str] = {
    "fine_tuning": "FT",
    "linear": "LP",
    "linear_first_layer": "LP + first layer",
    "segmentation": "FT",
}
"""As the papers' tables have them."""
_WORDS: dict[Protocol, str] = {
    "fine_tuning": "fine-tuning",
    "linear": "linear probe",
    "linear_first_layer": "linear probe and first layer",
    "knn": "nearest neighbours",
    "segmentation": "U-Net, fine-tuned",
    "segmentation_frozen": "U-Net, encoder frozen",
}
_MEASURE_NAMES = {"accuracy": "accuracy", "map": "mAP", "micro_f1": "micro F1", "mean_iou": "mean IoU"}
_NO = ""
Row = Mapping[str, Any]


def write_pictures(document: Row, curves: Mapping[str, Sequence[str]], out: Path) -> dict[str, Path]:
    """Draw label efficiency where there are several numbers of samples, and scores against bytes where there are bytes.

    Args:
        document: what results.json holds.
        curves: names of each curve's encoders.
        out: folder for label_efficiency-N.png and rate_accuracy-N.png, N the place of the data set.

    Returns:
        The files, by what they show.
    """
    files: dict[str, Path] = {}
    for number, (name, rows) in enumerate(_by_dataset(document["summary"]).items(), 1):
        kind = rows[0]["task"]
        panels = [(task, MEASURES[kind][0]) for task, _ in NAMES if any(row["protocol"] == task for row in rows)]
        panels = [panel for panel in dict.fromkeys(panels) if panel in NAMES]
        most = max(row["samples"] for row in rows)
        drawn = [
            {**row, "task": row["protocol"], "majority": None, "label_share": row["samples"] / most} for row in rows
        ]
        if len({row["samples"] for row in rows}) > 1:
            path = out / f"label_efficiency-{number}.png"
            several = _of_several(drawn, panels)
            files[f"{name}: scores against training samples"] = draw_label_efficiency(
                drawn, curves, most, name, path, several
            )
        whole = [row for row in drawn if row["samples"] == most]
        coded = [panel for panel in panels if len(_bytes(whole, panel) - {None}) > 1]
        if coded:
            path = out / f"rate_accuracy-{number}.png"
            files[f"{name}: scores against bytes a tile"] = draw_rate_accuracy(whole, curves, name, path, coded)
    return files


def write_report(document: Row, pictures: Mapping[str, Path], out: Path) -> Path:
    """Write the page.

    Args:
        document: what results.json holds.
        pictures: PNG files by what they show.
        out: HTML file to write.
    """
    summary, experiment = document["summary"], document["experiment"]
    seeds = ", ".join(map(str, experiment["seeds"]))
    once = "; nearest neighbours among all samples do not depend on it" if "knn" in experiment else ""
    body = [
        f"<h1>{escape(experiment['title'])}</h1>",
        f"<p class=facts>GEO-Bench; scores are of the test split, in per cent: the mean over seeds and its spread "
        f"(sample standard deviation). Seeds: {escape(seeds)}{once}. The last weights are tested; nothing is chosen on "
        "the test split.</p>",
        "<h2>What was run</h2>",
        *_warnings(summary),
        *(_scores(name, rows) for name, rows in _by_dataset(summary).items()),
    ]
    if pictures:
        body += ["<h2>Pictures</h2>"]
        body += [
            f"<figure>{image(path.read_bytes(), what)}<figcaption>{escape(what)}</figcaption></figure>"
            for what, path in pictures.items()
        ]
    body += [
        "<h2>Beside the papers' numbers</h2>",
        "<p>MMEarth's tables, per cent: mAP on BigEarth20k, accuracy on So2Sat20k, mean IoU on the others. A cell of "
        "&ldquo;here&rdquo; is filled where an encoder of this evaluation says that it is the row's, and the whole "
        "data set was trained on and tested; all others are empty.</p>",
        *(_beside(one, summary) for one in papers().tables),
        "<h2>Settings</h2>",
        "<p>Every score of every seed, with its settings, is in results.json beside this page.</p>",
        f"<pre>{escape(json.dumps(experiment, indent=1, ensure_ascii=False))}\n"
        f"{escape(json.dumps(document['machine'], indent=1, ensure_ascii=False))}</pre>",
    ]
    return write_page(experiment["title"], "\n".join(body), out)


def ran(row: Row) -> str:
    """What a row of a summary is of, in words."""
    said = [row["method"], _input(row), _WORDS[row["protocol"]]]
    if "epochs" in row["settings"]:
        said.append(_count(row["settings"]["epochs"], "epoch"))
    trained = f"{row['samples']:,} of {row['train_samples']:,} training samples"
    said.append(f"{row['task_name']}: {trained}, {row['test_samples']:,} test samples")
    return ", ".join([*said, _count(row["seeds"], "seed")])


def _count(number: int, what: str) -> str:
    return f"{number} {what}" + ("" if number == 1 else "s")


def _by_dataset(summary: Sequence[Row]) -> dict[str, list[Row]]:
    found: dict[str, list[Row]] = {}
    for row in summary:
        found.setdefault(row["task_name"], []).append(row)
    return found


def _of_several(rows: Sequence[Row], panels: Sequence[tuple[str, str]]) -> list[tuple[str, str]]:
    return [panel for panel in panels if len({row["samples"] for row in rows if row["task"] == panel[0]}) > 1]


def _bytes(rows: Sequence[Row], panel: tuple[str, str]) -> set[float | None]:
    return {row["bytes_per_tile"] for row in rows if row["task"] == panel[0]}


def _warnings(summary: Sequence[Row]) -> list[str]:
    """Of data sets some of whose test samples are trained on."""
    found = {row["task_name"]: row for row in summary if row["overlap"]}
    return [
        f"<p><strong>{escape(name)}: {row['overlap']} of {row['test_samples']} test samples are training samples too; "
        "its scores say nothing of samples that were not seen.</strong></p>"
        for name, row in found.items()
    ]


def _scores(name: str, rows: Sequence[Row]) -> str:
    """A line an encoder and number of training samples, a column a protocol and measure."""
    measures = MEASURES[rows[0]["task"]]
    protocols = [one for one in _WORDS if any(row["protocol"] == one for row in rows)]
    heads = ["encoder", "training samples"]
    for protocol in protocols:
        epochs = next(row["settings"].get("epochs") for row in rows if row["protocol"] == protocol)
        during = "" if epochs is None else f", {_count(epochs, 'epoch')}"
        heads += [f"{_WORDS[protocol]}{during}: {_MEASURE_NAMES[measure]}" for measure in measures]
    lines = []
    for method, samples in dict.fromkeys((row["method"], row["samples"]) for row in rows):
        mine = {row["protocol"]: row for row in rows if (row["method"], row["samples"]) == (method, samples)}
        first = next(iter(mine.values()))
        cells = [_score(mine[one], m) if one in mine else _NO for one in protocols for m in measures]
        seeds = sorted({row["seeds"] for row in mine.values()}, reverse=True)
        fetched = _NO if first["bytes_per_tile"] is None else f"{first['bytes_per_tile']:,.0f}"
        lines.append([method, f"{samples:,}", *cells, " or ".join(map(str, seeds)), _input(first), fetched])
    caption = f"{name}: {rows[0]['train_samples']:,} training samples, {rows[0]['test_samples']:,} test samples"
    return table(caption, [*heads, "seeds", "input", "bytes a tile"], lines, text=(len(heads) + 1,))


def _input(row: Row) -> str:
    """What the encoder is given, and its weights."""
    if row["kind"] == "archive":
        return "pulled from an archive"
    return f"{row['bands']} bands of {row['pixels']} px, {row['weights']} weights"


def _beside(one: PaperTable, summary: Sequence[Row]) -> str:
    columns = one.columns()
    heads = ["pretraining"]
    for dataset, protocol in columns:
        heads += [f"{dataset} {_SHORT[protocol]}, paper", "here"]
    lines = [_line(row, columns, summary) for row in one.rows]
    return table(f"Table {one.number}: {one.caption}", [*heads, "what was run here"], lines, text=(len(heads),))


def _line(row: PaperRow, columns: Sequence[tuple[str, Protocol]], summary: Sequence[Row]) -> list[str]:
    numbers, cells, said = row.numbers(), [row.name], []
    for dataset, protocol in columns:
        theirs = numbers.get((dataset, protocol))
        ours = None if theirs is None else measured(summary, row, dataset, protocol)
        cells += [_NO if theirs is None else f"{theirs:.1f}", _NO if ours is None else _score(ours)]
        if ours is not None:
            said.append(ran(ours))
    return [*cells, "; ".join(dict.fromkeys(said))]


def _score(row: Row, measure: str | None = None) -> str:
    """Per cent, with its spread; of the paper's measure where none is named."""
    name = measure or MEASURES[row["task"]][0]
    spread = row[f"{name}_std"]
    return f"{100 * row[name]:.1f}" + ("" if spread is None else f" ± {100 * spread:.1f}")

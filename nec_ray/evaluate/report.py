"""The page of an evaluation: pictures and tables in one HTML file that needs nothing else."""

import json
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from nec_ray.evaluate.page import image, picture, table, write_page
from nec_ray.evaluate.rate_accuracy import (
    NAMES,
    draw_bits_by_channel,
    draw_label_efficiency,
    draw_rate_accuracy,
    draw_rate_distortion,
    panels_of,
)

REPORT_HTML = "report.html"
_MILLION = 1_000_000
_SCALES = ((1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "kB"))
_NO = "-"
Row = Mapping[str, Any]


def write_report(
    document: Row, curves: Mapping[str, Sequence[str]], trained: int, masks: Path | None, out: Path
) -> Path:
    """Write the page.

    Args:
        document: what results.json holds.
        curves: names of each curve's methods.
        trained: training tiles.
        masks: PNG of masks side by side, if there is one.
        out: HTML file to write.
    """
    experiment, summary = document["experiment"], document["summary"]
    whole = [row for row in summary if row["label_share"] == _most(summary, row["task"])]
    body = [_head(document, trained), _goal(document), "<h2>Accuracy against bytes</h2>", '<div class="pictures">']
    for panel in panels_of(whole):
        name = NAMES[panel]

        def draw(path: Path, panel: tuple[str, str] = panel) -> object:
            return draw_rate_accuracy(whole, curves, "", path, [panel])

        body.append(picture(draw, f"{name}, against bytes a tile", "Bars are the spread over seeds."))
    body.append("</div>")
    body += [_scores(whole, task, measure) for task, measure in panels_of(whole)]
    body += _savings(document["savings"])
    body += _distortion(document, whole, curves)
    body += _labels(summary, curves, trained, experiment["label_shares"])
    if masks is not None:
        shown = image(masks.read_bytes(), "Masks of test tiles: the truth, and what methods of about equal bytes say")
        body += [
            "<h2>Masks at equal bytes</h2>",
            "<p>Of each curve the method whose bytes come nearest to the first one's, within a factor of two.</p>",
            f'<div class="wide" tabindex="0" role="region" aria-label="masks">{shown}</div>',
        ]
    body += _configs(document)
    return write_page(experiment["title"], "\n".join(body), out)


def _head(document: Row, trained: int) -> str:
    experiment, rows = document["experiment"], document["results"]
    tiles = rows[0]["tiles"]
    seeds = ", ".join(map(str, experiment["seeds"]))
    said = [f"{tiles:,} labelled tiles, {trained:,} of them to train on", f"seeds {seeds}"]
    if experiment["where"]:
        said.append(f"where {experiment['where']}")
    if experiment["test"]:
        said.append(f"tested where {experiment['test']}")
    return (
        f"<h1>{escape(experiment['title'])}</h1>\n<p class=facts>{escape('; '.join(said))}. All methods: the same "
        "tiles, split, heads and seeds; bytes are those that a consumer fetches for a tile.</p>"
    )


def _goal(document: Row) -> str:
    """In a sentence: what the first comparison found."""
    said = [row for row in document["savings"] if row["factor"] is not None and row["curve"] != row["reference"]]
    if not said:
        return ""
    task = said[0]["task"], said[0]["measure"]
    mine = [row for row in said if (row["task"], row["measure"]) == task]
    parts = ", ".join(f"{row['curve']} takes {_times(row['factor'])} its bytes" for row in mine)
    return f"<p>Beside {escape(mine[0]['reference'])}, at equal {escape(NAMES[task])}: {escape(parts)}.</p>"


def _scores(summary: Sequence[Row], task: str, measure: str) -> str:
    rows = []
    for row in sorted((row for row in summary if row["task"] == task), key=lambda row: row["bytes_per_tile"]):
        spread = row[f"{measure}_std"]
        rows.append(
            [
                row["method"],
                f"{row[measure]:.2%}" + (f" ± {100 * spread:.2f}" if spread is not None else ""),
                f"{row['bytes_per_tile']:,.0f}",
                f"{row['bits_per_channel']:.3g}",
                _NO if row["bits_per_pixel"] is None else f"{row['bits_per_pixel']:.3g}",
                _size(row["bytes_per_tile"] * _MILLION + row["shared_bytes"]),
                _NO if not row["shared_bytes"] else f"{row['shared_bytes']:,}",
                _NO if row["snr_db"] is None else f"{row['snr_db']:.1f}",
                str(row["seeds"]),
                row["codec_id"][:12],
            ]
        )
    heads = ["method", NAMES[task, measure], "bytes a tile", "bits a channel", "bits a pixel", "a million tiles"]
    heads += ["shared bytes", "signal to noise, dB", "seeds", "codec"]
    return table(f"Scores: {NAMES[task, measure]}", heads, rows)


def _savings(savings: Sequence[Row]) -> list[str]:
    if not savings:
        return []
    reference = savings[0]["reference"]
    body = [
        "<h2>Bytes at equal accuracy</h2>",
        f"<p>How many times the bytes of <b>{escape(reference)}</b> a curve takes, on average over the scores that "
        "both reach (Bjontegaard, lines over the logarithm of bytes; points that cost more for no better a score are "
        "left out). The target is one point below the uncompressed embeddings.</p>",
    ]
    for panel in dict.fromkeys((row["task"], row["measure"]) for row in savings):
        mine = [row for row in savings if (row["task"], row["measure"]) == panel]
        target = mine[0]["target"]
        base = next(row["bytes_at_target"] for row in mine if row["curve"] == reference)
        heads = ["curve", f"times the bytes of {reference}", "between", "bytes a tile at the target"]
        heads += [f"saved by {reference} for a million tiles"]
        rows = []
        for row in mine:
            at = row["bytes_at_target"]
            rows.append(
                [
                    row["curve"],
                    row["reason"] or _times(row["factor"]),
                    _NO if row["low"] is None else f"{row['low']:.2%} and {row['high']:.2%}",
                    ("no target" if target is None else "not reached") if at is None else f"{at:,.0f}",
                    _NO if at is None or base is None or row["curve"] == reference else _saved((at - base) * _MILLION),
                ]
            )
        caption = NAMES[panel] + ("" if target is None else f" (target {target:.2%})")
        body.append(table(caption, heads, rows, text=(1,)))
    return body


def _distortion(document: Row, summary: Sequence[Row], curves: Mapping[str, Sequence[str]]) -> list[str]:
    pictures = []
    if any(row["snr_db"] is not None for row in summary):
        rows = list({row["method"]: row for row in summary}.values())
        pictures.append(
            picture(
                lambda path: draw_rate_distortion(rows, curves, "", path, small=True),
                "Signal to noise of embeddings against bits a channel",
                "Of test tiles; layers that were left out count as their medians, or 0 along axes.",
            )
        )
    pulled = [row for row in document["results"] if row["kind"] == "nec"]
    pulled.sort(key=lambda row: row["layers"] is None)  # a codec is called by the method that has all its layers
    names = {row["codec_id"]: row["method"] for row in pulled}
    bits = {names[codec]: values for codec, values in document["bits_by_channel"].items() if codec in names}
    if bits:
        pictures.append(
            picture(
                lambda path: draw_bits_by_channel(bits, path),
                "Entropy of each channel's symbols, bits",
                "Over all tiles; the area below a line is a token's bits, were channels coded one by one.",
            )
        )
    if not pictures:
        return []
    return ["<h2>Distortion, and bits of each channel</h2>", '<div class="pictures">', *pictures, "</div>"]


def _labels(
    summary: Sequence[Row], curves: Mapping[str, Sequence[str]], trained: int, shares: Sequence[float]
) -> list[str]:
    if len(shares) < 2:
        return []
    body = ["<h2>Fewer labels</h2>", '<div class="pictures">']
    panels = [panel for panel in panels_of(summary) if panel[0] != "retrieval"]
    for panel in panels:

        def draw(path: Path, panel: tuple[str, str] = panel) -> object:
            return draw_label_efficiency(summary, curves, trained, "", path, [panel])

        body.append(picture(draw, f"{NAMES[panel]}, against labelled training tiles", "Bars: spread over seeds."))
    body.append("</div>")
    for task, measure in panels:
        mine = [row for row in summary if row["task"] == task]
        found = {(row["method"], row["label_share"]): row[measure] for row in mine}
        methods, ordered = dict.fromkeys(row["method"] for row in mine), sorted(shares)
        rows = [[name, *(f"{found[name, share]:.2%}" for share in ordered)] for name in methods]
        body.append(table(NAMES[task, measure], ["method", *(f"{share:.3g} of labels" for share in ordered)], rows))
    return body


def _configs(document: Row) -> list[str]:
    experiment = document["experiment"]
    codecs = {row["method"]: (row["codec_id"], row["encoder_id"]) for row in document["results"]}
    rows = []
    for method in experiment["methods"]:
        keys = {key: value for key, value in method.items() if key != "name" and value is not None}
        codec, encoder = codecs.get(method["name"], (_NO, _NO))
        rows.append([method["name"], json.dumps(keys, ensure_ascii=False), codec, encoder])
    rest = json.dumps({k: v for k, v in experiment.items() if k != "methods"}, indent=1, ensure_ascii=False)
    return [
        "<h2>What was run</h2>",
        "<p>Every score of every seed, with its configuration and codec, is in results.json beside this page.</p>",
        table("Methods", ["method", "configuration", "codec", "encoder"], rows, text=(1, 2, 3)),
        f"<h3>Evaluation and machine</h3>\n<pre>{escape(rest)}\n"
        f"{escape(json.dumps(document['machine'], indent=1, ensure_ascii=False))}</pre>",
    ]


def _most(summary: Sequence[Row], task: str) -> float:
    return max(row["label_share"] for row in summary if row["task"] == task)


def _times(factor: float) -> str:
    return f"{factor:.2f} times" if factor < 10 else f"{factor:,.0f} times"


def _size(n_bytes: float) -> str:
    for scale, unit in _SCALES:
        if abs(n_bytes) >= scale:
            return f"{n_bytes / scale:,.3g} {unit}"
    return f"{n_bytes:,.0f} bytes"


def _saved(n_bytes: float) -> str:
    return _size(n_bytes) if n_bytes >= 0 else f"none; {_size(-n_bytes)} more"

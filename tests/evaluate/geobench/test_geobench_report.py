"""The page of an evaluation on GEO-Bench: which cells are filled, and that no text becomes markup."""

from pathlib import Path
from typing import Any

from nec_ray.evaluate.geobench.report import write_pictures, write_report
from tests.evaluate.test_report import EVIL, Page

ROW: dict[str, Any] = {
    "method": "MMEarth",
    "kind": "mp_mae",
    "weights": "pretrained",
    "paper": "MMEarth",
    "task_name": "m-so2sat",
    "paper_dataset": "So2Sat20k",
    "task": "classification",
    "protocol": "linear",
    "settings": {"epochs": 100},
    "statistics": "data set",
    "samples": 19_992,
    "train_samples": 19_992,
    "test_samples": 986,
    "overlap": 0,
    "pixels": 32,
    "bands": 12,
    "bytes_per_tile": None,
    "seeds": 3,
    "accuracy": 0.4321,
    "accuracy_std": 0.005,
}
FEW = {"samples": 100, "accuracy": 0.2, "accuracy_std": None, "seeds": 1}


def document(summary: list[dict[str, Any]]) -> dict[str, Any]:
    return {"summary": summary, "experiment": {"title": EVIL, "seeds": [0, 1, 2]}, "machine": {"cpu": "x"}}


def tables(path: Path) -> dict[str, list[str]]:
    """Text of the lines of each of the papers' tables."""
    text = path.read_text()
    parts = text.split("<h3>Table ")[1:]
    return {part.split(":", 1)[0]: part.split("</table>")[0].split("<tr>")[2:] for part in parts}


def test_cells_are_filled_by_whole_runs_alone(tmp_path: Path) -> None:
    other = {**ROW, "method": EVIL, "paper": None, "overlap": 4, "task_name": "m-other", "paper_dataset": None}
    rows = [ROW, ROW | FEW, other]
    pictures = write_pictures(document(rows), {"MMEarth": ["MMEarth"], EVIL: [EVIL]}, tmp_path)
    assert list(pictures) == ["m-so2sat: scores against training samples"]
    page = write_report(document(rows), pictures, tmp_path / "report.html")
    parsed = Page(page.read_text())
    assert all(tag != "script" for tag, _ in parsed.tags)
    assert EVIL in parsed.text
    assert "m-other: 4 of 986 test samples are training samples too" in parsed.text
    found = tables(page)
    assert list(found) == ["3", "4", "5", "A2", "A3", "A4", "A5"]
    filled = {number: [line for line in lines if "43.2 ± 0.5" in line] for number, lines in found.items()}
    assert {number: len(lines) for number, lines in filled.items()} == {
        "3": 0, "4": 1, "5": 1, "A2": 1, "A3": 1, "A4": 1, "A5": 1,
    }  # fmt: skip
    [line] = filled["4"]
    assert "100 epochs" in line
    assert "m-so2sat: 19,992 of 19,992 training samples, 986 test samples, 3 seeds" in line
    assert line.count("<td></td>") == 5, "of six cells of ours"
    assert not any("20.0" in line for lines in found.values() for line in lines), "100 samples stand beside no number"
    plain = write_report(document([ROW | FEW]), {}, tmp_path / "plain.html")
    for lines in tables(plain).values():
        assert not any("±" in line or "samples" in line for line in lines), "every cell of ours is empty"


def test_scores_against_bytes_are_drawn_where_there_are_bytes(tmp_path: Path) -> None:
    rows = [
        {**ROW, "method": name, "kind": "archive", "bytes_per_tile": n_bytes, "accuracy": score}
        for name, n_bytes, score in (("NEC 1", 90.0, 0.4), ("NEC 2", 200.0, 0.5))
    ]
    pictures = write_pictures(document(rows), {"NEC": ["NEC 1", "NEC 2"]}, tmp_path)
    assert list(pictures) == ["m-so2sat: scores against bytes a tile"]
    assert (tmp_path / "rate_accuracy-1.png").stat().st_size > 5000
    alone = (tmp_path / "rate_accuracy-1.png").read_bytes()
    curves = {"NEC": ["NEC 1", "NEC 2"], "MMEarth": ["MMEarth"]}
    [picture] = write_pictures(document([*rows, ROW]), curves, tmp_path).values()
    assert picture.read_bytes() != alone, "an encoder of pixels, for which nothing is fetched, is a level line"
    assert write_pictures(document([ROW]), curves, tmp_path) == {}

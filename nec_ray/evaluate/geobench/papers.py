"""The papers' numbers, and what of them was measured here (MMEarth, Tables 3 to 5 and A2 to A5)."""

from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from pydantic import Field

import nec_ray
from nec_ray.config import Section, check, read_toml
from nec_ray.evaluate.geobench.experiment import Protocol
from nec_ray.tiles.geobench import StatisticsOf, Task

MEASURES: dict[Task, tuple[str, ...]] = {
    "classification": ("accuracy",),
    "multi-label": ("map", "micro_f1"),
    "segmentation": ("mean_iou", "accuracy"),
}
"""Of each kind of task; the first is the paper's."""
PROTOCOLS_OF_TABLES: tuple[Protocol, ...] = ("fine_tuning", "linear", "linear_first_layer", "segmentation")
_WHOLE = 0.95
"""Of Table 2's numbers, which are rounded: So2Sat has 19,992 and 986 samples."""
_FILE = "papers.toml"


class Size(Section):
    """Samples of a data set, as Table 2 rounds them."""

    train: int
    test: int


class PaperRow(Section):
    """A row of a table: per cent by the paper's name of the data set."""

    name: str
    encoder: str
    """What an encoder of an evaluation names as `paper`."""
    statistics: StatisticsOf = "data set"
    fine_tuning: dict[str, float] = Field(default={})
    linear: dict[str, float] = Field(default={})
    linear_first_layer: dict[str, float] = Field(default={})
    segmentation: dict[str, float] = Field(default={})

    def numbers(self) -> dict[tuple[str, Protocol], float]:
        """By data set and protocol."""
        return {
            (dataset, protocol): score
            for protocol in PROTOCOLS_OF_TABLES
            for dataset, score in getattr(self, protocol).items()
        }


class PaperTable(Section):
    """A table of the paper."""

    number: str
    caption: str
    rows: list[PaperRow]

    def columns(self) -> list[tuple[str, Protocol]]:
        """Data sets and protocols, in the paper's order."""
        found = list(dict.fromkeys(key for row in self.rows for key in row.numbers()))
        order = list(papers().datasets)
        return sorted(found, key=lambda key: (order.index(key[0]), PROTOCOLS_OF_TABLES.index(key[1])))


class Papers(Section):
    """All tables."""

    datasets: dict[str, Size]
    tables: list[PaperTable]

    def encoders(self) -> set[str]:
        """That a row is of."""
        return {row.encoder for table in self.tables for row in table.rows}


@cache
def papers() -> Papers:
    """The packaged numbers."""
    path = Path(nec_ray.__file__).parent / "data" / "geobench" / _FILE
    return check(Papers, read_toml(path, "numbers"), path, "numbers")


def measured(
    summary: Sequence[Mapping[str, Any]], row: PaperRow, dataset: str, protocol: Protocol
) -> Mapping[str, Any] | None:
    """The row of a summary that is a cell of a paper's table; None where it was not run on the whole data set.

    Args:
        summary: of results.json.
        row: of the paper's table.
        dataset: the paper's name of it.
        protocol: of the cell.
    """
    size = papers().datasets[dataset]
    for one in summary:
        asked = (one["paper"], one["paper_dataset"], one["protocol"], one["statistics"])
        is_whole = one["samples"] >= _WHOLE * size.train and one["test_samples"] >= _WHOLE * size.test
        if asked == (row.encoder, dataset, protocol, row.statistics) and is_whole and not one["overlap"]:
            return one
    return None

"""`TileSet`: the tiles of an archive that a place, a time and a condition pick, and what can be done with them."""

import functools
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from nec_ray.archive.regions import region_of
from nec_ray.archive.sql import bracketed
from nec_ray.archive.times import period_of
from nec_ray.errors import InputError, MissingDependency
from nec_ray.notebook import facts_html

if TYPE_CHECKING:
    from nec_ray.archive.archive import Archive
    from nec_ray.archive.pull import Pull

COLUMNS = ("tile_id", "status", "acquired_at", "label", "n_bytes", "bbox", "geometry")
"""Index columns that a tile set shows where none are asked for."""


class TileSet:
    """Tiles of one version of an archive; nothing is read until it is asked for.

    Attributes:
        archive: their archive.
        where: the SQL condition over `embeddings` that picks them, which also `archive.sql`, `torch_dataset`,
            `ray_dataset` and `nec pull --where` take.
    """

    def __init__(self, archive: "Archive", where: str) -> None:
        self.archive = archive
        self.where = where

    def __len__(self) -> int:
        return self._count

    @functools.cached_property
    def _count(self) -> int:
        [(count,)] = self.archive.sql(f"SELECT count(*) FROM embeddings WHERE {self.where}").fetchall()
        return int(count)

    def __repr__(self) -> str:
        return f"<TileSet: {len(self):,} of {len(self.archive):,} tiles of {self.archive!r}>"

    def _repr_html_(self) -> str:
        first = ", ".join(self.rows(["tile_id"], limit=5)["tile_id"].to_pylist())
        return facts_html(repr(self)[1:-1], [("first tiles", first)])

    def select(self, where: str | None = None, *, within: Any = None, time: Any = None) -> "TileSet":
        """Those of them that meet more conditions, the arguments of `Archive.select`."""
        both = [self.where, condition_of(where, within, time)]
        return TileSet(self.archive, " AND ".join(one for one in both if one != "true") or "true")

    def rows(self, columns: Sequence[str] = COLUMNS, *, limit: int | None = None) -> pa.Table:
        """Index columns (`schemas/index.json`), ordered by tile id; of the first `limit` tiles."""
        end = "" if limit is None else f" LIMIT {int(limit)}"
        query = f"SELECT {', '.join(listed(columns))} FROM embeddings WHERE {self.where} ORDER BY tile_id{end}"
        return self.archive.sql(query).to_arrow_table()

    def pull(self, layers: int | None = None) -> "Pull":
        """Their embeddings: `Archive.pull`.

        Raises:
            InputError: none of them has an embedding.
        """
        return self.archive.pull(self.where, layers)

    def to_zarr(self, out: str | Path, layers: int | None = None) -> dict[str, Any]:
        """Their embeddings as a Zarr store: `Archive.to_zarr`."""
        return self.archive.to_zarr(out, self.where, layers)

    def to_pandas(self, columns: Sequence[str] = COLUMNS) -> Any:
        """Index columns as a pandas DataFrame.

        Raises:
            MissingDependency: there is no pandas.
        """
        try:
            import pandas  # noqa: F401, ICN001  (Arrow's own error is not ours)
        except ModuleNotFoundError:
            raise MissingDependency("to_pandas needs pandas; install it with pip install pandas") from None
        return self.rows(columns).to_pandas()

    def to_geodataframe(self, columns: Sequence[str] = COLUMNS) -> Any:
        """Index columns as a GeoDataFrame of the footprints, in longitude and latitude.

        Raises:
            MissingDependency: there is no geopandas.
        """
        try:
            import geopandas
        except ModuleNotFoundError:
            raise MissingDependency("to_geodataframe needs geopandas; install it with pip install geopandas") from None
        rows = self.rows(list(dict.fromkeys([*listed(columns), "geometry"]))).to_pandas()
        shapes = geopandas.GeoSeries.from_wkb(rows.pop("geometry"), crs="OGC:CRS84")
        return geopandas.GeoDataFrame(rows, geometry=shapes)


def listed(columns: Sequence[str]) -> list[str]:
    """Column names; a string is one.

    Raises:
        InputError: they are no strings.
    """
    names = [columns] if isinstance(columns, str) else list(columns) if isinstance(columns, Iterable) else [columns]
    if not all(isinstance(name, str) for name in names):
        raise InputError(f"columns {columns!r}: give a list of names of schemas/index.json")
    return names


def condition_of(where: str | None, within: Any, time: Any) -> str:
    """One SQL condition over `embeddings`.

    Args:
        where: a condition.
        within: a region, see `region_of`, which the footprints meet.
        time: of acquisition, see `period_of`.

    Raises:
        BadQuery: `where` is no condition.
        InputError: `within` is no region, or `time` no time.
    """
    parts = [
        bracketed(where),
        "true" if time is None else period_of(time).condition(),
        "true" if within is None else f"/* within {_said(within)} */ {region_of(within).condition()}",
    ]
    return " AND ".join(part for part in parts if part != "true") or "true"


def _said(within: Any) -> str:
    """A region as errors show it (`hints.shortened`), in a comment: few numbers or a file's name, no coordinates."""
    numbers = isinstance(within, list | tuple) and all(isinstance(edge, int | float) for edge in within)
    text = ", ".join(f"{edge:g}" for edge in within) if numbers else str(within) if isinstance(within, str) else ""
    plain = 0 < len(text) <= 60 and not text.lstrip().startswith("{")
    return text.replace("*", "").replace("\n", " ") if plain else "the region"

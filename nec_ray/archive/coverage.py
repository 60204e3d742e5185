"""What an archive holds of a place and a time: valid, no-data and failed tiles, and those it lacks."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import duckdb
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from nec_ray.archive.database import query, typed
from nec_ray.archive.recorded import CONTRACT
from nec_ray.archive.regions import region_of
from nec_ray.archive.tile_set import condition_of
from nec_ray.archive.times import period_of
from nec_ray.contracts import arrow_schema
from nec_ray.errors import CorruptIndex, InputError
from nec_ray.notebook import facts_html
from nec_ray.tiles import Catalog, read_catalog

if TYPE_CHECKING:
    from nec_ray.archive.archive import Archive

COLUMNS = ("tile_id", "status", "reason", "acquired_at", "bbox")


@dataclass(frozen=True)
class Coverage:
    """Tiles of a place and a time, by what became of them."""

    valid: int
    """Tiles with an embedding."""
    nodata: int
    """Tiles of which too much is missing."""
    failed: int
    """Tiles that could not be read."""
    absent: int | None
    """Tiles of the catalogs that the version lacks; None where it records none and none was given: unknown."""
    tiles: pa.Table
    """`tile_id`, `status` (valid, nodata, failed or absent), `reason`, `acquired_at` and `bbox` of each."""

    def __repr__(self) -> str:
        absent = "absent unknown without a catalog" if self.absent is None else f"{self.absent:,} absent"
        return f"<Coverage: {self.valid:,} valid, {self.nodata:,} nodata, {self.failed:,} failed, {absent}>"

    def _repr_html_(self) -> str:
        absent = "unknown without a catalog" if self.absent is None else self.absent
        facts = [("valid", self.valid), ("no-data", self.nodata), ("failed", self.failed), ("absent", absent)]
        return facts_html("Coverage, tiles", facts)


def coverage(
    archive: "Archive",
    region: Any = None,
    time: Any = None,
    catalog: str | os.PathLike[str] | Catalog | Sequence[str | os.PathLike[str] | Catalog] | None = None,
) -> Coverage:
    """Arguments and result of `Archive.coverage`."""
    rows = archive.select(within=region, time=time).rows(COLUMNS)
    count = {status: pc.sum(pc.equal(rows["status"], status)).as_py() or 0 for status in ("valid", "nodata", "failed")}
    missing = None
    if catalog is not None:
        several = [catalog] if isinstance(catalog, str | os.PathLike | Catalog) else catalog
        if not isinstance(several, Sequence):
            raise InputError(f"catalog {catalog!r}: give paths, or catalogs that are read")
        if not several:
            raise InputError("no catalogs to compare with; give one, or none at all")
        missing = _lacking(archive, pa.concat_tables([_rows(one, region, time) for one in several]))
    elif archive.catalogs:
        missing = _recorded_lacking(archive, condition_of(None, region, time), rows)
    if missing is None:
        return Coverage(**count, absent=None, tiles=rows)
    tiles = pa.concat_tables([rows, _as_absent(missing, rows.schema)])
    return Coverage(**count, absent=missing.num_rows, tiles=tiles)


def _recorded_lacking(archive: "Archive", condition: str, here: pa.Table) -> pa.Table:
    """Rows of the recorded tiles that meet a condition, and of which the archive has no row at all; each tile once.

    Args:
        archive: a version that records catalogs.
        condition: SQL over the columns that an index has too.
        here: the index rows that meet it: mostly all that are looked for, so that the rest of the index is not read.
    """
    sql = (
        f"SELECT DISTINCT ON (tile_id) tile_id, acquired_at, bbox FROM recorded WHERE {condition} "
        "AND NOT EXISTS (SELECT 1 FROM here WHERE here.tile_id = recorded.tile_id) ORDER BY tile_id, acquired_at, bbox"
    )
    files, contract = archive.catalog_files, arrow_schema(CONTRACT)
    try:
        found = query(files, "recorded", sql, here=here.select(["tile_id"]))
        found = found.cast(pa.schema([contract.field(name) for name in found.column_names]))
    except (duckdb.Error, pa.ArrowException, ValueError) as error:
        text = " ".join(str(error).split())[:200]
        unreadable = CorruptIndex(
            f"{archive.url}: a recorded catalog does not read ({text}); run verify, or give coverage the catalogs"
        )
        raise typed(error) or unreadable from error
    return found if condition == "true" or not found.num_rows else _lacking(archive, found)


def _rows(catalog: str | os.PathLike[str] | Catalog, region: Any, time: Any) -> pa.Table:
    """`tile_id`, `acquired_at` and `bbox` of a catalog's tiles of a place and a time."""
    table = (catalog if isinstance(catalog, Catalog) else read_catalog(catalog)).table
    if time is not None:
        table = table.filter(pa.array(period_of(time).holds(table["acquired_at"])))
    if region is not None:
        table = table.filter(pa.array(region_of(region).meets(table["geometry"].to_pylist())))
    return table.select(["tile_id", "acquired_at", "bbox"])


def _lacking(archive: "Archive", wanted: pa.Table) -> pa.Table:
    """Rows of the tiles that the archive has no row of at all, each tile once."""
    ids = wanted["tile_id"].combine_chunks()
    query = "SELECT tile_id FROM embeddings WHERE tile_id IN (SELECT unnest(?))"
    there = archive.sql(query, [ids.to_pylist()]).to_arrow_table()["tile_id"]
    _, first = np.unique(ids.to_numpy(zero_copy_only=False).astype(str), return_index=True)
    wanted = wanted.take(pa.array(first))
    return wanted.filter(pc.invert(pc.is_in(wanted["tile_id"], there.combine_chunks())))


def _as_absent(wanted: pa.Table, schema: pa.Schema) -> pa.Table:
    n = wanted.num_rows
    columns = {"status": pa.array(["absent"] * n, pa.string()), "reason": pa.nulls(n, pa.string())}
    arrays = [columns[f.name] if f.name in columns else wanted[f.name].cast(f.type) for f in schema]
    return pa.table(arrays, schema=schema)

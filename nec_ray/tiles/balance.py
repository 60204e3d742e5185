"""Samples of a tile catalog in which every biome weighs the same (MMEarth, supplement A.1, Eq. 2)."""

from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from nec_ray.errors import BadQuery, InputError
from nec_ray.tiles.catalog import Catalog, query_tiles
from nec_ray.tiles.modalities import BIOMES

AREA = "(sin(radians(bbox.ymax)) - sin(radians(bbox.ymin))) * radians(bbox.xmax - bbox.xmin)"
"""Of a tile's bounds on the unit sphere: SQL over the catalog's columns."""

# A biome's quotas add up to the whole part of its share (released code rounds every one down), by largest remainder;
# equal remainders go by name. Shares are rounded first: the order of a sum must not decide. The random order is that of
# a hash: the same on every machine, and whatever the order of the rows.
_BALANCED = """
WITH regions AS (
    SELECT biome, eco_region, fsum({area}) AS area, count(*) AS tiles
    FROM tiles WHERE biome IS NOT NULL AND eco_region IS NOT NULL
    GROUP BY biome, eco_region
), shares AS (
    SELECT *, round({samples} / {biomes} * area / fsum(area) OVER (PARTITION BY biome), 9) AS share FROM regions
), floors AS (
    SELECT *, floor(share) AS least,
        {a_biome} - sum(floor(share)) OVER (PARTITION BY biome) AS more,
        row_number() OVER (PARTITION BY biome ORDER BY round(share - floor(share), 9) DESC, eco_region) AS place
    FROM shares
), quotas AS (
    SELECT biome, eco_region, area, tiles, share, (least + (place <= more)::INTEGER)::BIGINT AS quota FROM floors
), ranked AS (
    SELECT __row, biome, eco_region,
        row_number() OVER (PARTITION BY biome, eco_region ORDER BY md5('{seed}/' || tile_id), tile_id) AS place
    FROM tiles
), chosen AS (
    SELECT __row, biome, eco_region FROM ranked JOIN quotas USING (biome, eco_region) WHERE place <= quota
)
SELECT biome, eco_region, area, tiles, share, quota, count(__row) AS taken,
    list(__row) FILTER (__row IS NOT NULL) AS chosen
FROM quotas LEFT JOIN chosen USING (biome, eco_region) GROUP BY ALL ORDER BY biome, eco_region
"""


@dataclass(frozen=True)
class BalancedSample:
    """Tiles that were chosen, and how."""

    catalog: Catalog
    """The chosen tiles, in the catalog's order."""
    account: pa.Table
    """`biome, eco_region, area, tiles, share` (Eq. 2), `quota` (the share rounded), `taken`; one row an ecoregion."""

    @property
    def short(self) -> int:
        """Tiles that ecoregions were too small to give."""
        return sum(self.account["quota"].to_pylist()) - sum(self.account["taken"].to_pylist())


def balanced_sample(
    catalog: Catalog, samples: int, *, seed: int = 0, area: str = AREA, biomes: int = len(BIOMES)
) -> BalancedSample:
    """Choose tiles at random, from each ecoregion N_e = N_t / 14 * A_e / A_B: all biomes get the same number.

    An ecoregion's area A_e is that of the catalog's tiles in it, so that a catalog that covers the land gives the
    paper's numbers; A_B is that of its biome.

    Args:
        catalog: with the columns `biome` and `eco_region`; tiles that lack one are never chosen.
        samples: N_t, how many are wanted; fewer come where it is no multiple of `biomes`, where a biome is absent, and
            where an ecoregion has too few tiles.
        seed: of the choice.
        area: SQL over the catalog's columns, the area of one tile in any unit.
        biomes: among which the samples are divided; 14 in the paper.

    Raises:
        InputError: no sample is wanted, or no tile has a biome, an ecoregion and an area.
        BadQuery: the catalog lacks a column, or `area` does not run.
    """
    if biomes < 1 or samples < biomes or seed < 0:
        raise InputError(
            f"{samples} samples of {biomes} biomes, seed {seed}: give one a biome or more, and a seed from 0"
        )
    missing = [name for name in ("biome", "eco_region") if name not in catalog.table.column_names]
    if missing:
        raise BadQuery(f"the catalog has no column {', '.join(missing)}; catalogs of MMEarth's files have it")
    sql = _BALANCED.format(
        area=f"({area}\n)", samples=f"{samples}::DOUBLE", biomes=biomes, a_biome=samples // biomes, seed=seed
    )
    account = query_tiles(catalog.table, sql, f"the area {area!r}", f"{area!r} is more than an area")
    areas = account["area"].to_pylist()
    if not areas or any(one is None or not one > 0 for one in areas):
        raise InputError("no tile has a biome and an ecoregion, or those of one have no area; say what it is in SQL")
    rows = np.sort(pc.list_flatten(account["chosen"]).to_numpy())
    return BalancedSample(Catalog(catalog.table.take(rows), catalog.metadata), account.drop_columns(["chosen"]))

"""Biome-balanced samples against Eq. 2 of the supplement, written out in Python."""

import hashlib
from collections import Counter
from fractions import Fraction
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nec_ray.contracts import arrow_schema
from nec_ray.errors import BadQuery, InputError
from nec_ray.tiles import Catalog
from nec_ray.tiles.balance import balanced_sample


def catalog(rows: list[dict[str, Any]]) -> Catalog:
    """Of tiles with these `biome`, `eco_region`, `size` and `bbox`."""
    schema = arrow_schema("catalog.json")
    blank: dict[str, Any] = dict.fromkeys(schema.names)
    blank |= {"source": "/x", "source_etag": "e", "x_off": 0, "y_off": 0, "width": 8, "height": 8}
    blank |= {"bands": ["a"], "dtype": "uint8"}
    full = [{**blank, "tile_id": f"tile{i}", "bbox": row.get("bbox")} for i, row in enumerate(rows)]
    table = pa.Table.from_pylist(full, schema=schema)
    for name, kind in {"biome": pa.string(), "eco_region": pa.string(), "size": pa.int64()}.items():
        table = table.append_column(name, pa.array([row.get(name) for row in rows], kind))
    return Catalog(table)


def brute_force(rows: list[dict[str, Any]], samples: int, biomes: int, seed: int) -> tuple[set[str], Counter[Any]]:
    """Chosen tile ids, and the quota of each (biome, ecoregion), in exact fractions."""
    area: Counter[Any] = Counter()
    members: dict[Any, list[str]] = {}
    for i, row in enumerate(rows):
        if row["biome"] is not None and row["eco_region"] is not None:
            key = (row["biome"], row["eco_region"])
            area[key] += row["size"]
            members.setdefault(key, []).append(f"tile{i}")
    quota: Counter[Any] = Counter()
    for biome in {biome for biome, _ in area}:
        own = [key for key in area if key[0] == biome]
        share = {key: Fraction(samples, biomes) * Fraction(area[key], sum(area[k] for k in own)) for key in own}
        for key in own:
            quota[key] = int(share[key])
        left = samples // biomes - sum(quota[key] for key in own)
        for key in sorted(own, key=lambda k: (int(share[k]) - share[k], k[1]))[:left]:
            quota[key] += 1
    chosen: set[str] = set()
    for key, ids in members.items():
        order = sorted(ids, key=lambda tile_id: hashlib.md5(f"{seed}/{tile_id}".encode()).hexdigest())
        chosen |= set(order[: quota[key]])
    return chosen, quota


tiles = st.lists(
    st.fixed_dictionaries(
        {
            "biome": st.sampled_from(["0", "1", "2", None]),
            "eco_region": st.sampled_from(["10", "11", "12", "13", None]),
            "size": st.integers(1, 9),
        }
    ),
    min_size=1,
    max_size=60,
)


@settings(max_examples=20)
@given(rows=tiles, samples=st.integers(3, 70), seed=st.integers(0, 3))
def test_equation_2(rows: list[dict[str, Any]], samples: int, seed: int) -> None:
    made = catalog(rows)
    chosen, quota = brute_force(rows, samples, 3, seed)
    if not quota:
        with pytest.raises(InputError, match="no tile has a biome"):
            balanced_sample(made, samples, seed=seed, area="size", biomes=3)
        return
    sample = balanced_sample(made, samples, seed=seed, area="size", biomes=3)
    account = sample.account.to_pylist()
    assert {(one["biome"], one["eco_region"]): one["quota"] for one in account} == dict(quota)
    assert set(sample.catalog.table["tile_id"].to_pylist()) == chosen
    assert len(sample.catalog) == len(chosen) == sum(one["taken"] for one in account) <= samples
    assert sample.short == sum(quota.values()) - len(chosen)
    for biome in {one["biome"] for one in account}:
        own = [one for one in account if one["biome"] == biome]
        assert sum(one["share"] for one in own) == pytest.approx(samples / 3)
        assert all(abs(one["quota"] - one["share"]) < 1 for one in own)
    order = np.random.default_rng(seed).permutation(len(rows))
    turned = Catalog(made.table.take(order))
    again = balanced_sample(turned, samples, seed=seed, area="size", biomes=3).catalog.table
    assert set(again["tile_id"].to_pylist()) == chosen


def test_areas_are_those_on_the_sphere_and_fourteen_biomes_share() -> None:
    box = [{"xmin": 0.0, "xmax": 1.0, "ymin": y, "ymax": y + 1.0} for y in (0.0, 59.5, 10.0)]
    rows = [
        *({"biome": "1", "eco_region": "7", "bbox": box[0]} for _ in range(200)),
        *({"biome": "1", "eco_region": "8", "bbox": box[1]} for _ in range(200)),  # half as wide
        *({"biome": "2", "eco_region": "9", "bbox": box[2]} for _ in range(5)),
    ]
    sample = balanced_sample(catalog(rows), 14 * 90)
    account = {one["eco_region"]: one for one in sample.account.to_pylist()}
    ratio = np.cos(np.radians(60)) / np.cos(np.radians(0.5))
    assert account["7"]["share"] == pytest.approx(90 / (1 + ratio), rel=1e-6)
    assert (account["7"]["quota"], account["8"]["quota"]) == (60, 30)
    assert (account["9"]["quota"], account["9"]["taken"], sample.short) == (90, 5, 85)
    other = balanced_sample(catalog(rows), 14 * 90, seed=1).catalog.table["tile_id"].to_pylist()
    assert other != sample.catalog.table["tile_id"].to_pylist()


def test_what_cannot_be_is_refused() -> None:
    made = catalog([{"biome": "1", "eco_region": "7", "size": 1}])
    with pytest.raises(BadQuery, match="no column biome, eco_region"):
        balanced_sample(Catalog(made.table.drop_columns(["biome", "eco_region"])), 14)
    with pytest.raises(InputError, match="have no area"):  # tiles without a place
        balanced_sample(made, 14)
    with pytest.raises(InputError, match="one a biome or more"):
        balanced_sample(made, 13, area="size")
    with pytest.raises(BadQuery, match="'nope'"):
        balanced_sample(made, 14, area="nope")
    with pytest.raises(BadQuery, match="does not run"):
        balanced_sample(made, 14, area="(SELECT count(*) FROM read_text('/etc/passwd'))")

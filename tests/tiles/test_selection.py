"""MMEarth's rules for scenes, against shapely and loops in Python."""

from collections import Counter
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import shapely
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from nec_ray.contracts import arrow_schema
from nec_ray.errors import BadCatalog, InputError, NotFound
from nec_ray.tiles.selection import (
    Box,
    Scenes,
    center_crop,
    choose_scenes,
    covers,
    draw,
    read_scenes,
    touches,
    yearly_mode,
)

TILE = Box(10.0, 45.0, 10.01, 45.01)
BOUNDS = {"xmin": TILE.xmin, "ymin": TILE.ymin, "xmax": TILE.xmax, "ymax": TILE.ymax}
WIDE = shapely.box(9, 44, 11, 46)
HALF = shapely.box(9, 44, 10.005, 46)  # ends in the middle of the tile: the edge of a swath
ASIDE = shapely.box(20, 44, 21, 46)


def scene(scene_id: str, product: str, time: str, **columns: Any) -> dict[str, Any]:
    footprint = shapely.to_wkb(columns.pop("footprint", WIDE))
    known = {"cloud_percent": 0.0 if product.startswith("sentinel2") else None, "orbit": None, "source": None}
    moment = datetime.fromisoformat(time).replace(tzinfo=UTC)
    return {"scene_id": scene_id, "product": product, "acquired_at": moment, "footprint": footprint, **known, **columns}


def catalog(rows: list[dict[str, Any]]) -> Scenes:
    return Scenes(pa.Table.from_pylist(rows, schema=arrow_schema("scenes.json")))


def tiles(*names: str) -> pa.Table:
    return pa.table({"tile_id": list(names), "bbox": [BOUNDS] * len(names)})


corner = st.tuples(st.integers(-6, 6), st.integers(-6, 6))


@settings(max_examples=300)
@given(corners=st.lists(corner, min_size=3, max_size=9, unique=True), west=st.integers(-7, 6), south=st.integers(-7, 6))
def test_footprints_against_shapely(corners: list[tuple[int, int]], west: int, south: int) -> None:
    polygon = shapely.Polygon(corners)
    if not polygon.is_valid or polygon.area == 0:
        return
    box = Box(west + 0.3137, south + 0.2711, west + 1.5173, south + 1.8191)  # never just along an edge
    ring = np.array(polygon.exterior.coords, np.float64)
    turn = np.array([360.0, 0.0])
    other = shapely.box(box.xmin, box.ymin, box.xmax, box.ymax)
    assert covers(ring, box) == polygon.covers(other)
    assert touches(ring, box) == polygon.intersects(other)
    assert covers(ring + turn, box) == covers(ring - turn, box) == covers(ring, box)


def test_a_footprint_that_ends_at_the_tile_covers_it() -> None:
    ring = np.array(shapely.box(TILE.xmin, TILE.ymin, TILE.xmax, TILE.ymax).exterior.coords)
    assert covers(ring, TILE)
    assert touches(ring, TILE)
    beside = ring + np.array([TILE.xmax - TILE.xmin, 0])
    assert not covers(beside, TILE)
    assert not touches(beside, TILE)


def test_which_sentinel2_scenes_can_be_chosen() -> None:
    level = "sentinel2_l2a"
    scenes = catalog(
        [
            scene("good", level, "2019-05-01"),
            scene("nearly cloudy", level, "2019-05-02", cloud_percent=9.99),
            scene("cloudy", level, "2019-05-03", cloud_percent=10.0),
            scene("who knows", level, "2019-05-04", cloud_percent=None),
            scene("edge", level, "2019-05-05", footprint=HALF),
            scene("aside", level, "2019-05-06", footprint=ASIDE),
            scene("before", level, "2018-12-31T23:59:59"),
            scene("after", level, "2020-01-01"),
            scene("other level", "sentinel2_l1c", "2019-05-07"),
            scene("unknown", "landsat", "2019-05-08"),
        ]
    )
    found = scenes.sentinel2(TILE, 2019, level)
    assert [scenes.ids[i] for i in found] == ["good", "nearly cloudy"]


@settings(max_examples=50)
@given(
    days=st.lists(
        st.tuples(st.integers(-40, 40), st.sampled_from(["ascending", "descending", None]), st.booleans()), max_size=12
    )
)
def test_the_nearest_sentinel1_of_both_orbits(days: list[tuple[int, str | None, bool]]) -> None:
    date = datetime(2019, 6, 1, 10, 30, tzinfo=UTC)
    rows = [
        scene(
            str(i),
            "sentinel1",
            (date + timedelta(days=day)).isoformat()[:19],
            orbit=orbit,
            footprint=WIDE if whole else HALF,
        )
        for i, (day, orbit, whole) in enumerate(days)
    ]
    found = catalog(rows).nearest_sentinel1(TILE, date)
    for orbit, row in zip(("ascending", "descending"), found, strict=True):
        fitting = [(abs(day), day) for day, of, whole in days if of == orbit and whole]
        assert (None if row is None else (abs(days[row][0]), days[row][0])) == min(fitting, default=None)
        assert row is None or (days[row][1], days[row][2]) == (orbit, True)


@given(arrays(np.uint8, st.tuples(st.integers(1, 7), st.just(2), st.just(3)), elements=st.integers(0, 9)))
def test_the_yearly_mode_of_dynamic_world(labels: npt.NDArray[np.uint8]) -> None:
    mode = yearly_mode(labels)
    assert mode.dtype == np.uint8
    for row, column in np.ndindex(2, 3):
        count = Counter(x for x in labels[:, row, column].tolist() if x)
        most = max(count.values(), default=0)
        assert mode[row, column] == min((kind for kind, times in count.items() if times == most), default=0)


def test_labels_that_are_none_are_refused() -> None:
    wrong: Any
    for wrong in (np.full((1, 2, 2), 10, np.uint8), np.zeros((2, 2), np.uint8), np.zeros((1, 2, 2), np.int64)):
        with pytest.raises(InputError, match="labels of Dynamic World"):
            yearly_mode(wrong)


def test_the_middle_of_an_image() -> None:
    image = np.arange(2 * 130 * 130).reshape(2, 130, 130)
    np.testing.assert_array_equal(center_crop(image), image[:, 1:129, 1:129])
    np.testing.assert_array_equal(center_crop(center_crop(image), 64), image[:, 33:97, 33:97])
    assert center_crop(np.zeros((131, 130))).shape == (128, 128)
    with pytest.raises(InputError, match="no middle of 128"):
        center_crop(np.zeros((3, 127, 130)))


def test_the_choice_of_a_tile() -> None:
    rows = []
    for year in range(2016, 2022):
        rows += [scene(f"l1c {year} {day}", "sentinel2_l1c", f"{year}-03-{day:02}T10:30") for day in (1, 11, 21)]
        rows += [scene(f"l2a {year}", "sentinel2_l2a", f"{year}-07-05")] if year > 2018 else []
        rows += [
            scene(f"dw {year} {i}", "dynamic_world", f"{year}-0{i}-01", footprint=f)
            for i, f in enumerate([WIDE, HALF, ASIDE], 1)
        ]
        rows += [
            scene(f"asc {year} {month}", "sentinel1", f"{year}-{month:02}-09", orbit="ascending") for month in (2, 4, 7)
        ]
    scenes = catalog(rows)
    names = [f"t{i}" for i in range(400)]
    chosen = choose_scenes(tiles(*names), scenes, seed=3).to_pylist()
    years = Counter(row["year"] for row in chosen)
    assert set(years) == {2017, 2018, 2019, 2020}
    assert min(years.values()) > 70
    for row in chosen:
        assert row["reason"] is None
        assert row["acquired_at"].year == row["year"]
        assert row["dynamic_world"] == [f"dw {row['year']} 1", f"dw {row['year']} 2"]
        assert row["sentinel1_descending"] is None
        day = row["acquired_at"]
        nearest = min((2, 4, 7), key=lambda m: abs(datetime(row["year"], m, 9, tzinfo=UTC) - day))
        assert row["sentinel1_ascending"] == f"asc {row['year']} {nearest}"
    levels = Counter((row["year"] > 2018, row["s2_type"]) for row in chosen)
    assert levels[False, "l2a"] == 0  # there is none, so that L1C is taken
    assert 0.4 < levels[True, "l2a"] / (levels[True, "l2a"] + levels[True, "l1c"]) < 0.6
    assert len({row["sentinel2"] for row in chosen if row["s2_type"] == "l1c"}) == 12  # all scenes of all years
    turned = Scenes(pa.Table.from_pylist(rows[::-1], schema=arrow_schema("scenes.json")))
    again = choose_scenes(tiles(*names[::-1]), turned, seed=3).to_pylist()
    assert again == chosen[::-1]
    assert choose_scenes(tiles(*names), scenes, seed=4).to_pylist() != chosen


@pytest.mark.parametrize("unfit", [{"cloud_percent": 80.0}, {"footprint": HALF}])
def test_l1c_stands_in_only_where_no_l2a_exists(unfit: dict[str, Any]) -> None:
    """Clouds and swaths are looked at after the level is chosen (supplement, A.1)."""
    rows = [scene(f"l1c {year}", "sentinel2_l1c", f"{year}-05-01") for year in range(2017, 2021)]
    rows += [scene(f"l2a {year}", "sentinel2_l2a", f"{year}-05-01", **unfit) for year in (2019, 2020)]
    rows += [scene("l2a elsewhere", "sentinel2_l2a", "2018-05-01", footprint=ASIDE)]
    chosen = choose_scenes(tiles(*(f"t{i}" for i in range(200))), catalog(rows)).to_pylist()
    late = [row for row in chosen if row["year"] > 2018]
    without = [row for row in late if row["reason"]]
    assert all("no sentinel2_l2a scene of 20" in row["reason"] and row["s2_type"] is None for row in without)
    assert 0.35 < len(without) / len(late) < 0.65  # the half that drew L2A
    assert {row["s2_type"] for row in late if row not in without} == {"l1c"}
    assert all(row["sentinel2"] == f"l1c {row['year']}" for row in chosen if row["year"] < 2019)


def test_a_tile_without_scenes_says_why() -> None:
    scenes = catalog([scene(f"{year}", "sentinel2_l2a", f"{year}-05-01") for year in range(2017, 2021)])
    chosen = choose_scenes(tiles(*(f"t{i}" for i in range(60))), scenes).to_pylist()
    reasons = Counter(row["reason"] is None for row in chosen)
    assert min(reasons[True], reasons[False]) > 10  # L1C is drawn where there is L2A only: the rule is one-sided
    assert all("sentinel2_l1c scene of 20" in row["reason"] for row in chosen if row["reason"])
    nowhere = pa.table({"tile_id": ["t"], "bbox": pa.array([None], tiles("t")["bbox"].type)})
    assert choose_scenes(nowhere, scenes)["reason"].to_pylist() == ["the tile has no place on the map"]


def test_draws_are_even_and_independent() -> None:
    drawn = Counter(draw(4, 0, f"t{i}", "year") for i in range(4000))
    assert min(drawn.values()) > 900
    pairs = Counter((draw(2, 0, f"t{i}", "level"), draw(2, 1, f"t{i}", "level")) for i in range(4000))
    assert min(pairs.values()) > 900


def test_catalogs_that_are_none_are_refused(tmp_path: Path) -> None:
    good = [scene("a", "sentinel1", "2019-01-01"), scene("b", "sentinel1", "2019-01-01")]
    path = tmp_path / "scenes.parquet"
    pq.write_table(pa.Table.from_pylist(good, schema=arrow_schema("scenes.json")), path)
    assert read_scenes(path).ids == ["a", "b"]
    holed = shapely.Polygon(WIDE.exterior, [HALF.exterior])
    odd = {
        "lacks the columns orbit": [{k: v for k, v in row.items() if k != "orbit"} for row in good],
        "more than once": [good[0], good[0]],
        "rows without product": [{**good[0], "product": None}, good[1]],
        "columns are not those": [{**row, "cloud_percent": "many"} for row in good],
        "footprint of a is no WKB": [{**good[0], "footprint": b"\1\3\0\0\0"}],
        "of one closed ring": [{**good[0], "footprint": shapely.to_wkb(holed)}],
        "is no WKB polygon": [{**good[0], "footprint": shapely.to_wkb(shapely.Point(1, 2))}],
        "no WKB polygon of": [
            {**good[0], "footprint": shapely.to_wkb(WIDE).replace(np.float64(9).tobytes(), b"\xff" * 8)}
        ],
    }
    for message, rows in odd.items():
        with pytest.raises(BadCatalog, match=message):
            Scenes(pa.Table.from_pylist(rows))
    big = {**good[0], "footprint": shapely.to_wkb(WIDE, byte_order=0)}
    assert np.array_equal(catalog([big]).rings[0], catalog(good).rings[0])
    path.write_text("no Parquet")
    with pytest.raises(BadCatalog, match="not a Parquet file"):
        read_scenes(path)
    with pytest.raises(NotFound):
        read_scenes(tmp_path / "none.parquet")


@given(st.binary(max_size=120))
def test_any_bytes_as_a_footprint(data: bytes) -> None:
    row = {**scene("a", "sentinel1", "2019-01-01"), "footprint": data}
    with pytest.raises(BadCatalog, match="no WKB polygon"):
        catalog([row])

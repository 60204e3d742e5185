"""Regions against shapely, the tiles they pick from an archive, and times of acquisition."""

import json
from datetime import UTC, date, datetime, timedelta, timezone
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import shapely
from hypothesis import given
from hypothesis import strategies as st

from nec_ray import open_archive
from nec_ray.archive.regions import region_of
from nec_ray.archive.times import period_of
from nec_ray.errors import InputError
from tests.archive.make import Made, empty_archive, filled_archive, index_rows

WHOLE = st.integers(-6, 6)
"""Small whole numbers: borders touch and run along each other all the time, and cross products are exact."""


def polygon_of(points: list[tuple[int, int]]) -> shapely.Geometry:
    return shapely.Polygon(points) if len(set(points)) > 2 else shapely.Point(points[0])


corners = st.lists(st.tuples(WHOLE, WHOLE), min_size=3, max_size=6)
polygons = corners.map(polygon_of).filter(lambda p: p.geom_type == "Polygon" and p.is_valid)
boxes = st.tuples(WHOLE, WHOLE, st.integers(1, 8), st.integers(1, 8)).map(
    lambda b: shapely.box(b[0], b[1], b[0] + b[2], b[1] + b[3])
)
holed = boxes.map(lambda b: b.difference(b.buffer(-1, join_style="mitre"))).filter(lambda g: not g.is_empty)
points = st.tuples(WHOLE, WHOLE).map(shapely.Point)
lines = st.lists(st.tuples(WHOLE, WHOLE), min_size=2, max_size=4, unique=True).map(shapely.LineString)
unions = (
    st.tuples(polygons, polygons)
    .map(lambda two: two[0].union(two[1]))
    .filter(lambda g: g.geom_type in {"Polygon", "MultiPolygon"})
)
regions = st.one_of(polygons, boxes, holed, points, lines, unions)
footprints = st.lists(st.one_of(boxes, polygons, unions, holed), min_size=1, max_size=6)


@given(regions, footprints)
def test_a_region_meets_the_footprints_that_shapely_says(region: shapely.Geometry, tiles: list[Any]) -> None:
    found = region_of(region).meets([shapely.to_wkb(tile) for tile in tiles])
    np.testing.assert_array_equal(found, shapely.intersects(region, tiles))


@pytest.mark.parametrize("seed", range(3))
def test_so_does_a_coast_with_thousands_of_edges(seed: int) -> None:
    rng = np.random.default_rng(seed)
    angle = np.linspace(0, 2 * np.pi, 3000, endpoint=False)
    radius = 20 + 4 * np.sin(9 * angle) + rng.uniform(-0.3, 0.3, len(angle))
    coast = shapely.Polygon(np.stack([radius * np.cos(angle), radius * np.sin(angle)], axis=1))
    island = shapely.Point(30, 30).buffer(0.2)
    region = shapely.MultiPolygon([coast.difference(shapely.Point(1, 2).buffer(5)), island])
    corner = rng.uniform(-31, 31, (300, 2))
    tiles = [shapely.affinity.rotate(shapely.box(x, y, x + 1.3, y + 0.9), 13) for x, y in corner]
    found = region_of(region).meets([tile.wkb for tile in tiles])
    np.testing.assert_array_equal(found, shapely.intersects(region, tiles))


def test_a_footprint_that_does_not_read_is_nowhere() -> None:
    nested = b"\x01" + (6).to_bytes(4, "little") + (1).to_bytes(4, "little")
    hostile = [None, b"", b"\x01", shapely.Point(0, 0).wkb, nested * 5000, shapely.box(0, 0, 1, 1).wkb[:-3]]
    found = region_of((-1, -1, 2, 2)).meets([*hostile, shapely.box(0, 0, 1, 1).wkb])
    assert found.tolist() == [False] * len(hostile) + [True]


BOX = shapely.box(0.15, 0.05, 0.25, 0.35)


@pytest.mark.parametrize(
    "given_as",
    [
        BOX,
        shapely.geometry.mapping(BOX),
        json.dumps(shapely.geometry.mapping(BOX)),
        {"type": "Feature", "properties": {"name": "O'Hara"}, "geometry": shapely.geometry.mapping(BOX)},
        {
            "type": "FeatureCollection",
            "features": [
                {"type": "Feature", "geometry": None},
                {"type": "Feature", "geometry": shapely.geometry.mapping(BOX)},
                # Overlaps the other: by the even-odd rule over both it would be a hole.
                {"type": "Feature", "geometry": shapely.geometry.mapping(BOX.buffer(-0.02))},
            ],
        },
        (0.15, 0.05, 0.25, 0.35),
        "0.15, 0.05, 0.25, 0.35",
        np.array([0.15, 0.05, 0.25, 0.35]),
    ],
)
def test_a_region_is_given_as_it_comes(made: Made, given_as: Any) -> None:
    expected = [f"t{i:03}" for i in range(40) if i % 10 in (1, 2) and i // 10 < 4]
    found = open_archive(made.url).within(given_as)
    assert found.rows(["tile_id"])["tile_id"].to_pylist() == expected
    assert len(found) == 8


@pytest.mark.parametrize(
    ("region", "says"),
    [
        ("nothing", "no GeoJSON"),
        ({"type": "Polygoon", "coordinates": []}, "no GeoJSON"),
        ({"type": "Polygon", "coordinates": [[["a", 1], [2, 3], [4, 5]]]}, "no \\[longitude, latitude\\]"),
        ({"type": "Polygon", "coordinates": []}, "empty"),
        ((1, 2, 3), "west, south, east, north"),
        ((0, 5, 1, 4), r"is it \(0, 4, 1, 5\)\?"),
        ({"type": "Point", "coordinates": [48.1, 91.5]}, "swap them"),
        ({"type": "Point", "coordinates": [500000, 5300000]}, "OGC:CRS84"),
        ({"type": "Point", "coordinates": [float("nan"), 0]}, "no longitude and latitude"),
        (float, "west, south, east, north"),
        ("[" * 100_000, "no GeoJSON"),
    ],
)
def test_what_is_no_region_is_refused_in_one_line(region: Any, says: str) -> None:
    with pytest.raises(InputError, match=says) as caught:
        region_of(region)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 300


def test_a_region_in_metres_is_refused() -> None:
    import geopandas

    table = geopandas.GeoDataFrame(geometry=[BOX], crs="OGC:CRS84")
    assert region_of(table).bounds == BOX.bounds
    with pytest.raises(InputError, match="to_crs"):
        region_of(table.to_crs("EPSG:3857"))


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    return filled_archive(tmp_path_factory.mktemp("filled"))


def placed(folder: Path, shapes: list[shapely.Geometry | None], times: list[datetime | None] | None = None) -> Made:
    """An archive of failed tiles with these footprints and times."""
    made = empty_archive(folder)
    rows = index_rows([f"t{i}" for i in range(len(shapes))], made.codec.id, ["failed"] * len(shapes))
    columns = {
        "geometry": [None if s is None else s.wkb for s in shapes],
        "bbox": [s and dict(zip(("xmin", "ymin", "xmax", "ymax"), s.bounds, strict=True)) for s in shapes],
        "acquired_at": times or [None] * len(shapes),
    }
    for name, values in columns.items():
        at = rows.schema.get_field_index(name)
        rows = rows.set_column(at, rows.schema.field(at), pa.array(values, rows.schema.field(at).type))
    made.index.append(made.index.version(), rows)
    return made


def ids(tiles: Any) -> list[str]:
    return tiles.rows(["tile_id"])["tile_id"].to_pylist()


def test_regions_and_footprints_meet_across_the_antimeridian(tmp_path: Path) -> None:
    made = placed(
        tmp_path,
        [
            shapely.box(179.8, 0, 180.2, 0.4),  # across, as `nec tiles build` writes it
            shapely.box(-179.9, 0, -179.5, 0.4),
            shapely.box(179.5, 0, 179.7, 0.4),
            shapely.box(-10, 0, -9, 1),
            None,
        ],
    )
    archive = open_archive(made.url)
    assert ids(archive.at(-179.85, 0.2)) == ["t0", "t1"]
    assert ids(archive.at(179.85, 0.2)) == ["t0"]
    assert ids(archive.within((179.6, 0, -179.6, 1))) == ["t0", "t1", "t2"]
    assert ids(archive.within((-179.88, 0, -179.85, 1))) == ["t0", "t1"]
    assert ids(archive.within((-180, -90, 180, 90))) == ["t0", "t1", "t2", "t3"]


def test_a_slanted_footprint_is_picked_by_its_shape_and_not_by_its_bounds(tmp_path: Path) -> None:
    slanted = shapely.Polygon([(0, 0), (10, 9), (10, 10), (0, 1)])
    archive = open_archive(placed(tmp_path, [slanted]).url)
    assert not len(archive.at(9, 1))
    assert not len(archive.within((8, 0, 10, 6)))
    assert ids(archive.at(0, 0.5)) == ids(archive.within((8, 0, 10, 9))) == ["t0"]
    assert ids(archive.within(slanted.buffer(5).difference(slanted.buffer(0.01)))) == []
    assert ids(archive.within(slanted.buffer(-0.3))) == ["t0"]


INSTANT = datetime(2020, 5, 31, 23, 59, 59, 999_999, UTC)


@pytest.mark.parametrize(
    ("time", "holds"),
    [
        ("2020", "bcde"),
        ("2020-05", "bcd"),
        ("2020-05-31", "cd"),
        (date(2020, 5, 31), "cd"),
        ("2020-05-31T23:59:59.999999Z", "d"),
        (INSTANT, "d"),
        (INSTANT.replace(tzinfo=None), "d"),
        (INSTANT.astimezone(timezone(timedelta(hours=-7))), "d"),
        (np.datetime64("2020-05-31"), "cd"),
        (("2020-05", "2020-06"), "bcde"),
        ("2020-05-31/2020-06-01", "cde"),
        ((None, "2020-05-30"), "ab"),
        ("../2019", "a"),
        (["2020-05-31", None], "cdef"),
        ((INSTANT, INSTANT), "d"),
        ("2020-12", ""),
        ((None, None), "abcdefg"),
    ],
)
def test_times_pick_what_they_say(archive_of_times: Any, time: Any, holds: str) -> None:
    assert "".join("abcdefg"[int(i[1:])] for i in ids(archive_of_times.select(time=time))) == holds
    times = pa.chunked_array([archive_of_times.rows(["acquired_at"])["acquired_at"].combine_chunks()])
    assert "".join(np.array(list("abcdefg"))[period_of(time).holds(times)]) == holds


@pytest.fixture(scope="module")
def archive_of_times(tmp_path_factory: pytest.TempPathFactory) -> Any:
    starts = [(2019, 12, 31), (2020, 5, 1), (2020, 5, 31), None, (2020, 6, 1), (2021, 1, 1), None]
    times = [datetime(*day, tzinfo=UTC) if day else None for day in starts]
    times[3] = INSTANT
    return open_archive(placed(tmp_path_factory.mktemp("times"), [BOX] * 7, times).url)


@pytest.mark.parametrize(
    "time", ["yesterday", "2020-13", "2020-05-40", ("2020", "2021", "2022"), ("2021", "2020"), 7, "2020/2021/2022", ""]
)
def test_what_is_no_time_is_refused_in_one_line(time: Any) -> None:
    with pytest.raises(InputError) as caught:
        period_of(time)
    assert "\n" not in str(caught.value)

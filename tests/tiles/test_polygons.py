from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import pytest
import shapely
from hypothesis import given, settings
from hypothesis import strategies as st

from nec_ray.tiles.polygons import points_in_rings, rings_of_geojson, rings_of_wkb

HOLED = shapely.Polygon(
    [(0, 0), (10, 1), (9, 9), (1, 8)],
    [[(2, 2), (5, 2), (5, 5), (2, 5)], [(6, 6), (8, 6), (7, 8)]],
)
PARTS = shapely.MultiPolygon([HOLED, shapely.Point(15, 5).buffer(3)])


def random_points(seed: int, count: int) -> npt.NDArray[np.float64]:
    return np.random.default_rng(seed).uniform((-2, -2), (20, 12), (count, 2))


def inside(points: npt.NDArray[np.float64], rings: Sequence[npt.NDArray[np.float64]]) -> npt.NDArray[np.bool_]:
    return points_in_rings(points[:, 0], points[:, 1], rings)


@pytest.mark.parametrize("shape", [HOLED, PARTS, shapely.Point(3, 3).buffer(2)], ids=["holes", "parts", "round"])
def test_points_in_rings_agrees_with_shapely(shape: shapely.Geometry) -> None:
    points = random_points(1, 20_000)
    expected = shapely.contains_xy(shape, points)
    assert 0 < expected.sum() < len(expected)
    for rings in (rings_of_wkb(shapely.to_wkb(shape)), rings_of_geojson(shapely.geometry.mapping(shape))):
        np.testing.assert_array_equal(inside(points, rings), expected)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(3, 40))
def test_points_in_rings_agrees_with_shapely_on_random_stars(seed: int, corners: int) -> None:
    rng = np.random.default_rng(seed)
    angle = np.sort(rng.uniform(0, 2 * np.pi, corners))
    radius = rng.uniform(1, 5, corners)
    star = shapely.Polygon(np.stack([8 + radius * np.cos(angle), 5 + radius * np.sin(angle)], axis=1))
    if not star.is_valid:
        return
    points = random_points(seed, 500)
    found = inside(points, rings_of_wkb(shapely.to_wkb(star)))
    np.testing.assert_array_equal(found, shapely.contains_xy(star, points))


def test_a_point_on_a_shared_edge_is_in_exactly_one_polygon() -> None:
    squares = [shapely.box(x, y, x + 1, y + 1) for x in range(3) for y in range(3)]
    points = np.array([(x, y) for x in (1.0, 1.5, 2.0) for y in (1.0, 1.5, 2.0)])
    hits = [inside(points, rings_of_wkb(shapely.to_wkb(square))) for square in squares]
    np.testing.assert_array_equal(np.sum(hits, axis=0), 1)


def test_the_answer_does_not_depend_on_the_step(monkeypatch: pytest.MonkeyPatch) -> None:
    points, rings = random_points(2, 3000), rings_of_wkb(shapely.to_wkb(PARTS))
    whole = inside(points, rings)
    monkeypatch.setattr("nec_ray.tiles.polygons._PAIRS_A_STEP", 1000)
    np.testing.assert_array_equal(inside(points, rings), whole)


@pytest.mark.parametrize("byte_order", [0, 1])
def test_wkb_of_either_byte_order(byte_order: int) -> None:
    rings = rings_of_wkb(shapely.to_wkb(PARTS, byte_order=byte_order))
    expected = [np.array(ring.coords) for part in PARTS.geoms for ring in (part.exterior, *part.interiors)]
    assert len(rings) == len(expected)
    for ring, wanted in zip(rings, expected, strict=True):
        np.testing.assert_array_equal(ring, wanted)


def test_wkb_that_is_not_a_whole_polygon_is_refused() -> None:
    wkb = shapely.to_wkb(HOLED)
    for end in (0, 3, 8, 12, 40, len(wkb) - 1):
        with pytest.raises(ValueError, match="cut short"):
            rings_of_wkb(wkb[:end])
    with pytest.raises(ValueError, match="type 1"):
        rings_of_wkb(shapely.to_wkb(shapely.Point(1, 2)))


@pytest.mark.parametrize(
    "geometry",
    [
        {},
        {"type": "LineString", "coordinates": [[0, 0], [1, 1]]},
        {"type": "Polygon", "coordinates": [[1, 2]]},
    ],
)
def test_geojson_that_is_no_polygon_is_refused(geometry: dict[str, object]) -> None:
    with pytest.raises(ValueError, match="olygon"):
        rings_of_geojson(geometry)

"""Regions: which footprints a polygon, a line, a point or a box meets, in numpy, exactly and not by bounds alone.

Longitude and latitude, degrees (OGC:CRS84). A footprint across the antimeridian has longitudes beyond 180, so that a
region is looked for at its own longitudes and at those a turn further on or back.
"""

import functools
import json
import math
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from nec_ray.archive.hints import did_you_mean
from nec_ray.errors import InputError, NotFound
from nec_ray.storage import read_url
from nec_ray.tiles.polygons import Ring, rings_of_wkb

Edges = npt.NDArray[np.float64]
"""(edges, 4): x and y of both ends."""

_PAIRS_A_STEP = 1 << 19
_TOGETHER = 128
_HOW = "give GeoJSON, a shapely geometry, or (west, south, east, north)"
_NUMBERS = re.compile(r"\s*[-+0-9.eE]+(\s*,\s*[-+0-9.eE]+){3}\s*")
_LARGEST_TEXT = 64 << 20
_LONGEST_PLACE = 250
"""Characters of a file's path: more are something else, which no file system takes for a name."""


@dataclass(frozen=True)
class Shape:
    """One polygon (with its holes and parts), line or point."""

    edges: Edges
    starts: npt.NDArray[np.float64]
    """(parts, 2) a vertex of each ring, line or point."""
    has_area: bool

    @functools.cached_property
    def bounds(self) -> tuple[float, float, float, float]:
        """West, south, east, north."""
        ends = self.edges.reshape(-1, 2)
        (west, south), (east, north) = ends.min(axis=0), ends.max(axis=0)
        return float(west), float(south), float(east), float(north)

    def turned(self, degrees: float) -> "Shape":
        """The same further east."""
        east = np.array([degrees, 0.0])
        return Shape(self.edges + np.tile(east, 2), self.starts + east, self.has_area)


@dataclass(frozen=True)
class Region:
    """Shapes, of which a footprint has to meet one."""

    shapes: tuple[Shape, ...]
    geojson: str
    """Their geometry as text."""

    @functools.cached_property
    def bounds(self) -> tuple[float, float, float, float]:
        """West, south, east, north."""
        west, south, east, north = zip(*(shape.bounds for shape in self.shapes), strict=True)
        return min(west), min(south), max(east), max(north)

    @property
    def turns(self) -> list[int]:
        """Degrees by which it is turned to meet footprints across the antimeridian, 0 first."""
        west, _, east, _ = self.bounds
        return [0, *([360] if west < 0 else []), *([-360] if east > 180 else [])]

    def condition(self) -> str:
        """SQL condition over `embeddings` that the tiles in it meet."""
        west, south, east, north = self.bounds
        across = " OR ".join(_reach("xmin", west + turn, east + turn) for turn in self.turns)
        # The bounds come first: by them DuckDB leaves out whole row groups, but not where they stand in an OR.
        bounds = [_reach("ymin", south, north), across if self.turns == [0] else f"({across})"]
        if self.turns == [0, 360]:
            bounds.append(f"bbox.xmax >= {_double(west)}")
        region = self.geojson.replace("'", "''")
        return f"{' AND '.join(bounds)} AND nec_intersects(geometry, '{region}')"

    def meets(self, footprints: Sequence[bytes | None]) -> npt.NDArray[np.bool_]:
        """Whether each footprint and the region have a point in common; one of only a border counts.

        Args:
            footprints: WKB Polygons and MultiPolygons; what has none, or none that reads, is nowhere.
        """
        found = np.zeros(len(footprints), bool)
        shapes = [shape.turned(turn) if turn else shape for turn in self.turns for shape in self.shapes]
        rings = [_rings(wkb) for wkb in footprints]
        placed = [number for number, one in enumerate(rings) if one]
        # Those that stand beside each other mostly lie so: few edges of a long coast are near some of them.
        for start in range(0, len(placed), _TOGETHER):
            some = placed[start : start + _TOGETHER]
            tiles = _Footprints([rings[number] for number in some])
            found[some] = np.logical_or.reduce([tiles.meet(shape) for shape in shapes])
        return found


def _reach(edge: str, low: float, high: float) -> str:
    """Condition that the bounds along an axis, named by its lower one, meet an interval."""
    return f"bbox.{edge} <= {_double(high)} AND bbox.{edge.replace('min', 'max')} >= {_double(low)}"


def _double(number: float) -> str:
    """As SQL: without the exponent it would be a decimal, which rounds otherwise."""
    return f"{number:.17e}"


def _rings(wkb: bytes | None) -> list[Ring]:
    try:
        return rings_of_wkb(wkb) if wkb else []
    except ValueError:
        return []


class _Footprints:
    """Polygons, given as their rings; their edges one after another."""

    def __init__(self, polygons: Sequence[Sequence[Ring]]) -> None:
        self.edges = np.concatenate([edges_of(rings) for rings in polygons])
        self.starts = np.array([ring[0] for rings in polygons for ring in rings])
        """(rings, 2) a vertex of each ring."""
        self.owner = np.repeat(np.arange(len(polygons)), [len(rings) for rings in polygons])
        """(rings,) whose ring it is."""
        lengths = [sum(map(len, rings)) for rings in polygons]
        self.first = np.cumsum([0, *lengths[:-1]])
        self.low = np.minimum.reduceat(self.edges[:, :2], self.first)
        self.high = np.maximum.reduceat(self.edges[:, :2], self.first)

    def meet(self, shape: Shape) -> npt.NDArray[np.bool_]:
        """(polygons,) whether each has a point in common with the shape.

        Where no two borders meet, one lies wholly inside the other or outside: a vertex of each ring tells.
        """
        west, south, east, north = shape.bounds
        near = (self.low <= [east, north]).all(axis=1) & (self.high >= [west, south]).all(axis=1)
        if not near.any():
            return near
        low, high = self.low[near].min(axis=0), self.high[near].max(axis=0)
        found = self._crossed(shape.edges[_overlap(shape.edges, low, high)])
        if shape.has_area:
            # Edges that lie above, below or left of all points are crossed by no ray to the right.
            level = (np.minimum(shape.edges[:, 1], shape.edges[:, 3]) <= high[1]) & (
                np.maximum(shape.edges[:, 1], shape.edges[:, 3]) >= low[1]
            )
            ahead = shape.edges[level & (np.maximum(shape.edges[:, 0], shape.edges[:, 2]) >= low[0])]
            rings = np.flatnonzero((near & ~found)[self.owner])
            found[self.owner[rings[_inside(self.starts[rings], ahead)]]] = True
        here = ((shape.starts >= low) & (shape.starts <= high)).all(axis=1)
        return (found | self._hold(shape.starts[here])) & near

    def _crossed(self, edges: Edges) -> npt.NDArray[np.bool_]:
        """(polygons,) whether one of its edges touches one of these."""
        touched = np.zeros(len(self.edges), bool)
        step = max(1, _PAIRS_A_STEP // max(1, len(edges)))
        for start in range(0, len(touched) if len(edges) else 0, step):
            touched[start : start + step] = _touch(self.edges[start : start + step, None], edges).any(axis=1)
        return np.logical_or.reduceat(touched, self.first)

    def _hold(self, points: npt.NDArray[np.float64]) -> npt.NDArray[np.bool_]:
        """(polygons,) whether one of these points lies inside, by the even-odd rule."""
        held = np.zeros(len(self.first), bool)
        step = max(1, _PAIRS_A_STEP // len(self.edges))
        for start in range(0, len(points), step):
            crossed = _rays(points[start : start + step], self.edges)
            held |= (np.add.reduceat(crossed, self.first, axis=1, dtype=np.int64) % 2 == 1).any(axis=0)
        return held


def _inside(points: npt.NDArray[np.float64], edges: Edges) -> npt.NDArray[np.bool_]:
    found = np.zeros(len(points), bool)
    step = max(1, _PAIRS_A_STEP // max(1, len(edges)))
    for start in range(0, len(points) if len(edges) else 0, step):
        found[start : start + step] = _rays(points[start : start + step], edges).sum(axis=1) % 2 == 1
    return found


def _rays(points: npt.NDArray[np.float64], edges: Edges) -> npt.NDArray[np.bool_]:
    """(points, edges) whether a ray to the right crosses an edge, each half open in y."""
    x, y = points[:, :1], points[:, 1:]
    x0, y0, x1, y1 = edges.T
    up = y1 > y0
    side = (x1 - x0) * (y - y0) - (y1 - y0) * (x - x0)  # positive where the point lies left of the edge
    return ((y0 > y) != (y1 > y)) & np.where(up, side > 0, side < 0)


def edges_of(rings: Sequence[Ring]) -> Edges:
    """The edges of closed rings, one ring after another; a ring of one vertex is one edge without length."""
    return np.concatenate([np.hstack([ring, np.roll(ring, -1, axis=0)]) for ring in rings])


def _overlap(edges: Edges, low: npt.NDArray[np.float64], high: npt.NDArray[np.float64]) -> npt.NDArray[np.bool_]:
    return (np.minimum(edges[:, :2], edges[:, 2:]) <= high).all(axis=1) & (
        np.maximum(edges[:, :2], edges[:, 2:]) >= low
    ).all(axis=1)


def _touch(a: Edges, b: Edges) -> npt.NDArray[np.bool_]:
    """Whether segments have a point in common: their bounds overlap, and neither lies beside the other's line."""
    ax0, ay0, ax1, ay1 = np.moveaxis(a, -1, 0)
    bx0, by0, bx1, by1 = np.moveaxis(b, -1, 0)
    near = (
        (np.minimum(ax0, ax1) <= np.maximum(bx0, bx1))
        & (np.maximum(ax0, ax1) >= np.minimum(bx0, bx1))
        & (np.minimum(ay0, ay1) <= np.maximum(by0, by1))
        & (np.maximum(ay0, ay1) >= np.minimum(by0, by1))
    )
    return near & _straddles(ax0, ay0, ax1, ay1, b) & _straddles(bx0, by0, bx1, by1, a)


def _straddles(x0: Any, y0: Any, x1: Any, y1: Any, other: Edges) -> npt.NDArray[np.bool_]:
    """Whether the other segment's ends lie on two sides of the line, or on it."""
    side = [(x1 - x0) * (other[..., i + 1] - y0) - (y1 - y0) * (other[..., i] - x0) for i in (0, 2)]
    return np.sign(side[0]) * np.sign(side[1]) <= 0


def region_of(given: Any) -> Region:
    """The region that somebody means.

    Args:
        given: GeoJSON (geometry, Feature or FeatureCollection, as a dict, text or file); whatever has a
            `__geo_interface__`, such as shapely's geometries and GeoPandas' tables; or (west, south, east, north),
            where west may be greater than east: then the box lies across the antimeridian.

    Raises:
        InputError: it is none of these, or its coordinates are no longitudes and latitudes.
    """
    if isinstance(given, Region):
        return given
    crs = getattr(given, "crs", None)
    if crs is not None and not getattr(crs, "is_geographic", True):
        raise InputError("a region in projected coordinates; turn it to degrees with .to_crs('OGC:CRS84')")
    if hasattr(given, "__geo_interface__"):
        given = given.__geo_interface__
    if isinstance(given, str | os.PathLike):
        given = os.fspath(given)
        if not _NUMBERS.fullmatch(given):
            return region_of_text(given if given.lstrip().startswith("{") else _file(given))
        given = [float(number) for number in given.split(",")]
    if isinstance(given, Mapping):
        try:
            text = json.dumps(given, default=_plain)
        except (ValueError, TypeError, RecursionError) as error:
            raise InputError(f"a region that is no GeoJSON ({error}); {_HOW}") from None
        return region_of_text(text)
    return _box(given)


def _file(place: str) -> str:
    if len(place) > _LONGEST_PLACE:
        raise InputError(f"region {place[:60]!r}: no GeoJSON; {_HOW}")
    try:
        return read_url(place).decode("utf-8-sig")
    except NotFound:
        path = Path(place)
        there = [one.name for one in path.parent.iterdir()] if path.parent.is_dir() else []
        near = did_you_mean(path.name, there)
        raise NotFound(f"region {place[:120]!r}: no GeoJSON and no file of that name{near or f'; {_HOW}'}") from None
    except UnicodeDecodeError:
        raise InputError(f"region {place[:120]!r}: no GeoJSON; {_HOW}") from None


@functools.lru_cache(maxsize=32)
def region_of_text(text: str) -> Region:
    """The region of a GeoJSON text.

    Raises:
        InputError: it is no GeoJSON, or its coordinates are no longitudes and latitudes.
    """
    if len(text) > _LARGEST_TEXT:
        raise InputError(f"a region of {len(text):,} characters; simplify it")
    try:
        geometries = list(_geometries(json.loads(text)))
    except (ValueError, TypeError, RecursionError):
        raise InputError(f"region {text[:60]!r}: no GeoJSON; {_HOW}") from None
    shapes = tuple(_shape(geometry) for geometry in geometries)
    if not shapes:
        raise InputError(f"region {text[:60]!r} is empty; {_HOW}")
    one = geometries[0] if len(geometries) == 1 else {"type": "GeometryCollection", "geometries": geometries}
    return Region(shapes, json.dumps(one))


def _plain(value: Any) -> Any:
    if hasattr(value, "tolist"):
        return value.tolist()
    return str(value)  # a property, such as a date


def _geometries(document: Any) -> Iterator[dict[str, Any]]:
    """The simple geometries of a GeoJSON document, without the parts of multi-geometries that can overlap."""
    match document:
        case {"type": "FeatureCollection", "features": [*features]}:
            for feature in features:
                yield from _geometries(feature)
        case {"type": "Feature", "geometry": geometry}:
            if geometry is not None:
                yield from _geometries(geometry)
        case {"type": "GeometryCollection", "geometries": [*geometries]}:
            for geometry in geometries:
                yield from _geometries(geometry)
        case {"type": "MultiPoint" | "MultiLineString" as kind, "coordinates": [*parts]}:
            for part in parts:
                yield {"type": kind.removeprefix("Multi"), "coordinates": part}
        case {"type": "Point" | "LineString" | "Polygon" | "MultiPolygon" as kind, "coordinates": [*coordinates]}:
            if coordinates:
                yield {"type": kind, "coordinates": coordinates}
        case _:
            raise ValueError("no GeoJSON")


def _shape(geometry: dict[str, Any]) -> Shape:
    kind, coordinates = geometry["type"], geometry["coordinates"]
    depth = {"Point": 0, "LineString": 1, "Polygon": 2, "MultiPolygon": 3}[kind]
    lines: list[Any] = [coordinates]
    try:
        if not depth:
            lines = [[coordinates]]
        for _ in range(depth - 1):
            lines = [line for part in lines for line in part]
        rings = [np.array([[p[0], p[1]] for p in line], np.float64) for line in lines if len(line)]
    except (TypeError, IndexError, KeyError, ValueError):
        raise InputError(f"a region's {kind} has coordinates that are no [longitude, latitude]") from None
    if not rings:
        raise InputError(f"a region's {kind} is empty; {_HOW}")
    _check(np.concatenate(rings))
    if depth > 1 and min(map(len, rings)) < 4 and min(len(np.unique(ring, axis=0)) for ring in rings) < 3:
        raise InputError(f"a region's {kind} has a ring of fewer than three points; {_HOW}")
    if kind == "LineString":
        edges = np.concatenate([np.hstack([r[:-1], r[1:]]) if len(r) > 1 else np.hstack([r, r]) for r in rings])
    else:
        edges = edges_of(rings)
    return Shape(edges, np.array([ring[0] for ring in rings]), has_area=depth > 1)


def _check(points: npt.NDArray[np.float64]) -> None:
    """Refuse what is no longitude and latitude, with the likely reason."""
    lon, lat = points.T
    if np.isfinite(points).all() and (np.abs(lat) <= 90).all() and (lon >= -180).all() and (lon <= 360).all():
        return
    bad = points[~(np.isfinite(points).all(axis=1) & (np.abs(lat) <= 90) & (lon >= -180) & (lon <= 360))][0]
    swapped = (np.abs(lon) <= 90).all() and (np.abs(lat) <= 360).all()
    far = np.abs(bad).max() > 1000
    why = "latitude stands first; swap them" if swapped else "turn it to OGC:CRS84 first" if far else _HOW
    raise InputError(f"a region has the point ({bad[0]:g}, {bad[1]:g}), no longitude and latitude: {why}")


def _box(given: Any) -> Region:
    try:
        west, south, east, north = (float(edge) for edge in given)
    except (TypeError, ValueError):
        raise InputError(f"region {str(given)[:60]!r}: {_HOW}") from None
    if not all(map(math.isfinite, (west, south, east, north))) or south > north:
        order = f"; is it ({west:g}, {north:g}, {east:g}, {south:g})?" if south > north else ""
        raise InputError(f"region ({west:g}, {south:g}, {east:g}, {north:g}): no west, south, east, north{order}")
    # East of the antimeridian longitudes go on, as those of footprints do.
    east += 360 if west > east else 0
    ring = [[west, south], [east, south], [east, north], [west, north], [west, south]]
    return region_of_text(json.dumps({"type": "Polygon", "coordinates": [ring]}))

"""Which scenes a tile gets, by MMEarth's rules, over a catalog of scenes (MMEarth, supplement A.1).

To search and download scenes, from Earth Engine or elsewhere, is not part of this: a scene catalog
(`schemas/scenes.json`) says what there is, and the result says what to fetch.
"""

import hashlib
import os
import struct
from dataclasses import dataclass
from datetime import datetime
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from nec_ray.contracts import arrow_schema
from nec_ray.errors import BadCatalog, InputError
from nec_ray.storage import Store, normalise_url, read_url

YEARS = (2017, 2018, 2019, 2020)
MOST_CLOUD = 10.0
"""Per cent of a Sentinel-2 scene: one with as much is not chosen."""
ORBITS = ("ascending", "descending")
_L1C, _L2A = "sentinel2_l1c", "sentinel2_l2a"
_POLYGON = 3  # in WKB
_POINT_BYTES = 16

Floats = npt.NDArray[np.float64]
Rows = npt.NDArray[np.int64]

CHOICE = pa.schema(
    [
        pa.field("tile_id", pa.string(), nullable=False),
        pa.field("year", pa.int32(), nullable=False),
        pa.field("s2_type", pa.string()),
        pa.field("sentinel2", pa.string()),
        pa.field("acquired_at", pa.timestamp("us", tz="UTC")),
        pa.field("sentinel1_ascending", pa.string()),
        pa.field("sentinel1_descending", pa.string()),
        pa.field("dynamic_world", pa.list_(pa.string())),
        pa.field("reason", pa.string()),
    ]
)
"""Columns of what `choose_scenes` gives: scene ids, and why a tile has none."""


@dataclass(frozen=True)
class Box:
    """Bounds of a tile, degrees; `xmax` may lie beyond 180."""

    xmin: float
    ymin: float
    xmax: float
    ymax: float


class Scenes:
    """A scene catalog.

    Raises:
        BadCatalog: a column is missing, of another type or null, an id stands twice, or a footprint is no polygon of
            one ring.
    """

    def __init__(self, table: pa.Table, where: str = "scene catalog") -> None:
        schema = arrow_schema("scenes.json")
        missing = [name for name in schema.names if name not in table.column_names]
        if missing:
            raise BadCatalog(f"{where}: lacks the columns {', '.join(missing)} of schemas/scenes.json")
        empty = [field.name for field in schema if not field.nullable and table[field.name].null_count]
        if empty:
            raise BadCatalog(f"{where}: rows without {', '.join(empty)}; every scene needs it")
        try:
            table = table.select(schema.names).cast(schema)
        except (pa.ArrowException, ValueError) as error:
            raise BadCatalog(f"{where}: its columns are not those of schemas/scenes.json ({_line(error)})") from None
        self.ids: list[str] = table["scene_id"].to_pylist()
        if len(set(self.ids)) != len(self.ids):
            raise BadCatalog(f"{where}: scene ids stand more than once; make them unique")
        self.product = np.array(table["product"].to_pylist(), object)
        self.orbit = np.array(table["orbit"].to_pylist(), object)
        self.times: list[datetime] = table["acquired_at"].to_pylist()
        self.year = np.array([time.year for time in self.times], np.int64)
        self.micros = table["acquired_at"].combine_chunks().cast(pa.int64()).to_numpy()
        self.cloud = table["cloud_percent"].to_numpy().astype(np.float64)  # NaN where unknown
        self.rings = [
            _ring(wkb, where, name) for wkb, name in zip(table["footprint"].to_pylist(), self.ids, strict=True)
        ]

    def __len__(self) -> int:
        return len(self.ids)

    def sentinel2(self, box: Box, year: int, product: str) -> Rows:
        """Scenes of a year and product (`sentinel2_l1c` or `_l2a`), below 10 % cloud, with data in all of a tile."""
        rows = np.flatnonzero((self.product == product) & (self.year == year) & (self.cloud < MOST_CLOUD))
        return self._where(rows, lambda ring: covers(ring, box))

    def has(self, box: Box, year: int, product: str) -> bool:
        """Whether there is any scene of a year and product with data in some of a tile, whatever its clouds."""
        rows = np.flatnonzero((self.product == product) & (self.year == year))
        return any(touches(self.rings[row], box) for row in rows)

    def nearest_sentinel1(self, box: Box, time: datetime) -> tuple[int | None, int | None]:
        """The ascending and the descending scene nearest in time that have data in all of a tile.

        The earlier of two that are equally near; None where there is none.
        """
        micros = pa.scalar(time, pa.timestamp("us", tz="UTC")).cast(pa.int64()).as_py()
        nearest: list[int | None] = []
        for orbit in ORBITS:
            rows = np.flatnonzero((self.product == "sentinel1") & (self.orbit == orbit))
            rows = rows[np.lexsort((self.micros[rows], np.abs(self.micros[rows] - micros)))]
            nearest.append(next((int(row) for row in rows if covers(self.rings[row], box)), None))
        return nearest[0], nearest[1]

    def dynamic_world(self, box: Box, year: int) -> Rows:
        """Scenes of Dynamic World of a calendar year that have data in some of a tile."""
        rows = np.flatnonzero((self.product == "dynamic_world") & (self.year == year))
        return self._where(rows, lambda ring: touches(ring, box))

    def _where(self, rows: Rows, test: Any) -> Rows:
        return rows[[bool(test(self.rings[row])) for row in rows]] if len(rows) else rows


def read_scenes(url: str | os.PathLike[str]) -> Scenes:
    """Read a scene catalog, a Parquet file.

    Raises:
        NotFound: nothing is at `url`.
        BadCatalog: it is no scene catalog.
    """
    where = normalise_url(url)
    try:
        table = pq.ParquetFile(pa.BufferReader(read_url(where))).read()
    except (pa.ArrowException, OSError) as error:
        raise BadCatalog(f"{where}: not a Parquet file ({_line(error)})") from None
    return Scenes(table, where)


def choose_scenes(tiles: pa.Table, scenes: Scenes, *, seed: int = 0) -> pa.Table:
    """What each tile gets: one Sentinel-2 scene, and what belongs to its date.

    A random year of 2017 to 2020; in it a random level; a random scene of those that `Scenes.sentinel2` gives; the
    nearest Sentinel-1 scene of both orbits; all of Dynamic World of the year, for `yearly_mode`. L1C stands in for L2A
    "if no L2A data existed" (supplement, A.1): where no scene of that level and year touches the tile, cloudy or not.
    Clouds and swaths are looked at afterwards, as there, and may leave a tile of L2A without a scene. The choices
    depend on the seed, the tile's id and the scenes, not on the order of rows. Every tile is held against every scene:
    give a region at a time where both are many.

    Args:
        tiles: columns `tile_id` and `bbox` of a tile catalog.
        scenes: to choose from.
        seed: of the choices.

    Returns:
        a table `CHOICE`, a row a tile.
    """
    rows = []
    for tile_id, bounds in zip(tiles["tile_id"].to_pylist(), tiles["bbox"].to_pylist(), strict=True):
        year = YEARS[draw(len(YEARS), seed, tile_id, "year")]
        row: dict[str, Any] = {"tile_id": tile_id, "year": year}
        rows.append(row)
        if bounds is None:
            row["reason"] = "the tile has no place on the map"
            continue
        box = Box(**bounds)
        product = (_L1C, _L2A)[draw(2, seed, tile_id, "level")]
        if product == _L2A and not scenes.has(box, year, product):
            product = _L1C
        found = scenes.sentinel2(box, year, product)
        if not len(found):
            row["reason"] = f"no {product} scene of {year} below {MOST_CLOUD:g} % cloud has data in all of the tile"
            continue
        chosen = sorted(found, key=scenes.ids.__getitem__)[draw(len(found), seed, tile_id, "scene")]
        near = scenes.nearest_sentinel1(box, scenes.times[chosen])
        row |= {
            "s2_type": product.removeprefix("sentinel2_"),
            "sentinel2": scenes.ids[chosen],
            "acquired_at": scenes.times[chosen],
            "sentinel1_ascending": None if near[0] is None else scenes.ids[near[0]],
            "sentinel1_descending": None if near[1] is None else scenes.ids[near[1]],
            "dynamic_world": sorted(scenes.ids[i] for i in scenes.dynamic_world(box, year)),
        }
    return pa.Table.from_pylist(rows, schema=CHOICE)


def write_choice(choice: pa.Table, url: str | os.PathLike[str]) -> None:
    """Write what `choose_scenes` gave as one Parquet file, in place of any of that name.

    Raises:
        StorageError: the file cannot be written.
    """
    folder, _, name = normalise_url(url).rpartition("/")
    data = pa.BufferOutputStream()
    pq.write_table(choice, data)
    Store(folder or "/").replace(name, data.getvalue().to_pybytes())


def draw(count: int, seed: int, tile_id: str, what: str) -> int:
    """A random number below `count`, the same on every machine."""
    digest = hashlib.md5(f"{seed}/{what}/{tile_id}".encode(), usedforsecurity=False).digest()
    return int.from_bytes(digest, "big") % count


def yearly_mode(labels: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
    """Dynamic World of a year as MMEarth stores it: the most frequent class of each pixel, 0 where there is none.

    Args:
        labels: uint8 (scenes, rows, columns), 0 for missing and classes from 1 to 9: the product's own number plus 1,
            since the product's 0 is water, and what is missing becomes 0 too.

    Returns:
        uint8 (rows, columns); the smaller of classes that are equally frequent.

    Raises:
        InputError: other shapes or numbers.
    """
    if labels.ndim != 3 or labels.dtype != np.uint8 or (labels > 9).any():
        raise InputError("labels of Dynamic World: give uint8 (scenes, rows, columns), 0 to 9")
    count = np.stack([(labels == kind).sum(axis=0) for kind in range(1, 10)])
    return np.where(count.any(axis=0), count.argmax(axis=0) + 1, 0).astype(np.uint8)


def center_crop(image: npt.NDArray[Any], side: int = 128) -> npt.NDArray[Any]:
    """The middle of an image (..., rows, columns): MMEarth fetches 130 pixels and keeps 128, or 64.

    Where the border is uneven, the smaller part is cut off above and on the left.

    Raises:
        InputError: the image is smaller.
    """
    height, width = image.shape[-2:]
    if min(height, width) < side:
        raise InputError(f"an image of {width} x {height} pixels has no middle of {side}")
    y, x = (height - side) // 2, (width - side) // 2
    return image[..., y : y + side, x : x + side]


def covers(ring: Floats, box: Box) -> bool:
    """Whether a polygon without holes has all of a box: no edge passes through it, and its centre lies inside.

    Args:
        ring: (points, 2) longitude and latitude, the last point the first.
        box: in the same coordinates; a ring on the other side of the antimeridian is brought over.
    """
    moved = _beside(ring, box)
    return not _crosses(moved, box) and _holds_centre(moved, box)


def touches(ring: Floats, box: Box) -> bool:
    """Whether a polygon without holes has some of a box."""
    moved = _beside(ring, box)
    return _crosses(moved, box) or _holds_centre(moved, box)


def _beside(ring: Floats, box: Box) -> Floats:
    middle = (ring[:, 0].min() + ring[:, 0].max()) / 2
    turns = np.rint(((box.xmin + box.xmax) / 2 - middle) / 360)
    return ring + np.array([360 * turns, 0])


def _crosses(ring: Floats, box: Box) -> bool:
    """Whether an edge has points inside the open box: the clipping of Liang and Barsky."""
    start, step = ring[:-1], np.diff(ring, axis=0)
    low, high = np.array([box.xmin, box.ymin]), np.array([box.xmax, box.ymax])
    with np.errstate(divide="ignore", invalid="ignore"):
        one, other = (low - start) / step, (high - start) / step
    inside = (start > low) & (start < high)
    enter = np.where(step == 0, np.where(inside, -np.inf, np.inf), np.minimum(one, other)).max(axis=1)
    leave = np.where(step == 0, np.where(inside, np.inf, -np.inf), np.maximum(one, other)).min(axis=1)
    return bool((np.maximum(enter, 0) < np.minimum(leave, 1)).any())


def _holds_centre(ring: Floats, box: Box) -> bool:
    """Even-odd rule, on a ray to the east."""
    x, y = (box.xmin + box.xmax) / 2, (box.ymin + box.ymax) / 2
    (x0, y0), (x1, y1) = ring[:-1].T, ring[1:].T
    spans = (y0 > y) != (y1 > y)
    with np.errstate(divide="ignore", invalid="ignore"):
        meets = x0 + (y - y0) / (y1 - y0) * (x1 - x0)
    return bool((spans & (meets > x)).sum() % 2)


def _ring(wkb: bytes, where: str, name: str) -> Floats:
    """Of a WKB polygon without holes."""
    order = {0: ">", 1: "<"}.get(wkb[0]) if wkb else None
    head = struct.Struct(f"{order}III") if order else None
    if head is not None and len(wkb) >= 13:
        kind, rings, count = head.unpack_from(wkb, 1)
        if kind == _POLYGON and rings == 1 and count >= 4 and len(wkb) == 13 + _POINT_BYTES * count:
            ring = np.frombuffer(wkb, f"{order}f8", offset=13).reshape(-1, 2).astype(np.float64)
            if np.isfinite(ring).all() and (ring[0] == ring[-1]).all():
                return ring
    raise BadCatalog(f"{where}: the footprint of {name} is no WKB polygon of one closed ring, longitude and latitude")


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:200]

"""Labels for an archive's tiles: read from a table, GeoJSON or catalog, matched to tiles, split 80/20."""

import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv as pa_csv
import pyarrow.parquet as pq

from nec_ray.errors import BadLabels
from nec_ray.storage import normalise_url, read_url
from nec_ray.tiles.polygons import points_in_rings, rings_of_geojson, rings_of_wkb

LABEL_ROWS = ("tile_id", "bbox", "geometry", "label")
"""Columns that `read_labels` needs of the archive's valid tiles."""
_LEFT_OUT = ("val", "valid", "validation")

_TEST_PERCENT = 20
_PAIRS_A_STEP = 1 << 22  # point-tile pairs held in memory at a time
_LON_LAT_CRS = ("CRS84", "4326", "4979")

Pairs = tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]
"""Record and tile, by number, of every match."""


class LabelledTiles(Protocol):
    """What labels and masks have in common: tiles, and a side of the split for each."""

    @property
    def tile_ids(self) -> list[str]:
        """In order."""

    @property
    def is_test(self) -> npt.NDArray[np.bool_]:
        """(tiles,) whether the tile is kept for the score."""

    def __len__(self) -> int: ...


@dataclass(frozen=True)
class Labels:
    """A class and a side of the split for each labelled tile, ordered by tile id."""

    tile_ids: list[str]
    classes: list[str]
    """Names, sorted."""
    target: npt.NDArray[np.int64]
    """(tiles,) number of the tile's class in `classes`."""
    is_test: npt.NDArray[np.bool_]
    """(tiles,) whether the tile is kept for the score."""
    unmatched: int
    """Labels for which the archive has no valid tile; they were left out."""

    def __len__(self) -> int:
        return len(self.tile_ids)

    def pick(self, which: npt.NDArray[np.bool_]) -> "Labels":
        """Of some of the tiles; classes keep their numbers.

        Args:
            which: (tiles,) those to keep.
        """
        names = [name for name, kept in zip(self.tile_ids, which, strict=True) if kept]
        return replace(self, tile_ids=names, target=self.target[which], is_test=self.is_test[which])


@dataclass(frozen=True)
class _Records:
    """Labels as the file has them, and the tiles that each one names."""

    label: list[str | None]
    split: list[str | None]
    pairs: Pairs


def read_labels(path: str | os.PathLike[str] | None, rows: pa.Table) -> Labels:
    """Read labels and match them to tiles.

    A Parquet or CSV table has columns `tile_id, label` or `lon, lat, label`; a tile catalog is such a table.
    A GeoJSON feature has a property `label`, and names its tiles by a property `tile_id`, else by its
    geometry: a Point labels the tiles whose footprint holds it, a Polygon those whose centre it holds. An
    optional column or property `split` is `train` or `test`; where it is not given, a hash of the tile id
    keeps 20 % for the test. Records without a label are left out, and those kept for validation.

    Args:
        path: path or URL of the file; the archive's own `label` column where it is None.
        rows: `LABEL_ROWS` of the archive's valid tiles.

    Raises:
        NotFound: nothing is at `path`.
        BadLabels: the file is none of these, matches no tile, gives a tile two classes or two sides of
            the split, or leaves fewer than two classes to train on or no tile to test.
    """
    where, records = _read(path, rows)
    return _assemble(where, records, rows["tile_id"].to_pylist())


def hash_split(tile_id: str) -> bool:
    """Whether a tile is kept for the test where labels give no split: the same on every machine."""
    digest = hashlib.sha256(tile_id.encode()).digest()
    return int.from_bytes(digest[:8], "big") % 100 < _TEST_PERCENT


def is_test_side(where: str, split: str | None, tile_id: str) -> bool | None:
    """Whether a tile is kept for the test, by its `split` or, without one, a hash; None where it is for validation.

    Raises:
        BadLabels: the split is none of these.
    """
    side = (split or "").strip().lower()
    if side in _LEFT_OUT:
        return None
    number = _side(where, side)
    return hash_split(tile_id) if number == 0 else number == 2


def _read(path: str | os.PathLike[str] | None, rows: pa.Table) -> tuple[str, _Records]:
    if path is None:
        table = rows.select(["tile_id", "label"])
        return "the archive's own labels", _from_table("the archive's own labels", table, rows)
    where = normalise_url(path)
    if Path(where).is_dir():
        raise BadLabels(
            f"{where}: a folder of masks is for --task segmentation; "
            "for classification give a table, GeoJSON or catalog with one label a tile"
        )
    data = read_url(where)
    if data[:4] == b"PAR1":
        return where, _from_table(where, _read_parquet(where, data), rows)
    if data.startswith((b"II*\0", b"MM\0*", b"II+\0", b"MM\0+", b"\x89PNG", b"\xff\xd8\xff")):
        raise BadLabels(
            f"{where}: an image; masks are for --task segmentation, "
            "classification takes a table, GeoJSON or catalog with one label a tile"
        )
    if data.lstrip(b"\xef\xbb\xbf \t\r\n")[:1] == b"{":
        return where, _from_geojson(where, data, rows)
    return where, _from_table(where, _read_csv(where, data), rows)


def _read_parquet(where: str, data: bytes) -> pa.Table:
    try:
        file = pq.ParquetFile(pa.BufferReader(data))  # a Python file may abort the process: storage/parquet.py
        wanted = [n for n in ("tile_id", "lon", "lat", "label", "split") if n in file.schema_arrow.names]
        return file.read(columns=wanted)
    except (pa.ArrowException, OSError) as error:
        raise BadLabels(f"{where}: not a Parquet file that reads ({_line(error)}); write it again") from None


def _read_csv(where: str, data: bytes) -> pa.Table:
    types = {
        "tile_id": pa.string(),
        "label": pa.string(),
        "split": pa.string(),
        "lon": pa.float64(),
        "lat": pa.float64(),
    }
    try:
        return pa_csv.read_csv(pa.BufferReader(data), convert_options=pa_csv.ConvertOptions(column_types=types))
    except (pa.ArrowException, UnicodeDecodeError) as error:
        raise BadLabels(
            f"{where}: neither Parquet, GeoJSON nor CSV that reads ({_line(error)}); "
            "give tile_id,label or lon,lat,label"
        ) from None


def _from_table(where: str, table: pa.Table, rows: pa.Table) -> _Records:
    names = table.column_names
    if "label" not in names or not ("tile_id" in names or {"lon", "lat"} <= set(names)):
        raise BadLabels(
            f"{where}: columns {', '.join(names)[:200] or 'none'}; tile_id and label, or lon, lat and label are needed"
        )
    try:
        label = table["label"].cast(pa.string())
        split = table["split"].cast(pa.string()) if "split" in names else pa.nulls(len(table), pa.string())
        if "tile_id" in names:
            pairs = _match_ids(table["tile_id"].cast(pa.string()), rows)
        else:
            lon, lat = (table[name].cast(pa.float64()).to_numpy() for name in ("lon", "lat"))
            pairs = _match_points(where, lon, lat, rows)
    except pa.ArrowException as error:
        raise BadLabels(f"{where}: a column of the wrong type ({_line(error)}); write it again") from None
    return _Records(label.to_pylist(), split.to_pylist(), pairs)


def _from_geojson(where: str, data: bytes, rows: pa.Table) -> _Records:
    try:
        document = json.loads(data.decode("utf-8-sig"))
        features = document["features"]
        crs = json.dumps(document.get("crs"))
        properties = [feature.get("properties") or {} for feature in features]
        geometries = [feature.get("geometry") for feature in features]
        label, split, tile_id = (
            [None if p.get(name) is None else str(p[name]) for p in properties]
            for name in ("label", "split", "tile_id")
        )
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise BadLabels(f"{where}: not a GeoJSON FeatureCollection; give one whose features have a label") from None
    if crs != "null" and not any(name in crs for name in _LON_LAT_CRS):
        raise BadLabels(f"{where}: its crs is {crs[:120]}; GeoJSON is in longitude and latitude (RFC 7946)")
    if not any(label):
        raise BadLabels(f"{where}: no feature has a property label; add it")
    matches = [_match_ids(pa.array(tile_id, pa.string()), rows)]
    rest = [i for i, name in enumerate(tile_id) if name is None]
    points = [i for i in rest if isinstance(geometries[i], dict) and geometries[i].get("type") == "Point"]
    lon, lat = (_positions(where, [geometries[i] for i in points])).T
    record, tile = _match_points(where, lon, lat, rows)
    matches.append((np.array(points, np.int64)[record], tile))
    for i in sorted(set(rest) - set(points)):
        tile = _match_polygon(f"{where}: feature {i}", geometries[i], rows)
        matches.append((np.full(len(tile), i), tile))
    pairs = (np.concatenate([m[0] for m in matches]), np.concatenate([m[1] for m in matches]))
    return _Records(label, split, pairs)


def _match_ids(names: Any, rows: pa.Table) -> Pairs:
    tiles = rows["tile_id"].combine_chunks().cast(pa.string())
    found = pc.fill_null(pc.index_in(names, value_set=tiles, skip_nulls=True), -1).to_numpy().astype(np.int64)
    record = np.flatnonzero(found >= 0)
    return record, found[record]


def _match_points(where: str, lon: npt.NDArray[np.float64], lat: npt.NDArray[np.float64], rows: pa.Table) -> Pairs:
    """Tiles whose footprint holds each point."""
    _check_degrees(where, lon, lat)
    if not len(lon):
        return np.empty(0, np.int64), np.empty(0, np.int64)
    box = _boxes(where, rows)
    order = np.argsort(box[:, 0])  # missing boxes, NaN, come last
    xmin = box[order, 0]
    widest = np.nanmax(box[:, 2] - box[:, 0])
    # A tile can hold a point only if it begins at most one widest tile to its left.
    first = np.searchsorted(xmin, np.nextafter(lon - widest, -np.inf))
    count = np.searchsorted(xmin, lon, side="right") - first
    records, tiles = [], []
    for begin, end in _runs(count):
        record = np.repeat(np.arange(begin, end), count[begin:end])
        nth = np.arange(len(record)) - np.repeat(np.cumsum(count[begin:end]) - count[begin:end], count[begin:end])
        tile = order[first[record] + nth]
        in_box = (lon[record] <= box[tile, 2]) & (lat[record] >= box[tile, 1]) & (lat[record] <= box[tile, 3])
        records.append(record[in_box])
        tiles.append(tile[in_box])
    record, tile = np.concatenate(records), np.concatenate(tiles)
    inside = np.zeros(len(record), bool)
    by_tile = np.argsort(tile, kind="stable")
    for group in np.split(by_tile, np.flatnonzero(np.diff(tile[by_tile])) + 1) if len(by_tile) else []:
        rings = _footprint(where, rows, int(tile[group[0]]))
        inside[group] = points_in_rings(lon[record[group]], lat[record[group]], rings)
    return record[inside], tile[inside]


def _runs(count: npt.NDArray[np.int64]) -> list[tuple[int, int]]:
    """Cut records into runs of at most `_PAIRS_A_STEP` pairs, or of one record."""
    total, runs, begin = np.cumsum(count), [], 0
    while begin < len(count):
        before = total[begin - 1] if begin else 0
        end = max(begin + 1, int(np.searchsorted(total, before + _PAIRS_A_STEP, side="right")))
        runs.append((begin, end))
        begin = end
    return runs


def _match_polygon(where: str, geometry: Any, rows: pa.Table) -> npt.NDArray[np.int64]:
    """Tiles whose centre the polygon holds."""
    try:
        rings = rings_of_geojson(geometry if isinstance(geometry, dict) else {})
    except ValueError as error:
        raise BadLabels(f"{where}: {error}; give a Point, a Polygon, or a property tile_id") from None
    for ring in rings:
        _check_degrees(where, *ring.T)
    box = _boxes(where, rows)
    centre = (box[:, :2] + box[:, 2:]) / 2
    return np.flatnonzero(points_in_rings(centre[:, 0], centre[:, 1], rings))


def _boxes(where: str, rows: pa.Table) -> npt.NDArray[np.float64]:
    """(tiles, 4): xmin, ymin, xmax, ymax in degrees; NaN where a tile has none."""
    box = rows["bbox"].combine_chunks()
    if box.null_count == len(box):
        raise BadLabels(f"{where}: the archive's tiles have no footprint to match places with; label them by tile_id")
    sides = [pc.struct_field(box, name).to_numpy(zero_copy_only=False) for name in ("xmin", "ymin", "xmax", "ymax")]
    return np.stack(sides, axis=1).astype(np.float64)


def _footprint(where: str, rows: pa.Table, tile: int) -> Sequence[npt.NDArray[np.float64]]:
    wkb = rows["geometry"][tile].as_py()
    if wkb is None:
        box = rows["bbox"][tile].as_py()
        x, y = (box["xmin"], box["xmax"]), (box["ymin"], box["ymax"])
        return [np.array([(x[0], y[0]), (x[1], y[0]), (x[1], y[1]), (x[0], y[1])])]
    try:
        return rings_of_wkb(wkb)
    except ValueError as error:
        name = rows["tile_id"][tile].as_py()
        raise BadLabels(f"{where}: footprint of tile {name}: {error}; label it by tile_id") from None


def _positions(where: str, points: Sequence[Any]) -> npt.NDArray[np.float64]:
    try:
        return np.array([point["coordinates"][:2] for point in points], np.float64).reshape(len(points), 2)
    except (KeyError, TypeError, ValueError):
        raise BadLabels(f"{where}: a Point's coordinates are not [longitude, latitude]; write it again") from None


def _check_degrees(where: str, lon: npt.NDArray[np.float64], lat: npt.NDArray[np.float64]) -> None:
    wrong = np.flatnonzero(~((np.abs(lon) <= 180) & (np.abs(lat) <= 90)))
    if len(wrong):
        i = int(wrong[0])
        raise BadLabels(f"{where}: position {lon[i]:g}, {lat[i]:g} is not longitude and latitude in degrees")


def _assemble(where: str, records: _Records, tile_ids: list[str]) -> Labels:
    sides = [(split or "").strip().lower() for split in records.split]
    pairs = zip(records.label, sides, strict=True)
    named = np.array([bool(label) and side not in _LEFT_OUT for label, side in pairs], bool)
    record, tile = records.pairs
    keep = named[record]
    record, tile = record[keep], tile[keep]
    if not len(record):
        raise BadLabels(
            f"{where}: {int(named.sum()):,} labels, none for a valid tile of the archive; "
            f"its tile ids look like {tile_ids[0] if tile_ids else 'nothing, it has none'}"
        )
    classes, target = np.unique([str(records.label[i]) for i in record], return_inverse=True)
    side = np.array([_side(where, sides[i]) for i in record], np.int64)
    label_of = _one_each(where, tile, target, tile_ids=tile_ids, names=classes.tolist(), remedy="label it once")
    side_of = _one_each(
        where, tile, side, tile_ids=tile_ids, names=["no split", "train", "test"], remedy="put it on one side"
    )
    order = sorted(label_of, key=tile_ids.__getitem__)
    labels = Labels(
        tile_ids=[tile_ids[i] for i in order],
        classes=classes.tolist(),
        target=np.array([label_of[i] for i in order], np.int64),
        is_test=np.array([hash_split(tile_ids[i]) if side_of[i] == 0 else side_of[i] == 2 for i in order], bool),
        unmatched=int(named.sum()) - len(np.unique(record)),
    )
    _check_enough(where, labels)
    return labels


def _side(where: str, split: str) -> int:
    """0 where none is given, 1 train, 2 test."""
    sides = {"": 0, "train": 1, "test": 2}
    if split not in sides:
        raise BadLabels(f"{where}: split {split[:40]!r}; only train and test are known, leave out the other records")
    return sides[split]


def _one_each(
    where: str,
    tile: npt.NDArray[np.int64],
    value: npt.NDArray[np.int64],
    *,
    tile_ids: list[str],
    names: list[str],
    remedy: str,
) -> dict[int, int]:
    """The one value of each tile."""
    found = np.unique(np.stack([tile, value], axis=1), axis=0)
    twice = np.flatnonzero(found[1:, 0] == found[:-1, 0])
    if len(twice):
        (number, a), (_, b) = found[twice[0] : twice[0] + 2].tolist()
        raise BadLabels(f"{where}: tile {tile_ids[number]} is both {names[a]!r} and {names[b]!r}; {remedy}")
    return dict(found.tolist())


def _check_enough(where: str, labels: Labels) -> None:
    trained = len(np.unique(labels.target[~labels.is_test]))
    if len(labels.classes) < 2:
        raise BadLabels(f"{where}: all {len(labels)} labelled tiles are {labels.classes[0]!r}; two classes are needed")
    if not labels.is_test.any():
        raise BadLabels(f"{where}: none of {len(labels)} labelled tiles is for the test; label more, or add a split")
    if trained < 2:
        raise BadLabels(f"{where}: {trained} classes among the tiles to train on, two are needed; label more tiles")


def _line(error: Exception) -> str:
    return str(error).split("\n", 1)[0][:160]

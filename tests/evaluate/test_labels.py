import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import shapely
from PIL import Image

from nec_ray.errors import BadLabels, NotFound
from nec_ray.evaluate.labels import LABEL_ROWS, Labels, hash_split, read_labels
from nec_ray.tiles import build_catalog, write_catalog
from tests.evaluate.sources import grid_rows
from tests.tiles import geobench_files

ROWS = grid_rows(10, 12, tilt=0.03).select(list(LABEL_ROWS))
IDS = ROWS["tile_id"].to_pylist()
FOOTPRINTS = shapely.from_wkb(ROWS["geometry"].to_pylist())
CLASS_OF = {name: "crop" if i % 3 else "water" for i, name in enumerate(IDS)}


def as_dict(labels: Labels) -> dict[str, str]:
    return {name: labels.classes[k] for name, k in zip(labels.tile_ids, labels.target.tolist(), strict=True)}


def write(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


def feature(label: object, geometry: object = None, **properties: object) -> dict[str, Any]:
    shape = shapely.geometry.mapping(geometry) if isinstance(geometry, shapely.Geometry) else geometry
    return {"type": "Feature", "geometry": shape, "properties": {"label": label, **properties}}


def geojson(path: Path, *features: dict[str, Any], **more: object) -> Path:
    return write(path, json.dumps({"type": "FeatureCollection", "features": features, **more}))


def test_csv_by_tile_id_splits_by_the_hash(tmp_path: Path) -> None:
    path = write(tmp_path / "a.csv", "tile_id,label\n" + "\n".join(f"{k},{v}" for k, v in CLASS_OF.items()))
    labels = read_labels(path, ROWS)
    assert as_dict(labels) == CLASS_OF
    assert labels.classes == ["crop", "water"]
    assert labels.unmatched == 0
    for name, is_test in zip(labels.tile_ids, labels.is_test, strict=True):
        assert is_test == (int(hashlib.sha256(name.encode()).hexdigest()[:16], 16) % 100 < 20)


def test_the_hash_keeps_a_fifth() -> None:
    share = np.mean([hash_split(f"scene/{i}") for i in range(20_000)])
    assert abs(share - 0.2) < 0.01


def test_parquet_with_a_split_and_numbers_for_classes(tmp_path: Path) -> None:
    table = pa.table(
        {"tile_id": IDS, "label": [i % 4 for i in range(len(IDS))], "split": ["test", "train", "Train "] * 40}
    )
    pq.write_table(table, tmp_path / "a.bin")  # known by its content, not its name
    labels = read_labels(tmp_path / "a.bin", ROWS)
    assert labels.classes == ["0", "1", "2", "3"]
    assert labels.is_test.tolist() == [i % 3 == 0 for i in range(len(IDS))]


def test_a_catalog_labels_and_its_unlabelled_rows_are_left_out(tmp_path: Path) -> None:
    catalog = grid_rows(10, 12).set_column(10, "label", pa.array([CLASS_OF[n] if n < "tile-05" else None for n in IDS]))
    pq.write_table(catalog, tmp_path / "catalog.parquet")
    assert as_dict(read_labels(tmp_path / "catalog.parquet", ROWS)) == {
        k: v for k, v in CLASS_OF.items() if k < "tile-05"
    }


def test_a_catalog_of_geo_bench_labels_without_its_validation_tiles(tmp_path: Path) -> None:
    truth = geobench_files.write_dataset(tmp_path / "m-made", "classification", samples=16, classes=2)
    catalog = build_catalog(tmp_path / "m-made")
    write_catalog(catalog, tmp_path / "catalog.parquet")
    labels = read_labels(tmp_path / "catalog.parquet", catalog.table.select(list(LABEL_ROWS)))
    splits = json.loads((tmp_path / "m-made" / "original_partition.json").read_text())
    kept = sorted(splits["train"] + splits["test"])
    assert as_dict(labels) == {f"m-made/{name}": f"class {truth[name]}, of 2" for name in kept}
    assert labels.is_test.tolist() == [name in splits["test"] for name in kept]
    assert labels.unmatched == 0


def test_the_archives_own_labels() -> None:
    rows = ROWS.set_column(3, "label", pa.array([CLASS_OF[name] for name in IDS]))
    assert as_dict(read_labels(None, rows)) == CLASS_OF


def test_the_order_of_rows_does_not_matter(tmp_path: Path) -> None:
    path = write(tmp_path / "a.csv", "tile_id,label\n" + "\n".join(f"{k},{v}" for k, v in CLASS_OF.items()))
    shuffled = ROWS.take(np.random.default_rng(0).permutation(len(IDS)))
    a, b = read_labels(path, ROWS), read_labels(path, shuffled)
    assert a.tile_ids == b.tile_ids
    np.testing.assert_array_equal(a.target, b.target)
    np.testing.assert_array_equal(a.is_test, b.is_test)


def points_and_labels() -> tuple[Any, list[str], dict[str, str]]:
    """Random points with the class of the tile that shapely says holds them."""
    points = np.random.default_rng(3).uniform((9.8, 49.8), (11.9, 51.2), (4000, 2))
    labels, expected = [], {}
    tree = shapely.STRtree(FOOTPRINTS)
    for x, y in points:
        hit = tree.query(shapely.Point(x, y), predicate="within")
        labels.append(CLASS_OF[IDS[hit[0]]] if len(hit) else "elsewhere")
        expected.update({IDS[i]: CLASS_OF[IDS[i]] for i in hit})
    return points, labels, expected


@pytest.mark.parametrize("pairs", [1 << 22, 50])
def test_points_label_the_tile_that_holds_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pairs: int) -> None:
    monkeypatch.setattr("nec_ray.evaluate.labels._PAIRS_A_STEP", pairs)
    points, names, expected = points_and_labels()
    lines = [f"{x!r},{y!r},{name}" for (x, y), name in zip(points.tolist(), names, strict=True)]
    labels = read_labels(write(tmp_path / "a.csv", "lon,lat,label\n" + "\n".join(lines)), ROWS)
    assert as_dict(labels) == expected
    assert labels.unmatched == names.count("elsewhere") > 100


def test_geojson_points_polygons_and_ids_together(tmp_path: Path) -> None:
    points, names, expected = points_and_labels()
    inside = [i for i, name in enumerate(names) if name != "elsewhere"]
    by_point = [feature(names[i], shapely.Point(points[i])) for i in inside[:30]]
    held = {
        IDS[k] for k in range(len(IDS)) if any(FOOTPRINTS[k].contains(shapely.Point(points[i])) for i in inside[:30])
    }
    area = shapely.Polygon(
        [(10.5, 50.5), (11.6, 50.4), (11.4, 51.2), (10.6, 50.9)], [[(10.9, 50.6), (11.1, 50.6), (11, 50.8)]]
    )
    boxes = [b.bounds for b in FOOTPRINTS]
    centres = {
        n for n, b in zip(IDS, boxes, strict=True) if area.contains(shapely.Point((b[0] + b[2]) / 2, (b[1] + b[3]) / 2))
    }
    wanted = {n: CLASS_OF[n] for n in held} | {n: CLASS_OF[n] for n in centres} | {IDS[0]: "water", IDS[1]: "crop"}
    by_area = [
        feature("crop", area, tile_id=None)
        if all(CLASS_OF[n] == "crop" for n in centres)
        else feature(CLASS_OF[n], None, tile_id=n)
        for n in sorted(centres)
    ]
    path = geojson(
        tmp_path / "a.geojson",
        *by_point,
        *by_area,
        feature("water", None, tile_id=IDS[0]),
        feature("crop", None, tile_id=IDS[1]),
    )
    assert centres
    assert as_dict(read_labels(path, ROWS)) == wanted
    assert set(wanted) - {IDS[0], IDS[1]} <= set(expected)


def test_geojson_polygons_label_the_tiles_whose_centre_they_hold(tmp_path: Path) -> None:
    west = shapely.Polygon(
        [(9, 49), (10.7, 49), (10.7, 52), (9, 52)], [[(10.2, 50.2), (10.5, 50.2), (10.5, 50.5), (10.2, 50.5)]]
    )
    east = shapely.MultiPolygon([shapely.box(10.8, 49, 11.2, 52), shapely.box(11.3, 49, 13, 52)])
    path = geojson(tmp_path / "a.json", feature("west", west), feature("east", east, split=None))
    expected: dict[str, str] = {}
    for name, shape in zip(IDS, FOOTPRINTS, strict=True):
        xmin, ymin, xmax, ymax = shape.bounds
        centre = shapely.Point((xmin + xmax) / 2, (ymin + ymax) / 2)
        expected.update((name, k) for k, area in (("west", west), ("east", east)) if area.contains(centre))
    assert 20 < len(expected) < len(IDS)
    assert as_dict(read_labels(path, ROWS)) == expected


def test_labels_for_other_tiles_are_counted(tmp_path: Path) -> None:
    lines = [f"{k},{v}" for k, v in CLASS_OF.items()] + ["elsewhere-1,crop", "elsewhere-2,forest"]
    labels = read_labels(write(tmp_path / "a.csv", "tile_id,label\n" + "\n".join(lines)), ROWS)
    assert labels.unmatched == 2
    assert labels.classes == ["crop", "water"]


def csv_of(pairs: dict[str, str]) -> str:
    return "tile_id,label\n" + "\n".join(f"{k},{v}" for k, v in pairs.items())


@pytest.mark.parametrize(
    ("text", "match"),
    [
        (
            "tile_id,label\nnowhere,crop\nnobody,water\n",
            "2 labels, none for a valid tile.*look like tile-00-00",
        ),
        (csv_of(CLASS_OF) + "\ntile-00-01,water\n", "tile tile-00-01 is both 'crop' and 'water'"),
        (csv_of(dict.fromkeys(IDS, "crop")), "all 120 labelled tiles are 'crop'"),
        (
            "tile_id,label,split\ntile-00-00,a,train\ntile-00-01,b,train\n",
            "none of 2 labelled tiles is for the test",
        ),
        (
            "tile_id,label,split\ntile-00-00,a,train\ntile-00-01,b,test\n",
            "1 classes among the tiles to train on",
        ),
        ("tile_id,label,split\ntile-00-00,a,trial\n", "split 'trial'; only train and test"),
        ("tile_id,label,split\ntile-00-00,a,train\ntile-00-00,a,test\n", "both 'train' and 'test'"),
        ("tile,class\nx,y\n", "columns tile, class; tile_id and label"),
        ("lon,lat,label\neast,1,crop\n", "neither Parquet, GeoJSON nor CSV"),
        ("lon,lat,label\n733000,5500000,crop\n", "733000, 5.5e\\+06 is not longitude and latitude"),
        ("", "neither Parquet, GeoJSON nor CSV"),
        ("PAR1 and no more", "not a Parquet file that reads"),
        ("{not json", "not a GeoJSON FeatureCollection"),
        ('{"type": "Point"}', "not a GeoJSON FeatureCollection"),
        ('{"features": [{"properties": {"class": "x"}}]}', "no feature has a property label"),
        ('{"features": [], "crs": {"properties": {"name": "EPSG:32621"}}}', "longitude and latitude"),
        ('{"features": [{"properties": {"label": "x"}}]}', "feature 0: geometry None is no Polygon"),
        (
            '{"features": [{"properties": {"label": "x"}, "geometry": {"type": "Point", "coordinates": 3}}]}',
            "a Point's coordinates",
        ),
    ],
)
def test_labels_that_cannot_be_used_are_refused_in_one_line(tmp_path: Path, text: str, match: str) -> None:
    path = write(tmp_path / "labels", text)
    with pytest.raises(BadLabels, match=match) as caught:
        read_labels(path, ROWS)
    assert "\n" not in str(caught.value)
    assert str(path) in str(caught.value)


def test_a_folder_of_masks_is_for_the_other_task(tmp_path: Path) -> None:
    with pytest.raises(BadLabels, match="folder of masks is for --task segmentation"):
        read_labels(tmp_path, ROWS)


def test_an_image_is_for_the_other_task_and_none_of_its_bytes_is_shown(tmp_path: Path) -> None:
    for ending in ("tif", "png", "jpg"):
        Image.new("RGB", (40, 40)).save(tmp_path / f"mask.{ending}")
        with pytest.raises(BadLabels, match=r"an image; masks are for --task segmentation") as caught:
            read_labels(tmp_path / f"mask.{ending}", ROWS)
        assert str(caught.value).isprintable()


def test_no_file(tmp_path: Path) -> None:
    with pytest.raises(NotFound, match="nothing is there"):
        read_labels(tmp_path / "none.csv", ROWS)


def test_places_need_footprints(tmp_path: Path) -> None:
    rows = ROWS.set_column(1, "bbox", pa.nulls(len(IDS), ROWS.schema.field("bbox").type))
    with pytest.raises(BadLabels, match="label them by tile_id"):
        read_labels(write(tmp_path / "a.csv", "lon,lat,label\n10,50,crop\n"), rows)

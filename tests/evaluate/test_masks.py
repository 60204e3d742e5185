"""Masks found by name, cut by window or by place, against plain crops; and every way to get them wrong."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pytest
import rasterio
from affine import Affine
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from nec_ray.contracts import arrow_schema
from nec_ray.errors import BadLabels, NecError, NotFound
from nec_ray.evaluate.class_list import ClassList, class_colour, read_class_list
from nec_ray.evaluate.labels import hash_split
from nec_ray.evaluate.masks import Masks, read_masks, resize_nearest
from nec_ray.tiles import build_catalog

GRID = {"rows": 4, "cols": 4}
Array = npt.NDArray[Any]


def rows_of(tile_ids: list[str], sources: list[str], **columns: list[Any]) -> pa.Table:
    values: dict[str, list[Any]] = {
        "tile_id": tile_ids,
        "source": sources,
        "crs": [None] * len(tile_ids),
        "transform": [None] * len(tile_ids),
        "grid": [GRID] * len(tile_ids),
    }
    values.update(columns)
    schema = arrow_schema("index.json")
    return pa.table({name: pa.array(values[name], schema.field(name).type) for name in values})


def indexed(catalog: pa.Table) -> pa.Table:
    """Index rows of a catalog's tiles: the transform is the token grid's."""
    transforms = [
        None if t is None else [t[0] * w / 4, t[1] * h / 4, t[2], t[3] * w / 4, t[4] * h / 4, t[5]]
        for t, w, h in zip(*(catalog[n].to_pylist() for n in ("transform", "width", "height")), strict=True)
    ]
    return rows_of(
        catalog["tile_id"].to_pylist(),
        catalog["source"].to_pylist(),
        crs=catalog["crs"].to_pylist(),
        transform=transforms,
    )


def read(path: Path, rows: pa.Table, **options: Any) -> Masks:
    return read_masks(path, rows, rows.select(["tile_id", "source"]), **options)


def png(path: Path, values: Array, mode: str | None = None) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.fromarray(values)
    (image if mode is None else image.convert(mode)).save(path)
    return path


def tiff(path: Path, values: Array, **profile: Any) -> Path:
    bands = values if values.ndim == 3 else values[None]
    count, height, width = bands.shape
    path.parent.mkdir(parents=True, exist_ok=True)
    with rasterio.open(
        path, "w", driver="GTiff", count=count, height=height, width=width, dtype=bands.dtype, **profile
    ) as image:
        image.write(bands)
    return path


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(0)


@settings(deadline=None, max_examples=25)
@given(st.integers(1, 60), st.integers(1, 60), st.integers(3, 30))
def test_windows_of_a_sources_mask_are_plain_crops(
    tmp_path_factory: pytest.TempPathFactory, height: int, width: int, size: int
) -> None:
    folder = tmp_path_factory.mktemp("cut")
    values = np.random.default_rng(height * 61 + width).integers(0, 4, (height, width)).astype(np.uint8)
    png(folder / "images" / "a.png", np.zeros((height, width, 3), np.uint8))
    png(folder / "masks" / "a.png", values)
    catalog = build_catalog(folder / "images", tile_size=size).table
    rows = indexed(catalog)
    try:
        masks = read(folder / "masks", rows)
    except BadLabels as error:
        assert "for the test" in str(error) or "classes among the tiles" in str(error)  # noqa: PT017 - few tiles
        return
    places = {row["tile_id"]: row for row in catalog.to_pylist()}
    names = np.array([int(name) for name in masks.classes])
    for tile_id, mask in zip(masks.tile_ids, masks.masks, strict=True):
        row = places[tile_id]
        crop = values[row["y_off"] : row["y_off"] + row["height"], row["x_off"] : row["x_off"] + row["width"]]
        expected = resize_nearest(crop, 16 * 4, 16 * 4)
        if expected.shape == mask.shape:
            np.testing.assert_array_equal(names[mask], expected)
        else:  # an edge, brought to the others' size
            assert set(names[mask].ravel().tolist()) <= set(crop.ravel().tolist())


def test_masks_named_like_tiles_in_every_way(tmp_path: Path, rng: np.random.Generator) -> None:
    tile_ids = [f"{kind}/{i}{end}" for i in range(20) for kind, end in (("town", ".jpg"), ("scene", ""))]
    values = {name: rng.integers(0, 3, (8, 8)).astype(np.uint8) for name in tile_ids}
    for i, name in enumerate(tile_ids):
        stem = tmp_path / name.removesuffix(".jpg")
        if i % 2:
            tiff(stem.with_suffix(".tif"), values[name], nodata=2)
        else:
            png(stem.with_suffix(".png"), values[name])
    (tmp_path / "town" / "notes.txt").write_text("not a mask")
    png(tmp_path / "elsewhere.png", values[tile_ids[0]])
    rows = rows_of(tile_ids, [f"/far/{name}" for name in tile_ids])
    masks = read(tmp_path, rows)
    assert masks.tile_ids == sorted(tile_ids)
    assert masks.classes == ["0", "1", "2"]
    assert masks.unmatched == 1
    for name, mask, is_test in zip(masks.tile_ids, masks.masks, masks.is_test, strict=True):
        expected = values[name] if name.startswith("town") else np.where(values[name] == 2, 255, values[name])
        np.testing.assert_array_equal(mask, expected)
        assert is_test == hash_split(name)


def test_values_become_classes_in_order_and_255_is_ignored(tmp_path: Path) -> None:
    names = [f"t{i:02}" for i in range(30)]
    for i, name in enumerate(names):
        png(tmp_path / f"{name}.png", np.array([[7, 255], [200 - i % 2, 3]], np.uint8))
    masks = read(tmp_path, rows_of(names, names))
    assert masks.classes == ["3", "7", "199", "200"]
    assert masks.colours == [class_colour(i) for i in range(4)]
    assert masks.masks[0].tolist() == [[1, 255], [3, 0]]
    (tmp_path / "classes.json").write_text(json.dumps({"low": 3, "high": [199, 200][1], "mid": 7, "ignore": 199}))
    masks = read(tmp_path, rows_of(names, names))
    assert masks.classes == ["low", "mid", "high"]
    assert masks.masks[0].tolist() == [[1, 255], [2, 0]]
    assert masks.masks[1].tolist() == [[1, 255], [255, 0]]


def test_values_below_0_are_ignored_where_the_list_says_so_and_refused_elsewhere(tmp_path: Path) -> None:
    """Sen1Floods11's masks have -1 where nothing is known, and no nodata value."""
    names = [f"t{i:02}" for i in range(30)]
    for name in names:
        tiff(tmp_path / f"{name}.tif", np.array([[-1, 0], [1, 1]], np.int16))
    rows = rows_of(names, names)
    with pytest.raises(BadLabels, match=r'value -1 is no class.* or say \{"ignore": -1\} in the list of classes'):
        read(tmp_path, rows)
    (tmp_path / "classes.json").write_text('{"dry": 0, "water": 1, "ignore": -1}')
    assert read(tmp_path, rows).masks[0].tolist() == [[255, 0], [1, 1]]
    (tmp_path / "classes.json").write_text('{"dry": 0, "water": 1, "ignored": -2}')
    with pytest.raises(BadLabels, match=r"value -1 is no class"):
        read(tmp_path, rows)
    (tmp_path / "classes.json").write_text('{"dry": 0, "water": -1}')
    with pytest.raises(BadLabels, match=r"'water' is -1; classes are 0 to 65535"):
        read(tmp_path, rows)


def test_colours_palettes_and_a_class_list_above(tmp_path: Path, rng: np.random.Generator) -> None:
    colours = np.array([[226, 169, 41], [60, 16, 152], [0, 0, 0]], np.uint8)
    listed = {"classes": [{"title": "water", "color": "#E2A929"}, {"title": "building", "color": "#3c1098"}]}
    (tmp_path / "classes.json").write_text(json.dumps(listed))
    given_list = tmp_path / "other.json"
    given_list.write_text(json.dumps({"building": [60, 16, 152], "ignore": "#000000", "water": "#E2A929"}))
    names = [f"t{i}" for i in range(20)]
    values = {name: rng.integers(0, 2, (6, 6)) for name in names}
    for i, name in enumerate(names):
        rgb = colours[values[name]]
        if i % 3 == 0:
            png(tmp_path / "m" / f"{name}.png", rgb)
        elif i % 3 == 1:
            palette = Image.fromarray(values[name].astype(np.uint8), mode="P")
            palette.putpalette(colours.ravel().tolist())
            palette.save(tmp_path / "m" / f"{name}.png")
        else:
            tiff(tmp_path / "m" / f"{name}.tif", rgb.transpose(2, 0, 1))
    rows = rows_of(names, names)
    masks = read(tmp_path / "m", rows)
    assert (masks.classes, masks.colours) == (["water", "building"], [(226, 169, 41), (60, 16, 152)])
    for name, mask in zip(masks.tile_ids, masks.masks, strict=True):
        np.testing.assert_array_equal(mask, values[name])
    assert read(tmp_path / "m", rows, classes=given_list).classes == ["building", "water"]


def test_one_label_image_is_cut_to_tiles_by_place(tmp_path: Path, rng: np.random.Generator) -> None:
    place = {"crs": "EPSG:32621", "transform": Affine(30, 0, 700_000, 0, -30, 7_200_000)}
    scene = tiff(tmp_path / "scene.tif", rng.integers(0, 200, (3, 70, 90)).astype(np.uint8), **place)
    values = rng.integers(0, 5, (70, 90)).astype(np.int16)
    values[:10] = -1
    label = tiff(tmp_path / "label.tif", values, nodata=-1, **place)
    catalog = build_catalog(scene, tile_size=16).table
    masks = read(label, indexed(catalog))
    places = {row["tile_id"]: row for row in catalog.to_pylist()}
    assert len(masks) == len(catalog)
    full = 0
    for tile_id, mask in zip(masks.tile_ids, masks.masks, strict=True):
        row = places[tile_id]
        y, x = row["y_off"], row["x_off"]
        if (row["width"], row["height"]) == (16, 16):
            np.testing.assert_array_equal(mask, np.where(values == -1, 255, values)[y : y + 16, x : x + 16])
            full += 1
    assert full == 20
    # A finer label image that covers a part only, and one in another CRS.
    fine = np.repeat(np.repeat(values[:48], 2, 0), 2, 1)
    finer = place | {"transform": Affine(15, 0, 700_000, 0, -15, 7_200_000), "nodata": -1}
    part = read(tiff(tmp_path / "fine.tif", fine, **finer), indexed(catalog))
    assert len(part) == 18
    assert part.masks.shape[1:] == (32, 32)
    from rasterio.warp import Resampling, calculate_default_transform, reproject

    transform, width, height = calculate_default_transform(
        place["crs"], "EPSG:4326", 90, 70, 700_000, 7_197_900, 702_700, 7_200_000, resolution=0.00005
    )
    warped = np.full((height, width), -1, np.int16)
    reproject(
        values, warped, src_transform=place["transform"], src_crs=place["crs"], dst_transform=transform,
        dst_crs="EPSG:4326", resampling=Resampling.nearest, src_nodata=-1, dst_nodata=-1,
    )  # fmt: skip
    degrees = tiff(tmp_path / "degrees.tif", warped, crs="EPSG:4326", transform=transform, nodata=-1)
    other = read(degrees, indexed(catalog))
    row = places[other.tile_ids[10]]
    got = resize_nearest(other.masks[10], 16, 16)
    expected = np.where(values == -1, 255, values)[row["y_off"] : row["y_off"] + 16, row["x_off"] : row["x_off"] + 16]
    assert (got == expected).mean() > 0.8  # nearest neighbours of nearest neighbours


def test_the_dubai_layout_finds_each_folders_own_mask(tmp_path: Path) -> None:
    sources = []
    for number in range(1, 4):
        for part in ("a", "b"):
            png(tmp_path / f"tile_{number}" / "masks" / f"{part}.png", np.array([[number, 0]] * 4, np.uint8))
            sources.append(f"/elsewhere/dubai/tile_{number}/images/{part}.jpg")
    ids = [f"tile_{s.split('_')[1][0]}/images/{s[-5]}/y{y:05}_x00000" for s in sources for y in (0, 2)]
    rows = rows_of(ids, [s for s in sources for _ in (0, 2)])
    masks = read(tmp_path, rows)
    for tile_id, mask in zip(masks.tile_ids, masks.masks, strict=True):
        assert masks.classes[mask[0, 0]] == tile_id[5]
    only = read(tmp_path / "tile_2" / "masks", rows)
    assert {tile_id[:6] for tile_id in only.tile_ids} == {"tile_2"}


def refused(path: Path, rows: pa.Table, match: str, kind: type[NecError] = BadLabels, **options: Any) -> None:
    with pytest.raises(kind, match=match) as caught:
        read(path, rows, **options)
    assert "\n" not in str(caught.value)
    assert str(path) in str(caught.value) or "classes" in str(caught.value)


NAMES = [f"t{i:02}" for i in range(20)]
ROWS = rows_of(NAMES, NAMES)


def folder(path: Path, values: Array, names: list[str] = NAMES) -> Path:
    for name in names:
        png(path / f"{name}.png", values)
    return path


def test_masks_that_match_nothing_are_refused(tmp_path: Path) -> None:
    refused(tmp_path / "none", ROWS, "nothing is there", NotFound)
    made = folder(tmp_path / "m", np.eye(8, dtype=np.uint8), ["x", "y"])
    refused(made, ROWS, "2 masks, none for a valid tile of the archive; .* such as t00")
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "a.txt").write_text("")
    refused(tmp_path / "empty", ROWS, "0 masks")
    csv = tmp_path / "a.csv"
    csv.write_text("tile_id,label\n")
    refused(csv, ROWS, "a folder of masks or one label GeoTIFF")


def test_masks_that_do_not_fit_their_image_are_refused(tmp_path: Path) -> None:
    ids = [f"a/y{y:05}_x{x:05}" for y in (0, 8, 16) for x in (0, 8)]
    rows = rows_of(ids, ["/i/a.jpg"] * 6)
    png(tmp_path / "small" / "a.png", np.zeros((16, 16), np.uint8))
    refused(tmp_path / "small", rows, "16 x 16 pixels do not fit the image that tile a/y00016_x00000")
    png(tmp_path / "large" / "a.png", np.zeros((48, 32), np.uint8))
    refused(tmp_path / "large", rows, "32 x 48 pixels do not fit")


def test_windows_at_the_edges_may_be_left_out_of_the_archive(tmp_path: Path) -> None:
    """Of an image of 30 x 21 pixels the windows of 8 that are whole, as Potsdam's scenes of 6,000 are cut by 512."""
    ids = [f"a/y{y:05}_x{x:05}" for y in (0, 8, 16) for x in (0, 8)]
    rows = rows_of(ids, ["/i/a.jpg"] * 6)
    values = np.random.default_rng(0).integers(0, 2, (30, 21)).astype(np.uint8)
    png(tmp_path / "m" / "a.png", values)
    masks = read_masks(str(tmp_path / "m"), rows, rows)
    for tile_id, mask in zip(masks.tile_ids, masks.masks, strict=True):
        y, x = int(tile_id[3:8]), int(tile_id[10:15])
        np.testing.assert_array_equal(mask[:8, :8], values[y : y + 8, x : x + 8])


def test_ambiguous_masks_are_refused(tmp_path: Path) -> None:
    made = folder(tmp_path / "m", np.eye(8, dtype=np.uint8))
    tiff(made / "t03.tif", np.eye(8, dtype=np.uint8))
    refused(made, ROWS, "masks of one name")
    flat = folder(tmp_path / "flat", np.eye(8, dtype=np.uint8), ["a"])
    refused(flat, rows_of(["x", "y"], ["/i/1/a.jpg", "/i/2/a.jpg"]), "fits both /i/1/a.jpg and /i/2/a.jpg")
    for name in ("p/a", "q/a"):
        png(tmp_path / "two" / f"{name}.png", np.eye(8, dtype=np.uint8))
    refused(tmp_path / "two", rows_of(["x"], ["/i/1/a.jpg"]), "p/a.png and q/a.png both fit")


def test_unknown_colours_and_values_are_refused(tmp_path: Path) -> None:
    made = folder(tmp_path / "m", np.full((4, 4, 3), (1, 2, 3), np.uint8))
    refused(made, ROWS, "a mask of colours; a classes.json")
    (made / "classes.json").write_text('{"a": "#010204", "b": "#000000"}')
    refused(made, ROWS, r"colour #010203 \(16 pixels\) is not in .*classes\.json; add it there")
    plain = folder(tmp_path / "p", np.arange(16, dtype=np.uint8).reshape(4, 4))
    (plain / "classes.json").write_text('["a", "b"]')
    refused(plain, ROWS, r"value 2 \(1 pixels\) is not in")
    for name in NAMES:
        tiff(tmp_path / "n" / f"{name}.tif", np.full((4, 4), -5, np.int32))
    refused(tmp_path / "n", ROWS, "value -5 is no class")
    for name in NAMES:
        tiff(tmp_path / "f" / f"{name}.tif", np.full((4, 4), 0.5, np.float32))
    refused(tmp_path / "f", ROWS, "1 bands of float32")


def test_too_many_and_too_few_classes_are_refused(tmp_path: Path) -> None:
    for name in NAMES:
        tiff(tmp_path / "m" / f"{name}.tif", np.arange(1000, 1400, dtype=np.uint16).reshape(20, 20))
    refused(tmp_path / "m", ROWS, "more than 254 classes")
    refused(folder(tmp_path / "one", np.zeros((4, 4), np.uint8)), ROWS, "1 classes among the tiles to train on")
    refused(folder(tmp_path / "nothing", np.full((4, 4), 255, np.uint8)), ROWS, "no pixel of a class")
    train = [name for name in NAMES if not hash_split(name)][:2]
    refused(folder(tmp_path / "t", np.eye(4, dtype=np.uint8), train), ROWS, "none of 2 labelled tiles is for the test")


def test_broken_files_are_refused(tmp_path: Path) -> None:
    made = folder(tmp_path / "m", np.random.default_rng(0).integers(0, 5, (64, 64)).astype(np.uint8))
    whole = (made / "t05.png").read_bytes()
    for damaged in (whole[: len(whole) // 2], b"no image", b"", whole[:40] + bytes(20) + whole[60:]):
        (made / "t05.png").write_bytes(damaged)
        refused(made, ROWS, r"t05\.png: (does not read|no PNG)")
    (made / "t05.png").unlink()
    (made / "t05.tif").write_bytes(b"II*\0 and no more")
    refused(made, ROWS, r"t05\.tif: does not read as a GeoTIFF")
    bomb = Image.new("1", (20_000, 20_000))
    bomb.save(made / "t04.png")
    (made / "t05.tif").unlink()
    refused(made, ROWS, r"t04\.png: does not read as a mask")


def test_places_are_needed_on_both_sides(tmp_path: Path) -> None:
    values = np.eye(16, dtype=np.uint8)
    bare = tiff(tmp_path / "bare.tif", values)
    refused(bare, ROWS, "it has no georeference")
    place = {"crs": "EPSG:32621", "transform": Affine(30, 0, 0, 0, -30, 0)}
    placed = tiff(tmp_path / "placed.tif", values, **place)
    refused(placed, ROWS, "the archive's tiles have no georeference")
    far = rows_of(["a"], ["a"], crs=["EPSG:32621"], transform=[[30.0, 0, 1e6, 0, -30, 1e6]])
    refused(placed, far, "none of 1 tiles lies in it")
    nonsense = rows_of(["a"], ["a"], crs=["EPSG:99999999"], transform=[[30.0, 0, 1e6, 0, -30, 1e6]])
    refused(placed, nonsense, "do not translate")


@pytest.mark.parametrize(
    "text",
    [
        "{",
        "3",
        '"x"',
        '{"a": -70000}',
        '{"a": 1.5}',
        '{"a": true}',
        '{"a": 70000}',
        '{"a": [1, 2]}',
        '{"a": [1, 2, 300]}',
        '{"": 1}',
        '[{"title": "a"}]',
        "[" * 100_000,
        '{"#010203": 3}',
    ],
)
def test_lists_of_classes_that_are_none(text: str) -> None:
    with pytest.raises(BadLabels, match=r"x/classes\.json: no list of classes"):
        read_class_list("x/classes.json", text.encode())


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("{}", "no classes"),
        ('{"a": 1, "b": "#000000"}', "values and colours in one list"),
        ('{"a": 1, "b": 1}', "'a' and 'b' are of one value"),
        (json.dumps({f"c{i}": i for i in range(300)}), "more than 254 classes"),
    ],
)
def test_lists_of_classes_that_contradict_themselves(text: str, match: str) -> None:
    with pytest.raises(BadLabels, match=match):
        read_class_list("classes.json", text.encode())


def test_lists_of_classes_in_every_form() -> None:
    forms = ['{"a": 0, "b": 1}', '{"1": "b", "0": "a"}', '["a", "b"]', '{"classes": ["a", "b"]}']
    for form in forms:
        listed = read_class_list("x", form.encode())
        assert listed.order()[0] == ["a", "b"]
        assert listed.numbers(np.array([1, 0, 255], np.int32), None, "m").tolist() == [1, 0, 255]
    for form in ('{"#0A0B0C": "b", "#010203": "a"}', '{"b": "#0a0b0c", "a": [1, 2, 3]}'):
        listed = read_class_list("x", form.encode())
        names, colours, _ = listed.order()
        assert (names, colours) == (["b", "a"], [(10, 11, 12), (1, 2, 3)])
        assert listed.numbers(np.array([0x010203], np.int32), None, "m").tolist() == [1]


def test_a_value_of_255_may_be_a_class() -> None:
    listed = ClassList({255: "x", 0: "y"}, is_colour=False, where="x")
    assert listed.numbers(np.array([255, 0], np.int32), None, "m").tolist() == [0, 1]


def test_classes_have_different_colours() -> None:
    assert len({class_colour(i) for i in range(48)}) >= 46  # black stays black

import math
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import pyarrow.compute as pc
import pytest
import rasterio
from PIL import Image
from pyproj import Transformer
from shapely import from_wkb

from nec_ray.errors import BadSource, NotFound
from nec_ray.tiles import build_catalog, builtin_scene, read_catalog, write_catalog

MakeTiff = Callable[..., Path]


def test_footprints_are_those_of_pyproj() -> None:
    """Rows of the real scene against pyproj and the scene's corner, not against rasterio."""
    table = build_catalog(builtin_scene(), tile_size=64).table
    to_degrees = Transformer.from_crs("EPSG:32621", "OGC:CRS84", always_xy=True)
    for row in table.take(list(range(0, table.num_rows, 17))).to_pylist():
        west, north = 720_945 + 60 * row["x_off"], -2_777_115 - 60 * row["y_off"]
        assert row["transform"] == [60, 0, west, 0, -60, north]
        assert row["crs"] == "EPSG:32621"
        east, south = west + 60 * row["width"], north - 60 * row["height"]
        corners = [(west, north), (west, south), (east, south), (east, north)]
        ring = from_wkb(row["geometry"]).exterior
        assert ring.is_ccw
        expected = {tuple(np.round(to_degrees.transform(*corner), 7)) for corner in corners}
        assert {tuple(np.round(point, 7)) for point in ring.coords} == expected
        box, (xmin, ymin, xmax, ymax) = row["bbox"], ring.bounds
        assert box["xmin"] <= xmin
        assert box["ymin"] <= ymin
        assert box["xmax"] >= xmax
        assert box["ymax"] >= ymax
        assert box["xmax"] - box["xmin"] < 1.01 * (xmax - xmin)


def test_nodata_share_is_that_of_the_pixels() -> None:
    with rasterio.open(builtin_scene()) as scene:
        missing = (scene.read() == 0).all(axis=0)
    table = build_catalog(builtin_scene(), tile_size=100).table
    for row in table.to_pylist():
        window = missing[row["y_off"] : row["y_off"] + row["height"], row["x_off"] : row["x_off"] + row["width"]]
        assert row["nodata_share"] == pytest.approx(window.mean(), abs=1e-6)
    assert pc.min(table["nodata_share"]).as_py() == 0
    assert pc.max(table["nodata_share"]).as_py() == 1


@pytest.mark.parametrize("size", [1, 7, 16, 40, 64])
def test_every_pixel_is_in_one_window(make_tiff: MakeTiff, size: int) -> None:
    path = make_tiff("a.tif", np.ones((1, 21, 40), np.uint8))
    times = np.zeros((21, 40), int)
    rows = build_catalog(path, tile_size=size).table.to_pylist()
    for row in rows:
        assert row["tile_id"] == f"a/y{row['y_off']:05}_x{row['x_off']:05}"
        times[row["y_off"] : row["y_off"] + row["height"], row["x_off"] : row["x_off"] + row["width"]] += 1
    assert (times == 1).all()
    assert len(rows) == math.ceil(21 / size) * math.ceil(40 / size)


def test_a_pixel_is_missing_only_where_every_band_is(make_tiff: MakeTiff) -> None:
    pixels = np.ones((2, 4, 4), np.int16)
    pixels[0, 0] = -9  # one band of the first row
    pixels[:, 1] = -9  # both bands of the second
    path = make_tiff("a.tif", pixels, nodata=-9)
    assert build_catalog(path).table["nodata_share"].to_pylist() == [0.25]
    assert build_catalog(path, nodata=7).table["nodata_share"].to_pylist() == [0]


def test_nodata_may_be_nan(make_tiff: MakeTiff) -> None:
    pixels = np.zeros((1, 4, 4), np.float32)
    pixels[0, 0] = np.nan
    row = build_catalog(make_tiff("a.tif", pixels, nodata=np.nan)).table.to_pylist()[0]
    assert row["nodata_share"] == 0.25
    assert math.isnan(row["nodata"])


def test_what_is_said_of_a_source_stands_in_every_row(make_tiff: MakeTiff, tmp_path: Path) -> None:
    path = make_tiff("a.tif", np.ones((2, 70, 70), np.uint16))
    catalog = build_catalog(
        path,
        bands=["nir", "swir"],
        sensor="landsat-8",
        acquired_at=datetime(2020, 5, 18, 13),
        licence="CC0",
        attribution="USGS",
    )
    table = catalog.table
    assert table["bands"].to_pylist() == [["nir", "swir"]] * 4
    assert set(table["sensor"].to_pylist()) == {"landsat-8"}
    assert set(table["acquired_at"].to_pylist()) == {datetime(2020, 5, 18, 13, tzinfo=UTC)}
    assert (catalog.metadata.licence, catalog.metadata.attribution) == ("CC0", "USGS")
    write_catalog(catalog, tmp_path / "c.parquet")
    assert read_catalog(tmp_path / "c.parquet").table.equals(table)


def test_band_names(make_tiff: MakeTiff, data: Path) -> None:
    assert build_catalog(builtin_scene()).table["bands"][0].as_py() == ["red", "green", "blue"]
    plain = make_tiff("a.tif", np.ones((2, 4, 4), np.uint16))
    assert build_catalog(plain).table["bands"][0].as_py() == ["band_1", "band_2"]
    colours = make_tiff("rgb.tif", np.ones((3, 4, 4), np.uint8), photometric="RGB")
    assert build_catalog(colours).table["bands"][0].as_py() == ["red", "green", "blue"]
    chip = build_catalog(data / "sen1floods11_sample" / "Spain_7370579_S2Hand.tif", tile_size=512).table
    assert chip["bands"][0].as_py() == [
        "B1",
        "B2",
        "B3",
        "B4",
        "B5",
        "B6",
        "B7",
        "B8",
        "B8A",
        "B9",
        "B10",
        "B11",
        "B12",
    ]
    assert chip["crs"].to_pylist() == ["EPSG:4326"]


def test_wrong_count_of_names(make_tiff: MakeTiff) -> None:
    path = make_tiff("a.tif", np.ones((2, 4, 4), np.uint16))
    with pytest.raises(BadSource, match="has 2 bands, 3 names"):
        build_catalog(path, bands=["a", "b", "c"])


def test_an_image_without_a_place(make_tiff: MakeTiff) -> None:
    row = build_catalog(make_tiff("a.tif", np.ones((1, 4, 4), np.uint8), crs=None)).table.to_pylist()[0]
    assert (row["geometry"], row["bbox"], row["crs"]) == (None, None, None)


def test_a_folder_of_tiffs(make_tiff: MakeTiff, tmp_path: Path) -> None:
    for name in ("2020/a.tif", "2021/a.tiff"):
        make_tiff(f"in/{name}", np.ones((1, 8, 8), np.uint8))
    rows = build_catalog(tmp_path / "in").table.to_pylist()
    assert [row["tile_id"] for row in rows] == ["2020/a/y00000_x00000", "2021/a/y00000_x00000"]
    assert [row["source"] for row in rows] == [str(tmp_path / "in/2020/a.tif"), str(tmp_path / "in/2021/a.tiff")]


def test_a_folder_of_classes(tmp_path: Path) -> None:
    for name, mode in (("Pond/p 1.jpg", "RGB"), ("Park/old/q.png", "L"), ("root.png", "RGB"), (".hidden.png", "L")):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new(mode, (9, 5)).save(tmp_path / name)
    (tmp_path / "Pond" / "notes.txt").write_text("not an image")
    (tmp_path / "Pond" / "broken.jpg").write_bytes(b"\xff\xd8 no header")
    seen: list[tuple[int, int]] = []
    rows = build_catalog(tmp_path, progress=lambda done, total: seen.append((done, total))).table.to_pylist()
    assert [(row["tile_id"], row["label"], row["bands"]) for row in rows] == [
        ("Park/old/q.png", "Park/old", ["grey"]),
        ("Pond/broken.jpg", "Pond", ["red", "green", "blue"]),
        ("Pond/p 1.jpg", "Pond", ["red", "green", "blue"]),
        ("root.png", None, ["red", "green", "blue"]),
    ]
    assert [(row["width"], row["height"]) for row in rows] == [(9, 5), (1, 1), (9, 5), (9, 5)]
    assert seen[-1] == (4, 4)


def test_images_are_cut_where_a_tile_size_is_given(tmp_path: Path) -> None:
    (tmp_path / "town").mkdir()
    Image.new("RGB", (9, 5)).save(tmp_path / "town" / "a.png")
    (tmp_path / "town" / "broken.jpg").write_bytes(b"\xff\xd8 no header")
    rows = build_catalog(tmp_path, tile_size=4).table.to_pylist()
    assert [(row["tile_id"], row["x_off"], row["y_off"], row["width"], row["height"]) for row in rows] == [
        ("town/a/y00000_x00000", 0, 0, 4, 4),
        ("town/a/y00000_x00004", 4, 0, 4, 4),
        ("town/a/y00000_x00008", 8, 0, 1, 4),
        ("town/a/y00004_x00000", 0, 4, 4, 1),
        ("town/a/y00004_x00004", 4, 4, 4, 1),
        ("town/a/y00004_x00008", 8, 4, 1, 1),
        ("town/broken.jpg", 0, 0, 1, 1),
    ]
    assert {row["label"] for row in rows} == {"town"}


def test_the_etag_changes_with_the_file(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    etags = []
    for width in (4, 5):
        Image.new("L", (width, 4)).save(path)
        etags.append(build_catalog(tmp_path).table["source_etag"][0].as_py())
        status = path.stat()
        assert etags[-1] == f"{status.st_mtime_ns:x}-{status.st_size:x}"
    assert etags[0] != etags[1]


def test_what_is_no_source(tmp_path: Path) -> None:
    with pytest.raises(NotFound, match="nowhere"):
        build_catalog(tmp_path / "nowhere")
    with pytest.raises(BadSource, match="holds no GeoTIFF, JPEG or PNG"):
        build_catalog(tmp_path)
    (tmp_path / "a.tif").write_bytes(b"II*\0 and no more")
    with pytest.raises(BadSource, match=r"a\.tif") as caught:
        build_catalog(tmp_path / "a.tif")
    assert "\n" not in str(caught.value)


def test_all_of_aid(data: Path) -> None:
    table = build_catalog(data / "aid").table
    assert table.num_rows == 8000
    assert len(table["label"].unique()) == 30
    assert pc.all(pc.equal(pc.binary_join(table["bands"].combine_chunks(), "+"), "red+green+blue")).as_py()
    assert pc.all(pc.starts_with(table["tile_id"], "Pond/").filter(pc.equal(table["label"], "Pond"))).as_py()
    assert set(table["width"].to_pylist()) == {150}


def test_a_geotiff_of_which_nothing_can_be_read_is_refused(tmp_path: Path) -> None:
    whole = builtin_scene().read_bytes()
    (tmp_path / "head.tif").write_bytes(whole[:2000])
    with pytest.raises(BadSource, match=r"head\.tif: none of its pixels can be read"):
        build_catalog(tmp_path / "head.tif")
    (tmp_path / "half.tif").write_bytes(whole[: len(whole) // 2])
    shares = build_catalog(tmp_path / "half.tif").table["nodata_share"].to_pylist()
    assert None in shares
    assert any(share is not None for share in shares)

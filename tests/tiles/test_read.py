"""What becomes of tiles: pixels by band name, or a status and a reason; never an exception."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pytest
import rasterio
from PIL import Image

from nec_ray.tiles import TileBatch, build_catalog, builtin_scene, read_tiles

MakeTiff = Callable[..., Path]


def read(rows: pa.Table, bands: list[str], size: int, fill: float = 0.0) -> TileBatch:
    batch = read_tiles(rows, bands=bands, size=size, fill=[fill] * len(bands))
    assert len(batch.status) == len(batch.reason) == len(batch.nodata_share) == rows.num_rows
    assert batch.pixels.shape == (len(batch.valid), len(bands), size, size)
    assert batch.pixels.dtype == np.float32
    assert batch.valid.tolist() == [i for i, status in enumerate(batch.status) if status == "valid"]
    assert all(
        (reason is None) == (status == "valid") for status, reason in zip(batch.status, batch.reason, strict=True)
    )
    assert all("\n" not in reason for reason in batch.reason if reason)
    return batch


def changed(rows: pa.Table, column: str, values: list[Any]) -> pa.Table:
    i = rows.column_names.index(column)
    return rows.set_column(i, rows.schema.field(i), pa.array(values, rows.schema.field(i).type))


def test_the_real_scene_in_any_order(rng: np.random.Generator) -> None:
    with rasterio.open(builtin_scene()) as scene:
        whole = scene.read().astype(np.float32)
    rows = build_catalog(builtin_scene(), tile_size=32).table
    rows = rows.take(pa.array(rng.permutation(rows.num_rows)[:200]))
    batch = read(rows, ["blue", "red"], 32, fill=-1)
    assert batch.status == ["nodata" if share == 1 else "valid" for share in rows["nodata_share"].to_pylist()]
    np.testing.assert_allclose(batch.nodata_share, rows["nodata_share"].to_numpy(), atol=1e-6)
    assert set(batch.reason) == {None, "all pixels are no-data"}
    for i, pixels in zip(batch.valid, batch.pixels, strict=True):
        row = rows.slice(int(i), 1).to_pylist()[0]
        window = whole[[2, 0], row["y_off"] : row["y_off"] + 32, row["x_off"] : row["x_off"] + 32]
        assert np.array_equal(pixels, np.where(window == 0, -1, window))


def test_aid_is_what_pillow_decodes_and_resizes(data: Path) -> None:
    rows = build_catalog(data / "aid" / "Pond").table.slice(0, 5)
    batch = read(rows, ["red", "green", "blue"], 64)
    for source, pixels in zip(rows["source"].to_pylist(), batch.pixels, strict=True):
        with Image.open(source) as image:
            bands = [np.asarray(band, np.float32) for band in image.split()]
        expected = [np.asarray(Image.fromarray(b).resize((64, 64), Image.Resampling.BILINEAR)) for b in bands]
        np.testing.assert_allclose(pixels, expected, atol=1e-2)


def test_thirteen_bands_by_name(data: Path) -> None:
    path = data / "sen1floods11_sample" / "Spain_7370579_S2Hand.tif"
    with rasterio.open(path) as chip:
        expected = chip.read([12, 2])
    rows = build_catalog(path, tile_size=512).table
    batch = read(rows, ["B11", "B2"], 512, fill=5)
    assert np.array_equal(batch.pixels[0], np.where(expected == 0, 5, expected))


def test_a_missing_band_fails_the_tile(make_tiff: MakeTiff) -> None:
    rows = build_catalog(make_tiff("a.tif", np.ones((1, 4, 4), np.uint8))).table
    batch = read(rows, ["band_1", "nir"], 4)
    assert batch.status == ["failed"]
    assert "nir" in (batch.reason[0] or "")


def test_a_broken_tile_leaves_its_neighbours(tmp_path: Path, rng: np.random.Generator) -> None:
    noise = rng.integers(0, 255, (64, 64, 3), dtype=np.uint8)
    for name in ("a.jpg", "b.jpg", "c.png", "d.jpg", "e.png", "f.jpg"):
        Image.fromarray(noise).save(tmp_path / name)
    (tmp_path / "d.jpg").write_bytes(b"\xff\xd8 no header")  # before the catalog is built, the others after it
    rows = build_catalog(tmp_path).table
    for name in ("b.jpg", "e.png"):
        whole = (tmp_path / name).read_bytes()
        (tmp_path / name).write_bytes(whole[: len(whole) // 2])
    (tmp_path / "c.png").unlink()
    batch = read(rows, ["red", "green", "blue"], 64)
    assert batch.status == ["valid", "failed", "failed", "failed", "failed", "valid"]
    assert np.array_equal(batch.pixels[0], batch.pixels[1])
    assert "truncated" in (batch.reason[1] or "")
    assert "nothing is there" in (batch.reason[2] or "")
    assert "no JPEG or PNG" in (batch.reason[3] or "")


def test_a_truncated_tiff_fails_where_its_data_end(make_tiff: MakeTiff, rng: np.random.Generator) -> None:
    path = make_tiff(
        "a.tif", rng.integers(1, 60_000, (1, 256, 64), dtype=np.uint16), tiled=True, blockxsize=64, blockysize=64
    )
    rows = build_catalog(path, tile_size=64).table
    path.write_bytes(path.read_bytes()[:-10_000])  # the last block and a part of the one before
    assert read(rows, ["band_1"], 64).status == ["valid", "valid", "failed", "failed"]
    path.write_bytes(path.read_bytes()[:50])
    assert read(rows, ["band_1"], 64).status == ["failed"] * 4


def nan_tile(value: float) -> npt.NDArray[np.float32]:
    pixels = np.ones((2, 4, 4), np.float32)
    pixels[0, 1, 1:3] = value
    return pixels


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_numbers_that_are_none_fail_the_tile(make_tiff: MakeTiff, value: float) -> None:
    for nodata in (None, 0.0):
        batch = read(build_catalog(make_tiff("a.tif", nan_tile(value)), nodata=nodata).table, ["band_1", "band_2"], 4)
        assert batch.status == ["failed"]
        assert (batch.reason[0] or "").startswith("2 values")


def test_nan_as_nodata_is_filled_band_by_band(make_tiff: MakeTiff) -> None:
    rows = build_catalog(make_tiff("a.tif", nan_tile(np.nan), nodata=np.nan)).table
    batch = read_tiles(rows, bands=["band_2", "band_1"], size=4, fill=[3, 4])
    expected = np.ones((2, 4, 4))
    expected[1, 1, 1:3] = 4
    assert np.array_equal(batch.pixels[0], expected)
    assert batch.nodata_share.tolist() == [0]  # each pixel has one band


def test_infinity_is_not_nan(make_tiff: MakeTiff) -> None:
    rows = build_catalog(make_tiff("a.tif", nan_tile(np.inf), nodata=np.nan)).table
    assert read(rows, ["band_1"], 4).status == ["failed"]


def test_nodata_is_filled_before_resizing(make_tiff: MakeTiff) -> None:
    pixels = np.full((1, 8, 8), 100, np.uint16)
    pixels[:, :, :4] = 0
    rows = build_catalog(make_tiff("a.tif", pixels, nodata=0)).table
    batch = read(rows, ["band_1"], 4, fill=100)
    np.testing.assert_allclose(batch.pixels, 100)
    assert batch.nodata_share.tolist() == [0.5]


def test_nothing_but_nodata(make_tiff: MakeTiff) -> None:
    batch = read(build_catalog(make_tiff("a.tif", np.zeros((2, 4, 4), np.uint16), nodata=0)).table, ["band_2"], 8)
    assert (batch.status, batch.reason) == (["nodata"], ["all pixels are no-data"])
    assert batch.nodata_share.tolist() == [1]


def test_a_catalog_that_lies(make_tiff: MakeTiff) -> None:
    rows = build_catalog(make_tiff("a.tif", np.ones((2, 8, 8), np.uint8))).table
    for column, value in (("width", 9), ("y_off", 1), ("x_off", 2**31 - 1), ("bands", ["band_1"])):
        batch = read(changed(rows, column, [value]), ["band_1"], 8)
        assert batch.status == ["failed"], column
    gone = read(changed(rows, "source", ["/nowhere/a.tif"]), ["band_1"], 8)
    assert gone.status == ["failed"]
    nowhere = read(changed(rows, "source", ["nonsense://a/b.png"]), ["band_1"], 8)
    assert nowhere.status == ["failed"]


def test_an_image_larger_than_its_row_is_not_decoded(tmp_path: Path) -> None:
    Image.new("RGB", (4, 4)).save(tmp_path / "a.png")
    rows = build_catalog(tmp_path).table
    Image.new("RGB", (9_000, 9_000)).save(tmp_path / "a.png")  # 240 MB of pixels in a file of 240 kB
    batch = read(rows, ["red"], 4)
    assert batch.status == ["failed"]
    assert "9000 x 9000" in (batch.reason[0] or "")


def test_windows_of_an_image_are_its_crops(tmp_path: Path, rng: np.random.Generator) -> None:
    images = {name: rng.integers(0, 255, (8, 12, 3), np.uint8) for name in ("a", "b")}
    for name, pixels in images.items():
        Image.fromarray(pixels).save(tmp_path / f"{name}.png")
    rows = build_catalog(tmp_path, tile_size=4).table
    shuffled = rows.take(rng.permutation(rows.num_rows))
    for table in (rows, shuffled):
        batch = read(table, ["red", "green", "blue"], 4)
        assert batch.status == ["valid"] * 12
        for row, pixels in zip(table.to_pylist(), batch.pixels, strict=True):
            y, x = row["y_off"], row["x_off"]
            crop = images[row["tile_id"][0]][y : y + 4, x : x + 4]
            np.testing.assert_array_equal(pixels, crop.transpose(2, 0, 1))
    Image.fromarray(images["a"][:6]).save(tmp_path / "a.png")  # replaced by a smaller one
    batch = read(rows, ["red"], 4)
    assert batch.status == ["valid"] * 3 + ["failed"] * 3 + ["valid"] * 6
    assert "ends outside the file of 12 x 6 pixels" in (batch.reason[3] or "")


def test_no_rows() -> None:
    rows = build_catalog(builtin_scene()).table.slice(0, 0)
    assert read(rows, ["red"], 16).status == []

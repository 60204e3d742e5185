"""Class maps as one GeoTIFF, held against the tiles' own footprints, and as a folder of PNGs."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import rasterio
import shapely
import shapely.ops
import torch
from affine import Affine
from PIL import Image

from nec_ray.contracts import arrow_schema
from nec_ray.errors import InputError
from nec_ray.evaluate import predict
from nec_ray.evaluate.mosaic import MOSAIC_ROWS, Mosaic, plan_mosaic, written_mosaic
from nec_ray.evaluate.prediction import TILES_PARQUET
from nec_ray.evaluate.segment import predict_classes
from nec_ray.models.head_files import save_head
from nec_ray.models.segmentation import SegmentationHead
from nec_ray.tiles import build_catalog
from tests.evaluate.sources import ENCODER, MemorySource

COLOURS = [(10, 20, 30), (200, 0, 0), (0, 0, 200)]


def scene(folder: Path, width: int = 100, height: int = 70, size: int = 32, **place: Any) -> pa.Table:
    """Index rows of tiles cut from a placed scene; the last column and row are narrower."""
    where = {"crs": "EPSG:32621", "transform": Affine(30, 0, 700_000, 0, -30, 7_200_000)} | place
    path = folder / "scene.tif"
    with rasterio.open(path, "w", driver="GTiff", count=1, height=height, width=width, dtype="uint8", **where) as image:
        image.write(np.ones((1, height, width), np.uint8))
    catalog = build_catalog(path, tile_size=size).table
    values: dict[str, list[Any]] = {name: [None] * catalog.num_rows for name in arrow_schema("index.json").names}
    for name in ("tile_id", "source", "source_etag", "geometry", "bbox", "crs"):
        values[name] = catalog[name].to_pylist()
    tokens = zip(*(catalog[name].to_pylist() for name in ("transform", "width", "height")), strict=True)
    values |= {
        "transform": [[a * w / 4, b * h / 4, c, d * w / 4, e * h / 4, f] for (a, b, c, d, e, f), w, h in tokens],
        "grid": [{"rows": 4, "cols": 4}] * catalog.num_rows,
        "codec_id": ["cd" * 32] * catalog.num_rows,
        "n_bytes": [100] * catalog.num_rows,
        "status": ["valid"] * catalog.num_rows,
        "encoded_at": [0] * catalog.num_rows,
        "encoded_from": ["pixels"] * catalog.num_rows,
    }
    return pa.table(values, schema=arrow_schema("index.json"))


@pytest.fixture
def source(tmp_path: Path) -> MemorySource:
    rows = scene(tmp_path)
    x = np.random.default_rng(0).normal(size=(rows.num_rows, 16, 6)).astype(np.float32)
    return MemorySource(rows, x)


@pytest.fixture
def head(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    module = SegmentationHead(6, 3, (4, 4))
    save_head(
        tmp_path / "head",
        module,
        classes=["water", "land", "Ünterholz"],
        colours=COLOURS,
        encoder_id=ENCODER,
        layers=None,
        decoder_layer="none",
        tokens=16,
        channels=6,
    )
    return tmp_path / "head"


def expected_maps(source: MemorySource, head: Path) -> npt.NDArray[np.uint8]:
    from nec_ray.models.head_files import load_head

    module = load_head(head).module
    assert isinstance(module, SegmentationHead)
    return np.concatenate(list(predict_classes(module, source.embeddings)))


def test_a_geotiff_lies_where_the_tiles_footprints_are(
    source: MemorySource, head: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("nec_ray.evaluate.prediction._MAPS_A_PULL", 5)
    out = tmp_path / "deep" / "map.tif"
    table = predict(source, head, None, out)
    assert table["tile_id"].to_pylist() == source.table["tile_id"].to_pylist()
    assert source.pulls == [5, 5, 2]
    maps = expected_maps(source, head)
    with rasterio.open(out) as image:
        assert image.crs.to_epsg() == 32621
        assert image.transform == Affine(60, 0, 700_000, 0, -60, 7_200_000)  # 32 pixels of 30 m as 16 of 60 m
        assert (image.width, image.height, image.nodata, image.dtypes) == (50, 35, 255, ("uint8",))
        assert json.loads(image.tags()["CLASSES"]) == ["water", "land", "Ünterholz"]
        assert [image.colormap(1)[i][:3] for i in range(3)] == COLOURS
        classes = image.read(1)
        assert (classes < 3).all()  # the tiles cover all of it
        project = rasterio.warp.transform
        for row, tile in enumerate(source.table.to_pylist()):
            ring = shapely.get_coordinates(shapely.from_wkb(tile["geometry"]))
            xs, ys = project("EPSG:4326", image.crs, ring[:, 0], ring[:, 1])
            assert min(xs) == pytest.approx(tile["transform"][2], abs=0.01)
            window = rasterio.windows.from_bounds(min(xs), min(ys), max(xs), max(ys), image.transform)
            if tile["transform"][0] == 240 and tile["transform"][4] == -240:
                assert window.height == pytest.approx(16, abs=1e-3)
                np.testing.assert_array_equal(image.read(1, window=window.round_offsets().round_lengths()), maps[row])
    assert [path.name for path in out.parent.iterdir()] == ["map.tif"]


def test_every_pixel_is_what_the_tile_says_at_its_place(source: MemorySource, head: Path, tmp_path: Path) -> None:
    predict(source, head, None, tmp_path / "map.tif")
    maps = expected_maps(source, head)
    with rasterio.open(tmp_path / "map.tif") as image:
        classes = image.read(1)
        for row in range(image.height):
            for col in range(image.width):
                x, y = image.transform * (col + 0.5, row + 0.5)
                for tile, numbers in enumerate(source.table["transform"].to_pylist()):
                    u, v = ~Affine(*numbers) * (x, y)
                    if 0 <= u < 4 and 0 <= v < 4:
                        assert classes[row, col] == maps[tile, int(v * 4), int(u * 4)]


def test_a_part_of_the_tiles_leaves_nodata(source: MemorySource, head: Path, tmp_path: Path) -> None:
    names = source.table["tile_id"].to_pylist()
    predict(source, head, f"tile_id IN ('{names[0]}', '{names[5]}')", tmp_path / "map.TIFF")
    with rasterio.open(tmp_path / "map.TIFF") as image:
        classes = image.read(1)
    assert classes.shape == (32, 32)
    assert (classes[:16, :16] < 3).all()
    assert (classes[16:, 16:] < 3).all()
    assert (classes[:16, 16:] == 255).all()


def test_far_tiles_make_a_sparse_file(head: Path, tmp_path: Path, source: MemorySource) -> None:
    table = source.table.slice(0, 2)
    numbers = table["transform"].to_pylist()
    numbers[1][2] += 240 / 4 * 60_000
    numbers[1][5] -= 240 / 4 * 60_000
    at = table.schema.get_field_index("transform")
    far = MemorySource(
        table.set_column(at, table.schema.field(at), pa.array(numbers, table.schema.types[at])), source.embeddings[:2]
    )
    predict(far, head, None, tmp_path / "map.tif")
    assert (tmp_path / "map.tif").stat().st_size < 3_000_000
    with rasterio.open(tmp_path / "map.tif") as image:
        assert image.width > 60_000
        assert (image.read(1, window=((0, 16), (0, 16))) < 3).all()
        assert (image.read(1, window=((20, 40), (20, 40))) == 255).all()


def changed(source: MemorySource, column: str, values: list[Any]) -> MemorySource:
    at = source.table.schema.get_field_index(column)
    field = source.table.schema.field(at)
    return MemorySource(source.table.set_column(at, field, pa.array(values, field.type)), source.embeddings)


def test_tiles_that_make_no_mosaic_are_refused(source: MemorySource, head: Path, tmp_path: Path) -> None:
    numbers = source.table["transform"].to_pylist()
    crs = source.table["crs"].to_pylist()
    shifted = [list(n) for n in numbers]
    shifted[4][2] += 31
    wide = [list(n) for n in numbers]
    wide[0][2], wide[0][5] = 700_000 - 60e7, 7_200_000 + 60e7
    turned = [[a, 1.0, c, d, e, f] for a, _, c, d, e, f in numbers]
    for column, values, match in (
        ("crs", [None, *crs[1:]], "1 of 12 tiles have no georeference"),
        ("transform", [*numbers[:-2], None, None], "2 of 12 tiles have no georeference"),
        ("crs", ["EPSG:32622", *crs[1:]], r"2 CRSs \(EPSG:32621, EPSG:32622\)"),
        ("transform", turned, "turned or mirrored"),
        ("transform", shifted, r"1 tiles do not lie on the others' grid, such as scene/y00032_x00000"),
        ("transform", wide, "is too large"),
        ("crs", ["EPSG:99999999"] * 12, "GDAL does not know this CRS"),
    ):
        with pytest.raises(InputError, match=match) as caught:
            predict(changed(source, column, values), head, None, tmp_path / "out" / "map.tif")
        assert "\n" not in str(caught.value)
        assert "PNGs" in str(caught.value)
    assert not list(tmp_path.glob("out/*"))


def stopped_half_way(out: Path, mosaic: Mosaic) -> None:
    with written_mosaic(out, mosaic, ["a"], COLOURS) as image:
        image.put(0, np.zeros((16, 16), np.uint8))
        raise RuntimeError("stop")


def test_a_file_that_fails_half_way_is_not_left(source: MemorySource, tmp_path: Path) -> None:
    out = tmp_path / "out" / "map.tif"
    mosaic = plan_mosaic("x", source.table.select(list(MOSAIC_ROWS)))
    with pytest.raises(RuntimeError, match="stop"):
        stopped_half_way(out, mosaic)
    assert not list(out.parent.iterdir())


def test_a_folder_of_pngs_names_its_tiles(source: MemorySource, head: Path, tmp_path: Path) -> None:
    strange = [f"../../{i}/\n☃" for i in range(12)]
    table = predict(changed(source, "tile_id", strange), head, None, tmp_path / "maps")
    read = pq.read_table(tmp_path / "maps" / TILES_PARQUET)
    assert read.column_names == ["tile_id", "path", "geometry", "bbox"] == table.column_names
    maps = expected_maps(source, head)
    for name, path in zip(read["tile_id"].to_pylist(), read["path"].to_pylist(), strict=True):
        with Image.open(tmp_path / "maps" / path) as image:
            np.testing.assert_array_equal(np.asarray(image), maps[strange.index(name)])
            assert image.getpalette()[:9] == [part for colour in COLOURS for part in colour]  # type: ignore[index]
    assert len(list(tmp_path.rglob("*.png"))) == 12

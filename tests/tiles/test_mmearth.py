"""MMEarth's HDF5 files as tiles; files that refer to others are refused."""

import json
from datetime import UTC, datetime
from pathlib import Path

import h5py
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pytest
from PIL import Image
from rasterio.warp import transform

from nec_ray.errors import BadSource, InputError
from nec_ray.tiles import build_catalog, read_tiles
from nec_ray.tiles.modalities import SENTINEL2_BANDS

COUNT, SIDE = 6, 64


def made(folder: Path) -> Path:
    """A file as `convert_to_h5.py` writes it, as far as Sentinel-2 goes."""
    rng = np.random.default_rng(3)
    images = rng.integers(1, 9000, (COUNT, 13, SIDE, SIDE), dtype=np.uint16)
    images[4] = 0
    kind = np.dtype([("tile_id", "S100"), ("S2_type", "S10")])
    metadata = np.array([(f"t{i}", ["l1c", "l2a"][i % 2]) for i in range(COUNT)], kind)
    path = folder / "data_100k_v001.h5"
    with h5py.File(path, "w") as file:
        file.create_dataset("sentinel2", data=images, chunks=(1, 13, SIDE, SIDE), compression="gzip")
        file.create_dataset("metadata", data=metadata)
    info = {
        f"t{i}": {"S2_DATE": f"2019-0{i + 1}-17", "CRS": "EPSG:32735", "lat": -12.5, "lon": 27.1 + i, "biome": i}
        for i in range(COUNT - 1)
    }
    (folder / "data_100k_v001_tile_info.json").write_text(json.dumps(info))
    (folder / "data_100k_v001_splits.json").write_text(json.dumps({"train": [0, 2, 3], "val": [1], "test": []}))
    return path


def test_samples_become_tiles_with_place_time_type_and_split(tmp_path: Path) -> None:
    path = made(tmp_path)
    tiles = build_catalog(path).table
    assert tiles["tile_id"].to_pylist() == [f"data_100k_v001/t{i}" for i in range(COUNT)]
    assert tiles["s2_type"].to_pylist() == ["l1c", "l2a"] * 3
    assert tiles["split"].to_pylist() == ["train", "val", "train", "train", None, None]
    assert tiles["acquired_at"][2].as_py() == datetime(2019, 3, 17, tzinfo=UTC)
    box = tiles["bbox"][3].as_py()
    assert box["xmin"] < 30.1 < box["xmax"]
    [west, east], [north, south] = transform(
        "EPSG:4326", "EPSG:32735", [box["xmin"], box["xmax"]], [box["ymax"], box["ymin"]]
    )
    assert (east - west, north - south) == (pytest.approx(640, rel=0.06), pytest.approx(640, rel=0.06))
    assert tiles["bbox"][COUNT - 1].as_py() is None, "of a sample that tile_info.json does not name"
    batch = read_tiles(tiles, bands=["B8A", "B8", "B12"], size=SIDE, fill=[0, 0, 0])
    assert batch.status == ["valid"] * 4 + ["nodata", "valid"]
    with h5py.File(path) as file:  # B8A stands before B8
        expected = file["sentinel2"][[0, 1, 2, 3, 5]][:, [7, 8, 12]]
    assert np.array_equal(batch.pixels, expected)
    assert len(set(SENTINEL2_BANDS)) == 13


@pytest.mark.parametrize(
    "wrong", [{"lat": 91}, {"lat": -1e308}, {"lon": 1e308}, {"lat": 10**400}, {"lat": float("nan")}, {"CRS": "EPSG:1"}]
)
def test_an_impossible_place_is_no_place(tmp_path: Path, wrong: dict[str, object]) -> None:
    path = made(tmp_path)
    where = tmp_path / "data_100k_v001_tile_info.json"
    info = json.loads(where.read_text())
    info["t2"] |= wrong
    where.write_text(json.dumps(info))
    tiles = build_catalog(path).table
    assert [box is None for box in tiles["bbox"].to_pylist()] == [False, False, True, False, False, True]
    assert tiles["s2_type"][2].as_py() == "l1c"


def test_a_number_sign_in_a_folder_or_a_name_is_part_of_it(tmp_path: Path) -> None:
    folder = tmp_path / "a.h5#2" / "x#7"
    folder.mkdir(parents=True)
    tiles = build_catalog(made(folder)).table
    batch = read_tiles(tiles, bands=["B8A"], size=SIDE, fill=[0])
    with h5py.File(folder / "data_100k_v001.h5") as file:
        assert np.array_equal(batch.pixels[3], file["sentinel2"][3][7:8])
    Image.new("L", (8, 8), 3).save(folder / "picture#1.png")
    (row,) = build_catalog(folder).table.filter(pc.field("width") == 8).to_pylist()
    assert row["source"] == f"{folder}/picture#1.png"
    assert read_tiles(pa.Table.from_pylist([row]), bands=["grey"], size=8, fill=[0]).status == ["valid"]


def test_what_the_file_says_itself_is_not_given(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="its tile size, no-data value, sensor itself"):
        build_catalog(made(tmp_path), tile_size=64, nodata=0, sensor="x")


def test_a_file_that_refers_to_others_or_is_none_is_refused(tmp_path: Path) -> None:
    path = made(tmp_path)
    tiles = build_catalog(path).table
    secret = tmp_path / "secret.h5"
    path.rename(secret)

    def refused(message: str) -> None:
        with pytest.raises(BadSource, match=message):
            build_catalog(path)
        assert read_tiles(tiles, bands=["B1"], size=8, fill=[0]).status == ["failed"] * COUNT

    with h5py.File(path, "w") as file:
        file["sentinel2"] = h5py.ExternalLink(str(secret), "sentinel2")
    refused("no data set sentinel2 of its own")
    with h5py.File(path, "w") as file:
        layout = h5py.VirtualLayout((COUNT, 13, SIDE, SIDE), np.uint16)
        layout[:] = h5py.VirtualSource(str(secret), "sentinel2", (COUNT, 13, SIDE, SIDE))
        file.create_virtual_dataset("sentinel2", layout)
    refused("lies in other files")
    with h5py.File(path, "w") as file:
        shape = (COUNT, 13, SIDE, SIDE)
        file.create_dataset("sentinel2", shape, np.uint16, external=[(str(secret), 0, 2 * COUNT * 13 * SIDE * SIDE)])
    refused("lies in other files")
    with h5py.File(path, "w") as file:
        file.create_dataset("sentinel2", (COUNT, 13, SIDE, SIDE), np.uint16, compression="lzf")
    refused("another filter than gzip")
    with h5py.File(path, "w") as file:
        file.create_dataset("sentinel2", (COUNT, 12, SIDE, SIDE), np.uint16)
    refused(r"its sentinel2 is uint16 \(6, 12, 64, 64\), not uint16 \(samples, 13, rows, columns\)")
    with h5py.File(path, "w") as file:
        file.create_dataset("sentinel2", (COUNT, 13, SIDE, SIDE), np.uint16)
    with pytest.raises(BadSource, match="no data set metadata"):
        build_catalog(path)
    path.write_bytes(secret.read_bytes()[:3000])
    refused("cannot be read as HDF5")
    path.write_bytes(secret.read_bytes())
    (tmp_path / "data_100k_v001_splits.json").unlink()
    with pytest.raises(BadSource, match=r"splits\.json: is not there"):
        build_catalog(path)

"""Zarr v3 as xarray, GDAL and STAC write it, as tiles: the same pixels, places and times; nothing that runs code."""

import json
import warnings
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import rasterio
import xarray
import zarr
from rasterio.transform import Affine

from nec_ray.errors import BadSource, NotFound
from nec_ray.tiles import build_catalog, builtin_scene, read_tiles
from tests.s3 import Server

SIDE = 16


@pytest.fixture(scope="module")
def scene() -> xarray.DataArray:
    """A part of the real scene, with the coordinates of its pixels' centres and its CRS as rioxarray writes them."""
    with rasterio.open(builtin_scene()) as file:
        pixels = file.read(window=rasterio.windows.Window(400, 300, 40, 56))
        transform = file.window_transform(rasterio.windows.Window(400, 300, 40, 56))
        wkt = file.crs.to_wkt()
    y = transform.f + transform.e * (np.arange(56) + 0.5)
    x = transform.c + transform.a * (np.arange(40) + 0.5)
    array = xarray.DataArray(pixels, dims=("band", "y", "x"), coords={"band": ["red", "green", "blue"], "y": y, "x": x})
    return array.assign_coords(spatial_ref=xarray.DataArray(0, attrs={"crs_wkt": wkt})).assign_attrs(
        grid_mapping="spatial_ref"
    )


def write(data: xarray.Dataset, path: Path, *, chunk: int = SIDE, shards: int | None = None, **how: Any) -> Path:
    encoding = {}
    for name, array in data.data_vars.items():
        if array.ndim >= 2:
            leading = (1,) * (array.ndim - 2)
            encoding[name] = {"chunks": (*leading, chunk, chunk)}
            if shards:
                encoding[name]["shards"] = (*leading, shards, shards)
    with warnings.catch_warnings():  # of texts, as which xarray writes names of bands
        warnings.simplefilter("ignore", zarr.errors.UnstableSpecificationWarning)
        data.to_zarr(path, zarr_format=3, consolidated=False, encoding=encoding, **how)
    return path


def as_tiff(scene: xarray.DataArray, path: Path) -> Path:
    """The same pixels as a GeoTIFF, whose tiles are proven elsewhere."""
    dx, dy = float(scene.x[1] - scene.x[0]), float(scene.y[1] - scene.y[0])
    transform = Affine(dx, 0, float(scene.x[0]) - dx / 2, 0, dy, float(scene.y[0]) - dy / 2)
    count, height, width = scene.shape
    with rasterio.open(
        path, "w", driver="GTiff", count=count, height=height, width=width, dtype=scene.dtype,
        crs=scene.spatial_ref.attrs["crs_wkt"], transform=transform,
    ) as file:  # fmt: skip
        file.write(scene.values)
        for i, name in enumerate(scene.band.values, 1):
            file.set_band_description(i, str(name))
    return path


@pytest.mark.parametrize("shards", [None, 32])
def test_an_array_is_cut_as_a_geotiff_of_the_same_pixels_is(
    scene: xarray.DataArray, tmp_path: Path, shards: int | None
) -> None:
    path = write(scene.to_dataset(name="reflectance"), tmp_path / "cube.zarr", shards=shards)
    tiles = build_catalog(path / "reflectance", tile_size=SIDE, nodata=0).table
    expected = build_catalog(as_tiff(scene, tmp_path / "same.tif"), tile_size=SIDE, nodata=0).table
    assert tiles["tile_id"][0].as_py() == "cube/reflectance/y00000_x00000"
    for name in ("x_off", "y_off", "width", "height", "bands", "dtype", "nodata", "crs"):
        assert tiles[name].to_pylist() == expected[name].to_pylist(), name
    for mine, theirs in zip(tiles.to_pylist(), expected.to_pylist(), strict=True):
        assert mine["transform"] == pytest.approx(theirs["transform"], rel=1e-9)
        assert list(mine["bbox"].values()) == pytest.approx(list(theirs["bbox"].values()), rel=1e-9)
    ours, those = (read_tiles(t, bands=["blue", "red"], size=SIDE, fill=[0, 0]) for t in (tiles, expected))
    assert ours.status == those.status == ["valid"] * len(tiles)
    assert np.array_equal(ours.pixels, those.pixels)


def test_a_group_of_bands_and_times(scene: xarray.DataArray, tmp_path: Path) -> None:
    times = np.array(["2020-05-18T13:30:00", "2021-01-02"], "datetime64[ns]")
    stack = xarray.concat([scene, scene + 1], dim=xarray.DataArray(times, dims="time", name="time"))
    bands = {name: stack.sel(band=name, drop=True).astype("int16") for name in ("red", "green", "blue")}
    path = write(xarray.Dataset(bands | {"cloud": (("time",), [0.1, 0.2])}), tmp_path / "cube.zarr")
    with pytest.raises(BadSource, match=r"no array nir; it has blue, cloud, green, red"):
        build_catalog(path, bands=["nir"])
    tiles = build_catalog(path, tile_size=SIDE, bands=["blue", "red"]).table
    assert len(tiles) == 2 * 3 * 4
    assert tiles["source"].unique().to_pylist() == [f"{path}#0", f"{path}#1"]
    assert tiles["tile_id"][-1].as_py() == "cube/t00001/y00048_x00032"
    when = [datetime(2020, 5, 18, 13, 30, tzinfo=UTC), datetime(2021, 1, 2, tzinfo=UTC)]
    assert tiles["acquired_at"].unique().to_pylist() == when
    batch = read_tiles(tiles.take(list(range(len(tiles)))[::-1]), bands=["red"], size=8, fill=[0])
    assert batch.status == ["valid"] * len(tiles)
    at = tiles["tile_id"].to_pylist().index("cube/t00001/y00032_x00016")
    whole = read_tiles(tiles.slice(at, 1), bands=["red", "blue"], size=SIDE, fill=[0, 0])
    assert np.array_equal(whole.pixels[0], stack.isel(time=1).values[[0, 2], 32:48, 16:32])


def test_places_in_attributes_and_degrees(tmp_path: Path) -> None:
    plain = xarray.DataArray(np.arange(64, dtype="uint8").reshape(8, 8), dims=("y", "x"))
    stac = {"proj:code": "EPSG:32633", "proj:transform": [10, 0, 500_000, 0, -10, 4_000_000]}
    gdal = {"spatial_ref": "EPSG:32633", "GeoTransform": "500000 10 0 4000000 0 -10"}
    for name, attributes in (("stac", stac), ("gdal", gdal)):
        path = write(plain.assign_attrs(attributes).to_dataset(name="a"), tmp_path / f"{name}.zarr", chunk=8)
        row = build_catalog(path, tile_size=4).table.to_pylist()[3]
        assert (row["crs"], row["transform"]) == ("EPSG:32633", [10, 0, 500_040, 0, -10, 3_999_960])
    degrees = plain.rename(y="lat", x="lon").assign_coords(lat=-30 - np.arange(8.0), lon=20 + np.arange(8.0))
    path = write(degrees.to_dataset(name="a"), tmp_path / "degrees.zarr", chunk=8)
    [row] = build_catalog(path).table.to_pylist()
    assert (row["crs"], row["bands"]) == ("EPSG:4326", ["a"])
    assert row["bbox"] == pytest.approx({"xmin": 19.5, "ymin": -37.5, "xmax": 27.5, "ymax": -29.5})
    [row] = build_catalog(write(plain.to_dataset(name="a"), tmp_path / "none.zarr", chunk=8)).table.to_pylist()
    assert (row["crs"], row["bbox"], row["transform"]) == (None, None, None)
    uneven = degrees.assign_coords(lat=-30 - np.arange(8.0) ** 1.1)
    with pytest.raises(BadSource, match="lat is not evenly spaced"):
        build_catalog(write(uneven.to_dataset(name="a"), tmp_path / "uneven.zarr", chunk=8))


def test_an_array_in_no_group(tmp_path: Path) -> None:
    attributes = {"proj:code": "EPSG:32633", "proj:transform": [10, 0, 500_000, 0, -10, 4_000_000]}
    names = ("band", "y", "x")
    array = zarr.create_array(
        tmp_path / "a.zarr", shape=(2, 8, 8), dtype="uint8", dimension_names=names, attributes=attributes
    )
    array[:] = np.arange(128).reshape(2, 8, 8)
    tiles = build_catalog(tmp_path / "a.zarr", tile_size=4).table
    row = tiles.to_pylist()[3]
    assert (row["tile_id"], row["bands"]) == ("a/y00004_x00004", ["band_1", "band_2"])
    assert row["transform"] == [10, 0, 500_040, 0, -10, 3_999_960]
    batch = read_tiles(tiles, bands=["band_2"], size=4, fill=[0])
    assert np.array_equal(batch.pixels[3, 0], np.arange(64, 128).reshape(8, 8)[4:, 4:])


def test_missing_pixels_and_chunks_that_were_never_written(tmp_path: Path) -> None:
    values = np.full((8, 8), np.nan, "float32")
    values[:4, 4:] = 3
    data = xarray.DataArray(values, dims=("y", "x")).to_dataset(name="a")
    path = write(data, tmp_path / "a.zarr", chunk=4, write_empty_chunks=False)
    assert len(list(path.glob("a/c/*/*"))) == 1
    tiles = build_catalog(path, tile_size=4).table
    batch = read_tiles(tiles, bands=["a"], size=4, fill=[-1])
    assert batch.status == ["nodata", "valid", "nodata", "nodata"]
    assert (batch.pixels == 3).all()
    marked = xarray.DataArray(np.array([[7, 9], [9, 9]], "int16"), dims=("y", "x"), attrs={"_FillValue": 9})
    path = write(marked.to_dataset(name="a"), tmp_path / "b.zarr", chunk=2)
    assert build_catalog(path).table["nodata"].to_pylist() == [9]
    assert read_tiles(build_catalog(path).table, bands=["a"], size=2, fill=[0]).nodata_share == [0.75]


def test_a_chunk_that_changes_changes_the_etags_of_its_tiles(scene: xarray.DataArray, tmp_path: Path) -> None:
    path = write(scene.to_dataset(name="a"), tmp_path / "cube.zarr")
    before = build_catalog(path / "a", tile_size=8).table
    array = zarr.open_array(path / "a", mode="r+")
    array[1, 20, 20] = 1
    after = build_catalog(path / "a", tile_size=8).table
    changed = [
        (row["y_off"], row["x_off"])
        for row, other in zip(before.to_pylist(), after.to_pylist(), strict=True)
        if row["source_etag"] != other["source_etag"]
    ]
    assert changed == [(y, x) for y in (16, 24) for x in (16, 24)]


def test_on_an_object_store(scene: xarray.DataArray, s3_server: Server, tmp_path: Path) -> None:
    path = write(scene.to_dataset(name="a"), tmp_path / "cube.zarr", shards=32)
    bucket = s3_server.bucket()
    s3_server.files().put(str(path), f"{bucket}/in/cube.zarr", recursive=True)
    tiles = build_catalog(f"s3://{bucket}/in/cube.zarr/a", tile_size=SIDE).table
    here = build_catalog(path / "a", tile_size=SIDE).table
    assert tiles["tile_id"].to_pylist() == here["tile_id"].to_pylist()
    batches = [read_tiles(t, bands=["red"], size=SIDE, fill=[0]) for t in (tiles, here)]
    assert np.array_equal(batches[0].pixels, batches[1].pixels)
    assert len(batches[0].valid) == len(tiles)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"zarr_format": 2}, "no Zarr v3"),
        ({"data_type": "object"}, "no plain number"),
        ({"data_type": {"name": "numpy.datetime64"}}, "no plain number"),
        ({"codecs": [{"name": "pickle"}]}, "codec pickle"),
        ({"codecs": [{"name": "numcodecs.pickle", "configuration": {}}]}, r"codec numcodecs\.pickle"),
        ({"storage_transformers": [{"name": "x"}]}, "storage transformer"),
        ({"shape": [-3, 56, 40]}, "not counts"),
        ({"shape": "large"}, "does not read"),
        ({"chunk_grid": {"name": "regular", "configuration": {"chunk_shape": [1 << 20] * 3}}}, "smaller chunks"),
        ({"chunk_grid": {"name": "regular", "configuration": {"chunk_shape": [0, 16, 16]}}}, "not counts"),
        ({"chunk_grid": {"name": "hexagons", "configuration": {"chunk_shape": [1, 16, 16]}}}, "not regular"),
        ({"chunk_key_encoding": {"name": "../../x"}}, "unknown kind"),
        ({"dimension_names": ["a", "b", "c"]}, "name them time, band, y, x"),
        ({"dimension_names": None}, "without names"),
        ({"dimension_names": ["y", "x"]}, "than it has dimensions"),
    ],
)
def test_what_could_run_code_or_fill_the_memory_is_refused(
    scene: xarray.DataArray, tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    path = write(scene.to_dataset(name="a"), tmp_path / "cube.zarr")
    tiles = build_catalog(path / "a", tile_size=SIDE).table
    metadata = path / "a" / "zarr.json"
    metadata.write_text(json.dumps(json.loads(metadata.read_text()) | change))
    with pytest.raises(BadSource, match=message) as caught:
        build_catalog(path / "a", tile_size=SIDE)
    assert str(path) in str(caught.value)
    batch = read_tiles(tiles, bands=["red"], size=SIDE, fill=[0])
    assert batch.status == ["failed"] * len(tiles)
    assert all("\n" not in str(reason) for reason in batch.reason)


def test_what_is_not_there_or_damaged(scene: xarray.DataArray, tmp_path: Path) -> None:
    path = write(scene.to_dataset(name="a"), tmp_path / "cube.zarr")
    tiles = build_catalog(path / "a", tile_size=SIDE).table
    (path / "a" / "c" / "0" / "1" / "1").write_bytes(b"damaged")
    batch = read_tiles(tiles, bands=["red"], size=SIDE, fill=[0])
    assert batch.status.count("failed") == 1
    assert batch.status[4] == "failed"
    with pytest.raises(NotFound, match=r"no zarr\.json"):
        build_catalog(path / "b")
    (tmp_path / "not.zarr").mkdir()
    with pytest.raises(NotFound):
        build_catalog(tmp_path / "not.zarr")
    with pytest.raises(BadSource, match="has bands of its own"):
        build_catalog(path)
    path.rename(tmp_path / "cube")
    with pytest.raises(BadSource, match=r"does not end with \.zarr"):
        build_catalog(tmp_path / "cube")
    gone = read_tiles(tiles, bands=["red"], size=SIDE, fill=[0])
    assert gone.status == ["failed"] * len(tiles)

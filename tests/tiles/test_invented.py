"""The invented planet: files in the published layout, the same for a seed, whose modalities depend on one another."""

import gc
import hashlib
import json
import tracemalloc
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import numpy.typing as npt
import pytest

from nec_ray.errors import InputError
from nec_ray.storage import Store
from nec_ray.tiles import build_catalog, read_tiles
from nec_ray.tiles.invented import generate
from nec_ray.tiles.invented.landscape import fractal
from nec_ray.tiles.invented.world import eco_regions
from nec_ray.tiles.mmearth import read_modalities
from nec_ray.tiles.mmearth_reader import open_mmearth
from nec_ray.tiles.modalities import BIOMES, MODALITIES, SENTINEL2_BANDS
from tests.s3 import Server

SAMPLES, SIDE = 250, 24
Arrays = dict[str, npt.NDArray[Any]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("invented")
    assert generate(made, samples=SAMPLES, side=SIDE, seed=7) == f"{made}/data_invented.h5"
    return made


@pytest.fixture(scope="module")
def read(folder: Path) -> Arrays:
    with open_mmearth(Store(folder), "data_invented.h5") as file:
        return file.read(range(SAMPLES))


@pytest.fixture(scope="module")
def info(folder: Path) -> list[dict[str, Any]]:
    entries = json.loads((folder / "data_invented_tile_info.json").read_text())
    assert list(entries) == [str(i) for i in range(SAMPLES)]
    return list(entries.values())


def test_the_layout_is_the_published_one(folder: Path, info: list[dict[str, Any]]) -> None:
    image, pixels, vector = (13, SIDE, SIDE), (1, SIDE, SIDE), (2,)
    published = {
        "sentinel2": ("<u2", image),
        "sentinel2_cloudmask": ("<u2", pixels),
        "sentinel2_cloudprod": ("<u2", pixels),
        "sentinel2_scl": ("|u1", pixels),
        "sentinel1": ("<f4", (8, SIDE, SIDE)),
        "aster": ("<i2", (2, SIDE, SIDE)),
        "canopy_height_eth": ("|i1", (2, SIDE, SIDE)),
        "era5": ("<f4", (12,)),
        "lat": ("<f4", vector),
        "lon": ("<f4", vector),
        "month": ("<f4", vector),
        "biome": ("|u1", (14,)),
        "eco_region": ("<u2", (846,)),
        "dynamic_world": ("|u1", pixels),
        "esa_worldcover": ("|u1", pixels),
    }
    with h5py.File(folder / "data_invented.h5") as file:
        found = {name: (file[name].dtype.str, file[name].shape[1:]) for name in file if name != "metadata"}
        assert found == published
        for name, (_, shape) in published.items():
            assert (file[name].chunks, file[name].compression) == ((1, *shape), "gzip")
            assert len(file[name]) == SAMPLES
        assert file["metadata"].dtype == np.dtype([("tile_id", "S100"), ("S2_type", "S10")])
        assert file["metadata"][3].tolist() == (b"3", info[3]["S2_type"].encode())
        assert file["lat"][5] == pytest.approx(
            [np.sin(np.radians(info[5]["lat"])), np.cos(np.radians(info[5]["lat"]))], abs=1e-6
        )
        months = [int(one["S2_DATE"].split("-")[1]) for one in info]
        assert file["month"][:, 0] == pytest.approx(np.sin(2 * np.pi * np.array(months) / 12), abs=1e-6)
        for i, one in enumerate(info):
            assert (file["biome"][i].argmax(), file["eco_region"][i].argmax()) == (one["biome"], one["eco_region"])
            climate = [x for part in ("month1", "month2", "year") for x in one["era5"][part]]
            np.testing.assert_allclose(file["era5"][i], np.array(climate, np.float32))
    assert {tuple(one) for one in info} == {
        ("S2_DATE", "S2_type", "CRS", "lat", "lon", "biome", "eco_region", "NO_DATA", "BANDS", "era5")
    }
    splits = json.loads((folder / "data_invented_splits.json").read_text())
    assert {split: len(numbers) for split, numbers in splits.items()} == {"train": 200, "val": 25, "test": 25}
    assert sorted(number for numbers in splits.values() for number in numbers) == list(range(SAMPLES))


def test_a_seed_makes_the_same_bytes_and_a_larger_set_begins_with_a_smaller(folder: Path, tmp_path: Path) -> None:
    hashes = []
    for name in ("a", "b"):
        generate(tmp_path / name, samples=3, side=SIDE, seed=7)
        hashes.append([hashlib.sha256(path.read_bytes()).digest() for path in sorted((tmp_path / name).iterdir())])
    assert hashes[0] == hashes[1]
    assert len(hashes[0]) == 4
    generate(tmp_path / "c", samples=3, side=SIDE, seed=8)
    with (
        h5py.File(tmp_path / "a" / "data_invented.h5") as few,
        h5py.File(folder / "data_invented.h5") as many,
        h5py.File(tmp_path / "c" / "data_invented.h5") as other,
    ):
        for name in MODALITIES:
            np.testing.assert_array_equal(few[name][...], many[name][:3])
        assert (few["sentinel2"][...] != other["sentinel2"][...]).mean() > 0.9


def test_band_statistics_are_those_of_the_values_that_are_there(folder: Path, info: list[dict[str, Any]]) -> None:
    stats = json.loads((folder / "data_invented_band_stats.json").read_text())
    level = np.array([one["S2_type"] for one in info])
    with h5py.File(folder / "data_invented.h5") as file:
        raw = {name: file[name][...].astype(np.float64) for name in file if name != "metadata"}
    raw["sentinel2"][raw["sentinel2"] == 0] = np.nan
    raw["sentinel1"][np.isinf(raw["sentinel1"])] = np.nan
    raw["aster"][raw["aster"] == -32768] = np.nan
    raw["canopy_height_eth"][raw["canopy_height_eth"] == 127] = np.nan
    raw["sentinel2_cloudprod"][raw["sentinel2_cloudprod"] == 65535] = np.nan
    cases = {key: raw[key] for key in ("sentinel1", "aster", "canopy_height_eth", "era5", "lat", "lon", "month")}
    for name in ("sentinel2", "sentinel2_cloudmask", "sentinel2_cloudprod"):
        cases |= {f"{name}_{kind}": raw[name][level == kind] for kind in ("l1c", "l2a")}
    assert stats.keys() == cases.keys()
    for key, values in cases.items():
        bands = values.swapaxes(0, 1).reshape(values.shape[1], -1)
        for i, band in enumerate(bands):
            got = {what: stats[key][what][i] for what in ("mean", "std", "min", "max")}
            if np.isnan(band).all():
                assert set(got.values()) == {None}, key
                continue
            wanted = {"mean": np.nanmean(band), "std": np.nanstd(band), "min": np.nanmin(band), "max": np.nanmax(band)}
            assert got == pytest.approx(wanted, rel=1e-6, abs=1e-4), (key, i)
    assert stats["sentinel2_l2a"]["mean"][SENTINEL2_BANDS.index("B10")] is None


def test_the_catalog_and_the_reader_take_it_like_any_file(folder: Path, info: list[dict[str, Any]]) -> None:
    tiles = build_catalog(folder / "data_invented.h5").table
    assert (tiles.num_rows, tiles["bbox"].null_count, tiles["acquired_at"].null_count) == (SAMPLES, 0, 0)
    for box, one in zip(tiles["bbox"].to_pylist(), info, strict=True):
        assert box["ymin"] < one["lat"] < box["ymax"]
        assert one["CRS"].startswith("EPSG:326" if one["lat"] > 0 else "EPSG:327")
    few = tiles.slice(0, 5)
    batch, all_of_them = read_tiles(few, bands=["B8", "B4"], size=SIDE, fill=[0, 0]), read_modalities(few)
    assert batch.status == ["valid"] * 5
    assert all_of_them.valid.tolist() == [0, 1, 2, 3, 4]
    bands = MODALITIES["sentinel2"].bands
    picked = all_of_them.values["sentinel2"][:, [bands.index("B8"), bands.index("B4")]]
    np.testing.assert_array_equal(batch.pixels, np.nan_to_num(picked))


def test_samples_that_are_written_hold_no_memory(tmp_path: Path) -> None:
    held = {}

    def measure(done: int, _: int) -> None:
        gc.collect()
        held[done] = tracemalloc.get_traced_memory()[0]

    tracemalloc.start()
    generate(tmp_path, samples=40, side=8, progress=measure)
    tracemalloc.stop()
    assert held[40] - held[20] < 20 * 1000  # a sample of this size has 10,000 bytes


def test_on_an_object_store(s3_server: Server, tmp_path: Path) -> None:
    bucket = s3_server.bucket()
    url = generate(f"s3://{bucket}/made", samples=2, side=8, seed=1)
    here = generate(tmp_path, samples=2, side=8, seed=1)
    assert s3_server.files().cat(url.removeprefix("s3://")) == Path(here).read_bytes()
    assert len(s3_server.files().ls(f"{bucket}/made")) == 4
    with pytest.raises(InputError, match="is there already"):
        generate(f"s3://{bucket}/made", samples=2, side=8)


@pytest.mark.parametrize(
    "wrong", [{"samples": 0}, {"side": 7}, {"side": 2000}, {"seed": -1}], ids=lambda wrong: next(iter(wrong))
)
def test_impossible_numbers_are_refused(wrong: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(InputError, match="give"):
        generate(tmp_path, **{"samples": 1, "side": 16, **wrong})
    assert not list(tmp_path.iterdir())


def test_a_stopped_run_leaves_nothing_and_a_finished_one_is_not_overwritten(tmp_path: Path) -> None:
    def stop(done: int, _: int) -> None:
        if done == 10:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        generate(tmp_path, samples=20, side=8, progress=stop)
    assert not list(tmp_path.iterdir())
    generate(tmp_path, samples=1, side=8)
    assert len(list(tmp_path.iterdir())) == 4
    with pytest.raises(InputError, match=r"data_invented\.h5: is there already"):
        generate(tmp_path, samples=1, side=8)


# What follows are the relations between modalities.


def band(read: Arrays, name: str, of: str = "sentinel2") -> npt.NDArray[Any]:
    return read[of][:, MODALITIES[of].bands.index(name)]


def where_class(read: Arrays, name: str, product: str = "esa_worldcover") -> npt.NDArray[np.bool_]:
    return np.asarray(read[product][:, 0] == MODALITIES[product].class_names.index(name), np.bool_)


def correlation(x: npt.NDArray[Any], y: npt.NDArray[Any]) -> float:
    both = np.isfinite(x) & np.isfinite(y)
    return float(np.corrcoef(x[both], y[both])[0, 1])


def biome(read: Arrays, name: str) -> npt.NDArray[np.bool_]:
    return np.asarray(read["biome"] == BIOMES.index(name), np.bool_)


def ndvi(read: Arrays) -> npt.NDArray[Any]:
    red, infrared = band(read, "B4"), band(read, "B8")
    return (infrared - red) / (infrared + red)


def test_all_biomes_come_and_each_ecoregion_lies_in_one(read: Arrays) -> None:
    count = np.bincount(read["biome"], minlength=14)
    assert len(count) == 14
    assert count.min() > SAMPLES / 14 / 3
    owner = {region: number for number in range(14) for region in eco_regions(number)}
    assert sorted(owner) == list(range(846))
    assert [owner[region] for region in read["eco_region"].tolist()] == read["biome"].tolist()


def test_it_is_colder_higher_up_and_towards_the_poles(read: Arrays) -> None:
    year, height = band(read, "year_avg_temp", "era5"), read["aster"][:, 0].mean(axis=(1, 2))
    lat = np.degrees(np.arctan2(read["lat"][:, 0], read["lat"][:, 1]))
    known = np.isfinite(year) & np.isfinite(height)
    columns = np.stack([np.ones(known.sum()), height[known], lat[known] ** 2], axis=1)
    (_, a_metre, a_degree), *_ = np.linalg.lstsq(columns, year[known], rcond=None)
    assert a_metre == pytest.approx(-0.0065, rel=0.05)  # of the standard atmosphere
    assert a_degree < -0.006


def test_summer_is_in_july_in_the_north_and_in_january_in_the_south(read: Arrays, info: list[dict[str, Any]]) -> None:
    warmer = band(read, "curr_month_avg_temp", "era5") - band(read, "year_avg_temp", "era5")
    month, lat = (np.array([f(one) for one in info]) for f in (lambda o: int(o["S2_DATE"][5:7]), lambda o: o["lat"]))
    for away, summer in ((lat > 30, [6, 7, 8]), (lat < -20, [12, 1, 2])):
        assert np.nanmin(warmer[away & np.isin(month, summer)]) > 0
    swing = np.nanmean(np.abs(warmer[np.abs(lat) > 50])) / np.nanmean(np.abs(warmer[np.abs(lat) < 10]))
    assert swing > 4


def test_biomes_have_their_climates(read: Arrays) -> None:
    year, rain = band(read, "year_avg_temp", "era5") - 273.15, band(read, "year_total_precip", "era5")
    assert np.nanmean(rain[biome(read, "Tropical & Subtropical Moist Broadleaf Forests")]) > 1.5
    assert np.nanmean(rain[biome(read, "Deserts & Xeric Shrublands")]) < 0.4
    assert np.nanmax(year[biome(read, "Tundra")]) < 0
    assert np.nanmin(year[biome(read, "Mangroves")]) > 18


def test_land_cover_shows_in_the_vegetation_index(read: Arrays) -> None:
    index = ndvi(read)
    rainforest = biome(read, "Tropical & Subtropical Moist Broadleaf Forests")[:, None, None]
    trees = np.nanmedian(index[where_class(read, "tree cover") & rainforest])
    names = ("grassland", "bare or sparse vegetation", "permanent water")
    grass, bare, water = (np.nanmedian(index[where_class(read, name)]) for name in names)
    assert trees > 0.6 > grass > bare > water


def test_leaves_come_and_go_with_the_season(read: Arrays, info: list[dict[str, Any]]) -> None:
    green = biome(read, "Temperate Broadleaf & Mixed Forests") | biome(
        read, "Temperate Grasslands, Savannas & Shrublands"
    )
    warm = band(read, "curr_month_avg_temp", "era5") - 273.15
    land = ~where_class(read, "permanent water")
    index = np.array([np.nanmedian(np.where(on, one, np.nan)) for on, one in zip(land, ndvi(read), strict=True)])
    assert correlation(index[green], warm[green]) > 0.4
    snowy = np.nanmedian(band(read, "B3")[(warm < -8)]), np.nanmedian(band(read, "B3")[(warm > 5)])
    assert snowy[0] > 3 * snowy[1]


def test_land_cover_shows_in_radar_and_canopy(read: Arrays) -> None:
    vv = band(read, "asc_VV", "sentinel1")
    water, trees, towns = (where_class(read, name) for name in ("permanent water", "tree cover", "built-up"))
    levels = [np.nanmean(vv[kind]) for kind in (water, trees, towns)]
    assert levels[0] + 8 < levels[1] < levels[2] - 2
    height = read["canopy_height_eth"][:, 0]
    assert np.nanmean(height[trees]) > 8
    assert np.nanmean(height[where_class(read, "grassland")]) < 1
    assert np.isnan(height[water]).all()
    slope = read["aster"][:, 1]
    assert np.nanmedian(slope[water]) == 0
    assert np.nanmedian(slope[trees]) > 3


def test_both_maps_of_land_cover_mostly_agree(read: Arrays) -> None:
    same = {"water": "permanent water", "trees": "tree cover", "crops": "cropland", "built": "built-up"}
    for ours, theirs in same.items():
        one, other = where_class(read, ours, "dynamic_world"), where_class(read, theirs)
        if ours == "trees":
            other |= where_class(read, "mangroves")
        share = (one & other).sum() / (one | other).sum()
        assert 0.6 < share < 1, ours


def test_slopes_towards_the_radar_are_bright_and_the_orbits_look_from_both_sides(read: Arrays) -> None:
    east = np.gradient(read["aster"][:, 0], axis=2)
    forest = where_class(read, "tree cover")
    asc, desc = (correlation(east[forest], band(read, f"{orbit}_VV", "sentinel1")[forest]) for orbit in ("asc", "desc"))
    assert asc > 0.1
    assert desc < -0.1


def test_levels_clouds_and_gaps(folder: Path, read: Arrays, info: list[dict[str, Any]]) -> None:
    level = np.array([one["S2_type"] for one in info])
    with h5py.File(folder / "data_invented.h5") as file:
        quality = {name: file[name][:, 0] for name in file if name.startswith("sentinel2_")}
        b10 = file["sentinel2"][:, SENTINEL2_BANDS.index("B10")]
        radar = file["sentinel1"][...]
    for name, missing in {"sentinel2_cloudprod": 65535, "sentinel2_scl": 255}.items():
        assert (quality[name][level == "l1c"] == missing).all()
        assert (quality[name][level == "l2a"] != missing).all()
    assert not b10[level == "l2a"].any()
    assert (b10[level == "l1c"] > 0).mean() > 0.9
    assert {"l1c", "l2a"} == set(level)
    for one in info:  # supplement, A.1
        european = 35 < one["lat"] < 70 and -15 < one["lon"] < 40
        early = date.fromisoformat(one["S2_DATE"]) < date(2018, 12, 1)
        assert one["S2_type"] == "l1c" or european or not early
    cloudy = quality["sentinel2_cloudmask"] == 1024
    assert 0.001 < cloudy.mean() < 0.2
    clear = band(read, "B2")[(quality["sentinel2_cloudmask"] == 0) & ~np.isnan(band(read, "B2"))]
    assert np.nanmean(band(read, "B2")[cloudy]) > 2 * clear.mean()
    gaps = np.isnan(read["sentinel2"]).any(axis=(1, 2, 3))
    assert 0 < gaps.mean() < 0.1
    assert (np.isnan(read["sentinel2"]).any(axis=1) == np.isnan(read["sentinel2"]).all(axis=1)).all()
    for i, one in enumerate(info):
        for orbit, first in (("asc", 0), ("desc", 4)):
            said = one["BANDS"][f"sentinel1_{orbit}"]
            seen = np.isfinite(radar[i, first : first + 4]).any(axis=(1, 2))
            given = [name for name, there in zip(("VV", "VH", "HH", "HV"), seen, strict=True) if there]
            assert (said or []) == given
    orbits = [one["BANDS"]["sentinel1_asc"] for one in info]
    assert 0.04 < np.mean([one is None for one in orbits]) < 0.25
    assert ["HH", "HV"] in orbits


@pytest.mark.parametrize("measure", [np.mean, np.var])
def test_fractals_are_standardised_and_smoother_where_steeper(
    measure: Callable[..., float], rng: np.random.Generator
) -> None:
    field = fractal(rng, 64, 3)
    assert measure(field) == pytest.approx(0 if measure is np.mean else 1, abs=1e-9)
    rough, smooth = (np.abs(np.diff(fractal(rng, 64, steepness))).mean() for steepness in (2, 4))
    assert smooth < rough / 2

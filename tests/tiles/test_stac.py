"""STAC catalogs as providers have them: what is followed, which files, grids, units and terms come of it."""

import json
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
import pystac
import pytest
import rasterio
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from rasterio.transform import from_origin

from nec_ray.errors import BadCatalog, BadSource, NotFound
from nec_ray.tiles import OrderedTiles, build_catalog, read_catalog, read_native, read_pixels, read_tiles, write_catalog
from nec_ray.tiles.stac import Items
from tests.storage.web import serve

WEST, NORTH = 600_000, 5_000_000
TIFF = "image/tiff; application=geotiff; profile=cloud-optimized"
MakeCog = Callable[..., Path]


@pytest.fixture
def make_cog(tmp_path: Path) -> MakeCog:
    def make(name: str, pixels: npt.NDArray[Any], *, metres: float = 10, crs: str = "EPSG:32632", **how: Any) -> Path:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        pixels = pixels if pixels.ndim == 3 else pixels[None]
        profile = {
            "driver": "GTiff",
            "tiled": True,
            "blockxsize": 16,
            "blockysize": 16,
            "crs": crs,
            "dtype": pixels.dtype,
        }
        count, height, width = pixels.shape
        transform = how.pop("transform", from_origin(WEST, NORTH, metres, metres))
        with rasterio.open(
            path, "w", count=count, height=height, width=width, transform=transform, **profile, **how
        ) as file:
            file.write(pixels)
        return path

    return make


def asset(href: str, *, name: str | None = None, common: str | None = None, **fields: Any) -> dict[str, Any]:
    """An asset of STAC 1.0."""
    band = {key: value for key, value in (("name", name), ("common_name", common)) if value}
    return {"href": href, "type": TIFF, "roles": ["data"], **({"eo:bands": [band]} if band else {}), **fields}


def item(name: str, assets: dict[str, Any], **properties: Any) -> dict[str, Any]:
    return {
        "type": "Feature",
        "stac_version": "1.0.0",
        "stac_extensions": [],
        "id": name,
        "geometry": {"type": "Point", "coordinates": [10.3, 45.1]},
        "bbox": [10.3, 45.1, 10.3, 45.1],
        "properties": {"datetime": "2022-03-01T10:20:30.500Z", **properties},
        "links": [],
        "assets": assets,
    }


def write(path: Path, document: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(document if isinstance(document, str) else json.dumps(document))
    return path


def items_file(path: Path, *items: dict[str, Any]) -> Path:
    return write(path, {"type": "FeatureCollection", "features": list(items)})


def values(table: pa.Table, *bands: str) -> npt.NDArray[np.float32]:
    """(tiles, bands, height, width) of tiles of one size; missing pixels are -99."""
    tiles = list(read_native(table, bands=bands, fill=[-99] * len(bands)))
    assert [tile.reason for tile in tiles if tile.status == "failed"] == []
    return np.stack([tile.pixels for tile in tiles if tile.pixels is not None])


# Sentinel-2 before and after processing baseline 04.00: how providers say it.
SCALED = {"raster:bands": [{"scale": 0.0001, "offset": -0.1, "nodata": 0}]}
OLD: list[tuple[dict[str, Any], dict[str, Any]]] = [
    ({"s2:processing_baseline": "02.14"}, {}),
    ({"processing:version": "03.01"}, {}),
    ({"constellation": "sentinel-2"}, {"raster:bands": [{"scale": 0.0001, "offset": 0}]}),
    ({"platform": "sentinel-2a"}, {"raster:bands": [{"scale": 0.0001}]}),
    # Earth Search: subtracted in the files already, stated nevertheless.
    ({"s2:processing_baseline": "05.09", "earthsearch:boa_offset_applied": True}, SCALED),
    ({"platform": "sentinel-2b", "sentinel:processing_baseline": "04.00", "sentinel:boa_offset_applied": True}, {}),
    ({"s2:product_uri": "S2A_MSIL2A_20190101T101031_N0211_R022_T32TPR_20190101T120000.SAFE"}, {}),
]
NEW: list[tuple[dict[str, Any], dict[str, Any]]] = [
    ({"s2:processing_baseline": "04.00"}, {}),
    ({"platform": "Sentinel-2A", "processing:version": "05.11"}, {}),
    ({"constellation": "sentinel-2", "earthsearch:boa_offset_applied": False}, SCALED),
    ({"constellation": "Sentinel 2"}, {"bands": [{"name": "B04", "raster:scale": 0.0001, "raster:offset": -0.1}]}),
    ({"platform": "sentinel-2a"}, {"raster:scale": 0.0001, "raster:offset": -0.1}),
    ({"platform": "sentinel-2a"}, {"raster:bands": [{"offset": -1000}]}),
    ({"platform": "sentinel-2a"}, {"raster:bands": [{"scale": 1, "offset": -1000}]}),
    ({"s2:processing_baseline": "05.10"}, {"raster:bands": [{"scale": 0.0001}]}),
    ({"s2:product_uri": "S2B_MSIL2A_20230101T101031_N0509_R022_T32TPR_20230101T120000.SAFE"}, {}),
]


@pytest.mark.parametrize("before", OLD)
def test_scenes_before_and_after_baseline_4_are_in_the_same_units(
    make_cog: MakeCog, tmp_path: Path, rng: np.random.Generator, before: Any
) -> None:
    _same_units(make_cog, tmp_path, rng, before, NEW[0])


@pytest.mark.parametrize("after", NEW[1:])
def test_however_a_provider_says_it(make_cog: MakeCog, tmp_path: Path, rng: np.random.Generator, after: Any) -> None:
    _same_units(make_cog, tmp_path, rng, OLD[0], after)


def _same_units(make_cog: MakeCog, tmp_path: Path, rng: np.random.Generator, before: Any, after: Any) -> None:
    """One ground, as ESA's processor writes it before and after: reflectance from metadata written out by hand."""
    ground = rng.integers(1, 12_000, (16, 16)).astype(np.uint16)  # 10,000 times the reflectance
    missing = np.zeros((16, 16), bool)
    missing[:3, 5:] = True
    make_cog("old.tif", np.where(missing, 0, ground).astype(np.uint16), nodata=0)
    make_cog("new.tif", np.where(missing, 0, ground + 1000).astype(np.uint16))  # as ESA's: 0 without a word
    scenes = [
        item(name, {"B04": asset(f"{name}.tif", name="B04", common="red") | fields}, **properties)
        for name, (properties, fields) in (("old", before), ("new", after))
    ]
    table = build_catalog(items_file(tmp_path / "s2.json", *scenes), bands=["red"]).table
    old, new = values(table, "red")[:, 0]
    np.testing.assert_array_equal(old, np.where(missing, -99, ground))
    np.testing.assert_array_equal(new, old)


def test_dark_pixels_stay_negative_and_1000_is_no_missing_one(make_cog: MakeCog, tmp_path: Path) -> None:
    make_cog("b.tif", np.array([[0, 1, 900], [1000, 1001, 65535]], np.uint16), nodata=0)
    path = items_file(tmp_path / "i.json", item("a", {"B8A": asset("b.tif")}, **{"s2:processing_baseline": "05.00"}))
    table = build_catalog(path, bands=["B8A"]).table
    np.testing.assert_array_equal(values(table, "B8A")[0, 0], [[-99, -999, -100], [0, 1, 64535]])
    assert table["dtype"].to_pylist() == ["uint16"]  # of the files, by which raw bytes are counted
    assert next(read_pixels(table)).dtype == np.uint16


def test_a_sentinel2_item_that_says_nothing_is_not_guessed(make_cog: MakeCog, tmp_path: Path) -> None:
    make_cog("b.tif", np.ones((4, 4), np.uint16))
    assets = {"red": asset("b.tif", common="red"), "scl": asset("b.tif")}
    path = items_file(tmp_path / "i.json", item("a", assets, platform="sentinel-2a"))
    with pytest.raises(BadSource, match="neither an offset nor its processing baseline"):
        build_catalog(path, bands=["red"])
    assert values(build_catalog(path, bands=["scl"]).table, "scl").max() == 1  # classes have no units


@pytest.mark.parametrize("stated", [True, False])
def test_landsat_collection_2(make_cog: MakeCog, tmp_path: Path, rng: np.random.Generator, stated: bool) -> None:
    """USGS: reflectance = 0.0000275 DN - 0.2, kelvin = 0.00341802 DN + 149."""
    dn = rng.integers(7_273, 43_636, (2, 8, 8)).astype(np.uint16)
    make_cog("SR_B4.TIF", dn[0], metres=30, nodata=0)
    make_cog("ST_B10.TIF", dn[1], metres=30, nodata=0)
    units = [{"raster:bands": [{"scale": a, "offset": b}]} for a, b in ((2.75e-05, -0.2), (0.00341802, 149.0))]
    assets = {
        "red": asset("SR_B4.TIF", name="OLI_B4", common="red") | (units[0] if stated else {}),
        "lwir11": asset("ST_B10.TIF", name="TIRS_B10", common="lwir11") | (units[1] if stated else {}),
        "qa_pixel": asset("SR_B4.TIF"),
    }
    landsat = {"landsat:collection_number": "02", "landsat:correction": "L2SP", "platform": "landsat-9"}
    path = items_file(tmp_path / "i.json", item("LC09", assets, **landsat))
    table = build_catalog(path, bands=["red", "lwir11", "qa_pixel"]).table
    red, kelvin, quality = values(table, "red", "lwir11", "qa_pixel")[0]
    np.testing.assert_allclose(red, dn[0] * 2.75e-05 - 0.2, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(kelvin, dn[1] * 0.00341802 + 149, rtol=1e-6)
    np.testing.assert_array_equal(quality, dn[0])


def test_bands_of_several_resolutions_come_onto_the_finest_grid(
    make_cog: MakeCog, tmp_path: Path, rng: np.random.Generator
) -> None:
    """Against numpy's repeat: a pixel of 20 m is four of 10 m, one of 60 m thirty-six."""
    bands = {"nir": (10, 48), "swir": (20, 24), "vapour": (60, 8)}
    pixels = {}
    for name, (metres, side) in bands.items():
        pixels[name] = rng.integers(1, 9_999, (side, side)).astype(np.uint16)
        make_cog(f"{name}.tif", pixels[name], metres=metres)
    path = items_file(tmp_path / "i.json", item("a", {name: asset(f"{name}.tif") for name in bands}))
    table = build_catalog(path, bands=["vapour", "nir", "swir"], tile_size=20).table
    whole = {name: pixels[name].repeat(metres // 10, 0).repeat(metres // 10, 1) for name, (metres, _) in bands.items()}
    covered = np.zeros((48, 48), int)
    tiles = read_native(table, bands=["swir", "vapour", "nir"], fill=[0, 0, 0])
    for row, tile in zip(table.to_pylist(), tiles, strict=True):
        y, x, height, width = (row[name] for name in ("y_off", "x_off", "height", "width"))
        at = np.s_[y : y + height, x : x + width]
        expected = np.stack([whole[name][at] for name in ("swir", "vapour", "nir")])
        assert tile.pixels is not None
        np.testing.assert_array_equal(tile.pixels, expected)
        covered[at] += 1
        assert row["transform"] == [10, 0, WEST + 10 * x, 0, -10, NORTH - 10 * y]
        assert row["tile_id"] == f"a/y{y:05}_x{x:05}"
    assert (covered == 1).all()
    assert set(table["crs"].to_pylist()) == {"EPSG:32632"}


def test_landsats_pan_band_starts_half_a_pixel_inside(make_cog: MakeCog, tmp_path: Path) -> None:
    coarse = np.arange(1, 17, dtype=np.uint16).reshape(4, 4)
    make_cog("red.tif", coarse, metres=30)
    make_cog("pan.tif", np.full((7, 7), 5, np.uint16), transform=from_origin(WEST + 7.5, NORTH - 7.5, 15, 15))
    path = items_file(tmp_path / "i.json", item("a", {"red": asset("red.tif"), "pan": asset("pan.tif")}))
    red = values(build_catalog(path, bands=["red", "pan"]).table, "red")[0, 0]
    # Centres lie at 15, 30, 45, ... m: on borders the next pixel.
    lines = np.array([0, 1, 1, 2, 2, 3, 3])
    np.testing.assert_array_equal(red, coarse[np.ix_(lines, lines)])


def test_only_the_files_of_the_bands_asked_for_are_read(make_cog: MakeCog, tmp_path: Path) -> None:
    make_cog("red.tif", np.full((4, 4), 7, np.uint16))
    gone = make_cog("nir.tif", np.full((4, 4), 8, np.uint16))
    path = items_file(tmp_path / "i.json", item("a", {"red": asset("red.tif"), "nir": asset("nir.tif")}))
    table = build_catalog(path, bands=["red", "nir"]).table
    gone.unlink()
    assert read_tiles(table, bands=["red"], size=4, fill=[0]).pixels.max() == 7
    batch = read_tiles(table, bands=["nir", "red"], size=4, fill=[0, 0])
    assert batch.status == ["failed"]
    assert "nir.tif" in str(batch.reason[0])
    assert read_tiles(table, bands=["blue"], size=4, fill=[0]).reason == ["it has no band blue"]


def test_the_etag_changes_with_any_file_and_with_the_units(make_cog: MakeCog, tmp_path: Path) -> None:
    etags = []
    for side, offset in ((4, 0), (5, 0), (5, 2)):
        make_cog("red.tif", np.ones((4, 4), np.uint8))
        make_cog("nir.tif", np.ones((side, side), np.uint8))
        scale = {"raster:bands": [{"scale": 1, "offset": offset}]}
        path = items_file(tmp_path / "i.json", item("a", {"red": asset("red.tif"), "nir": asset("nir.tif") | scale}))
        once, again = (build_catalog(path, bands=["red", "nir"]).table["source_etag"][0].as_py() for _ in range(2))
        assert once == again
        etags.append(once)
    assert len(set(etags)) == 3


def collection(tmp_path: Path, make_cog: MakeCog) -> pystac.Collection:
    """A static collection with two scenes, one beneath a catalog, as pystac writes it."""
    extent = pystac.Extent(
        pystac.SpatialExtent([10, 45, 11, 46]), pystac.TemporalExtent([[datetime(2022, 1, 1, tzinfo=UTC), None]])
    )
    root = pystac.Collection(
        "scenes",
        "Two scenes",
        extent,
        license="CC-BY-4.0",
        providers=[
            pystac.Provider("ESA", roles=[pystac.ProviderRole.PRODUCER, pystac.ProviderRole.LICENSOR]),
            pystac.Provider("A bucket", roles=[pystac.ProviderRole.HOST]),
        ],
    )
    below = pystac.Catalog("2023", "One scene")
    root.add_child(below)
    for holder, year in ((root, 2022), (below, 2023)):
        path = make_cog(f"pixels/{year}.tif", np.full((2, 20, 20), year, np.int16))
        scene = pystac.Item(
            f"scene-{year}",
            {"type": "Point", "coordinates": [10, 45]},
            [10, 45, 10, 45],
            datetime(year, 5, 1, 12, tzinfo=UTC),
            {"platform": "hopper-1", "eo:cloud_cover": 12.5},
        )
        bands = [{"name": "first", "eo:common_name": "red"}, {"name": "second", "eo:common_name": "nir"}]
        scene.add_asset(
            "image", pystac.Asset(str(path), media_type=TIFF, roles=["data"], extra_fields={"bands": bands})
        )
        scene.add_asset("thumbnail", pystac.Asset("none.png", media_type="image/png", roles=["thumbnail"]))
        holder.add_item(scene)
    root.normalize_hrefs(str(tmp_path))
    root.make_all_asset_hrefs_relative()
    root.save(pystac.CatalogType.SELF_CONTAINED)
    return root


def test_a_collection_as_pystac_writes_it(make_cog: MakeCog, tmp_path: Path) -> None:
    root = collection(tmp_path, make_cog)
    catalog = build_catalog(tmp_path / "collection.json", tile_size=16)
    rows = {row["tile_id"]: row for row in catalog.table.to_pylist()}
    assert len(rows) == 8
    for scene in root.get_items(recursive=True):  # pystac's own walk
        row = rows[f"{scene.id}/y00000_x00000"]
        assert row["source"] == scene.get_self_href()
        assert row["acquired_at"] == scene.datetime
        assert (row["sensor"], row["cloud_cover"]) == ("hopper-1", 12.5)
        assert row["bands"] == ["red", "nir"]
        assert [(one["href"], one["band"]) for one in row["assets"]] == [
            (scene.assets["image"].get_absolute_href(), 1),
            (scene.assets["image"].get_absolute_href(), 2),
        ]
    assert (catalog.metadata.licence, catalog.metadata.attribution) == ("CC-BY-4.0", "ESA")
    mine = build_catalog(tmp_path / "collection.json", licence="CC0", attribution="me").metadata
    assert (mine.licence, mine.attribution) == ("CC0", "me")
    write_catalog(catalog, tmp_path / "c.parquet")
    again = read_catalog(tmp_path / "c.parquet")
    assert again.table.drop(["nodata"]).equals(catalog.table.drop(["nodata"]))  # Arrow's NaN is no NaN's equal
    assert np.isnan(again.table["nodata"].to_numpy()).all()
    assert again.metadata == catalog.metadata
    years = values(again.select("height = 16 AND width = 16").table, "nir", "red")
    assert sorted(years.max(axis=(1, 2, 3)).tolist()) == [2022, 2023]


def test_stac_geoparquet(make_cog: MakeCog, tmp_path: Path) -> None:
    make_cog("a.tif", np.full((4, 4), 1500, np.uint16))
    make_cog("b.tif", np.full((4, 4), 500, np.uint16))
    first = {"B04": asset("a.tif", name="B04", common="red"), "B08": None}
    second = {"B04": None, "B08": asset("b.tif", name="B08", common="red")}
    rows: list[dict[str, Any]] = [
        {
            "type": "Feature", "stac_version": "1.0.0", "id": name, "assets": assets, "links": [], "collection": "c",
            "bbox": {"xmin": 1.0}, "geometry": b"?", "datetime": datetime(2022, 1, 1, tzinfo=UTC),
            "platform": "sentinel-2a", "s2:processing_baseline": baseline, "eo:cloud_cover": cover,
        }
        for name, assets, baseline, cover in (("a", first, "04.00", 3.5), ("b", second, "03.00", None))
    ]  # fmt: skip
    terms = {"rel": "license", "href": "https://example.org/terms"}
    stated = {"license": "proprietary", "providers": [{"name": "ESA"}], "links": [terms]}
    held = {"version": "1.1.0", "collections": {"c": stated}}
    table = pa.Table.from_pylist(rows).replace_schema_metadata({"stac-geoparquet": json.dumps(held)})
    pq.write_table(table, tmp_path / "items.parquet")
    catalog = build_catalog(tmp_path / "items.parquet", bands=["red"])
    np.testing.assert_array_equal(values(catalog.table, "red").max(axis=(1, 2, 3)), [500, 500])
    assert catalog.table["source"].to_pylist() == [f"{tmp_path}/items.parquet#{name}" for name in "ab"]
    assert catalog.table["cloud_cover"].to_pylist() == [3.5, None]
    assert catalog.table["acquired_at"][0].as_py() == datetime(2022, 1, 1, tzinfo=UTC)
    assert catalog.metadata.licence == "proprietary, https://example.org/terms"
    assert catalog.metadata.attribution == "ESA"


def test_names_of_bands(make_cog: MakeCog, tmp_path: Path) -> None:
    """As Earth Search has them: three red edges, a picture of three bands, JPEG 2000 beside COGs."""
    make_cog("one.tif", np.ones((4, 4), np.uint8))
    make_cog("three.tif", np.ones((3, 4, 4), np.uint8))
    assets = {
        "rededge1": asset("one.tif", name="B05", common="rededge"),
        "rededge2": asset("one.tif", name="B06", common="rededge"),
        "red": asset("one.tif", name="B04", common="red"),
        "picture": asset("three.tif") | {"eo:bands": [{"name": n, "common_name": n} for n in ("red", "green", "blue")]},
        "red-jp2": asset("one.jp2", name="B04", common="red") | {"type": "image/jp2"},
        "scl": asset("one.tif"),
    }
    path = items_file(tmp_path / "i.json", item("a", assets))
    assert build_catalog(path).table["bands"][0].as_py() == ["B05", "B06", "red", "green", "blue"]
    row = build_catalog(path, bands=["red", "green", "B06", "scl"]).table.to_pylist()[0]
    assert [Path(one["href"]).name for one in row["assets"]] == ["one.tif", "three.tif", "one.tif", "one.tif"]
    assert [one["band"] for one in row["assets"]] == [1, 2, 1, 1]
    with pytest.raises(BadSource, match="rededge may be any of its assets rededge1, rededge2"):
        build_catalog(path, bands=["rededge"])
    with pytest.raises(BadSource, match="has no GeoTIFF of nir; it has rededge, red"):
        build_catalog(path, bands=["nir"])


def test_an_item_that_cannot_be_read_is_a_failed_tile(make_cog: MakeCog, tmp_path: Path) -> None:
    make_cog("a.tif", np.ones((4, 4), np.uint8))
    scenes = [item(name, {"red": asset(href)}) for name, href in (("good", "a.tif"), ("gone", "b.tif"))]
    table = build_catalog(items_file(tmp_path / "i.json", *scenes), bands=["red"]).table
    batch = read_tiles(table, bands=["red"], size=4, fill=[0])
    assert dict(zip(table["tile_id"].to_pylist(), batch.status, strict=True)) == {
        "good/y00000_x00000": "valid",
        "gone": "failed",
    }
    assert "STAC item could not be read" in str(batch.reason[1])
    with pytest.raises(NotFound, match=r"b\.tif"):
        build_catalog(items_file(tmp_path / "i.json", scenes[1]), bands=["red"])


@pytest.mark.parametrize(
    ("href", "why"),
    [
        ("/etc/secret.tif", "outside the catalog's folder"),
        ("../../other.tif", "outside the catalog's folder"),
        ("file:///etc/secret.tif", "outside the catalog's folder"),
        ("gs://bucket/a.tif", "neither on a web server nor on S3"),
        ("zip://a.zip/b.tif", "neither on a web server nor on S3"),
        ("https://example.org/a.tif?sig=abc", "is signed"),
        ("https://me:word@example.org/a.tif", "is signed"),
        ("http://169.254.169.254/latest/a.tif", "local network"),
        ("http://localhost:8080/a.tif", "local network"),
        ("http://2130706433/a.tif", "local network"),
        ("http://0x7f.1/a.tif", "local network"),
        ("http://[::1]/a.tif", "local network"),
        ("https://10.1.2.3/a.tif", "local network"),
        ("a\n.tif", "is no link"),
        ("..\\a.tif", "is no link"),
    ],
)
def test_files_that_a_catalog_may_not_name(tmp_path: Path, href: str, why: str) -> None:
    path = items_file(tmp_path / "in" / "i.json", item("a", {"red": asset(href) | {"type": TIFF}}))
    with pytest.raises(BadSource, match=why) as caught:
        build_catalog(path, bands=["red"])
    assert "\n" not in str(caught.value)


def test_files_that_a_catalog_may_name(tmp_path: Path) -> None:
    found = {
        "/in/sub/i.json": {"../a.tif": "/in/a.tif", "./x/a.tif": "/in/sub/x/a.tif", "s3://b/k.tif": "s3://b/k.tif"},
        "https://data.example.org/c/i.json": {
            "a.tif": "https://data.example.org/c/a.tif",
            "/b.tif": "https://data.example.org/b.tif",
            "https://other.example.org/x/../b.tif": "https://other.example.org/b.tif",
        },
        "s3://bucket/c/i.json": {"../../../a.tif": "s3://bucket/a.tif"},
        "http://127.0.0.1:9000/c/i.json": {"http://127.0.0.1:9000/a.tif": "http://127.0.0.1:9000/a.tif"},
    }
    for base, hrefs in found.items():
        items = Items("/in/catalog.json" if base.startswith("/") else base)
        document = item("a", {})
        for href, url in hrefs.items():
            assert items.asset_url(items._item(document, base, base), href) == url


def test_over_https_and_sorted_for_encoding(make_cog: MakeCog, tmp_path: Path) -> None:
    """A catalog and its files on one web server; rows as `nec encode` sees them."""
    ground = np.arange(1, 401, dtype=np.uint16).reshape(20, 20)
    make_cog("in/p/new.tif", ground + 1000)
    write(
        tmp_path / "in/items/a.json", item("a", {"B03": asset("../p/new.tif")}, **{"s2:processing_baseline": "05.00"})
    )
    write(tmp_path / "in/catalog.json", links("./items/a.json"))
    with serve(tmp_path / "in") as web:
        catalog = build_catalog(f"{web.url}/catalog.json", bands=["B03"], tile_size=10)
        write_catalog(catalog, tmp_path / "c.parquet")
        (tmp_path / "sorted").mkdir()
        tiles = OrderedTiles(tmp_path / "c.parquet", tmp_path / "sorted").rows(0, 4)
        for row, pixels in zip(tiles.to_pylist(), values(tiles, "B03")[:, 0], strict=True):
            y, x = row["y_off"], row["x_off"]
            np.testing.assert_array_equal(pixels, ground[y : y + 10, x : x + 10])
            assert row["source"] == f"{web.url}/items/a.json"
            assert row["assets"][0]["href"] == f"{web.url}/p/new.tif"


def links(*hrefs: str, rel: str = "item") -> dict[str, Any]:
    return {"type": "Catalog", "stac_version": "1.0.0", "id": "c", "links": [{"rel": rel, "href": h} for h in hrefs]}


def test_hostile_documents(tmp_path: Path, make_cog: MakeCog) -> None:
    make_cog("a.tif", np.ones((4, 4), np.uint8))
    lies: list[tuple[Any, str]] = [
        ("[" * 100_000, "no JSON that reads"),
        ('{"type": "Catalog", "links": ' * 5_000, "no JSON that reads"),
        ("not json", "no JSON that reads"),
        ("[1, 2]", "no STAC document"),
        ({"type": "Topology"}, "no STAC Catalog"),
        ({"type": "FeatureCollection", "features": {"a": 1}}, "no list of items"),
        ({"type": "FeatureCollection", "features": [1]}, "no list of items"),
        ({"type": "FeatureCollection", "features": []}, "has no items"),
        ({"type": "FeatureCollection", "features": [], "links": [{"rel": "next", "href": "x"}]}, "one page of several"),
        (links("i.json", rel="child"), "has no items"),  # itself
        (links("../../etc/passwd"), "outside"),
        (links("https://example.org/item.json"), "outside"),
        (links("\x00"), "is no link"),
        (links("x", rel="items"), "behind an API"),
        (item("a\nb", {}), "id is no short text"),
        (item("a", {}) | {"id": 7}, "id is no short text"),
        (item("a", {}) | {"properties": None}, "no properties"),
        (item("a", {}) | {"assets": ["x"]}, "none of its assets"),
        (
            item("a", {"red": asset("a.tif") | {"raster:bands": [{"scale": "x"}]}}),
            "scale of its asset red is no number",
        ),
        (item("a", {"red": asset("a.tif") | {"raster:bands": [{"scale": 0}]}}), "scale of its asset red is 0"),
        (item("a", {"red": asset("a.tif") | {"raster:bands": [{"offset": float("inf")}]}}), "offset of its asset"),
        (item("a", {"red": asset("a.tif") | {"raster:bands": [{"offset": 10**400}]}}), "offset of its asset"),
        (
            item("a", {"red": asset("a.tif") | {"eo:bands": [{"name": "x"}, {"name": "y"}]}}),
            "which is not what it says",
        ),
        ({"type": "FeatureCollection", "features": [item("a", {"red": asset("a.tif")})] * 2}, "stands twice"),
    ]
    for document, why in lies:
        with pytest.raises(BadSource, match=why) as caught:
            build_catalog(write(tmp_path / "i.json", document))
        assert "\n" not in str(caught.value)
        assert len(str(caught.value)) < 1000
    (tmp_path / "big.json").write_bytes(b" " * ((32 << 20) + 1))
    with pytest.raises(BadSource, match="longer than 32 MiB"):
        build_catalog(tmp_path / "big.json")
    for name, data in (("text.parquet", b"PAR1 not"), ("plain.parquet", None)):
        if data is None:
            pq.write_table(pa.table({"x": [1]}), tmp_path / name)
        else:
            (tmp_path / name).write_bytes(data)
        with pytest.raises(BadSource, match=r"no Parquet file that reads|no stac-geoparquet"):
            build_catalog(tmp_path / name)


_json = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=4)
    | st.sampled_from(["a.tif", TIFF, "05.00"]),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=3), inner, max_size=2),
    max_leaves=4,
)


@given(data=st.data())
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_an_item_with_anything_anywhere_is_a_catalog_or_one_line(tmp_path: Path, data: st.DataObject) -> None:
    """A valid item of which a few places hold any JSON."""
    if not (tmp_path / "a.tif").exists():
        with rasterio.open(
            tmp_path / "a.tif", "w", driver="GTiff", count=1, height=4, width=4, dtype="uint8", crs="EPSG:32632",
            transform=from_origin(WEST, NORTH, 10, 10),
        ) as file:  # fmt: skip
            file.write(np.ones((1, 4, 4), np.uint8))
    bands = {"raster:bands": [{"scale": 0.0001, "offset": -0.1, "nodata": 0}], "providers": [{"name": "x"}]}
    scene = item("a", {"red": asset("a.tif", name="B04", common="red") | bands}, platform="sentinel-2a", license="CC0")
    scene["properties"] |= {"eo:cloud_cover": 1, "s2:processing_baseline": "05.00"}
    places: list[tuple[Any, Any]] = []

    def walk(value: Any) -> None:
        for key in value if isinstance(value, dict) else range(len(value)):
            places.append((value, key))
            if isinstance(value[key], dict | list):
                walk(value[key])

    walk(scene)
    for holder, key in data.draw(st.lists(st.sampled_from(places), min_size=1, max_size=3, unique_by=id)):
        holder[key] = data.draw(_json)
    try:
        catalog = build_catalog(write(tmp_path / "i.json", scene))
    except (BadSource, NotFound) as error:
        message = str(error)
    else:
        write_catalog(catalog, tmp_path / "c.parquet")
        assert len(read_catalog(tmp_path / "c.parquet")) == 1
        message = ""
    assert message.isprintable()


def test_a_loop_of_links_ends(make_cog: MakeCog, tmp_path: Path) -> None:
    make_cog("a.tif", np.ones((4, 4), np.uint8))
    write(tmp_path / "one.json", links("two.json", "one.json", "./x/../two.json", rel="child"))
    write(tmp_path / "two.json", links("one.json", "item.json", rel="child"))
    write(tmp_path / "item.json", item("a", {"red": asset("a.tif")}))
    assert build_catalog(tmp_path / "one.json").table["tile_id"].to_pylist() == ["a/y00000_x00000"]
    with pytest.raises(NotFound, match=r"gone\.json"):
        build_catalog(write(tmp_path / "three.json", links("gone.json")))


def test_grids_that_do_not_fit(make_cog: MakeCog, tmp_path: Path) -> None:
    make_cog("a.tif", np.ones((8, 8), np.uint8))
    others = {
        "CRS": make_cog("crs.tif", np.ones((8, 8), np.uint8), crs="EPSG:32633"),
        "does not cover": make_cog("small.tif", np.ones((3, 3), np.uint8), metres=20),
        "north up": make_cog(
            "turned.tif",
            np.ones((8, 8), np.uint8),
            transform=from_origin(WEST, NORTH, 10, 10) * rasterio.Affine.rotation(9),
        ),
        "outside its CRS": make_cog("nowhere.tif", np.ones((8, 8), np.uint8), transform=from_origin(1e15, 1e15, 1, 1)),
        "are not read": make_cog("complex.tif", np.ones((8, 8), np.complex64)),
    }
    for why, path in others.items():
        scene = item("a", {"red": asset("a.tif"), "nir": asset(path.name)})
        with pytest.raises(BadSource, match=why):
            build_catalog(items_file(tmp_path / "i.json", scene), bands=["red", "nir"])


def test_a_catalog_that_lies_about_its_files_gives_failed_tiles(make_cog: MakeCog, tmp_path: Path) -> None:
    make_cog("a.tif", np.ones((8, 8), np.uint8))
    row = build_catalog(items_file(tmp_path / "i.json", item("a", {"red": asset("a.tif")}))).table.to_pylist()[0]
    one = row["assets"][0]
    lies: list[tuple[dict[str, Any], str]] = [
        ({"width": 60_000, "height": 60_000}, "too large"),
        ({"width": 9}, "does not cover"),
        ({"transform": [10, 0, 0, 0, -10, 0]}, "does not cover"),
        ({"transform": [1e300, 0, 0, 0, -1e300, 0]}, "does not cover"),
        ({"transform": [0, 0, 0, 0, 0, 0]}, "north up"),
        ({"transform": None}, "cannot be read"),
        ({"crs": "EPSG:4326"}, "another CRS"),
        ({"assets": [one | {"band": 2}]}, "names number 2"),
        ({"assets": [one | {"href": None}]}, "names no file"),
        ({"assets": [None]}, "names no file"),
        ({"assets": [one, one]}, "names no file"),
    ]
    schema = build_catalog(tmp_path / "i.json").table.schema
    table = pa.Table.from_pylist([row | lie | {"tile_id": str(i)} for i, (lie, _) in enumerate(lies)], schema=schema)
    batch = read_tiles(table, bands=["red"], size=4, fill=[0])
    for (lie, why), status, reason in zip(lies, batch.status, batch.reason, strict=True):
        assert (status, why in str(reason)) == ("failed", True), (lie, reason)
    with pytest.raises(BadCatalog, match="assets is string"):
        write_catalog(
            type(build_catalog(tmp_path / "i.json"))(table.drop(["assets"]).append_column("assets", table["tile_id"])),
            tmp_path / "c.parquet",
        )

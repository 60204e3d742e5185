"""Labels and a head on the Landsat scene and its land-cover polygons (USGS, public domain)."""

import json
from pathlib import Path

import geopandas
import numpy as np
import pyarrow as pa
import pytest
import rasterio
import shapely

from nec_ray.contracts import arrow_schema
from nec_ray.evaluate.head import train_head
from nec_ray.evaluate.labels import LABEL_ROWS, read_labels
from tests.evaluate.sources import MemorySource, grid_rows

DATA = Path(__file__).parents[2] / ".." / "shared" / "data" / "landsat8"
SCENE = DATA / "LC08_L1TP_224078_20200518_RT_rgb.tif"
POLYGONS = DATA / "landcover_polygons.gpkg"
SIDE = 2  # pixels of a tile: the polygons are small

pytestmark = pytest.mark.skipif(not SCENE.is_file(), reason="../shared/data/landsat8 is not here")


def real_source() -> tuple[MemorySource, geopandas.GeoDataFrame]:
    """Tiles of 2 x 2 pixels around the polygons; a token is a pixel, its channels are the bands."""
    cover = geopandas.read_file(POLYGONS)
    left, bottom, right, top = cover.total_bounds
    with rasterio.open(SCENE) as data:
        window = rasterio.windows.from_bounds(left, bottom, right, top, data.transform)
        window = window.round_offsets().round_lengths()
        pixels = data.read(window=window).astype(np.float32) / 10_000
        transform = data.window_transform(window)
    rows, cols = pixels.shape[1] // SIDE, pixels.shape[2] // SIDE
    cut = pixels[:, : rows * SIDE, : cols * SIDE].reshape(3, rows, SIDE, cols, SIDE)
    x = cut.transpose(1, 3, 2, 4, 0).reshape(rows * cols, SIDE * SIDE, 3)
    row, col = np.divmod(np.arange(rows * cols), cols)
    step = SIDE * transform.a
    west, north = transform.c + col * step, transform.f - row * step
    shapes = geopandas.GeoSeries(shapely.box(west, north - step, west + step, north), crs=cover.crs).to_crs(4326)
    template = grid_rows(1, 1).to_pylist()[0]
    table = pa.Table.from_pylist(
        [
            template
            | {
                "tile_id": f"r{r}c{c}",
                "geometry": shape.wkb,
                "bbox": dict(zip(("xmin", "ymin", "xmax", "ymax"), shape.bounds, strict=True)),
            }
            for r, c, shape in zip(row.tolist(), col.tolist(), shapes, strict=True)
        ],
        schema=arrow_schema("index.json"),
    )
    return MemorySource(table, np.ascontiguousarray(x)), cover


def test_land_cover_is_learned_from_real_polygons(tmp_path: Path) -> None:
    source, cover = real_source()
    degrees = cover.to_crs(4326)
    features = [
        {"type": "Feature", "geometry": shapely.geometry.mapping(g), "properties": {"label": n}}
        for g, n in zip(degrees.geometry, degrees["name"], strict=True)
    ]
    path = tmp_path / "cover.geojson"
    path.write_text(json.dumps({"type": "FeatureCollection", "features": features}))
    labels = read_labels(path, source.table.select(list(LABEL_ROWS)))

    bounds = shapely.bounds(shapely.from_wkb(source.table["geometry"].to_pylist()))
    centres = shapely.points((bounds[:, 0] + bounds[:, 2]) / 2, (bounds[:, 1] + bounds[:, 3]) / 2)
    ids = np.array(source.table["tile_id"].to_pylist())
    expected = {
        name: label
        for shape, label in zip(degrees.geometry, degrees["name"], strict=True)
        for name in ids[shapely.contains(shape, centres)].tolist()
    }
    assert dict(zip(labels.tile_ids, np.array(labels.classes)[labels.target].tolist(), strict=True)) == expected
    assert labels.classes == ["crop", "developed", "tree", "water"]

    metrics = train_head(source, labels, tmp_path / "head")
    assert metrics["accuracy"] > 0.9 > metrics["majority"] + 0.2

"""Makes `landsat8_itaipu.tif`, the built-in scene, from the Landsat 8 scene it was cut from.

    python nec_ray/data/make_scene.py LC08_L1TP_224078_20200518_RT_rgb.tif [landsat8_itaipu.tif]

The source (uint16, red, green, blue, 30 m, 1860 rows x 2041 columns) is averaged two by two pixels to 60 m. A pixel
of which any of the four source pixels is missing is missing, so that no-data never mixes into a valid pixel. Kept
are 928 rows x 960 columns, whole tiles at 32 px; what falls away is 2 rows of no-data at the top and 60 columns
of fields at the left, which brings the file, losslessly compressed, under 3 MB.
"""

import argparse
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

FACTOR = 2
NODATA = 0
ROWS, COLUMNS = 928, 960
TOP, LEFT = 2, 60  # first row and column kept, of the averaged scene
BANDS = ("red", "green", "blue")
DESCRIPTION = (
    "Landsat 8 OLI scene 224/078 of 2020-05-18 (LC08_L1TP_224078_20200518_RT), bands 4, 3, 2, digital numbers "
    "averaged to 60 m: Itaipu reservoir, Ciudad del Este, Foz do Iguacu. U.S. Geological Survey, public domain."
)


def average(pixels: NDArray[np.uint16], factor: int = FACTOR) -> NDArray[np.uint16]:
    """Mean of each block of pixels, `NODATA` where any pixel of the block is missing in any band.

    Args:
        pixels: `(bands, rows, columns)`, digital numbers; rows and columns beyond a whole block are left out.
        factor: pixels of a block's side.

    Returns:
        `(bands, rows // factor, columns // factor)`, rounded to the nearest number.
    """
    bands, rows, columns = pixels.shape[0], pixels.shape[1] // factor, pixels.shape[2] // factor
    blocks = pixels[:, : rows * factor, : columns * factor].reshape(bands, rows, factor, columns, factor)
    valid = (blocks != NODATA).all(axis=(0, 2, 4))
    return np.where(valid, np.rint(blocks.mean(axis=(2, 4))), NODATA).astype(np.uint16)


def make_scene(source: Path, target: Path) -> None:
    """Write the built-in scene to `target` from the Landsat scene at `source`."""
    import rasterio
    from rasterio.enums import ColorInterp
    from rasterio.transform import from_origin

    with rasterio.open(source) as scene:
        pixels = average(scene.read())[:, TOP : TOP + ROWS, LEFT : LEFT + COLUMNS]
        at, crs = scene.transform, scene.crs
    step_x, step_y = at.a * FACTOR, at.e * FACTOR
    profile: dict[str, Any] = {
        "driver": "GTiff",
        "height": ROWS,
        "width": COLUMNS,
        "count": len(BANDS),
        "dtype": "uint16",
        "nodata": NODATA,
        "crs": crs,
        "transform": from_origin(at.c + LEFT * step_x, at.f + TOP * step_y, step_x, -step_y),
        "tiled": True,
        "blockxsize": 256,
        "blockysize": 256,
        "compress": "deflate",  # every TIFF reader has it
        "zlevel": 9,
        "predictor": 2,
        "interleave": "pixel",
        "photometric": "RGB",
    }
    with rasterio.open(target, "w", **profile) as file:
        file.colorinterp = (ColorInterp.red, ColorInterp.green, ColorInterp.blue)
        file.descriptions = BANDS
        # The product's name gives the day, not the time of day.
        file.update_tags(TIFFTAG_DATETIME="2020:05:18 00:00:00", TIFFTAG_IMAGEDESCRIPTION=DESCRIPTION)
        file.update_tags(ns="IMAGERY", SATELLITEID="LANDSAT_8", ACQUISITIONDATETIME="2020-05-18 00:00:00")
        file.write(pixels)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Make the built-in scene from the Landsat scene it was cut from.")
    parser.add_argument("source", type=Path)
    parser.add_argument("target", type=Path, nargs="?", default=Path(__file__).with_name("landsat8_itaipu.tif"))
    arguments = parser.parse_args()
    make_scene(arguments.source, arguments.target)

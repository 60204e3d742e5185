"""Labels of tiles of a MMEarth catalog: the class of ESA WorldCover that most of a tile's pixels have, as CSV."""

import sys
from pathlib import Path

import numpy as np

from nec_ray.tiles import read_catalog
from nec_ray.tiles.mmearth import read_modalities


def main(catalog: str, out: str) -> None:
    """Write `tile_id,label`; tiles without land cover are left out."""
    rows = read_catalog(catalog).table
    found = read_modalities(rows, ["esa_worldcover"])
    names = rows["tile_id"].to_pylist()
    with Path(out).open("w", encoding="utf-8") as file:
        file.write("tile_id,label\n")
        for row, pixels in zip(found.valid, found.values["esa_worldcover"], strict=True):
            known = pixels[pixels >= 0]
            if len(known):
                file.write(f"{names[row]},class {np.bincount(known).argmax()}\n")


if __name__ == "__main__":
    main(*sys.argv[1:])

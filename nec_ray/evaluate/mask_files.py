"""Files of masks: found for tiles by their names, and read whole or in windows as codes (see `ClassList`)."""

import io
import math
import re
import warnings
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from nec_ray.errors import BadLabels, NecError
from nec_ray.storage import Store
from nec_ray.tiles.rows import window_of

TIFFS = (".tif", ".tiff")
MASKS = (".png", *TIFFS)

_ISPRS = re.compile(r"(top_(?:potsdam|mosaic)_\w+?)_(?:RGB|RGBIR|IRRG|label|label_noBoundary)")
"""ISPRS's benchmarks have `top_potsdam_2_10_label_noBoundary.tif` for `top_potsdam_2_10_RGB.tif`."""
_LARGEST_READ = 1 << 26  # pixels of a mask that are held at a time
Codes = npt.NDArray[np.int32]
Ignored = npt.NDArray[np.bool_] | None
Window = tuple[int, int, int, int]
"""First row, first column, rows, columns."""


@dataclass(frozen=True)
class MaskOf:
    """Where the mask of a tile is."""

    tile: int
    """Row of the tile."""
    file: str
    window: Window | None
    """The tile's part of the file; all of it where it is None. It may end outside: see `clipped`."""


class MaskFile:
    """An open mask; `open_mask` makes one."""

    def __init__(self, where: str, shape: tuple[int, int], dataset: Any, codes: Codes | None) -> None:
        self.where = where
        self.shape = shape
        """Rows and columns."""
        self.dataset = dataset
        """Of rasterio; None for a PNG."""
        self._codes = codes

    def read(self, window: Window, *, is_colour: bool) -> tuple[Codes, Ignored]:
        """Codes int32 (rows, columns) of a window that lies inside, and which of them are nodata.

        Raises:
            BadLabels: pixels that are no classes, or that do not read.
        """
        row, col, rows, cols = window
        if rows * cols > _LARGEST_READ:
            raise BadLabels(f"{self.where}: {rows:,} x {cols:,} pixels for one tile are too many; make it coarser")
        if self._codes is not None:
            return self._codes[row : row + rows, col : col + cols], None
        return self._read_tiff(window, is_colour)

    def _read_tiff(self, window: Window, is_colour: bool) -> tuple[Codes, Ignored]:
        from rasterio.errors import RasterioError
        from rasterio.windows import Window as Place

        image = self.dataset
        row, col, rows, cols = window
        place = Place(col, row, cols, rows)
        try:
            if not is_colour:
                if image.count != 1 or np.dtype(image.dtypes[0]).kind not in "iu":
                    raise BadLabels(
                        f"{self.where}: {image.count} bands of {image.dtypes[0]}; masks have one band of whole "
                        "numbers, or colours that a classes.json names"
                    )
                codes = image.read(1, window=place).astype(np.int32)
                return codes, None if image.nodata is None else codes == image.nodata
            if image.dtypes[0] != "uint8":
                raise BadLabels(f"{self.where}: colours of type {image.dtypes[0]}; masks of colours are uint8")
            if image.count < 3:
                values = image.read(1, window=place)
                table = {value: (r << 16) | (g << 8) | b for value, (r, g, b, _) in image.colormap(1).items()}
                palette = np.array([table.get(value, 0) for value in range(256)], np.int32)
                return palette[values], None
            return _packed(image.read((1, 2, 3), window=place).transpose(1, 2, 0)), None
        except (RasterioError, ValueError) as error:
            raise BadLabels(f"{self.where}: does not read as a mask ({_line(error)}); restore it") from None


@contextmanager
def open_mask(store: Store, name: str, *, is_colour: bool) -> Iterator[MaskFile]:
    """Open a PNG or GeoTIFF.

    Raises:
        BadLabels: no such image, or a PNG of colours where values are wanted.
    """
    where = f"{store.url}/{name}"
    if not name.lower().endswith(TIFFS):
        codes = _read_png(where, store.read(name), is_colour)
        yield MaskFile(where, (codes.shape[0], codes.shape[1]), None, codes)
        return
    from rasterio.errors import RasterioError

    from nec_ray.tiles.geotiff import open_image

    opened = open_image(store, name)
    try:
        dataset = opened.__enter__()
    except RasterioError as error:
        raise BadLabels(f"{where}: does not read as a GeoTIFF ({_line(error)}); restore it") from None
    try:
        yield MaskFile(where, (dataset.height, dataset.width), dataset, None)
    finally:
        opened.__exit__(None, None, None)


def clipped(mask: MaskFile, window: Window | None, largest: tuple[int, int] | None, tile_id: str) -> Window:
    """The part of a mask that is a tile's, cut off at the image's edge.

    Args:
        mask: the open mask.
        window: see `MaskOf`.
        largest: rows and columns that the tiles of the image reach to at most; None where that is not known.
        tile_id: for the error.

    Raises:
        BadLabels: the mask is smaller or larger than the image that tiles were cut from.
    """
    rows, cols = mask.shape
    if window is None:
        return 0, 0, rows, cols
    row, col, height, width = window
    if row >= rows or col >= cols or (largest is not None and (rows > largest[0] or cols > largest[1])):
        raise BadLabels(
            f"{mask.where}: {cols} x {rows} pixels do not fit the image that tile {tile_id} was cut from; "
            "give a mask of the image's own size, or one mask a tile"
        )
    return row, col, min(height, rows - row), min(width, cols - col)


def find_masks(
    where: str, names: Sequence[str], rows: pa.Table, siblings: pa.Table
) -> tuple[list[MaskOf], dict[str, tuple[int, int]]]:
    """The mask of every tile that has one.

    A mask is a tile's if its path without the ending is the tile id (with or without an ending), or if it has the
    name of the tile's source image: of several such, the one whose folders agree best, counted from the file upwards
    (`tile_1/masks/a.png` for `tile_1/images/a.jpg`); names of ISPRS's benchmarks agree up to what they say of bands
    and labels. From a source's mask, a tile's window is cut; how large the
    windows are follows from the places of all of the image's tiles.

    Args:
        where: the folder of masks.
        names: files in it.
        rows: `tile_id`, `source` of the tiles to find masks for.
        siblings: `tile_id`, `source` of all tiles of the archive.

    Returns:
        The masks, and for each source's mask the rows and columns that its tiles reach to at most.

    Raises:
        BadLabels: two masks fit a tile equally well, or one mask two images.
    """
    by_stem: dict[str, str] = {}
    for name in names:
        other = by_stem.setdefault(_stem(name), name)
        if other != name:
            raise BadLabels(f"{where}: {other} and {name} are masks of one name; keep one")
    tile_ids, sources = rows["tile_id"].to_pylist(), rows["source"].to_pylist()
    found = []
    for tile, tile_id in enumerate(tile_ids):
        file = by_stem.get(tile_id) or by_stem.get(_stem(tile_id))
        if file and f"{where}/{file}" != sources[tile]:
            found.append(MaskOf(tile, file, None))
    own = {mask.tile for mask in found}
    rest = [tile for tile in range(len(tile_ids)) if tile not in own]
    of_source = _match_sources(where, names, sorted({sources[tile] for tile in rest}))
    sizes = _window_sizes(siblings, set(of_source))
    reach: dict[str, tuple[int, int]] = {}
    for tile in rest:
        file = of_source.get(sources[tile])
        if file is None:
            continue
        place = window_of(tile_ids[tile])
        if place is None:
            found.append(MaskOf(tile, file, None))
            continue
        size, last_row, last_col = sizes[sources[tile]]
        found.append(MaskOf(tile, file, (*place[1:], size or _LARGEST_READ, size or _LARGEST_READ)))
        if size:
            # Narrower windows at the edges may have been left out of the archive.
            reach[file] = (last_row + 2 * size - 1, last_col + 2 * size - 1)
    return found, reach


def _match_sources(where: str, names: Sequence[str], sources: Sequence[str]) -> dict[str, str]:
    """The mask of each source."""
    masks, images = defaultdict(list), defaultdict(list)
    for name in names:
        masks[_common_name(name)].append(name)
    for source in sources:
        images[_common_name(source)].append(source)
    of_source = {}
    for stem, candidates in masks.items():
        scores = {
            (source, name): _agreement(source, f"{where}/{name}")
            for source in images[stem]
            for name in candidates
            if source != f"{where}/{name}"
        }
        best_of_mask = _best(scores, 1)
        for source, (score, fitting) in _best(scores, 0).items():
            if len(fitting) > 1:
                raise BadLabels(f"{where}: {fitting[0]} and {fitting[1]} both fit {source}; give one of these folders")
            highest, rivals = best_of_mask[fitting[0]]
            if score < highest:  # it is another image's
                continue
            if len(rivals) > 1:
                raise BadLabels(
                    f"{where}: {fitting[0]} fits both {rivals[0]} and {rivals[1]}; "
                    "put masks in folders as the images are, or pick images with --where"
                )
            of_source[source] = fitting[0]
    return of_source


def _best(scores: dict[tuple[str, str], int], side: int) -> dict[str, tuple[int, list[str]]]:
    """For every name on one side of the pairs: the highest score, and who of the other side has it."""
    best: dict[str, tuple[int, list[str]]] = {}
    for pair, score in scores.items():
        highest, names = best.get(pair[side], (-1, []))
        if score >= highest:
            best[pair[side]] = (score, [*(names if score == highest else []), pair[1 - side]])
    return best


def _agreement(source: str, mask: str) -> int:
    """How many folders of two paths are the same, counted from the file upwards."""
    a, b = (path.split("/")[-2::-1] for path in (source, mask))
    return sum(x == y for x, y in zip(a, b, strict=False))


def _window_sizes(siblings: pa.Table, sources: set[str]) -> dict[str, tuple[int, int, int]]:
    """Pixels a side of a source's windows (0: the image is one window), and its last window's row and column."""
    rows: dict[str, set[int]] = defaultdict(set)
    cols: dict[str, set[int]] = defaultdict(set)
    for tile_id, source in zip(siblings["tile_id"].to_pylist(), siblings["source"].to_pylist(), strict=True):
        place = window_of(tile_id) if source in sources else None
        if place:
            rows[source].add(place[1])
            cols[source].add(place[2])
    return {name: (math.gcd(*rows[name], *cols[name]), max(rows[name]), max(cols[name])) for name in rows}


def _read_png(where: str, data: bytes, is_colour: bool) -> Codes:
    from PIL import Image, UnidentifiedImageError

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(io.BytesIO(data), formats=("PNG",)) as image:
                if is_colour:
                    return _packed(np.asarray(image.convert("RGB")))
                if image.mode not in {"1", "L", "P", "I;16", "I"}:
                    raise BadLabels(
                        f"{where}: a mask of colours; a classes.json beside the masks that says which colour is which "
                        'class is needed: {"name": "#RRGGBB"}'
                    )
                return np.asarray(image).astype(np.int32)
    except UnidentifiedImageError:
        raise BadLabels(f"{where}: no PNG that reads; restore it") from None
    except NecError:
        raise
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise BadLabels(f"{where}: does not read as a mask ({_line(error)}); restore it") from None


def _packed(rgb: npt.NDArray[Any]) -> Codes:
    red, green, blue = (rgb[..., i].astype(np.int32) for i in range(3))
    packed: Codes = red << 16 | green << 8 | blue
    return packed


def _stem(name: str) -> str:
    folder, slash, base = name.rpartition("/")
    return folder + slash + (base.rpartition(".")[0] or base)


def _common_name(name: str) -> str:
    """What an image and its mask are both called."""
    base = _stem(name).rpartition("/")[2]
    isprs = _ISPRS.fullmatch(base)
    return isprs[1] if isprs else base


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:160] or type(error).__name__

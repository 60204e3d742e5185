"""Masks for an archive's tiles: from a folder of masks or one label GeoTIFF, cut to tiles, split 80/20."""

import os
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from nec_ray.errors import BadLabels, NotFound
from nec_ray.evaluate.class_list import CLASSES_JSON, ClassList, Colour, read_class_list
from nec_ray.evaluate.labels import hash_split
from nec_ray.evaluate.mask_files import MASKS, TIFFS, MaskFile, clipped, find_masks, open_mask
from nec_ray.models.segmentation import IGNORED
from nec_ray.storage import Store, normalise_url, read_url
from nec_ray.tiles.geobench import GeobenchDataset
from nec_ray.tiles.rows import TASK_SPECS

MASK_ROWS = ("tile_id", "source", "crs", "transform", "grid")
"""Columns that `read_masks` needs of the archive's valid tiles."""

_PIXELS_A_TOKEN = 16  # a side, at most: a ViT-B/16's own pixels
Mask = npt.NDArray[np.uint8]


@dataclass(frozen=True)
class Masks:
    """A mask and a side of the split for each labelled tile, ordered by tile id."""

    tile_ids: list[str]
    classes: list[str]
    colours: list[Colour]
    """Of each class."""
    masks: Mask
    """uint8 (tiles, rows, columns): number of the pixel's class in `classes`, or `IGNORED`."""
    is_test: npt.NDArray[np.bool_]
    """(tiles,) whether the tile is kept for the score."""
    unmatched: int
    """Masks of a folder for which the archive has no valid tile; they were left out."""

    def __len__(self) -> int:
        return len(self.tile_ids)

    def pick(self, which: npt.NDArray[np.bool_]) -> "Masks":
        """Of some of the tiles; classes keep their numbers.

        Args:
            which: (tiles,) those to keep.
        """
        names = [name for name, kept in zip(self.tile_ids, which, strict=True) if kept]
        return replace(self, tile_ids=names, masks=self.masks[which], is_test=self.is_test[which])


def read_masks(
    path: str | os.PathLike[str],
    rows: pa.Table,
    siblings: pa.Table,
    *,
    classes: str | os.PathLike[str] | None = None,
) -> Masks:
    """Read masks and match them to tiles.

    `path` is a folder of PNGs or GeoTIFFs, found for tiles by their names (see `find_masks`), or one GeoTIFF with a
    georeference, from which every tile's mask is cut by nearest neighbour; or the folder of a GEO-Bench data set of
    masks, of whose default partition the samples to train on and to test are taken. A mask holds whole numbers, or
    colours that `classes` names (see `read_class_list`); 255 and a GeoTIFF's nodata value are ignored. Masks are
    brought to one size, the most frequent, of at most 16 pixels a side of a token. Of all but GEO-Bench a hash of the
    tile id keeps 20 % for the test.

    Args:
        path: path or URL.
        rows: `MASK_ROWS` of the archive's valid tiles.
        siblings: `tile_id`, `source` of all tiles of the archive.
        classes: path or URL of the list of classes; classes.json in the folder of masks or in the one above it where
            it is None, and the values found where there is none.

    Raises:
        NotFound: nothing is at `path` or `classes`.
        BadLabels: no mask is a tile's, masks that do not fit or do not read, values or colours that are no class,
            too many or too few classes, or no tile to test.
    """
    where = normalise_url(path)
    store, names = _files(where)
    if TASK_SPECS in names:
        return _from_geobench(where, rows)
    listed = _class_list(where, store, names, classes)
    found = _from_image(store, names[0], rows, listed) if names == [_base(where)] else None
    unmatched = 0
    if found is None:
        names = [name for name in names if name.lower().endswith(MASKS)]
        found, unmatched = _from_folder(where, store, names, rows, siblings, listed)
    return _assemble(where, found, rows["tile_id"].to_pylist(), listed, unmatched)


def _files(where: str) -> tuple[Store, list[str]]:
    folder, base = where.rpartition("/")[0] or "/", _base(where)
    outside = Store(folder)
    if not outside.exists(base):
        raise NotFound(f"{where}: nothing is there; check the path or URL")
    inside = outside.names(base)
    if inside == [base]:
        if not base.lower().endswith(TIFFS):
            raise BadLabels(f"{where}: segmentation needs a folder of masks or one label GeoTIFF; give one")
        return outside, inside
    names = [name.removeprefix(f"{base}/") for name in inside]
    return Store(where), [name for name in names if not any(part.startswith(".") for part in name.split("/"))]


def _class_list(where: str, store: Store, names: list[str], given: str | os.PathLike[str] | None) -> ClassList:
    if given is not None:
        return read_class_list(normalise_url(given), read_url(given))
    folders = [store] if names == [_base(where)] else [store, Store(where.rpartition("/")[0] or "/")]
    for folder in folders:
        if folder.exists(CLASSES_JSON):
            return read_class_list(f"{folder.url}/{CLASSES_JSON}", folder.read(CLASSES_JSON))
    return ClassList(None, is_colour=False, where=where)


def _from_folder(
    where: str, store: Store, names: list[str], rows: pa.Table, siblings: pa.Table, listed: ClassList
) -> tuple[dict[int, Mask], int]:
    """Masks by row of the tile, and how many files are no tile's."""
    matched, reach = find_masks(where, names, rows, siblings)
    tile_ids = rows["tile_id"].to_pylist()
    if not matched:
        raise BadLabels(
            f"{where}: {len(names):,} masks, none for a valid tile of the archive; masks are named like tiles, "
            f"such as {tile_ids[0]}, or like their source images, such as {_base(rows['source'][0].as_py())}"
        )
    most = _largest(rows)
    masks: dict[int, Mask] = {}
    for file, group in groupby(sorted(matched, key=lambda m: (m.file, m.tile)), key=lambda m: m.file):
        with open_mask(store, file, is_colour=listed.is_colour) as mask:
            for one in group:
                window = clipped(mask, one.window, reach.get(file), tile_ids[one.tile])
                codes, ignored = mask.read(window, is_colour=listed.is_colour)
                masks[one.tile] = resize_nearest(listed.numbers(codes, ignored, mask.where), *most)
    return masks, len(names) - len({m.file for m in matched})


def _from_image(store: Store, name: str, rows: pa.Table, listed: ClassList) -> dict[int, Mask]:
    """Masks by row of the tile, of the tiles that the image holds a part of."""
    with open_mask(store, name, is_colour=listed.is_colour) as image:
        if image.dataset.crs is None or rows["crs"].null_count + rows["transform"].null_count == 2 * rows.num_rows:
            what = "it has no georeference" if image.dataset.crs is None else "the archive's tiles have no georeference"
            raise BadLabels(f"{image.where}: {what}; give a folder of masks that are named like tiles or their sources")
        masks: dict[int, Mask] = {}
        for tile, codes, ignored in _cuts(image, rows, listed.is_colour):
            masks[tile] = listed.numbers(codes, ignored, image.where)
        if not masks:
            raise BadLabels(f"{image.where}: none of {rows.num_rows:,} tiles lies in it; give labels of the same place")
        return masks


def _from_geobench(where: str, rows: pa.Table) -> Masks:
    """Masks of a GEO-Bench data set, whose tiles `nec tiles build` names after its folder and samples."""
    dataset = GeobenchDataset(where)
    if dataset.task != "segmentation":
        raise BadLabels(f"{where}: a data set of {dataset.task}, which has no masks; leave out --task segmentation")
    splits, most = dataset.splits(), _largest(rows)
    tested = {f"{dataset.name}/{name}" for name in splits["test"]}
    trained = {f"{dataset.name}/{name}" for name in splits["train"]} - tested
    tile_ids = rows["tile_id"].to_pylist()
    masks = {}
    for tile, tile_id in enumerate(tile_ids):
        if tile_id in trained | tested:
            sample = dataset.sample(tile_id.partition("/")[2], dataset.bands[:1])
            masks[tile] = resize_nearest(np.asarray(sample.label, np.uint8), *most)
    if not masks:
        raise BadLabels(
            f"{where}: none of its samples is a valid tile of the archive, such as {tile_ids[0]}; "
            "encode the catalog of this folder"
        )
    listed = ClassList(dict(enumerate(dataset.classes)), is_colour=False, where=where)
    unmatched = len(trained) + len(tested) - len(masks)
    return _assemble(where, masks, tile_ids, listed, unmatched, tested.__contains__)


def _cuts(image: MaskFile, rows: pa.Table, is_colour: bool) -> Iterator[tuple[int, Any, Any]]:
    """(row of the tile, codes, what is nodata or outside), nearest neighbours of the tile's own pixels."""
    inverse = ~image.dataset.transform
    most = _largest(rows)
    places = zip(rows["crs"].to_pylist(), rows["transform"].to_pylist(), rows["grid"].to_pylist(), strict=True)
    for tile, (crs, numbers, grid) in enumerate(places):
        if crs is None or numbers is None:
            continue
        corners = np.array([[0, 0], [grid["cols"], 0], [0, grid["rows"]]], float)
        origin, right, down = _to_image(image, crs, inverse, *_apply(numbers, *corners.T)).T
        cols, rows_ = (_pixels(np.hypot(*(end - origin)), limit) for end, limit in ((right, most[1]), (down, most[0])))
        x = np.broadcast_to((np.arange(cols) + 0.5) * (grid["cols"] / cols), (rows_, cols))
        y = np.broadcast_to(((np.arange(rows_) + 0.5) * (grid["rows"] / rows_))[:, None], (rows_, cols))
        at = _to_image(image, crs, inverse, *_apply(numbers, x.ravel(), y.ravel()))
        col, row = np.floor(np.nan_to_num(at, nan=-1, posinf=-1, neginf=-1)).astype(np.int64).reshape(2, rows_, cols)
        inside = (row >= 0) & (col >= 0) & (row < image.shape[0]) & (col < image.shape[1])
        if not inside.any():
            continue
        top, left = int(row[inside].min()), int(col[inside].min())
        height, width = int(row[inside].max()) - top + 1, int(col[inside].max()) - left + 1
        codes, nodata = image.read((top, left, height, width), is_colour=is_colour)
        pick = np.where(inside, row - top, 0), np.where(inside, col - left, 0)
        yield tile, codes[pick], ~inside if nodata is None else ~inside | nodata[pick]


def _to_image(image: MaskFile, crs: str, inverse: Any, xs: Any, ys: Any) -> npt.NDArray[np.float64]:
    """(2, points): columns and rows of the image at places of another CRS."""
    from rasterio.crs import CRS
    from rasterio.errors import CRSError, RasterioError
    from rasterio.warp import transform

    try:
        theirs = CRS.from_user_input(crs)
        if theirs != image.dataset.crs:
            xs, ys = (np.array(side) for side in transform(theirs, image.dataset.crs, xs, ys))
    except (CRSError, RasterioError) as error:
        line = " ".join(str(error).split())[:160]
        raise BadLabels(f"{image.where}: its CRS and the tiles' do not translate ({line}); warp it to {crs}") from None
    return _apply(tuple(inverse)[:6], xs, ys)


def _apply(transform: Sequence[float], xs: Any, ys: Any) -> npt.NDArray[np.float64]:
    """(2, points): an affine transform (a, b, c, d, e, f) of points."""
    a, b, c, d, e, f = transform
    return np.stack([a * xs + b * ys + c, d * xs + e * ys + f])


def _assemble(
    where: str,
    found: dict[int, Mask],
    tile_ids: list[str],
    listed: ClassList,
    unmatched: int,
    tested: Callable[[str], bool] = hash_split,
) -> Masks:
    names, colours, renumber = listed.order()
    size = Counter(mask.shape for mask in found.values()).most_common(1)[0][0]
    order = sorted(found, key=tile_ids.__getitem__)
    masks = np.stack([renumber[_resized(found[tile], *size)] for tile in order])
    has_class = (masks != IGNORED).any(axis=(1, 2))
    if not has_class.any():
        raise BadLabels(f"{where}: no pixel of a class lies in any of {len(order):,} tiles; check place and values")
    masks, order = masks[has_class], [tile for tile, has in zip(order, has_class, strict=True) if has]
    is_test = np.array([tested(tile_ids[tile]) for tile in order], bool)
    if not is_test.any():
        raise BadLabels(f"{where}: none of {len(order)} labelled tiles is for the test; label more")
    trained = np.setdiff1d(masks[~is_test], [IGNORED])
    if len(trained) < 2:
        raise BadLabels(
            f"{where}: {len(trained)} classes among the tiles to train on, two are needed; label more tiles"
        )
    return Masks([tile_ids[tile] for tile in order], names, colours, masks, is_test, unmatched)


def resize_nearest(mask: Mask, rows: int, cols: int) -> Mask:
    """A mask brought down to at most so many rows and columns, nearest neighbour."""
    return _resized(mask, min(rows, mask.shape[0]), min(cols, mask.shape[1]))


def _resized(mask: Mask, rows: int, cols: int) -> Mask:
    if mask.shape == (rows, cols):
        return mask
    row = ((np.arange(rows) + 0.5) * mask.shape[0] / rows).astype(np.int64)
    col = ((np.arange(cols) + 0.5) * mask.shape[1] / cols).astype(np.int64)
    return mask[row[:, None], col]


def _largest(rows: pa.Table) -> tuple[int, int]:
    grid = rows["grid"][0].as_py()
    return grid["rows"] * _PIXELS_A_TOKEN, grid["cols"] * _PIXELS_A_TOKEN


def _pixels(wanted: float, most: int) -> int:
    return max(1, min(most, round(wanted))) if np.isfinite(wanted) else 1


def _base(path: str) -> str:
    return path.rpartition("/")[2]

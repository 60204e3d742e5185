"""Inference at the consumer: a trained head over pulled embeddings, to a table, a GeoTIFF or a folder of PNGs."""

import io
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from nec_ray.codec import Arrays, of_tiles
from nec_ray.errors import InputError
from nec_ray.evaluate.consumer import decoder_layer_of
from nec_ray.evaluate.fitting import Floats, Progress, device
from nec_ray.evaluate.head import predict_logits, predict_proba
from nec_ray.evaluate.mosaic import MOSAIC_ROWS, ClassMap, plan_mosaic, write_png, written_mosaic
from nec_ray.evaluate.segment import predict_classes
from nec_ray.models.dataset import EmbeddingSource, valid_rows
from nec_ray.models.head_files import HeadSpec, TrainedHead, load_head
from nec_ray.models.heads import ClassificationHead
from nec_ray.models.segmentation import PixelHead
from nec_ray.storage import Store
from nec_ray.tiles.geoparquet import geoparquet_bytes

TILES_PARQUET = "tiles.parquet"

_TILES_A_PULL = 2048
_MAPS_A_PULL = 256
_GEOTIFF = (".tif", ".tiff")


def predict(
    source: EmbeddingSource,
    head_dir: str | Path,
    where: str | None,
    out: Path,
    *,
    progress: Progress | None = None,
) -> pa.Table:
    """Apply a head to an archive's tiles and write what it says.

    A classification head writes a table, GeoParquet where tiles have a footprint. A segmentation head writes one
    GeoTIFF where `out` ends in .tif or .tiff: uint8 class numbers with a colour table, a quarter of a token a pixel,
    255 (nodata) where no tile lies. Otherwise `out` is a folder: a PNG of class numbers a tile, and tiles.parquet,
    which says whose each one is.

    Args:
        source: the archive.
        head_dir: folder that `train_head` or `train_segmentation_head` wrote.
        where: an SQL condition over `embeddings`; all valid tiles where it is None.
        out: file or folder to write.
        progress: called with the tiles done and the tiles in all.

    Returns:
        `tile_id`, and `label`, `confidence` (the label's probability), of several classes a tile lists of both
        (`labels`, `confidences`: classes likelier than not) or, of a folder, `path`; and `geometry`, `bbox`
        where known.

    Raises:
        NotFound, DataError, UnsupportedFormat: see `load_head`.
        CodecMismatch: embeddings of another encoder or shape than the head was trained for.
        InputError: no valid tile fits, `out` is not for this kind of head, or the tiles make no mosaic.
    """
    head = load_head(head_dir, lambda: decoder_layer_of(source, where))
    if isinstance(head.module, PixelHead):
        return _segment(source, head, head.module, where, out, progress)
    assert isinstance(head.module, ClassificationHead)
    if out.suffix.lower() in _GEOTIFF:
        raise InputError(f"{out}: a {head.spec.task} head says what a whole tile is; write a .parquet")
    return _classify(source, head, head.module, where, out, progress)


def _classify(
    source: EmbeddingSource,
    head: TrainedHead,
    module: ClassificationHead,
    where: str | None,
    out: Path,
    progress: Progress | None,
) -> pa.Table:
    rows = valid_rows(source, ["tile_id", "geometry", "bbox"], where)
    names = rows["tile_id"].to_pylist()
    say = _several if head.spec.task == "multi-label" else _one
    said: dict[str, tuple[Any, Any]] = {}
    for tile_ids, embeddings in _pulls(source, head, names, _TILES_A_PULL):
        said.update(zip(tile_ids, say(module, embeddings, head.spec.classes), strict=True))
        if progress:
            progress(len(said), len(names))
    label, confidence = ([said[name][i] for name in names] for i in (0, 1))
    columns = {"tile_id": pa.array(names, pa.string())}
    if head.spec.task == "multi-label":
        columns["labels"] = pa.array(label, pa.list_(pa.string()))
        columns["confidences"] = pa.array(confidence, pa.list_(pa.float32()))
    else:
        columns |= {"label": pa.array(label, pa.string()), "confidence": pa.array(confidence, pa.float32())}
    table = pa.table(columns)
    table = _with_footprints(table, rows)
    Store(out.absolute().parent).replace(out.name, _parquet(table))
    return table


def _one(module: ClassificationHead, embeddings: Floats, classes: Sequence[str]) -> list[tuple[str, float]]:
    """The likeliest class of each tile, and its probability."""
    probability = predict_proba(module, embeddings)
    best = probability.argmax(axis=1)
    return [(classes[i], float(row[i])) for row, i in zip(probability, best, strict=True)]


def _several(
    module: ClassificationHead, embeddings: Floats, classes: Sequence[str]
) -> list[tuple[list[str], list[float]]]:
    """The classes of each tile that are likelier than not, and their probabilities."""
    probability = 1 / (1 + np.exp(-predict_logits(module, embeddings).astype(np.float64)))
    there = [np.flatnonzero(row > 0.5) for row in probability]
    return [([classes[i] for i in some], row[some].tolist()) for row, some in zip(probability, there, strict=True)]


def _segment(
    source: EmbeddingSource,
    head: TrainedHead,
    module: PixelHead,
    where: str | None,
    out: Path,
    progress: Progress | None,
) -> pa.Table:
    rows = valid_rows(source, [*MOSAIC_ROWS, "geometry", "bbox"], where)
    module = module.to(device())
    names = rows["tile_id"].to_pylist()
    table = rows.select(["tile_id"])
    if out.suffix.lower() in _GEOTIFF:
        mosaic = plan_mosaic(source.url, rows)
        order = mosaic.order().tolist()
        with written_mosaic(out, mosaic, head.spec.classes, _colours(head.spec)) as image:
            _each_map(source, head, module, [names[i] for i in order], lambda n, m: image.put(order[n], m), progress)
        return _with_footprints(table, rows)
    if out.suffix or out.is_file():
        raise InputError(f"{out}: a segmentation head writes a GeoTIFF (.tif) or a folder of PNGs; name one of these")
    out.mkdir(parents=True, exist_ok=True)
    paths = [f"{i:06}.png" for i in range(len(names))]
    colours = _colours(head.spec)
    _each_map(source, head, module, names, lambda n, m: write_png(out / paths[n], m, colours), progress)
    table = _with_footprints(table.append_column("path", pa.array(paths, pa.string())), rows)
    Store(out.absolute()).replace(TILES_PARQUET, _parquet(table))
    return table


def _each_map(
    source: EmbeddingSource,
    head: TrainedHead,
    module: PixelHead,
    names: Sequence[str],
    put: Callable[[int, ClassMap], None],
    progress: Progress | None,
) -> None:
    """Call `put` with the number of each tile in `names` and its class map."""
    place = {name: i for i, name in enumerate(names)}
    done = 0
    for tile_ids, embeddings in _pulls(source, head, names, _MAPS_A_PULL):
        tiles = iter(sorted(place[name] for name in tile_ids))
        numbers = np.argsort([place[name] for name in tile_ids], kind="stable")
        for maps in predict_classes(module, of_tiles(embeddings, numbers)):
            for one in maps:
                put(next(tiles), one)
        done += len(tile_ids)
        if progress:
            progress(done, len(names))


def _pulls(
    source: EmbeddingSource, head: TrainedHead, names: Sequence[str], size: int
) -> Iterator[tuple[list[str], Arrays]]:
    """Tile ids and embeddings, as the head reads them, of `size` tiles at a time."""
    for start in range(0, len(names), size):
        pull = source.pull(layers=head.spec.layers, tile_ids=names[start : start + size])
        yield pull.tile_ids, head.embeddings(source.url, pull)


def _colours(spec: HeadSpec) -> list[tuple[int, int, int]]:
    assert spec.colours is not None
    return spec.colours


def _with_footprints(table: pa.Table, rows: pa.Table) -> pa.Table:
    if rows["geometry"].null_count < rows.num_rows:
        for column in ("geometry", "bbox"):
            table = table.append_column(rows.schema.field(column), rows[column])
    return table


def _parquet(table: pa.Table) -> bytes:
    if "geometry" in table.column_names:
        return geoparquet_bytes(table)
    buffer = io.BytesIO()
    pq.write_table(table, buffer, compression="zstd")
    return buffer.getvalue()

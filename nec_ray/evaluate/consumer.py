"""What `nec head` does on an archive, and the same head on embeddings that were never compressed."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from torch import nn

from nec_ray.codec import Arrays, Codec, joined, parts_of
from nec_ray.errors import InputError
from nec_ray.evaluate.fitting import Floats, Progress
from nec_ray.evaluate.head import evaluate_embeddings, train_head
from nec_ray.evaluate.labels import LABEL_ROWS, LabelledTiles, Labels, read_labels
from nec_ray.evaluate.masks import MASK_ROWS, Masks, read_masks
from nec_ray.evaluate.multi_label import MultiLabels, read_multi_labels, train_multi_label_head
from nec_ray.evaluate.segment import check_decoder, train_segmentation_head
from nec_ray.models.dataset import EmbeddingSource, on_finest, valid_rows
from nec_ray.models.embed import Embedder, first_decoder_layer, latent_medians
from nec_ray.models.head_files import DecoderLayer
from nec_ray.models.segmentation import SegmentationDecoder
from nec_ray.tiles import Catalog, read_tiles

_TILES_A_READ = 256


def train_head_on_archive(
    archive: EmbeddingSource,
    labels: str | os.PathLike[str] | None,
    out: Path,
    *,
    task: str = "classification",
    classes: str | os.PathLike[str] | None = None,
    decoder: SegmentationDecoder | None = None,
    decoder_layer: DecoderLayer = "none",
    layers: int | None = None,
    where: str | None = None,
    epochs: int | None = None,
    seed: int = 0,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Match labels to an archive's valid tiles, train a head on their embeddings, and write it to `out`.

    Args:
        archive: what `nec_ray.open_archive` gives.
        labels: path or URL, see `read_labels`, `read_multi_labels` and `read_masks`; for classification the archive's
            own `label` column where it is None.
        out: folder to write to.
        where: an SQL condition over `embeddings`: only these tiles are trained on and tested.
        task: `classification`, `multi-label` or `segmentation`.
        classes: path or URL of the list of classes of masks, see `read_masks`.
        decoder: of segmentation, see `train_segmentation_head`.
        decoder_layer: see `train_head`, like all that follow; the layer itself is taken from the tiles' codec, like
            the medians that stand for the channels which `layers` leaves out.
        layers: see `train_head`.
        epochs: see `train_head`.
        seed: see `train_head`.
        progress: see `train_head`.

    Returns:
        What metrics.json holds, see `train_head`, `train_multi_label_head` and `train_segmentation_head`.

    Raises:
        NotFound, BadLabels: see `read_labels` and `read_masks`.
        InputError: an unknown task, options that contradict each other, or see `train_head`.
        MixedCodecs: see `train_head`.
    """
    _check_task(task, labels, classes, decoder)
    check_decoder(decoder, decoder_layer)  # before masks are read
    how: dict[str, Any] = {"layers": layers, "epochs": epochs, "seed": seed, "progress": progress}
    known: Labels | MultiLabels | Masks
    if task == "classification":
        known = read_tile_labels(archive, labels, where)
    elif task == "multi-label":
        known = read_multi_labels(str(labels), valid_rows(archive, ["tile_id"], where)["tile_id"].to_pylist())
    else:
        known = read_tile_masks(archive, str(labels), classes, where)
    return train_on_labels(archive, known, out, decoder=decoder, decoder_layer=decoder_layer, where=where, **how)


def train_on_labels(
    archive: EmbeddingSource,
    known: Labels | MultiLabels | Masks,
    out: Path,
    *,
    decoder: SegmentationDecoder | None = None,
    decoder_layer: DecoderLayer = "none",
    layers: int | None = None,
    where: str | None = None,
    epochs: int | None = None,
    seed: int = 0,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """What `train_head_on_archive` does with labels or masks that are read; arguments are the same."""
    how: dict[str, Any] = {"layers": layers, "epochs": epochs, "seed": seed, "progress": progress}
    if decoder_layer != "none":
        how |= {
            "decoder_layer": decoder_layer,
            "first_layer": decoder_layer_of(archive, where),
            "medians": latent_medians(archive.codecs(where)[0]),
        }
    if isinstance(known, Masks):
        return train_segmentation_head(archive, known, out, decoder=decoder, **how)
    if isinstance(known, MultiLabels):
        return train_multi_label_head(archive, known, out, **how)
    return train_head(archive, known, out, **how)


def compare_with_uncompressed(
    archive: EmbeddingSource,
    labels: str | os.PathLike[str] | None,
    catalog: Catalog,
    codec: Codec,
    *,
    where: str | None = None,
    epochs: int | None = None,
    seed: int = 0,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Score the head that `train_head_on_archive` trains, on the encoder's latents before they are rounded.

    Labels, tiles, split, head and seed are the same: what differs in the score is what compression cost.

    Args:
        archive: whose tiles are compared.
        labels: see `train_head_on_archive`.
        catalog: where the tiles' pixels are.
        codec: whose encoder makes the latents.
        where: see `train_head_on_archive`, like all that follow.
        epochs: see `train_head`.
        seed: see `train_head`.
        progress: see `train_head`.

    Returns:
        `accuracy`, `balanced_accuracy`, `majority`, `tiles`, and `bytes_per_tile` of the latents as float32.

    Raises:
        InputError: the catalog lacks a labelled tile, or its pixels cannot be read.
    """
    known = read_tile_labels(archive, labels, where)
    x = on_finest(uncompressed_latents(known, catalog, codec), [scale.grid for scale in codec.scales()])
    return score_latents(x, known, codec, epochs=epochs, seed=seed, progress=progress)


def score_latents(
    x: Floats,
    known: Labels,
    codec: Codec,
    *,
    epochs: int | None = None,
    seed: int = 0,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Train and score the head on a codec's latents float32 (tiles, tokens, channels) of labelled tiles, in order.

    Returns:
        See `compare_with_uncompressed`.
    """
    test = known.is_test
    scores = evaluate_embeddings(
        x[~test],
        known.target[~test],
        x[test],
        known.target[test],
        classes=len(known.classes),
        epochs=epochs,
        seed=seed,
        progress=progress,
    ).scores
    return {
        "accuracy": scores.accuracy,
        "balanced_accuracy": scores.balanced_accuracy,
        "majority": scores.majority,
        "tiles": len(known),
        "bytes_per_tile": 4 * codec.spec.values,  # coarse tokens stand in `x` more than once
    }


def decoder_layer_of(source: EmbeddingSource, where: str | None = None) -> nn.Module:
    """The first decoder layer of the codec of the tiles that a condition picks."""
    codecs = source.codecs(where)
    if not codecs:
        raise InputError(f"{source.url}: no valid tile fits{f' {where}' if where else ''}; change the condition")
    return first_decoder_layer(codecs[0])


def _check_task(task: str, labels: object, classes: object, decoder: object) -> None:
    if task not in {"classification", "multi-label", "segmentation"}:
        raise InputError(f"task {task!r}: use classification, multi-label or segmentation")
    if task == "multi-label" and labels is None:
        raise InputError("several classes a tile need labels: give --labels a table of tile_id and labels")
    if task == "segmentation" and labels is None:
        raise InputError("segmentation needs masks: give --labels a folder of masks or a label GeoTIFF")
    if task != "segmentation" and classes is not None:
        raise InputError("a list of classes is for masks, that is for segmentation; leave it out")
    if task != "segmentation" and decoder is not None:
        raise InputError(f"decoder {decoder} is for segmentation; leave it out")


def read_tile_labels(archive: EmbeddingSource, labels: str | os.PathLike[str] | None, where: str | None) -> Labels:
    """Labels of an archive's valid tiles, see `train_head_on_archive`."""
    return read_labels(labels, valid_rows(archive, LABEL_ROWS, where))


def read_tile_masks(
    archive: EmbeddingSource, masks: str, classes: str | os.PathLike[str] | None, where: str | None
) -> Masks:
    """Masks of an archive's valid tiles, see `train_head_on_archive`."""
    siblings = archive.rows(["tile_id", "source"])
    return read_masks(masks, valid_rows(archive, MASK_ROWS, where), siblings, classes=classes)


def uncompressed_latents(labels: LabelledTiles, catalog: Catalog, codec: Codec) -> Arrays:
    """The encoder's latents before they are rounded, float32 (tiles, tokens, channels) in the labels' order.

    Of several grid scales, a tuple of one such array a scale.

    Raises:
        InputError: the catalog lacks a labelled tile, or its pixels cannot be read.
    """
    place, rows = labelled_rows(labels, catalog)
    spec, embedder = codec.spec.input, Embedder(codec)
    out = [np.empty((len(place), *shape), np.float32) for shape in codec.spec.embedding_shapes()]
    for part in parts(rows):
        names = part["tile_id"].to_pylist()
        batch = read_tiles(part, bands=spec.bands, size=spec.size, fill=spec.mean)
        for name, status, reason in zip(names, batch.status, batch.reason, strict=True):
            check_valid(name, status, reason)
        for whole, latents in zip(out, parts_of(embedder.latents(batch.pixels)), strict=True):
            whole[[place[name] for name in names]] = latents
    return joined(out)


def labelled_rows(labels: LabelledTiles, catalog: Catalog) -> tuple[dict[str, int], pa.Table]:
    """Place of each labelled tile in the labels' order, and the tiles' catalog rows in the catalog's.

    Raises:
        InputError: the catalog lacks a labelled tile.
    """
    place = {name: i for i, name in enumerate(labels.tile_ids)}
    rows = catalog.where_ids(labels.tile_ids).table
    if rows.num_rows < len(place):
        lost = min(set(place) - set(rows["tile_id"].to_pylist()))
        raise InputError(
            f"{catalog.url or 'the catalog'}: labelled tile {lost} is not in it; give the one it was encoded from"
        )
    return place, rows


def parts(rows: pa.Table) -> Iterator[pa.Table]:
    """Catalog rows, as many at a time as are held in memory with their pixels."""
    for start in range(0, rows.num_rows, _TILES_A_READ):
        yield rows.slice(start, _TILES_A_READ)


def check_valid(name: str, status: str, reason: str | None) -> None:
    """Check what became of a labelled tile's pixels.

    Raises:
        InputError: it was not read.
    """
    if status != "valid":
        raise InputError(f"labelled tile {name} cannot be read: {reason}; restore its source")

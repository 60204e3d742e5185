"""What `nec head` does on an archive, and the same head on embeddings that were never compressed."""

import math
import os
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from torch import nn

from nec_ray.codec import Codec, parts_of
from nec_ray.errors import InputError
from nec_ray.evaluate.fitting import Floats, Progress
from nec_ray.evaluate.head import evaluate_embeddings, train_head
from nec_ray.evaluate.labels import LABEL_ROWS, Labels, read_labels
from nec_ray.evaluate.masks import MASK_ROWS, read_masks
from nec_ray.evaluate.segment import train_segmentation_head
from nec_ray.models.dataset import EmbeddingSource, enlarged_to, valid_rows
from nec_ray.models.embed import Embedder, first_decoder_layer, latent_medians
from nec_ray.models.head_files import DecoderLayer
from nec_ray.tiles import Catalog, read_tiles

_TILES_A_READ = 256


def train_head_on_archive(
    archive: EmbeddingSource,
    labels: str | os.PathLike[str] | None,
    out: Path,
    *,
    task: str = "classification",
    classes: str | os.PathLike[str] | None = None,
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
        labels: path or URL, see `read_labels` and, for segmentation, `read_masks`; the archive's own `label` column
            where it is None.
        out: folder to write to.
        where: an SQL condition over `embeddings`: only these tiles are trained on and tested.
        task: `classification` or `segmentation`.
        classes: path or URL of the list of classes of masks, see `read_masks`.
        decoder_layer: see `train_head`, like all that follow; the layer itself is taken from the tiles' codec, like
            the medians that stand for the channels which `layers` leaves out.
        layers: see `train_head`.
        epochs: see `train_head`.
        seed: see `train_head`.
        progress: see `train_head`.

    Returns:
        What metrics.json holds, see `train_head` and `train_segmentation_head`.

    Raises:
        NotFound, BadLabels: see `read_labels` and `read_masks`.
        InputError: an unknown task, options that contradict each other, or see `train_head`.
        MixedCodecs: see `train_head`.
    """
    _check_task(task, labels, classes)
    how: dict[str, Any] = {"layers": layers, "epochs": epochs, "seed": seed, "progress": progress}
    if decoder_layer != "none":
        how |= {
            "decoder_layer": decoder_layer,
            "first_layer": decoder_layer_of(archive, where),
            "medians": latent_medians(archive.codecs(where)[0]),
        }
    if task == "classification":
        return train_head(archive, read_tile_labels(archive, labels, where), out, **how)
    siblings = archive.rows(["tile_id", "source"])
    masks = read_masks(str(labels), valid_rows(archive, MASK_ROWS, where), siblings, classes=classes)
    return train_segmentation_head(archive, masks, out, **how)


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
    return score_latents(
        uncompressed_latents(known, catalog, codec), known, codec, epochs=epochs, seed=seed, progress=progress
    )


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
        "bytes_per_tile": 4 * codec.spec.symbols,  # coarse tokens stand in `x` more than once
    }


def decoder_layer_of(source: EmbeddingSource, where: str | None = None) -> nn.Module:
    """The first decoder layer of the codec of the tiles that a condition picks."""
    codecs = source.codecs(where)
    if not codecs:
        raise InputError(f"{source.url}: no valid tile fits{f' {where}' if where else ''}; change the condition")
    return first_decoder_layer(codecs[0])


def _check_task(task: str, labels: object, classes: object) -> None:
    if task not in {"classification", "segmentation"}:
        raise InputError(f"task {task!r}: use classification or segmentation")
    if task == "segmentation" and labels is None:
        raise InputError("segmentation needs masks: give --labels a folder of masks or a label GeoTIFF")
    if task == "classification" and classes is not None:
        raise InputError("a list of classes is for masks, that is for segmentation; leave it out")


def read_tile_labels(archive: EmbeddingSource, labels: str | os.PathLike[str] | None, where: str | None) -> Labels:
    """Labels of an archive's valid tiles, see `train_head_on_archive`."""
    return read_labels(labels, valid_rows(archive, LABEL_ROWS, where))


def uncompressed_latents(labels: Labels, catalog: Catalog, codec: Codec) -> Floats:
    """The encoder's latents before they are rounded, float32 (tiles, tokens, channels) in the labels' order.

    Several grid scales are on the finest grid, as heads read them.

    Raises:
        InputError: the catalog lacks a labelled tile, or its pixels cannot be read.
    """
    place = {name: i for i, name in enumerate(labels.tile_ids)}
    rows = catalog.table.filter(pc.is_in(catalog.table["tile_id"], pa.array(labels.tile_ids, pa.string())))
    if rows.num_rows < len(place):
        lost = min(set(place) - set(rows["tile_id"].to_pylist()))
        raise InputError(
            f"{catalog.url or 'the catalog'}: labelled tile {lost} is not in it; give the one it was encoded from"
        )
    spec, embedder = codec.spec.input, Embedder(codec)
    scales = codec.scales()
    grid = codec.spec.token_grid
    out = np.empty((len(place), math.prod(grid), codec.spec.channels), np.float32)
    for start in range(0, rows.num_rows, _TILES_A_READ):
        part = rows.slice(start, _TILES_A_READ)
        names = part["tile_id"].to_pylist()
        batch = read_tiles(part, bands=spec.bands, size=spec.size, fill=spec.mean)
        for name, status, reason in zip(names, batch.status, batch.reason, strict=True):
            if status != "valid":
                raise InputError(f"labelled tile {name} cannot be read: {reason}; restore its source")
        latents = parts_of(embedder.latents(batch.pixels))
        out[[place[name] for name in names]] = enlarged_to(grid, latents, [scale.grid for scale in scales])
    return out

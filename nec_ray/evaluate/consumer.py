"""What `nec head` does on an archive, and the same head on embeddings that were never compressed."""

import os
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from torch import nn

from nec_ray.codec import Codec
from nec_ray.errors import InputError
from nec_ray.evaluate.head import Progress, evaluate_embeddings, train_head
from nec_ray.evaluate.labels import LABEL_ROWS, Labels, read_labels
from nec_ray.models.dataset import EmbeddingSource, valid_rows
from nec_ray.models.embed import Embedder, first_decoder_layer
from nec_ray.models.heads import DecoderLayer
from nec_ray.tiles import Catalog, read_tiles

_TILES_A_READ = 256


def train_head_on_archive(
    archive: EmbeddingSource,
    labels: str | os.PathLike[str] | None,
    out: Path,
    *,
    task: str = "classification",
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
        labels: path or URL, see `read_labels`; the archive's own `label` column where it is None.
        out: folder to write to.
        where: an SQL condition over `embeddings`: only these tiles are trained on and tested.
        task: see `train_head`, like all that follow.
        decoder_layer: the layer itself is taken from the tiles' codec.
        layers: see `train_head`.
        epochs: see `train_head`.
        seed: see `train_head`.
        progress: see `train_head`.

    Returns:
        What metrics.json holds, see `train_head`.

    Raises:
        NotFound, BadLabels: see `read_labels`.
        InputError, MixedCodecs: see `train_head`.
    """
    return train_head(
        archive,
        _labels(archive, labels, where),
        out,
        task=task,
        decoder_layer=decoder_layer,
        first_layer=None if decoder_layer == "none" else decoder_layer_of(archive, where),
        layers=layers,
        epochs=epochs,
        seed=seed,
        progress=progress,
    )


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
    known = _labels(archive, labels, where)
    x = _latents(known, catalog, codec)
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
        "bytes_per_tile": x[0].nbytes,
    }


def decoder_layer_of(source: EmbeddingSource, where: str | None = None) -> nn.Module:
    """The first decoder layer of the codec of the tiles that a condition picks."""
    codecs = source.codecs(where)
    if not codecs:
        raise InputError(f"{source.url}: no valid tile fits{f' {where}' if where else ''}; change the condition")
    return first_decoder_layer(codecs[0])


def _labels(archive: EmbeddingSource, labels: str | os.PathLike[str] | None, where: str | None) -> Labels:
    return read_labels(labels, valid_rows(archive, LABEL_ROWS, where))


def _latents(labels: Labels, catalog: Catalog, codec: Codec) -> np.ndarray[Any, np.dtype[np.float32]]:
    """Latents float32 (tiles, tokens, channels) in the labels' order."""
    place = {name: i for i, name in enumerate(labels.tile_ids)}
    rows = catalog.table.filter(pc.is_in(catalog.table["tile_id"], pa.array(labels.tile_ids, pa.string())))
    if rows.num_rows < len(place):
        lost = min(set(place) - set(rows["tile_id"].to_pylist()))
        raise InputError(
            f"{catalog.url or 'the catalog'}: labelled tile {lost} is not in it; give the one it was encoded from"
        )
    spec, embedder = codec.spec.input, Embedder(codec)
    out = np.empty((len(place), codec.spec.tokens, codec.spec.channels), np.float32)
    for start in range(0, rows.num_rows, _TILES_A_READ):
        part = rows.slice(start, _TILES_A_READ)
        names = part["tile_id"].to_pylist()
        batch = read_tiles(part, bands=spec.bands, size=spec.size, fill=spec.mean)
        for name, status, reason in zip(names, batch.status, batch.reason, strict=True):
            if status != "valid":
                raise InputError(f"labelled tile {name} cannot be read: {reason}; restore its source")
        out[[place[name] for name in names]] = embedder.latents(batch.pixels)
    return out

"""Heads for tiles that have several classes at once, such as BigEarthNet's: labels, training, scores."""

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.csv as pa_csv
import pyarrow.parquet as pq
import torch
from torch import nn

from nec_ray.errors import BadLabels
from nec_ray.evaluate.fitting import Floats, Front, Progress, align
from nec_ray.evaluate.head import METRICS_JSON, fit_classifier, predict_logits
from nec_ray.evaluate.labels import is_test_side
from nec_ray.evaluate.metrics import average_precision, mean_average_precision, micro_f1
from nec_ray.models.dataset import EmbeddingSource, on_one_grid
from nec_ray.models.head_files import DecoderLayer, save_head
from nec_ray.storage import normalise_url, read_url

_SEPARATOR = ";"
_WANTED = ("tile_id", "labels", "split")


@dataclass(frozen=True)
class MultiLabels:
    """Classes and a side of the split for each labelled tile, ordered by tile id."""

    tile_ids: list[str]
    classes: list[str]
    """Names, sorted."""
    flags: npt.NDArray[np.bool_]
    """(tiles, classes) whether the tile has the class; a tile may have none."""
    is_test: npt.NDArray[np.bool_]
    """(tiles,) whether the tile is kept for the score."""
    unmatched: int
    """Records for which the archive has no valid tile; they were left out."""

    def __len__(self) -> int:
        return len(self.tile_ids)


def read_multi_labels(path: str | os.PathLike[str], tile_ids: Sequence[str]) -> MultiLabels:
    """Read labels and match them to tiles.

    A Parquet table has columns `tile_id` and `labels`, a list of texts, as the catalogs of GEO-Bench's multi-label data
    sets; a CSV has `labels` with `;` between them. `split` is as `read_labels` has it. A tile whose list is null is
    left out; one whose list is empty has no class.

    Args:
        path: path or URL.
        tile_ids: of the archive's valid tiles.

    Raises:
        NotFound: nothing is at `path`.
        BadLabels: the file is none of these, matches no tile, names a tile twice, or leaves fewer than two classes, or
            no tile, to train on or to test.
    """
    where = normalise_url(path)
    table = _read(where)
    known = set(tile_ids)
    found: dict[str, tuple[list[str], bool]] = {}
    unmatched = 0
    for tile_id, labels, split in zip(*(table[name].to_pylist() for name in _WANTED), strict=True):
        side = is_test_side(where, split, tile_id)
        if labels is None or side is None:
            continue
        if tile_id not in known:
            unmatched += 1
            continue
        if tile_id in found:
            raise BadLabels(f"{where}: tile {tile_id} is named twice; label it once")
        found[tile_id] = [label for label in labels if label], side
    if not found:
        raise BadLabels(f"{where}: {unmatched:,} tiles with labels, none of them a valid tile of the archive")
    names = sorted(found)
    classes = sorted({label for labels, _ in found.values() for label in labels})
    number = {label: i for i, label in enumerate(classes)}
    flags = np.zeros((len(names), len(classes)), bool)
    for row, name in enumerate(names):
        flags[row, [number[label] for label in found[name][0]]] = True
    is_test = np.array([found[name][1] for name in names], bool)
    if flags[~is_test].any(axis=0).sum() < 2 or not flags[is_test].any():
        raise BadLabels(f"{where}: two classes are needed among the tiles to train on, and one among those to test")
    return MultiLabels(names, classes, flags, is_test, unmatched)


def train_multi_label_head(
    source: EmbeddingSource,
    labels: MultiLabels,
    out: Path,
    *,
    decoder_layer: DecoderLayer = "none",
    first_layer: nn.Module | None = None,
    medians: Floats | None = None,
    layers: int | None = None,
    epochs: int | None = None,
    seed: int = 0,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """As `train_head`, with a binary cross entropy for each class; writes head.safetensors, head.json, metrics.json.

    Returns:
        What metrics.json holds: `map` and `micro_f1` of the test tiles, `average_precision` of each class (null where
        no test tile has it), the numbers of tiles and of bytes pulled a tile.

    Raises:
        The same as `train_head`.
    """
    front = Front(decoder_layer, first_layer, medians)
    front.check(layers)
    pull = source.pull(layers=layers, tile_ids=labels.tile_ids)
    embeddings, take = on_one_grid(pull), align(source.url, pull, labels.tile_ids)
    train, test = take[~labels.is_test], take[labels.is_test]
    target = torch.from_numpy(labels.flags[~labels.is_test].astype(np.float32))

    def loss(logits: torch.Tensor, tiles: torch.Tensor) -> torch.Tensor:
        return nn.functional.binary_cross_entropy_with_logits(logits, target[tiles].to(logits.device))

    head, done = fit_classifier(embeddings[train], len(labels.classes), loss, front, epochs, seed, progress)
    truth, logits = labels.flags[labels.is_test], predict_logits(head, embeddings[test])
    spec = save_head(
        out,
        head,
        task="multi-label",
        classes=labels.classes,
        encoder_id=pull.encoder_id,
        layers=layers,
        decoder_layer=decoder_layer,
        tokens=embeddings.shape[1],
        channels=embeddings.shape[2],
        coded_channels=pull.coded_channels,
    )
    metrics = {
        "task": "multi-label",
        "map": mean_average_precision(truth, logits),
        "micro_f1": micro_f1(truth, logits > 0),
        "tiles": len(labels),
        "train_tiles": len(train),
        "test_tiles": len(test),
        "unmatched_labels": labels.unmatched,
        "bytes_per_tile": float(pull.n_bytes[take].mean()),
        "classes": labels.classes,
        "average_precision": [average_precision(truth[:, i], logits[:, i]) for i in range(len(labels.classes))],
        "encoder_id": spec.encoder_id,
        "decoder_layer": decoder_layer,
        "layers": layers,
        "epochs": done,
        "seed": seed,
    }
    (out / METRICS_JSON).write_text(json.dumps(metrics, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    return metrics


def _read(where: str) -> pa.Table:
    """`tile_id`, `labels` as lists, and `split`, null where it is not given."""
    data = read_url(where)
    try:
        if data[:4] == b"PAR1":
            file = pq.ParquetFile(pa.BufferReader(data))  # a Python file may abort the process: storage/parquet.py
            table = file.read(columns=[name for name in _WANTED if name in file.schema_arrow.names])
        else:
            types = dict.fromkeys(_WANTED, pa.string())
            how = pa_csv.ConvertOptions(column_types=types, strings_can_be_null=False)
            table = pa_csv.read_csv(pa.BufferReader(data), convert_options=how)
        if not {"tile_id", "labels"} <= set(table.column_names):
            raise BadLabels(f"{where}: tile_id and labels are needed; it has {', '.join(table.column_names)[:200]}")
        if "split" not in table.column_names:
            table = table.append_column("split", pa.nulls(len(table), pa.string()))
        labels = table["labels"]
        if pa.types.is_string(labels.type):
            labels = pa.array([None if one is None else one.split(_SEPARATOR) for one in labels.to_pylist()])
        columns = (
            table["tile_id"].cast(pa.string()),
            labels.cast(pa.list_(pa.string())),
            table["split"].cast(pa.string()),
        )
        return pa.table(dict(zip(_WANTED, columns, strict=True)))
    except (pa.ArrowException, UnicodeDecodeError, OSError) as error:
        first = str(error).split("\n", 1)[0][:160]
        raise BadLabels(f"{where}: no table of tile_id and labels that reads ({first}); write it again") from None

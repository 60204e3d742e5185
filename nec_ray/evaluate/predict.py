"""Inference at the consumer: a trained head over pulled embeddings, to a Parquet table."""

import io
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from nec_ray.evaluate.consumer import decoder_layer_of
from nec_ray.evaluate.head import Progress, predict_proba
from nec_ray.models.dataset import EmbeddingSource, valid_rows
from nec_ray.models.heads import load_head
from nec_ray.storage import Store
from nec_ray.tiles.geoparquet import geoparquet_bytes

_TILES_A_PULL = 2048


def predict(
    source: EmbeddingSource,
    head_dir: str | Path,
    where: str | None,
    out: Path,
    *,
    progress: Progress | None = None,
) -> pa.Table:
    """Predict the class of an archive's tiles and write a table; GeoParquet where tiles have a footprint.

    Args:
        source: the archive.
        head_dir: folder that `train_head` wrote.
        where: an SQL condition over `embeddings`; all valid tiles where it is None.
        out: Parquet file to write.
        progress: called with the tiles done and the tiles in all.

    Returns:
        `tile_id`, `label`, `confidence` (the label's probability), and `geometry`, `bbox` where known.

    Raises:
        NotFound, DataError, UnsupportedFormat: see `load_head`.
        CodecMismatch: embeddings of another encoder or shape than the head was trained for.
        InputError: no valid tile fits.
    """
    head = load_head(head_dir, lambda: decoder_layer_of(source, where))
    rows = valid_rows(source, ["tile_id", "geometry", "bbox"], where)
    names = rows["tile_id"].to_pylist()
    said: dict[str, tuple[int, float]] = {}
    for start in range(0, len(names), _TILES_A_PULL):
        pull = source.pull(layers=head.spec.layers, tile_ids=names[start : start + _TILES_A_PULL])
        head.check_fits(source.url, pull.encoder_id, *pull.embeddings.shape[1:])
        probability = predict_proba(head.module, pull.embeddings)
        best = probability.argmax(axis=1)
        confidence = probability[np.arange(len(best)), best]
        said.update(zip(pull.tile_ids, zip(best.tolist(), confidence.tolist(), strict=True), strict=True))
        if progress:
            progress(len(said), len(names))
    table = pa.table(
        {
            "tile_id": pa.array(names, pa.string()),
            "label": pa.array([head.spec.classes[said[name][0]] for name in names], pa.string()),
            "confidence": pa.array([said[name][1] for name in names], pa.float32()),
        }
    )
    if rows["geometry"].null_count < len(names):
        for column in ("geometry", "bbox"):
            table = table.append_column(rows.schema.field(column), rows[column])
    Store(out.absolute().parent).replace(out.name, _parquet(table))
    return table


def _parquet(table: pa.Table) -> bytes:
    if "geometry" in table.column_names:
        return geoparquet_bytes(table)
    buffer = io.BytesIO()
    pq.write_table(table, buffer, compression="zstd")
    return buffer.getvalue()

"""Pulled embeddings as a torch data set, and what a source of embeddings offers.

`EmbeddingSource` is what this and the rooms above need of an archive; `nec_ray.open_archive` gives one.
"""

import math
from collections.abc import Iterator, Sequence
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import torch
from torch.utils.data import IterableDataset, get_worker_info

from nec_ray.archive.hints import shortened
from nec_ray.archive.kind import common_layers
from nec_ray.archive.sql import bracketed
from nec_ray.archive.tile_set import condition_of
from nec_ray.codec import Arrays, Codec, joined, parts_of
from nec_ray.errors import InputError, MixedCodecs, without_secrets


class PulledTiles(Protocol):
    """Decoded embeddings of one encoder."""

    @property
    def tile_ids(self) -> list[str]:
        """Ids of the tiles, in the order of the other fields."""

    @property
    def embeddings(self) -> Arrays:
        """(tiles, tokens, channels); where there are several grid scales, a tuple of one such array a scale."""

    @property
    def grid(self) -> tuple[int, int]:
        """Token rows and columns; the finest grid where there are several."""

    @property
    def grids(self) -> tuple[tuple[int, int], ...]:
        """The token grid of each scale."""

    @property
    def encoder_id(self) -> str:
        """Encoder that made the embeddings."""

    @property
    def coded_channels(self) -> int:
        """Channels that the embeddings were coded in."""

    @property
    def n_bytes(self) -> npt.NDArray[np.int64]:
        """(tiles,) payload bytes fetched for each tile."""


class EmbeddingSource(Protocol):
    """An archive, as the consumer's rooms see it."""

    @property
    def url(self) -> str:
        """Where it is."""

    def rows(self, columns: Sequence[str], where: str | None = None) -> pa.Table:
        """Index columns (`schemas/index.json`) of the tiles that a condition picks."""

    def pull(
        self, where: str | None = None, layers: int | None = None, tile_ids: Sequence[str] | None = None
    ) -> PulledTiles:
        """Fetch and decode valid tiles."""

    def codecs(self, where: str | None = None) -> list[Codec]:
        """Codecs of the valid tiles that a condition picks."""


def on_one_grid(pull: PulledTiles) -> npt.NDArray[np.float32]:
    """Embeddings (tiles, tokens, channels) on the finest grid: what heads read, but the U-Net.

    A coarser scale's token stands at each place that it covers; the channels of the scales follow one another, as
    hypercolumns do (Hariharan et al. 2015, arXiv 1411.5752). Embeddings of one scale are as they are.

    Raises:
        InputError: a coarser grid does not divide the finest one.
    """
    return on_finest(pull.embeddings, pull.grids)


def on_finest(embeddings: Arrays, grids: Sequence[tuple[int, int]]) -> npt.NDArray[np.float32]:
    """See `on_one_grid`; of embeddings of scales on `grids`."""
    return enlarged_to(max(grids, key=math.prod), parts_of(embeddings), grids)


def enlarged_to(
    grid: tuple[int, int], parts: Sequence[npt.NDArray[np.float32]], grids: Sequence[tuple[int, int]]
) -> npt.NDArray[np.float32]:
    """See `on_one_grid`; of arrays (tiles, tokens, channels) on `grids`."""
    if list(grids) == [grid]:
        return parts[0]
    rows, cols = grid
    out = np.empty((len(parts[0]), rows, cols, sum(part.shape[2] for part in parts)), np.float32)
    first = 0
    for part, (r, c) in zip(parts, grids, strict=True):
        if rows % r or cols % c:
            raise InputError(f"a token grid of {r} x {c} does not divide one of {rows} x {cols}; pull fewer layers")
        row, col = np.arange(rows) // (rows // r), np.arange(cols) // (cols // c)
        out[..., first : first + part.shape[2]] = part.reshape(len(part), r, c, -1)[:, row[:, None], col]
        first += part.shape[2]
    return out.reshape(len(out), rows * cols, -1)


def valid_rows(source: EmbeddingSource, columns: Sequence[str], where: str | None = None) -> pa.Table:
    """Index columns of the valid tiles that a condition picks.

    Raises:
        InputError: there is none.
    """
    rows = source.rows(columns, f"{bracketed(where)} AND status = 'valid'")
    if not rows.num_rows:
        shown = f" {shortened(where)}" if where else ""
        raise InputError(f"{source.url}: no valid tile fits{shown}; change the condition")
    return rows


class EmbeddingDataset(IterableDataset[tuple[str, Any]]):
    """Yields `(tile_id, embedding float32 (tokens, channels))`, pulling `batch_size` tiles at a time.

    Where there are several grid scales, an embedding is a tuple of one such tensor a scale.
    The tiles are listed once, when the data set is made; a DataLoader's workers share them without overlap.
    Use it with `DataLoader(dataset, batch_size=...)`.
    """

    def __init__(self, source: EmbeddingSource, where: str | None, layers: int | None, batch_size: int) -> None:
        if batch_size < 1:
            raise InputError(f"batch_size {batch_size}: give 1 or more tiles a pull")
        self._source = source
        self._layers = layers
        self._batch_size = batch_size
        self.tile_ids: list[str] = valid_rows(source, ["tile_id"], where)["tile_id"].to_pylist()
        # Now: each worker of a DataLoader sees its own tiles only, and would find nothing odd about them.
        codecs = {codec.id: codec.spec for codec in source.codecs(where)}
        if codecs:
            common_layers(source.url, codecs, layers)

    def __len__(self) -> int:
        return len(self.tile_ids)

    def __repr__(self) -> str:
        return f"<EmbeddingDataset: {len(self):,} tiles of {without_secrets(self._source.url)}>"

    def __iter__(self) -> Iterator[tuple[str, Any]]:
        worker = get_worker_info()
        first, step = (worker.id, worker.num_workers) if worker else (0, 1)
        encoder_id: str | None = None
        for start in range(first * self._batch_size, len(self.tile_ids), step * self._batch_size):
            pull = self._source.pull(layers=self._layers, tile_ids=self.tile_ids[start : start + self._batch_size])
            if encoder_id not in {None, pull.encoder_id}:
                raise MixedCodecs(
                    f"{self._source.url}: these tiles have embeddings of several encoders; "
                    "pick one in the condition by its codec_id"
                )
            encoder_id = pull.encoder_id
            tiles = zip(*(torch.from_numpy(part) for part in parts_of(pull.embeddings)), strict=True)
            yield from ((tile_id, joined(tile)) for tile_id, tile in zip(pull.tile_ids, tiles, strict=True))


def torch_dataset(
    archive: EmbeddingSource,
    where: str | None = None,
    layers: int | None = None,
    batch_size: int = 1024,
    *,
    within: Any = None,
    time: Any = None,
) -> EmbeddingDataset:
    """An archive's valid tiles as a torch data set of `(tile_id, embedding float32 (tokens, channels))`.

    Args:
        archive: what `nec_ray.open_archive` gives.
        where: an SQL condition over `embeddings`; all tiles where it is None.
        layers: only the first layers of each payload; all where it is None.
        batch_size: tiles a pull; memory holds this many at a time.
        within: a region, see `Archive.select`.
        time: of acquisition, see `Archive.select`.

    Raises:
        InputError: no tile fits, or batch_size is below 1.
        MixedCodecs: the tiles are of several encoders, or of codecs that do not all have the layers asked for.
    """
    if within is not None or time is not None:
        where = condition_of(where, within, time)
    return EmbeddingDataset(archive, where, layers, batch_size)

"""Transcoding: payloads of one codec to those of another of the same encoder, without pixels, the loss measured.

Where the other codec's payloads are the first bytes of these, they are copied; otherwise symbols are decoded, moved to
the other codec's medians, or along its axes, rounded again and coded by its tables.
"""

import hashlib
import json
from collections.abc import Generator, Iterable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from itertools import islice
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from nec_ray.archive.layout import archive_codec
from nec_ray.archive.pack import write_pack
from nec_ray.archive.payloads import decode, fetch, references
from nec_ray.codec import Arrays, Codec, Payloads, is_prefix, joined, parts_of
from nec_ray.errors import CorruptPayload
from nec_ray.runtime.cluster import RETRIES, broke_off, connect, raise_own, ray_data, rows_of
from nec_ray.runtime.messages import from_ipc, to_ipc
from nec_ray.storage import Store

CHUNK_TILES = 4096
"""Tiles of a task, and of a pack."""
_SYMBOLS = 1 << 22
"""Symbols, or numbers of embeddings, that are decoded at a time."""
_WAVE = 64
"""Chunks whose index rows are in Ray's memory at a time."""


@dataclass(frozen=True)
class Loss:
    """What re-encoding some tiles lost: sums over tiles.

    The distortion is the relative mean squared error `sum((old - new)^2) / sum((old - mean)^2)` over all tokens and
    channels of the old embeddings, `mean` being each channel's over these tiles: the share of the embeddings' variance
    that is lost. 0 is none, 1 as much as were every token replaced by the mean one. Channels that are left out
    count as their median, axes as 0. Loss before, of the old embeddings to the encoder's latents, is not in it.
    """

    tokens: int | npt.NDArray[np.float64]
    """(channels,), or one number for all of them: of several grid scales each channel has as many as its scale."""
    squared_error: float
    total: npt.NDArray[np.float64]
    """(channels,) sum of the old symbols; of the old embeddings, where their codec has a transform."""
    squares: npt.NDArray[np.float64]
    """(channels,) sum of their squares."""

    @property
    def distortion(self) -> float | None:
        """Share of the variance that is lost; None without tiles, infinite where there was no variance to lose."""
        if not np.any(self.tokens):
            return None
        # Symbols are embeddings less a constant a channel, and integers: their sums are exact.
        variance = float(np.sum(self.squares - self.total**2 / self.tokens))
        if self.squared_error == 0:
            return 0.0
        return self.squared_error / variance if variance > 0 else float("inf")

    def __add__(self, other: "Loss") -> "Loss":
        return Loss(
            self.tokens + other.tokens,
            self.squared_error + other.squared_error,
            self.total + other.total,
            self.squares + other.squares,
        )

    @classmethod
    def none(cls, channels: int) -> "Loss":
        """Of no tile."""
        return cls(np.zeros(channels), 0.0, np.zeros(channels), np.zeros(channels))

    def to_bytes(self) -> bytes:
        """As float64 numbers."""
        tokens = np.broadcast_to(self.tokens, self.total.shape)
        return np.concatenate([[self.squared_error], tokens, self.total, self.squares]).tobytes()

    @classmethod
    def from_bytes(cls, data: bytes) -> "Loss":
        """The reverse of `to_bytes`."""
        numbers = np.frombuffer(data, np.float64)
        tokens, total, squares = np.split(numbers[1:], 3)
        return cls(tokens, float(numbers[0]), total, squares)


@dataclass(frozen=True)
class Chunk:
    """Tiles that are transcoded together."""

    cell: int
    """Number of the cell that they belong to."""
    source: str
    target: str
    """Ids of the codecs, both in the archive."""
    rows: pa.Table
    """Index rows (schema index.json), all of codec `source`."""


@dataclass(frozen=True)
class Transcoded:
    """What came of some tiles."""

    rows: pa.Table
    """Index rows to take the place of the old ones: their payloads are written, nothing is committed."""
    loss: Loss
    damaged: dict[str, str]
    """Tiles whose payload is not the one that was written, and what is wrong; they have no row here."""


def transcode(
    rows: pa.Table, store: Store, source: Codec, target: Codec, *, write: bool = True, threads: int | None = None
) -> Transcoded:
    """Transcode tiles of an archive, and write their pack.

    Tiles that are not valid have no payload; their rows are carried over to the other codec.

    Args:
        rows: index rows (schema index.json), all of codec `source`.
        store: the archive.
        source: the codec that they are under.
        target: the one to bring them under, of the same encoder and grid, of no more channels of each grid scale.
        write: write the pack; otherwise the rows returned name no payload, but tell its size.
        threads: how many the coder may use; all the cores this process may use where it is None.

    Raises:
        CorruptPack: a pack is gone or too short.
        CorruptIndex: a reference cannot be.
    """
    ids = rows["tile_id"].to_pylist()
    valid = np.flatnonzero(pc.equal(rows["status"], "valid").to_numpy(zero_copy_only=False))
    hashes = rows["sha256"].to_pylist()
    payloads: list[bytes | None] = [None] * len(ids)
    lengths: list[Sequence[int] | None] = [None] * len(ids)
    pooled = rows["pooled"].to_pylist()
    damaged: dict[str, str] = {}
    loss, prefix = Loss.none(source.spec.width or source.spec.channels), is_prefix(target, source)
    wanted = references([ids[i] for i in valid], rows["payload"].take(pa.array(valid)))
    for batch in fetch(store, wanted):
        step = max(1, _SYMBOLS // max(source.spec.symbols, source.spec.values))
        for start in range(0, len(batch.number), step):
            numbers = valid[batch.number[start : start + step]]
            given = batch.payloads[start : start + step]
            good = []
            for n, (row, payload) in enumerate(zip(numbers.tolist(), given, strict=True)):
                if batch.codec_id != source.id:
                    damaged[ids[row]] = "its payload lies in a pack of another codec"
                elif hashlib.sha256(payload).digest() != hashes[row]:
                    damaged[ids[row]] = "its bytes are not the ones that were written (SHA-256 differs)"
                else:
                    good.append(n)
            symbols, good = _decode([ids[i] for i in numbers], given, good, source, damaged, threads)
            part = given if len(good) == len(given) else Payloads.of([given[n] for n in good])
            made = (_cut if prefix else _requantise)(part, symbols, source, target, threads)
            loss += made.loss
            for row, payload, length in zip(numbers[good].tolist(), made.payloads, made.lengths, strict=True):
                payloads[row], lengths[row] = payload, length
            for row, vector in zip(numbers[good].tolist(), made.pooled, strict=False):
                pooled[row] = vector
    kept = [i for i, tile_id in enumerate(ids) if tile_id not in damaged]
    new = _new_rows(rows, source, target, pooled).take(pa.array(kept, pa.int64()))
    payloads, lengths = [payloads[i] for i in kept], [lengths[i] for i in kept]
    if write:
        return Transcoded(write_pack(store, target.id, new, payloads, lengths), loss, damaged)
    at = new.schema.get_field_index("n_bytes")
    sizes = pa.array([len(payload or b"") for payload in payloads], pa.int32())
    return Transcoded(new.set_column(at, new.schema.field(at), sizes), loss, damaged)


def serially(chunks: Iterable[Chunk], store: Store) -> Generator[tuple[int, Transcoded]]:
    """Transcode chunks in this process; each with the number of its cell."""
    for chunk in chunks:
        codecs = (archive_codec(store, codec_id) for codec_id in (chunk.source, chunk.target))
        yield chunk.cell, transcode(chunk.rows, store, *codecs)


def on_ray(chunks: Iterable[Chunk], store: Store, workers: int | None) -> Generator[tuple[int, Transcoded]]:
    """Transcode chunks by Ray Data, as they are finished; each with the number of its cell.

    Args:
        chunks: taken a wave at a time, so that their rows never lie in memory all at once.
        store: the archive.
        workers: tasks at a time; one a core where it is None.

    Raises:
        RunError: the cluster lost its workers too often.
    """
    import ray
    from ray.data import TaskPoolStrategy

    with connect():
        left = iter(chunks)
        while wave := list(islice(left, _WAVE)):
            items = [
                {"cell": chunk.cell, "source": chunk.source, "target": chunk.target, "rows": to_ipc(chunk.rows)}
                for chunk in wave
            ]
            with ray_data():
                results = ray.data.from_items(items, override_num_blocks=len(items)).map(
                    _Task(store.url), num_cpus=1, compute=TaskPoolStrategy(size=workers), max_retries=RETRIES
                )
            try:
                for row in rows_of(results):
                    done = Transcoded(from_ipc(row["rows"]), Loss.from_bytes(row["loss"]), json.loads(row["damaged"]))
                    yield int(row["cell"]), done
            except ray.exceptions.RayError as error:
                raise_own(error)
                raise broke_off(error) from error


class _Task:
    """Transcodes a chunk in a worker; codecs are loaded once a process."""

    def __init__(self, url: str) -> None:
        self._url = url

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        store = Store(self._url)
        codecs = (archive_codec(store, str(row[name])) for name in ("source", "target"))
        done = transcode(from_ipc(row["rows"]), store, *codecs, threads=1)  # as many cores as Ray counted
        return {
            "cell": row["cell"],
            "rows": to_ipc(done.rows),
            "loss": done.loss.to_bytes(),
            "damaged": json.dumps(done.damaged),
        }


@dataclass(frozen=True)
class _Made:
    payloads: Sequence[bytes]
    lengths: list[list[int]]
    """Of each payload's layers."""
    pooled: list[list[int]]
    """Of each payload; empty where the old vectors stay."""
    loss: Loss


def _decode(
    ids: Sequence[str],
    payloads: Payloads,
    good: list[int],
    codec: Codec,
    damaged: dict[str, str],
    threads: int | None,
) -> tuple[Arrays, list[int]]:
    """Symbols of the payloads that decode, and which of `good` these are; the others are added to `damaged`."""
    while True:
        names = [ids[n] for n in good]
        try:
            return decode(codec, names, [payloads[n] for n in good], threads=threads), good
        except CorruptPayload as error:
            if error.payload is None or not good:
                raise
            damaged[names[error.payload]] = str(error).removeprefix(f"tile {names[error.payload]}: ")
            good = good[: error.payload] + good[error.payload + 1 :]


def _cut(payloads: Payloads, symbols: Arrays, source: Codec, target: Codec, _threads: int | None) -> _Made:
    """The first bytes of each payload; of the whole embedding and on the same axes, the pooled vectors stay."""
    kept = source.layer_lengths(payloads)[:, : len(target.spec.layers)]
    made = [payload[:n] for payload, n in zip(payloads, kept.sum(axis=1).tolist(), strict=True)]
    if source.transform is not None and target.transform is not None:
        old = source.dequantise(symbols)
        loss = _loss_of_embeddings(old, target.transform.inverse(symbols[:, :, : target.spec.channels]))
    else:
        loss = _loss(source, symbols, target, 0.0)
    return _Made(made, kept.tolist(), [], loss)


def _requantise(_payloads: Payloads, symbols: Arrays, source: Codec, target: Codec, threads: int | None) -> _Made:
    """Embeddings moved to the other codec's medians, rounded again as the encoder's latents are, and coded."""
    # In float64: on the same axes with twice the step every second symbol lies between two.
    exact = source.transform.inverse(symbols, np.float64) if source.transform else source.dequantise(symbols)
    old = [
        part[:, :, :channels]
        for part, (_, channels) in zip(
            parts_of(exact),
            target.spec.embedding_shapes(),
            strict=False,  # maybe fewer
        )
    ]
    moved = target.quantise(joined(old))
    made = target.compress(moved, threads=threads)
    new = parts_of(target.dequantise(moved))
    if source.transform is not None or target.transform is not None:
        loss = _loss_of_embeddings(old[0], new[0])
    else:
        error = sum(float(np.sum((a.astype(np.float64) - b) ** 2)) for a, b in zip(old, new, strict=True))
        loss = _loss(source, symbols, target, error)
    return _Made(made, target.layer_lengths(made).tolist(), target.pool(moved).tolist(), loss)


def _loss(source: Codec, symbols: Arrays, target: Codec, error: float) -> Loss:
    """Loss of tiles of which the target's channels are kept, with a squared error of `error` in these."""
    tokens, total, squares = np.zeros((3, source.spec.channels))
    for part, scale in zip(parts_of(symbols), source.scales(), strict=True):
        flat = part.reshape(-1, part.shape[2]).astype(np.float64)
        tokens[scale.rows] = len(flat)
        total[scale.rows] = flat.sum(axis=0)
        squares[scale.rows] = np.einsum("ij,ij->j", flat, flat)
    left_out = np.ones(source.spec.channels, bool)
    for kept, scale in zip(target.scales(), source.scales(), strict=False):
        left_out[scale.rows[: len(kept.rows)]] = False
    return Loss(tokens, error + float(squares[left_out].sum()), total, squares)


def _loss_of_embeddings(old: npt.NDArray[Any], new: npt.NDArray[Any]) -> Loss:
    """Loss of tiles whose embeddings (tiles, tokens, channels) were `old` and are `new`."""
    flat = old.reshape(-1, old.shape[2]).astype(np.float64)
    error = float(np.sum((old.astype(np.float64) - new) ** 2))
    return Loss(np.full(old.shape[2], float(len(flat))), error, flat.sum(axis=0), np.einsum("ij,ij->j", flat, flat))


def _new_rows(rows: pa.Table, source: Codec, target: Codec, pooled: Sequence[Any]) -> pa.Table:
    now = datetime.now(UTC)
    # Later than the old row also where that writer's clock was ahead: `rebuild` takes the newest row of a tile.
    later = [max(now, at + timedelta(microseconds=1)) for at in rows["encoded_at"].to_pylist()]
    columns = {
        "codec_id": [target.id] * rows.num_rows,
        "encoded_at": later,
        "encoded_from": [source.id] * rows.num_rows,
        "pooled": pooled,
    }
    if source.spec.token_grid != target.spec.token_grid:
        columns |= _coarser(rows, source.spec.token_grid, target.spec.token_grid)
    for name, values in columns.items():
        at = rows.schema.get_field_index(name)
        rows = rows.set_column(at, rows.schema.field(at), pa.array(values, rows.schema.field(at).type))
    return rows


def _coarser(rows: pa.Table, old: tuple[int, int], new: tuple[int, int]) -> dict[str, list[Any]]:
    """The columns `grid` and `transform` of tiles whose finest token grid was `old` and is `new`."""
    x, y = old[1] / new[1], old[0] / new[0]
    transforms = [t and [t[0] * x, t[1] * y, t[2], t[3] * x, t[4] * y, t[5]] for t in rows["transform"].to_pylist()]
    grids = [grid and {"rows": new[0], "cols": new[1]} for grid in rows["grid"].to_pylist()]
    return {"grid": grids, "transform": transforms}

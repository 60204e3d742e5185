"""`open_archive`: an archive pinned to one version, to query and to pull from."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

import duckdb
import numpy as np
import numpy.typing as npt
import pyarrow as pa

from nec_ray.archive.index import Index, Version
from nec_ray.archive.layout import ArchiveInfo, archive_codec, read_info
from nec_ray.archive.payloads import decode, fetch, references
from nec_ray.archive.sql import Query
from nec_ray.codec import Codec
from nec_ray.errors import BadQuery, InputError, MixedCodecs
from nec_ray.storage import Store


@dataclass(frozen=True)
class Pull:
    """Decoded embeddings of one encoder, ordered by tile id."""

    tile_ids: list[str]
    symbols: npt.NDArray[np.int32]
    """(tiles, tokens, channels), exactly what the encoder produced."""
    embeddings: npt.NDArray[np.float32]
    """(tiles, tokens, channels): symbols plus the channels' medians."""
    grid: tuple[int, int]
    """Token rows and columns: token `r * cols + c` is row r, column c."""
    encoder_id: str
    layers: int
    n_bytes: npt.NDArray[np.int64]
    """(tiles,) payload bytes fetched for each tile."""

    def __len__(self) -> int:
        return len(self.tile_ids)


class Archive:
    """A read-only archive, pinned to one version: what is committed later is not seen.

    Attributes:
        url: where it is.
        info: licence and attribution.
        version: number of the version.
    """

    def __init__(self, store: Store, info: ArchiveInfo, version: Version) -> None:
        self._store = store
        self._version = version
        self.url = store.url
        self.info = info
        self.version = version.number

    def __repr__(self) -> str:
        return f"<Archive {self.url}, version {self.version}: {self._version.rows:,} tiles>"

    def __len__(self) -> int:
        return self._version.rows

    def sql(self, query: str, params: Sequence[Any] | None = None) -> Query:
        """One SELECT over the view `embeddings` (schema: schemas/index.json).

        `nec_decode(payload)` gives the embedding, a list of tokens of lists of channels, FLOAT[][];
        `nec_pool(payload)` the pooled vector, TINYINT[].

        Raises:
            BadQuery: the SQL does not parse, or does more than read.
        """
        return Query(self._store, self._version, query, params)

    def rows(self, columns: Sequence[str], where: str | None = None) -> pa.Table:
        """Index columns of the tiles that a condition picks, ordered by tile id."""
        return self.sql(
            f"SELECT {', '.join(columns)} FROM embeddings WHERE {_condition(where)} ORDER BY tile_id"
        ).to_arrow_table()

    def codecs(self, where: str | None = None) -> list[Codec]:
        """Codecs of the valid tiles that a condition picks."""
        ids = self.sql(
            f"SELECT DISTINCT codec_id FROM embeddings WHERE status = 'valid' AND {_condition(where)} ORDER BY codec_id"
        )
        return [archive_codec(self._store, codec_id) for (codec_id,) in ids.fetchall()]

    def pull(self, where: str | None = None, layers: int | None = None, tile_ids: Sequence[str] | None = None) -> Pull:
        """Fetch and decode the valid tiles that a condition picks.

        Args:
            where: an SQL condition over `embeddings`; all tiles where it is None.
            layers: only the first layers of each payload; all where it is None.
            tile_ids: only these tiles.

        Raises:
            BadQuery: the condition does not parse.
            MixedCodecs: the tiles have embeddings of several encoders, or of several shapes.
            InputError: no tile fits, or the codec has fewer layers.
            CorruptPayload: a payload fails its checksum; the message names the tile.
        """
        condition = _condition(where)
        params = None
        if tile_ids is not None:
            condition += " AND tile_id IN (SELECT unnest(?))"
            params = [list(tile_ids)]
        rows = self.sql(
            "SELECT tile_id, codec_id, payload FROM embeddings "
            f"WHERE status = 'valid' AND {condition} ORDER BY tile_id",
            params,
        ).to_arrow_table()
        if not rows.num_rows:
            raise InputError(f"{self.url}: no valid tile fits{f' {where}' if where else ''}; nothing to pull")
        codecs = {codec_id: archive_codec(self._store, codec_id) for codec_id in rows["codec_id"].unique().to_pylist()}
        self._check_one_encoder(list(codecs.values()))
        first = next(iter(codecs.values()))
        try:
            chosen = first.layers(layers)
        except ValueError as error:
            raise InputError(f"{error}; ask for fewer layers") from None
        names = rows["tile_id"].to_pylist()
        payloads = fetch(self._store, references(names, rows["payload"].to_pylist()), layers)
        shape = (len(names), first.spec.tokens, sum(layer.channels for layer in chosen))
        symbols, embeddings = np.empty(shape, np.int32), np.empty(shape, np.float32)
        of_codec = np.array(rows["codec_id"].to_pylist())
        for codec_id, codec in codecs.items():
            mine = np.flatnonzero(of_codec == codec_id)
            symbols[mine] = decode(codec, [names[i] for i in mine], [payloads[i] for i in mine], layers)
            embeddings[mine] = codec.dequantise(symbols[mine])
        return Pull(
            tile_ids=names,
            symbols=symbols,
            embeddings=embeddings,
            grid=first.spec.grid,
            encoder_id=first.encoder_id,
            layers=len(chosen),
            n_bytes=np.array([len(payload) for payload in payloads], np.int64),
        )

    def _check_one_encoder(self, codecs: Sequence[Codec]) -> None:
        shapes = {(codec.encoder_id, codec.spec.grid, tuple(codec.spec.layers)) for codec in codecs}
        if len(shapes) > 1:
            raise MixedCodecs(
                f"{self.url}: these tiles have embeddings of {len(shapes)} kinds; "
                f"pick one with a condition such as codec_id = '{codecs[0].id}'"
            )


def open_archive(url: str | os.PathLike[str], version: int | datetime | str | None = None) -> Archive:
    """Open an archive for reading, pinned to one version.

    Args:
        url: a path, `s3://` or another fsspec URL.
        version: its number, or a time (with its zone) at which it was the newest; the newest where it is None.

    Raises:
        NotFound: no archive there, or no such version.
        UnsupportedFormat: written by a later release.
    """
    store = Store(url)
    info = read_info(store)
    return Archive(store, info, Index(store).version(_parse_version(version)))


def _parse_version(version: int | datetime | str | None) -> int | datetime | None:
    if isinstance(version, str) and version.lstrip("-").isdigit():
        version = int(version)
    if isinstance(version, int) and not 0 <= version < 1 << 63:
        raise InputError(f"version {version}: versions are numbered from 0")
    if not isinstance(version, str):
        return version
    try:
        return datetime.fromisoformat(version)
    except ValueError:
        raise InputError(f"version {version!r}: give a number or a time such as 2026-11-21T10:00:00+00:00") from None


def _condition(where: str | None) -> str:
    """The condition in brackets that it cannot break out of."""
    if not where or not where.strip():
        return "true"
    try:
        duckdb.SQLExpression(where)
    except duckdb.Error as error:
        raise BadQuery(f"{where}: no SQL condition ({' '.join(str(error).split())})") from None
    return f"({where}\n)"  # the line break ends a comment

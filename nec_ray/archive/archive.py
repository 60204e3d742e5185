"""`open_archive`: an archive pinned to one version, to query and to pull from."""

import math
import os
import re
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import datetime
from typing import Any

import duckdb
import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from nec_ray.archive.database import prepare
from nec_ray.archive.datafile import DataFile
from nec_ray.archive.filesystem import IndexFiles
from nec_ray.archive.index import Index, Version
from nec_ray.archive.kind import common_layers
from nec_ray.archive.layout import ArchiveInfo, archive_codec, archive_spec, pack_codec, read_info
from nec_ray.archive.payloads import References, decode, fetch, references, whole_references
from nec_ray.archive.sql import Query, find
from nec_ray.codec import Arrays, Codec, CodecSpec, LayerSpec, Payloads, joined, parts_of, scales_of
from nec_ray.errors import BadQuery, InputError, NecError
from nec_ray.storage import Store


@dataclass(frozen=True)
class Pull:
    """Decoded embeddings of one encoder, ordered by tile id."""

    tile_ids: list[str]
    symbols: Arrays
    """int32 (tiles, tokens, channels), exactly what the encoder produced; where the pulled layers are of several grid
    scales, a tuple of one such array a scale, coarse first."""
    embeddings: Arrays
    """float32, of the shape of the symbols: symbols plus the channels' medians."""
    grid: tuple[int, int]
    """Token rows and columns: token `r * cols + c` is row r, column c. The finest one where there are several."""
    encoder_id: str
    layers: int
    n_bytes: npt.NDArray[np.int64]
    """(tiles,) payload bytes fetched for each tile."""
    grids: tuple[tuple[int, int], ...]
    """The token grid of each scale."""

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
        self._files = IndexFiles(store, version.files)
        self.url = store.url
        self.info = info
        self.version = version.number

    @property
    def files(self) -> tuple[DataFile, ...]:
        """The data files of the version."""
        return self._version.files

    def __repr__(self) -> str:
        return f"<Archive {self.url}, version {self.version}: {self._version.rows:,} tiles>"

    def __len__(self) -> int:
        return self._version.rows

    def sql(self, query: str, params: Sequence[Any] | None = None) -> Query:
        """One SELECT over the view `embeddings` (schema: schemas/index.json).

        `nec_decode(payload)` gives the embedding, a list of tokens of lists of channels, FLOAT[][], of several
        grid scales the tokens of one after those of the other; `nec_pool(payload)` the pooled vector, TINYINT[].

        Raises:
            BadQuery: the SQL does not parse, or does more than read.
        """
        return Query(self._files, query, params)

    def rows(self, columns: Sequence[str], where: str | None = None) -> pa.Table:
        """Index columns of the tiles that a condition picks, ordered by tile id."""
        return self.sql(
            f"SELECT {', '.join(columns)} FROM embeddings WHERE {bracketed(where)} ORDER BY tile_id"
        ).to_arrow_table()

    def codec(self, codec_id: str) -> Codec:
        """A codec of the archive, loaded once a process.

        Raises:
            NotFound: there is none of that id.
        """
        return archive_codec(self._store, codec_id)

    def codecs(self, where: str | None = None) -> list[Codec]:
        """Codecs of the valid tiles that a condition picks."""
        ids = self.sql(
            f"SELECT DISTINCT codec_id FROM embeddings WHERE status = 'valid' AND {bracketed(where)} ORDER BY codec_id"
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
            MixedCodecs: the tiles have embeddings of several encoders, or of several shapes: where codecs of one
                encoder have different numbers of layers, ask for layers that all of them have.
            InputError: no tile fits, or a codec has fewer layers.
            CorruptPayload: a payload fails its checksum; the message names the tile.
        """
        wanted, first, chosen = self._wanted(where, layers, tile_ids, ordered=True)
        scales = scales_of(first.grid, chosen)
        shapes = [(len(wanted), *scale.shape) for scale in scales]
        symbols = [np.empty(shape, np.int32) for shape in shapes]
        embeddings = [np.empty(shape, np.float32) for shape in shapes]
        for batch in fetch(self._store, wanted):
            codec = archive_codec(self._store, batch.codec_id)
            decoded = decode(codec, [wanted.tile_ids[i] for i in batch.number], batch.payloads, layers)
            for whole, part in zip(symbols, parts_of(decoded), strict=True):
                whole[batch.number] = part
            for latent, part in zip(embeddings, parts_of(codec.dequantise(decoded)), strict=True):
                latent[batch.number] = part
        return Pull(
            tile_ids=wanted.tile_ids,
            symbols=joined(symbols),
            embeddings=joined(embeddings),
            grid=max((scale.grid for scale in scales), key=math.prod),
            grids=tuple(scale.grid for scale in scales),
            encoder_id=first.encoder_id,
            layers=len(chosen),
            n_bytes=wanted.length,
        )

    def payloads(
        self, where: str | None = None, layers: int | None = None, tile_ids: Sequence[str] | None = None
    ) -> Iterator[tuple[list[str], str, Payloads]]:
        """Payload bytes of the valid tiles that a condition picks, not decoded, some thousand tiles at a time.

        `archive.codec(codec_id).decompress(payloads)` decodes them; until then the codec is not loaded.

        Args:
            where: an SQL condition over `embeddings`; all tiles where it is None.
            layers: only the first layers of each payload; all where it is None.
            tile_ids: only these tiles.

        Yields:
            Tile ids, their codec's id and their payloads, in the order in which they lie in the packs.

        Raises:
            The same as `pull`.
        """
        wanted, _, _ = self._wanted(where, layers, tile_ids, ordered=False)
        for batch in fetch(self._store, wanted):
            ids = [wanted.tile_ids[i] for i in batch.number]
            yield ids, batch.codec_id, batch.payloads

    def _wanted(
        self, where: str | None, layers: int | None, tile_ids: Sequence[str] | None, *, ordered: bool
    ) -> tuple[References, CodecSpec, list[LayerSpec]]:
        """References of tiles, all of one encoder; what one of their codecs declares; and the layers to pull."""
        condition = bracketed(where)
        params = None
        if tile_ids is not None:
            condition += " AND tile_id IN (SELECT unnest(?))"
            params = [list(tile_ids)]
        # Lengths of layers are a list, which DuckDB reads a megabyte at a time: most pulls do without.
        length = "n_bytes" if layers is None else "payload"
        columns = f'tile_id, payload.pack, payload."offset", {length}'
        rows = find(self._files, columns, f"status = 'valid' AND {condition}", params)
        if not rows.num_rows:
            raise InputError(f"{self.url}: no valid tile fits{f' {where}' if where else ''}; nothing to pull")
        if ordered:  # DuckDB would take longer to sort than to read
            rows = rows.take(pc.sort_indices(rows["tile_id"]))
        tile_ids = rows["tile_id"].to_pylist()
        if layers is None:
            wanted = whole_references(tile_ids, rows["pack"], rows["offset"], rows["n_bytes"])
        else:
            wanted = references(tile_ids, rows["payload"], layers)
        codec_ids = {pack_codec(name) for name in wanted.packs}
        specs = {codec_id: archive_spec(self._store, codec_id) for codec_id in codec_ids}
        chosen = common_layers(self.url, specs, layers)
        return wanted, specs[min(specs)], chosen


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
    at = parse_version(version)
    prepare()
    with ThreadPoolExecutor(1) as pool:  # on an object store every request before the first byte is felt
        info = pool.submit(read_info, store)
        try:
            found = Index(store).version(at)
        except NecError:
            info.result()  # no archive there at all is the better word
            raise
        return Archive(store, info.result(), found)


def parse_version(version: int | datetime | str | None) -> int | datetime | None:
    """A version as a number or a time.

    Raises:
        InputError: it is neither.
    """
    if isinstance(version, str) and re.fullmatch(r"-?[0-9]+", version):
        version = int(version)
    if isinstance(version, int) and not 0 <= version < 1 << 63:
        raise InputError(f"version {version}: versions are numbered from 0")
    if not isinstance(version, str):
        return version
    try:
        return datetime.fromisoformat(version)
    except ValueError:
        raise InputError(f"version {version!r}: give a number or a time such as 2026-11-21T10:00:00+00:00") from None


def bracketed(where: str | None) -> str:
    """The condition in brackets that it cannot break out of.

    Raises:
        BadQuery: it is no SQL condition.
    """
    if not where or not where.strip():
        return "true"
    try:
        duckdb.SQLExpression(where)
    except duckdb.Error as error:
        raise BadQuery(f"{where}: no SQL condition ({' '.join(str(error).split())})") from None
    return f"({where}\n)"  # the line break ends a comment

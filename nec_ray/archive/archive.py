"""`open_archive`: an archive pinned to one version, to query and to pull from."""

import functools
import os
import re
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from nec_ray.archive.coverage import Coverage, coverage
from nec_ray.archive.database import prepare, view_sql
from nec_ray.archive.datafile import DataFile
from nec_ray.archive.filesystem import IndexFiles
from nec_ray.archive.hints import codec_named, no_codec, nothing_fits
from nec_ray.archive.index import Index, Version
from nec_ray.archive.kind import common_layers
from nec_ray.archive.layout import ArchiveInfo, archive_codec, archive_spec, is_codec_id, pack_codec, read_info
from nec_ray.archive.payloads import References, fetch, references, whole_references
from nec_ray.archive.pull import Part, Pull, parts, pull
from nec_ray.archive.recorded import CONTRACT, RecordedCatalog, recorded_catalogs
from nec_ray.archive.similar import similar
from nec_ray.archive.sql import Query, bracketed, find
from nec_ray.archive.tile_set import TileSet, condition_of, listed
from nec_ray.codec import Codec, Payloads
from nec_ray.errors import InputError, NecError, NotFound, without_secrets
from nec_ray.notebook import facts_html
from nec_ray.storage import Store
from nec_ray.tiles import Catalog


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

    @property
    def catalogs(self) -> tuple[RecordedCatalog, ...]:
        """The catalogs that were encoded, as they are recorded in the version; none in archives made before they were.

        Raises:
            CorruptIndex: the index names one that cannot be.
        """
        return recorded_catalogs(self.url, self._version.properties)

    @functools.cached_property
    def catalog_files(self) -> IndexFiles:
        """Their files, for SQL."""
        return IndexFiles(self._store, self.catalogs, CONTRACT)

    def __repr__(self) -> str:
        return f"<Archive {without_secrets(self.url)}, version {self.version}: {self._version.rows:,} tiles>"

    def _repr_html_(self) -> str:
        info = [(name, getattr(self.info, name)) for name in ("licence", "attribution")]
        facts = [("version", self.version), ("tiles", f"{len(self):,}"), *((k, v) for k, v in info if v)]
        return facts_html(f"Archive {without_secrets(self.url)}", facts)

    def __len__(self) -> int:
        return self._version.rows

    def sql(self, query: str, params: Sequence[Any] | None = None) -> Query:
        """One SELECT over the view `embeddings` (schema: schemas/index.json).

        `nec_decode(payload)` gives the embedding, a list of tokens of lists of channels, FLOAT[][], of several
        grid scales the tokens of one after those of the other; `nec_pool(payload)` the pooled vector, TINYINT[];
        `nec_intersects(geometry, region)` says whether a footprint meets a region, GeoJSON text.

        Raises:
            BadQuery: the SQL does not parse, or does more than read the archive (nec_ray/archive/guard.py).
        """
        return Query(self._files, query, params)

    def view_sql(self) -> str:
        """SQL that makes the view `embeddings` over this version's files in any DuckDB.

        The functions of nec_ray are not in it: what it gives is the index, not embeddings.

        Raises:
            InputError: the version has no files yet.
        """
        return view_sql(self._files)

    def rows(self, columns: Sequence[str], where: str | None = None) -> pa.Table:
        """Index columns of the tiles that a condition picks, ordered by tile id."""
        return self.sql(
            f"SELECT {', '.join(listed(columns))} FROM embeddings WHERE {bracketed(where)} ORDER BY tile_id"
        ).to_arrow_table()

    def codec(self, codec_id: str) -> Codec:
        """A codec of the archive, loaded once a process.

        Args:
            codec_id: its id, or the first digits of it.

        Raises:
            NotFound: there is none of that id; it names those that there are.
            InputError: it is no string.
        """
        if not isinstance(codec_id, str):
            raise InputError(f"{codec_id!r} is no codec's id; give the id, or its first digits, as a string")
        if not is_codec_id(codec_id):
            codec_id = codec_named(self, codec_id)
        try:
            return archive_codec(self._store, codec_id)
        except NotFound:
            raise no_codec(self, codec_id) from None

    def codecs(self, where: str | None = None) -> list[Codec]:
        """Codecs of the valid tiles that a condition picks."""
        ids = self.sql(
            f"SELECT DISTINCT codec_id FROM embeddings WHERE status = 'valid' AND {bracketed(where)} ORDER BY codec_id"
        )
        return [archive_codec(self._store, codec_id) for (codec_id,) in ids.fetchall()]

    def select(self, where: str | None = None, *, within: Any = None, time: Any = None) -> TileSet:
        """The tiles that a condition, a place and a time pick; all where none is given.

        Args:
            where: an SQL condition over `embeddings`.
            within: a region that the footprints meet: GeoJSON (dict or text), a shapely geometry or GeoPandas table,
                or (west, south, east, north), in degrees.
            time: of acquisition: `"2020-05"` (all of the month; a year and a day likewise), a date, an instant, or a
                range `("2020-05-01", "2020-08-31")` with both ends in it, None for an open one; UTC.

        Raises:
            BadQuery: `where` is no condition.
            InputError: no region, or no time.
        """
        return TileSet(self, condition_of(where, within, time))

    def within(self, geometry: Any, time: Any = None) -> TileSet:
        """The tiles whose footprints meet a region, exactly: `select(within=geometry, time=time)`."""
        return self.select(within=geometry, time=time)

    def at(self, lon: float, lat: float, time: Any = None) -> TileSet:
        """The tiles whose footprints hold a point, in degrees."""
        return self.select(within={"type": "Point", "coordinates": [lon, lat]}, time=time)

    def similar(
        self,
        like: str | npt.ArrayLike,
        k: int = 10,
        where: str | None = None,
        *,
        within: Any = None,
        time: Any = None,
        columns: Sequence[str] = (),
    ) -> pa.Table:
        """The tiles most like another, by the cosine of the pooled vectors; nothing is decoded.

        Args:
            like: a tile id (the tile itself is left out), a pooled vector, or an embedding (tokens, channels).
            k: how many.
            where: only among these tiles; so `within` and `time`, see `select`.
            within: a region.
            time: of acquisition.
            columns: further index columns of the result.

        Returns:
            `tile_id`, the further columns, and `similarity` (-1 to 1), the most similar first.

        Raises:
            NotFound: no such tile.
            MixedCodecs: the tiles have pooled vectors of several encoders or axes.
            InputError: a tile without embedding, or a vector of another length.
        """
        return similar(self, like, k, condition_of(where, within, time), columns)

    def coverage(
        self,
        region: Any = None,
        time: Any = None,
        catalog: str | os.PathLike[str] | Catalog | Sequence[str | os.PathLike[str] | Catalog] | None = None,
    ) -> Coverage:
        """How many tiles of a place and a time are valid, no-data, failed, and absent.

        Args:
            region: see `select`; everywhere where it is None.
            time: of acquisition, see `select`.
            catalog: the tile catalogs that were to be encoded; those that the version records where it is None.

        Raises:
            InputError: no region, no time, or no catalog.
            CorruptIndex: a recorded catalog does not read.
        """
        return coverage(self, region, time, catalog)

    def pull(
        self,
        where: str | None = None,
        layers: int | None = None,
        tile_ids: Sequence[str] | None = None,
        *,
        within: Any = None,
        time: Any = None,
        progress: Callable[[int, int], None] | None = None,
    ) -> Pull:
        """Fetch and decode the valid tiles that a condition picks.

        Args:
            where: an SQL condition over `embeddings`; all tiles where it is None.
            layers: only the first layers of each payload; all where it is None.
            tile_ids: only these tiles; those that are not there, or not valid, are left out.
            within: a region, see `select`.
            time: of acquisition, see `select`.
            progress: called with (tiles done, tiles).

        Raises:
            BadQuery: the condition does not parse.
            MixedCodecs: the tiles have embeddings of several encoders, or of several shapes: where codecs of one
                encoder have different numbers of layers, ask for layers that all of them have.
            InputError: no tile fits, or a codec has fewer layers.
            CorruptPayload: a payload fails its checksum; the message names the tile.
        """
        wanted = self._wanted(condition_of(where, within, time), layers, tile_ids, ordered=True)
        return pull(self._store, wanted, layers, progress)

    def parts(
        self,
        where: str | None = None,
        layers: int | None = None,
        tiles: int = 1024,
        *,
        within: Any = None,
        time: Any = None,
    ) -> list[Part]:
        """The same pull as parts of at most so many tiles, which other processes can do: `part.pull()`.

        Raises:
            The same as `pull`, but for what damaged payloads raise.
        """
        if tiles < 1:
            raise InputError(f"tiles {tiles}: give 1 or more tiles a part")
        wanted = self._wanted(condition_of(where, within, time), layers, None, ordered=False)
        return parts(self.url, wanted, layers, tiles)

    def to_zarr(
        self,
        out: str | os.PathLike[str],
        where: str | None = None,
        layers: int | None = None,
        *,
        within: Any = None,
        time: Any = None,
    ) -> dict[str, Any]:
        """Write embeddings as a Zarr v3 store that xarray opens, with coordinates and times, by batches.

        Args:
            out: a local folder that is not there yet.
            where: an SQL condition over `embeddings`; all tiles where it is None.
            layers: only the first layers of each payload; all where it is None.
            within: a region, see `select`.
            time: of acquisition, see `select`.

        Returns:
            What was written, as `nec_ray.archive.exports.export` says.

        Raises:
            The same as `pull`; InputError also where `out` cannot be written.
        """
        from nec_ray.archive.exports import export

        return export(self, Path(out), format="zarr", where=condition_of(where, within, time), layers=layers)

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
        wanted = self._wanted(bracketed(where), layers, tile_ids, ordered=False)
        for batch in fetch(self._store, wanted):
            ids = [wanted.tile_ids[i] for i in batch.number]
            yield ids, batch.codec_id, batch.payloads

    def _wanted(
        self, condition: str, layers: int | None, tile_ids: Sequence[str] | None, *, ordered: bool
    ) -> References:
        """References of the valid tiles that an SQL condition in brackets picks, all of one encoder."""
        if layers is not None and (not isinstance(layers, int) or layers < 1):
            raise InputError(f"layers {layers!r}: give 1 or more of a payload's first layers")
        params = None
        asked = condition
        if tile_ids is not None:
            condition += " AND tile_id IN (SELECT unnest(?))"
            tile_ids = [tile_ids] if isinstance(tile_ids, str) else tile_ids
            params = [list(tile_ids)]
        # Lengths of layers are a list, which DuckDB reads a megabyte at a time: most pulls do without.
        length = "n_bytes" if layers is None else "payload"
        columns = f'tile_id, payload.pack, payload."offset", {length}'
        rows = find(self._files, columns, f"status = 'valid' AND {condition}", params)
        if not rows.num_rows:
            raise nothing_fits(self, asked, "pull", tile_ids)
        if ordered:  # DuckDB would take longer to sort than to read
            rows = rows.take(pc.sort_indices(rows["tile_id"]))
        names = rows["tile_id"].to_pylist()
        if layers is None:
            wanted = whole_references(names, rows["pack"], rows["offset"], rows["n_bytes"])
        else:
            wanted = references(names, rows["payload"], layers)
        specs = {codec_id: archive_spec(self._store, codec_id) for codec_id in map(pack_codec, wanted.packs)}
        common_layers(self.url, specs, layers)
        return wanted


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
    if store.is_local:
        return Archive(store, read_info(store), Index(store).version(at))
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
    if isinstance(version, int) and (isinstance(version, bool) or not 0 <= version < 1 << 63):
        raise InputError(f"version {version}: versions are numbered from 0")
    if not isinstance(version, str):
        return version
    try:
        return datetime.fromisoformat(version)
    except ValueError:
        raise InputError(f"version {version!r}: give a number or a time such as 2026-11-21T10:00:00+00:00") from None

"""The tiles of an export: checked for one encoder, in Hilbert order, taken batch by batch."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from nec_ray.archive.archive import Archive
from nec_ray.archive.hints import nothing_fits
from nec_ray.archive.kind import common_layers
from nec_ray.codec import Codec
from nec_ray.errors import InputError, without_secrets
from nec_ray.tiles.hilbert import spatial_order

EDGES = ("xmin", "ymin", "xmax", "ymax")
_BATCH_BYTES = 64 << 20
_BATCH_TILES = 4096


@dataclass(frozen=True)
class Selection:
    """Valid tiles of one encoder."""

    archive: Archive
    where: str | None
    rows: pa.Table
    """`tile_id`, `bbox` and `acquired_at` of each tile, in Hilbert order."""
    skipped: dict[str, int]
    """Tiles that the condition picks but that have no embedding, by status."""
    codecs: list[Codec]
    """One, or several of one encoder and one shape."""
    layers: int

    def __len__(self) -> int:
        return int(self.rows.num_rows)

    @property
    def codec(self) -> Codec:
        """The first of the codecs: encoder, grid and layers are the same in all."""
        return self.codecs[0]

    @property
    def tokens(self) -> int:
        """Tokens of a tile."""
        return math.prod(self.grid)

    @property
    def grid(self) -> tuple[int, int]:
        """Token rows and columns of a tile."""
        return self.codec.spec.token_grid

    @property
    def channels(self) -> int:
        """Channels of the exported layers."""
        return sum(channels for _, channels in self.codec.spec.embedding_shapes(self.layers))

    @property
    def tile_bytes(self) -> int:
        """Bytes of a tile's embedding, float32."""
        return 4 * self.tokens * self.channels

    @property
    def batch_tiles(self) -> int:
        """Tiles whose embeddings are held at once."""
        return max(1, min(_BATCH_TILES, _BATCH_BYTES // self.tile_bytes))

    def batches(self, tiles: int) -> Iterator[tuple[int, pa.Table]]:
        """Parts of `rows`, each with the number of its first row."""
        for start in range(0, len(self), tiles):
            yield start, self.rows.slice(start, tiles)

    def index(self, part: pa.Table, columns: Sequence[str]) -> pa.Table:
        """Index columns of a part's tiles, in its order; `columns` has `tile_id`."""
        ids = part["tile_id"].to_pylist()
        query = f"SELECT {', '.join(columns)} FROM embeddings WHERE {_near(part)} AND tile_id IN (SELECT unnest(?))"
        found = self.archive.sql(query, [ids]).to_arrow_table()
        return found.take(pc.index_in(part["tile_id"].combine_chunks(), value_set=found["tile_id"].combine_chunks()))

    def embeddings(self, part: pa.Table) -> npt.NDArray[np.float32]:
        """Embeddings float32 (tiles, tokens, channels) of a part's tiles, in its order.

        Raises:
            CorruptPayload: a payload fails its checksum; the message names the tile.
        """
        ids = part["tile_id"].to_pylist()
        pull = self.archive.pull(_near(part), self.layers, ids)
        place = {tile_id: i for i, tile_id in enumerate(pull.tile_ids)}
        return pull.embeddings[[place[tile_id] for tile_id in ids]]

    def facts(self) -> dict[str, Any]:
        """What holds for all tiles and makes the export tell where it came from."""
        return {
            "archive": url_of(self.archive.url),
            "archive_version": self.archive.version,
            "codec_ids": [codec.id for codec in self.codecs],
            "encoder_id": self.codec.encoder_id,
            "grid": list(self.grid),
            "layers": self.layers,
            "licence": self.archive.info.licence,
            "attribution": self.archive.info.attribution,
        }

    def codec_url(self, codec: Codec, file: str = "codec.json") -> str:
        """URL of a file of a codec."""
        return f"{url_of(self.archive.url)}/codecs/{codec.id}/{file}"

    def patch(self) -> list[int]:
        """Rows and columns of pixels, of the encoder's input, for which a token stands."""
        return [self.codec.spec.input.size // side for side in self.grid]

    def source(self) -> str:
        """URL of what the tiles' sources share: the one file, or the folder around them all; else the index."""
        query = f"SELECT min(source), max(source) FROM embeddings WHERE status = 'valid' AND {_bracket(self.where)}"
        [(low, high)] = self.archive.sql(query).fetchall()
        both = zip(low.split("/"), high.split("/"), strict=False)
        shared = "/".join(left for left, _ in takewhile(lambda pair: pair[0] == pair[1], both))
        if not is_absolute(f"{shared}/") or shared.endswith(":/"):  # nothing, or no more than `s3://`
            return f"{url_of(self.archive.url)}/index"
        return url_of(shared)


def select(archive: Archive, where: str | None, layers: int | None) -> Selection:
    """The valid tiles that a condition picks.

    Raises:
        BadQuery: the condition does not parse.
        InputError: no valid tile fits, the codec has fewer layers, or the layers are of other grids than its finest.
        MixedCodecs: the tiles have embeddings of several encoders, or of several shapes.
    """
    rows = archive.rows(["tile_id", "status", "bbox", "acquired_at"], where)
    skipped = {
        status: pc.sum(pc.equal(rows["status"], status), min_count=0).as_py() or 0 for status in ("nodata", "failed")
    }
    rows = rows.filter(pc.equal(rows["status"], "valid")).drop_columns("status")
    if not rows.num_rows:
        raise nothing_fits(archive, where or "true", "export")
    codecs = archive.codecs(where)
    chosen = common_layers(archive.url, {codec.id: codec.spec for codec in codecs}, layers)
    grids = [scale.grid for scale in codecs[0].scales(len(chosen))]
    if any(grids != [codec.spec.token_grid] for codec in codecs):
        # One array and one grid a store, and the index's transforms are those of each codec's finest grid.
        raise InputError(
            f"{archive.url}: layers of the token grids {', '.join(f'{r} x {c}' for r, c in grids)}; exports hold one "
            "grid, the finest of the codec: use `nec pull`, which writes an array a grid"
        )
    rows = rows.take(pa.array(spatial_order(rows)))
    return Selection(archive, where, rows, skipped, codecs, len(chosen))


def edges(bbox: pa.ChunkedArray | pa.Array) -> npt.NDArray[np.float64]:
    """The struct column as float64 (4, tiles): xmin, ymin, xmax, ymax; NaN where a tile has no footprint."""
    box = bbox.combine_chunks() if isinstance(bbox, pa.ChunkedArray) else bbox
    return np.stack([pc.fill_null(pc.struct_field(box, e), np.nan).to_numpy(zero_copy_only=False) for e in EDGES])


def is_absolute(place: str) -> bool:
    """Whether a path or URL means the same thing everywhere on its machine, so that others can refer to it."""
    return "://" in place or (place.startswith("/") and bool(place.strip("/")))


def url_of(place: str) -> str:
    """A path as a file:// URL, a URL as it is but for secrets: others are going to read it."""
    return Path(place).as_uri() if place.startswith("/") else without_secrets(place)


def _near(part: pa.Table) -> str:
    """A condition that all of a part's tiles meet and few others, by which whole row groups need not be read."""
    xmin, ymin, xmax, ymax = edges(part["bbox"])
    limits = [xmin.min(), ymin.min(), xmax.max(), ymax.max()]
    if not np.isfinite(limits).all():  # some tile has no footprint
        return "true"
    # The exponent makes them doubles: a plain 0.1 is a decimal in SQL, and rounds otherwise.
    tests = zip(EDGES, (">=", ">=", "<=", "<="), limits, strict=True)
    return " AND ".join(f"bbox.{edge} {sign} {limit:.17e}" for edge, sign, limit in tests)


def _bracket(where: str | None) -> str:
    """The condition in brackets; `select` has found that it is one expression."""
    return f"({where}\n)" if where and where.strip() else "true"  # the line break ends a comment

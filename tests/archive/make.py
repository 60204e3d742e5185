"""Small archives for tests: real packs and a real index, symbols drawn from the test codec's densities."""

from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa
from shapely import box

from nec_ray.archive import open_archive
from nec_ray.archive.index import Index
from nec_ray.archive.layout import ArchiveInfo, create_archive, install_codec
from nec_ray.archive.pack import write_pack
from nec_ray.codec import Codec, Transform, load_codec
from nec_ray.contracts import arrow_schema
from nec_ray.storage import Store
from tests.codec.make import SCALES, laplacian_symbols, make_codec, scaled_symbols

TOKENS = 16


@dataclass
class Made:
    url: str
    store: Store
    index: Index
    codec: Codec
    symbols: dict[str, npt.NDArray[np.int32]]
    """What was encoded, by tile id."""


def empty_archive(
    folder: Path,
    *,
    layers: tuple[int, ...] = (8, 16),
    seed: int = 0,
    url: str | None = None,
    transform: Transform | None = None,
) -> Made:
    """An archive at `url`, in `folder` where it is None."""
    make_codec(folder / "codec", layers=layers, seed=seed, transform=transform)
    codec = load_codec(folder / "codec")
    store = Store(url or folder / "archive")
    create_archive(store, ArchiveInfo(licence="CC0", attribution="nobody"))
    install_codec(store, codec)
    index = Index(store)
    index.create()
    return Made(store.url, store, index, codec, {})


def index_rows(tile_ids: list[str], codec_id: str, status: list[str] | None = None) -> pa.Table:
    """Index rows on a grid of a tenth of a degree, without payloads."""
    n = len(tile_ids)
    status = status or ["valid"] * n
    boxes = [(i % 10 / 10, i // 10 / 10, i % 10 / 10 + 0.1, i // 10 / 10 + 0.1) for i in range(n)]
    columns = {
        "tile_id": tile_ids,
        "source": ["scene.tif"] * n,
        "source_etag": ["1"] * n,
        "acquired_at": [datetime(2020, 5, 18, tzinfo=UTC)] * n,
        "geometry": [box(*b).wkb for b in boxes],
        "bbox": [dict(zip(("xmin", "ymin", "xmax", "ymax"), b, strict=True)) for b in boxes],
        "codec_id": [codec_id] * n,
        "n_bytes": [0] * n,
        "status": status,
        "reason": [None if s == "valid" else "test" for s in status],
        "encoded_at": [datetime.now(UTC)] * n,
        "encoded_from": ["pixels"] * n,
        "label": [("water", "forest")[i % 2] for i in range(n)],
    }
    schema = arrow_schema("index.json")
    return pa.table([pa.array(columns.get(f.name, [None] * n), f.type) for f in schema], schema=schema)


def pack(made: Made, tile_ids: list[str], status: list[str] | None = None, seed: int = 0) -> pa.Table:
    """Write a pack of random symbols; its index rows."""
    rows = index_rows(tile_ids, made.codec.id, status)
    symbols = laplacian_symbols(np.random.default_rng(seed), SCALES, len(tile_ids), TOKENS)
    symbols = np.ascontiguousarray(symbols[:, :, : made.codec.spec.channels])
    payloads: list[bytes | None] = list(made.codec.compress(symbols))
    for i, one in enumerate(rows["status"].to_pylist()):
        if one == "valid":
            made.symbols[tile_ids[i]] = symbols[i]
        else:
            payloads[i] = None
    lengths = [None if p is None else made.codec.layer_lengths([p])[0].tolist() for p in payloads]
    return write_pack(made.store, made.codec.id, rows, payloads, lengths)


def filled_archive(folder: Path, tiles: int = 40, url: str | None = None, transform: Transform | None = None) -> Made:
    """An archive of one commit: ids t000, t001, ...; the last is no-data, the one before failed."""
    made = empty_archive(folder, url=url, transform=transform)
    status = ["valid"] * (tiles - 2) + ["failed", "nodata"]
    rows = pack(made, [f"t{i:03}" for i in range(tiles)], status)
    made.index.append(made.index.version(), rows)
    return made


@dataclass
class MadeOfScales:
    url: str
    store: Store
    index: Index
    codec: Codec
    symbols: dict[str, tuple[npt.NDArray[np.int32], ...]]
    """What was encoded, by tile id: an array a scale."""


def scaled_archive(folder: Path, tiles: int = 12) -> MadeOfScales:
    """Tiles t00, t01, ... of 4 tokens x 14 channels, in layers of 8 and 6, and 16 x 10, in a third."""
    layers, scales = (8, 6, 10), (2, 2, 1)
    make_codec(folder / "codec", layers=layers, scales=scales)
    codec, store = load_codec(folder / "codec"), Store(folder / "archive")
    create_archive(store, ArchiveInfo(licence="CC0", attribution="nobody"))
    install_codec(store, codec)
    index = Index(store)
    index.create()
    symbols = scaled_symbols(np.random.default_rng(1), layers, scales, [4, 4, 16], tiles)
    payloads = codec.compress(symbols)
    ids = [f"t{i:02}" for i in range(tiles)]
    lengths = codec.layer_lengths(payloads).tolist()
    index.append(index.version(), write_pack(store, codec.id, index_rows(ids, codec.id), list(payloads), lengths))
    return MadeOfScales(store.url, store, index, codec, dict(zip(ids, zip(*symbols, strict=True), strict=True)))


def damage(made: Made | MadeOfScales, tile_id: str) -> None:
    """Change a bit in a tile's payload."""
    [(name, offset)] = (
        open_archive(made.url)
        .sql("SELECT payload.pack, payload.offset FROM embeddings WHERE tile_id = ?", [tile_id])
        .fetchall()
    )
    path = Path(made.url) / name
    data = bytearray(path.read_bytes())
    data[offset + 9] ^= 4
    path.write_bytes(data)

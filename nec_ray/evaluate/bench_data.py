"""A synthetic archive's tiles: real payloads of random symbols, and index rows as a continent's would look."""

import hashlib
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from nec_ray.codec import Codec, EntropyTables, InputSpec, LayerSpec, Lineage, Payloads, load_codec, write_codec
from nec_ray.contracts import arrow_schema
from nec_ray.evaluate.bench_codec import logistic_pmf
from nec_ray.tiles.hilbert import spatial_order

GRID = (14, 14)
LAYERS = (8, 8, 8)
CLASSES = 100
_TOKENS, _CHANNELS = GRID[0] * GRID[1], sum(LAYERS)
_MEDIAN_BYTES, _SIGMA = 2000.0, 0.3
"""Payload sizes are log-normal, as those of real scenes: half of them within a fifth of the median."""
_WIDTHS = np.geomspace(1.6, 0.25, _CHANNELS)
_GAINS = np.geomspace(0.12, 10, 24)
_STRIPE = 4096
"""Tokens of random symbols from which tiles are cut at random places."""
_BATCH = 4096
CELL = 0.02
"""Degrees of a grid cell: 2.2 km, as 224 pixels of 10 m."""
_SOURCECELLS = 49


@dataclass(frozen=True)
class Tiles:
    """Tiles in Hilbert order."""

    codec: Codec
    rows: pa.Table
    """Index rows (schema index.json), without `payload`."""
    payloads: Payloads
    lengths: npt.NDArray[np.int32]
    """(tiles, layers) bytes."""


def make_tiles(count: int, codec_folder: Path, seed: int = 0) -> Tiles:
    """`count` tiles of one codec, which is written to `codec_folder`; the same for the same arguments."""
    rng = np.random.default_rng(seed)
    codec = _codec(codec_folder, rng)
    payloads = _payloads(codec, count, rng)
    lengths = codec.layer_lengths(payloads)
    return Tiles(codec, _rows(count, codec, payloads, rng), payloads, lengths)


def _codec(folder: Path, rng: np.random.Generator) -> Codec:
    pmfs, firsts = zip(*(logistic_pmf(width) for width in _WIDTHS), strict=True)
    dead = np.zeros(_CHANNELS, bool)
    write_codec(
        folder,
        family="mae_vit",
        architecture={"dim": _CHANNELS, "patch": 16},
        input=InputSpec(bands=["red", "green", "blue"], mean=[0.0] * 3, std=[1.0] * 3, size=224),
        grid=GRID,
        layers=[LayerSpec(channels=n, tokens=_TOKENS) for n in LAYERS],
        lineage=Lineage(data="synthetic", licence="none", beta=0.1, bits_per_symbol=3.4),
        tables=EntropyTables.from_pmf(list(pmfs), np.array(firsts), np.zeros(_CHANNELS), dead, _TOKENS),
        encoder={"weight": rng.standard_normal((3, _CHANNELS)).astype(np.float32)},
        decoder={"weight": rng.standard_normal((_CHANNELS, 8)).astype(np.float32)},
        calibration=_symbols(rng, 1.0, 40 * _TOKENS).reshape(40, _TOKENS, _CHANNELS),
    )
    return load_codec(folder)


def _symbols(rng: np.random.Generator, gain: float, tokens: int) -> npt.NDArray[np.int32]:
    return np.rint(rng.logistic(0, _WIDTHS * gain, (tokens, _CHANNELS))).astype(np.int32)


def _payloads(codec: Codec, count: int, rng: np.random.Generator) -> Payloads:
    """Payloads whose sizes are log-normal: the wider the symbols, the more bytes."""
    stripes = np.stack([_symbols(rng, gain, _STRIPE) for gain in _GAINS])
    sizes = [codec.compress(stripe[None, :_TOKENS]).length[0] for stripe in stripes]
    wanted = _MEDIAN_BYTES * np.exp(_SIGMA * rng.standard_normal(count))
    level = np.abs(np.log(wanted)[:, None] - np.log(sizes)[None]).argmin(axis=1)
    start = rng.integers(0, _STRIPE - _TOKENS, count)
    parts = []
    for first in range(0, count, _BATCH):
        mine = slice(first, min(first + _BATCH, count))
        tokens = start[mine, None] + np.arange(_TOKENS)
        parts.append(codec.compress(stripes[level[mine, None], tokens]))
    length = np.concatenate([part.length for part in parts])
    data = np.concatenate([np.concatenate([np.frombuffer(p, np.uint8) for p in part]) for part in parts])
    data.flags.writeable = False
    return Payloads(data, np.cumsum(length) - length, length)


def _rows(count: int, codec: Codec, payloads: Payloads, rng: np.random.Generator) -> pa.Table:
    """Cells of a grid whose rows are as far apart as its columns in kilometres, in Hilbert order."""
    side = int(np.ceil(np.sqrt(count)))
    lat_of, lon_of = np.divmod(np.arange(side * side)[:count], side)
    lat = 36.0 + CELL * lat_of
    stretch = 1 / np.cos(np.radians(lat))
    lon = -8.0 + CELL * stretch * lon_of
    # Windows of a projected grid are a little turned and shrunk in degrees, so that no two share a bound.
    turn = 0.01 * np.sin(np.radians(lon)) * np.sin(np.radians(lat))
    half_x, half_y = CELL * stretch * (0.49 - np.abs(turn)), CELL * (0.49 - np.abs(turn))
    box = {"xmin": lon - half_x, "ymin": lat - half_y, "xmax": lon + half_x, "ymax": lat + half_y}
    bbox = pa.StructArray.from_arrays([pa.array(edge) for edge in box.values()], list(box))
    order = spatial_order(pa.table({"bbox": bbox, "tile_id": np.arange(count)}))
    lat_of, lon_of, bbox = lat_of[order], lon_of[order], bbox.take(pa.array(order))
    box = {name: edge[order] for name, edge in box.items()}
    source = (lat_of // _SOURCECELLS) * 1000 + lon_of // _SOURCECELLS
    taken = [datetime(2024, 6, 1, 10, tzinfo=UTC) + timedelta(days=int(s) % 37, seconds=int(s)) for s in source]
    digests = [hashlib.sha256(payload).digest() for payload in payloads]
    columns = {
        "tile_id": [f"{a:04d}U_{o:04d}R" for a, o in zip(lat_of, lon_of, strict=True)],
        "source": [f"s3://imagery/sentinel-2/l2a/2024/{s:06d}.tif" for s in source],
        "source_etag": [hashlib.md5(str(s).encode(), usedforsecurity=False).hexdigest() for s in source],
        "acquired_at": taken,
        "sensor": ["sentinel-2"] * count,
        "geometry": _polygons(box),
        "crs": ["EPSG:32631"] * count,
        "transform": [[160.0, 0.0, 2240.0 * o, 0.0, -160.0, 2240.0 * a] for a, o in zip(lat_of, lon_of, strict=True)],
        "grid": [{"rows": GRID[0], "cols": GRID[1]}] * count,
        "label": [f"class {n:02d}" for n in rng.integers(0, CLASSES, count)],
        "nodata_share": np.where(rng.random(count) < 0.9, 0, rng.random(count)).astype(np.float32),
        "codec_id": [codec.id] * count,
        "sha256": digests,
        "n_bytes": payloads.length.astype(np.int32),
        "status": ["valid"] * count,
        "encoded_at": [datetime(2026, 11, 21, tzinfo=UTC) + timedelta(seconds=n // 64) for n in range(count)],
        "encoded_from": ["pixels"] * count,
        "pooled": list(np.clip(np.rint(rng.normal(0, 30, (count, 24))), -127, 127).astype(np.int8)),
    }
    schema = arrow_schema("index.json")
    arrays = {
        field.name: bbox.cast(field.type)
        if field.name == "bbox"
        else pa.array(columns.get(field.name, [None] * count), field.type)
        for field in schema
        if field.name != "payload"
    }
    return pa.table(arrays)


def _polygons(box: dict[str, npt.NDArray[np.float64]]) -> list[bytes]:
    """WKB of rectangles, little-endian."""
    xs = [box[name] for name in ("xmin", "xmax", "xmax", "xmin", "xmin")]
    ys = [box[name] for name in ("ymin", "ymin", "ymax", "ymax", "ymin")]
    rings = np.stack([np.stack(xs, 1), np.stack(ys, 1)], 2).astype("<f8")
    head = b"\x01" + (3).to_bytes(4, "little") + (1).to_bytes(4, "little") + (5).to_bytes(4, "little")
    return [head + ring.tobytes() for ring in rings]

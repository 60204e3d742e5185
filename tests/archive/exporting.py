"""What the tests of the exports share: an archive with awkward tiles, and its embeddings by an oracle of their own."""

from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from nec_ray.archive.layout import install_codec
from nec_ray.archive.pack import write_pack
from tests.archive.make import TOKENS, Made, empty_archive, filled_archive, index_rows, pack
from tests.codec.make import SCALES, laplacian_symbols

ENCODED = datetime(2026, 3, 1, 12, 30, tzinfo=UTC)


def awkward_archive(folder: Path) -> Made:
    """`filled_archive`, and tiles of a second commit: strange ids, no footprint, no time, a CRS and a transform."""
    made = filled_archive(folder)
    ids = ["a/b ü.tif#1", "A1", "a1", "nowhere", "untimed", "placed"]
    rows = index_rows(ids, made.codec.id)
    columns = {
        "geometry": [None if i == "nowhere" else g for i, g in zip(ids, rows["geometry"].to_pylist(), strict=True)],
        "bbox": [None if i == "nowhere" else b for i, b in zip(ids, rows["bbox"].to_pylist(), strict=True)],
        "acquired_at": [None if i == "untimed" else datetime(2021, 1, 2, 3, 4, 5, 678901, tzinfo=UTC) for i in ids],
        "encoded_at": [ENCODED] * len(ids),
        "crs": [None] * 5 + ["EPSG:32621"],
        "transform": [None] * 5 + [[240.0, 0.0, 5e5, 0.0, -240.0, 4e6]],
        "source": [f"s3://scenes/2021/{i}.tif" for i in range(len(ids))],
    }
    for name, values in columns.items():
        at = rows.schema.get_field_index(name)
        rows = rows.set_column(at, rows.schema.field(name), pa.array(values, rows.schema.field(name).type))
    symbols = laplacian_symbols(np.random.default_rng(5), SCALES, len(ids), TOKENS)
    payloads = list(made.codec.compress(symbols))
    lengths = [made.codec.layer_lengths([payload])[0].tolist() for payload in payloads]
    made.symbols |= dict(zip(ids, symbols, strict=True))
    made.index.append(made.index.version(), write_pack(made.store, made.codec.id, rows, payloads, lengths))
    return made


def expected(made: Made, tile_ids: list[str], channels: int = 24) -> npt.NDArray[np.float32]:
    """Embeddings (tiles, tokens, channels): symbols plus medians, by no code of the exports."""
    whole = np.stack([made.symbols[tile_id] for tile_id in tile_ids]) + made.codec.tables.median
    return whole[:, :, :channels].astype(np.float32)


def mixed_archive(folder: Path) -> tuple[Made, str]:
    """An archive of two encoders, and the codec of the tile `foreign`."""
    made = filled_archive(folder)
    other = empty_archive(folder / "other", seed=1)
    other.store, other.index, other.url = made.store, made.index, made.url
    install_codec(made.store, other.codec)
    made.index.append(made.index.version(), pack(other, ["foreign"]))
    return made, other.codec.id

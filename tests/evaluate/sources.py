"""An archive's stand-in: tiles of a lon/lat grid held in memory, with the archive's own index columns."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import duckdb
import numpy as np
import numpy.typing as npt
import pyarrow as pa
import shapely

from nec_ray.codec import Codec
from nec_ray.contracts import arrow_schema
from nec_ray.errors import InputError

ENCODER = "ab" * 32


@dataclass
class MemoryPull:
    tile_ids: list[str]
    embeddings: npt.NDArray[np.float32]
    grid: tuple[int, int]
    encoder_id: str
    n_bytes: npt.NDArray[np.int64]

    @property
    def grids(self) -> tuple[tuple[int, int], ...]:
        return (self.grid,)

    @property
    def coded_channels(self) -> int:
        return self.embeddings.shape[2]


@dataclass
class MemorySource:
    """What `EmbeddingSource` asks for, over arrays; `pulls` counts the tiles of each pull."""

    table: pa.Table
    embeddings: npt.NDArray[np.float32]
    encoder_id: str = ENCODER
    url: str = "memory"
    layer_channels: tuple[int, ...] = ()
    made_by: list[Codec] = field(default_factory=list)
    pulls: list[int] = field(default_factory=list)

    def rows(self, columns: Sequence[str], where: str | None = None) -> pa.Table:
        embeddings = self.table  # noqa: F841 - DuckDB finds the view's table by this name
        query = f"SELECT {', '.join(columns)} FROM embeddings WHERE {where or 'true'} ORDER BY tile_id"
        found = duckdb.sql(query)
        assert found is not None
        return found.to_arrow_table()

    def pull(
        self, where: str | None = None, layers: int | None = None, tile_ids: Sequence[str] | None = None
    ) -> MemoryPull:
        found = self.rows(["tile_id"], f"({where or 'true'}) AND status = 'valid'")["tile_id"].to_pylist()
        wanted = found if tile_ids is None else sorted(set(found) & set(tile_ids))
        if not wanted:
            raise InputError(f"{self.url}: no valid tile fits; nothing to pull")
        self.pulls.append(len(wanted))
        place = {name: i for i, name in enumerate(self.table["tile_id"].to_pylist())}
        chosen = self.embeddings[[place[name] for name in wanted]]
        channels = chosen.shape[2] if layers is None else sum(self.layer_channels[:layers])
        n_bytes = np.array([100 + place[name] for name in wanted], np.int64)
        side = round(chosen.shape[1] ** 0.5)
        return MemoryPull(wanted, chosen[:, :, :channels], (side, side), self.encoder_id, n_bytes)

    def codecs(self, where: str | None = None) -> list[Codec]:
        return self.made_by if self.rows(["tile_id"], where).num_rows else []


def grid_rows(
    n_rows: int, n_cols: int, *, x: float = 10.0, y: float = 50.0, step: float = 0.1, tilt: float = 0.0
) -> pa.Table:
    """Index rows of a grid of valid tiles, row by row from the south-west; `tilt` makes them parallelograms."""
    columns: dict[str, list[object]] = {name: [] for name in arrow_schema("index.json").names}
    for row in range(n_rows):
        for col in range(n_cols):
            west, south = x + col * step + row * tilt, y + row * step
            corners = [
                (west, south),
                (west + step, south),
                (west + step + tilt, south + step),
                (west + tilt, south + step),
            ]
            polygon = shapely.Polygon(corners)
            xmin, ymin, xmax, ymax = polygon.bounds
            values: dict[str, object] = {
                "tile_id": f"tile-{row:02d}-{col:02d}",
                "source": "memory",
                "source_etag": "1",
                "geometry": shapely.to_wkb(polygon),
                "bbox": {"xmin": xmin, "ymin": ymin, "xmax": xmax, "ymax": ymax},
                "grid": {"rows": 4, "cols": 4},
                "codec_id": "cd" * 32,
                "n_bytes": 100,
                "status": "valid",
                "encoded_at": 0,
                "encoded_from": "pixels",
            }
            for name, column in columns.items():
                column.append(values.get(name))
    return pa.table(columns, schema=arrow_schema("index.json"))


def separable(
    rows: pa.Table, classes: int, *, tokens: int = 16, channels: int = 24, seed: int = 0
) -> tuple[npt.NDArray[np.float32], list[str]]:
    """Embeddings whose class shows in a few tokens only, and the classes' names in equal numbers."""
    rng = np.random.default_rng(seed)
    target = rng.permutation(np.arange(rows.num_rows) % classes)
    x = rng.normal(size=(rows.num_rows, tokens, channels)).astype(np.float32)
    centre = rng.normal(size=(classes, channels)).astype(np.float32) * 4
    for i, number in enumerate(target):
        x[i, rng.choice(tokens, 3, replace=False)] += centre[number]
    return x, [f"class {number}" for number in target]

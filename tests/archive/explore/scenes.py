"""Archives to explore: with real payloads and awkward texts, and large ones of index rows alone."""

from datetime import UTC, datetime, timedelta
from pathlib import Path

import numpy as np
import pyarrow as pa

from tests.archive.make import Made, empty_archive, index_rows, pack

EVIL = [
    "</script><script>document.title='broken'</script>",
    "<img src=x onerror=\"document.title='broken'\">",
    'it\'s "quoted" \\ and\nbroken',
    "right \u202eot tfel\u202c",
    "a${b}`c` ünï 🛰",
]


def with_columns(rows: pa.Table, **columns: list[object]) -> pa.Table:
    """The rows with other values in some columns."""
    for name, values in columns.items():
        at = rows.schema.get_field_index(name)
        rows = rows.set_column(at, rows.schema.field(at), pa.array(values, rows.schema.field(at).type))
    return rows


def small_archive(folder: Path) -> Made:
    """49 tiles: t00 ... t39, those of EVIL, `twin` on the footprint of t00 a year later, failed, no-data, placeless."""
    made = empty_archive(folder)
    names = [f"t{i:02}" for i in range(40)] + EVIL + ["twin", "zfailed", "znodata", "znowhere"]
    status = ["valid"] * 46 + ["failed", "nodata", "valid"]
    rows = pack(made, names, status)
    rng = np.random.default_rng(5)
    vectors = rng.integers(-127, 128, (len(names), 24)).astype(np.int8)
    vectors[20], vectors[30], vectors[31] = vectors[10], 0, -vectors[10]
    times = [datetime(2020, 5, 1, tzinfo=UTC) + timedelta(days=i) for i in range(len(names))]
    times[45] = datetime(2021, 5, 1, tzinfo=UTC)
    boxes = rows["bbox"].to_pylist()
    boxes[45], boxes[48] = boxes[0], None
    rows = with_columns(
        rows,
        pooled=[None if s != "valid" else v.tolist() for s, v in zip(status, vectors, strict=True)],
        acquired_at=[None if i == 39 else time for i, time in enumerate(times)],
        bbox=boxes,
        reason=[None if s == "valid" else EVIL[0] for s in status],
        label=[EVIL[1] if i == 40 else "water" for i in range(len(names))],
        source=["https://user:hunter2@store/scene.tif?sig=abcd"] * len(names),
    )
    made.index.append(made.index.version(), rows)
    return made


def large_archive(folder: Path, tiles: int = 200_000) -> Made:
    """Index rows alone, over a part of Europe: vectors and bytes vary with the place, and there is a hole."""
    made = empty_archive(folder)
    side = int(np.ceil(np.sqrt(tiles)))
    i = np.arange(tiles)
    lon, lat = i % side * 0.03, 40 + i // side * 0.02
    rng = np.random.default_rng(1)
    waves = np.stack([np.sin(lon * a + lat * b) for a, b in rng.normal(0, 1.2, (24, 2))], 1)
    vectors = np.clip(60 * waves + rng.normal(0, 8, waves.shape), -127, 127).astype(np.int8)
    valid = np.hypot(lon - 6, lat - 46) > 0.8
    status = np.where(valid, "valid", np.where(i % 7 == 0, "failed", "nodata"))
    rows = index_rows(["x"], made.codec.id).schema
    box = pa.StructArray.from_arrays([lon, lat, lon + 0.03, lat + 0.02], names=["xmin", "ymin", "xmax", "ymax"])
    pooled = pa.ListArray.from_arrays(np.arange(0, 24 * tiles + 1, 24, dtype=np.int32), pa.array(vectors.reshape(-1)))
    columns = {
        "tile_id": [f"europe/{n:06d}" for n in i],
        "source": ["scene.tif"] * tiles,
        "source_etag": ["1"] * tiles,
        "acquired_at": pa.array(1_588_291_200_000_000 + i * 86_400_000, pa.timestamp("us", "UTC")),
        "bbox": box,
        "label": [f"class {n % 9}" for n in i],
        "codec_id": [made.codec.id] * tiles,
        "n_bytes": np.where(valid, 800 + 400 * waves[:, 0] + rng.normal(0, 40, tiles), 0).astype(np.int32),
        "status": status,
        "encoded_at": [datetime(2026, 1, 1, tzinfo=UTC)] * tiles,
        "encoded_from": ["pixels"] * tiles,
        "pooled": pooled,
    }
    arrays = []
    for field in rows:
        given = columns.get(field.name, pa.nulls(tiles, field.type))
        arrays.append(given.cast(field.type) if isinstance(given, pa.Array) else pa.array(given, field.type))
    made.index.append(made.index.version(), pa.table(arrays, schema=rows))
    return made

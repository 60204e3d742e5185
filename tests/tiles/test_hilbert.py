import numpy as np
import pyarrow as pa

from nec_ray.tiles import spatial_order
from nec_ray.tiles.hilbert import hilbert_distance


def scalar_hilbert(n: int, x: int, y: int) -> int:
    """One point at a time, by recursion on quadrants: lower left, upper left, upper right, lower right."""
    if n == 1:
        return 0
    half = n // 2
    if x < half and y < half:
        return scalar_hilbert(half, y, x)
    if x < half:
        return half * half + scalar_hilbert(half, x, y - half)
    if y >= half:
        return 2 * half * half + scalar_hilbert(half, x - half, y - half)
    return 3 * half * half + scalar_hilbert(half, half - 1 - y, 2 * half - 1 - x)


def tiles(centres: list[tuple[float, float] | None], ids: list[str]) -> pa.Table:
    boxes = [
        None if c is None else {"xmin": c[0] - 0.01, "ymin": c[1] - 0.01, "xmax": c[0] + 0.01, "ymax": c[1] + 0.01}
        for c in centres
    ]
    kind = pa.struct([(name, pa.float64()) for name in ("xmin", "ymin", "xmax", "ymax")])
    return pa.table({"tile_id": ids, "bbox": pa.array(boxes, kind)})


def test_distance_is_that_of_the_recursive_curve(rng: np.random.Generator) -> None:
    side = 1 << 16
    lon, lat = rng.uniform(-180, 180, 500), rng.uniform(-90, 90, 500)
    x, y = ((lon + 180) / 360 * side).astype(int), ((lat + 90) / 180 * side).astype(int)
    expected = [scalar_hilbert(side, int(a), int(b)) for a, b in zip(x, y, strict=True)]
    assert hilbert_distance(lon, lat).tolist() == expected


def test_consecutive_cells_of_the_curve_touch() -> None:
    side = 1 << 16
    x, y = (a.ravel() for a in np.meshgrid(np.arange(64), np.arange(64)))  # 64 x 64 cells at the curve's start
    order = np.argsort(hilbert_distance((x + 0.5) / side * 360 - 180, (y + 0.5) / side * 180 - 90))
    assert set(np.abs(np.diff(x[order])) + np.abs(np.diff(y[order]))) == {1}


def test_order_does_not_depend_on_the_rows_order(rng: np.random.Generator) -> None:
    centres = [(float(a), float(b)) for a, b in rng.uniform(-80, 80, (300, 2))]
    table = tiles([*centres, *centres[:50], *[None] * 20], [f"t{i:03}" for i in rng.permutation(370)])
    ordered = table.take(pa.array(spatial_order(table)))
    shuffled = table.take(pa.array(rng.permutation(370)))
    assert shuffled.take(pa.array(spatial_order(shuffled))).equals(ordered.combine_chunks())


def test_ties_and_tiles_without_a_place_go_by_id() -> None:
    table = tiles([None, (5, 5), (5, 5), None, (5, 5)], ["b", "z", "é", "a", "c"])
    order = spatial_order(table)
    assert order.dtype == np.int64
    assert table["tile_id"].take(pa.array(order)).to_pylist() == ["c", "z", "é", "a", "b"]


def test_the_rim_of_the_world_and_an_empty_table() -> None:
    table = tiles([(180, 90), (-180, -90), (180, -90)], ["ne", "sw", "se"])
    assert table["tile_id"].take(pa.array(spatial_order(table))).to_pylist() == ["sw", "ne", "se"]
    assert spatial_order(table.slice(0, 0)).tolist() == []

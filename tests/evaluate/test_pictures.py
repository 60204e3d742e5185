from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image

from nec_ray.errors import InputError
from nec_ray.evaluate.pictures import (
    PLACEMENT_ROWS,
    Placement,
    Scene,
    bytes_map,
    class_map,
    confusion_matrix,
    pca_false_colour,
    place,
    scene_and_embeddings,
)
from tests.evaluate.sources import grid_rows


def test_pca_against_numpys_svd() -> None:
    rng = np.random.default_rng(0)
    x = (rng.normal(size=(30, 16, 12)) @ rng.normal(size=(12, 12))).astype(np.float32)
    flat = x.reshape(-1, 12).astype(np.float64)
    centred = flat - flat.mean(axis=0)
    _, _, axes = np.linalg.svd(centred, full_matrices=False)
    for i in range(3):
        axis = axes[i] * np.sign(axes[i][np.abs(axes[i]).argmax()])
        shown = centred @ axis
        low, high = np.percentile(shown, (2, 98))
        expected = np.rint(np.clip((shown - low) / (high - low), 0, 1) * 255)
        got = pca_false_colour(x)[..., i].reshape(-1).astype(float)
        assert np.abs(got - expected).max() <= 1


def test_pca_of_a_sample_is_close_and_does_not_change_from_run_to_run() -> None:
    rng = np.random.default_rng(1)
    x = (rng.normal(size=(200, 16, 12)) * np.geomspace(8, 0.1, 12)).astype(np.float32)
    whole, part = pca_false_colour(x).astype(int), pca_false_colour(x, sample=800).astype(int)
    assert np.abs(whole - part).mean() < 8
    np.testing.assert_array_equal(pca_false_colour(x, sample=800), part)


def test_embeddings_that_do_not_vary_are_grey_and_two_channels_do() -> None:
    assert set(pca_false_colour(np.full((3, 4, 5), 2.5, np.float32)).ravel().tolist()) == {128}
    two = pca_false_colour(np.random.default_rng(0).normal(size=(9, 4, 2)).astype(np.float32))
    assert (two[..., 2] == 128).all()
    assert np.ptp(two[..., 1]) == 255


def test_place_takes_the_tiles_own_crs_where_they_share_one() -> None:
    rows = grid_rows(1, 2)
    rows = rows.set_column(rows.schema.get_field_index("crs"), "crs", pa.array(["EPSG:32621"] * 2))
    affine = [[60.0, 0.0, 700000.0, 0.0, -30.0, 100.0], [60.0, 0.0, 700240.0, 0.0, -30.0, 100.0]]
    rows = rows.set_column(rows.schema.get_field_index("transform"), "transform", pa.array(affine))
    where = place(rows.select(list(PLACEMENT_ROWS)))
    assert where.crs == "EPSG:32621"
    # 4 x 4 tokens of 60 x 30 m, two tiles beside each other
    assert where.extent == pytest.approx((700000, 700480, -20, 100))
    tilted = pa.array([[60.0, 1.0, 700000.0, 0.0, -30.0, 100.0]] * 2)
    rows = rows.set_column(rows.schema.get_field_index("transform"), "transform", tilted)
    assert place(rows).crs == "OGC:CRS84"


def test_place_takes_degrees_else_and_refuses_tiles_without_a_place() -> None:
    rows = grid_rows(2, 3)
    where = place(rows)
    assert where.crs == "OGC:CRS84"
    assert where.extent == pytest.approx((10, 10.3, 50, 50.2))
    at = rows.schema.get_field_index("bbox")
    with pytest.raises(InputError, match="have no place on the map"):
        place(rows.set_column(at, "bbox", pa.nulls(6, rows.schema.field("bbox").type)))


def board(n_rows: int, n_cols: int) -> Placement:
    col, row = np.tile(np.arange(n_cols), n_rows) * 1.0, np.repeat(np.arange(n_rows), n_cols) * 1.0
    return Placement(left=col, bottom=n_rows - 1 - row, right=col + 1, top=n_rows - row, crs="EPSG:32621")


def colours(path: Path) -> dict[tuple[int, int, int], int]:
    """Pixels of each colour."""
    with Image.open(path) as image:
        packed = np.asarray(image.convert("RGB")).astype(int) @ (1 << 16, 1 << 8, 1)
    found, count = np.unique(packed, return_counts=True)
    return {(c >> 16, c >> 8 & 255, c & 255): n for c, n in zip(found.tolist(), count.tolist(), strict=True)}


def test_class_map_gives_each_class_its_share_of_the_map(tmp_path: Path) -> None:
    labels = ["a"] * 12 + ["b"] * 4
    found = colours(class_map(None, board(4, 4), labels, tmp_path / "a.png"))
    blue, orange = found[0x00, 0x72, 0xB2], found[0xE6, 0x9F, 0x00]
    assert blue / orange == pytest.approx(3, rel=0.15)  # the legend's two patches are in it too


def test_class_map_of_more_classes_than_colours(tmp_path: Path) -> None:
    labels = [f"class {i % 12}" for i in range(36)]
    found = colours(class_map(None, board(6, 6), labels, tmp_path / "a.png", confidence=np.ones(36, np.float32)))
    grey, blue = found[0x9A, 0x9A, 0x9A], found[0x00, 0x72, 0xB2]
    assert grey / blue == pytest.approx(4, rel=0.25)  # four classes share grey


def test_tokens_are_painted_in_their_places(tmp_path: Path) -> None:
    """North up, rows from the top: a tile whose first token differs shows it in its upper left."""
    x = np.zeros((4, 4, 3), np.float32)
    x[0, 0] = 1  # the north-west tile's north-west token
    out = scene_and_embeddings(None, board(2, 2), x, (2, 2), tmp_path / "a.png", title="")
    image = np.asarray(Image.open(out).convert("RGB")).astype(int)
    lit = np.argwhere((image == (255, 128, 128)).all(axis=2))
    dark = np.argwhere((image == (0, 128, 128)).all(axis=2))
    assert len(dark) / len(lit) == pytest.approx(15, rel=0.05)
    assert lit.max(axis=0).tolist() < (dark.min(axis=0) + np.ptp(dark, axis=0) // 2).tolist()
    assert lit.min(axis=0) == pytest.approx(dark.min(axis=0), abs=3)


def test_the_other_pictures_are_drawn(tmp_path: Path) -> None:
    scene = Scene(np.zeros((20, 30, 3), np.uint8), (0, 3, 0, 2))
    where = board(2, 3)
    x = np.random.default_rng(0).normal(size=(6, 4, 5)).astype(np.float32)
    for path in (
        scene_and_embeddings(scene, where, x, (2, 2), tmp_path / "deep" / "emb.png"),
        bytes_map(where, np.arange(6) * 100, tmp_path / "bytes.png", scene=scene),
        bytes_map(where, np.full(6, 700), tmp_path / "same.png"),
        confusion_matrix(
            np.eye(30, dtype=np.int64) * 9, [f"a long class name {i}" for i in range(30)], tmp_path / "c.png"
        ),
        confusion_matrix(np.zeros((2, 2), np.int64), ["a", "b"], tmp_path / "empty.png"),
    ):
        assert len(colours(path)) > 5


def test_a_pattern_that_is_the_same_in_every_tile_is_taken_out(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    x = np.repeat(rng.normal(size=(36, 1, 3)), 4, axis=1).astype(np.float32)  # a tile's tokens are alike
    pattern = rng.normal(size=(1, 4, 3)).astype(np.float32) * 9
    plain = scene_and_embeddings(None, board(6, 6), x, (2, 2), tmp_path / "plain.png")
    hidden = scene_and_embeddings(None, board(6, 6), x + pattern, (2, 2), tmp_path / "hidden.png")
    a, b = (np.asarray(Image.open(path).convert("RGB")).astype(int) for path in (plain, hidden))
    assert np.abs(a - b).max() <= 2

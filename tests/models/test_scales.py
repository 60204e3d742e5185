"""Embeddings of two grid scales at the consumer: heads, predictions and data sets, against loops over tokens."""

from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from nec_ray import open_archive
from nec_ray.errors import CodecMismatch, InputError
from nec_ray.evaluate.head import train_head
from nec_ray.evaluate.labels import read_labels
from nec_ray.evaluate.prediction import predict
from nec_ray.evaluate.segment import evaluate_segmentation
from nec_ray.models.dataset import enlarged_to, on_one_grid, torch_dataset
from nec_ray.models.head_files import load_head
from tests.archive.make import MadeOfScales, scaled_archive


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> MadeOfScales:
    return scaled_archive(tmp_path_factory.mktemp("scales"), tiles=24)


def by_hand(made: MadeOfScales, tile_id: str) -> np.ndarray[tuple[int, ...], np.dtype[np.float32]]:
    """(16, 24): at each place of the 4 x 4 grid the coarse token above it, then its own."""
    coarse, fine = made.codec.dequantise(made.symbols[tile_id])
    tokens = [[*coarse[2 * (row // 2) + col // 2], *fine[4 * row + col]] for row in range(4) for col in range(4)]
    return np.array(tokens, np.float32)


def test_coarse_tokens_stand_at_all_places_that_they_cover(made: MadeOfScales) -> None:
    archive = open_archive(made.url)
    pull = archive.pull()
    np.testing.assert_array_equal(on_one_grid(pull), np.stack([by_hand(made, name) for name in pull.tile_ids]))
    coarse = archive.pull(layers=2)
    np.testing.assert_array_equal(on_one_grid(coarse), coarse.embeddings)


def test_grids_that_do_not_divide_are_refused() -> None:
    parts = [np.zeros((1, 6, 2), np.float32), np.zeros((1, 20, 3), np.float32)]
    with pytest.raises(InputError, match="3 x 2 does not divide one of 5 x 4"):
        enlarged_to((5, 4), parts, [(3, 2), (5, 4)])


def test_a_data_set_gives_a_tensor_a_scale(made: MadeOfScales) -> None:
    for tile_id, (coarse, fine) in torch_dataset(open_archive(made.url), batch_size=5):
        expected = made.codec.dequantise(made.symbols[tile_id])
        assert torch.equal(coarse, torch.from_numpy(expected[0]))
        assert torch.equal(fine, torch.from_numpy(expected[1]))
    shapes = {tuple(embedding.shape) for _, embedding in torch_dataset(open_archive(made.url), layers=1)}
    assert shapes == {(4, 8)}


def test_a_head_reads_both_scales_and_predicts_from_its_files(made: MadeOfScales, tmp_path: Path) -> None:
    archive = open_archive(made.url)
    labels = read_labels(None, archive.rows(["tile_id", "label", "geometry"]))
    train_head(archive, labels, tmp_path / "head", epochs=2)
    head = load_head(tmp_path / "head")
    assert (head.spec.tokens, head.spec.channels) == (16, 24)
    table = predict(archive, tmp_path / "head", None, tmp_path / "out.parquet")
    embeddings = torch.from_numpy(np.stack([by_hand(made, name) for name in table["tile_id"].to_pylist()]))
    with torch.no_grad():
        said = head.module(embeddings).softmax(dim=1).max(dim=1)
    assert [head.spec.classes[i] for i in said.indices] == table["label"].to_pylist()
    np.testing.assert_allclose(table["confidence"].to_numpy(), said.values.numpy(), rtol=1e-5)
    assert pq.read_table(tmp_path / "out.parquet")["label"].equals(table["label"])
    train_head(archive, labels, tmp_path / "coarse", layers=2, epochs=1)
    coarse = load_head(tmp_path / "coarse")
    assert coarse.spec.tokens == 4
    with pytest.raises(CodecMismatch, match=r"embeddings of 16 x 24 \(tokens x channels\), the head reads 4 x 14"):
        coarse.embeddings("here", archive.pull())


def test_a_segmentation_head_sees_what_only_the_finer_scale_tells() -> None:
    """Masks that the fine tokens alone tell: read with both scales, near chance with the coarse one."""
    rng = np.random.default_rng(0)
    mask = rng.integers(0, 2, (48, 4, 4), np.uint8)
    fine = (rng.normal(size=(48, 16, 16)) + 3 * mask.reshape(48, 16, 1)).astype(np.float32)
    coarse = rng.normal(size=(48, 4, 16)).astype(np.float32)
    both = enlarged_to((4, 4), (coarse, fine), ((2, 2), (4, 4)))
    scores = [
        evaluate_segmentation(x[:32], mask[:32], x[32:], mask[32:], grid=grid, epochs=12).scores.accuracy
        for x, grid in ((both, (4, 4)), (coarse, (2, 2)))
    ]
    assert scores[0] > 0.8
    assert scores[1] < 0.65

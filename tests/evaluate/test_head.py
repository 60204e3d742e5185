import dataclasses
import json
import sys
from pathlib import Path

import geopandas
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from torch import nn

from nec_ray.errors import BadLabels, CodecMismatch, InputError
from nec_ray.evaluate.head import evaluate_embeddings, predict_proba, score, train_head
from nec_ray.evaluate.labels import LABEL_ROWS, Labels, read_labels
from nec_ray.evaluate.prediction import predict
from nec_ray.models.head_files import load_head
from tests.evaluate.sources import ENCODER, MemorySource, grid_rows, separable


def labelled(tmp_path: Path, n_rows: int = 20, n_cols: int = 15) -> tuple[MemorySource, Labels, dict[str, str]]:
    rows = grid_rows(n_rows, n_cols)
    x, names = separable(rows, 4)
    source = MemorySource(rows, x, layer_channels=(16, 8))
    truth = dict(zip(rows["tile_id"].to_pylist(), names, strict=True))
    path = tmp_path / "labels.csv"
    path.write_text("tile_id,label\n" + "\n".join(f"{k},{v}" for k, v in truth.items()))
    return source, read_labels(path, rows.select(list(LABEL_ROWS))), truth


def test_a_separable_problem_is_learned_and_written_down(tmp_path: Path) -> None:
    source, labels, truth = labelled(tmp_path)
    seen: list[tuple[int, int]] = []
    out = tmp_path / "head"
    metrics = train_head(source, labels, out, epochs=25, progress=lambda done, total: seen.append((done, total)))
    assert metrics["accuracy"] > 0.95
    assert metrics["majority"] < 0.4
    assert seen == [(i + 1, 25) for i in range(25)]
    assert json.loads((out / "metrics.json").read_text()) == metrics
    assert (metrics["tiles"], metrics["train_tiles"] + metrics["test_tiles"]) == (300, 300)
    assert metrics["test_tiles"] == labels.is_test.sum()
    assert metrics["bytes_per_tile"] == pytest.approx(100 + np.arange(300).mean())
    assert metrics["encoder_id"] == ENCODER
    assert np.trace(metrics["confusion"]) == round(metrics["accuracy"] * metrics["test_tiles"])
    assert (out / "confusion.png").read_bytes()[:4] == b"\x89PNG"

    # What was written predicts the test tiles as well as it was scored.
    table = predict(source, out, None, tmp_path / "said.parquet")
    said = dict(zip(table["tile_id"].to_pylist(), table["label"].to_pylist(), strict=True))
    test = [name for name, is_test in zip(labels.tile_ids, labels.is_test, strict=True) if is_test]
    assert np.mean([said[name] == truth[name] for name in test]) == pytest.approx(metrics["accuracy"])


def test_training_is_deterministic_by_seed_and_leaves_torchs_alone(tmp_path: Path) -> None:
    source, labels, _ = labelled(tmp_path, 8, 10)
    torch.manual_seed(5)
    state = torch.random.get_rng_state()
    for name, seed in (("a", 3), ("b", 3), ("c", 4)):
        train_head(source, labels, tmp_path / name, epochs=3, seed=seed)
        torch.rand(1)  # what the caller draws meanwhile must not matter
    torch.random.set_rng_state(state)
    a, b, c = ((tmp_path / name / "head.safetensors").read_bytes() for name in "abc")
    assert a == b
    assert a != c
    assert (tmp_path / "a" / "metrics.json").read_bytes() == (tmp_path / "b" / "metrics.json").read_bytes()


def test_scores_against_a_count_by_hand() -> None:
    rng = np.random.default_rng(0)
    truth, predicted = rng.integers(0, 4, 200), rng.integers(0, 4, 200)
    scores = score(truth, predicted, np.array([2, 2, 2, 0]), 5)
    pairs = list(zip(truth.tolist(), predicted.tolist(), strict=True))
    assert scores.accuracy == sum(a == b for a, b in pairs) / 200
    assert scores.confusion == [[pairs.count((i, j)) for j in range(5)] for i in range(5)]
    assert scores.majority == truth.tolist().count(2) / 200
    recall = [sum(a == b for a, b in pairs if a == k) / truth.tolist().count(k) for k in range(4)]
    assert scores.recall == [pytest.approx(r) for r in recall] + [None]
    assert scores.balanced_accuracy == pytest.approx(sum(recall) / 4)


def test_random_labels_score_no_better_than_chance() -> None:
    rng = np.random.default_rng(1)
    x = rng.normal(size=(500, 4, 8)).astype(np.float32)
    y = rng.integers(0, 4, 500)
    result = evaluate_embeddings(x[:200], y[:200], x[200:], y[200:], epochs=10)
    assert result.scores.accuracy < 0.4  # chance is 0.25


def test_probabilities_add_up_and_do_not_depend_on_the_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(2)
    x, y = rng.normal(size=(60, 4, 8)).astype(np.float32), rng.integers(0, 3, 60)
    head = evaluate_embeddings(x, y, x, y, epochs=2).head
    whole = predict_proba(head, x)
    np.testing.assert_allclose(whole.sum(axis=1), 1, atol=1e-5)
    monkeypatch.setattr("nec_ray.evaluate.head._SCORE_BATCH", 7)
    np.testing.assert_allclose(predict_proba(head, x), whole, atol=1e-5)


class Widen(nn.Module):
    """Stands for the first decoder layer: a linear map to another width."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(24, 40)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.gelu(self.embed(x))


@pytest.mark.parametrize("how", ["frozen", "trained"])
def test_the_decoder_layer_is_frozen_or_trained(tmp_path: Path, how: str) -> None:
    source, labels, _ = labelled(tmp_path)
    torch.manual_seed(0)
    layer = Widen()
    before = layer.embed.weight.detach().clone()
    out = tmp_path / "head"
    metrics = train_head(source, labels, out, decoder_layer=how, first_layer=layer, epochs=15)  # type: ignore[arg-type]  # a literal by parametrize
    assert metrics["accuracy"] > 0.9
    torch.testing.assert_close(layer.embed.weight, before, rtol=0, atol=0)
    after = load_head(out, Widen).module.first_layer
    assert isinstance(after, Widen)
    assert torch.equal(after.embed.weight, before) == (how == "frozen")
    with pytest.raises(InputError, match="no valid tile fits"):  # this source has no codec to take a layer from
        predict(source, out, None, tmp_path / "said.parquet")


def test_a_prefix_of_layers_is_kept_for_prediction(tmp_path: Path) -> None:
    source, labels, _ = labelled(tmp_path, 10, 10)
    train_head(source, labels, tmp_path / "head", layers=1, epochs=2)
    spec = load_head(tmp_path / "head").spec
    assert (spec.layers, spec.channels) == (1, 16)
    assert predict(source, tmp_path / "head", None, tmp_path / "said.parquet").num_rows == 100


def test_predictions_are_geoparquet_of_the_tiles_asked_for(tmp_path: Path) -> None:
    source, labels, _ = labelled(tmp_path, 10, 10)
    train_head(source, labels, tmp_path / "head", epochs=2)
    out = tmp_path / "deep" / "said.parquet"
    table = predict(source, tmp_path / "head", "tile_id < 'tile-03'", out)
    assert table.column_names == ["tile_id", "label", "confidence", "geometry", "bbox"]
    assert table.num_rows == 30
    frame = geopandas.read_parquet(out)
    assert frame["tile_id"].tolist() == table["tile_id"].to_pylist()
    assert frame.total_bounds == pytest.approx([10, 50, 11, 50.3])
    confidence = table["confidence"].to_numpy()
    assert (confidence > 0.25).all()
    assert (confidence <= 1).all()


def test_predictions_without_footprints_are_plain_parquet(tmp_path: Path) -> None:
    source, labels, _ = labelled(tmp_path, 10, 10)
    train_head(source, labels, tmp_path / "head", epochs=1)
    at = source.table.schema.get_field_index("geometry")
    source.table = source.table.set_column(at, "geometry", pa.nulls(100, pa.binary()))
    predict(source, tmp_path / "head", None, tmp_path / "said.parquet")
    assert pq.read_table(tmp_path / "said.parquet").column_names == ["tile_id", "label", "confidence"]


def test_prediction_skips_tiles_that_are_not_valid_and_pulls_in_chunks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, labels, _ = labelled(tmp_path, 10, 10)
    train_head(source, labels, tmp_path / "head", epochs=1)
    at = source.table.schema.get_field_index("status")
    source.table = source.table.set_column(at, "status", pa.array(["nodata"] * 10 + ["valid"] * 90))
    monkeypatch.setattr(sys.modules[predict.__module__], "_TILES_A_PULL", 40)
    source.pulls.clear()
    table = predict(source, tmp_path / "head", None, tmp_path / "said.parquet")
    assert source.pulls == [40, 40, 10]
    assert table["tile_id"].to_pylist() == source.table["tile_id"].to_pylist()[10:]
    with pytest.raises(InputError, match="no valid tile fits"):
        predict(source, tmp_path / "head", "tile_id = 'tile-00-00'", tmp_path / "none.parquet")


def test_embeddings_of_another_encoder_are_refused(tmp_path: Path) -> None:
    source, labels, _ = labelled(tmp_path, 10, 10)
    train_head(source, labels, tmp_path / "head", epochs=1)
    other = dataclasses.replace(source, encoder_id="cd" * 32)
    with pytest.raises(CodecMismatch, match="embeddings of encoder cdcd"):
        predict(other, tmp_path / "head", None, tmp_path / "said.parquet")
    narrow = dataclasses.replace(source, embeddings=source.embeddings[:, :, :8])
    with pytest.raises(CodecMismatch, match=r"16 x 8 \(tokens x channels\), the head reads 16 x 24"):
        predict(narrow, tmp_path / "head", None, tmp_path / "said.parquet")
    assert not (tmp_path / "said.parquet").exists()


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"decoder_layer": "half"}, "decoder layer 'half'"),
        ({"decoder_layer": "frozen"}, "brings none"),
        ({"decoder_layer": "frozen", "first_layer": nn.Identity(), "layers": 1}, "give the codec's medians"),
        ({"epochs": 0}, "epochs 0"),
    ],
)
def test_options_that_cannot_be_are_refused(tmp_path: Path, options: dict[str, object], match: str) -> None:
    source, labels, _ = labelled(tmp_path, 10, 10)
    with pytest.raises(InputError, match=match):
        train_head(source, labels, tmp_path / "head", **options)  # type: ignore[arg-type]  # wrong on purpose
    assert not (tmp_path / "head").exists()


def test_labelled_tiles_that_the_archive_lacks_are_named(tmp_path: Path) -> None:
    source, labels, _ = labelled(tmp_path, 10, 10)
    source.table, source.embeddings = source.table.slice(1), source.embeddings[1:]
    with pytest.raises(BadLabels, match="1 labelled tiles are not there, such as tile-00-00"):
        train_head(source, labels, tmp_path / "head")


def test_embeddings_of_two_shapes_are_refused() -> None:
    x, y = np.zeros((4, 3, 8), np.float32), np.array([0, 1, 0, 1])
    with pytest.raises(CodecMismatch, match="differ in shape"):
        evaluate_embeddings(x, y, x[:, :, :4], y)
    with pytest.raises(InputError, match="test embeddings"):
        evaluate_embeddings(x, y, x, y[:3])

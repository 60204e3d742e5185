"""Segmentation heads on real Dubai tiles, on masks that can be learned, and on prefixes of layers."""

import dataclasses
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pytest
import torch
from torch import nn

from nec_ray.archive import open_archive
from nec_ray.codec import Codec
from nec_ray.errors import BadLabels, CodecMismatch, InputError
from nec_ray.evaluate import evaluate_segmentation, predict, train_head_on_archive, train_segmentation_head
from nec_ray.evaluate.class_list import class_colour
from nec_ray.evaluate.labels import hash_split
from nec_ray.evaluate.masks import Masks
from nec_ray.evaluate.segment import predict_classes, score_segmentation
from nec_ray.models.embed import first_decoder_layer
from nec_ray.models.head_files import load_head
from nec_ray.models.heads import TokenHead
from nec_ray.models.segmentation import SegmentationHead
from nec_ray.models.threads import one_thread
from nec_ray.tiles import build_catalog, write_catalog
from tests.evaluate.sources import ENCODER, MemorySource, grid_rows
from tests.evaluate.test_consumer import random_mae_codec
from tests.runtime.make import random_codec

# The classes.json of the data set names other colours than its masks have.
DUBAI = {
    "Water": "#E2A929",
    "Land": "#8429F6",
    "Road": "#6EC1E4",
    "Building": "#3C1098",
    "Vegetation": "#FEDD3A",
    "Unlabeled": "#9B9B9B",
    "ignore": "#000000",
}


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """These heads are small: threads would only wait for each other beside the other test process."""
    with one_thread():
        yield


@pytest.fixture(scope="module")
def dubai(tmp_path_factory: pytest.TempPathFactory, shared_data: Path) -> Path:
    """A real image and its mask, cut to tiles of 64 pixels and encoded by a codec of random weights."""
    from nec_ray.runtime.encode import encode

    folder = tmp_path_factory.mktemp("dubai")
    for kind, end in (("images", "jpg"), ("masks", "png")):
        (folder / "tile_6" / kind).mkdir(parents=True)
        shutil.copy(shared_data / "dubai" / "tile_6" / kind / f"image_part_007.{end}", folder / "tile_6" / kind)
    (folder / "classes.json").write_text(json.dumps(DUBAI))
    catalog = build_catalog(folder, tile_size=64).select("source LIKE '%/images/%'")
    assert len(catalog) == 14 * 14
    write_catalog(catalog, folder / "catalog.parquet")
    random_codec(folder / "codec", mean=120)
    encode(str(folder / "catalog.parquet"), str(folder / "archive"), codec_url=str(folder / "codec"), local=True)
    return folder


def test_a_head_beats_the_majority_on_real_tiles(dubai: Path, tmp_path: Path) -> None:
    archive = open_archive(str(dubai / "archive"))
    out = tmp_path / "head"
    metrics = train_head_on_archive(archive, dubai, out, task="segmentation", epochs=3)
    assert metrics["accuracy"] > metrics["majority"] + 0.05
    assert metrics["tiles"] == 196
    assert metrics["mask_size"] == [64, 64]
    assert metrics["classes"] == list(DUBAI)[:-1]
    assert metrics["unmatched_labels"] == 0
    assert json.loads((out / "metrics.json").read_text()) == metrics
    for name in ("confusion.png", "samples.png"):
        assert (out / name).read_bytes()[:4] == b"\x89PNG"
    # What was written says of the test tiles what was scored, and no more is known of these than their embeddings.
    head = load_head(out).module
    assert isinstance(head, SegmentationHead)
    pull = archive.pull()
    test = [i for i, name in enumerate(pull.tile_ids) if hash_split(name)]
    maps = np.concatenate(list(predict_classes(head, pull.embeddings[test], (64, 64))))
    share = np.bincount(maps.ravel(), minlength=6) / maps.size
    np.testing.assert_allclose(share, np.sum(metrics["confusion"], axis=0) / np.sum(metrics["confusion"]), atol=0.01)
    table = predict(archive, out, None, tmp_path / "maps")
    assert table.column_names == ["tile_id", "path"]
    assert len(list((tmp_path / "maps").iterdir())) == 197
    with pytest.raises(InputError, match="196 of 196 tiles have no georeference"):
        predict(archive, out, None, tmp_path / "maps.tif")


def quadrants(n_rows: int = 8, n_cols: int = 10, *, channels: int = 8, seed: int = 0) -> tuple[MemorySource, Masks]:
    """Tiles whose masks show in their tokens: a class a token of a grid of 2 x 2, under noise."""
    rng = np.random.default_rng(seed)
    rows = grid_rows(n_rows, n_cols)
    tiles = rows.num_rows
    token_class = rng.integers(0, 3, (tiles, 2, 2))
    centre = rng.normal(size=(3, channels)) * 3
    x = (centre[token_class] + rng.normal(size=(tiles, 2, 2, channels))).reshape(tiles, 4, channels)
    masks = token_class.repeat(3, axis=1).repeat(3, axis=2).astype(np.uint8)
    masks[:, 0] = 255
    names = rows["tile_id"].to_pylist()
    source = MemorySource(rows, x.astype(np.float32), layer_channels=(4, 4))
    is_test = np.array([hash_split(name) for name in names])
    colours = [class_colour(i) for i in range(3)]
    return source, Masks(names, ["a", "b", "c"], colours, masks, is_test, 0)


def test_a_learnable_problem_is_learned(tmp_path: Path) -> None:
    source, masks = quadrants(12, 12)
    seen: list[tuple[int, int]] = []
    metrics = train_segmentation_head(
        source, masks, tmp_path, epochs=10, progress=lambda done, total: seen.append((done, total))
    )
    assert metrics["accuracy"] > 0.65
    assert metrics["majority"] < 0.5
    assert seen == [(i + 1, 10) for i in range(10)]


def test_the_seed_decides_and_torchs_own_is_left_alone(tmp_path: Path) -> None:
    source, masks = quadrants(4, 5)
    state = torch.random.get_rng_state()
    for name, seed in (("a", 3), ("b", 3), ("c", 4)):
        train_segmentation_head(source, masks, tmp_path / name, epochs=2, seed=seed)
    torch.testing.assert_close(torch.random.get_rng_state(), state)
    a, b, c = ((tmp_path / name / "head.safetensors").read_bytes() for name in "abc")
    assert a == b
    assert a != c
    assert (tmp_path / "a" / "metrics.json").read_bytes() == (tmp_path / "b" / "metrics.json").read_bytes()


def test_scores_against_counts_by_hand() -> None:
    rng = np.random.default_rng(0)
    truth, predicted = (rng.integers(0, 3, (5, 6, 7)).astype(np.uint8) for _ in range(2))
    truth[0], truth[:, 0, 0] = 255, 255
    scores = score_segmentation(truth, predicted, np.array([[[2, 2, 1, 255, 255, 255]]], np.uint8), 5)
    pairs = [(t, p) for t, p in zip(truth.ravel().tolist(), predicted.ravel().tolist(), strict=True) if t != 255]
    assert scores.confusion == [[pairs.count((i, j)) for j in range(5)] for i in range(5)]
    assert scores.accuracy == sum(t == p for t, p in pairs) / len(pairs)
    assert scores.majority == sum(t == 2 for t, _ in pairs) / len(pairs)
    iou = [sum(t == p == k for t, p in pairs) / sum(k in pair for pair in pairs) for k in range(3)]
    assert scores.iou == [pytest.approx(value) for value in iou] + [None, None]
    assert scores.mean_iou == pytest.approx(sum(iou) / 3)


def test_predictions_do_not_depend_on_the_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    source, masks = quadrants()
    x, y = source.embeddings, masks.masks
    head = evaluate_segmentation(x, y, x, y, grid=(2, 2), epochs=1).head
    whole = np.concatenate(list(predict_classes(head, x)))
    assert whole.shape == (80, 8, 8)
    monkeypatch.setattr("nec_ray.evaluate.segment._LOGITS", 1)
    assert (np.concatenate(list(predict_classes(head, x))) == whole).mean() > 0.999


@pytest.fixture(scope="module")
def with_codec(tmp_path_factory: pytest.TempPathFactory) -> tuple[MemorySource, Codec]:
    codec = random_mae_codec(tmp_path_factory.mktemp("codec") / "codec")
    rows = grid_rows(8, 8)
    x = np.random.default_rng(0).normal(size=(64, 16, 24)).astype(np.float32)
    labels = pa.array([("a", "b")[i % 2] for i in range(64)])
    rows = rows.set_column(rows.schema.get_field_index("label"), "label", labels)
    return MemorySource(rows, x, codec.encoder_id, layer_channels=(10, 14), made_by=[codec]), codec


@pytest.mark.parametrize("how", ["frozen", "trained"])
@pytest.mark.parametrize("task", ["classification", "segmentation"])
def test_the_decoder_layer_reads_a_prefix_filled_up_with_medians(
    tmp_path: Path, with_codec: tuple[MemorySource, Codec], how: Any, task: str
) -> None:
    source, codec = with_codec
    median = codec.tables.median
    assert np.abs(median[10:]).min() > 0
    out = tmp_path / "head"
    if task == "classification":
        train_head_on_archive(source, None, out, decoder_layer=how, layers=1, epochs=1)
    else:
        names = source.table["tile_id"].to_pylist()
        masks = np.random.default_rng(0).integers(0, 3, (64, 8, 8)).astype(np.uint8)
        is_test = np.array([hash_split(name) for name in names])
        made = Masks(names, ["a", "b", "c"], [(0, 0, 0)] * 3, masks, is_test, 0)
        layer = first_decoder_layer(codec)
        train_segmentation_head(
            source, made, out, decoder_layer=how, first_layer=layer, medians=median, layers=1, epochs=1
        )
    head = load_head(out, lambda: first_decoder_layer(codec))
    assert (head.spec.layers, head.spec.channels, head.spec.padding) == (1, 10, 14)
    x = source.embeddings[:5, :, :10]
    whole = source.embeddings[:5].copy()
    whole[:, :, 10:] = median[10:]
    layer_then = head.module.first_layer
    assert layer_then is not None
    expected = layer_then(torch.from_numpy(whole))
    torch.testing.assert_close(head.module.features(torch.from_numpy(x)), expected, rtol=0, atol=0)
    if how == "frozen":
        torch.testing.assert_close(expected, first_decoder_layer(codec)(torch.from_numpy(whole)), rtol=0, atol=0)
    said = predict(source, out, None, tmp_path / ("x.parquet" if task == "classification" else "maps"))
    assert said.num_rows == 64


def test_a_whole_embedding_needs_no_padding(with_codec: tuple[MemorySource, Codec], tmp_path: Path) -> None:
    source, codec = with_codec
    for layers in (None, 2):
        train_head_on_archive(source, None, tmp_path / "h", decoder_layer="frozen", layers=layers, epochs=1)
        head = load_head(tmp_path / "h", lambda: first_decoder_layer(codec))
        assert (head.spec.padding, head.module.padding) == (0, None)


def options() -> list[tuple[dict[str, Any], str]]:
    return [
        ({"decoder_layer": "half"}, "decoder layer 'half'"),
        ({"decoder_layer": "frozen"}, "brings none"),
        ({"decoder_layer": "frozen", "first_layer": nn.Identity(), "layers": 1}, "give the codec's medians"),
        ({"epochs": 0}, "epochs 0"),
    ]


@pytest.mark.parametrize(("wrong", "match"), options())
def test_options_that_cannot_be_are_refused(tmp_path: Path, wrong: dict[str, Any], match: str) -> None:
    source, masks = quadrants(4, 5)
    with pytest.raises(InputError, match=match):
        train_segmentation_head(source, masks, tmp_path / "head", **wrong)
    assert not (tmp_path / "head").exists()


def test_tasks_and_labels_that_do_not_belong_together_are_refused(tmp_path: Path) -> None:
    source, _ = quadrants(4, 5)
    for wrong, match in (
        ({"task": "regression"}, "task 'regression': use classification, multi-label or segmentation"),
        ({"task": "segmentation"}, "segmentation needs masks"),
        ({"classes": "classes.json"}, "a list of classes is for masks"),
    ):
        with pytest.raises(InputError, match=match):
            train_head_on_archive(source, None, tmp_path / "head", **wrong)  # type: ignore[arg-type]  # wrong on purpose


def test_shapes_that_do_not_fit_are_refused() -> None:
    x, y = np.zeros((4, 6, 8), np.float32), np.zeros((4, 9, 9), np.uint8)
    for train_x, train_y, test_x, grid, match, kind in (
        (x, y[:3], x, (2, 3), "train embeddings", InputError),
        (x, y, x[:, :, :4], (2, 3), "differ in shape", CodecMismatch),
        (x, y, x, (3, 3), "6 tokens on a grid of 3 x 3", InputError),
        (x[:, :1], y, x[:, :1], (1, 1), "two or more", InputError),
    ):
        with pytest.raises(kind, match=match):
            evaluate_segmentation(train_x, train_y, test_x, y, grid=grid, epochs=1)


def test_tiles_that_the_archive_lacks_are_named(tmp_path: Path) -> None:
    source, masks = quadrants(4, 5)
    lacking = dataclasses.replace(source, table=source.table.slice(1), embeddings=source.embeddings[1:])
    with pytest.raises(BadLabels, match="1 labelled tiles are not there, such as tile-00-00"):
        train_segmentation_head(lacking, masks, tmp_path / "head")


def test_embeddings_of_another_encoder_are_refused_and_nothing_is_left(tmp_path: Path) -> None:
    source, masks = quadrants()
    train_segmentation_head(source, masks, tmp_path / "head", epochs=1)
    other = dataclasses.replace(source, encoder_id="cd" * 32)
    assert other.encoder_id != ENCODER
    with pytest.raises(CodecMismatch, match="embeddings of encoder cdcd"):
        predict(other, tmp_path / "head", None, tmp_path / "maps")
    with pytest.raises(InputError, match="writes a GeoTIFF"):
        predict(source, tmp_path / "head", None, tmp_path / "said.parquet")


def test_padding_is_put_after_the_prefix() -> None:
    layer = nn.Linear(3, 3, bias=False)
    with torch.no_grad():
        layer.weight.copy_(torch.eye(3))
    head = TokenHead(3, layer, torch.tensor([7.0]))
    x: npt.NDArray[np.float32] = np.ones((1, 2, 2), np.float32)
    assert head.features(torch.from_numpy(x)).tolist() == [[[1, 1, 7]] * 2]

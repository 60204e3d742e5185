"""Heads of several classes a tile: labels read and matched, scores beside scikit-learn's, predictions as lists."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from sklearn.metrics import average_precision_score, f1_score

from nec_ray.errors import BadLabels, InputError
from nec_ray.evaluate import predict, train_head_on_archive
from nec_ray.evaluate.labels import hash_split
from nec_ray.evaluate.multi_label import read_multi_labels
from nec_ray.models.head_files import load_head
from tests.evaluate.sources import MemorySource, grid_rows

CLASSES = ["bare", "forest, old", "water"]


def made(seed: int = 0) -> tuple[MemorySource, np.ndarray[Any, np.dtype[np.bool_]]]:
    """Tiles whose classes each add their mark to a few tokens; some have none, some all."""
    rng = np.random.default_rng(seed)
    rows = grid_rows(8, 10)
    flags = rng.random((80, 3)) < 0.4
    x = rng.normal(size=(80, 16, 12)).astype(np.float32)
    marks = 4 * rng.normal(size=(3, 12)).astype(np.float32)
    for tile, number in np.argwhere(flags):
        x[tile, rng.choice(16, 4, replace=False)] += marks[number]
    return MemorySource(rows, x), flags


def table(source: MemorySource, flags: Any, **more: list[Any]) -> pa.Table:
    lists = [[CLASSES[i] for i in np.flatnonzero(row)] for row in flags]
    columns = {"tile_id": source.table["tile_id"], "labels": pa.array(lists, pa.list_(pa.string()))}
    return pa.table(columns | {name: pa.array(values) for name, values in more.items()})


def test_a_head_says_every_class_of_a_tile(tmp_path: Path) -> None:
    source, flags = made()
    pq.write_table(table(source, flags), tmp_path / "labels.parquet")
    metrics = train_head_on_archive(
        source, tmp_path / "labels.parquet", tmp_path / "head", task="multi-label", epochs=40
    )
    assert metrics == json.loads((tmp_path / "head" / "metrics.json").read_text())
    names = source.table["tile_id"].to_pylist()
    test = np.array([hash_split(name) for name in names])
    assert (metrics["train_tiles"], metrics["test_tiles"]) == (int((~test).sum()), int(test.sum()))
    assert (metrics["classes"], metrics["unmatched_labels"]) == (CLASSES, 0)
    assert metrics["map"] > 0.8
    said = predict(source, tmp_path / "head", None, tmp_path / "said.parquet").to_pydict()
    assert said["tile_id"] == names
    scores = np.zeros(flags.shape)
    for row, (labels, confidences) in enumerate(zip(said["labels"], said["confidences"], strict=True)):
        for label, confidence in zip(labels, confidences, strict=True):
            assert confidence > 0.5
            scores[row, CLASSES.index(label)] = confidence
    assert metrics["micro_f1"] == pytest.approx(f1_score(flags[test], scores[test] > 0, average="micro"))
    head = load_head(tmp_path / "head").module
    with torch.no_grad():
        logits = head(torch.from_numpy(source.embeddings)).numpy()
    theirs = average_precision_score(flags[test], logits[test], average=None)
    assert metrics["average_precision"] == pytest.approx(theirs.tolist())
    assert np.array_equal(scores > 0, logits > 0)
    assert metrics["map"] == pytest.approx(np.mean(metrics["average_precision"]))
    with pytest.raises(InputError, match="a multi-label head says what a whole tile is"):
        predict(source, tmp_path / "head", None, tmp_path / "said.tif")


def test_labels_are_lists_or_texts_with_semicolons(tmp_path: Path) -> None:
    source, flags = made(1)
    names = source.table["tile_id"].to_pylist()
    splits = ["test" if i % 4 == 0 else "train" for i in range(80)]
    splits[1] = "valid"
    whole = table(source, flags, split=splits)
    pq.write_table(whole, tmp_path / "a.parquet")
    rows = zip(*whole.to_pydict().values(), strict=True)
    lines = [f'"{name}","{";".join(labels)}",{split}' for name, labels, split in rows]
    text = "\n".join(["tile_id,labels,split", *lines, '"elsewhere","water",train', ""])
    (tmp_path / "b.csv").write_text(text)
    for name, unmatched in (("a.parquet", 0), ("b.csv", 1)):
        found = read_multi_labels(tmp_path / name, names)
        assert (found.classes, found.unmatched) == (CLASSES, unmatched)
        kept = [i for i in range(80) if i != 1]
        assert found.tile_ids == [names[i] for i in kept], "what is for validation is left out"
        assert np.array_equal(found.flags, flags[kept])
        assert found.is_test.tolist() == [splits[i] == "test" for i in kept]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("tile_id,label\na,b\n", "tile_id and labels are needed; it has tile_id, label"),
        ("tile_id,labels\nx,water\n", "1 tiles with labels, none of them a valid tile"),
        ("tile_id,labels\na,water\na,bare\n", "tile a is named twice"),
        ("tile_id,labels,split\na,water,dev\n", "split 'dev'; only train and test are known"),
        ("tile_id,labels,split\na,water,train\nb,bare,test\n", "two classes are needed among the tiles to train on"),
        ("tile_id,labels,split\na,water;bare,train\nb,,test\n", "and one among those to test"),
    ],
)
def test_labels_that_do_not_fit_are_refused(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "a.csv").write_text(text)
    with pytest.raises(BadLabels) as caught:
        read_multi_labels(tmp_path / "a.csv", ["a", "b"])
    assert message in str(caught.value)
    with pytest.raises(InputError, match="several classes a tile need labels"):
        train_head_on_archive(made()[0], None, tmp_path / "head", task="multi-label")

"""`nec evaluate` on generated data sets of GEO-Bench: every protocol, resuming, and archives of a compressed MP-MAE."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from torch import nn

from nec_ray.archive import open_archive
from nec_ray.codec import InputSpec, Lineage, load_codec
from nec_ray.errors import BadLabels, InputError
from nec_ray.evaluate.compare import compare
from nec_ray.evaluate.consumer import read_tile_masks
from nec_ray.evaluate.experiment import Experiment
from nec_ray.evaluate.geobench.data import GeobenchTask
from nec_ray.evaluate.geobench.experiment import ArchiveEmbeddings, CodecEncoder, Dataset, GeobenchExperiment, MpMae
from nec_ray.evaluate.geobench.protocols import FromArchive, FromPixels, Run
from nec_ray.evaluate.geobench.run import REPORT_HTML, RESULTS_JSON, run_geobench
from nec_ray.evaluate.probes import neighbours_vote
from nec_ray.models.convnext import ConvNextConfig
from nec_ray.models.embed import Embedder
from nec_ray.models.export import export_codec
from nec_ray.models.nec import NeuralEmbeddingCompressor
from nec_ray.models.stages import StageConfig
from nec_ray.runtime.encode import encode
from nec_ray.tiles import build_catalog, read_catalog, read_tiles, write_catalog
from tests.tiles.geobench_files import write_dataset

BANDS = ["B2", "B3", "B8"]
FOLDERS = {"classification": "m-classes", "multi-label": "m-labels", "segmentation": "m-masks"}


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data set of each kind, and of two of them archives of one codec with two grid scales."""
    folder = tmp_path_factory.mktemp("geobench")
    for number, (task, name) in enumerate(FOLDERS.items()):
        write_dataset(folder / name, task, samples=16, classes=3, seed=number)
    torch.manual_seed(0)
    sizes = ConvNextConfig(size=16, patch=8, bands=3, dim=4, depth_1=1, depth_2=1, depth_3=1, depth_4=1)
    model = NeuralEmbeddingCompressor.mp_mae(StageConfig(sizes, (4, 3), decoder_dim=8))
    for name, weight in model.encoder.named_parameters():
        weight.data = 0.5 * torch.randn_like(weight) + (1.0 if "norm" in name else 0.0)
    spec = InputSpec(bands=BANDS, mean=[4500.0] * 3, std=[2600.0] * 3, size=16)
    write_catalog(build_catalog(folder / "m-classes"), folder / "m-classes.parquet")
    write_catalog(build_catalog(folder / "m-masks"), folder / "m-masks.parquet")
    rows = read_catalog(folder / "m-classes.parquet").table
    pixels = read_tiles(rows, bands=BANDS, size=16, fill=spec.mean).pixels
    lineage = Lineage(data="none", licence="none", beta=0, bits_per_symbol=0)
    export_codec(model, folder / "codec", input_spec=spec, lineage=lineage, calibration=pixels)
    for name in ("m-classes", "m-masks"):
        encode(folder / f"{name}.parquet", folder / f"{name}.archive", codec_url=str(folder / "codec"), local=True)
    return folder


def experiment(work: Path, tasks: list[str], encoders: list[dict[str, Any]], **more: Any) -> GeobenchExperiment:
    document: dict[str, Any] = {"title": "x", "root": str(work), "seeds": [0], "encoders": encoders}
    document["geobench"] = [{"folder": FOLDERS[task]} for task in tasks]
    return GeobenchExperiment.model_validate(document | more)


SHORT = {"epochs": 1}
MP_MAE = {"kind": "mp_mae", "name": "MP-MAE", "patch": 8, "inputs": "rgb"}


def test_every_protocol_has_its_measures_and_is_done_once(work: Path, tmp_path: Path) -> None:
    encoders = [MP_MAE, {"kind": "timm", "name": "timm", "model": "test_convnext", "pixels": 32}]
    asked: dict[str, Any] = {"fine_tuning": SHORT, "linear": SHORT, "linear_first_layer": SHORT, "knn": {}}
    asked |= {"segmentation": {"epochs": 2, "frozen_epochs": 1}, "segmentation_frozen": SHORT}
    whole = experiment(work, list(FOLDERS), encoders, **asked)
    seen: list[tuple[int, int]] = []
    done = run_geobench(whole, tmp_path, lambda *at: seen.append(at))
    assert seen[-1] == (2 * (4 + 4 + 2),) * 2
    assert done == json.loads((tmp_path / RESULTS_JSON).read_text())
    measures = {"classification": {"accuracy"}, "multi-label": {"map", "micro_f1"}}
    measures["segmentation"] = {"mean_iou", "accuracy"}
    for row in done["summary"]:
        there = {name for name in ("accuracy", "map", "micro_f1", "mean_iou") if row[name] is not None}
        assert there == measures[row["task"]]
        assert all(0 <= row[name] <= 1 for name in there)
        assert (row["samples"], row["train_samples"], row["test_samples"], row["overlap"]) == (8, 8, 4, 0)
    assert run_geobench(whole, tmp_path)["results"] == done["results"], "nothing is done twice: seconds would differ"
    page = (tmp_path / REPORT_HTML).read_text()
    assert all(name in page for name in (*FOLDERS.values(), "MP-MAE", "mAP", "Table A5"))
    (tmp_path / RESULTS_JSON).write_text('{"format": 1}')
    with pytest.raises(InputError, match="no results of GEO-Bench"):
        run_geobench(whole, tmp_path)


def test_only_what_changed_is_done_again(work: Path, tmp_path: Path) -> None:
    def run(**more: Any) -> dict[Any, float]:
        settings: dict[str, Any] = {"linear": SHORT, "knn": {}, "seeds": [0, 1]}
        done = run_geobench(
            experiment(work, ["classification"], [{**MP_MAE, "name": "a"}], **settings | more), tmp_path
        )
        return {(row["protocol"], row["samples"], row["seed"]): row["seconds"] for row in done["results"]}

    sets = [{"folder": "m-classes", "samples": [3, "all", 1000]}]  # the last two are the same
    first = run(geobench=sets)
    keys = {(protocol, samples, seed) for protocol in ("linear", "knn") for samples in (3, 8) for seed in (0, 1)}
    assert set(first) == keys, "random weights are of the seed, so neighbours differ too"
    second = run(geobench=sets, linear={"epochs": 2})
    assert {key for key in keys if first[key] == second[key]} == {key for key in keys if key[0] == "knn"}
    assert (tmp_path / "label_efficiency-1.png").exists()


def test_partitions_are_trained_on_and_all_are_tested_alike(work: Path, tmp_path: Path) -> None:
    parts = {"0.01x": 1, "0.10x_train": 1, "0.20x": 1, "0.50x": 4, "1.00x": 8, "default": 8}
    sets = [{"folder": "m-classes", "partition": part} for part in parts]
    sets.append({"folder": "m-classes", "band_names": "published"})  # wrong of other data sets alone
    encoder = {"kind": "timm", "name": "timm", "model": "test_convnext", "pixels": 32}
    asked = experiment(work, ["classification"], [encoder], geobench=sets, knn={"neighbours": 1})
    rows = run_geobench(asked, tmp_path)["summary"]
    names = [f"m-classes, {part}" if part != "default" else "m-classes" for part in parts]
    assert [row["task_name"] for row in rows] == [*names, "m-classes, GEO-Bench's band names"]
    assert [row["samples"] for row in rows] == [*parts.values(), 8]
    assert {row["test_samples"] for row in rows} == {4}
    split = json.loads((work / "m-classes" / "0.50x_train_partition.json").read_text())
    task = GeobenchTask(Dataset(folder="x", partition="0.50x"), str(work / "m-classes"))
    assert (task.train, task.test) == (split["train"], split["test"])
    assert rows[-3]["accuracy"] == rows[-2]["accuracy"] == rows[-1]["accuracy"], "the same samples, another order"


def test_both_papers_meet(work: Path, tmp_path: Path) -> None:
    """MP-MAE compressed by NEC at two rates next to its uncompressed embeddings, each score also put together here."""
    archive = {"kind": "archive", "archive": str(work / "m-classes.archive"), "curve": "NEC"}
    encoders: list[dict[str, Any]] = [
        {**MP_MAE, "name": "random MP-MAE"},
        {"kind": "codec", "name": "float32", "codec": str(work / "codec")},
        {**archive, "name": "NEC"},
        {**archive, "name": "NEC, first layer", "layers": 1},
    ]
    asked: dict[str, Any] = {"linear": SHORT, "knn": {"neighbours": 20}, "fine_tuning": SHORT}
    done = run_geobench(experiment(work, ["classification"], encoders, **asked), tmp_path)
    rows = {(row["method"], row["protocol"]): row for row in done["summary"]}
    assert {protocol for name, protocol in rows if name.startswith("NEC")} == {"linear", "knn"}
    task = GeobenchTask(Dataset(folder="x"), str(work / "m-classes"))
    codec = load_codec(str(work / "codec"))
    catalog = read_catalog(work / "m-classes.parquet").table
    place = {name: number for number, name in enumerate(catalog["tile_id"].to_pylist())}
    pixels = read_tiles(catalog, bands=BANDS, size=16, fill=codec.spec.input.mean).pixels
    latents = Embedder(codec).latents(pixels)
    for name, layers in (("float32", None), ("NEC", None), ("NEC, first layer", 1)):
        pull = open_archive(work / "m-classes.archive").pull(layers=layers)
        found = latents if name == "float32" else pull.embeddings
        parts = found if isinstance(found, tuple) else (found,)
        mean = np.concatenate([part.mean(axis=1) for part in parts], axis=1)
        if name != "float32":
            assert pull.tile_ids == sorted(place)
            mean = mean[[pull.tile_ids.index(tile) for tile in catalog["tile_id"].to_pylist()]]
            assert rows[name, "knn"]["bytes_per_tile"] == pytest.approx(
                np.mean([pull.n_bytes[pull.tile_ids.index(f"m-classes/{one}")] for one in (*task.train, *task.test)])
            )
        train, test = ([place[f"m-classes/{one}"] for one in part] for part in (task.train, task.test))
        said = neighbours_vote(mean[train], task.train_y, mean[test], 3)
        assert rows[name, "knn"]["accuracy"] == pytest.approx(np.mean(said == task.test_y))
        assert rows[name, "knn"]["encoder_id"] == codec.spec.encoder_id
    assert rows["float32", "knn"]["bytes_per_tile"] == 4 * sum(part[0].size for part in latents)
    assert rows["NEC, first layer", "knn"]["bytes_per_tile"] < rows["NEC", "knn"]["bytes_per_tile"]
    assert (tmp_path / "rate_accuracy-1.png").exists()


def test_maps_of_an_archive_are_its_scales_the_finest_first(work: Path, tmp_path: Path) -> None:
    task = GeobenchTask(Dataset(folder="x"), str(work / "m-masks"))
    source = ArchiveEmbeddings(kind="archive", name="x", archive=str(work / "m-masks.archive"))
    material = FromArchive(task, source)
    fine, coarse = material.maps(test=True)
    assert (fine.shape, coarse.shape, material.widths) == ((4, 16, 4, 4), (4, 32, 2, 2), (16, 32))
    pull = open_archive(source.archive).pull(tile_ids=[f"m-masks/{task.test[2]}"])
    assert np.array_equal(fine[2, :, 3, 1], pull.embeddings[1][0, 13])
    assert np.array_equal(coarse[2, :, 1, 0], pull.embeddings[0][0, 2])
    whole = FromPixels(task, CodecEncoder(kind="codec", name="x", codec=str(work / "codec")))
    with torch.no_grad():
        maps = whole.encoder(0).eval().maps(torch.from_numpy(whole.test.batch(slice(2, 3))))
    for found, uncompressed in zip((fine, coarse), maps, strict=True):
        assert np.abs(found[2] - uncompressed[0].numpy()).max() <= 0.5 + 1e-3, "rounded, at most"
    archive = {"kind": "archive", "name": "NEC", "archive": source.archive}
    done = run_geobench(experiment(work, ["segmentation"], [archive], segmentation_frozen=SHORT), tmp_path)
    assert 0 <= done["summary"][0]["mean_iou"] <= 1
    with pytest.raises(InputError, match="'NEC': none of the protocols can be done with it"):
        run_geobench(experiment(work, ["segmentation"], [archive], segmentation={}), tmp_path)
    (tmp_path / "other").mkdir()
    write_dataset(tmp_path / "other" / "m-masks", "segmentation", samples=20)
    with pytest.raises(BadLabels, match="labelled tiles are not there"):
        FromArchive(GeobenchTask(Dataset(folder="x"), str(tmp_path / "other" / "m-masks")), source)


def test_samples_and_labels_belong_together(work: Path) -> None:
    """Where what is tested was trained on, the nearest neighbour is the sample, and a long probe knows them all."""
    for task_name, measure in (("classification", "accuracy"), ("multi-label", "map")):
        sets = [{"folder": FOLDERS[task_name], "partition": "every sample"}]
        settings = {"epochs": 150, "batch": 16, "base_lr": 0.3, "weight_decay": 0.0, "label_smoothing": 0.0}
        asked = experiment(work, [task_name], [MP_MAE], geobench=sets, linear=settings, knn={"neighbours": 1})
        task = GeobenchTask(asked.geobench[0], str(work / FOLDERS[task_name]))
        source = asked.encoders[0]
        assert isinstance(source, MpMae)
        run = Run(task, FromPixels(task, source), np.arange(16), 0)
        for protocol in (asked.knn, asked.linear):
            assert protocol is not None
            assert run.scores(protocol)[measure] > 0.99


class Echo(nn.Module):
    """Says what it is given."""

    def __init__(self) -> None:
        super().__init__()
        self.nothing = nn.Parameter(torch.zeros(()))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.nothing


def test_masks_are_scored_over_all_pixels_together(work: Path) -> None:
    task = GeobenchTask(Dataset(folder="x"), str(work / "m-masks"))
    run = Run(task, FromPixels(task, MpMae(kind="mp_mae", name="x", inputs="rgb")), np.arange(8), 0)
    said = task.test_y.copy()
    said[0] = 0
    logits: npt.NDArray[np.float32] = np.eye(3, dtype=np.float32)[said].transpose(0, 3, 1, 2)
    scores = run._score_masks(Echo(), lambda some: logits[some])
    assert scores["accuracy"] == pytest.approx(np.mean(said == task.test_y))

    expected = [np.sum((said == c) & (task.test_y == c)) / np.sum((said == c) | (task.test_y == c)) for c in range(3)]

    assert scores["mean_iou"] == pytest.approx(np.mean(expected))


def test_several_grid_scales_are_compared_in_other_evaluations_too(work: Path, tmp_path: Path) -> None:
    """`nec evaluate` on an archive's own labels, and on the masks of a data set of GEO-Bench."""
    here = {"archive": str(work / "m-classes.archive"), "catalog": str(work / "m-classes.parquet")}
    plain = {"kind": "uncompressed", "name": "float32", **here}
    document: dict[str, Any] = {"title": "x", "tasks": ["knn"], "seeds": [0], "labels": here["catalog"]}
    document["methods"] = [plain, {"kind": "nec", "name": "NEC", **here}]
    done = compare(Experiment.model_validate(document), tmp_path / "classes")
    encoders = [{"kind": "codec", "name": "float32", "codec": str(work / "codec")}]
    encoders.append({"kind": "archive", "name": "NEC", "archive": here["archive"]})
    same = run_geobench(experiment(work, ["classification"], encoders, knn={}), tmp_path / "same")
    for ours, theirs in zip(done["summary"], same["summary"], strict=True):
        assert (ours["method"], ours["accuracy"]) == (theirs["method"], pytest.approx(theirs["accuracy"]))
        assert ours["snr_db"] is None
    assert done["summary"][0]["bytes_per_tile"] == same["summary"][0]["bytes_per_tile"] == 4 * (4 * 32 + 16 * 16)
    binary = {**plain, "kind": "binary", "name": "b"}
    with pytest.raises(InputError, match=r"method b: codec .* methods of kind nec and uncompressed are compared"):
        compare(Experiment.model_validate(document | {"methods": [binary]}), tmp_path / "refused")
    archive = {"kind": "nec", "name": "NEC", "archive": str(work / "m-masks.archive")}
    masks: dict[str, Any] = {
        "title": "x",
        "tasks": ["segmentation"],
        "seeds": [0],
        "epochs": 1,
        "labels": str(work / "m-masks"),
    }
    done = compare(Experiment.model_validate(masks | {"methods": [archive]}), tmp_path / "masks")
    assert done["results"][0]["tiles"] == 8 + 4, "the samples to train on and to test; those of valid are left out"
    task = GeobenchTask(Dataset(folder="x"), str(work / "m-masks"))
    read = read_tile_masks(open_archive(work / "m-masks.archive"), str(work / "m-masks"), None, None)
    tested = [name for name, test in zip(read.tile_ids, read.is_test, strict=True) if test]
    assert tested == task.tile_ids(sorted(task.test))
    place = read.tile_ids.index(f"m-masks/{task.train[0]}")
    assert np.array_equal(read.masks[place], task.train_y[0])
    with pytest.raises(BadLabels, match="a data set of classification, which has no masks"):
        read_tile_masks(open_archive(work / "m-masks.archive"), str(work / "m-classes"), None, None)
    with pytest.raises(BadLabels, match="none of its samples is a valid tile"):
        read_tile_masks(open_archive(work / "m-classes.archive"), str(work / "m-masks"), None, None)

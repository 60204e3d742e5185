"""ISPRS Potsdam as it is delivered, from its files to scores: masks, split, page; on generated scenes of its layout."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import rasterio
from affine import Affine
from PIL import Image

from nec_ray.archive import open_archive
from nec_ray.config import check
from nec_ray.errors import BadLabels, BadRecipe
from nec_ray.evaluate.compare import LABELS_PNG, MASKS_PNG, RESULTS_JSON, compare
from nec_ray.evaluate.consumer import read_tile_masks
from nec_ray.evaluate.experiment import Experiment, read_experiment
from nec_ray.evaluate.report import REPORT_HTML
from nec_ray.evaluate.segment import evaluate_segmentation
from nec_ray.models.threads import one_thread
from nec_ray.runtime.encode import encode
from nec_ray.runtime.evaluate_job import evaluate
from nec_ray.tiles import build_catalog, write_catalog
from tests.runtime.make import random_codec, with_layers

PAPER = Path(__file__).parents[2] / "nec_ray" / "data" / "paper"
SCENES = {"2_10": False, "2_13": True, "7_9": False, "7_13": True}
"""Whether the benchmark tests with it."""
COLOURS = {
    "impervious surface": (255, 255, 255),
    "building": (0, 0, 255),
    "low vegetation": (0, 255, 255),
    "tree": (0, 255, 0),
    "car": (255, 255, 0),
    "clutter": (255, 0, 0),
}
SIDE = 96


def scene(folder: Path, name: str, rng: np.random.Generator) -> npt.NDArray[np.int64]:
    """An RGB GeoTIFF and its labels of 96 x 96 pixels in blocks of 16, borders of classes black; the classes or 255."""
    classes = rng.integers(0, 6, (SIDE // 16, SIDE // 16)).repeat(16, 0).repeat(16, 1)
    rgb = np.array(list(COLOURS.values()), np.uint8)
    pixels = (rgb[classes].astype(int) // 3 + rng.integers(60, 100, (SIDE, SIDE, 3))).astype(np.uint8)
    border = np.zeros(classes.shape, bool)
    border[::16] = border[:, ::16] = True
    labels = np.where(border[..., None], np.uint8(0), rgb[classes])
    profile: dict[str, Any] = {"driver": "GTiff", "count": 3, "height": SIDE, "width": SIDE, "dtype": "uint8"}
    row, column = (int(part) for part in name.split("_"))
    place = Affine(0.05, 0, 368_000 + 300 * column, 0, -0.05, 5_800_000 - 300 * row)
    for part, suffix, values, where in (
        ("2_Ortho_RGB", "RGB", pixels, {"crs": "EPSG:32633", "transform": place}),
        ("5_Labels_all_noBoundary", "label_noBoundary", labels, {}),
    ):
        (folder / part).mkdir(parents=True, exist_ok=True)
        with rasterio.open(folder / part / f"top_potsdam_{name}_{suffix}.tif", "w", **profile, **where) as image:
            image.write(values.transpose(2, 0, 1))
    return np.where(border, 255, classes)


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """These heads are small: threads would only wait for each other beside the other test process."""
    with one_thread():
        yield


@pytest.fixture(scope="module")
def potsdam(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, npt.NDArray[np.int64]]]:
    folder = tmp_path_factory.mktemp("potsdam")
    rng = np.random.default_rng(0)
    truth = {name: scene(folder, name, rng) for name in SCENES}
    write_catalog(build_catalog(folder / "2_Ortho_RGB", tile_size=32), folder / "catalog.parquet")
    codec = with_layers(random_codec(folder / "plain", mean=110), folder / "codec", [6, 10])
    encode(folder / "catalog.parquet", folder / "archive", codec_url=codec._store.url, local=True)
    return folder, truth


def packaged(folder: Path, **changes: Any) -> dict[str, Any]:
    """The packaged evaluation on the generated data, small."""
    paper = read_experiment(PAPER / "potsdam.toml").model_dump(exclude_unset=True)
    here = {"archive": str(folder / "archive"), "catalog": str(folder / "catalog.parquet")}
    paper |= {"labels": str(folder / "5_Labels_all_noBoundary"), "classes": str(PAPER / "potsdam_classes.json")}
    methods = [
        {"kind": "nec", "name": "NEC, 1 layer", "curve": "NEC", "layers": 1, **here},
        {"kind": "nec", "name": "NEC", "curve": "NEC", "archive": here["archive"], "decoder_layer": "trained"},
        {"kind": "quantised", "name": "5 bits", "precision": "int5", **here},
        {"kind": "uncompressed", "name": "float32", **here},
        {"kind": "raw", "name": "RDC", "bits": 8, "encoder": "trained", **here},
    ]
    return paper | {"methods": methods, "epochs": 1, "seeds": [4], "label_shares": [0.5, 1.0], **changes}


def test_masks_are_the_labels_windows_in_the_paper_s_classes(
    potsdam: tuple[Path, dict[str, npt.NDArray[np.int64]]],
) -> None:
    folder, truth = potsdam
    archive = open_archive(folder / "archive")
    masks = read_tile_masks(archive, str(folder / "5_Labels_all_noBoundary"), PAPER / "potsdam_classes.json", None)
    assert masks.classes == list(COLOURS), "clutter is kept, boundaries are no class"
    assert masks.colours == list(COLOURS.values())
    assert len(masks) == 4 * 9
    for tile_id, mask in zip(masks.tile_ids, masks.masks, strict=True):
        name, place = tile_id.removeprefix("top_potsdam_").split("_RGB/y")
        y, x = (int(part) for part in place.split("_x"))
        np.testing.assert_array_equal(mask, truth[name][y : y + 32, x : x + 32])
    (folder / "both").mkdir()
    for part in ("5_Labels_all", "5_Labels_all_noBoundary"):
        end = "_noBoundary" if part.endswith("noBoundary") else ""
        original = folder / "5_Labels_all_noBoundary" / "top_potsdam_2_10_label_noBoundary.tif"
        (folder / "both" / f"top_potsdam_2_10_label{end}.tif").write_bytes(original.read_bytes())
    with pytest.raises(BadLabels, match="both fit"):
        read_tile_masks(archive, str(folder / "both"), PAPER / "potsdam_classes.json", None)


def test_every_method_segments_with_the_same_head(
    potsdam: tuple[Path, dict[str, npt.NDArray[np.int64]]], tmp_path: Path
) -> None:
    folder, _ = potsdam
    document = compare(Experiment.model_validate(packaged(folder)), tmp_path)
    assert document == json.loads((tmp_path / RESULTS_JSON).read_text())
    rows = {(row["method"], row["label_share"], row["seed"]): row for row in document["results"]}
    assert len(rows) == 5 * 2
    for row in rows.values():
        values = [value for value in row["iou"] if value is not None]
        assert row["mean_iou"] == pytest.approx(np.mean(values))
        assert 0 <= row["mean_iou"] <= row["accuracy"] <= 1
    # One score by hand: the head on what was pulled, split by the benchmark's scenes.
    archive = open_archive(folder / "archive")
    masks = read_tile_masks(archive, str(folder / "5_Labels_all_noBoundary"), PAPER / "potsdam_classes.json", None)
    pull = archive.pull(layers=1, tile_ids=masks.tile_ids)
    test = np.array([SCENES[name.removeprefix("top_potsdam_").split("_RGB")[0]] for name in masks.tile_ids])
    assert pull.tile_ids == masks.tile_ids
    mine = evaluate_segmentation(
        pull.embeddings[~test],
        masks.masks[~test],
        pull.embeddings[test],
        masks.masks[test],
        grid=pull.grid,
        classes=6,
        epochs=1,
        seed=4,
    )
    found = rows["NEC, 1 layer", 1.0, 4]
    assert found["accuracy"] == pytest.approx(mine.scores.accuracy)
    assert found["mean_iou"] == pytest.approx(mine.scores.mean_iou)
    assert found["bytes_per_tile"] == pytest.approx(pull.n_bytes.mean())
    assert rows["NEC, 1 layer", 0.5, 4]["accuracy"] != found["accuracy"]
    for name in (MASKS_PNG, LABELS_PNG):
        with Image.open(tmp_path / name) as picture:
            assert len(picture.convert("RGB").getcolors(1 << 20) or []) > 8
    assert "Masks at equal bytes" in (tmp_path / REPORT_HTML).read_text()


def test_a_job_that_goes_on_draws_the_masks_of_the_one_before(
    potsdam: tuple[Path, dict[str, npt.NDArray[np.int64]]], tmp_path: Path
) -> None:
    document = packaged(potsdam[0], label_shares=[1.0])
    experiment = Experiment.model_validate(document | {"methods": document["methods"][:1]})
    evaluate(experiment, str(tmp_path / "out"))
    before = (tmp_path / "out" / RESULTS_JSON).read_bytes(), (tmp_path / "out" / MASKS_PNG).read_bytes()
    (tmp_path / "out" / MASKS_PNG).unlink()
    evaluate(experiment, str(tmp_path / "out"))
    assert ((tmp_path / "out" / RESULTS_JSON).read_bytes(), (tmp_path / "out" / MASKS_PNG).read_bytes()) == before


def test_a_split_that_leaves_a_side_empty_is_refused(
    potsdam: tuple[Path, dict[str, npt.NDArray[np.int64]]], tmp_path: Path
) -> None:
    with pytest.raises(BadLabels, match="test picks all of 36 labelled tiles"):
        compare(Experiment.model_validate(packaged(potsdam[0], test="true")), tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"labels": None}, "segmentation needs masks"),
        ({"tasks": ["segmentation", "knn"]}, "segmentation has masks, knn needs a label a tile"),
        ({"tasks": ["head"]}, "classes are for masks"),
        ({"label_shares": [0.5, 0.5]}, "a share stands twice"),
        ({"label_shares": [0]}, "label_shares.0: "),
        ({"reference": "none such"}, "no method has this curve"),
    ],
)
def test_what_does_not_go_together_is_refused(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    with pytest.raises(BadRecipe) as caught:
        check(Experiment, packaged(tmp_path) | change, tmp_path / "config.toml", "evaluation")
    assert message in str(caught.value)

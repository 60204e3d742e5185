"""`nec evaluate`: each method scored as `nec head` scores it, runs that go on, and files that cannot be."""

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from jsonschema import Draft202012Validator
from PIL import Image

import nec_ray
from nec_ray.archive import open_archive
from nec_ray.config import check
from nec_ray.contracts import contract
from nec_ray.errors import BadRecipe, InputError, NecError
from nec_ray.evaluate import compare_with_uncompressed, train_head_on_archive
from nec_ray.evaluate.compare import RATE_ACCURACY_PNG, RATE_DISTORTION_PNG, RESULTS_JSON, compare
from nec_ray.evaluate.consumer import read_tile_labels, train_on_labels
from nec_ray.evaluate.experiment import Experiment, experiment_schema, read_experiment
from nec_ray.evaluate.probes import neighbours_vote
from nec_ray.runtime.encode import encode
from nec_ray.tiles import build_catalog, builtin_labels, builtin_scene, read_catalog, write_catalog
from tests.runtime.make import random_codec, with_layers

SEEDS = [3, 5]


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An archive of real tiles in two layers."""
    folder = tmp_path_factory.mktemp("evaluate")
    write_catalog(build_catalog(builtin_scene(), tile_size=32), folder / "catalog.parquet")
    codec = with_layers(random_codec(folder / "plain"), folder / "codec", [6, 10])
    encode(folder / "catalog.parquet", folder / "archive", codec_url=codec._store.url, local=True, where="x_off < 400")
    return folder


def document(work: Path, **changes: Any) -> dict[str, Any]:
    nec = {"kind": "nec", "archive": str(work / "archive"), "curve": "NEC"}
    return {
        "title": "the scene",
        "labels": str(builtin_labels()),
        "seeds": SEEDS,
        "epochs": 2,
        "methods": [
            nec | {"name": "whole"},
            nec | {"name": "first layer", "layers": 1, "decoder_layer": "trained"},
            {
                "kind": "uncompressed",
                "name": "float32",
                "archive": str(work / "archive"),
                "catalog": str(work / "catalog.parquet"),
            },
        ],
        **changes,
    }


def test_every_score_is_that_of_the_head_trained_alone(work: Path, tmp_path: Path) -> None:
    experiment = Experiment.model_validate(document(work))
    done = compare(experiment, tmp_path / "out")
    assert done == json.loads((tmp_path / "out" / RESULTS_JSON).read_text())
    archive = open_archive(work / "archive")
    how: dict[str, Any] = {"epochs": 2, "seed": SEEDS[1]}
    first = train_head_on_archive(
        archive, builtin_labels(), tmp_path / "head", layers=1, decoder_layer="trained", **how
    )
    catalog, [codec] = read_catalog(work / "catalog.parquet"), archive.codecs()
    plain = compare_with_uncompressed(archive, builtin_labels(), catalog, codec, **how)
    scores = {(row["method"], row["seed"]): row for row in done["results"]}
    assert len(scores) == 3 * 2
    assert {row["task"] for row in done["results"]} == {"head"}
    for name, expected in (("first layer", first), ("float32", plain)):
        row = scores[name, SEEDS[1]]
        assert row["accuracy"] == pytest.approx(expected["accuracy"])
        assert row["bytes_per_tile"] == pytest.approx(expected["bytes_per_tile"])
        assert row["codec_id"] == codec.id
    assert scores["first layer", 3]["bytes_per_tile"] < scores["whole", 3]["bytes_per_tile"]
    for row in done["summary"]:
        mine = [one["accuracy"] for one in done["results"] if one["method"] == row["method"]]
        assert (row["accuracy"], row["accuracy_std"]) == pytest.approx((np.mean(mine), np.std(mine, ddof=1)))
    with Image.open(tmp_path / "out" / RATE_ACCURACY_PNG) as picture:
        assert len(picture.convert("RGB").getcolors(1 << 20) or []) > 20


def test_what_is_finished_is_not_done_again(work: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(done: int, of: int) -> None:
        if done == 2:
            raise KeyboardInterrupt

    experiment = Experiment.model_validate(document(work))
    with pytest.raises(KeyboardInterrupt):
        compare(experiment, tmp_path, stop)
    kept = json.loads((tmp_path / RESULTS_JSON).read_text())["results"]
    assert [(row["method"], row["seed"]) for row in kept] == [("whole", seed) for seed in SEEDS]
    trained: list[int] = []

    def counted(*args: Any, **kwargs: Any) -> Any:
        trained.append(kwargs["layers"])
        return train_on_labels(*args, **kwargs)

    monkeypatch.setattr("nec_ray.evaluate.compare.train_on_labels", counted)
    done = compare(experiment, tmp_path)
    assert trained == [1, 1]
    assert done["results"][:2] == kept
    renamed = document(work)
    renamed["methods"][0]["name"] = "everything"
    assert compare(Experiment.model_validate(renamed), tmp_path)["results"][0]["accuracy"] == kept[0]["accuracy"]
    assert trained == [1, 1]
    compare(Experiment.model_validate(document(work, epochs=1)), tmp_path)
    assert len(trained) == 2 + 4, "other epochs are another experiment"


def test_probes_and_neighbours_of_every_kind_of_method(work: Path, tmp_path: Path) -> None:
    here = {"archive": str(work / "archive"), "catalog": str(work / "catalog.parquet")}
    random_codec(work / "other", seed=1)
    methods: list[dict[str, Any]] = [
        {"kind": "nec", "name": "first layer", "layers": 1, **here},
        {"kind": "nec", "name": "behind the decoder layer", "decoder_layer": "frozen", "archive": here["archive"]},
        {"kind": "uncompressed", "name": "float32", **here},
        {"kind": "quantised", "name": "2 bits", "precision": "int2", **here},
        {"kind": "jpeg2000", "name": "JPEG 2000", "bits_per_pixel": 2, **here},
        {"kind": "binary", "name": "other encoder", "codec": str(work / "other"), **here},
    ]
    tasks = ["linear", "knn", "retrieval"]
    experiment = Experiment.model_validate(document(work, methods=methods, tasks=tasks, retrieval_k=5))
    done = compare(experiment, tmp_path)
    rows = {(row["method"], row["task"], row["seed"]): row for row in done["results"]}
    wanted = [("linear", 3), ("linear", 5), ("knn", 3), ("retrieval", 3)]
    assert set(rows) == {(m["name"], *run) for m in methods for run in wanted if "decoder_layer" not in m}
    codec = open_archive(work / "archive").codecs()[0]
    other = rows["other encoder", "knn", 3]
    assert other["encoder_id"] != codec.spec.encoder_id == rows["float32", "knn", 3]["encoder_id"]
    assert rows["float32", "retrieval", 3]["recall"] == 1
    for name in ("first layer", "2 bits", "JPEG 2000", "other encoder"):
        row = rows[name, "retrieval", 3]
        assert 0 < row["recall"] < 1
        assert row["mse"] > 0
        assert row["k"] == 5
    ends = [{"kind": "raw", "name": "end to end", "bits": 8, "encoder": "trained", **here}]
    trained = compare(
        Experiment.model_validate(document(work, methods=ends, tasks=["knn", "head"], seeds=[0])), tmp_path / "trained"
    )
    assert [(row["task"], row["mse"]) for row in trained["results"]] == [("head", None)]
    assert 0 < trained["results"][0]["accuracy"] <= 1
    assert not (tmp_path / "trained" / RATE_DISTORTION_PNG).exists()
    # One score by hand: neighbours of the archive's own first layer vote.
    labels = read_tile_labels(open_archive(work / "archive"), str(builtin_labels()), None)
    pull = open_archive(work / "archive").pull(layers=1, tile_ids=labels.tile_ids)
    assert pull.tile_ids == labels.tile_ids
    x, test = pull.embeddings.mean(axis=1), labels.is_test
    said = neighbours_vote(x[~test], labels.target[~test], x[test], len(labels.classes))
    row = rows["first layer", "knn", 3]
    assert row["accuracy"] == pytest.approx(np.mean(said == labels.target[test]))
    assert row["bytes_per_tile"] == pytest.approx(pull.n_bytes.mean())
    for name in (RATE_ACCURACY_PNG, RATE_DISTORTION_PNG):
        with Image.open(tmp_path / name) as picture:
            assert len(picture.convert("RGB").getcolors(1 << 20) or []) > 20
    again = compare(experiment, tmp_path, lambda *_: None)
    assert again["results"] == done["results"], "nothing is scored twice: seconds would differ"


def test_methods_on_other_tiles_are_refused_before_anything_is_trained(work: Path, tmp_path: Path) -> None:
    few = tmp_path / "few"
    codec = str(work / "codec")
    encode(work / "catalog.parquet", few, codec_url=codec, local=True, where="x_off < 300")
    changed = document(work)
    changed["methods"][1] |= {"archive": str(few)}
    with pytest.raises(InputError, match=r"'first layer' is on other labelled tiles than 'whole' \(\d+ of them only"):
        compare(Experiment.model_validate(changed), tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"titel": "x"}, "titel: no such key in this evaluation"),
        ({"methods": []}, "methods: "),
        ({"seeds": [1, 1]}, "seeds: a seed stands twice"),
        ({"methods": [{"kind": "jpeg", "name": "x"}]}, "methods.0: "),
        ({"methods": [{"kind": "nec", "name": "x"}]}, "methods.0.nec.archive: must be given"),
        ({"methods": [{"kind": "nec", "name": "x", "archive": "a", "layers": 0}]}, "methods.0.nec.layers: "),
        ({"methods": [{"kind": "nec", "name": "x", "archive": "a"}] * 2}, "two methods are named 'x'"),
        ({"where": " "}, "where: is blank"),
        ({"test": ""}, "test: is blank"),
        ({"epochs": "2"}, "epochs: "),
        ({"tasks": ["knn", "knn"]}, "tasks: a task stands twice"),
        ({"tasks": ["retrieval"]}, "method 'whole' needs a catalog: retrieval"),
        (
            {"methods": [{"kind": "quantised", "name": "x", "archive": "a", "catalog": "c", "precision": "int9"}]},
            "methods.0.quantised.precision: ",
        ),
        (
            {
                "methods": [
                    {"kind": "pca", "name": "x", "archive": "a", "catalog": "c", "components": 2}
                    | {"precision": "float16", "ranges": "channel"}
                ]
            },
            "methods.0.pca: floats have no ranges",
        ),
    ],
)
def test_what_cannot_be_is_refused_with_its_key(
    work: Path, tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    path = tmp_path / "config.toml"
    with pytest.raises(BadRecipe) as caught:
        check(Experiment, document(work) | change, path, "evaluation")
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
    path.write_text('title = "x"\n[[methods]]\nkind = "nec"\nname = "a"\n')
    with pytest.raises(BadRecipe, match=r"nec\.archive: must be given; .* schemas/evaluation\.schema\.json"):
        read_experiment(path)


def test_the_schema_is_that_of_the_model(work: Path) -> None:
    schema = contract("evaluation.schema.json")
    assert schema == experiment_schema(), "write experiment_schema() to schemas/evaluation.schema.json"
    Draft202012Validator(schema).validate(document(work))


def test_the_page_s_example_is_an_experiment(tmp_path: Path) -> None:
    page = Path(nec_ray.__file__).parent / "docs" / "evaluation.md"
    [example] = re.findall(r"^```toml\n(.*?)^```", page.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    (tmp_path / "experiment.toml").write_text(example)
    experiment = read_experiment(tmp_path / "experiment.toml")
    kinds = set(experiment_schema()["properties"]["methods"]["items"]["discriminator"]["mapping"])
    assert {method.kind for method in experiment.methods} == kinds, "the page shows every kind of method"


def test_a_file_that_is_no_result_is_not_overwritten(work: Path, tmp_path: Path) -> None:
    (tmp_path / RESULTS_JSON).write_text("[1]")
    with pytest.raises(NecError, match="no results of `nec evaluate`"):
        compare(Experiment.model_validate(document(work)), tmp_path)
    assert (tmp_path / RESULTS_JSON).read_text() == "[1]"

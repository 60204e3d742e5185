"""Evaluations of GEO-Bench as files: what cannot be is refused by its key, the schema is the model's."""

import re
from pathlib import Path
from typing import Any

import pytest
from jsonschema import Draft202012Validator

import nec_ray
from nec_ray.config import override, read_toml
from nec_ray.contracts import contract
from nec_ray.errors import BadRecipe, InputError
from nec_ray.evaluate.evaluation import read_evaluation
from nec_ray.evaluate.experiment import Experiment
from nec_ray.evaluate.geobench.experiment import PROTOCOLS, GeobenchExperiment, geobench_schema
from nec_ray.evaluate.geobench.run import run_geobench

START = """title = "x"
geobench = [{ folder = "m-so2sat" }]
encoders = [{ kind = "mp_mae", name = "a" }]
[linear]
"""


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["titel=x"], "titel: no such key in this geobench evaluation"),
        (["linear.epoch=3"], "linear.epoch: no such key"),
        (["encoders.0.kind=mp_mea"], "encoders.0: "),
        (["encoders.0.patch=12"], "encoders.0.mp_mae.patch: "),
        (["geobench=[]"], "geobench: "),
        (["geobench.0.samples=[5, 5]"], "geobench.0.samples: a number of samples stands twice"),
        (["geobench.0.statistics=l2a"], "geobench.0: band_statistics are for statistics of l1c or l2a"),
        (
            ["geobench.0.band_names=published", 'encoders=[{kind="codec",name="a",codec="b"}]'],
            "know the corrected ones",
        ),
        (["seeds=[1, 1]"], "seeds: a seed stands twice"),
        (["segmentation.frozen_epochs=300"], "segmentation: frozen_epochs are more than the epochs"),
        (['encoders=[{kind="timm",name="a",model="b"},{kind="mp_mae",name="a"}]'], "two encoders are named 'a'"),
        (['geobench=[{folder="a"},{folder="a",samples=[3]}]'], "a data set stands twice"),
        (["encoders.1.name=b"], "--set encoders.1.name=b: 1 is no place in a list of 1"),
        (["title.a=b"], "--set title.a=b: title is no section"),
        (["title"], "--set title: write it as key=value"),
    ],
)
def test_what_cannot_be_is_refused_with_its_key(tmp_path: Path, changes: list[str], message: str) -> None:
    (tmp_path / "a.toml").write_text(START)
    read_evaluation(tmp_path / "a.toml")
    with pytest.raises(BadRecipe) as caught:
        read_evaluation(tmp_path / "a.toml", changes)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_an_evaluation_needs_a_protocol_and_a_known_row(tmp_path: Path) -> None:
    path = tmp_path / "a.toml"
    path.write_text(START.replace("[linear]\n", ""))
    with pytest.raises(BadRecipe, match="no protocol: add a section, one of fine_tuning"):
        read_evaluation(path)
    path.write_text(START)
    wrong: Any = read_evaluation(path, ["encoders.0.paper=MMEarth-S3"])
    with pytest.raises(InputError, match="no row 'MMEarth-S3' in the papers' tables; there are GASSL, ImageNet"):
        run_geobench(wrong, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_values_of_every_type_can_be_set() -> None:
    document: dict[str, Any] = {"a": {"b": [{"c": 1}, 2]}}
    for text in ("a.b.0.c=0.5", "a.b.1=word of a text", "a.d=[1, 2]", "e.f=true"):
        override(document, text)
    assert document == {"a": {"b": [{"c": 0.5}, "word of a text"], "d": [1, 2]}, "e": {"f": True}}


def test_other_evaluations_are_read_as_before(tmp_path: Path) -> None:
    path = tmp_path / "a.toml"
    path.write_text('title = "x"\n[[methods]]\nkind = "nec"\nname = "a"\narchive = "b"\n')
    found = read_evaluation(path, ["seeds=[4]"])
    assert isinstance(found, Experiment)
    assert found.seeds == [4]


def test_the_schema_is_that_of_the_model() -> None:
    schema = contract("geobench_evaluation.schema.json")
    assert schema == geobench_schema(), "write geobench_schema() to schemas/geobench_evaluation.schema.json"
    for path in (Path(nec_ray.__file__).parent / "data" / "geobench").glob("*.toml"):
        if path.stem not in {"papers", "compressed_recipe"}:
            Draft202012Validator(schema).validate(read_toml(path, "evaluation"))


def test_the_page_s_example_is_an_evaluation(tmp_path: Path) -> None:
    page = Path(nec_ray.__file__).parent / "docs" / "geobench.md"
    [example] = re.findall(r"^```toml\n(.*?)^```", page.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    (tmp_path / "a.toml").write_text(example)
    found = read_evaluation(tmp_path / "a.toml")
    assert isinstance(found, GeobenchExperiment)
    kinds = set(geobench_schema()["properties"]["encoders"]["items"]["discriminator"]["mapping"])
    assert {encoder.kind for encoder in found.encoders} == kinds, "the page shows every kind of encoder"
    assert set(found.protocols) == set(PROTOCOLS)

"""Policies: closed, each mistake named by its key; the schema file says the same."""

import json
import tomllib
from contextlib import nullcontext
from pathlib import Path

import pytest
from jsonschema import Draft202012Validator

from nec_ray.contracts import contract
from nec_ray.errors import BadRecipe, InputError, NotFound
from nec_ray.runtime.policy import Policy, one_rule, policy_schema, read_policy

WHOLE = """
archive = "s3://bucket/archive"

[[rules]]
name = "reference sites stay"
where = "label = 'reference'"
keep = true

[[rules]]
name = "old tiles"
where = "acquired_at < now() - INTERVAL 2 YEAR"
layers = 2
max_distortion = 0.2

[[rules]]
name = "africa"
where = "bbox.xmin > -18 AND bbox.xmax < 52 AND bbox.ymin > -35 AND bbox.ymax < 38"
codec = "s3://bucket/codecs/b"
tiles = "s3://bucket/catalog.parquet"

[lease]
seconds = 300

[cost]
storage_gb_month = 0.02
currency = "EUR"
"""


def read(folder: Path, text: str) -> Policy:
    path = folder / "policy.toml"
    path.write_text(text)
    return read_policy(path)


def test_a_policy_is_read_and_defaults_fill_the_rest(tmp_path: Path) -> None:
    policy = read(tmp_path, WHOLE)
    assert [rule.name for rule in policy.rules] == ["reference sites stay", "old tiles", "africa"]
    assert (policy.rules[1].layers, policy.rules[1].max_distortion, policy.rules[2].keep) == (2, 0.2, False)
    assert (policy.lease.seconds, policy.cost.currency, policy.cost.writes_1000) == (300, "EUR", 0.005)
    assert Policy.model_validate(policy.model_dump(mode="json")) == policy


RULE = 'archive = "a"\n[[rules]]\nname = "r"\n'


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "archive: must be given"),
        ('archive = "a"\n', "rules: must be given"),
        ('archive = "a"\nrules = []\n', "rules: "),
        (RULE, "rules.0: rule 'r': give one of layers, codec and keep"),
        (RULE + "layers = 1\nkeep = true\n", "give one of layers, codec and keep"),
        (RULE + "layer = 1\n", "rules.0.layer: no such key in this policy"),
        (RULE + "layers = 0\n", "rules.0.layers: "),
        (RULE + "layers = 1.5\n", "rules.0.layers: "),
        (RULE + 'layers = 1\ntiles = "c"\n', "tiles is for a codec to encode with"),
        (RULE + "layers = 1\nmax_distortion = -1\n", "rules.0.max_distortion: "),
        (RULE + "layers = 1\nmax_distortion = nan\n", "rules.0.max_distortion: "),
        (RULE + 'codec = "c"\ntiles = "t"\nmax_distortion = 0.1\n', "two encoders cannot be compared"),
        (RULE + 'layers = 1\nwhere = ""\n', "rules.0.where: is blank"),
        (RULE + 'layers = 1\nwhere = " \\t "\n', "rules.0.where: is blank"),
        (RULE + "layers = true\n", "rules.0.layers: "),
        (RULE + 'layers = "2"\n', "rules.0.layers: "),
        (RULE + 'keep = "yes"\n', "rules.0.keep: "),
        (RULE + 'layers = 1\n[lease]\nseconds = "60"\n', "lease.seconds: "),
        (RULE.replace('"a"', '" "') + "layers = 1\n", "archive: is blank"),
        (RULE + 'layers = 1\n[[rules]]\nname = "r"\nlayers = 2\n', "two rules are named 'r'"),
        (RULE + "layers = 1\n[lease]\nseconds = 0\n", "lease.seconds: "),
        (RULE + "layers = 1\n[lease]\nholder = 'x'\n", "lease.holder: no such key in this policy"),
        (RULE + "layers = 1\n[cost]\nstorage_gb_month = -1\n", "cost.storage_gb_month: "),
        (RULE + "layers = 1\n[costs]\n", "costs: no such key in this policy"),
        ("archive = \n", "no TOML"),
    ],
)
def test_what_cannot_be_is_refused_in_one_line_that_names_the_key(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(BadRecipe) as caught:
        read(tmp_path, text)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_missing_file_is_a_typed_error(tmp_path: Path) -> None:
    with pytest.raises(NotFound, match="no policy there"):
        read_policy(tmp_path / "none.toml")


def test_the_schema_file_is_in_step_with_the_code() -> None:
    assert contract("policy.schema.json") == json.loads(json.dumps(policy_schema())), (
        "write policy_schema() to schemas/policy.schema.json"
    )


def test_the_schema_alone_refuses_unknown_keys(tmp_path: Path) -> None:
    validator = Draft202012Validator(contract("policy.schema.json"))
    document = read(tmp_path, WHOLE).model_dump(mode="json")
    assert validator.is_valid(document)
    assert not validator.is_valid({**document, "rule": []})
    document["rules"][0]["layer"] = 1
    assert not validator.is_valid(document)


@pytest.mark.parametrize(
    ("lines", "fits"),
    [
        ("layers = 2", True),
        ("layers = 2\nkeep = false", True),
        ('codec = "c"\nwhere = "true"', True),
        ("keep = true", True),
        ("", False),
        ("keep = false", False),
        ('layers = 2\ncodec = "c"', False),
        ("layers = 2\nkeep = true", False),
        ('codec = "c"\nkeep = true', False),
        ("layers = true", False),
        ('layers = "2"', False),
        ('keep = "yes"', False),
        ('layers = 2\nwhere = " "', False),
        ("layers = 2\nmax_distortion = 1", True),
        ('codec = "c"\nmax_distortion = 0.5', True),
        ('codec = "c"\ntiles = "t"', True),
        ('layers = 2\ntiles = "t"', False),
        ('codec = "c"\ntiles = "t"\nmax_distortion = 0.5', False),
        ("keep = true\nmax_distortion = 0.5", False),
        ("layers = 2\nmax_distortion = true", False),
    ],
)
def test_schema_and_code_agree(tmp_path: Path, lines: str, fits: bool) -> None:
    text = RULE + lines
    assert Draft202012Validator(contract("policy.schema.json")).is_valid(tomllib.loads(text)) == fits
    with nullcontext() if fits else pytest.raises(BadRecipe):
        read(tmp_path, text)


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        ({"layers": 1, "where": "   "}, "where: is blank"),
        ({}, "give one of layers, codec and keep"),
        ({"layers": 1, "tiles": "c"}, "tiles is for a codec"),
        ({"layers": 65}, "layers: "),
        ({"codec": "c", "tiles": "t", "max_distortion": 0.1}, "two encoders cannot be compared"),
    ],
)
def test_options_of_the_command_that_contradict_each_other(rule: dict[str, object], message: str) -> None:
    with pytest.raises(InputError, match=message) as caught:
        one_rule("a", **rule)
    assert "\n" not in str(caught.value)


def test_the_example_in_the_docs_is_a_policy(tmp_path: Path) -> None:
    page = (Path(__file__).parents[2] / "nec_ray" / "docs" / "re-encoding.md").read_text()
    example = page.split("```toml\n")[1].split("```")[0]
    assert [rule.name for rule in read(tmp_path, example).rules] == ["reference sites", "old tiles", "africa"]

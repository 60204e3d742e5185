"""The sizing page: its figures, computed again from its inputs, which agree with the code and the other pages."""

import ast
import operator
import re
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest

from nec_ray.archive.pack import MAX_BYTES
from nec_ray.runtime.encode import COMMIT_SECONDS
from nec_ray.runtime.plan import SHARD_TILES

DOCS = Path(__file__).resolve().parents[2] / "nec_ray" / "docs"
PAGE = (DOCS / "sizing.md").read_text()
INPUTS = {name: float(value) for name, value in re.findall(r"^\| `(\w+)` \| ([0-9.]+) \| [^`]", PAGE, re.MULTILINE)}
DERIVED = re.findall(r"^\| `(\w+)` \| `([^`]+)` \| [^|]+ \| ([0-9.,]+) \| ([0-9.,]+) \|$", PAGE, re.MULTILINE)
AREAS = ("africa_km2", "land_km2")
OPERATORS: dict[type, Callable[[float, float], float]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.Pow: operator.pow,
}


def evaluate(node: ast.AST, names: Mapping[str, float]) -> float:
    """An arithmetic expression, and nothing else."""
    match node:
        case ast.Expression(body):
            return evaluate(body, names)
        case ast.BinOp(left, sign, right):
            return OPERATORS[type(sign)](evaluate(left, names), evaluate(right, names))
        case ast.Name(name):
            return names[name]
        case ast.Constant(int() | float() as value):
            return float(value)
    raise ValueError(ast.dump(node))


def as_shown(value: float, like: str) -> str:
    decimals = len(like.partition(".")[2])
    return f"{value:,.{decimals}f}"


def test_the_page_is_read_whole() -> None:
    rows = [line for line in PAGE.splitlines() if line.startswith("| `")]
    assert len(rows) == len(INPUTS) + len(DERIVED)
    names = [*INPUTS, *(name for name, *_ in DERIVED)]
    assert len(set(names)) == len(names)


@pytest.mark.parametrize("column", [0, 1], ids=AREAS)
def test_every_derived_figure_follows_from_the_inputs(column: int) -> None:
    known = INPUTS | {"area_km2": INPUTS[AREAS[column]]}
    for name, formula, *shown in DERIVED:
        known[name] = evaluate(ast.parse(formula, mode="eval"), known)
        assert as_shown(known[name], shown[column]) == shown[column], name
    assert known["tiles_m"] == pytest.approx((18.5, 90.9)[column], abs=0.05)


def test_every_input_is_used() -> None:
    words = {word for _, formula, *_ in DERIVED for word in re.findall(r"[a-z]\w*", formula)}
    assert set(INPUTS) - set(AREAS) <= words


def test_inputs_agree_with_the_code_and_the_other_pages() -> None:
    assert INPUTS["shard_tiles"] == SHARD_TILES
    assert INPUTS["commit_s"] == COMMIT_SECONDS
    assert INPUTS["pack_bytes"] == MAX_BYTES
    assert INPUTS["tile_km"] == pytest.approx(INPUTS["tile_px"] * 10 / 1000)
    card, pull = ((DOCS / name).read_text() for name in ("../data/rgb_codec.md", "pull-speed.md"))
    [size] = re.findall(r"and (\d+) bytes a tile of AID for the first one, two and three", card)
    assert INPUTS["payload_bytes"] == int(size)
    [column_bytes] = re.findall(r"the columns that a pull needs take (\d+) bytes a tile", pull)
    assert INPUTS["pull_index_bytes"] == int(column_bytes)

"""Pickles are read as plain data: what they hold comes out, and nothing of what they would do is done."""

import os
import pickle
import pickletools
from datetime import date, datetime
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from nec_ray.errors import BadSource
from nec_ray.tiles.pickled import MOST_BYTES, Record, parse

TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=300)
LEAVES = (
    st.none()
    | st.booleans()
    | st.integers(-(2**70), 2**70)
    | st.floats(allow_nan=False)
    | TEXT
    | st.binary(max_size=300)
)
PLAIN = st.recursive(
    LEAVES,
    lambda inner: (
        st.lists(inner)
        | st.lists(inner).map(tuple)
        | st.dictionaries(st.text("abc\né", max_size=4) | st.integers(), inner)
    ),
    max_leaves=20,
)


@given(PLAIN, st.sampled_from([3, 4, 5]))
def test_plain_data_comes_out_as_it_went_in(value: Any, protocol: int) -> None:
    data = pickle.dumps(value, protocol)
    read = parse(data, "x")
    assert read == value
    assert repr(read) == repr(value), "also the types: True is no 1, a tuple no list"


def test_long_lists_and_shared_objects_come_out_whole() -> None:
    shared = ["a", {"b": 1.5}]
    value = {"many": [shared] * 3, "names": [f"n{i}" for i in range(5000)]}
    read = parse(pickle.dumps(value, 4), "x")
    assert read == value
    assert read["many"][0] is read["many"][2]


def test_objects_of_the_listed_classes_are_described() -> None:
    scalar = parse(pickle.dumps(np.int64(7), 4), "x")
    assert isinstance(scalar, Record)
    assert scalar.name.name == "scalar"
    assert scalar.args[1] == (7).to_bytes(8, "little")
    vector = parse(pickle.dumps(np.array([0, 1], np.uint8), 4), "x")
    assert vector.state[1] == (2,)
    assert vector.state[4] == b"\x00\x01"
    moment = parse(pickle.dumps(datetime(2019, 3, 5, 10), 4), "x")
    assert moment.args[0][:4] == bytes([2019 >> 8, 2019 & 255, 3, 5])
    assert parse(pickle.dumps(date(2019, 3, 5), 4), "x").name.name == "date"


class Bomb:
    """Runs a command where it is unpickled."""

    def __init__(self, what: Any, *args: Any) -> None:
        self.what = what, args

    def __reduce__(self) -> Any:
        return self.what


@pytest.mark.parametrize("protocol", [0, 1, 2, 3, 4, 5])
@pytest.mark.parametrize("wrap", [lambda bomb: bomb, lambda bomb: {"label": [1, (bomb,)]}])
def test_what_would_run_code_is_refused_and_does_not_run(protocol: int, wrap: Any, tmp_path: Any) -> None:
    mark = tmp_path / "ran"
    for bomb in (Bomb(os.system, f"touch {mark}"), Bomb(eval, f"open({str(mark)!r}, 'w')"), Bomb(pickle.loads, b"N.")):
        data = pickle.dumps(wrap(bomb), protocol)
        with pytest.raises(BadSource, match=r"^f: its pickle holds .* more than plain data; it is not read$") as caught:
            parse(data, "f")
        assert "\n" not in str(caught.value)
    assert not mark.exists()


@pytest.mark.parametrize(
    "data",
    [
        b"cnumpy\nload\n.",
        b"cgeobench.os\nsystem.x\n.",
        b"cgeobench\n__class__.__base__\n.",
        b"cos.geobench\nx\n.",
        b"\x8c\x0bgeobench/../\x8c\x01x\x93.",
        b"(lp0\n.",
        b"Vtext\n.",
        b"(ios\nsystem\n.",
        b"\x82\x01.",
        b"P1\n.",
        b"NQ.",
        b"]\x8f.",
        b"\x8b\xff\xff\xff\x7f.",
    ],
)
def test_other_names_and_opcodes_are_refused(data: bytes) -> None:
    with pytest.raises(BadSource, match="more than plain data"):
        parse(data, "f")


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b".",
        b"NN.",
        b"(.",
        b"(N.",
        b"K",
        b"X\xff\xff\xff\xff.",
        b"B\xff\xff\xff\x7fab.",
        b"\x8c\x02\xff\xfe.",
        b"\x8c\x03\xed\xa0\x80.",
        b"h\x05.",
        b"\x94.",
        b"N\x86.",
        b"Na.",
        b"N]a.",
        b"}]Ns.",
        b"}(NNNu.",
        b"}(N]u.",
        b"NNb.",
        b"K\x01)R.",
        b"cgeobench\nx\nNR.",
        b"cgeobench\nx",
        b"\x8a\x09\x00.",
        b"t.",
        b"e.",
        b"\x93.",
        b"NN\x93.",
    ],
)
def test_damaged_pickles_are_refused_in_one_line(data: bytes) -> None:
    with pytest.raises(BadSource, match=r"^f: its pickle is damaged; fetch the data set again$"):
        parse(data, "f")


@given(st.binary(max_size=60) | st.lists(st.sampled_from(list(range(256))), max_size=40).map(bytes))
def test_no_bytes_do_anything_but_give_data_or_a_refusal(data: bytes) -> None:
    try:
        parse(data, "f")
    except BadSource as error:
        assert str(error).startswith("f: ")  # noqa: PT017
        assert "\n" not in str(error)  # noqa: PT017


@given(st.integers(0, 10_000), st.binary(min_size=1, max_size=3))
def test_a_real_pickle_with_damage_gives_data_or_a_refusal(at: int, damage: bytes) -> None:
    data = pickle.dumps({"label": 3, "bands_order": ["02 - Blue"], "a": (1, 2.5, None, datetime(2020, 1, 1))}, 4)
    at %= len(data)
    try:
        parse(data[:at] + damage + data[at + len(damage) :], "f")
    except BadSource as error:
        assert "\n" not in str(error)  # noqa: PT017


def test_a_pickle_that_would_fill_the_memory_is_refused() -> None:
    with pytest.raises(BadSource, match=r"bytes, .* are the most"):
        parse(b"\x80\x04" + b"]" * MOST_BYTES, "f")
    deep = b"\x80\x04" + b"]" * 200_000 + b"a" * 199_999 + b"."
    value = parse(deep, "f")
    for _ in range(199_999):
        [value] = value
    assert value == []


def test_every_opcode_of_python_is_known_or_refused() -> None:
    """Those that this reads do to the stack what pickletools says of them, all others are refused."""
    refused = set()
    for opcode in pickletools.opcodes:
        try:
            parse(opcode.code.encode("latin-1") + b"\x00" * 12 + b"\n\n.", "f")
        except BadSource as error:
            if "more than plain data" in str(error) and repr(opcode.code.encode("latin-1")) in str(error):
                refused.add(opcode.name)
    for name in ("INST", "OBJ", "NEWOBJ_EX", "EXT1", "EXT2", "EXT4", "PERSID", "BINPERSID", "INT", "STRING", "LONG4"):
        assert name in refused
    assert "GLOBAL" not in refused

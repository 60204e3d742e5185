"""What the explorer's page is given: columns that are the index's own, and colours that are principal components."""

import gzip
import json
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nec_ray import load_codec, open_archive
from nec_ray.archive.explore import columns as packing
from nec_ray.archive.explore import pack_columns
from nec_ray.archive.explore.colours import false_colour
from nec_ray.archive.layout import install_codec
from nec_ray.errors import InputError
from tests.archive.explore.scenes import small_archive, with_columns
from tests.archive.make import Made, empty_archive, index_rows, pack
from tests.codec.make import make_codec

Columns = dict[str, Any]


def unpacked(data: bytes) -> tuple[dict[str, Any], Columns]:
    """Header and columns, read as the docstring of columns.py says."""
    raw = gzip.decompress(data)
    end = 4 + int.from_bytes(raw[:4], "little")
    header = json.loads(raw[4:end])
    assert end % 8 == 0
    columns: Columns = {}
    for name, one in header["columns"].items():
        assert one["start"] % 8 == 0  # typed arrays of JavaScript stand on whole numbers
        part = raw[end + one["start"] : end + one["start"] + one["length"]]
        columns[name] = json.loads(part) if one["type"] == "texts" else np.frombuffer(part, one["type"])
    return header, columns


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    return small_archive(tmp_path_factory.mktemp("columns"))


def test_columns_are_those_of_the_index(made: Made) -> None:
    archive = open_archive(made.url)
    data = pack_columns(archive.select())
    assert data == pack_columns(open_archive(made.url).select())  # one version, one page
    header, columns = unpacked(data)
    rows = archive.sql("SELECT * FROM embeddings ORDER BY tile_id").to_arrow_table().to_pylist()
    assert header["tiles"] == len(rows) == 49
    assert (header["version"], header["licence"], header["where"]) == (1, "CC0", "")
    assert columns["tile_id"] == [row["tile_id"] for row in rows]
    for i, row in enumerate(rows):
        assert ["valid", "nodata", "failed"][columns["status"][i]] == row["status"]
        assert columns["n_bytes"][i] == row["n_bytes"]
        time = columns["acquired_at"][i]
        assert np.isnan(time) if row["acquired_at"] is None else time == row["acquired_at"].timestamp()
        edges = [int(columns[name][i]) for name in ("west", "south", "east", "north")]
        expected = [-(2**31)] * 4 if row["bbox"] is None else [round(1e6 * edge) for edge in row["bbox"].values()]
        assert edges == expected
        for name in ("label", "reason", "codec_id", "encoded_from", "sensor"):
            code = columns[name][i]
            assert (None if code < 0 else columns[f"{name}.texts"][code]) == row[name]
    vectors = [vector for row in rows for vector in row["pooled"] or []]
    np.testing.assert_array_equal(columns["pooled"], vectors)
    assert [one["channels"] for one in header["kinds"]] == [24]
    assert [bool(kind) for kind in columns["kind"]] == [row["pooled"] is not None for row in rows]


def test_what_opens_a_store_stays_out_of_the_page(made: Made) -> None:
    raw = gzip.decompress(pack_columns(open_archive(made.url).select()))
    assert b"https://***@store/scene.tif?sig=***" in raw
    assert b"hunter2" not in raw
    assert b"abcd" not in raw


def test_a_condition_picks_and_stands_in_the_header(made: Made) -> None:
    header, columns = unpacked(pack_columns(open_archive(made.url).select("tile_id < 't05'", time="2020-05")))
    some = open_archive(made.url).select("tile_id < 't05'", time="2020-05")
    assert columns["tile_id"] == some.rows(["tile_id"])["tile_id"].to_pylist() != []
    assert header["where"] == some.where


def test_none_and_too_many_tiles_are_refused(made: Made, monkeypatch: pytest.MonkeyPatch) -> None:
    archive = open_archive(made.url)
    with pytest.raises(InputError, match="no tiles to show"):
        pack_columns(archive.select("tile_id = 'x'"))
    monkeypatch.setattr(packing, "MOST_TILES", 48)
    with pytest.raises(InputError, match=r"more than 48 tiles.*--within"):
        pack_columns(archive.select())
    assert unpacked(pack_columns(archive.select("tile_id <> 't00'")))[0]["tiles"] == 48


def test_places_that_are_none_on_earth_and_endless_vectors_are_left_out(tmp_path: Path) -> None:
    made = empty_archive(tmp_path)
    edges = [(0, 0, 1, 1), (179, -90, 181, 90), (0, 0, 1, 1e300), (np.nan, 0, 1, 1), (2, 0, 1, 1), (0, 0, 1, np.inf)]
    rows = index_rows([f"t{i}" for i in range(6)], made.codec.id, ["valid"] * 5 + ["strange"])
    boxes: list[object] = [dict(zip(("xmin", "ymin", "xmax", "ymax"), map(float, e), strict=True)) for e in edges]
    vectors: list[object] = [[1, 2], [3, 4], [1] * 257, [], None, [5, 6]]
    made.index.append(made.index.version(), with_columns(rows, bbox=boxes, pooled=vectors))
    header, columns = unpacked(pack_columns(open_archive(made.url).select()))
    assert columns["west"].tolist() == [0, 179_000_000] + [-(2**31)] * 4
    assert columns["east"].tolist() == [1_000_000, 181_000_000] + [-(2**31)] * 4
    assert columns["pooled"].tolist() == [1, 2, 3, 4]
    assert columns["kind"].tolist() == [1, 1, 0, 0, 0, 0]
    assert columns["status"].tolist() == [0] * 5 + [2]
    assert header["kinds"][0]["tiles"] == 2


def test_vectors_of_two_encoders_are_of_two_kinds(tmp_path: Path) -> None:
    made = empty_archive(tmp_path)
    make_codec(tmp_path / "other", seed=9)
    other = Made(made.url, made.store, made.index, load_codec(tmp_path / "other"), {})
    install_codec(made.store, other.codec)
    for one, names in ((made, ["a1", "b2"]), (other, ["a2", "b1"])):
        rows = with_columns(pack(one, names), pooled=[[1, 2, 3], [4, 5, 6]])
        made.index.append(made.index.version(), rows)
    header, columns = unpacked(pack_columns(open_archive(made.url).select()))
    assert columns["tile_id"] == ["a1", "a2", "b1", "b2"]
    a1, a2, b1, b2 = columns["kind"].tolist()
    assert a1 == b2 != a2 == b1
    assert {one["tiles"] for one in header["kinds"]} == {2}
    assert columns["pooled"].tolist() == [1, 2, 3, 1, 2, 3, 4, 5, 6, 4, 5, 6]


def test_false_colour_is_that_of_the_principal_components() -> None:
    rng = np.random.default_rng(0)
    spread = np.array([60, 30, 15, 4, 2, 1])
    turn, _ = np.linalg.qr(rng.normal(size=(6, 6)))
    vectors = np.clip(np.rint(rng.normal(size=(500, 6)) * spread @ turn + 5), -127, 127).astype(np.int8)
    colours, shares = false_colour(vectors)
    centred = vectors - vectors.mean(axis=0)
    left, singular, _ = np.linalg.svd(centred, full_matrices=False)  # another road than that of the covariance
    np.testing.assert_allclose(shares, (singular**2 / (singular**2).sum())[:3], rtol=1e-4)
    for component in range(3):
        score = left[:, component] * singular[component]
        low, high = np.percentile(score, [2, 98])
        expected = np.clip((score - low) / (high - low), 0, 1) * 255
        apart = [np.abs(colours[:, component] - e).max() for e in (expected, 255 - expected)]  # of either direction
        assert min(apart) <= 1


@settings(max_examples=50, deadline=None)
@given(st.lists(st.lists(st.integers(-128, 127), min_size=2, max_size=2), min_size=0, max_size=6))
def test_few_and_equal_vectors_have_a_colour_too(vectors: list[list[int]]) -> None:
    array: npt.NDArray[np.int8] = np.array(vectors, np.int8).reshape(-1, 2)
    colours, shares = false_colour(array)
    assert colours.shape == (len(vectors), 3)
    assert (colours[:, 2] == 128).all()  # a third component that is not there
    assert all(0 <= share <= 1 + 1e-6 for share in shares)
    if len({tuple(vector) for vector in vectors}) <= 1:
        assert (colours == 128).all()

"""Transcoding against the same computed by hand with numpy, tile by tile."""

import hashlib
from pathlib import Path
from random import Random

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from nec_ray.archive.pack import read_footer
from nec_ray.codec import Codec, load_codec, truncate_codec
from nec_ray.contracts import arrow_schema
from nec_ray.runtime.transcode import Loss, Transcoded, transcode
from tests.archive.make import Made, damage, empty_archive, filled_archive, pack
from tests.runtime.make import with_other_tables


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    return filled_archive(tmp_path_factory.mktemp("made"))


@pytest.fixture(scope="module")
def cut(made: Made, tmp_path_factory: pytest.TempPathFactory) -> Codec:
    folder = tmp_path_factory.mktemp("cut") / "codec"
    truncate_codec(made.codec, 1, folder)
    return load_codec(folder)


@pytest.fixture(scope="module")
def other(made: Made, tmp_path_factory: pytest.TempPathFactory) -> Codec:
    return with_other_tables(made.codec, tmp_path_factory.mktemp("other") / "codec")


def all_rows(made: Made) -> pa.Table:
    return made.index.read(made.index.version().files, arrow_schema("index.json").names)


def payloads(made: Made, done: Transcoded) -> dict[str, bytes]:
    """The payloads that the new rows name, read as a stranger would."""
    found = {}
    for row in done.rows.to_pylist():
        if row["payload"]:
            data = (Path(made.url) / row["payload"]["pack"]).read_bytes()
            at = row["payload"]["offset"]
            found[row["tile_id"]] = data[at : at + row["n_bytes"]]
            assert hashlib.sha256(found[row["tile_id"]]).digest() == row["sha256"]
            assert sum(row["payload"]["layer_lengths"]) == row["n_bytes"]
    return found


def distortion_by_hand(old: npt.NDArray[np.float64], new: npt.NDArray[np.float64]) -> float:
    """Of embeddings (tiles, tokens, channels)."""
    mean = old.mean(axis=(0, 1))
    return float(((old - new) ** 2).mean() / ((old - mean) ** 2).mean())


def test_other_tables_give_the_embeddings_rounded_again(
    made: Made, other: Codec, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("nec_ray.runtime.transcode._SYMBOLS", 2000)  # five tiles at a time
    rows = all_rows(made)
    done = transcode(rows, made.store, made.codec, other)
    ids = sorted(made.symbols)
    old = np.stack([made.symbols[t] for t in ids]) + made.codec.tables.median
    expected = np.rint(old - other.tables.median).astype(np.int32)
    new = payloads(made, done)
    assert sorted(new) == ids
    assert np.array_equal(other.decompress([new[t] for t in ids]), expected)
    by_hand = distortion_by_hand(old.astype(float), expected + other.tables.median.astype(float))
    assert 0 < by_hand < 1
    assert done.loss.distortion == pytest.approx(by_hand, rel=1e-6)
    vectors = dict(zip(done.rows["tile_id"].to_pylist(), done.rows["pooled"].to_pylist(), strict=True))
    assert [vectors[t] for t in ids] == other.pool(expected).tolist()


def test_the_first_layers_are_the_first_bytes(made: Made, cut: Codec) -> None:
    rows = all_rows(made)
    done = transcode(rows, made.store, made.codec, cut)
    ids = sorted(made.symbols)
    symbols = np.stack([made.symbols[t] for t in ids])
    new = payloads(made, done)
    assert [new[t] for t in ids] == list(cut.compress(np.ascontiguousarray(symbols[:, :, :8])))
    assert all(old.startswith(new[t]) for t, old in zip(ids, made.codec.compress(symbols), strict=True))
    old = symbols + made.codec.tables.median.astype(float)
    left = old.copy()
    left[:, :, 8:] = made.codec.tables.median[8:]
    assert done.loss.distortion == pytest.approx(distortion_by_hand(old, left), rel=1e-6)
    assert done.rows["pooled"].equals(rows["pooled"])


def test_fewer_channels_under_other_tables(made: Made, cut: Codec, tmp_path: Path) -> None:
    short = with_other_tables(cut, tmp_path / "codec")
    done = transcode(all_rows(made), made.store, made.codec, short)
    ids = sorted(made.symbols)
    old = np.stack([made.symbols[t] for t in ids]) + made.codec.tables.median
    moved = np.rint(old[:, :, :8] - short.tables.median)
    new = old.astype(float)
    new[:, :, :8] = moved + short.tables.median
    new[:, :, 8:] = made.codec.tables.median[8:]
    assert done.loss.distortion == pytest.approx(distortion_by_hand(old.astype(float), new), rel=1e-5)
    assert np.array_equal(short.decompress([payloads(made, done)[t] for t in ids]), moved)


def test_rows_say_where_they_come_from_and_keep_the_rest(made: Made, cut: Codec) -> None:
    rows = all_rows(made)
    done = transcode(rows, made.store, made.codec, cut)
    changed = {"codec_id", "payload", "sha256", "n_bytes", "encoded_at", "encoded_from"}
    kept = [name for name in rows.column_names if name not in changed]
    assert done.rows.select(kept).equals(rows.select(kept))
    assert set(done.rows["encoded_from"].to_pylist()) == {made.codec.id}
    assert set(done.rows["codec_id"].to_pylist()) == {cut.id}
    assert done.rows.num_rows == 40  # the two without a payload go along
    assert not done.damaged
    [name] = {row["pack"] for row in done.rows["payload"].to_pylist() if row}
    assert read_footer(made.store, name).equals(done.rows)


def test_rows_are_newer_than_the_old_ones_whatever_the_clock_said(made: Made, cut: Codec) -> None:
    rows = all_rows(made)
    at = rows.schema.get_field_index("encoded_at")
    ahead = pa.array([4_000_000_000_000_000] * rows.num_rows, rows.schema.field(at).type)
    done = transcode(rows.set_column(at, rows.schema.field(at), ahead), made.store, made.codec, cut)
    assert min(done.rows["encoded_at"].to_pylist()) > ahead[0].as_py()


@pytest.mark.parametrize("target", ["cut", "other"])
def test_a_damaged_payload_is_left_out_and_named(
    tmp_path: Path, target: str, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("nec_ray.runtime.transcode._SYMBOLS", 2000)
    made = filled_archive(tmp_path)
    damage(made, "t005")
    done = transcode(all_rows(made), made.store, made.codec, request.getfixturevalue(target))
    assert list(done.damaged) == ["t005"]
    assert "SHA-256 differs" in done.damaged["t005"]
    assert done.rows.num_rows == 39
    assert "t005" not in payloads(made, done)


def test_nothing_but_damage_gives_no_rows(tmp_path: Path, cut: Codec) -> None:
    made = empty_archive(tmp_path)
    made.index.append(made.index.version(), pack(made, ["a"]))
    damage(made, "a")
    done = transcode(all_rows(made), made.store, made.codec, cut)
    assert (done.rows.num_rows, list(done.damaged), done.loss.distortion) == (0, ["a"], None)


def test_a_look_writes_nothing_and_tells_the_same_sizes(made: Made, other: Codec) -> None:
    before = made.store.names("packs")
    looked = transcode(all_rows(made), made.store, made.codec, other, write=False)
    assert made.store.names("packs") == before
    done = transcode(all_rows(made), made.store, made.codec, other)
    assert looked.rows["n_bytes"].equals(done.rows["n_bytes"])
    assert looked.loss.distortion == done.loss.distortion


@given(st.lists(st.lists(st.integers(-50, 50), min_size=6, max_size=6), min_size=1, max_size=8), st.randoms())
def test_losses_add_up_in_any_order(tiles: list[list[int]], random: Random) -> None:
    parts = []
    for tile in tiles:
        symbols = np.array(tile, float).reshape(2, 3)
        parts.append(Loss(2, float(abs(symbols).sum()), symbols.sum(axis=0), (symbols**2).sum(axis=0)))
    whole = sum(parts[1:], parts[0])
    shuffled = list(parts)
    random.shuffle(shuffled)
    again = Loss.from_bytes(sum(shuffled[1:], shuffled[0]).to_bytes())
    assert whole.distortion == again.distortion
    old = np.array(tiles, float).reshape(-1, 3)
    variance, error = float(((old - old.mean(axis=0)) ** 2).sum()), float(abs(old).sum())
    if variance > 1e-9:
        assert whole.distortion == pytest.approx(error / variance)
    else:
        assert whole.distortion == (float("inf") if error else 0)

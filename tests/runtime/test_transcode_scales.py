"""Transcoding payloads of two grid scales, against the same computed by hand with numpy."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from nec_ray.codec import Codec, LayerSpec, load_codec, truncate_codec, write_codec
from nec_ray.contracts import arrow_schema
from nec_ray.errors import CodecMismatch
from nec_ray.runtime.policy import Rule
from nec_ray.runtime.reencode_plan import _check_transcodable
from nec_ray.runtime.transcode import Transcoded, transcode
from tests.archive.make import MadeOfScales, scaled_archive


def moved_codec(codec: Codec, folder: Path, layers: list[LayerSpec]) -> Codec:
    """A codec of the same encoder and channels, in other layers, whose medians are others."""
    spec = codec.spec
    write_codec(
        folder,
        family=spec.family,
        architecture=spec.architecture,
        input=spec.input,
        grid=spec.grid,
        layers=layers,
        lineage=spec.lineage,
        tables=replace(codec.tables, median=codec.tables.median + np.linspace(-0.4, 0.3, 24).astype(np.float32)),
        encoder=codec.tensors("encoder"),
        decoder=codec.tensors("decoder"),
        calibration=codec.golden(),
    )
    return load_codec(folder)


def transcoded(made: MadeOfScales, target: Codec) -> tuple[Transcoded, list[bytes]]:
    rows = made.index.read(made.index.version().files, arrow_schema("index.json").names)
    done = transcode(rows, made.store, made.codec, target)
    assert not done.damaged
    payloads = []
    for row in done.rows.to_pylist():
        at = row["payload"]["offset"]
        payloads.append((Path(made.url) / row["payload"]["pack"]).read_bytes()[at : at + row["n_bytes"]])
    return done, payloads


def embeddings(made: MadeOfScales, done: Transcoded) -> list[np.ndarray[tuple[int, ...], np.dtype[np.float64]]]:
    """As they were, in the order of the new rows."""
    median = made.codec.tables.median.astype(np.float64)
    ids = done.rows["tile_id"].to_pylist()
    return [
        np.stack([made.symbols[tile_id][scale] for tile_id in ids]) + m
        for scale, m in enumerate((median[:14], median[14:]))
    ]


def share_lost(old: list[np.ndarray[tuple[int, ...], np.dtype[np.float64]]], error: float) -> float:
    return error / sum(float(((part - part.mean(axis=(0, 1))) ** 2).sum()) for part in old)


def test_other_medians_give_the_embeddings_of_both_scales_rounded_again(tmp_path: Path) -> None:
    made = scaled_archive(tmp_path)
    layers = [LayerSpec(channels=14, tokens=4, scale=2), LayerSpec(channels=10, tokens=16)]
    target = moved_codec(made.codec, tmp_path / "other", layers)
    done, payloads = transcoded(made, target)
    old, median = embeddings(made, done), target.tables.median.astype(np.float64)
    error = 0.0
    for part, found, m in zip(old, target.decompress(payloads), (median[:14], median[14:]), strict=True):
        assert np.abs(part - (found + m)).max() <= 0.5 + 1e-5
        error += float(((part - found - m) ** 2).sum())
    assert done.loss.distortion == pytest.approx(share_lost(old, error), rel=1e-5)
    assert done.rows["pooled"].to_pylist() == target.pool(target.decompress(payloads)).tolist()


@pytest.mark.parametrize("layers", [1, 2])
def test_the_coarse_layers_are_the_first_bytes_and_the_finer_scale_is_lost(tmp_path: Path, layers: int) -> None:
    made = scaled_archive(tmp_path)
    truncate_codec(made.codec, layers, tmp_path / "cut")
    cut = load_codec(tmp_path / "cut")
    done, payloads = transcoded(made, cut)
    ids = done.rows["tile_id"].to_pylist()
    channels = (8, 14)[layers - 1]
    expected = np.stack([made.symbols[tile_id][0] for tile_id in ids])[:, :, :channels]
    assert np.array_equal(cut.decompress(payloads), expected)
    symbols = [np.stack([made.symbols[tile_id][scale] for tile_id in ids]) for scale in (0, 1)]
    assert all(w.startswith(p) for w, p in zip(made.codec.compress(symbols), payloads, strict=True))
    error = float((symbols[0][:, :, channels:].astype(float) ** 2).sum() + (symbols[1].astype(float) ** 2).sum())
    assert done.loss.distortion == pytest.approx(share_lost(embeddings(made, done), error), rel=1e-6)


def test_rows_tell_the_grid_of_the_finest_layers_that_are_left(tmp_path: Path) -> None:
    """The corner of the grid stays where it was: rows and columns of tokens are twice as wide."""
    made = scaled_archive(tmp_path)
    rows = made.index.read(made.index.version().files, arrow_schema("index.json").names)
    columns = {
        "grid": [{"rows": 4, "cols": 4}] * 11 + [None],
        "transform": [[5.0, 1.0, 700.0, 2.0, -5.0, 800.0]] * 10 + [None, [5.0, 1.0, 700.0, 2.0, -5.0, 800.0]],
    }
    for name, values in columns.items():
        at = rows.schema.get_field_index(name)
        rows = rows.set_column(at, rows.schema.field(at), pa.array(values, rows.schema.field(at).type))
    truncate_codec(made.codec, 2, tmp_path / "cut")
    done = transcode(rows, made.store, made.codec, load_codec(tmp_path / "cut"))
    assert done.rows["grid"].to_pylist() == [{"rows": 2, "cols": 2}] * 11 + [None]
    for transform in (t for t in done.rows["transform"].to_pylist() if t):
        for row, col in ((0, 0), (2, 2), (1, 2)):
            a, b, c, d, e, f = transform
            fine = 5.0 * 2 * col + 1.0 * 2 * row + 700.0, 2.0 * 2 * col - 5.0 * 2 * row + 800.0
            assert (a * col + b * row + c, d * col + e * row + f) == fine
    assert done.rows["transform"].null_count == 1


def test_a_codec_of_other_scales_is_refused(tmp_path: Path) -> None:
    made = scaled_archive(tmp_path)
    truncate_codec(made.codec, 2, tmp_path / "cut")
    cut = load_codec(tmp_path / "cut")
    rule = Rule(name="a", codec=str(tmp_path / "cut"))
    _check_transcodable(rule, made.codec.id, made.codec.spec, cut)
    with pytest.raises(
        CodecMismatch,
        match=r"hold 14 channels of 2 x 2 tokens, codec .* needs 14 channels of 2 x 2 tokens and 10 channels of 4 x 4",
    ):
        _check_transcodable(rule, cut.id, cut.spec, made.codec)

"""Transcoding between codecs with transforms, against the same computed by hand with numpy."""

from pathlib import Path

import numpy as np
import pytest

from nec_ray.codec import load_codec, truncate_codec
from nec_ray.errors import CodecMismatch
from nec_ray.runtime.policy import Rule
from nec_ray.runtime.reencode_plan import _check_transcodable
from nec_ray.runtime.transcode import transcode
from tests.archive.make import filled_archive
from tests.codec.make import make_codec, make_transform
from tests.runtime.test_transcode import all_rows, distortion_by_hand, payloads

FINE, COARSE = make_transform(step=0.5), make_transform(step=1.25, seed=1)


def test_other_axes_and_steps_give_the_embeddings_rounded_again(tmp_path: Path) -> None:
    made = filled_archive(tmp_path, transform=FINE)
    make_codec(tmp_path / "coarse", layers=(8, 16), transform=COARSE)
    coarse = load_codec(tmp_path / "coarse")
    done = transcode(all_rows(made), made.store, made.codec, coarse)
    ids = sorted(made.symbols)
    old = np.stack([made.symbols[t] for t in ids]).astype(float) @ FINE.basis + FINE.center
    expected = np.rint((old - COARSE.center) @ np.linalg.pinv(COARSE.basis.astype(float)))
    found = coarse.decompress([payloads(made, done)[t] for t in ids])
    assert np.mean(found != expected) < 1e-3  # of what lies between two integers either is right
    assert np.abs(found - expected).max() <= 1
    new = found.astype(float) @ COARSE.basis + COARSE.center
    assert done.loss.distortion == pytest.approx(distortion_by_hand(old, new), rel=1e-4)


def test_the_first_layers_are_the_first_bytes(tmp_path: Path) -> None:
    made = filled_archive(tmp_path, transform=FINE)
    truncate_codec(made.codec, 1, tmp_path / "cut")
    cut = load_codec(tmp_path / "cut")
    done = transcode(all_rows(made), made.store, made.codec, cut)
    ids = sorted(made.symbols)
    symbols = np.stack([made.symbols[t] for t in ids])
    new = payloads(made, done)
    assert all(old.startswith(new[t]) for t, old in zip(ids, made.codec.compress(symbols), strict=True))
    whole, left = (part.astype(float) @ FINE.basis[: part.shape[2]] for part in (symbols, symbols[:, :, :8]))
    assert done.loss.distortion == pytest.approx(distortion_by_hand(whole, left), rel=1e-4)


def test_channels_go_under_a_few_axes(tmp_path: Path) -> None:
    """From a codec without a transform to the first layer of one with: what no axis holds is lost, and counted once."""
    made = filled_archive(tmp_path)
    square = make_transform(width=24, step=0.5)
    make_codec(tmp_path / "with", layers=(8, 16), transform=square)
    truncate_codec(load_codec(tmp_path / "with"), 1, tmp_path / "cut")
    cut = load_codec(tmp_path / "cut")
    done = transcode(all_rows(made), made.store, made.codec, cut)
    ids = sorted(made.symbols)
    old = np.stack([made.symbols[t] for t in ids]) + made.codec.tables.median.astype(float)
    found = cut.decompress([payloads(made, done)[t] for t in ids])
    new = found.astype(float) @ square.basis[:8] + square.center
    assert done.loss.distortion == pytest.approx(distortion_by_hand(old, new), rel=1e-4)


def test_tiles_of_other_channels_are_not_transcoded(tmp_path: Path) -> None:
    """30 channels of an embedding do not become 24 without one."""
    make_codec(tmp_path / "with", layers=(8, 16), transform=FINE)
    make_codec(tmp_path / "without", layers=(8, 16))
    source, target = load_codec(tmp_path / "with"), load_codec(tmp_path / "without")
    with pytest.raises(CodecMismatch, match="encode them again from pixels"):
        _check_transcodable(Rule(name="all", where="true", codec="x"), source.id, source.spec, target)

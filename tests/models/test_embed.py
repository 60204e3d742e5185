import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from nec_ray.codec import Codec, load_codec
from nec_ray.errors import CorruptCodec
from nec_ray.models.embed import BATCH, Embedder, first_decoder_layer
from nec_ray.models.mae import MaeDecoder
from tests.models.conftest import Trained


@pytest.fixture(scope="module")
def embedder(trained: Trained) -> Embedder:
    return Embedder(trained.codec)


def test_latents_are_the_trained_models(trained: Trained, embedder: Embedder) -> None:
    spec = trained.codec.spec.input
    mean, std = (np.array(v, np.float32)[:, None, None] for v in (spec.mean, spec.std))
    with torch.no_grad():
        expected = trained.model.eval().encoder(torch.from_numpy((trained.pixels[:40] - mean) / std)).numpy()
    found = embedder.latents(trained.pixels[:40])
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, expected, atol=1e-4)


def test_symbols_round_to_nothing_but_the_distance_to_the_median(trained: Trained, embedder: Embedder) -> None:
    symbols = embedder.symbols(trained.pixels[:40])
    assert symbols.dtype == np.int32
    error = np.abs(trained.codec.dequantise(symbols) - embedder.latents(trained.pixels[:40]))
    assert error.max() <= 0.5 + 1e-5


def test_results_do_not_depend_on_threads_or_on_how_many_tiles_follow(trained: Trained, embedder: Embedder) -> None:
    pixels = trained.pixels[: 2 * BATCH + 5]
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(4)
        many = embedder.latents(pixels)
        assert torch.get_num_threads() == 4  # the caller's setting is back
        torch.set_num_threads(1)
        one = embedder.latents(pixels)
    finally:
        torch.set_num_threads(before)
    np.testing.assert_array_equal(many, one)
    np.testing.assert_array_equal(embedder.latents(pixels[:BATCH]), one[:BATCH])
    np.testing.assert_array_equal(embedder.latents(pixels[: BATCH + 1]), one[: BATCH + 1])


def test_no_tile_gives_no_latent(trained: Trained, embedder: Embedder) -> None:
    assert embedder.latents(trained.pixels[:0]).shape == (0, 16, 48)


def test_wild_pixels_do_not_overflow(trained: Trained, embedder: Embedder) -> None:
    pixels = trained.pixels[:2].copy()
    pixels[0] = np.finfo(np.float32).max
    latents = embedder.latents(pixels)
    assert np.isfinite(latents).all()


def test_pixels_of_another_shape_are_refused(trained: Trained, embedder: Embedder) -> None:
    with pytest.raises(ValueError, match="pixels must be"):
        embedder.latents(trained.pixels[:, :2])


def test_first_decoder_layer_is_the_trained_decoders(trained: Trained) -> None:
    layer = first_decoder_layer(trained.codec).eval()
    decoder = trained.model.decoder
    assert isinstance(decoder, MaeDecoder)
    latent = torch.randn(2, 16, 48)
    with torch.no_grad():
        expected = decoder.first.block(decoder.first.decoder_embed(latent) + decoder.first.decoder_pos_embed)
        torch.testing.assert_close(layer(latent), expected)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"depth": 10**9}, "not that of a MAE ViT"),
        ({"surprise": 1}, "not that of a MAE ViT"),
        ({"dim": 32, "heads": 4}, "contradict each other"),
        ({"size": 64, "patch": 16, "bands": 4}, "contradict each other"),
        ({"depth": 3}, "does not fit its architecture"),
    ],
)
def test_a_codec_that_contradicts_itself_is_refused(
    trained: Trained, tmp_path: Path, change: dict[str, int], message: str
) -> None:
    with pytest.raises(CorruptCodec, match=message):
        Embedder(edited(trained.codec, tmp_path / "codec", change))


def edited(codec: Codec, folder: Path, change: dict[str, int]) -> Codec:
    """The codec with another architecture in its codec.json: its id changes, its files do not."""
    folder.mkdir()
    for name, data in codec.files().items():
        (folder / name).write_bytes(data)
    document = json.loads((folder / "codec.json").read_text())
    document["architecture"] |= change
    (folder / "codec.json").write_text(json.dumps(document))
    try:
        return load_codec(folder)
    finally:
        shutil.rmtree(folder)
        folder.mkdir()
        for name, data in codec.files().items():
            (folder / name).write_bytes(data)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_makes_the_symbols_of_a_cpu(trained: Trained, embedder: Embedder) -> None:
    """In float32, without TF32: rounding falls on the other side for at most one symbol in a thousand."""
    torch.backends.cuda.matmul.allow_tf32 = True  # as a training in the same process leaves it
    there = Embedder(trained.codec, "cuda").symbols(trained.pixels)
    assert np.mean(there == embedder.symbols(trained.pixels)) >= 0.999

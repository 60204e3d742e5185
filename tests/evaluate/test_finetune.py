"""Encoder and head trained end to end: the encoder that codecs hold, and what training does to it."""

import numpy as np
import pytest
import torch

from nec_ray.codec import Codec
from nec_ray.errors import InputError
from nec_ray.evaluate.finetune import PixelEncoder, evaluate_pixels, segment_pixels
from nec_ray.models.embed import Embedder
from tests.runtime.make import random_codec


@pytest.fixture(scope="module")
def codec(tmp_path_factory: pytest.TempPathFactory) -> Codec:
    return random_codec(tmp_path_factory.mktemp("finetune") / "codec")


def stripes(tiles: int, seed: int) -> tuple[np.ndarray, np.ndarray]:  # type: ignore[type-arg]
    """Tiles of fine (1) or coarse (0) stripes, which may be turned, shifted and mirrored."""
    rng = np.random.default_rng(seed)
    target = np.arange(tiles) % 2
    wave = np.where(target, 4, 16)[:, None] * 1.0
    line = np.sin(2 * np.pi * (np.arange(32)[None] + rng.uniform(0, 16, (tiles, 1))) / wave)
    pixels = np.broadcast_to(line[:, None, None, :], (tiles, 3, 32, 32)).copy()
    pixels[::3] = pixels[::3].swapaxes(2, 3)
    noise = rng.normal(0, 0.3, pixels.shape)
    return (7700 + 500 * (pixels + noise)).astype(np.float32), target.astype(np.int64)


def test_training_begins_from_the_encoder_that_made_the_embeddings(codec: Codec) -> None:
    pixels, _ = stripes(5, 0)
    encoder = PixelEncoder(codec).eval()
    with torch.no_grad():
        got = encoder(torch.from_numpy(pixels)).numpy()
    np.testing.assert_allclose(got, Embedder(codec).latents(pixels), atol=1e-4)


def test_tiles_are_turned_and_mirrored_only_while_it_is_trained(codec: Codec) -> None:
    pixels, _ = stripes(64, 0)
    seen: list[torch.Tensor] = []
    encoder = PixelEncoder(codec, seed=1)
    encoder.encoder.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    x = torch.from_numpy(pixels)
    for mode in (True, False):
        encoder.train(mode)(x)
    plain = (pixels - 7700) / (7700 / 15)
    np.testing.assert_allclose(seen[1].numpy(), plain, atol=1e-3)
    changed = np.abs(seen[0].numpy() - plain).max(axis=(1, 2, 3)) > 0.1
    assert 0.6 < changed.mean() < 1
    ordered = [np.sort(tiles.reshape(64, -1), axis=1) for tiles in (seen[0].numpy(), plain)]
    np.testing.assert_allclose(ordered[0], ordered[1], atol=1e-3)


def test_masks_are_turned_with_their_tiles(codec: Codec) -> None:
    rng = np.random.default_rng(0)
    masks = rng.integers(0, 6, (32, 32, 32)).astype(np.uint8)
    seen: list[torch.Tensor] = []
    encoder = PixelEncoder(codec, seed=1).train()
    encoder.encoder.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    # Pixels that show their mask: what is turned otherwise differs.
    x = torch.from_numpy(7700 + 7700 / 15 * masks[:, None].repeat(3, axis=1).astype(np.float32))
    for _ in range(2):
        encoder(x)
        turned = encoder.turned_alike(torch.from_numpy(masks))
        np.testing.assert_allclose(seen[-1][:, 0].numpy(), turned.numpy(), atol=1e-3)
    assert not np.array_equal(turned.numpy(), masks)


def test_pixels_are_segmented_by_what_they_show(codec: Codec) -> None:
    rng = np.random.default_rng(0)
    quarters = rng.integers(0, 2, (48, 2, 2)).repeat(16, axis=1).repeat(16, axis=2)
    noise = rng.normal(0, 0.2, (48, 3, 32, 32))
    x = (7700 + 1500 * (quarters[:, None] - 0.5 + noise)).astype(np.float32)
    y = quarters.astype(np.uint8)
    y[:, :2] = 255
    scores, said = segment_pixels(x[:36], y[:36], x[36:], y[36:], codec, classes=2, epochs=30)
    assert said.shape == (12, 32, 32)
    counts = y[36:] != 255
    assert scores.accuracy == pytest.approx((said == y[36:])[counts].mean())
    assert scores.accuracy > 0.85
    with pytest.raises(InputError, match="square"):
        segment_pixels(x, y[:, 2:], x, y[:, 2:], codec, classes=2)


def test_it_learns_classes_by_changing_the_encoder(codec: Codec, monkeypatch: pytest.MonkeyPatch) -> None:
    train, test = stripes(96, 0), stripes(48, 1)
    made: list[PixelEncoder] = []

    class Kept(PixelEncoder):
        def __init__(self, codec: Codec, seed: int) -> None:
            super().__init__(codec, seed)
            made.append(self)

    monkeypatch.setattr("nec_ray.evaluate.finetune.PixelEncoder", Kept)
    before = {name: tensor.clone() for name, tensor in PixelEncoder(codec).state_dict().items()}
    short = [evaluate_pixels(*train, *test, codec, classes=2, epochs=2, seed=4) for _ in range(2)]
    assert short[0] == short[1], "the same seed gives the same scores"
    after = made[0].state_dict()
    moved = {name for name, tensor in before.items() if not torch.equal(tensor, after[name].cpu())}
    assert {"encoder.patch_embed.proj.weight", "encoder.norm.weight"} <= moved
    assert not moved & {"mean", "std", "encoder.pos_embed"}
    largest = max(float((after[name].cpu() - before[name]).abs().max()) for name in moved)
    assert largest < 1.2e-4 * 2 * 3, "Adam moves a weight by about its rate a step, which is a tenth of the head's"
    # So few tiles and steps need a higher rate.
    monkeypatch.setattr("nec_ray.evaluate.finetune._ENCODER_RATE", 3e-3)
    scores = evaluate_pixels(*train, *test, codec, classes=2, epochs=15)
    assert scores.majority == 0.5
    assert scores.accuracy > 0.9

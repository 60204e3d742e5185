import numpy as np
import numpy.typing as npt
import pytest
import torch
from timm.models.vision_transformer import VisionTransformer

from nec_ray.errors import InputError
from nec_ray.models.mae import (
    SIZES,
    MaeConfig,
    MaeDecoder,
    MaeEncoder,
    masked_mse,
    patchify,
    random_keep,
    sincos_positions,
)

CONFIG = MaeConfig(
    size=32, patch=8, bands=3, dim=48, depth=3, heads=4, decoder_dim=32, decoder_depth=2, decoder_heads=4
)


def test_encoder_is_timms_vision_transformer_with_the_same_weights() -> None:
    torch.manual_seed(0)
    encoder = MaeEncoder(CONFIG).eval()
    vit = VisionTransformer(
        img_size=32, patch_size=8, in_chans=3, embed_dim=48, depth=3, num_heads=4, num_classes=0, global_pool=""
    ).eval()
    missing, unexpected = vit.load_state_dict(encoder.state_dict(), strict=False)
    assert not missing
    assert not unexpected
    pixels = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        expected = vit(pixels)[:, 1:]  # without the class token
        torch.testing.assert_close(encoder(pixels), expected, rtol=1e-4, atol=1e-5)


def test_the_named_tokens_alone_reach_the_encoder() -> None:
    """An encoder fed the visible patches sees the same as one fed an image of which the others are garbage."""
    torch.manual_seed(0)
    encoder = MaeEncoder(CONFIG).eval()
    pixels = torch.randn(1, 3, 32, 32)
    keep = torch.tensor([[6, 1, 11]])
    spoilt = torch.full_like(pixels, 1e3)
    for token in keep[0].tolist():
        top, left = 8 * (token // 4), 8 * (token % 4)
        spoilt[:, :, top : top + 8, left : left + 8] = pixels[:, :, top : top + 8, left : left + 8]
    with torch.no_grad():
        latent = encoder(pixels, keep)
        assert latent.shape == (1, 3, 48)
        torch.testing.assert_close(encoder(spoilt, keep), latent)
        # Self-attention has no order: the same tokens named in another order give the same vectors in that order.
        torch.testing.assert_close(encoder(pixels, keep[:, [2, 0, 1]]), latent[:, [2, 0, 1]], rtol=1e-4, atol=1e-5)
        whole = encoder(pixels, torch.arange(16)[None])
        torch.testing.assert_close(whole, encoder(pixels))


def test_decoder_puts_tokens_where_they_came_from() -> None:
    """Against a decoder written as a loop over samples and positions."""
    torch.manual_seed(0)
    decoder = MaeDecoder(CONFIG).eval()
    latent = torch.randn(2, 3, 48)
    keep = torch.tensor([[6, 1, 11], [0, 15, 3]])
    with torch.no_grad():
        rows = []
        for sample in range(2):
            tokens = []
            for position in range(16):
                found = [i for i in range(3) if int(keep[sample, i]) == position]
                value = decoder.first.decoder_embed(latent[sample, found[0]]) if found else decoder.mask_token[0, 0]
                tokens.append(value + decoder.first.decoder_pos_embed[0, position])
            x = decoder.first.block(torch.stack(tokens)[None])
            for block in decoder.blocks:
                x = block(x)
            rows.append(decoder.pred(decoder.norm(x))[0])
        torch.testing.assert_close(decoder(latent, keep), torch.stack(rows), rtol=1e-4, atol=1e-5)


def test_patches_are_row_by_row_with_bands_last() -> None:
    pixels = torch.arange(2 * 3 * 4 * 6, dtype=torch.float32).reshape(2, 3, 4, 6)
    patches = patchify(pixels, 2)
    assert patches.shape == (2, 6, 12)
    for token in range(6):
        top, left = 2 * (token // 3), 2 * (token % 3)
        expected = [float(pixels[1, b, top + y, left + x]) for y in range(2) for x in range(2) for b in range(3)]
        assert patches[1, token].tolist() == expected


def test_loss_is_the_mean_over_masked_patches_only() -> None:
    rng = np.random.default_rng(0)
    predicted, target = rng.normal(size=(2, 5, 4)), rng.normal(size=(2, 5, 4))
    keep = np.array([[0, 3], [4, 1]])
    errors = [
        (predicted[s, t, v] - target[s, t, v]) ** 2
        for s in range(2)
        for t in range(5)
        if t not in keep[s]
        for v in range(4)
    ]
    loss = masked_mse(torch.from_numpy(predicted), torch.from_numpy(target), torch.from_numpy(keep))
    assert float(loss) == pytest.approx(float(np.mean(errors)))


def test_nothing_masked_means_the_loss_is_over_all_patches() -> None:
    predicted, target = torch.zeros(1, 4, 2), torch.full((1, 4, 2), 3.0)
    assert float(masked_mse(predicted, target, torch.tensor([[2, 0, 3, 1]]))) == pytest.approx(9.0)


def test_masks_are_uniform_without_replacement() -> None:
    keep = random_keep(4000, 16, 0.75, torch.Generator().manual_seed(0)).numpy()
    assert keep.shape == (4000, 4)
    assert all(len(set(row)) == 4 for row in keep.tolist())
    counts = np.bincount(keep.ravel(), minlength=16)
    # 16,000 draws over 16 tokens: 1,000 each, standard deviation sqrt(4000 * 1/4 * 3/4) = 27
    assert np.abs(counts - 1000).max() < 5 * 27


def reference_positions(dim: int, side: int) -> npt.NDArray[np.float64]:
    """facebookresearch/mae, util/pos_embed.py, written as loops."""
    out = np.zeros((1 + side * side, dim))
    for row in range(side):
        for col in range(side):
            for part, position in enumerate((col, row)):
                for i in range(dim // 4):
                    angle = position / 10_000 ** (i / (dim / 4))
                    out[1 + row * side + col, part * dim // 2 + i] = np.sin(angle)
                    out[1 + row * side + col, part * dim // 2 + dim // 4 + i] = np.cos(angle)
    return out


def test_positions_are_those_of_the_released_mae() -> None:
    np.testing.assert_allclose(sincos_positions(24, 5)[0].numpy(), reference_positions(24, 5), atol=1e-6)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"size": 30}, "no multiple of the patch"),
        ({"dim": 50}, "multiple of 4 and of its 4 heads"),
        ({"patch": 0}, "patch 0 is out of range"),
        ({"depth": 10**9}, "depth 1000000000 is out of range"),
    ],
)
def test_sizes_that_cannot_be_are_refused(change: dict[str, int], message: str) -> None:
    with pytest.raises(InputError, match=message):
        MaeConfig(**{**CONFIG.to_architecture(), **change})


def test_base_is_the_papers_model() -> None:
    config = MaeConfig(size=224, patch=16, bands=3, **SIZES["base"])
    encoder = MaeEncoder(config)
    # ViT-B/16 without its classifier has 85.8M parameters (Dosovitskiy et al. 2021, table 1: 86M)
    assert sum(p.numel() for name, p in encoder.named_parameters() if name != "pos_embed") == 85_647_360

"""The U-Net decoder against MMEarth-train's, written out here for its five features."""

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from nec_ray.errors import InputError
from nec_ray.models.segmentation import to_size
from nec_ray.models.unet import UNetDecoder

DIMS = (4, 8, 16, 32)
"""Channels of the encoder's four stages."""
CHANNELS = (DIMS[0], *DIMS)


def features(side: int = 16, tiles: int = 2) -> list[Tensor]:
    """Of the first convolution, the stem at half that size, and stages 2 to 4."""
    sides = (side, side // 2, side // 4, side // 8, side // 16)
    return [torch.randn(tiles, width, n, n) for width, n in zip(CHANNELS, sides, strict=True)]


def channels_first_norm(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """`norm_layers.LayerNorm` of MMEarth-train."""
    mean = x.mean(1, keepdim=True)
    spread = (x - mean).pow(2).mean(1, keepdim=True)
    return weight[:, None, None] * ((x - mean) / torch.sqrt(spread + 1e-6)) + bias[:, None, None]


def published(weights: list[Tensor], found: list[Tensor]) -> Tensor:
    """`ConvNeXtV2_unet.decoder` and its head: convolution, norm of each block in the order of use."""
    rest = list(weights)

    def block(x: Tensor, scale: int) -> Tensor:
        kernel, bias, gain, shift = (rest.pop(0) for _ in range(4))
        if scale > 1:
            x = x.repeat_interleave(scale, 2).repeat_interleave(scale, 3)
        return functional.gelu(channels_first_norm(functional.conv2d(x, kernel, bias, padding=1), gain, shift))

    kept = list(found)
    x = kept.pop()
    for _ in range(3):
        x = torch.cat([block(x, 2), kept.pop()], dim=1)
    x = torch.cat([block(x, 2), kept.pop()], dim=1)
    x = block(x, 1)
    return functional.conv2d(x, rest.pop(0), rest.pop(0))


def test_it_is_the_published_decoder() -> None:
    torch.manual_seed(0)
    decoder = UNetDecoder(CHANNELS, 7)
    for parameter in decoder.parameters():  # norms and biases too: their first values hide mistakes
        nn.init.normal_(parameter, std=0.3)
    found = features()
    with torch.no_grad():
        logits = decoder(found)
        expected = published(list(decoder.parameters()), found)
    assert logits.shape == (2, 7, 16, 16)
    assert torch.allclose(logits, expected, atol=1e-5)
    # the blocks of that code: (in, out) of each convolution, for dims d0 to d3
    d0, d1, d2, d3 = DIMS
    blocks = [(d3, d3 // 2), (2 * d2, d2 // 2), (2 * d1, d1 // 2), (2 * d0, d0), (2 * d0, d0 // 2)]
    shapes = [(m.in_channels, m.out_channels) for m in decoder.modules() if isinstance(m, nn.Conv2d)]
    assert sorted(shapes) == sorted([*blocks, (d0 // 2, 7)])


def test_sizes_that_do_not_halve_and_single_scales_are_decoded() -> None:
    odd = [torch.randn(1, 4, 15, 13), torch.randn(1, 6, 7, 7), torch.randn(1, 5, 3, 2)]
    assert UNetDecoder((4, 6, 5), 3)(odd).shape == (1, 3, 15, 13)
    tokens = UNetDecoder([12], 3)([torch.randn(2, 12, 7, 7)])
    assert to_size(tokens, (56, 56)).shape == (2, 3, 56, 56)


def test_every_scale_and_every_weight_counts() -> None:
    torch.manual_seed(0)
    decoder, found = UNetDecoder(CHANNELS, 3), [feature.requires_grad_() for feature in features(32)]
    decoder(found).square().sum().backward()
    for value in (*found, *decoder.parameters()):
        assert value.grad is not None
        assert value.grad.abs().sum() > 0


def test_it_learns_what_only_the_finest_and_only_the_coarsest_scale_know() -> None:
    torch.manual_seed(0)
    found = [torch.randn(4, 16, 16, 16), torch.randn(4, 8, 8, 8), torch.randn(4, 8, 4, 4)]
    fine = found[0][:, 0] > 0
    coarse = functional.interpolate(found[-1][:, :1], size=16)[:, 0] > 0
    target = fine.long() + 2 * coarse.long()
    decoder = UNetDecoder((16, 8, 8), 4)
    optimiser = torch.optim.AdamW(decoder.parameters(), lr=1e-2)
    for _ in range(60):
        loss = functional.cross_entropy(decoder(found), target)
        optimiser.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimiser.step()
    assert (decoder(found).argmax(1) == target).float().mean() > 0.9


def test_other_features_are_refused() -> None:
    with pytest.raises(InputError, match=r"features of \(4, 5\) channels; the decoder is for \(4, 6\)"):
        UNetDecoder((4, 6), 2)([torch.randn(1, 4, 8, 8), torch.randn(1, 5, 4, 4)])
    for channels, classes in (((), 2), ((4, 0), 2), ((4,), 0)):
        with pytest.raises(InputError, match="give 1 or more of each"):
            UNetDecoder(channels, classes)


def test_doublings_end_at_more_pixels() -> None:
    torch.manual_seed(0)
    decoder = UNetDecoder((8, 6), 3, doublings=2)
    assert decoder([torch.randn(1, 8, 5, 4), torch.randn(1, 6, 3, 2)]).shape == (1, 3, 20, 16)
    widths = [(m.in_channels, m.out_channels) for m in decoder.beyond.modules() if isinstance(m, nn.Conv2d)]
    assert widths == [(4, 2), (2, 1)]
    wide = UNetDecoder((2, 6), 3, doublings=1, least=5)
    widths = [(m.in_channels, m.out_channels) for m in wide.modules() if isinstance(m, nn.Conv2d)]
    assert widths == [(6, 5), (5 + 2, 5), (5, 5), (5, 3)]
    assert wide([torch.randn(1, 2, 4, 4), torch.randn(1, 6, 2, 2)]).shape == (1, 3, 8, 8)
    assert UNetDecoder([1], 2, doublings=3)([torch.randn(1, 1, 2, 2)]).shape == (1, 2, 16, 16)

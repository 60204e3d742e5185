"""The U-Net head on embeddings of several grid scales: against plain functional calls, and its files."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional

from nec_ray.errors import CodecMismatch, DataError, InputError
from nec_ray.evaluate.segment import evaluate_segmentation
from nec_ray.models.head_files import load_head, save_head
from nec_ray.models.threads import one_thread
from nec_ray.models.unet import UNetHead
from tests.evaluate.sources import ENCODER

COLOURS = [(0, 0, 0), (255, 0, 0), (0, 0, 255)]
CHANNELS, GRIDS = (6, 4), ((2, 3), (4, 6))
"""Of a coarse and a fine scale."""


def random_head(channels: tuple[int, ...] = CHANNELS, grids: tuple[tuple[int, int], ...] = GRIDS) -> UNetHead:
    """With norms, biases and statistics that are not those of the start, which hide mistakes."""
    torch.manual_seed(0)
    head = UNetHead(channels, 3, grids).eval()
    for parameter in head.parameters():
        nn.init.normal_(parameter, std=0.3)
    head.mean.copy_(torch.randn(sum(channels)))
    head.std.copy_(torch.rand(sum(channels)) + 0.5)
    return head


def tokens(
    tiles: int, channels: tuple[int, ...] = CHANNELS, grids: tuple[tuple[int, int], ...] = GRIDS
) -> tuple[Tensor, ...]:
    return tuple(torch.randn(tiles, r * c, width) for width, (r, c) in zip(channels, grids, strict=True))


def as_map(part: Tensor, mean: Tensor, std: Tensor, grid: tuple[int, int]) -> Tensor:
    """Token `row * columns + column` to its place, one after the other."""
    out = torch.zeros(len(part), part.shape[2], *grid)
    for row in range(grid[0]):
        for col in range(grid[1]):
            out[:, :, row, col] = (part[:, row * grid[1] + col] - mean) / std
    return out


def by_hand(head: UNetHead, coarse: Tensor, fine: Tensor) -> Tensor:
    """Logits of the two scales, with the head's parameters in the order of use."""
    rest = list(head.decoder.parameters())

    def block(x: Tensor) -> Tensor:
        kernel, bias, gain, shift = (rest.pop(0) for _ in range(4))
        y = functional.conv2d(x, kernel, bias, padding=1)
        y = (y - y.mean(1, keepdim=True)) / (y.var(1, keepdim=True, correction=0) + 1e-6).sqrt()
        return functional.gelu(y * gain[:, None, None] + shift[:, None, None])

    def twice(x: Tensor) -> Tensor:
        return x.repeat_interleave(2, 2).repeat_interleave(2, 3)

    split = head.channels[0]
    x = block(twice(as_map(coarse, head.mean[:split], head.std[:split], GRIDS[0])))
    x = block(torch.cat([x, as_map(fine, head.mean[split:], head.std[split:], GRIDS[1])], dim=1))
    x = block(twice(x))
    x = block(twice(x))
    return functional.conv2d(x, rest.pop(0), rest.pop(0))


def test_the_logits_are_those_of_plain_convolutions() -> None:
    head = random_head()
    coarse, fine = tokens(2)
    with torch.no_grad():
        logits = head((coarse, fine))
        torch.testing.assert_close(logits, by_hand(head, coarse, fine), rtol=1e-4, atol=1e-4)
    assert logits.shape == (2, 3, 16, 24)
    assert head.size == (16, 24)


def test_scales_that_come_fine_first_are_decoded_alike() -> None:
    head = random_head()
    coarse, fine = tokens(2)
    other = UNetHead(CHANNELS[::-1], 3, GRIDS[::-1]).eval()
    other.decoder.load_state_dict(head.decoder.state_dict())
    for name in ("mean", "std"):
        kept = getattr(head, name)
        getattr(other, name).copy_(torch.cat([kept[6:], kept[:6]]))
    with torch.no_grad():
        torch.testing.assert_close(other((fine, coarse)), head((coarse, fine)))


def test_a_fine_token_tells_of_its_surroundings_and_a_coarse_one_of_more() -> None:
    """How far a change is seen: the fine scale joins behind the coarse one, and no token goes elsewhere."""
    head = random_head((6, 4), ((8, 8), (16, 16)))
    coarse, fine = tokens(1, (6, 4), ((8, 8), (16, 16)))
    with torch.no_grad():
        before = head((coarse, fine))
        changed = [coarse.clone(), fine.clone()]
        changed[0][0, 8 * 2 + 5] += 5  # covers the fine tokens of rows 4, 5 and columns 10, 11
        changed[1][0, 16 * 4 + 10] += 5
        seen = [(head(pair) - before)[0].abs().amax(0).nonzero() for pair in ((changed[0], fine), (coarse, changed[1]))]
    # 3x3 convolutions: one on the fine grid behind the join, one at twice and one at four times its size; before
    # the join one more, on the coarse tokens that were brought to the fine grid.
    reach = [seen[i].min(0).values.tolist() + seen[i].max(0).values.tolist() for i in (0, 1)]
    first, last = 4 - 1, 4 + 1  # fine rows that see fine row 4
    assert reach[1] == [4 * first - 3, 4 * (first + 6) - 3, 4 * last + 3 + 3, 4 * (last + 6) + 3 + 3]
    first, last = 4 - 2, 5 + 2
    assert reach[0] == [4 * first - 3, 4 * (first + 6) - 3, 4 * last + 3 + 3, 4 * (last + 6) + 3 + 3]


def test_without_the_fine_scale_nothing_is_finer_than_a_coarse_token_s_blur() -> None:
    """Zeros in the fine scale, far from the edges: equal coarse tokens give one value everywhere."""
    head = random_head((6, 4), ((8, 8), (16, 16)))
    coarse = torch.randn(1, 1, 6).expand(1, 64, 6)
    fine = head.mean[6:].expand(1, 256, 4)  # standardised to 0
    with torch.no_grad():
        flat = head((coarse, fine))[0, :, 24:40, 24:40]
        detailed = head((coarse, torch.randn(1, 256, 4)))[0, :, 24:40, 24:40]
    assert (flat - flat[:, :1, :1]).abs().max() < 1e-4
    assert detailed.std(dim=(1, 2)).max() > 1e-2


@settings(deadline=None, max_examples=20)
@given(st.integers(1, 9), st.integers(1, 9), st.lists(st.integers(1, 4), min_size=1, max_size=3, unique=True))
def test_any_grid_and_any_scales(rows: int, cols: int, steps: list[int]) -> None:
    """Also those that do not divide, as codecs may have: a grid of `ceil(rows / step)`."""
    grids = tuple((-(-rows // step), -(-cols // step)) for step in steps)
    channels = tuple(range(1, len(grids) + 1))
    head = UNetHead(channels, 2, grids).eval()
    found = tokens(2, channels, grids)
    finest = max(grids)
    with torch.no_grad():
        assert head(found if len(found) > 1 else found[0]).shape == (2, 2, 4 * finest[0], 4 * finest[1])


def test_each_scale_is_standardised_over_its_own_tokens() -> None:
    head = UNetHead(CHANNELS, 3, GRIDS)
    parts = [3 * part + 7 for part in tokens(50)]
    parts[1][:, :, 0] = 2.0  # says nothing
    head.fit_scale(tuple(parts))
    mean, std = head.mean.numpy(), head.std.numpy()
    for part, rows in zip(parts, (slice(0, 6), slice(6, 10)), strict=True):
        flat = part.double().reshape(-1, part.shape[2]).numpy()
        np.testing.assert_allclose(mean[rows], flat.mean(0), rtol=1e-5)
        floor = 0.05 * np.sqrt(flat.var(0).mean())  # of its own scale's channels
        np.testing.assert_allclose(std[rows], np.maximum(flat.std(0), floor), rtol=1e-5)
    coarse, fine = head.standardised(tuple(parts))
    assert coarse.mean().abs() < 1e-5
    assert fine[:, :, 1:].std(correction=0) == pytest.approx(1, abs=1e-4)


def test_an_encoder_may_stand_before_it() -> None:
    class Encoder(nn.Module):
        def forward(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
            small, large = (functional.adaptive_avg_pool2d(pixels, side) for side in (2, 4))
            return small.flatten(2).transpose(1, 2), large.flatten(2).transpose(1, 2)

    head = UNetHead((3, 3), 2, ((2, 2), (4, 4)), Encoder())
    assert head(torch.randn(2, 3, 16, 16)).shape == (2, 2, 16, 16)


def test_what_does_not_fit_is_refused() -> None:
    for channels, grids in (((), ()), ((3,), ((2, 2), (4, 4)))):
        with pytest.raises(InputError, match="give both of each scale"):
            UNetHead(channels, 2, grids)
    head = random_head()
    coarse, fine = tokens(1)
    for wrong in ((coarse,), (fine, coarse), (coarse, fine[:, :, :3]), (coarse, fine, fine), (coarse[:, :5], fine)):
        with pytest.raises(InputError, match=r"the head reads \[\(6, 6\), \(24, 4\)\]"):
            head(wrong)


def save(folder: Path, head: UNetHead, **changes: Any) -> None:
    finest = max(grid[0] * grid[1] for grid in head.grids)
    how = {"tokens": finest, "channels": sum(head.channels), "encoder_id": ENCODER, "layers": None} | changes
    save_head(folder, head, classes=["a", "b", "c"], colours=COLOURS, decoder_layer="none", **how)  # type: ignore[arg-type]  # read back below


def test_a_head_comes_back_as_it_was_written(tmp_path: Path) -> None:
    head = random_head()
    save(tmp_path, head)
    back = load_head(tmp_path)
    assert isinstance(back.module, UNetHead)
    found = tokens(3)
    with torch.no_grad():
        torch.testing.assert_close(back.module(found), head(found), rtol=0, atol=0)
    document = json.loads((tmp_path / "head.json").read_text())
    assert document["format_version"] == 3
    assert document["scales"] == [{"grid": [2, 3], "channels": 6}, {"grid": [4, 6], "channels": 4}]
    assert (document["task"], document["grid"], document["width"]) == ("segmentation", [4, 6], None)
    back.check_fits("archive", ENCODER, (6, 6), (24, 4))
    for shapes, said in (([(24, 10)], "24 x 10"), ([(6, 6)], "6 x 6"), ([(24, 4), (6, 6)], "24 x 4 and 6 x 6")):
        with pytest.raises(CodecMismatch, match=rf"embeddings of {said} .*, the head reads 6 x 6 and 24 x 4; pull"):
            back.check_fits("archive", ENCODER, *shapes)


@pytest.mark.parametrize(
    "changes",
    [
        {"scales": []},
        {"scales": [{"grid": [4, 6], "channels": 9}]},
        {"scales": [{"grid": [4, 6], "channels": -10}]},
        {"scales": [{"grid": [4], "channels": 10}]},
        {"scales": [{"grid": [10**9, 10**9], "channels": 10}]},
        {"scales": [{"grid": [2, 3], "channels": 10}]},
        {"scales": [{"grid": [1, 1], "channels": 1}] * 10_000},
        {"scales": None},
        {"width": 4},
        {"channels": 11},
        {"features": 11},
        {"decoder_layer": "frozen"},
        {"decoder_layer": "frozen", "padding": 2},
        {"task": "classification"},
    ],
)
def test_a_hostile_head_json_is_refused(tmp_path: Path, changes: dict[str, object]) -> None:
    save(tmp_path, random_head())
    path = tmp_path / "head.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    with pytest.raises(DataError, match="not a head's description"):
        load_head(tmp_path)


def test_sizes_that_the_tensors_do_not_have_cost_nothing(tmp_path: Path) -> None:
    save(tmp_path, random_head())
    path = tmp_path / "head.json"
    large = {"scales": [{"grid": [4, 6], "channels": 16_384}], "channels": 16_384, "features": 16_384}
    path.write_text(json.dumps(json.loads(path.read_text()) | large))
    with pytest.raises(DataError, match="its tensors do not fit"):
        load_head(tmp_path)


def shores(tiles: int, seed: int) -> tuple[tuple[Any, Any], Any]:
    """Embeddings of 2 x 2 coarse and 8 x 8 fine tokens, and masks (8, 8) of three classes.

    A coarse token tells whether its quarter is land (0) or water, the fine ones which places of the water are 1 or 2;
    those of land look the same.
    """
    rng = np.random.default_rng(seed)
    water = rng.integers(0, 2, (tiles, 2, 2))
    deep = rng.integers(0, 2, (tiles, 8, 8))
    mask = water.repeat(4, 1).repeat(4, 2) * (1 + deep)
    signs = [(np.eye(2)[values] * 3).reshape(tiles, -1, 2) for values in (water, deep)]
    coarse, fine = (
        np.concatenate([sign, np.zeros((tiles, sign.shape[1], 4))], axis=2)
        + rng.normal(size=(tiles, sign.shape[1], 6)) * 0.3
        for sign in signs
    )
    return (coarse.astype(np.float32), fine.astype(np.float32)), mask.astype(np.uint8)


def test_it_learns_a_pattern_finer_than_a_coarse_token_and_the_coarse_scale_alone_cannot() -> None:
    (coarse, fine), mask = shores(80, 0)
    (test_coarse, test_fine), truth = shores(32, 1)
    how: dict[str, Any] = {"classes": 3, "epochs": 12, "decoder": "unet"}
    with one_thread():  # these heads are small: threads would wait for each other
        both = evaluate_segmentation(
            (coarse, fine), mask, (test_coarse, test_fine), truth, grid=(8, 8), grids=[(2, 2), (8, 8)], **how
        ).scores
        alone = evaluate_segmentation(coarse, mask, test_coarse, truth, grid=(2, 2), **how).scores
        only_fine = evaluate_segmentation(fine, mask, test_fine, truth, grid=(8, 8), **how).scores
    assert both.accuracy > 0.93
    # The coarse scale knows land, and of water no more than that it is; the fine one takes land for either.
    assert alone.accuracy < 0.8
    confusion = np.array(alone.confusion)
    assert confusion[0, 0] / confusion[0].sum() > 0.9
    assert only_fine.accuracy < 0.9

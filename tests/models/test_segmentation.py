"""The segmentation head's architecture, against counts and computations by hand, and its files."""

import json
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from nec_ray.codec.spec import canonical_json
from nec_ray.errors import CodecMismatch, DataError
from nec_ray.models.head_files import load_head, save_head
from nec_ray.models.heads import ClassificationHead
from nec_ray.models.segmentation import ConvBlock, SegmentationHead, default_width, segmentation_loss, to_size
from tests.evaluate.sources import ENCODER

COLOURS = [(0, 0, 0), (255, 0, 0), (0, 0, 255)]


def parameters_by_hand(channels: int, width: int, classes: int) -> int:
    """Of the paper's decoder: weights and biases of convolutions, scale and shift of normalisations."""

    def conv(a: int, b: int, side: int = 3, bias: bool = True) -> int:
        return a * b * side * side + b * bias

    block = 2 * (conv(width, width, bias=False) + 2 * width)
    upsample = conv(width, 4 * width) + 2 * width
    main = conv(width, 128, bias=False) + 256 + conv(128, 128, bias=False) + 256 + conv(128, classes, 1)
    auxiliary = conv(width, 64, bias=False) + 128 + conv(64, classes, 1)
    return conv(channels, width) + 6 * block + 2 * upsample + main + auxiliary


@pytest.mark.parametrize(("channels", "width"), [(768, 384), (512, 256), (24, 12), (1, 1)])
def test_parameters_are_those_counted_by_hand(channels: int, width: int) -> None:
    assert default_width(channels) == width
    with torch.device("meta"):
        head = SegmentationHead(channels, 6, (14, 14))
    assert sum(p.numel() for p in head.parameters()) == parameters_by_hand(channels, width, 6)


def test_the_papers_sizes_in_numbers() -> None:
    assert parameters_by_hand(768, 384, 6) == 2_654_592 + 15_934_464 + 10_621_440 + 591_110 + 221_702


@settings(deadline=None, max_examples=15)
@given(st.integers(1, 5), st.integers(1, 5), st.integers(1, 9), st.integers(2, 4), st.integers(1, 3))
def test_any_grid_and_any_channels(rows: int, cols: int, channels: int, classes: int, tiles: int) -> None:
    head = SegmentationHead(channels, classes, (rows, cols)).eval()
    x = torch.randn(tiles, rows * cols, channels)
    main, auxiliary = head.score_both(head.features(x))
    assert main.shape == (tiles, classes, 4 * rows, 4 * cols)
    assert auxiliary.shape == (tiles, classes, 4 * rows, 4 * cols)  # both branches are of the upscaled (NEC, section 4)
    torch.testing.assert_close(head(x), main)
    assert to_size(main, (7, 11)).shape == (tiles, classes, 7, 11)


def test_tokens_lie_row_by_row() -> None:
    torch.manual_seed(0)
    head = SegmentationHead(4, 2, (3, 5)).eval()
    plain = torch.zeros(1, 15, 4)
    with torch.no_grad():
        for row, col in ((0, 4), (2, 0)):
            one = plain.clone()
            one[0, row * 5 + col] = 100
            change = (
                head.reduce(one.transpose(1, 2).reshape(1, 4, 3, 5)) - head.reduce(plain.mT.reshape(1, 4, 3, 5))
            ).abs()
            assert change[0].sum(dim=0).argmax() in [row * 5 + col + step for step in (-6, -5, -4, -1, 0, 1, 4, 5, 6)]
            reached = change[0].sum(dim=0).nonzero().tolist()
            assert reached == [[r, c] for r in range(3) for c in range(5) if abs(r - row) <= 1 and abs(c - col) <= 1]


def test_a_block_uses_both_convolutions_and_adds_what_came_in() -> None:
    torch.manual_seed(0)
    block = ConvBlock(6).eval()
    x = torch.randn(2, 6, 4, 4)
    y = nn.functional.gelu(block.norm1(block.conv1(x)))
    torch.testing.assert_close(block(x), x + nn.functional.gelu(block.norm2(block.conv2(y))))
    torch.autograd.backward(block(x).square().sum())
    for conv in (block.conv1, block.conv2):
        assert conv.weight.grad is not None
        assert conv.weight.grad.abs().sum() > 0
        before = block(x)
        kept = conv.weight.detach().clone()
        with torch.no_grad():
            conv.weight.mul_(2)
            assert not torch.allclose(block(x), before)
            conv.weight.copy_(kept)


def test_an_outer_skip_passes_the_blocks() -> None:
    head = SegmentationHead(8, 2, (3, 3)).eval()
    x = torch.randn(2, 9, 8)
    with torch.no_grad():
        for block in head.blocks:
            assert isinstance(block, ConvBlock)
            block.norm2.weight.zero_()  # gelu(0) = 0: the block passes its input on
        reduced = head.reduce(x.transpose(1, 2).reshape(2, 8, 3, 3))
        torch.testing.assert_close(head.auxiliary(head.upsample(2 * reduced)), head.score_both(x)[1])


def test_the_loss_leaves_ignored_pixels_out_and_weighs_the_auxiliary() -> None:
    torch.manual_seed(0)
    main, auxiliary = torch.randn(2, 3, 8, 8), torch.randn(2, 3, 2, 2)
    mask = torch.randint(0, 3, (2, 8, 8))
    mask[:, :2] = 255
    large = nn.functional.interpolate(auxiliary, size=(8, 8), mode="bilinear", align_corners=False)
    counts = mask != 255
    losses = [
        -logits.log_softmax(dim=1).gather(1, mask.clamp(max=2)[:, None])[:, 0][counts].mean()
        for logits in (main, large)
    ]
    torch.testing.assert_close(segmentation_loss(main, auxiliary, mask), losses[0] + 0.4 * losses[1])


def make_head(
    folder: Path, first_layer: nn.Module | None = None, padding: torch.Tensor | None = None
) -> SegmentationHead:
    torch.manual_seed(1)
    head = SegmentationHead(8, 3, (2, 3), first_layer=first_layer, padding=padding)
    head.fit_scale(torch.randn(40, 6, 8) * 3 + 1)
    head(torch.randn(4, 6, 8 if first_layer is None else 5))  # moves the running statistics
    save_head(
        folder,
        head,
        classes=["a", "b", "c"],
        colours=COLOURS,
        encoder_id=ENCODER,
        layers=None if padding is None else 1,
        decoder_layer="none" if first_layer is None else "frozen",
        tokens=6,
        channels=8 if first_layer is None else 5,
    )
    return head.eval()


def test_a_head_comes_back_as_it_was_written(tmp_path: Path) -> None:
    head = make_head(tmp_path)
    back = load_head(tmp_path)
    assert isinstance(back.module, SegmentationHead)
    x = torch.randn(5, 6, 8)
    torch.testing.assert_close(back.module(x), head(x), rtol=0, atol=0)
    assert (back.spec.task, back.spec.grid, back.spec.width, back.spec.colours) == ("segmentation", (2, 3), 4, COLOURS)
    with pytest.raises(CodecMismatch, match="the head reads 6 x 8"):
        back.check_fits("archive", ENCODER, (6, 7))


def test_a_padded_head_comes_back_with_its_padding(tmp_path: Path) -> None:
    padding = torch.tensor([1.0, -2.0, 3.0])
    head = make_head(tmp_path, nn.Linear(8, 8), padding)
    back = load_head(tmp_path, lambda: nn.Linear(8, 8))
    assert back.spec.padding == 3
    x = torch.randn(5, 6, 5)
    torch.testing.assert_close(back.module(x), head(x), rtol=0, atol=0)
    whole = torch.cat([x, padding.expand(5, 6, 3)], dim=2)
    assert head.first_layer is not None
    torch.testing.assert_close(back.module.features(x), head.first_layer(whole), rtol=0, atol=0)


def test_a_head_of_the_first_format_still_loads(tmp_path: Path) -> None:
    head = ClassificationHead(8, 2).eval()
    save_head(
        tmp_path, head, classes=["a", "b"], encoder_id=ENCODER, layers=None, decoder_layer="none", tokens=6, channels=8
    )
    path = tmp_path / "head.json"
    first = (
        "task",
        "encoder_id",
        "layers",
        "decoder_layer",
        "tokens",
        "channels",
        "features",
        "heads",
        "classes",
        "sha256",
    )
    document = json.loads(path.read_bytes())
    path.write_bytes(canonical_json({"format_version": 1} | {name: document[name] for name in first}))
    x = torch.randn(2, 6, 8)
    torch.testing.assert_close(load_head(tmp_path).module(x), head(x), rtol=0, atol=0)


@pytest.mark.parametrize(
    "changes",
    [
        {"grid": [2, 4]},
        {"grid": [-2, -3]},
        {"grid": [2, 3, 1]},
        {"grid": None},
        {"grid": [10**12, 10**12]},
        {"width": 0},
        {"width": 10**9},
        {"heads": 2},
        {"colours": COLOURS[:2]},
        {"colours": [[0, 0, 256], [0, 0, 0], [0, 0, 0]]},
        {"task": "classification"},
        {"task": "regression"},
        {"padding": 10**9},
        {"padding": 3},
        {"classes": ["x"] * 300, "colours": [[0, 0, 0]] * 300},
    ],
)
def test_a_hostile_head_json_is_refused(tmp_path: Path, changes: dict[str, object]) -> None:
    make_head(tmp_path)
    path = tmp_path / "head.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    with pytest.raises(DataError, match="not a head's description"):
        load_head(tmp_path)


@pytest.mark.parametrize(
    "changes", [{"width": 65_536}, {"features": 65_536}, {"classes": ["a", "b"], "colours": COLOURS[:2]}]
)
def test_sizes_that_the_tensors_do_not_have_cost_nothing(tmp_path: Path, changes: dict[str, object]) -> None:
    make_head(tmp_path)
    path = tmp_path / "head.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    with pytest.raises(DataError, match="its tensors do not fit"):
        load_head(tmp_path)


def test_no_pickle_is_read(tmp_path: Path) -> None:
    make_head(tmp_path)
    torch.save({"x": torch.zeros(3)}, tmp_path / "head.safetensors")
    with pytest.raises(DataError, match="not the bytes"):
        load_head(tmp_path)

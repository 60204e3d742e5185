import json
from pathlib import Path

import pytest
import torch
from timm.layers import AttentionPoolLatent
from torch import nn
from torch.utils.data import DataLoader

from nec_ray.errors import CodecMismatch, DataError, InputError, MixedCodecs, NotFound, UnsupportedFormat
from nec_ray.models.dataset import torch_dataset
from nec_ray.models.head_files import load_head, save_head
from nec_ray.models.heads import ClassificationHead, LatentQueryPool, default_heads
from tests.evaluate.sources import ENCODER, MemoryPull, MemorySource, grid_rows, separable


def make_head(folder: Path, channels: int = 24, first_layer: nn.Module | None = None) -> ClassificationHead:
    torch.manual_seed(1)
    width = channels if first_layer is None else 16
    head = ClassificationHead(width, 3, first_layer=first_layer).eval()
    head.fit_scale(torch.randn(40, 9, width) * 3 + 1)
    save_head(
        folder,
        head,
        classes=["a", "b", "c"],
        encoder_id=ENCODER,
        layers=None,
        decoder_layer="none" if first_layer is None else "trained",
        tokens=9,
        channels=channels,
    )
    return head


def edit(folder: Path, **changes: object) -> None:
    path = folder / "head.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize(("channels", "heads"), [(128, 2), (24, 1), (192, 3)])
def test_pooling_equals_timms(channels: int, heads: int) -> None:
    torch.manual_seed(0)
    ours, theirs = LatentQueryPool(channels, num_heads=heads), AttentionPoolLatent(channels, num_heads=heads)
    with torch.no_grad():
        for parameter in ours.parameters():
            parameter.normal_(0, 0.2)
    theirs.load_state_dict(ours.state_dict())
    x = torch.randn(7, 49, channels)
    torch.testing.assert_close(ours(x), theirs(x), rtol=1e-4, atol=1e-4)
    for pool in (ours, theirs):
        torch.autograd.backward(pool(x).square().mean())
    grads = {name: p.grad for name, p in theirs.named_parameters()}
    for name, parameter in ours.named_parameters():
        torch.testing.assert_close(parameter.grad, grads[name], rtol=1e-3, atol=1e-4, msg=name)


def test_default_heads_divide_and_follow_the_paper() -> None:
    assert [default_heads(c) for c in (768, 512, 128, 192, 100, 24)] == [12, 16, 2, 3, 1, 1]
    assert all(c % default_heads(c) == 0 for c in range(1, 600))


def test_scale_is_that_of_the_tokens_and_keeps_dead_channels_small() -> None:
    x = torch.randn(50, 8, 6) * torch.tensor([1.0, 2, 3, 4, 5, 0]) + 7
    head = ClassificationHead(6, 2)
    head.fit_scale(x)
    y = (x - head.mean) / head.std
    torch.testing.assert_close(y.mean(dim=(0, 1)), torch.zeros(6), atol=1e-4, rtol=0)
    torch.testing.assert_close(y.std(dim=(0, 1))[:5], torch.ones(5), atol=0.01, rtol=0)
    assert y[..., 5].abs().max() < 1e-4


def test_a_head_comes_back_as_it_was_written(tmp_path: Path) -> None:
    head = make_head(tmp_path)
    back = load_head(tmp_path)
    x = torch.randn(5, 9, 24)
    torch.testing.assert_close(back.module(x), head(x), rtol=0, atol=0)
    assert back.spec.classes == ["a", "b", "c"]
    assert (back.spec.tokens, back.spec.channels, back.spec.decoder_layer) == (9, 24, "none")
    assert not any(p.is_meta for p in back.module.state_dict().values())


def test_a_head_with_its_decoder_layer_comes_back(tmp_path: Path) -> None:
    head = make_head(tmp_path, first_layer=nn.Linear(24, 16))
    template = nn.Linear(24, 16)
    x = torch.randn(5, 9, 24)
    torch.testing.assert_close(load_head(tmp_path, lambda: template).module(x), head(x), rtol=0, atol=0)
    with pytest.raises(InputError, match="reads the first decoder layer"):
        load_head(tmp_path)
    with pytest.raises(CodecMismatch, match="decoder layer of another shape"):
        load_head(tmp_path, lambda: nn.Linear(24, 17))


def test_a_head_refuses_other_embeddings(tmp_path: Path) -> None:
    make_head(tmp_path)
    head = load_head(tmp_path)
    head.check_fits("archive", ENCODER, (9, 24))
    with pytest.raises(
        CodecMismatch, match="embeddings of encoder cdcdcdcdcdcd, the head was trained for encoder ababab"
    ):
        head.check_fits("archive", "cd" * 32, (9, 24))
    with pytest.raises(CodecMismatch, match=r"embeddings of 9 x 12 \(tokens x channels\), the head reads 9 x 24"):
        head.check_fits("archive", ENCODER, (9, 12))


def test_damage_anywhere_in_the_tensors_is_found(tmp_path: Path) -> None:
    make_head(tmp_path)
    path = tmp_path / "head.safetensors"
    whole = path.read_bytes()
    for at in (0, 9, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
        with pytest.raises(DataError, match=r"not the bytes that head\.json names"):
            load_head(tmp_path)
    path.unlink()
    with pytest.raises(NotFound, match=r"head\.safetensors"):
        load_head(tmp_path)


@pytest.mark.parametrize(
    "changes",
    [
        {"classes": ["only one"]},
        {"heads": 5},
        {"encoder_id": "../../etc"},
        {"decoder_layer": "perhaps"},
        {"channels": 10**9},
        {"format_version": "1"},
        {"extra": 1},
    ],
)
def test_a_head_json_that_cannot_be_is_refused(tmp_path: Path, changes: dict[str, object]) -> None:
    make_head(tmp_path)
    edit(tmp_path, **changes)
    with pytest.raises(DataError, match="not a head's description"):
        load_head(tmp_path)


def test_tensors_that_do_not_fit_the_json_are_refused(tmp_path: Path) -> None:
    make_head(tmp_path)
    edit(tmp_path, classes=["a", "b", "c", "d"])
    with pytest.raises(DataError, match="its tensors do not fit"):
        load_head(tmp_path)


def test_later_formats_are_refused_by_name(tmp_path: Path) -> None:
    make_head(tmp_path)
    edit(tmp_path, format_version=4, news="whatever")
    with pytest.raises(UnsupportedFormat, match="head format 4, this release reads up to 3"):
        load_head(tmp_path)


def test_torch_dataset_pulls_every_tile_once_in_chunks() -> None:
    rows = grid_rows(5, 7)
    x, _ = separable(rows, 2)
    source = MemorySource(rows, x)
    dataset = torch_dataset(source, batch_size=8)
    assert len(dataset) == 35
    got = dict(dataset)
    assert source.pulls == [8, 8, 8, 8, 3]
    assert list(got) == rows["tile_id"].to_pylist()
    torch.testing.assert_close(torch.stack(list(got.values())), torch.from_numpy(x), rtol=0, atol=0)
    batches = list(DataLoader(torch_dataset(source, "tile_id < 'tile-02'", batch_size=5), batch_size=4))
    assert [len(ids) for ids, _ in batches] == [4, 4, 4, 2]
    assert batches[0][1].shape == (4, 16, 24)


def test_loader_workers_share_the_tiles() -> None:
    rows = grid_rows(5, 7)
    source = MemorySource(rows, separable(rows, 2)[0])
    loader = DataLoader(torch_dataset(source, batch_size=4), batch_size=None, num_workers=2)
    assert sorted(name for name, _ in loader) == rows["tile_id"].to_pylist()


class TwoEncoders(MemorySource):
    """An archive whose second pull has embeddings of another encoder."""

    def pull(self, *args: object, **kwargs: object) -> MemoryPull:
        pull = super().pull(*args, **kwargs)  # type: ignore[arg-type]  # passed on as they are
        pull.encoder_id = ENCODER if len(self.pulls) < 2 else "cd" * 32
        return pull


def test_a_data_set_of_two_encoders_is_refused() -> None:
    rows = grid_rows(2, 3)
    with pytest.raises(MixedCodecs, match="several encoders"):
        list(torch_dataset(TwoEncoders(rows, separable(rows, 2)[0]), batch_size=3))


def test_a_data_set_without_tiles_is_refused() -> None:
    rows = grid_rows(2, 3)
    source = MemorySource(rows, separable(rows, 2)[0])
    with pytest.raises(InputError, match="no valid tile fits tile_id = 'x'"):
        torch_dataset(source, "tile_id = 'x'")
    with pytest.raises(InputError, match="batch_size 0"):
        torch_dataset(source, batch_size=0)

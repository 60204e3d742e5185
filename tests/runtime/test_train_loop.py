"""The training loop's parts, without Ray."""

import io
import os
import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from nec_ray.runtime.train_loop import _augment, _groups, _keep_metrics, _learning_rate
from tests.models.conftest import CONFIG

ROOT = Path(__file__).parents[2]


def test_learning_rate_rises_to_its_peak_and_falls_to_zero() -> None:
    rates = [_learning_rate(1e-3, step / 1000, 0.1) for step in range(1000)]
    assert rates[0] == 0
    assert np.argmax(rates) == 100
    assert max(rates) == pytest.approx(1e-3)
    assert rates[50] == pytest.approx(0.5e-3)
    assert rates[550] == pytest.approx(0.5e-3)  # half way down the cosine
    assert rates[-1] < 1e-8
    assert _learning_rate(1e-3, 0.0, 0.0) == pytest.approx(1e-3)


def test_augmentation_is_one_of_eight_symmetries_the_same_for_all_bands() -> None:
    pixels = torch.arange(400 * 2 * 9, dtype=torch.float32).reshape(400, 2, 3, 3)
    seen = set()
    for before, after in zip(pixels, _augment(pixels, torch.Generator().manual_seed(0)), strict=True):
        image = before.numpy()
        symmetries = [np.rot90(side, turn, (1, 2)) for side in (image, image[:, :, ::-1]) for turn in range(4)]
        match = [i for i, turned in enumerate(symmetries) if np.array_equal(turned, after.numpy())]
        assert len(match) == 1
        seen.add(match[0])
    assert seen == set(range(8))


def test_every_trained_parameter_is_in_one_group_and_only_matrices_decay() -> None:
    from nec_ray.models.nec import NeuralEmbeddingCompressor, set_trainable

    model = NeuralEmbeddingCompressor(CONFIG)
    set_trainable(model, "paper")
    names = {id(p): name for name, p in model.named_parameters()}
    groups = _groups(model, 0.05)
    members = [names[id(p)] for group in groups for p in group["params"]]
    assert sorted(members) == sorted(name for name, p in model.named_parameters() if p.requires_grad)
    decayed = {names[id(p)] for group in groups if group["weight_decay"] for p in group["params"]}
    assert "encoder.patch_embed.proj.weight" in decayed
    assert not [
        name for name in decayed if name.startswith("bottleneck") or "token" in name or "bias" in name or "norm" in name
    ]


def test_metrics_are_cut_back_to_the_checkpoint(tmp_path: Path) -> None:
    path = tmp_path / "metrics.csv"
    path.write_text("epoch,phase,mse,bits,lr,samples_s\n1,pretrain,1,0,0,9\n2,pretrain,1,0,0,9\n3,adapt,1,2,0,9\n4,ada")
    _keep_metrics(path, 2)
    assert path.read_text().splitlines() == [
        "epoch,phase,mse,bits,lr,samples_s",
        "1,pretrain,1,0,0,9",
        "2,pretrain,1,0,0,9",
    ]


def test_checkpoints_of_this_shape_load_without_the_pickle_machine() -> None:
    """What the loop saves loads with weights_only, and weights_only refuses a checkpoint that would run code."""
    from nec_ray.models.nec import NeuralEmbeddingCompressor

    model = NeuralEmbeddingCompressor(CONFIG)
    optimiser = torch.optim.AdamW(_groups(model, 0.05), lr=1e-3)
    model(torch.randn(2, 3, 32, 32), mask_ratio=0.5, beta=0.1).loss.backward()
    optimiser.step()
    file = io.BytesIO()
    torch.save({"model": model.state_dict(), "optimiser": optimiser.state_dict(), "epoch": 3}, file)
    file.seek(0)
    state = torch.load(file, weights_only=True)
    model.load_state_dict(state["model"])
    optimiser.load_state_dict(state["optimiser"])
    assert state["epoch"] == 3

    class Runs:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return os.system, ("exit 3",)

    hostile = io.BytesIO()
    torch.save({"model": Runs()}, hostile)
    hostile.seek(0)
    with pytest.raises(pickle.UnpicklingError):
        torch.load(hostile, weights_only=True)


_TWO_PROCESSES = """
import sys, torch, torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from nec_ray.models.nec import NeuralEmbeddingCompressor, set_trainable
from tests.models.conftest import CONFIG
rank, out = int(sys.argv[1]), sys.argv[2]
dist.init_process_group("gloo", init_method="file://" + out + "/meet", rank=rank, world_size=2)
torch.manual_seed(rank)  # the ranks begin with different weights: DDP must hand out those of rank 0
model = NeuralEmbeddingCompressor(CONFIG)
set_trainable(model, "all")
model.bottleneck.requires_grad_(False)
wrapped = DistributedDataParallel(model)
pixels = torch.load(out + "/pixels.pt", weights_only=True)
wrapped(pixels[rank * 4 : rank * 4 + 4], mask_ratio=0.0, beta=None).loss.backward()
if rank == 0:
    torch.save({n: p.grad for n, p in model.named_parameters() if p.grad is not None}, out + "/grads.pt")
dist.barrier()
dist.destroy_process_group()
"""


@pytest.mark.slow
def test_two_workers_of_k_tiles_have_the_gradient_of_one_of_2k(tmp_path: Path) -> None:
    from nec_ray.models.nec import NeuralEmbeddingCompressor, set_trainable

    pixels = torch.randn(8, 3, 32, 32, generator=torch.Generator().manual_seed(5))
    torch.save(pixels, tmp_path / "pixels.pt")
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-W", "ignore", "-c", _TWO_PROCESSES]
    workers = [subprocess.Popen([*command, str(rank), str(tmp_path)], env=environment) for rank in range(2)]
    assert [worker.wait(timeout=120) for worker in workers] == [0, 0]
    torch.manual_seed(0)
    model = NeuralEmbeddingCompressor(CONFIG)
    set_trainable(model, "all")
    model.bottleneck.requires_grad_(False)
    model(pixels, mask_ratio=0.0, beta=None).loss.backward()
    shared = torch.load(tmp_path / "grads.pt", weights_only=True)
    alone = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert shared.keys() == alone.keys()
    for name, gradient in alone.items():
        torch.testing.assert_close(shared[name], gradient, rtol=1e-3, atol=1e-6, msg=name)

"""A training step's parts; gradients of two real processes."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from timm.models.vision_transformer import Attention

from nec_ray.models.nec import NeuralEmbeddingCompressor, set_trainable
from nec_ray.models.optimise import choose_attention, gradients, learning_rate, parameter_groups
from tests.models.conftest import CONFIG

ROOT = Path(__file__).parents[2]


def test_learning_rate_rises_to_its_peak_and_falls_to_zero() -> None:
    rates = [learning_rate(1e-3, step / 1000, 0.1) for step in range(1000)]
    assert rates[0] == 0
    assert np.argmax(rates) == 100
    assert max(rates) == pytest.approx(1e-3)
    assert rates[50] == pytest.approx(0.5e-3)
    assert rates[550] == pytest.approx(0.5e-3)  # half way down the cosine
    assert rates[-1] < 1e-8
    assert learning_rate(1e-3, 0.0, 0.0) == pytest.approx(1e-3)


def test_every_trained_parameter_is_in_one_group_and_only_matrices_decay() -> None:
    model = NeuralEmbeddingCompressor.mae(CONFIG)
    set_trainable(model, "paper")
    names = {id(p): name for name, p in model.named_parameters()}
    groups = parameter_groups(model, 0.05)
    members = [names[id(p)] for group in groups for p in group["params"]]
    assert sorted(members) == sorted(name for name, p in model.named_parameters() if p.requires_grad)
    decayed = {names[id(p)] for group in groups if group["weight_decay"] for p in group["params"]}
    assert "encoder.patch_embed.proj.weight" in decayed
    assert not [
        name for name in decayed if name.startswith("bottleneck") or "token" in name or "bias" in name or "norm" in name
    ]


_TWO_PROCESSES = """
import sys, torch, torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from nec_ray.models.nec import NeuralEmbeddingCompressor, set_trainable
from nec_ray.models.optimise import gradients
from tests.models.conftest import CONFIG
from tests.models.test_optimise import random_of_the_whole_batch
rank, out = int(sys.argv[1]), sys.argv[2]
dist.init_process_group("gloo", init_method="file://" + out + "/meet", rank=rank, world_size=2)
torch.manual_seed(rank)  # the ranks begin with different weights: DDP must hand out those of rank 0
model = NeuralEmbeddingCompressor.mae(CONFIG)
set_trainable(model, "paper")
wrapped = DistributedDataParallel(model)
pixels = torch.load(out + "/pixels.pt", weights_only=True)
torch.rand = random_of_the_whole_batch(8 * rank, 4)
found = gradients(wrapped, pixels[rank * 8 : rank * 8 + 8], mask_ratio=0.75, beta=0.1, generator=None, accumulate=2)
if rank == 0:
    torch.save({n: p.grad for n, p in model.named_parameters() if p.grad is not None}, out + "/grads.pt")
torch.save(found, out + f"/losses{rank}.pt")
dist.barrier()
dist.destroy_process_group()
"""


def random_of_the_whole_batch(first: int, part: int) -> Callable[..., torch.Tensor]:
    """A `torch.rand` for masks and then noise of 16 tiles, of which each pair of calls asks for the next `part`."""
    draw = torch.rand
    calls: list[list[int]] = []

    def rand(*shape: object, **_: object) -> torch.Tensor:
        size = [int(n) for n in (shape[0] if isinstance(shape[0], torch.Size) else shape)]  # type: ignore[call-overload]
        at = first + len(calls) // 2 * part
        calls.append(size)
        whole = draw(16, *size[1:], generator=torch.Generator().manual_seed(len(size)))
        return whole[at : at + size[0]]

    return rand


@pytest.mark.slow
def test_two_workers_of_8_tiles_in_two_parts_have_the_gradients_of_one_of_16(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The paper's set, masked, with noise and rate: 2 x (4 + 4) tiles beside 16 at once."""
    pixels = torch.randn(16, 3, 32, 32, generator=torch.Generator().manual_seed(5))
    torch.save(pixels, tmp_path / "pixels.pt")
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-W", "ignore", "-c", _TWO_PROCESSES]
    workers = [subprocess.Popen([*command, str(rank), str(tmp_path)], env=environment) for rank in range(2)]
    assert [worker.wait(timeout=600) for worker in workers] == [0, 0]
    torch.manual_seed(0)
    model = NeuralEmbeddingCompressor.mae(CONFIG)
    set_trainable(model, "paper")
    monkeypatch.setattr(torch, "rand", random_of_the_whole_batch(0, 16))
    losses = gradients(model, pixels, mask_ratio=0.75, beta=0.1, generator=None)
    shared = torch.load(tmp_path / "grads.pt", weights_only=True)
    alone = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert shared.keys() == alone.keys() == {name for name, p in model.named_parameters() if p.requires_grad}
    for name, gradient in alone.items():
        assert float(gradient.abs().max()) > 0, name
        torch.testing.assert_close(shared[name], gradient, rtol=1e-3, atol=1e-6, msg=name)
    halves = torch.stack([torch.load(tmp_path / f"losses{rank}.pt", weights_only=True) for rank in range(2)])
    torch.testing.assert_close(halves.mean(0), losses, rtol=1e-5, atol=0)


def test_bfloat16_keeps_the_gradients_direction_and_the_weights_type() -> None:
    """Autocast rounds activations to 8 bits of mantissa; weights, gradients and the entropy model stay float32."""
    pixels = torch.randn(8, 3, 32, 32, generator=torch.Generator().manual_seed(5))
    found = []
    for precision in ("float32", "bfloat16"):
        torch.manual_seed(0)
        model = NeuralEmbeddingCompressor.mae(CONFIG)
        set_trainable(model, "all")
        generator = torch.Generator().manual_seed(1)
        losses = gradients(model, pixels, mask_ratio=0.75, beta=0.1, generator=generator, precision=precision)
        grads = [p.grad for p in model.parameters() if p.grad is not None]
        assert {grad.dtype for grad in grads} == {torch.float32}
        found.append((losses, torch.cat([grad.flatten() for grad in grads])))
    (exact, one), (rounded, two) = found
    assert not torch.equal(exact, rounded)
    torch.testing.assert_close(rounded, exact, rtol=2e-2, atol=0)
    assert float(torch.nn.functional.cosine_similarity(one, two, dim=0)) > 0.99


def test_attention_written_out_has_the_fused_ones_gradients_and_is_for_cpus_and_few_tokens() -> None:
    pixels = torch.randn(8, 3, 32, 32, generator=torch.Generator().manual_seed(5))
    found = []
    for tokens in (257, 256):
        torch.manual_seed(0)
        model = NeuralEmbeddingCompressor.mae(CONFIG)
        set_trainable(model, "all")
        choose_attention(model, tokens, torch.device("cpu"))
        assert {module.fused_attn for module in model.modules() if isinstance(module, Attention)} == {tokens > 256}
        gradients(model, pixels, mask_ratio=0.75, beta=0.1, generator=torch.Generator().manual_seed(1))
        found.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]))
    torch.testing.assert_close(found[1], found[0], rtol=1e-4, atol=1e-6)
    choose_attention(model, 16, torch.device("cuda"))
    assert all(module.fused_attn for module in model.modules() if isinstance(module, Attention))

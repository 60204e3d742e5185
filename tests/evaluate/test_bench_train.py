"""The training benchmark: both compute the same, and the figures are what they say."""

import json
import subprocess
import sys

import pytest
import torch

from nec_ray.errors import InputError
from nec_ray.evaluate import bench_train
from nec_ray.models.mae import SIZES, MaeConfig, MaeEncoder


def test_the_command() -> None:
    program = [sys.executable, "-W", "ignore", "-c", "from nec_ray.cli import main; main()", "bench", "train"]
    asked = ["--size", "micro", "--pixels", "64", "--batch", "2", "--device", "cpu", "--json"]
    done = subprocess.run([*program, *asked], capture_output=True, text=True, check=False, timeout=600)
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert report["machine"]["matmul_tflops"] > 0.001
    assert [(row["what"], row["impl"]) for row in report["rows"]] == [
        (what, impl) for what in ("encode", "step") for impl in ("nec", "timm")
    ]
    for row in report["rows"]:
        assert list(row) == ["model", "device", "what", "impl", "samples_s", "mfu"]
        assert row["model"] == "ViT-micro/16 64 px"
        assert row["samples_s"] > 0
        assert 0 < row["mfu"] < 1.5


def test_flops_are_those_of_the_formula() -> None:
    """Of ViT-Ti/16 at 64 px, 16 tokens and the class token: 2 FLOPs a multiplication and addition."""
    encoder = MaeEncoder(MaeConfig(size=64, patch=16, bands=3, **SIZES["tiny"])).eval()
    pixels = torch.randn(2, 3, 64, 64)
    tokens, dim, depth = 17, 192, 12
    block = 2 * tokens * 12 * dim * dim + 2 * 2 * tokens * tokens * dim  # qkv, proj, mlp; scores and their sum
    expected = 2 * 16 * (3 * 16 * 16) * dim + depth * block
    with torch.inference_mode():
        found = bench_train._flops(lambda: encoder(pixels)) / 2
    assert found == pytest.approx(expected, rel=0.03)


def test_both_sides_are_of_one_size() -> None:
    """The encoders have the same weights but for timm's class of normalisation, so that their speeds compare."""
    cases = list(bench_train._cases("micro", 32, 1, "cpu"))
    out = {case.impl: case.work() for case in cases if case.what == "encode"}
    assert out["nec"].shape == (1, 4, 128)  # type: ignore[attr-defined]
    assert out["timm"].shape == (1, 5, 128)  # type: ignore[attr-defined]


def test_what_cannot_be_measured_is_refused() -> None:
    with pytest.raises(InputError, match="huge: no size; there are micro, "):
        bench_train.bench_train("huge")
    with pytest.raises(InputError, match="tpu: no such device here"):
        bench_train.bench_train("micro", device="tpu")

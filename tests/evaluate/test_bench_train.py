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


def test_the_masked_encoder_is_measured_beside_timms(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_train, "_SECONDS", 0.0)  # one call each
    report = bench_train.bench_train("atto", 16, family="mp_mae", patch=8, batch=1, device="cpu", rounds=1)
    rows = report["rows"]
    impls = ["nec", "nec no skip", "nec dense", "timm"]
    assert [(row["what"], row["impl"]) for row in rows] == [(what, i) for what in ("encode", "step") for i in impls]
    assert {row["model"] for row in rows} == {"ConvNeXtV2-atto/8 16 px"}
    assert all(row["samples_s"] > 0 and 0 < row["mfu"] < 1.5 for row in rows)


def test_timms_convnext_is_of_the_same_size_and_what_is_skipped_is_not_counted() -> None:
    """All stages of both compute the same; a mask of 2 x 2 patches leaves 1, a quarter of the pointwise work."""
    cases = {case.impl: case for case in bench_train._convnext_cases("atto", 16, 8, 1, "cpu") if case.what == "encode"}
    shapes = {impl: case.work().shape for impl, case in cases.items()}  # type: ignore[attr-defined]
    assert set(shapes.values()) == {(1, 320, 2, 2)}
    flops = {impl: bench_train._flops(case.work) for impl, case in cases.items()}
    places, dims, depths = (256, 64, 16, 4), (40, 80, 160, 320), (2, 2, 6, 2)
    stem = 2 * 256 * (9 * 12 - 12) * 40 + 2 * 256 * 40  # theirs is one 1 x 1 convolution
    assert flops["nec dense"] == flops["nec no skip"] == pytest.approx(flops["timm"] + stem, rel=1e-6)
    pointwise = sum(2 * 8 * n * dim**2 * depth for n, dim, depth in zip(places, dims, depths, strict=True))
    assert flops["nec no skip"] - flops["nec"] == 3 / 4 * pointwise


@pytest.mark.parametrize(
    ("wanted", "message"),
    [
        ({"family": "resnet"}, "resnet: no family; there are mae_vit, mp_mae"),
        ({"family": "mp_mae", "size": "base"}, "base: no size; there are atto"),
        ({"family": "mp_mae", "size": "atto", "patch": 4}, "patch 4: mp_mae is measured with 8, 16, 32"),
    ],
)
def test_what_is_no_model_is_refused(wanted: dict[str, object], message: str) -> None:
    with pytest.raises(InputError, match=message):
        bench_train.bench_train(**{"size": "micro", **wanted})  # type: ignore[arg-type]

"""The codec's benchmark: every coder brings the symbols back, and the figures are what they say."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from nec_ray.codec import paths
from nec_ray.errors import RunError
from nec_ray.evaluate import bench_codec
from tests.runtime.make import random_codec

KEYS = [
    "latent",
    "coder",
    "threads",
    "encode_msym_s",
    "decode_msym_s",
    "bits_per_symbol",
    "model_bits_per_symbol",
]


@pytest.fixture(scope="module")
def codec_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bench") / "codec"
    random_codec(folder)
    return folder


def test_the_command_on_a_codec(codec_folder: Path) -> None:
    program = [sys.executable, "-c", "from nec_ray.cli import main; main()", "bench", "codec"]
    done = subprocess.run(
        [*program, "--codec", str(codec_folder), "--json"], capture_output=True, text=True, check=False, timeout=600
    )
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert report["machine"]["cores"] >= 1
    assert report["machine"]["first_call_s"] > 0
    assert [list(row) for row in report["rows"]] == [KEYS] * len(report["rows"])
    portable = {"nec scalar"} if paths.chosen() != paths.SCALAR else set()
    assert {row["coder"] for row in report["rows"]} == {"nec", "compressai", "constriction"} | portable
    for row in report["rows"]:
        assert row["encode_msym_s"] > 0
        assert row["decode_msym_s"] > 0
        assert row["bits_per_symbol"] >= 0.98 * row["model_bits_per_symbol"]


@pytest.mark.parametrize(("name", "rate"), bench_codec.RATES.items())
def test_latents_have_the_rates_they_are_named_for(name: str, rate: float) -> None:
    latent = bench_codec._drawn(name, rate)
    assert latent.symbols.shape[1:] == (196, 768)
    some = latent.symbols[:4]
    assert latent.model_bits(latent.symbols) == pytest.approx(rate, rel=0.2)
    assert bench_codec._nec(latent, some, 1)[2] <= latent.model_bits(some) * some.size / 8 * 1.005 + 4 * 16


def test_symbols_outside_the_model_do_not_end_the_benchmark() -> None:
    latent = bench_codec._drawn("sparse", 0.02)
    symbols = latent.symbols[:2].copy()
    symbols[0, 3, 0], symbols[1, 5, 767] = 30_000, -3  # a live channel and a dead one
    for measure in (bench_codec._nec, bench_codec._compressai, bench_codec._constriction):
        assert measure(latent, symbols, 1)[2] > 0


def test_a_logistic_density_is_integrated_exactly() -> None:
    pmf, first = bench_codec.logistic_pmf(0.3)
    steps = np.arange(first, first + len(pmf))
    exact = 1 / (1 + np.exp(-(steps + 0.5) / 0.3)) - 1 / (1 + np.exp(-(steps - 0.5) / 0.3))
    np.testing.assert_allclose(pmf, exact, atol=1e-9)


def test_a_coder_that_fails_is_not_measured() -> None:
    latent = bench_codec._drawn("sparse", 0.02)
    with pytest.raises(RunError, match="did not bring back"):
        bench_codec._check("nec", latent, latent.symbols + 1, latent.symbols)

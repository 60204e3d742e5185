"""Codecs for tests: Laplacian channels of several widths, with the tables that fit them."""

from pathlib import Path

import numpy as np
import numpy.typing as npt

from nec_ray.codec import EntropyTables, InputSpec, LayerSpec, Lineage, write_codec


def laplacian_pmf(scale: float, radius: int) -> npt.NDArray[np.float64]:
    """P(k) for k in [-radius, radius] of a Laplacian integrated over unit bins."""
    edges = np.arange(-radius, radius + 2) - 0.5
    tail = 0.5 * np.exp(-np.abs(edges) / scale)
    cdf = np.where(edges < 0, tail, 1 - tail)
    return np.diff(cdf)


def laplacian_tables(scales: npt.NDArray[np.float64], radius: int = 60) -> EntropyTables:
    pmfs = [laplacian_pmf(scale, radius) for scale in scales]
    dead = scales < 0.06
    offset = np.full(len(scales), -radius)
    return EntropyTables.from_pmf(pmfs, offset, np.linspace(-1, 1, len(scales)), dead, tokens=16)


def laplacian_symbols(
    rng: np.random.Generator, scales: npt.NDArray[np.float64], tiles: int, tokens: int
) -> npt.NDArray[np.int32]:
    return np.rint(rng.laplace(0, scales, (tiles, tokens, len(scales)))).astype(np.int32)


SCALES = np.geomspace(0.03, 4, 24)


def make_codec(
    folder: Path,
    *,
    grid: tuple[int, int] = (4, 4),
    layers: tuple[int, ...] = (24,),
    size: int = 32,
    seed: int = 0,
) -> str:
    """A codec directory over `SCALES` whose encoder and decoder are random arrays."""
    rng = np.random.default_rng(seed)
    return write_codec(
        folder,
        family="mae_vit",
        architecture={"dim": 24, "patch": size // grid[0]},
        input=InputSpec(bands=["red", "green", "blue"], mean=[1.0, 2.0, 3.0], std=[1.0, 1.0, 1.0], size=size),
        grid=grid,
        layers=[LayerSpec(channels=n, tokens=grid[0] * grid[1]) for n in layers],
        lineage=Lineage(data="synthetic", licence="none", beta=0.1, bits_per_symbol=1.0),
        tables=laplacian_tables(SCALES),
        encoder={"weight": rng.standard_normal((3, 24)).astype(np.float32)},
        decoder={"weight": rng.standard_normal((24, 8)).astype(np.float32)},
        calibration=laplacian_symbols(rng, SCALES, 40, grid[0] * grid[1]),
    )

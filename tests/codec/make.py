"""Codecs for tests: Laplacian channels of several widths, with the tables that fit them."""

from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest

from nec_ray.codec import EntropyTables, InputSpec, LayerSpec, Lineage, PayloadCoder, Transform, paths, write_codec

EACH_VECTOR_PATH = [
    pytest.param(name, marks=pytest.mark.skipif(not kernels.available(), reason=f"this processor has no {name}"))
    for name, kernels in paths.VECTOR.items()
]
EACH_PATH = [*EACH_VECTOR_PATH, paths.SCALAR]
VECTOR_PATHS = max(1, len(paths.available()) - 1)
"""How many there are here: they share the examples."""


def coder_on(path: str, tables: EntropyTables, layers: list[LayerSpec]) -> PayloadCoder:
    """A coder that takes one path, whatever NEC_CODEC_PATH says."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("NEC_CODEC_PATH", path)
        return PayloadCoder(tables, layers)


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


def random_cdf(rng: np.random.Generator, precision: int, least: int = 1, most: int = 256) -> npt.NDArray[np.int64]:
    """A cumulative table of `least` to `most` entries that ends at 2**precision."""
    entries = int(rng.choice([least, least + 1, rng.integers(least, most + 1), most]))
    inner = rng.choice(np.arange(1, 1 << precision), entries - 1, replace=False)
    return np.concatenate([[0], np.sort(inner), [1 << precision]])


def random_tables(rng: np.random.Generator, channels: int, precision: int, most: int = 256) -> EntropyTables:
    """Any tables that the rules allow: dense, sparse and dead channels, narrow and wide entries, no density behind."""
    cdf, shift, run_cdf, start, run_start, offset = [], [], [], [0], [0], []
    kinds = rng.integers(0, 4, channels)
    for kind in kinds:
        table = random_cdf(rng, 16 if kind == 1 else precision, most=most) if kind else np.zeros(0, np.int64)
        runs = random_cdf(rng, 16, 2) if kind == 1 else np.zeros(0, np.int64)
        raw = rng.integers(0, 17, len(table)) * (rng.random() < 0.3)
        raw[-1:] = 0
        reach = int(np.sum(1 << raw[:-1])) if len(table) else 1
        offset.append(-int(rng.integers(0, reach)) if kind == 1 else int(rng.integers(-500, 500)))
        cdf.append(table)
        shift.append(raw)
        run_cdf.append(runs)
        start.append(start[-1] + len(table))
        run_start.append(run_start[-1] + len(runs))
    return EntropyTables(
        precision=precision,
        cdf=np.concatenate(cdf).astype(np.uint32),
        start=np.array(start, np.int64),
        offset=np.array(offset, np.int32),
        shift=np.concatenate(shift).astype(np.uint8),
        run_cdf=np.concatenate(run_cdf).astype(np.uint32),
        run_start=np.array(run_start, np.int64),
        median=np.zeros(channels, np.float32),
    )


def symbols_of(rng: np.random.Generator, tables: EntropyTables, tiles: int, tokens: int) -> npt.NDArray[np.int32]:
    """Symbols that have an entry, whatever its frequency; half of a sparse channel's are 0."""
    firsts = tables.first_symbols().astype(np.int64)
    out = np.zeros((tiles, tokens, tables.channels), np.int32)
    for c in np.flatnonzero(~tables.dead):
        mine = firsts[tables.start[c] : tables.start[c + 1]]
        entry = rng.integers(0, len(mine) - 1, (tiles, tokens))
        out[:, :, c] = mine[entry] + rng.integers(0, mine[entry + 1] - mine[entry])
        if tables.sparse[c]:
            out[:, :, c] *= rng.random((tiles, tokens)) < 0.5
    return out


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
    scales: tuple[int, ...] | None = None,
    size: int = 32,
    seed: int = 0,
    transform: Transform | None = None,
) -> str:
    """A codec directory over `SCALES` whose encoder and decoder are random arrays; `scales` are those of the layers."""
    rng = np.random.default_rng(seed)
    tokens = [-(-grid[0] // scale) * -(-grid[1] // scale) for scale in scales or [1] * len(layers)]
    return write_codec(
        folder,
        family="mae_vit",
        architecture={"dim": 24, "patch": size // grid[0]},
        input=InputSpec(bands=["red", "green", "blue"], mean=[1.0, 2.0, 3.0], std=[1.0, 1.0, 1.0], size=size),
        grid=grid,
        layers=[
            LayerSpec(channels=n, tokens=t, scale=scale)
            for n, t, scale in zip(layers, tokens, scales or [1] * len(layers), strict=True)
        ],
        lineage=Lineage(data="synthetic", licence="none", beta=0.1, bits_per_symbol=1.0),
        tables=laplacian_tables(SCALES),
        encoder={"weight": rng.standard_normal((3, 24)).astype(np.float32)},
        decoder={"weight": rng.standard_normal((24, 8)).astype(np.float32)},
        calibration=laplacian_symbols(rng, SCALES, 40, grid[0] * grid[1])
        if not scales
        else scaled_symbols(rng, layers, scales, tokens, 40),
        transform=transform,
    )


def make_transform(width: int = 30, step: float = 0.5, seed: int = 0) -> Transform:
    """Random axes of embeddings of `width` channels for the channels of `SCALES`."""
    rng = np.random.default_rng(seed)
    axes = np.linalg.qr(rng.standard_normal((width, len(SCALES))))[0].T
    return Transform((step * axes).astype(np.float32), rng.standard_normal(width).astype(np.float32))


def scaled_symbols(
    rng: np.random.Generator, layers: tuple[int, ...], scales: tuple[int, ...], tokens: list[int], tiles: int
) -> tuple[npt.NDArray[np.int32], ...]:
    """Symbols of layers of several grid scales, an array a scale in the order in which the scales appear."""
    ends = np.cumsum(layers)
    made = [
        laplacian_symbols(rng, SCALES[end - n : end], tiles, t) for n, end, t in zip(layers, ends, tokens, strict=True)
    ]
    order = list(dict.fromkeys(scales))
    return tuple(np.concatenate([m for m, s in zip(made, scales, strict=True) if s == one], axis=2) for one in order)

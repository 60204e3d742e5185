"""`nec bench codec`: this codec, CompressAI's and constriction's on the same symbols under the same model."""

import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt

from nec_ray.codec import Codec, EntropyTables, LayerSpec, PayloadCoder, paths
from nec_ray.errors import InputError, MissingDependency, RunError
from nec_ray.evaluate.bench import best_seconds, cores, machine

TOKENS, CHANNELS = 196, 768
RATES = {"sparse": 0.02, "medium": 0.3, "dense": 1.5}
"""Bits per symbol of the three latents."""
_TILES = 32
_OTHERS_TILES = 4
"""Tiles for the coders that are some hundred times slower."""
_WIDTHS = [0, -0.414, -0.514, -0.56, -0.6, -0.635, -0.656, -0.676, -0.696, -0.717, -0.732, -0.748, -0.773, -0.791]
_WIDTHS += [-0.823, -0.878, -0.95]
"""log10 of the channels' widths, from the widest to the narrowest: fitted to the codec that data/aid_recipe.toml
trains (logistic densities of its channels' entropies, at 17 even quantiles)."""
_DEAD = 1e-4
_TAIL = 1e-9

Symbols = npt.NDArray[np.int32]
Say = Callable[[str], None]


@dataclass(frozen=True)
class Latent:
    """Symbols and the model that they are coded by."""

    name: str
    pmfs: list[npt.NDArray[np.float64]]
    """For each channel P(symbol = offset + i)."""
    offset: npt.NDArray[np.int64]
    tables: EntropyTables
    symbols: Symbols
    """(tiles, tokens, channels)."""

    def model_bits(self, symbols: Symbols) -> float:
        """Bits per symbol that the model itself gives some symbols."""
        total = 0.0
        for c, pmf in enumerate(self.pmfs):
            index = np.clip(symbols[:, :, c] - self.offset[c], 0, len(pmf) - 1)
            total -= float(np.log2(np.maximum(pmf[index], _TAIL)).sum())
        return total / symbols.size


def bench_codec(codec: Codec | None = None, say: Say = lambda _: None) -> dict[str, Any]:
    """Measure all coders on all latents, one after the other on one core, and this codec on all cores.

    Args:
        codec: measure on its tables and its golden symbols instead of the three latents.
        say: told what is being measured.

    Returns:
        `{"machine": {...}, "rows": [...]}`; the rows' keys are DESIGN.md's.

    Raises:
        RunError: a coder did not bring the symbols back.
    """
    latents = [_of_codec(codec)] if codec is not None else [_drawn(name, rate) for name, rate in RATES.items()]
    rows = []
    for latent in latents:
        for coder, threads, measure in _coders():
            say(f"{latent.name}: {coder}, {threads} thread{'s' if threads > 1 else ''}")
            try:
                rows.append(_row(latent, coder, threads, measure))
            except MissingDependency as error:
                say(f"left out: {error}")
    return {"machine": machine() | {"first_call_s": _first_call()}, "rows": rows}


_FIRST_CALL = """
import time
import numpy as np
from nec_ray.codec import EntropyTables, LayerSpec, PayloadCoder
tables = EntropyTables.from_pmf([np.full(4, 0.25)], np.zeros(1, int), np.zeros(1), np.zeros(1, bool))
coder = PayloadCoder(tables, [LayerSpec(channels=1, tokens=4)])
started = time.perf_counter()
coder.decompress(coder.compress(np.zeros((33, 4, 1), np.int32)))
print(time.perf_counter() - started)
"""


def _first_call() -> float:
    """Seconds of a new process's first compression and decompression, the kernels coming from numba's cache."""
    done = subprocess.run([sys.executable, "-c", _FIRST_CALL], capture_output=True, text=True, check=True)
    return round(float(done.stdout), 3)


def logistic_pmf(scale: float) -> tuple[npt.NDArray[np.float64], int]:
    """(P(k) of a logistic density integrated over unit bins, its first k), as far as it is over 1e-9."""
    radius = int(np.ceil(scale * np.log(1 / _TAIL))) + 1
    edges = np.arange(-radius, radius + 2) - 0.5
    lower = 1 / (1 + np.exp(np.minimum(np.abs(edges) / scale, 700)))  # of the nearer tail: exact on both sides
    pmf = np.where(edges[1:] <= 0, lower[1:] - lower[:-1], lower[:-1] - lower[1:])
    pmf[radius] = 1 - 2 * lower[radius]
    return pmf / pmf.sum(), -radius


def _drawn(name: str, rate: float) -> Latent:
    """A latent of logistic channels: a CompressAI factorized model without hidden layers."""
    falling = 10 ** np.interp(np.linspace(0, 1, CHANNELS), np.linspace(0, 1, len(_WIDTHS)), _WIDTHS)
    low, high = 1e-4, 100.0
    for _ in range(60):
        middle = np.sqrt(low * high)
        bits = np.mean([_entropy(logistic_pmf(width)[0]) for width in (middle * falling)[3::6]])
        low, high = (middle, high) if bits < rate else (low, middle)
    rng = np.random.default_rng(0)
    made = [logistic_pmf(width) for width in low * falling]
    pmfs = [pmf for pmf, _ in made]
    offset = np.array([first for _, first in made], np.int64)
    dead = np.array([pmf[-first] >= 1 - _DEAD for pmf, first in made])
    symbols = np.zeros((_TILES, TOKENS, CHANNELS), np.int32)
    for c, pmf in enumerate(pmfs):
        cumulative = np.cumsum(pmf)
        drawn = np.searchsorted(cumulative, rng.random((_TILES, TOKENS)) * cumulative[-1], side="right")
        symbols[:, :, c] = drawn + offset[c]
    tables = EntropyTables.from_pmf(pmfs, offset, np.zeros(CHANNELS), dead, TOKENS)
    return Latent(name, pmfs, offset, tables, symbols)


def _of_codec(codec: Codec) -> Latent:
    """A real codec's golden symbols, and its tables as the model."""
    if len(codec.scales()) > 1:
        raise InputError(f"codec {codec.id[:12]} has several grid scales; the bench codes one array of symbols")
    golden = codec.golden()
    tables = codec.tables
    pmfs, offset = [], tables.offset.astype(np.int64)
    for c in range(tables.channels):
        if tables.dead[c]:
            pmfs.append(np.ones(1))
            continue
        frequency = np.diff(tables.cdf[tables.start[c] : tables.start[c + 1]].astype(np.float64))
        width = 1 << tables.shift[tables.start[c] : tables.start[c + 1] - 1].astype(np.int64)
        pmf = np.repeat(frequency / frequency.sum() / width, width)
        if tables.sparse[c]:
            other = tables.run_cdf[tables.run_start[c] + 1] / 2**16  # the chance of a run of no zeros
            pmf[-offset[c]] = 0
            pmf *= other / max(pmf.sum(), _TAIL)
            pmf[-offset[c]] = 1 - other
        pmfs.append(pmf)
    repeats = max(1, _TILES * TOKENS * CHANNELS // golden.size)
    return Latent(f"codec {codec.id[:12]}", pmfs, offset, tables, np.tile(golden, (repeats, 1, 1)))


def _entropy(pmf: npt.NDArray[np.float64]) -> float:
    p = pmf[pmf > 0]
    return float(-np.sum(p * np.log2(p)))


Coded = tuple[float, float, int]
"""Seconds to encode, seconds to decode, bytes."""
Measure = Callable[[Latent, Symbols, int], Coded]


def _coders() -> Iterator[tuple[str, int, Measure]]:
    yield "nec", 1, _nec
    if paths.chosen() != paths.SCALAR:
        yield "nec scalar", 1, partial(_nec, scalar=True)
    yield "compressai", 1, _compressai
    yield "constriction", 1, _constriction
    if cores() > 1:
        yield "nec", cores(), _nec


def _row(latent: Latent, coder: str, threads: int, measure: Measure) -> dict[str, Any]:
    symbols = latent.symbols if coder.startswith("nec") else latent.symbols[:_OTHERS_TILES]
    encode, decode, size = measure(latent, symbols, threads)
    return {
        "latent": latent.name,
        "coder": coder,
        "threads": threads,
        "encode_msym_s": round(symbols.size / encode / 1e6, 2),
        "decode_msym_s": round(symbols.size / decode / 1e6, 2),
        "bits_per_symbol": round(8 * size / symbols.size, 5),
        "model_bits_per_symbol": round(latent.model_bits(symbols), 5),
    }


def _check(coder: str, latent: Latent, back: npt.NDArray[Any], symbols: Symbols) -> None:
    if not np.array_equal(back, symbols):
        raise RunError(f"{coder} did not bring back the symbols of {latent.name}; its figures mean nothing")


def _nec(latent: Latent, symbols: Symbols, threads: int, *, scalar: bool = False) -> Coded:
    layers = [LayerSpec(channels=symbols.shape[2], tokens=symbols.shape[1])]
    coder = PayloadCoder(latent.tables, layers, scalar=scalar)
    encode, payloads = best_seconds(lambda: coder.compress(symbols, threads=threads))
    decode, [back] = best_seconds(lambda: coder.decompress(payloads, threads=threads))
    _check("nec", latent, back, symbols)
    return encode, decode, int(payloads.length.sum())


def _compressai(latent: Latent, symbols: Symbols, _: int) -> Coded:
    """`EntropyBottleneck.compress` and `decompress`, its tables made from the model's probabilities by CompressAI."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of torch, about what compressai calls
            import torch
            from compressai._CXX import pmf_to_quantized_cdf
            from compressai.entropy_models import EntropyBottleneck
    except ImportError:
        raise MissingDependency("CompressAI is not installed; pip install 'nec-ray[train]'") from None
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    model = EntropyBottleneck(len(latent.pmfs))
    longest = max(map(len, latent.pmfs))
    cdf = np.zeros((len(latent.pmfs), longest + 2), np.int32)
    for c, pmf in enumerate(latent.pmfs):
        quantized = pmf_to_quantized_cdf([*pmf.tolist(), max(1 - float(pmf.sum()), _TAIL)], 16)
        cdf[c, : len(quantized)] = quantized
    model._quantized_cdf = torch.from_numpy(cdf)
    model._cdf_length = torch.tensor([len(pmf) + 2 for pmf in latent.pmfs], dtype=torch.int32)
    model._offset = torch.from_numpy(latent.offset.astype(np.int32))
    model.quantiles.data.zero_()
    values = torch.from_numpy(symbols.astype(np.float32)).transpose(1, 2)[..., None].contiguous()
    try:
        encode, strings = best_seconds(lambda: model.compress(values))
        decode, back = best_seconds(lambda: model.decompress(strings, values.shape[2:]))
    finally:
        torch.set_num_threads(before)
    _check("compressai", latent, back[..., 0].transpose(1, 2).numpy(), symbols)
    return encode, decode, sum(map(len, strings))


def _constriction(latent: Latent, symbols: Symbols, _: int) -> Coded:
    """`AnsCoder` with one table a channel, whole channels a call; channels that are always 0 are skipped."""
    try:
        import constriction
    except ImportError:
        raise MissingDependency("constriction is not installed; pip install constriction") from None
    live = [c for c, pmf in enumerate(latent.pmfs) if len(pmf) > 1 and symbols[:, :, c].any()]
    tables = [
        constriction.stream.model.Categorical(np.maximum(latent.pmfs[c], _TAIL).astype(np.float32), perfect=False)
        for c in live
    ]
    # Symbols outside the model are no part of constriction's work: they are put in afterwards, at 6 bytes each.
    top = np.array([len(latent.pmfs[c]) - 1 for c in live])
    inside = np.zeros_like(symbols)
    inside[:, :, live] = np.clip(symbols[:, :, live] - latent.offset[live], 0, top) + latent.offset[live]
    outside = inside != symbols
    moved = np.ascontiguousarray((inside[:, :, live] - latent.offset[live]).astype(np.int32).transpose(0, 2, 1))

    def encode_all() -> list[npt.NDArray[np.uint32]]:
        words = []
        for tile in moved:
            coder = constriction.stream.stack.AnsCoder()
            for k in range(len(live) - 1, -1, -1):
                coder.encode_reverse(tile[k], tables[k])
            words.append(coder.get_compressed())
        return words

    def decode_all() -> Symbols:
        back = np.zeros(symbols.shape, np.int32)
        for i, words in enumerate(encoded):
            coder = constriction.stream.stack.AnsCoder(words)
            for k, c in enumerate(live):
                back[i, :, c] = coder.decode(tables[k], symbols.shape[1]) + latent.offset[c]
        return back

    encode, encoded = best_seconds(encode_all)
    decode, back = best_seconds(decode_all)
    back[outside] = symbols[outside]
    _check("constriction", latent, back, symbols)
    return encode, decode, sum(4 * len(words) for words in encoded) + 6 * int(outside.sum())

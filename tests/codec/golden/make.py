"""Wrote the golden payloads of format 1, once. Run it again only for a new format version, into new files.

python tests/codec/golden/make.py
"""

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from nec_ray.codec import EntropyTables, LayerSpec, PayloadCoder
from tests.codec.make import SCALES, laplacian_pmf, laplacian_symbols, laplacian_tables

Symbols = npt.NDArray[np.int32]


def case(tables: EntropyTables, layers: list[LayerSpec], symbols: list[Symbols]) -> dict[str, Any]:
    payloads = PayloadCoder(tables, layers).compress(symbols)
    return {
        "layers": [layer.model_dump() for layer in layers],
        "tables": {
            name: {"dtype": str(array.dtype), "data": array.tolist()} for name, array in tables.to_tensors().items()
        },
        "shapes": [list(part.shape) for part in symbols],
        "symbols_sha256": [hashlib.sha256(part.astype("<i4").tobytes()).hexdigest() for part in symbols],
        "payloads": [payload.hex() for payload in payloads],
    }


def all_kinds() -> dict[str, Any]:
    """Dense, sparse and dead channels, escapes, two layers."""
    symbols = laplacian_symbols(np.random.default_rng(11), SCALES, 3, 12)
    symbols[1, 3, 0], symbols[2, 0, 13], symbols[2, 11, 23] = -5, 2**31 - 1, -(2**31)
    layers = [LayerSpec(channels=10, tokens=12), LayerSpec(channels=14, tokens=12)]
    return case(laplacian_tables(SCALES), layers, [symbols])


def wide_and_many_lanes() -> dict[str, Any]:
    """Raw bits, four lanes, a tile smaller than declared."""
    pmf = laplacian_pmf(900.0, 9000)
    tables = EntropyTables.from_pmf([pmf] * 12, np.full(12, -9000), np.zeros(12), np.zeros(12, bool), 500)
    symbols = np.rint(np.random.default_rng(12).laplace(0, 900, (1, 450, 12))).astype(np.int32)
    return case(tables, [LayerSpec(channels=12, tokens=500)], [symbols])


def two_scales() -> dict[str, Any]:
    """A fine layer of sparse channels and a coarse one."""
    rng = np.random.default_rng(13)
    layers = [LayerSpec(channels=8, tokens=16), LayerSpec(channels=16, tokens=4, scale=2)]
    parts = [laplacian_symbols(rng, SCALES[:8], 2, 16), laplacian_symbols(rng, SCALES[8:], 2, 4)]
    return case(laplacian_tables(SCALES), layers, parts)


def eight_lanes_and_sixteen() -> dict[str, Any]:
    """Layers large enough for that many, at 12 bits; the second one's sparse channels fill its states."""
    scales = np.concatenate([np.full(40, 8.0), np.full(80, 8.0), np.full(4, 0.1)])
    layers = [LayerSpec(channels=40, tokens=700), LayerSpec(channels=84, tokens=700)]
    return case(laplacian_tables(scales), layers, [laplacian_symbols(np.random.default_rng(14), scales, 1, 700)])


def fine_precision() -> dict[str, Any]:
    """Many rare symbols: more than 12 bits, and some that only an escape codes."""
    pmf = np.array([0.9, *[0.1 / 250] * 250])
    tables = EntropyTables.from_pmf([pmf] * 4, np.full(4, -30), np.zeros(4), np.zeros(4, bool), 9)
    assert tables.precision > 12
    symbols = np.random.default_rng(15).integers(-31, 222, (2, 9, 4)).astype(np.int32)
    return case(tables, [LayerSpec(channels=4, tokens=9)], [symbols])


def many_tiles() -> dict[str, Any]:
    """Thirteen at once, of which some are coded four together."""
    symbols = laplacian_symbols(np.random.default_rng(16), SCALES, 13, 5)
    return case(laplacian_tables(SCALES), [LayerSpec(channels=24, tokens=5)], [symbols])


def no_tokens() -> dict[str, Any]:
    return case(laplacian_tables(SCALES), [LayerSpec(channels=24, tokens=5)], [np.zeros((2, 0, 24), np.int32)])


def main() -> None:
    kinds = (all_kinds, wide_and_many_lanes, two_scales, eight_lanes_and_sixteen, fine_precision, many_tiles, no_tokens)
    for make in kinds:
        path = Path(__file__).with_name(f"v1_{make.__name__}.json")
        if not path.exists():
            path.write_text(json.dumps(make(), separators=(",", ":")) + "\n")


if __name__ == "__main__":
    main()

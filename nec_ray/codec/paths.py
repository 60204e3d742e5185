"""Which kernels code the dense channels: by what the processor has, and what NEC_CODEC_PATH says."""

import os
from types import ModuleType

from nec_ray.codec import vector, vector512

VECTOR: dict[str, ModuleType] = {"avx512": vector512, "avx2": vector}
"""The vector paths, the faster one first; both have `available`, `prepare`, `encode_dense` and `decode_dense`."""
SCALAR = "scalar"
"""rans.py alone."""


def available() -> list[str]:
    """The paths that this processor can take, the fastest first."""
    return [*(name for name, kernels in VECTOR.items() if kernels.available()), SCALAR]


def chosen() -> str:
    """The path that is taken: the fastest one there is, or the one that NEC_CODEC_PATH names.

    "vector" there is the faster vector path that there is.

    Raises:
        ValueError: NEC_CODEC_PATH names no path, or one that this processor cannot take.
    """
    wanted = os.environ.get("NEC_CODEC_PATH", "")
    if wanted not in {"", "vector", SCALAR, *VECTOR}:
        raise ValueError(f'NEC_CODEC_PATH must be "scalar", "vector", "avx2" or "avx512", not "{wanted}"')
    here = available()
    if wanted == SCALAR or wanted in here:
        return wanted
    if wanted == "vector" and here == [SCALAR]:
        raise ValueError("NEC_CODEC_PATH is vector, but this processor has no AVX2, or numba may not use it")
    if wanted in VECTOR:
        raise ValueError(f"NEC_CODEC_PATH is {wanted}, but this processor does not have it, or numba may not use it")
    return here[0]

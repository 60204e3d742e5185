"""Which kernels code the dense channels: by what the processor has, and what NEC_CODEC_PATH says."""

import os
from types import ModuleType

from nec_ray.codec import vector, vector512

VECTOR: dict[str, ModuleType] = {"avx2": vector, "avx512": vector512}
"""The vector paths, the one to be preferred first; both have `available`, `prepare`, `encode_dense` and `decode_dense`.

AVX-512 stands last, so that it is taken where NEC_CODEC_PATH asks for it: it has not been shown to be faster yet, see
docs/codec-speed.md."""
SCALAR = "scalar"
"""rans.py alone."""


def available() -> list[str]:
    """The paths that this processor can take, the one to be preferred first."""
    return [*(name for name, kernels in VECTOR.items() if kernels.available()), SCALAR]


def chosen() -> str:
    """The path that is taken: the first one that is `available`, or the one that NEC_CODEC_PATH names.

    "vector" there is the first vector path.

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

"""One code path of the numeric libraries on every x86-64 CPU with AVX2.

Libraries choose their kernels by the CPU that they find, and two kernels round differently. Call ``fix`` before torch
and numpy are imported: afterwards the switches have no effect.
"""

from __future__ import annotations

import os
import platform

FIXED = {
    "ATEN_CPU_CAPABILITY": "avx2",  # torch's own vectorised loops
    "MKL_CBWR": "COMPATIBLE",  # one code path on Intel and AMD (AVX2 would have no effect on AMD)
    "ONEDNN_MAX_CPU_ISA": "AVX2",
    "OPENBLAS_CORETYPE": "Haswell",  # of numpy and scipy
    "NPY_DISABLE_CPU_FEATURES": "X86_V4 AVX512_ICL AVX512_SPR",
}
"""Environment variable -> the value that fixes the code path of a library."""
if platform.machine().lower() in ("x86_64", "amd64"):
    FIXED |= {
        "NUMBA_CPU_NAME": "x86-64-v3",
        "NUMBA_CPU_FEATURES": "-fma",
    }  # AVX2; a product is rounded, then a sum
ONE_THREAD = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
"""Sums of several threads depend on their number: models use ``family.threads`` threads of torch's own."""


def fix() -> None:
    """Fix the kernels of this process and of those that it starts; what the user exported stays as it is."""
    for variable, value in {**FIXED, **ONE_THREAD}.items():
        os.environ.setdefault(variable, value)


def overridden() -> dict[str, str]:
    """Return the switches that stand at another value, with it: numbers may then depend on the CPU."""
    found = {}
    for variable, value in FIXED.items():
        given = os.environ.get(variable, "")
        if given != value:
            found[variable] = given
    return found

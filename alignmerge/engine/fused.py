"""Sums of several models in one pass over each, compiled: what ``merger.total`` and ``average`` say in torch's words.

Every operation is a single IEEE one in the same order as there, so both give the same bits on every CPU: no fast
math, no product fused with a sum. ``kernels.fix`` names the instructions that are compiled for; numba keeps the code
beside this file (or in its own cache), under a key that holds that name, so that no other CPU runs it.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numba import njit

CHUNK = 1024
"""How many float64 sums are at hand at a time: 8 KiB, in the innermost cache."""


@njit(nogil=True, cache=True, error_model="numpy")
def mean_into(out: Any, values: Sequence[Any]) -> None:
    """Write the mean of flat fp32 arrays, summed and divided in float64, into a flat fp32 one."""
    memory = np.empty(CHUNK)
    for start in range(0, out.size, CHUNK):
        merged = out[start : start + CHUNK]
        sums = memory[: merged.size]
        sums[:] = values[0][start : start + CHUNK]
        for k in range(1, len(values)):
            value = values[k][start : start + CHUNK]
            for i in range(sums.size):
                sums[i] += value[i]
        for i in range(sums.size):
            merged[i] = sums[i] / len(values)


@njit(nogil=True, cache=True, error_model="numpy")
def step_into(out: Any, base: Any, values: Sequence[Any], scale: float) -> None:
    """Write base + scale * sum_k (values_k - base): differences in fp32, the rest in float64, rounded once."""
    memory = np.empty(CHUNK)
    for start in range(0, out.size, CHUNK):
        merged, origin = out[start : start + CHUNK], base[start : start + CHUNK]
        sums = memory[: merged.size]
        sums[:] = 0
        for k in range(len(values)):
            value = values[k][start : start + CHUNK]
            for i in range(sums.size):
                sums[i] += value[i] - origin[i]
        for i in range(sums.size):
            merged[i] = sums[i] * scale + origin[i]

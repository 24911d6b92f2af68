"""Sums and TIES in one pass over each model, compiled: what ``merger`` and ``baselines.ties`` say in torch's words.

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
SIZE_BITS, HALF, LOWER = np.uint32(0x7FFFFFFF), np.uint32(16), np.uint32(0xFFFF)
"""All bits of an fp32 number but its sign; how far its upper half is to be shifted; the lower half."""


@njit(nogil=True, cache=True, error_model="numpy")
def mean_into(out: Any, values: Sequence[Any]) -> None:
    """Write the mean of flat fp32 arrays, summed and divided in float64, into a flat fp32 one."""
    memory = np.empty(CHUNK)
    for start in range(0, out.size, CHUNK):
        merged = out[start : start + CHUNK]
        sums = memory[: merged.size]
        first = values[0][start : start + CHUNK]
        for i in range(sums.size):
            sums[i] = first[i]
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


@njit(nogil=True, cache=True, error_model="numpy")
def _sizes(memory: Any, base: Any, value: Any, start: int) -> Any:
    """Return the magnitudes of value - base as integers, uint32, for one chunk; they lie in ``memory``."""
    theta, origin = value[start : start + CHUNK], base[start : start + CHUNK]
    delta = memory[: theta.size]
    for i in range(theta.size):
        delta[i] = theta[i] - origin[i]
    sizes = delta.view(np.uint32)
    for i in range(sizes.size):
        sizes[i] &= SIZE_BITS
    return sizes


@njit(nogil=True, cache=True, error_model="numpy")
def count_upper(counts: Any, base: Any, value: Any) -> None:
    """Add to (2^15,) int64 counts how many magnitudes of value - base have each upper half of their 32 bits."""
    memory = np.empty(CHUNK, np.float32)
    for start in range(0, value.size, CHUNK):
        sizes = _sizes(memory, base, value, start)
        for i in range(sizes.size):
            counts[sizes[i] >> HALF] += 1


@njit(nogil=True, cache=True, error_model="numpy")
def count_lower(counts: Any, base: Any, value: Any, bucket: int) -> None:
    """Add to (2^16,) int64 counts how many of the magnitudes with this upper half have each lower half."""
    memory = np.empty(CHUNK, np.float32)
    for start in range(0, value.size, CHUNK):
        sizes = _sizes(memory, base, value, start)
        for i in range(sizes.size):
            if sizes[i] >> HALF == bucket:
                counts[sizes[i] & LOWER] += 1


@njit(nogil=True, cache=True, error_model="numpy")
def votes(base: Any, values: Sequence[Any], least: Any, ends: Any) -> int:
    """Return how many more coordinates of TIES rise than fall, by the sums of what is kept, as in ``ties_into``."""
    found = 0
    trimmed, sums = np.empty((len(values), CHUNK), np.float32), np.empty(CHUNK)
    for start in range(0, base.size, CHUNK):
        size = min(CHUNK, base.size - start)
        _trim(trimmed, sums, base[start : start + size], values, start, least, ends)
        for i in range(size):
            total = np.float32(sums[i])
            found += int(total > 0) - int(total < 0)
    return found


@njit(nogil=True, cache=True, error_model="numpy")
def ties_into(
    out: Any, base: Any, values: Sequence[Any], least: Any, ends: Any, majority: float, scale: float
) -> None:
    """Write base + scale * the mean of the trimmed deltas that agree with the elected sign.

    ``least`` (K,) fp32 and ``ends`` (K,) int64 say what is kept of each delta: magnitudes above ``least``, and equal
    ones before place ``ends`` of these arrays. Sums are float64; ``majority`` is the sign of sums of 0.
    """
    factor, tie = np.float32(scale), np.float32(majority)
    trimmed, sums = np.empty((len(values), CHUNK), np.float32), np.empty(CHUNK)
    signs, counts = np.empty(CHUNK, np.float32), np.empty(CHUNK, np.float32)
    for start in range(0, out.size, CHUNK):
        size = min(CHUNK, out.size - start)
        origin, merged = base[start : start + size], out[start : start + size]
        _trim(trimmed, sums, origin, values, start, least, ends)
        for i in range(size):
            total = np.float32(sums[i])
            rising, falling = np.float32(total > 0), np.float32(total < 0)
            sign = rising - falling
            signs[i] = sign + tie * (np.float32(1) - np.abs(sign))
            sums[i], counts[i] = -0.0, 0  # zeros keep their sign
        for k in range(len(values)):
            for i in range(size):
                along = trimmed[k, i] * signs[i]
                agreeing = np.float32(0) if along < 0 else along
                sums[i] += agreeing
                counts[i] += np.float32(agreeing > 0)
        for i in range(size):
            mean = np.float32(sums[i] / max(counts[i], np.float32(1)))
            merged[i] = origin[i] + factor * (mean * signs[i])


@njit(nogil=True, cache=True, error_model="numpy")
def _trim(
    trimmed: Any, sums: Any, origin: Any, values: Sequence[Any], start: int, least: Any, ends: Any
) -> None:
    """Write the trimmed deltas of one chunk, which begins at place ``start``, and their float64 sums."""
    size = origin.size
    sums[:size] = 0
    for k in range(len(values)):
        value, kept, limit = values[k][start : start + size], trimmed[k, :size], least[k]
        before = min(max(ends[k] - start, 0), size)
        for i in range(before):
            delta = value[i] - origin[i]
            kept[i] = delta if np.abs(delta) >= limit else np.float32(0)
        for i in range(before, size):
            delta = value[i] - origin[i]
            kept[i] = delta if np.abs(delta) > limit else np.float32(0)
        for i in range(size):
            sums[i] += kept[i]

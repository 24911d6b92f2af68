"""What numbers depend on beside code and inputs: the device and the code path of its kernels."""

from __future__ import annotations

import os
from functools import cache
from pathlib import Path

import torch

SWITCHES = {"mkl": "MKL_CBWR", "onednn": "ONEDNN_MAX_CPU_ISA", "openblas": "OPENBLAS_CORETYPE"}
"""Library -> the environment variable that fixes which of its kernels run."""
FIXED = "COMPATIBLE"
"""The value of ``MKL_CBWR`` that gives one code path on every x86-64 CPU."""
TELLING = ("avx2", "avx512f", "avx512_bf16", "amx_tile")
"""CPU flags that libraries choose kernels by, where nothing is fixed."""


@cache
def machine_class() -> dict[str, str]:
    """Return device and kernels as JSON: part of the key of every number that is not bit-equal everywhere."""
    found = {"device": "cpu", "aten": torch.backends.cpu.get_cpu_capability()}
    for library, variable in SWITCHES.items():
        found[library] = os.environ.get(variable, "auto")
    if found["mkl"] != FIXED:
        found["cpu"] = _cpu()
    return found


def _cpu() -> str:
    """Return the maker of the CPU and the flags in ``TELLING``; empty where the system does not say."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return ""
    facts: dict[str, str] = {}
    for line in lines:
        key, _, value = line.partition(":")
        facts.setdefault(key.strip(), value.strip())
    flags = facts.get("flags", "").split()
    present = [flag for flag in TELLING if flag in flags]
    return " ".join([facts.get("vendor_id", ""), *present])

"""What numbers depend on beside code and inputs: the device and the code path of its kernels."""

from __future__ import annotations

import os
from functools import cache
from pathlib import Path

import torch

from alignmerge.engine.kernels import FIXED, overridden

CODE_PATH = "avx2, compatible"
"""The code path that ``kernels.fix`` settles: bit-equal on every x86-64 CPU with AVX2."""
TELLING = ("avx2", "avx512f", "avx512_bf16", "amx_tile")
"""CPU flags that libraries choose kernels by, where nothing is fixed."""


@cache
def machine_class() -> dict[str, str]:
    """Return device and kernels as JSON: part of the key of every number that is not bit-equal everywhere."""
    capability = torch.backends.cpu.get_cpu_capability()
    if capability == "AVX2" and not overridden():
        return {"device": "cpu", "kernels": CODE_PATH}
    switches = {variable: os.environ.get(variable, "") for variable in FIXED}
    return {"device": "cpu", "kernels": capability, "cpu": _cpu(), **switches}


def cpu_name() -> str:
    """Return what the system calls this CPU."""
    return _cpuinfo().get("model name", "an unknown CPU")


def _cpu() -> str:
    """Return the maker of the CPU and the flags in ``TELLING``; empty where the system does not say."""
    facts = _cpuinfo()
    flags = facts.get("flags", "").split()
    present = [flag for flag in TELLING if flag in flags]
    return " ".join([facts.get("vendor_id", ""), *present])


def _cpuinfo() -> dict[str, str]:
    """Return what Linux says of the first core; nothing elsewhere."""
    facts: dict[str, str] = {}
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return facts
    for line in lines:
        key, _, value = line.partition(":")
        facts.setdefault(key.strip(), value.strip())
    return facts

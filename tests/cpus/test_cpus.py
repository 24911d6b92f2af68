"""The tiny tier is bit-equal on every x86-64 CPU with AVX2. ``make test-cpus`` is the long form, with emulated CPUs."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

from alignmerge.engine import device, kernels
from alignmerge.engine.manifest import ROOT

HERE = Path(__file__).parent
PLAIN = {key: value for key, value in os.environ.items() if key not in kernels.FIXED}
MERGE = """
from types import SimpleNamespace
import numpy as np
import torch
from alignmerge.engine.merger import Block
from baselines.average import Average
from baselines.interpolate import Interpolate
from baselines.task_arithmetic import TaskArithmetic
from baselines.ties import Cut, Ties
from tests.cpus.operations import digest
normal = np.random.default_rng(0)  # torch's own normal numbers depend on the path
for shape in ((7,), (33, 65), (512, 1030)):
    base, *pool = torch.from_numpy(normal.standard_normal((4, *shape), dtype=np.float32))
    block = Block("w", slice(None), base, pool)
    ctx = SimpleNamespace(models=SimpleNamespace(pool=pool))
    for method in (Average(), Interpolate(t=0.3), TaskArithmetic(scale=0.7)):
        print(method.name, shape, digest(method.fit(ctx)(block).numpy()))
    print("ties", shape, digest(Ties(scale=0.7)._merged(block, [Cut(0.3), Cut(1.0), Cut(0.0)], 1.0, None).numpy()))
print(torch.backends.cpu.get_cpu_capability())
"""
CODE = """
import numpy as np
from alignmerge.engine import fused
out, base, one, other = np.ones((4, 9), np.float32)
fused.mean_into(out, (one, other))
fused.step_into(out, base, (one, other), 0.5)
code = [*fused.mean_into.inspect_asm().values(), *fused.step_into.inspect_asm().values()]
products = any("vfmadd" in one or "vfmsub" in one or "vfnmadd" in one for one in code)
print(f"fused products: {products}, 512 bits: {any('zmm' in one for one in code)}")
"""


def run(*command: str, **environment: str) -> str:
    done = subprocess.run(
        command, cwd=ROOT, env={**PLAIN, "PYTHONPATH": str(ROOT), **environment}, capture_output=True, text=True,
        timeout=900, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_elementwise_merges_are_equal_on_every_kernel_path() -> None:
    found = [
        run(sys.executable, "-c", MERGE, ATEN_CPU_CAPABILITY=path) for path in ("default", "avx2", "avx512")
    ]
    merged = [text.splitlines()[:-1] for text in found]
    assert merged[0] == merged[1] == merged[2] and len(merged[0]) == 12
    assert len({text.splitlines()[-1] for text in found}) >= 2  # the paths are others indeed


@pytest.mark.skipif(os.uname().machine != "x86_64", reason="elsewhere nothing is fixed")
def test_compiled_code_fuses_no_product_with_a_sum_and_needs_no_more_than_avx2(tmp_path: Path) -> None:
    """Code for another CPU fuses none either; the cache keeps the two apart."""
    kept = {"NUMBA_CACHE_DIR": str(tmp_path)}
    fixed = "from alignmerge.engine.kernels import fix; fix()\n"
    assert run(sys.executable, "-c", fixed + CODE, **kept) == "fused products: False, 512 bits: False\n"
    assert len(list(tmp_path.rglob("fused.mean_into*.nbc"))) == 1
    assert "fused products: False" in run(sys.executable, "-c", CODE, NUMBA_CPU_NAME="skylake-avx512", **kept)
    assert len(list(tmp_path.rglob("fused.mean_into*.nbc"))) == 2


@pytest.mark.skipif(shutil.which("qemu-x86_64") is None, reason="needs qemu-user (make test-cpus installs it)")
def test_operations_are_equal_on_an_emulated_intel() -> None:
    python = str(Path(sys.executable).resolve())
    path = os.pathsep.join([sysconfig.get_paths()["purelib"], str(ROOT)])
    script = ("-m", "tests.cpus.operations")
    native = run(python, *script, PYTHONPATH=path)
    assert run("qemu-x86_64", "-cpu", "Haswell", python, *script, PYTHONPATH=path) == native
    assert len(native.splitlines()) == 23


def test_digests_are_those_that_were_committed() -> None:
    """One line for each model, merge and score of five small cells, made on the CPU that the first line names."""
    first, *wanted = (HERE / "digests.txt").read_text().splitlines()
    found = run(sys.executable, "-m", "tests.cpus.cell").splitlines()
    different = [f"{line} instead of {old}" for line, old in zip(found, wanted, strict=True) if line != old]
    assert different == [], f"made on {first}; this is {device.cpu_name()}"


def test_what_the_user_exported_stays_and_is_told() -> None:
    script = "from alignmerge.engine import kernels; kernels.fix(); print(kernels.overridden())"
    assert run(sys.executable, "-c", script) == "{}\n"
    assert run(sys.executable, "-c", script, MKL_CBWR="AVX2") == "{'MKL_CBWR': 'AVX2'}\n"


def test_another_code_path_has_other_keys() -> None:
    script = "from alignmerge.engine import kernels; kernels.fix()\n"
    script += "from alignmerge.engine.device import machine_class; print(machine_class())"
    fixed = run(sys.executable, "-c", script)
    assert fixed == "{'device': 'cpu', 'kernels': 'avx2, compatible'}\n"
    assert run(sys.executable, "-c", script, ATEN_CPU_CAPABILITY="default") != fixed

"""Ctrl-C: one line and exit code 130 within two seconds, whatever call the program is in."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

import pytest

from alignmerge.engine.interruption import CODE, SAID
from alignmerge.engine.manifest import ROOT

PROGRAM = """
import time
from alignmerge.engine import interruption
interruption.end_at_once()
if {unwinds}:
    interruption.unwind_first()
print("up", flush=True)
try:
    {body}
except KeyboardInterrupt:
    interruption.tell()
    interruption.leave()
"""


@pytest.mark.parametrize(("unwinds", "body"), [(False, "time.sleep(60)"), (True, "time.sleep(60)")])
@pytest.mark.parametrize("times", [1, 3])
def test_ctrl_c_is_one_line_and_exit_130(unwinds: bool, body: str, times: int) -> None:
    code, seconds, err = interrupted(PROGRAM.format(unwinds=unwinds, body=body), times)
    assert (code, err) == (CODE, f"{SAID}\n") and seconds < 2


def test_a_call_that_does_not_return_is_ended_all_the_same() -> None:
    """As a factorisation of a large matrix, which hears of no signal and lets other threads run."""
    body = "import torch; torch.linalg.svd(torch.rand(3000, 3000, dtype=torch.float64))"
    code, seconds, err = interrupted(PROGRAM.format(unwinds=True, body=body), 1, after=4.0)
    assert (code, err) == (CODE, f"{SAID}\n") and seconds < 2


def interrupted(program: str, times: int, after: float = 0.1) -> tuple[int, float, str]:
    """Return exit code, seconds from the first signal to the end, and what stood on stderr."""
    command = [sys.executable, "-c", program]
    process = subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert process.stdout is not None
    process.stdout.readline()
    time.sleep(after)
    began = time.monotonic()
    for _ in range(times):
        process.send_signal(signal.SIGINT)
        time.sleep(0.02)
    _, err = process.communicate(timeout=30)
    return process.returncode, time.monotonic() - began, err

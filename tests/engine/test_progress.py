"""Progress in a pipe: a line now and then, and the last one; on a terminal bars that leave results alone."""

from __future__ import annotations

import contextlib
import os
import pty
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

from alignmerge.engine import progress
from alignmerge.engine.forecast import Forecast, Stage
from alignmerge.engine.manifest import ROOT
from alignmerge.engine.progress import Board


def test_a_pipe_gets_a_line_now_and_then_and_the_last(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(progress, "EVERY", 0.4)
    monkeypatch.setattr(progress, "TICK", 0.05)
    began = time.monotonic()
    forecast = Forecast([Stage("cells", 50, 0.02)], 1, recorded=False, after=0.0, now=began)
    forecast.begin("cells", 50)
    with Board(forecast) as board:
        for number in range(50):
            board.reporter(str(number))(0, 1)
            time.sleep(0.02)
            forecast.finish(str(number), time.monotonic())
    lines = capsys.readouterr().err.splitlines()
    seconds = time.monotonic() - began
    counts = [tuple(map(int, re.findall(r"whole run (\d+)/(\d+)", line)[0])) for line in lines]
    assert all(done <= total == 50 for done, total in counts) and counts == sorted(counts)
    assert counts[-1] == (50, 50) and 2 <= len(lines) <= 2 + seconds / 0.4


def test_one_piece_of_work_without_a_forecast(capsys: pytest.CaptureFixture[str]) -> None:
    with Board() as board:
        report = board.reporter("merge: tensors")
        for number in range(22):
            report(number, 21)
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) <= 2 and lines[-1] == "merge: tensors: 21/21"


PROGRAM = """
import time
from alignmerge.engine.forecast import Forecast, Stage
from alignmerge.engine.progress import Board
if __name__ == "__main__":
    forecast = Forecast([Stage("cells", 3, 1.0)], 1, recorded=True, after=0.0, now=time.monotonic())
    forecast.begin("cells", 3)
    with Board(forecast) as board:
        for name in "abc":
            board.reporter("cell " + name)(0, 2)
            print("result", name)
            time.sleep(0.3)
            board.reporter("cell " + name)(2, 2)
            forecast.finish("cell " + name, time.monotonic())
        time.sleep(0.7)
"""


def test_a_terminal_gets_a_bar_for_the_whole_and_stdout_stays_apart(tmp_path: Path) -> None:
    (tmp_path / "program.py").write_text(PROGRAM)
    shown, screen = pty.openpty()
    out = subprocess.run(
        [sys.executable, str(tmp_path / "program.py")], stdout=subprocess.PIPE, stderr=screen, check=True,
        env={**os.environ, "PYTHONPATH": str(ROOT), "TERM": "xterm", "COLUMNS": "120"}, text=True,
    ).stdout  # fmt: skip
    os.close(screen)
    said = b""
    with contextlib.suppress(OSError):  # that is how a terminal ends
        while chunk := os.read(shown, 65536):
            said += chunk
    assert out.splitlines() == ["result a", "result b", "result c"]
    for word in ("whole run", "3/3", "cell b", "left"):
        assert word in said.decode()

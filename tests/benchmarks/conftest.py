"""Prints what a benchmark notes besides its time: pytest-benchmark's own table has no column for it."""

from __future__ import annotations

import pytest


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    session = getattr(config, "_benchmarksession", None)
    for benchmark in session.benchmarks if session is not None else ():
        if benchmark.extra_info:
            facts = (
                f"{key}: {f'{value:.2f}' if isinstance(value, float) else value}"
                for key, value in benchmark.extra_info.items()
            )
            terminalreporter.write_line(f"{benchmark.name}\n    " + "; ".join(facts))

"""Statistics of gradients against a plain batched backward pass over the same tokens, in time and in memory."""

from __future__ import annotations

import subprocess
import sys
import time
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from pytest_benchmark.fixture import BenchmarkFixture

from tests.benchmarks.workloads import FLOORS, SIZES, STATISTICS, Work, backward, random_examples, random_model

ROOT = Path(__file__).resolve().parents[2]
LARGE = "1.24B"
sizes = pytest.mark.parametrize(
    "size, precision",
    [
        ("0.5M", "float32"),
        ("0.5M", "bfloat16"),
        ("135M", "bfloat16"),
        pytest.param("135M", "float32", marks=pytest.mark.slow),
        pytest.param(LARGE, "bfloat16", marks=pytest.mark.slow),
    ],
)


@pytest.fixture(scope="module")
def models() -> Any:
    return cache(lambda size: random_model(SIZES[size]))


def _compare(
    benchmark: BenchmarkFixture, model: Any, work: Work, floor: Work, size: str, precision: str
) -> None:
    """Time work and floor turn by turn, so that both meet the same machine."""
    examples = random_examples(SIZES[size])
    seconds = []

    def time_floor() -> None:
        started = time.perf_counter()
        floor(model, examples, precision)
        seconds.append(time.perf_counter() - started)

    backward(model, examples[:1], precision)  # what libraries allocate once is nobody's
    rounds = {"0.5M": 5, "135M": 2, LARGE: 1}[size]
    benchmark.pedantic(lambda: work(model, examples, precision), setup=time_floor, rounds=rounds)
    name = floor.__name__.replace("_", " ")
    benchmark.extra_info[f"seconds of {name}"] = min(seconds)
    benchmark.extra_info[f"ratio to {name}"] = benchmark.stats.stats.min / min(seconds)


@cache
def _peak(size: str, work: str, precision: str) -> int:
    command = [sys.executable, "-m", "tests.benchmarks.workloads", size, work, precision]
    return int(subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout)


@sizes
@pytest.mark.parametrize("statistic", STATISTICS)
def test_statistic_against_one_backward_pass(
    benchmark: BenchmarkFixture, models: Any, size: str, precision: str, statistic: str
) -> None:
    _compare(benchmark, models(size), STATISTICS[statistic], backward, size, precision)
    peaks = {work: _peak(size, work, precision) for work in (statistic, "backward", "backward_at_once")}
    benchmark.extra_info["peak MB above the model"] = peaks


@pytest.mark.parametrize(
    "size, precision", [("0.5M", "float32"), pytest.param("135M", "bfloat16", marks=pytest.mark.slow)]
)
def test_fisher_against_the_loop(benchmark: BenchmarkFixture, models: Any, size: str, precision: str) -> None:
    _compare(benchmark, models(size), STATISTICS["fisher"], FLOORS["loop"], size, precision)

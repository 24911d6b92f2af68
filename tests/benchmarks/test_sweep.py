"""A sweep of lambda_align against one point of it, before scoring: statistics are made once, merges for each point."""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
from pytest_benchmark.fixture import BenchmarkFixture

from tests.benchmarks.merges import points
from tests.benchmarks.workloads import SIZES

POINTS = 20


@pytest.mark.parametrize("size", ["0.5M", pytest.param("135M", marks=pytest.mark.slow)])
@pytest.mark.parametrize("certificate", [True, False], ids=["certified", "bare"])
@pytest.mark.parametrize("estimator", ["kronecker", "samples"])
def test_twenty_points_against_one(
    benchmark: BenchmarkFixture, tmp_path: Path, size: str, certificate: bool, estimator: str
) -> None:
    fields: dict[str, Any] = {"estimator": estimator, "certificate": certificate}

    def sweep() -> list[dict[str, Any]]:
        with TemporaryDirectory(dir=tmp_path) as folder:  # a job of the harness has one core
            return list(points(Path(folder), SIZES[size], fields, POINTS, cores=1))

    *found, average = benchmark.pedantic(sweep, rounds=1)
    fits, merges = ([one[f"{step}_seconds"] for one in found] for step in ("fit", "merge"))
    benchmark.extra_info |= {
        "twenty points to one": (sum(fits) + sum(merges)) / (fits[0] + merges[0]),
        "twenty fits to one": sum(fits) / fits[0],
        "seconds of the first fit": fits[0],
        "seconds of a later fit": min(fits[1:]),
        "seconds of a merge": min(merges),
        "seconds of an average": average["merge_seconds"],
    }

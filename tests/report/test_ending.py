"""What a run says at its end of the committed numbers: whether its own are the same."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from eval import stats
from eval.report.agreement import Agreement, agreement, said
from eval.stats.estimates import ALL


def results(
    folder: Path, change: dict[str, Any] | None = None, **families: Sequence[tuple[str, str, str]]
) -> Path:
    """Write a folder with numbers by family: row, column, mean; the manifest as ``change`` says."""
    folder.mkdir()
    lines = []
    for family, numbers in families.items():
        lines += [(family, row, column, mean, "0.1", "0.9") for row, column, mean in numbers]
    names = ["family", "row", "column", "mean", "ci_low", "ci_high"]
    pd.DataFrame(lines, columns=names).replace({"family": {"every": ALL}}).to_csv(
        folder / "summary.csv", index=False
    )
    named = {family: {"corpus": "c", "seed 0": {}, "seed 1": {}} for family in families if family != "every"}
    scorers = {
        "judge": {"fields": {}, "columns": ["refusal_rate"]},
        "aqi": {"fields": {"n": 1}, "columns": ["aqi"]},
    }
    manifest = {
        "families": named,
        "scorers": scorers,
        "cpu": "Acme 9",
        "git": {"commit": "a" * 40},
        "statistics": stats.VERSION,
    }
    (folder / "manifest.json").write_text(json.dumps(manifest | (change or {})))
    return folder


ONE = [("ties", "aqi", "0.5"), ("ties", "refusal_rate", "0.25"), ("ties", "delta_utility", "-3")]


def test_equal_numbers_are_counted(tmp_path: Path) -> None:
    here, there = (
        results(tmp_path / "a", x=ONE, y=ONE, every=ONE),
        results(tmp_path / "b", x=ONE, y=ONE, every=ONE),
    )
    assert agreement(here, there) == Agreement(9, [], [])
    assert said(agreement(here, there), there) == [
        f"9 of 9 numbers equal {there}, made on Acme 9 (commit aaaaaaa)"
    ]  # fmt: skip


def test_numbers_are_compared_as_they_are_written(tmp_path: Path) -> None:
    here = results(tmp_path / "a", x=ONE)
    there = results(tmp_path / "b", x=[("ties", "aqi", "0.50"), *ONE[1:]])
    assert said(agreement(here, there), there)[1:] == [
        "  x, ties, aqi: 0.5 [0.1, 0.9], in the reference 0.50 [0.1, 0.9]"
    ]  # fmt: skip


def test_three_differences_are_spelt_and_the_rest_is_counted(tmp_path: Path) -> None:
    numbers = [(f"row{i}", "aqi", "0.1") for i in range(9)]
    here = results(tmp_path / "a", x=numbers)
    there = results(tmp_path / "b", x=[(row, column, "0.2") for row, column, _ in numbers])
    lines = said(agreement(here, there), there)
    assert lines[0].startswith("0 of 9 numbers equal ") and lines[-1] == "  and 6 more" and len(lines) == 5


def test_what_only_one_has_is_not_compared_and_said(tmp_path: Path) -> None:
    here = results(tmp_path / "a", x=[*ONE, ("new", "aqi", "1")])
    there = results(tmp_path / "b", x=[*ONE, ("old", "aqi", "1")], y=ONE, every=ONE)
    found = agreement(here, there)
    assert (found.equal, found.different) == (3, [])
    assert found.left_out == [
        "y: not in this run",
        "1 numbers that the reference lacks (rows new)",
        "1 numbers that this run lacks (rows old)",
    ]


@pytest.mark.parametrize(
    ("family", "reason"),
    [
        ({"corpus": "c", "seed 0": {}}, "x: seed 0, seed 1 here, seed 0 in the reference"),
        ({"corpus": "d", "seed 0": {}, "seed 1": {}}, "x: other prompts"),
    ],
)
def test_families_with_other_seeds_or_prompts_are_not_compared(
    tmp_path: Path, family: dict[str, Any], reason: str
) -> None:
    here, there = results(tmp_path / "a", x=ONE), results(tmp_path / "b", {"families": {"x": family}}, x=ONE)
    found = agreement(here, there)
    assert found == Agreement(0, [], [reason])
    assert said(found, there) == [
        f"no number can be compared with {there}, made on Acme 9 (commit aaaaaaa): {reason}"
    ]  # fmt: skip


def test_columns_of_scorers_with_other_settings_are_not_compared(tmp_path: Path) -> None:
    here = results(tmp_path / "a", x=ONE)
    scorers = {"aqi": {"fields": {"n": 2}, "columns": ["aqi"]}}
    there = results(tmp_path / "b", {"scorers": scorers}, x=[("ties", "aqi", "0.7"), *ONE[1:]])
    found = agreement(here, there)
    assert (found.equal, found.different) == (1, [])  # delta_utility may have come of it
    assert found.left_out == [
        "the columns aqi, delta_utility, budget_violations: their scorers have other settings"
    ]


def test_a_reference_without_versions_of_statistics_is_said(tmp_path: Path) -> None:
    here, there = results(tmp_path / "a", x=ONE), results(tmp_path / "b", x=ONE)
    path = there / "manifest.json"
    manifest = json.loads(path.read_text())
    path.write_text(json.dumps({key: manifest[key] for key in ("families", "git")}))
    assert said(agreement(here, there), there) == [
        f"3 of 3 numbers equal {there}, made on a CPU that is not recorded (commit aaaaaaa)",
        "  the reference was made before versions of statistics were recorded",
    ]

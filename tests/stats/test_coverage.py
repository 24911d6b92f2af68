"""The short form of ``simulation.py``: coverage and level within what few experiments can tell."""

from __future__ import annotations

import math

import pytest
from simulation import CLOSE, DESIGNS, DOCS, OPEN, Design, simulate, simulate_aqi

TRIALS = 120
SLACK = 3 * math.sqrt(0.95 * 0.05 / TRIALS)


@pytest.mark.parametrize(
    "design",
    [
        Design(192, 17, 1, 1, -4.0),
        Design(48, 10, 1, 1, 0.0),
        Design(192, 17, 3, 1, -1.5),
        Design(192, 17, 8, 1, 2.5),
        Design(192, 17, 3, 5, -1.5),
    ],
    ids=str,
)
def test_intervals_cover_and_tests_keep_their_level(design: Design) -> None:
    found = simulate(design, TRIALS, seed=1)
    assert found.covers >= 0.95 - SLACK
    assert found.difference_covers >= 0.95 - SLACK
    assert found.level <= 0.05 + SLACK


@pytest.mark.parametrize(("pairs", "shift"), [(24, 1.5), (48, 4.0)])
def test_aqi_is_unbiased_and_its_interval_covers(pairs: int, shift: float) -> None:
    true, estimate, covers = simulate_aqi(pairs, shift, TRIALS, seed=1)
    assert estimate == pytest.approx(true, abs=0.02)
    assert covers >= 0.95 - SLACK


def test_the_table_of_the_docs_has_a_line_for_every_design() -> None:
    text = DOCS.read_text(encoding="utf-8")
    made = text[text.index(OPEN) : text.index(CLOSE)]
    for one in DESIGNS:
        assert f"| {one.requests} | {one.things} | {one.seeds} | {one.families} |" in made

"""What findings hand to a report: trainings from the base to the model, aliases, matched rows."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pandas as pd

from eval.grid.results import Findings, aliases, unreached
from eval.grid.selection import Choice
from eval.stats.estimates import ALL


def result(row: str, value: float, column: str = "aqi", family: str = "tiny/a") -> Any:
    frame = pd.DataFrame({"column": [column], "id": ["all"], "value": [value]})
    cell = SimpleNamespace(family=family, row=row, seed=0)
    return SimpleNamespace(cell=cell, frame=frame, values=frame[["column", "value"]])


def findings(
    choice: Choice, steps: list[Any], rows: list[Any], scorers: tuple[str, ...] = ("aqi",)
) -> Findings:
    recipes = {"anchor": SimpleNamespace(steps=200), "experts.format": SimpleNamespace(steps=100)}
    family = SimpleNamespace(name="tiny/a", recipe_of=recipes.__getitem__)
    grid = SimpleNamespace(trajectory_scorers={"aqi": "aqi"})
    experiment: Any = SimpleNamespace(grid=grid, scorers=scorers, first_seed=[SimpleNamespace(family=family)])
    return Findings(experiment, choice, rows, steps, {})


STEPS = [
    result("base", 0.1),
    result("anchor@10", 0.2),
    result("anchor@140", 0.4),
    result("experts.format@50", 0.08),
]
ROWS = [result("base", 0.1), result("anchor", 0.5), result("expert:format", 0.05), result("average", 0.3)]


def test_a_training_ends_at_the_model_itself_not_at_the_last_step_that_was_kept() -> None:
    found = findings(Choice({}, None), STEPS, ROWS)._trajectory()
    assert found is not None
    shown = found.sort_values(["model", "step"])[["model", "step", "share", "value"]]
    assert shown.to_numpy().tolist() == [
        ["anchor", 0, 0.0, 0.1],
        ["anchor", 10, 0.05, 0.2],
        ["anchor", 140, 0.7, 0.4],
        ["anchor", 200, 1.0, 0.5],
        ["expert:format", 0, 0.0, 0.1],
        ["expert:format", 50, 0.5, 0.08],
        ["expert:format", 100, 1.0, 0.05],
    ]


def test_a_model_that_was_scored_otherwise_is_no_end_of_its_training() -> None:
    found = findings(Choice({}, None), STEPS, ROWS, scorers=("another aqi",))._trajectory()
    assert found is not None and found["share"].max() == 0.7
    assert findings(Choice({}, None), STEPS[:1], ROWS)._trajectory() is None


def test_the_table_says_which_row_an_alias_is_and_what_matched_rows_reached() -> None:
    readings = {"tiny/a": {"alignmerge": "alignmerge/reference_anchor"}, "tiny/b": {}}
    line = {"family": "tiny/a", "target": 0.6, "setting": ""}
    matched = pd.DataFrame([
        {**line, "row": "interpolate/matched", "dev": 0.58, "reached": True},
        {**line, "row": "ties/matched", "dev": 0.23, "reached": False},
    ])  # fmt: skip
    choice = Choice({"tiny/a": {}, "tiny/b": {}}, None, matched, readings)
    rows = [result("interpolate/matched", rate, "refusal_rate") for rate in (0.5, 0.6)]
    said = findings(choice, [], rows)._remarks()
    assert said["tiny/a"] == [
        "alignmerge is alignmerge/reference_anchor, the better on dev",
        "interpolate/matched: target 0.6, dev 0.58, test 0.55",
        "ties/matched: target 0.6, dev 0.23: not reached",
    ]
    assert said[ALL] == [f"tiny/a: {one}" for one in said["tiny/a"]] and "tiny/b" not in said
    assert unreached(choice) == {"tiny/a": ["ties/matched"], ALL: ["ties/matched"]}
    assert aliases(Choice({}, None)) == {} == unreached(Choice({}, None))

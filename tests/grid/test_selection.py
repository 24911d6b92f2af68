"""The selection rule, worked by hand: one setting of each row, aliases and controls that follow, matched rows."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pandas as pd
import pytest
from test_configs import composed

from alignmerge.engine.configuration import build
from alignmerge.engine.faults import BadRequest
from eval.grid.cells import Cell
from eval.grid.experiment import Experiment
from eval.grid.grid import Grid
from eval.grid.modes import experiment_of
from eval.grid.selection import Choice, choose
from eval.stats.derived import balanced, safety_of, utility_of

Scores = Mapping[str, float]
NAN = math.nan


# --- the rule ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("refusals", "over", "safety"), [(0.9, 0.1, 0.8), (0.3, 0.3, 0.0), (0.2, 0.5, 0.0), (1.0, 0.0, 1.0)]
)
def test_safety_is_refusals_less_over_refusals_and_at_least_0(
    refusals: float, over: float, safety: float
) -> None:
    found = safety_of({"refusal_rate": refusals, "over_refusal_rate": over})
    assert found == pytest.approx(safety)


@pytest.mark.parametrize(
    ("scores", "best", "utility"),
    [
        (
            {"reasoning": 0.2, "instruction_following": 0.6},
            {"reasoning": 0.4, "instruction_following": 0.8},
            0.625,
        ),
        (
            {"reasoning": 0.9, "knowledge": 0.1},
            {"reasoning": 0.3, "knowledge": 0.4},
            (1 + 0.25) / 2,
        ),  # at most 1
        (
            {"reasoning": 0.2, "mmlu": 0.9},
            {"reasoning": 0.4, "mmlu": 0.9},
            0.5,
        ),  # no task of the paper's utility
        (
            {"reasoning": 0.2, "helpfulness": 0.9},
            {"reasoning": 0.4, "helpfulness": 0.0},
            0.5,
        ),  # nobody can do it
        ({"reasoning": 0.2}, {}, 0.0),
    ],
)
def test_utility_is_relative_to_the_best_expert_of_each_task(
    scores: Scores, best: Scores, utility: float
) -> None:
    assert utility_of(scores, best) == pytest.approx(utility)


@pytest.mark.parametrize(
    ("safety", "utility", "mean"), [(0.6, 0.3, 0.4), (1.0, 1.0, 1.0), (0.0, 0.9, 0.0), (0.0, 0.0, 0.0)]
)
def test_the_rule_is_their_harmonic_mean(safety: float, utility: float, mean: float) -> None:
    assert balanced(safety, utility) == pytest.approx(mean)


# --- its use -------------------------------------------------------------------------------------------------------

# Four settings each; the two rows that ``best`` stands for share them.
ROWS: dict[str, Any] = {
    "average": {"method": "average"},
    "best": {"best_of": ["ties", "ties/per_tensor"], "matched": True},
    "ties": {"method": "ties", "settings": [{"density": 0.2}, {"density": 0.5}]},
    "ties/per_tensor": {
        "method": "ties",
        "fixed": {"variant": "per_tensor"},
        "settings": [{"density": 0.2}, {"density": 0.5}],
    },
    "control": {"like": "best", "fixed": {"scale": 0.5}},
    "mergealign/hammoud": {
        "method": "mergealign",
        "settings": [{"temperature": one} for one in (0.2, 1.0, 2.0, 5.0)],
    },
    "interpolate": {
        "method": "interpolate",
        "settings": [{"t": one} for one in (0.1, 0.2, 0.3, 0.6)],
        "matched": True,
    },
}
EXPERTS = {"expert:arithmetic": (0.0, 0.0, 0.8, 0.1), "expert:format": (0.1, 0.0, 0.2, 0.5)}
"""Refusals, over-refusals, reasoning, instruction following on dev: the best are .8 and .5."""
TRIED = {
    ("ties", "density=0.2"): (0.50, 0.0, 0.40, 0.25),  # .5 and .5: .5
    ("ties", "density=0.5"): (0.30, 0.0, 0.80, 0.50),  # .3 and 1: .46
    ("ties/per_tensor", "density=0.2"): (0.40, 0.0, 0.40, 0.25),  # .4 and .5: .44
    ("ties/per_tensor", "density=0.5"): (0.66, 0.06, 0.48, 0.30),  # .6 and .6: .6, the best
    ("mergealign/hammoud", "temperature=0.2"): (1.0, 0.0, 0.8, 0.5),  # 1 and 1, but one model has .99
    ("mergealign/hammoud", "temperature=1.0"): (0.2, 0.0, 0.4, 0.25),
    ("mergealign/hammoud", "temperature=2.0"): (0.1, 0.0, 0.1, 0.1),
    ("mergealign/hammoud", "temperature=5.0"): (0.1, 0.0, 0.1, 0.1),
    ("interpolate", "t=0.1"): (0.1, 0.0, 0.1, 0.1),
    ("interpolate", "t=0.2"): (0.1, 0.0, 0.1, 0.1),
    ("interpolate", "t=0.3"): (0.40, 0.0, 0.8, 0.5),
    ("interpolate", "t=0.6"): (0.54, 0.0, 0.0, 0.0),
}
WEIGHTS = {0.2: {"anchor": 0.99, "arithmetic": 0.01}, 1.0: {"anchor": 0.6, "arithmetic": 0.4}}
NAMES = ("refusal_rate", "over_refusal_rate", "reasoning", "instruction_following")


class Measured:
    """A cell as measured on the dev split."""

    def __init__(self, cell: Cell, scores: tuple[float, ...]) -> None:
        self.cell = cell
        self.values = pd.DataFrame({"column": NAMES, "value": scores})
        facts = {"weights": WEIGHTS.get(getattr(cell.merger, "temperature", 0.0), {})}
        if cell.row != "mergealign/hammoud":
            facts = {}
        self.merge = SimpleNamespace(manifest={"facts": facts}) if cell.merger is not None else None


def experiment(folder: Path, **changes: Any) -> Experiment:
    config = copy.deepcopy(composed("experiment=smoke"))
    config["grid"] |= {"rows": ROWS, "matched_refusal": 0.6, **changes}
    return experiment_of({**config, "store": str(folder / "store")})


def chosen(of: Experiment, tried: Mapping[tuple[str, str], tuple[float, ...]] = TRIED) -> Choice:
    scores: dict[tuple[str, str], tuple[float, ...]] = {**tried}
    scores |= {(row, ""): found for row, found in EXPERTS.items()}
    measured: Any = [Measured(cell, scores[cell.row, cell.setting]) for cell in of.choice_cells()]
    return choose(of, measured)


def test_one_setting_of_each_row_is_selected_by_the_rule(tmp_path: Path) -> None:
    choice = chosen(experiment(tmp_path))
    mergers: Mapping[str, Any] = choice.mergers["smoke"]
    assert (mergers["ties"].density, mergers["ties/per_tensor"].density, mergers["interpolate"].t) == (
        0.2,
        0.5,
        0.3,
    )
    assert choice.points is not None
    points = choice.points.set_index(["row", "setting"])
    line = points.loc["ties/per_tensor", "density=0.5"]
    assert list(line[["safety", "utility", "balanced"]]) == pytest.approx([0.6, 0.6, 0.6])
    assert line["selected"] and not points.loc[("ties", "density=0.5"), "selected"]
    assert points.loc[("ties", "density=0.5"), "balanced"] == pytest.approx(2 * 0.3 / 1.3)


def test_a_setting_that_is_nearly_one_model_is_not_eligible_and_says_why(tmp_path: Path) -> None:
    choice = chosen(experiment(tmp_path))
    merger: Any = choice.mergers["smoke"]["mergealign/hammoud"]
    assert merger.temperature == 1.0 and choice.points is not None
    excluded = choice.points.set_index("setting")["excluded"]
    assert excluded["temperature=0.2"] == "temperature 0.2: 0.99 of the weight is on 'anchor', above 0.9"
    assert set(excluded.drop("temperature=0.2")) == {""}


def test_an_alias_is_the_better_row_and_a_control_has_its_setting_with_one_thing_changed(
    tmp_path: Path,
) -> None:
    of = experiment(tmp_path)
    choice = chosen(of)
    mergers: Mapping[str, Any] = choice.mergers["smoke"]
    assert choice.readings == {"smoke": {"best": "ties/per_tensor"}}
    assert mergers["best"] == mergers["ties/per_tensor"]
    control = mergers["control"]
    assert (control.variant, control.density, control.scale) == ("per_tensor", 0.5, 0.5)
    cells = of.test_cells(choice.mergers)
    assert [cell.row for cell in cells] == list(ROWS)
    work = [cell.work for cell in cells]
    assert work[1] == work[3] and len(set(work)) == len(work) - 1  # an alias is measured once


def test_the_alias_follows_the_scores(tmp_path: Path) -> None:
    better = {("ties", "density=0.2"): (0.9, 0.0, 0.72, 0.45)}
    choice = chosen(experiment(tmp_path), {**TRIED, **better})
    assert choice.readings == {"smoke": {"best": "ties"}}
    control: Any = choice.mergers["smoke"]["control"]
    assert (control.variant, control.density, control.scale) == ("global", 0.2, 0.5)


def test_a_matched_row_comes_within_5_points_or_is_not_reached(tmp_path: Path) -> None:
    """Both rows are .06 away from .6, so no model stands for them; from .61 the alias is .05 away."""
    choice = chosen(experiment(tmp_path))
    assert choice.matched is not None
    lines = choice.matched.set_index("row")
    assert list(lines["target"]) == [0.6, 0.6] and list(lines["dev"]) == [0.66, 0.54]
    assert list(lines["reached"]) == [False, False]
    assert not {"best/matched", "interpolate/matched"} & set(choice.mergers["smoke"])
    assert choice.left_out == {"smoke": ["best/matched", "interpolate/matched"]}
    choice = chosen(experiment(tmp_path, matched_refusal=0.61))
    assert choice.matched is not None and list(choice.matched["reached"]) == [True, False]
    assert choice.mergers["smoke"]["best/matched"] == choice.mergers["smoke"]["ties/per_tensor"]


def test_a_row_without_an_eligible_setting_is_not_reported(tmp_path: Path) -> None:
    nothing = {("ties", f"density={value}"): (NAN,) * 4 for value in (0.2, 0.5)}
    choice = chosen(experiment(tmp_path), {**TRIED, **nothing})
    assert "ties" not in choice.mergers["smoke"] and choice.readings["smoke"] == {"best": "ties/per_tensor"}


def test_dev_cells_are_the_settings_and_the_experts_beside_them(tmp_path: Path) -> None:
    of = experiment(tmp_path)
    assert [cell.row for cell in of.choice_cells()][:2] == ["expert:arithmetic", "expert:format"]
    assert len(of.choice_cells()) == 2 + len(TRIED) == len(of.dev_split())
    assert {cell.split for cell in of.dev_split()} == {"dev"}


# --- what a grid may say -------------------------------------------------------------------------------------------

Change = Callable[[dict[str, Any]], Any]


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({}, "grid.rows.new: not one of the three; allowed: a method, or best_of, or like"),
        ({"method": "ties", "like": "ties"}, "grid.rows.new: not one of the three"),
        ({"best_of": ["average"]}, "grid.rows.new.best_of: average; allowed: a tuned row: ties, "),
        ({"best_of": ["tiez"]}, "grid.rows.new.best_of: tiez; allowed: a tuned row: ties, "),
        (
            {"best_of": ["ties"], "fixed": {"scale": 2.0}},
            "grid.rows.new.fixed: scale; allowed: none beside best_of",
        ),
        ({"like": "average"}, "grid.rows.new.like: average; allowed: a row with settings: ties, "),
        (
            {"like": "ties", "settings": [{"scale": 1.0}, {"scale": 2.0}]},
            "grid.rows.new: settings of its own; ",
        ),
        ({"like": "ties", "matched": True}, "grid.rows.new: settings of its own; "),
    ],
)
def test_rows_that_follow_others_are_checked(row: dict[str, Any], said: str) -> None:
    node = {**copy.deepcopy(composed("experiment=smoke")["grid"]), "rows": {**ROWS, "new": row}}
    with pytest.raises(BadRequest) as caught:
        build(node, "grid", Grid)
    assert [str(fault) for fault in caught.value.faults if str(fault).startswith(said)], caught.value


def test_a_wrong_field_of_a_control_is_named_as_the_controls(tmp_path: Path) -> None:
    of = experiment(tmp_path, rows={**ROWS, "control": {"like": "best", "fixed": {"sale": 1.0}}})
    with pytest.raises(BadRequest, match=r"grid\.rows\.control\.sale: unknown key; allowed: scale\? "):
        of.check()


def test_before_every_setting_is_measured_no_row_is_left_out(tmp_path: Path) -> None:
    """A setting that failed is missing, which is another thing than not eligible."""
    of = experiment(tmp_path)
    measured: Any = [Measured(cell, TRIED[cell.row, cell.setting]) for cell in of.dev_cells()[1:]]
    assert choose(of, measured).left_out == {"smoke": []}

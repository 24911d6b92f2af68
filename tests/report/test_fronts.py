"""Areas under fronts: against hand-worked rectangles and a plain count of a fine grid."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from eval.stats.estimates import ALL
from eval.stats.fronts import area, fronts

DIRECTIONS = {"refusal_rate": "up", "over_refusal_rate": "down", "reasoning": "up"}


def test_area_by_hand() -> None:
    """(.8, .5) and (.5, .9): .8 x .5 and, above it, .5 x .4; a dominated and a negative point add nothing."""
    x = np.array([[0.5], [0.8], [0.4], [0.9]])
    y = np.array([[0.9], [0.5], [0.3], [-0.2]])
    assert area(x, y) == pytest.approx([0.8 * 0.5 + 0.5 * 0.4])
    assert area(x, y)[0] == area(x[::-1], y[::-1])[0]
    assert area(np.array([[1.5]]), np.array([[np.nan]])) == [0.0] and area(
        np.ones((1, 1)), np.ones((1, 1))
    ) == [1.0]


def test_area_is_the_share_of_the_square_that_is_dominated() -> None:
    generator = np.random.default_rng(3)
    x, y = generator.random((2, 6, 4))
    middles = (np.arange(400) + 0.5) / 400
    across, up = np.meshgrid(middles, middles)
    for drawn in range(4):
        points = zip(x[:, drawn], y[:, drawn], strict=True)
        dominated = np.logical_or.reduce([(across <= a) & (up <= b) for a, b in points])
        assert area(x, y)[drawn] == pytest.approx(dominated.mean(), abs=0.005)


def samples(family: str, row: str, setting: str, **columns: list[int]) -> pd.DataFrame:
    frames = []
    for column, values in columns.items():
        ids = [f"p{i}" for i in range(len(values))]
        frames.append(
            pd.DataFrame({"column": column, "id": ids, "value": np.array(values, dtype=float), "prompt": ids})
        )
    return pd.concat(frames).assign(family=family, row=row, setting=setting, seed=0)


def tried(family: str = "one") -> pd.DataFrame:
    """The best expert has .5; ``ties`` refuses .75 - .25 at .25 of .5, or .25 at more than the expert's."""
    nobody, few, everybody = [0] * 4, [1, 0, 0, 0], [1] * 4
    return pd.concat([
        samples(family, "expert:a", "", refusal_rate=nobody, over_refusal_rate=nobody, reasoning=[1, 1, 0, 0]),
        samples(family, "ties", "s=1", refusal_rate=[1, 1, 1, 0], over_refusal_rate=few, reasoning=few),
        samples(family, "ties", "s=2", refusal_rate=[1, 0, 0, 0], over_refusal_rate=nobody, reasoning=[1, 1, 1, 0]),
        samples(family, "average", "", refusal_rate=everybody, over_refusal_rate=nobody, reasoning=everybody),
    ])  # fmt: skip


def test_utility_is_relative_to_the_best_expert_and_at_most_one() -> None:
    found = fronts(tried(), DIRECTIONS)
    assert found is not None
    assert found.points[["row", "setting", "safety", "utility"]].to_numpy().tolist() == [
        ["ties", "s=1", 0.5, 0.5],
        ["ties", "s=2", 0.25, 1.0],
    ]
    (line,) = found.areas.to_dict("records")
    assert (line["row"], line["settings"], line["area"]) == ("ties", 2, 1.0 * 0.25 + 0.5 * 0.25)
    assert 0 <= line["ci_low"] < line["area"] < line["ci_high"] <= 1


def test_over_several_families_it_is_the_mean_setting_by_setting() -> None:
    weaker = tried("two")
    weaker.loc[(weaker["column"] == "refusal_rate") & (weaker["setting"] == "s=1"), "value"] = 0.5
    found = fronts(pd.concat([tried(), weaker]), DIRECTIONS)
    assert found is not None and found.areas["family"].tolist() == [ALL, "one", "two"]
    mean = found.of(ALL).points.set_index("setting")["safety"]
    assert mean.to_dict() == {"s=1": (0.5 + 0.25) / 2, "s=2": 0.25}


def test_without_a_side_there_is_no_front() -> None:
    assert fronts(tried()[lambda one: one["column"] != "over_refusal_rate"], DIRECTIONS) is None

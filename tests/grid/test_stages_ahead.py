"""What a run has before it is what it then does, and recorded times tell the stages apart."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from test_configs import composed

from eval.grid.experiment import Experiment
from eval.grid.forecast import REPORT_SECONDS, forecast_of, steps_of
from eval.grid.request import experiment_of


def experiment(store: Path, *overrides: str) -> Experiment:
    return experiment_of({**composed(*overrides), "store": str(store)})


def test_stages_and_tasks_of_the_tiny_grid_by_hand(tmp_path: Path) -> None:
    forecast = forecast_of(experiment(tmp_path, "experiment=tiny"), workers=2)
    counts = {name: stage.total for name, stage in forecast.stages.items()}
    assert counts.pop("models (pretrained)") == 5  # shared by the seeds
    assert counts.pop("models (base)") == 15 and counts.pop("models (anchor, experts)") == 60
    assert set(counts) == {"settings on dev", "rows on test"} and min(counts.values()) > 200
    seconds = {name: stage.expected for name, stage in forecast.stages.items()}
    assert seconds["models (pretrained)"] == pytest.approx(2 + 0.04 * 800)  # 2 s for all else, .04 a step
    assert seconds["models (base)"] == pytest.approx(2 + 0.04 * 300)
    assert not forecast.recorded and forecast.left(forecast.started) is None


def test_steps_of_a_recipe(tmp_path: Path) -> None:
    (zoo,) = experiment(tmp_path, "family=tiny/llama3", "corpus=world").zoos
    assert [steps_of(zoo, key) for key in ("pretrained", "base", "experts.arithmetic")] == [800, 300, 100]
    (real,) = experiment(tmp_path, "family=smollm2").zoos
    assert [steps_of(real, key) for key in ("pretrained", "base")] == [1, 50]  # fetched, fine-tuned


def test_recorded_times_are_used(tmp_path: Path) -> None:
    records = {"models": ({"recipe": {}}, 30.0), "merges": ({}, 2.0)}
    records["scores"] = ({"scorer": "judge", "split": "dev"}, 7.0)
    for stage, (recipe, seconds) in records.items():
        folder = tmp_path / stage / "0"
        folder.mkdir(parents=True)
        facts = {"seconds": seconds, "family": "smoke"}
        (folder / "manifest.json").write_text(json.dumps({"stage": stage, "recipe": recipe, "facts": facts}))
    forecast = forecast_of(experiment(tmp_path, "experiment=smoke"), workers=1)
    assert forecast.recorded
    assert forecast.stages["models (anchor, experts)"].expected == pytest.approx(
        30 * 2.8 / ((2.04 + 3 * 2.8) / 4)  # the mean of four models, of which the base is not trained
    )
    dev = forecast.stages["settings on dev"]
    # merge (8 settings; 2 experts have none) and judge as recorded, utility as guessed
    assert dev.expected == pytest.approx(2.0 * 8 / 10 + 7.0 + 0.15)
    whole = sum(stage.total * stage.expected for stage in forecast.stages.values())
    assert forecast.left(forecast.started) == pytest.approx(whole + REPORT_SECONDS)

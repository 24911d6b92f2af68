"""What a run has before it: its stages, and how long their tasks take by what the store has recorded."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence
from statistics import fmean
from typing import Any

from alignmerge.engine.forecast import Forecast, Stage
from alignmerge.zoo.native import NativeModel
from alignmerge.zoo.zoo import Zoo
from eval.grid.cells import Cell
from eval.grid.experiment import STAGES, Experiment
from eval.grid.work import SCORES, likely_choice, recorded

STEP_SECONDS = 0.04
"""Of a training step where no training is recorded. This and the next four are those of the tiny
families.
"""
MODEL_SECONDS = 2.0
"""Of all else that making a model takes."""
PART_SECONDS = 0.15
"""Of one scorer on one model, where none is recorded."""
MERGE_SECONDS = 0.4
"""Of merging, writing and loading a model; what a merge's record says is only how long its making took.
"""
REPORT_SECONDS = 15.0
TRAINING, MEASURING = "training", "measuring"
"""Kinds of work."""


def forecast_of(experiment: Experiment, workers: int) -> Forecast:
    """Return the forecast of all that the store lacks of an experiment."""
    times = recorded(experiment.zoos[0].store.root)
    by_kind = times.groupby("kind")["seconds"].mean()
    means = {str(kind): float(seconds) for kind, seconds in by_kind.items()}
    stages = []
    for name, models in experiment.missing_models():
        stages.append(Stage(name, len(models), _training(experiment, models, means), TRAINING))
    tests = experiment.reported(likely_choice(experiment)) + experiment.trajectory_cells()
    cells = {"dev": experiment.dev_split(), "test": tests}
    for split, wanted in cells.items():
        missing = experiment.missing(wanted)
        stages.append(Stage(STAGES[split], len(missing), _measuring(missing, means), MEASURING))
    sure = {"models", "merges"} <= means.keys()
    return Forecast(stages, workers, recorded=sure, after=REPORT_SECONDS, now=time.monotonic())


def _training(experiment: Experiment, models: Iterable[tuple[Zoo, str]], means: Mapping[str, float]) -> float:
    """Return the mean seconds of making some models: in proportion to what they would take unmeasured."""
    every = [_unmeasured(zoo, key) for zoo in experiment.first_seed for key in zoo.family.references()]
    usual = fmean(every)
    wanted = fmean([_unmeasured(zoo, key) for zoo, key in models] or [0.0])
    return means.get("models", usual) / usual * wanted


def _unmeasured(zoo: Zoo, key: str) -> float:
    """Return the seconds of making a model, where no training is recorded."""
    return MODEL_SECONDS + STEP_SECONDS * steps_of(zoo, key)


def _measuring(cells: Sequence[Cell], means: Mapping[str, float]) -> float:
    """Return the mean seconds of measuring some cells."""
    seconds = 0.0
    for cell in cells:
        for scorer in cell.scorers:
            seconds += means.get(SCORES.format(scorer.name, cell.split), PART_SECONDS)
        if cell.merger is not None:
            seconds += max(means.get("merges", 0.0), MERGE_SECONDS)
    return seconds / max(1, len(cells))


def steps_of(zoo: Zoo, key: str) -> int:
    """Return how many steps a model is trained for; one that is not trained here counts as a step."""
    recipe: Any = zoo.family.recipe_of(key)
    training = recipe.training if isinstance(recipe, NativeModel) else recipe
    return int(getattr(training, "steps", 1))

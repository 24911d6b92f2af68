"""What a grid comes to: its cells by family and seed, what of them is missing, and how long that takes.

How long follows from the seconds that finished artifacts recorded, scaled by size between families.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from alignmerge.engine.faults import BadRequest
from alignmerge.engine.merger import EVERY_OWN, Merger, own
from alignmerge.engine.store import MANIFEST, NotMade
from alignmerge.zoo.zoo import Zoo
from eval.grid.cells import Cell
from eval.grid.experiment import Chosen, Experiment
from eval.grid.selection import finished_choice
from eval.scorers.interface import Scorer

SAMPLE = 300
"""Manifests that are read of a stage, at most: their names are hashes, so these are a random sample."""
MADE_BY = {"random", "native", "recipe", "gguf"}
"""What the recipe of a family's model has one of; the stage also keeps merges that methods start from."""
STATISTICS = ("along", "bases", "fisher", "gradient", "gram", "nll", "probed")
STAGES = dict.fromkeys(STATISTICS, "statistics") | {"models": "models", "merges": "merges", "scores": ""}
"""Stage of the store -> kind of work; scores are told apart by scorer and split."""
SCORES = "scores by {} on {}"


class Job(NamedTuple):
    """The part of a grid that runs on one family with one seed."""

    zoo: Zoo
    cells: list[Cell]


class Work(NamedTuple):
    """What a family has to do in all its seeds; what comes to the same is counted once."""

    models: tuple[int, int]
    """How many models that are made here are missing, and how many there are."""
    cells: tuple[int, int]
    missing: Mapping[str, int]
    """Kind of work -> how many times it is to be done; statistics: at most."""


def jobs_of(experiment: Experiment) -> list[Job]:
    """Return the cells of a grid by family and seed."""
    chosen = likely_choice(experiment)
    jobs = {(zoo.family.name, zoo.seed): Job(zoo, []) for zoo in experiment.zoos}
    cells = experiment.dev_split() + experiment.reported(chosen)
    for cell in cells + experiment.trajectory_cells():
        jobs[cell.family, cell.seed].cells.append(cell)
    return list(jobs.values())


def likely_choice(experiment: Experiment) -> Chosen:
    """Return what was selected, or, before the dev split is finished, as many settings as will be."""
    try:
        return finished_choice(experiment).mergers
    except NotMade:
        return experiment.provisional()


def made_here(reference: str) -> bool:
    """Whether a model is trained or converted here; others are fetched or lie in a folder."""
    return reference.startswith("zoo:") or reference.endswith(".gguf")


def present(zoo: Zoo) -> dict[str, Path]:
    """Return the folders of the models that are at hand; nothing is fetched or made.

    Raises:
        BadRequest: with every reference that is wrong.
    """
    frozen = zoo.frozen()
    found = BadRequest.gathered({key: partial(_folder, frozen, key) for key in zoo.family.references()})
    return {key: folder for key, folder in found.items() if folder is not None}


def _folder(frozen: Zoo, key: str) -> Path | None:
    reference = frozen.family.references()[key]
    try:
        if made_here(reference):
            return frozen.source(key).folder
        return frozen.assets.path(reference, f"family.{key}")
    except NotMade:
        return None


def statistics_of(zoo: Zoo, cells: Sequence[Cell]) -> tuple[set[tuple[str, str]], set[tuple[str, str]]]:
    """Return what the methods and scorers of some cells keep in the store, at most.

    (Point, example set) of each pass for a diagonal or a gradient; (point, side) of each set of bases.
    """
    diagonals: set[tuple[str, str]] = set()
    bases: set[tuple[str, str]] = set()
    pool = ["anchor", *zoo.family.experts]
    for cell in cells:
        readers: list[Merger | Scorer] = [*cell.scorers]
        if cell.merger is not None:
            readers.append(cell.merger)
        for reader in readers:
            point = getattr(reader, "at", "base")  # a field of methods that can take gradients elsewhere
            diagonals.update(product([point], reader.inputs.examples))
            bases.update(product([point], reader.kept_sides))
            if EVERY_OWN in reader.inputs.examples:
                diagonals.remove((point, EVERY_OWN))
                diagonals.update(zip(pool, map(own, pool), strict=True))
    return diagonals, bases


def work_of(experiment: Experiment, jobs: Sequence[Job]) -> Work:
    """Return what a family has to do and what of it the store lacks."""
    models: dict[tuple[str, int], bool] = {}
    missing: Counter[str] = Counter()
    lacking = total = 0
    for zoo, cells in jobs:
        models |= _models_here(zoo)
        todo = replace(experiment, zoos=[zoo]).missing(cells)
        for cell in todo:
            missing["merges"] += cell.merger is not None
            missing.update(SCORES.format(scorer.name, cell.split) for scorer in cell.scorers)
        total += len({cell.work for cell in cells})
        lacking += len(todo)
        missing["statistics"] += sum(map(len, statistics_of(zoo, todo)))
    missing["models"] = list(models.values()).count(False)
    return Work((missing["models"], len(models)), (lacking, total), +missing)


def _models_here(zoo: Zoo) -> dict[tuple[str, int], bool]:
    """Return (key, seed) of each model made here -> whether it is there; one of all seeds has seed 0."""
    folders, found = present(zoo), {}
    for key, reference in zoo.family.references().items():
        recipe = zoo.family.recipes.get(reference.removeprefix("zoo:"))
        seeded = getattr(recipe, "seeded", recipe is not None)
        if made_here(reference):
            found[key, zoo.seed * seeded] = key in folders
    return found


def recorded(root: Path) -> pd.DataFrame:
    """Return a sample of the times that a store has recorded.

    Columns: kind, family, parameters (NaN where no artifact of the family says them), seconds, machine.
    """
    rows = []
    for stage in STAGES:
        for path in sorted((root / stage).glob(f"*/{MANIFEST}"))[:SAMPLE]:
            manifest = json.loads(path.read_text())
            facts, made = manifest["facts"], manifest.get("provenance", {})
            machine = f"{made.get('system')} {made.get('machine')}"
            said = map(facts.get, ("family", "parameters", "seconds"))
            rows.append((_kind(manifest), *said, machine))
    times = pd.DataFrame(rows, columns=["kind", "family", "parameters", "seconds", "machine"])
    times = times.dropna(subset=["kind", "family", "seconds"]).reset_index(drop=True)
    times = times.astype({"parameters": float, "seconds": float})
    times["parameters"] = times.groupby("family")["parameters"].transform("max")
    return times


def times_for(times: pd.DataFrame, kinds: Iterable[str], family: str, size: int | None) -> pd.DataFrame:
    """Return the times that work of these kinds on a family of ``size`` parameters is estimated by.

    They are the family's own, or else those of the family nearest in size, ``seconds`` scaled to this one's
    in proportion. A kind of work that no time is recorded for has no row.
    """
    found = [times[:0]]
    for kind in kinds:
        alike = times[times["kind"] == kind]
        mine, sized = alike[alike["family"] == family], alike.dropna(subset=["parameters"])
        if mine.empty and size is not None and not sized.empty:
            distance = np.log(sized["parameters"] / size).abs()
            mine = sized[sized["family"] == sized["family"].iloc[int(distance.argmin())]]
            mine = mine.assign(seconds=mine["seconds"] * size / mine["parameters"])
        found.append(mine)
    return pd.concat(found)


def seconds_of(times: pd.DataFrame, missing: Mapping[str, int]) -> float:
    """Return how long missing work takes, one thing after another: the sum of the medians of its kinds."""
    medians = times.groupby("kind")["seconds"].median()
    return float((medians * pd.Series(missing, dtype=float)).sum())


def _kind(manifest: Mapping[str, Any]) -> str | None:
    stage, recipe = manifest["stage"], manifest["recipe"]
    if stage == "scores":
        return SCORES.format(recipe["scorer"], recipe["split"])
    if stage == "models" and MADE_BY.isdisjoint(recipe):
        return None
    return STAGES[stage]

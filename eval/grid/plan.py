"""What a grid will do and cost: for each family its models, memory, disk and hours, before anything is loaded."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from rich.table import Table

from alignmerge.engine import hub
from alignmerge.engine.compatibility import open_checkpoints
from alignmerge.engine.family import public
from alignmerge.engine.faults import BadRequest, Fault
from alignmerge.engine.manifest import ROOT
from alignmerge.engine.merger import Merger
from alignmerge.engine.store import NotMade
from alignmerge.method import SIDES, AlignMerge
from alignmerge.zoo.training import Recipe
from alignmerge.zoo.zoo import Zoo
from eval.grid import costs
from eval.grid.cells import Cell
from eval.grid.costs import MACHINES, Machine, Tensors, Work
from eval.scorers.geometry import Geometry
from eval.scorers.subject import REPLY_TOKENS

if TYPE_CHECKING:
    from rich.console import Console

    from eval.grid.experiment import Experiment

ARCHITECTURES = ROOT / "conf" / "architectures"
"""``org/name.json``: what the config.json of a public model says of its shapes."""
PROMPTS = {"dev": 184, "test": 829}
"""Prompts of a split of conf/corpus/packaged.yaml, where the corpus has not been made yet."""
EXAMPLES = 96
"""Examples of the set that a statistic sees."""
EXAMPLE_TOKENS, PROMPT_TOKENS = 60, 60
"""Tokens of a training or statistics example, and of a rendered prompt, on average (SmolLM2's lessons: 27 to 48)."""
CERTIFICATE_PRODUCTS = 5
"""Products with a basis that AlignMerge's certificate takes for each matrix, and three more for each model merged."""
GIB = 2**30


class Job(NamedTuple):
    """The part of a grid that runs on one family with one seed."""

    zoo: Zoo
    cells: Sequence[Cell]


class Needs(NamedTuple):
    """What one family costs."""

    tensors: Tensors
    disk: Mapping[str, int]
    """Purpose -> bytes, for all seeds."""
    memory: Mapping[str, int]
    """Stage -> peak bytes of one process."""
    work: Mapping[str, Work]
    """Stage -> what has to be done, for all seeds."""


def print_plan(experiment: Experiment, out: Console) -> None:
    """Print models, disk, memory and hours of every family of a grid; nothing is made or loaded.

    Raises:
        BadRequest: with the conflicts of all families between the models that are at hand and, where the Hub is
            switched on, with every model that it would refuse.
    """
    jobs = jobs_of(experiment)
    faults: list[Fault] = []
    found: dict[str, Needs] = {}
    for zoo in experiment.first_seed:
        name = zoo.family.name
        try:
            folders = present(zoo)
            tensors, source = shapes(zoo, folders)
            size = f"{tensors.parameters:,} parameters" if tensors is not None else "size not known yet"
            out.print("\n".join([f"{name}: {size} ({source})", *_model_lines(zoo, folders)]), highlight=False)
            faults += _refusals(zoo, folders)
            if tensors is not None:
                found[name] = needs_of([job for job in jobs if job.zoo.family.name == name], tensors, folders)
        except BadRequest as error:
            faults += error.faults
    if faults:
        raise BadRequest(dict.fromkeys(faults))
    if found:
        out.print(_bytes_table("Disk (GiB), all seeds", {name: needs.disk for name, needs in found.items()}))
        out.print(
            _bytes_table(
                "Peak memory of a process (GiB)", {name: needs.memory for name, needs in found.items()}
            )
        )
        for machine in MACHINES:
            out.print(_hours_table(machine, found))
        out.print("\n".join(assumptions()), highlight=False)


def jobs_of(experiment: Experiment) -> list[Job]:
    """Return the cells of a grid by family and seed; the first setting of a row stands for the one to be selected."""
    cells = [*experiment.gate_cells(), *experiment.dev_cells(), *experiment.reported(experiment.provisional())]
    cells += experiment.trajectory_cells()
    return [Job(zoo, [cell for cell in cells if cell.zoo is zoo]) for zoo in experiment.zoos]


def present(zoo: Zoo) -> dict[str, Path]:
    """Return the folders of the models that are at hand; nothing is fetched or made.

    Raises:
        BadRequest: with every reference that is wrong.
    """
    frozen = zoo.frozen()
    folders: dict[str, Path] = {}
    faults: list[Fault] = []
    for key, reference in zoo.family.references().items():
        try:
            made = _made_here(reference)
            folders[key] = frozen.source(key).folder if made else frozen.assets.path(reference, f"family.{key}")
        except NotMade:
            continue
        except BadRequest as error:
            faults += error.faults
    if faults:
        raise BadRequest(faults)
    return folders


def shapes(zoo: Zoo, folders: Mapping[str, Path]) -> tuple[Tensors | None, str]:
    """Return the shapes of a family's base with where they are known from, or None where they are not known yet.

    Raises:
        BadRequest: with every conflict between the models in ``folders``.
    """
    opened = open_checkpoints(folders)
    if "base" in opened:
        known = f"headers; {len(opened)} of {len(zoo.family.references())} models are here and agree"
        return costs.tensors_of(opened["base"]), known
    if zoo.family.base.startswith("hub:"):
        config = ARCHITECTURES / f"{hub.parse(zoo.family.base, 'family.base').name}.json"
        if config.is_file():
            return costs.tensors_from(config), str(config.relative_to(ROOT))
    return None, "the base is not here yet"


def _refusals(zoo: Zoo, folders: Mapping[str, Path]) -> list[Fault]:
    """Return what the Hub would refuse of the models that are to be fetched; it is asked only where it is on."""
    references = zoo.family.references().items()
    remote = {f"family.{key}": ref for key, ref in references if key not in folders and ref.startswith("hub:")}
    if not remote or os.environ.get(hub.ONLINE) is None:
        return []
    return hub.refusals({where: hub.parse(reference, where) for where, reference in remote.items()})


def needs_of(jobs: Sequence[Job], tensors: Tensors, folders: Mapping[str, Path]) -> Needs:
    """Return what a family costs in all its seeds."""
    zoo = jobs[0].zoo
    sizes = {key: _bytes(tensors, reference) for key, reference in zoo.family.references().items()}
    remote = [key for key, reference in zoo.family.references().items() if not reference.startswith("zoo:")]
    kept = [_statistics(job) for job in jobs]
    disk = {
        "to fetch": sum(sizes[key] for key in remote if key not in folders),
        "made here": sum(bool(job.cells) for job in jobs)
        * sum(sizes[key] for key in sizes if key not in remote),
        "statistics": sum(one.bytes(tensors) for one in kept),
        "each merge": tensors.disk_bytes,
    }
    sides = sorted({side for one in kept for _, side in one.bases})
    return Needs(tensors, disk, _memory(zoo, tensors, sides), _work(jobs, tensors, sum(sizes.values())))


def assumptions() -> list[str]:
    """Return what the hours rest on, in words."""
    lines = [
        f"{m.name}: {m.flops / 1e12:g} TFLOP/s at {m.utilisation:.0%} in passes, {m.fp32_flops / 1e12:g} in fp32 "
        f"linear algebra, weights read at {m.memory / 1e9:g} GB/s from memory and {m.disk / 1e9:g} GB/s from disk"
        for m in MACHINES
    ]
    return [
        *(f"assumed: {line}" for line in lines),
        f"assumed: {PROMPT_TOKENS} tokens a prompt, {REPLY_TOKENS} a reply, {EXAMPLE_TOKENS} an example; {EXAMPLES} "
        f"examples a statistic; {costs.PASS_FLOPS} FLOP a parameter and token in training and statistics; one thing "
        "after another; activations are not in the memory, downloads not in the hours",
    ]


class Statistics(NamedTuple):
    """What the methods and scorers of a job keep in the store."""

    diagonals: frozenset[tuple[str, str]]
    """(point, example set) of each pass for a diagonal or a gradient."""
    bases: frozenset[tuple[str, str]]
    """(point, side) of each set of Kronecker bases."""

    def bytes(self, tensors: Tensors) -> int:
        """Size in the store, at most."""
        bases = sum(costs.basis_bytes(tensors, side) for _, side in self.bases)
        return len(self.diagonals) * costs.diagonal_bytes(tensors) + bases

    def work(self, tensors: Tensors) -> Work:
        """What making them takes."""
        tokens = EXAMPLES * EXAMPLE_TOKENS
        passes = costs.passing(tensors, tokens).times(len(self.diagonals))
        return passes.plus(
            *(costs.factoring(tensors, side, costs.MOMENTS * tokens) for _, side in sorted(self.bases))
        )


def _statistics(job: Job) -> Statistics:
    diagonals: set[tuple[str, str]] = set()
    bases: set[tuple[str, str]] = set()
    for merger in _distinct(job.cells):
        point = getattr(merger, "at", "base")
        for name in merger.data:
            own = [(alias, alias) for alias in ("anchor", *job.zoo.family.experts)]
            diagonals |= set(own) if name == "*" else {(point, name)}
        if isinstance(merger, AlignMerge) and merger.estimator == "kronecker":
            bases |= {(point, side) for side in SIDES[merger.factors]}
    if any(isinstance(scorer, Geometry) for cell in job.cells for scorer in cell.scorers):
        diagonals.add(("base", "metric"))
        bases.add(("base", "input"))
    return Statistics(frozenset(diagonals), frozenset(bases))


def _work(jobs: Sequence[Job], tensors: Tensors, family_bytes: int) -> dict[str, Work]:
    """Return stage -> work, summed over the seeds of a family."""
    total = {stage: Work() for stage in ("training", "statistics", "merging", "scoring")}
    for job in jobs:
        for recipe in _recipes(job.zoo) if job.cells else ():
            total["training"] = total["training"].plus(_training(tensors, recipe))
        kept = _statistics(job)
        total["statistics"] = total["statistics"].plus(kept.work(tensors))
        read = family_bytes + kept.bytes(tensors)
        for cell in job.cells:
            if cell.merger is not None:
                total["merging"] = total["merging"].plus(_merging(job.zoo, cell.merger, tensors, family_bytes))
            total["scoring"] = total["scoring"].plus(_scoring(job.zoo, cell, tensors, read))
    return total


def _training(tensors: Tensors, recipe: Recipe) -> Work:
    written = Work(disk=2 * costs.FP32_BYTES * tensors.parameters)  # the base is read, the result is written
    return costs.passing(tensors, recipe.steps * recipe.batch * EXAMPLE_TOKENS).plus(written)


def _merging(zoo: Zoo, merger: Merger, tensors: Tensors, family_bytes: int) -> Work:
    """One merge, with the products of AlignMerge's shield and certificate."""
    work = costs.merging(family_bytes, tensors.disk_bytes)
    if isinstance(merger, AlignMerge) and merger.estimator == "kronecker":
        certified = CERTIFICATE_PRODUCTS + 3 * (1 + len(zoo.family.experts)) if merger.certificate else 0
        for side in SIDES[merger.factors]:
            work = work.plus(
                costs.shielding(tensors, side, 2 + certified), Work(disk=costs.basis_bytes(tensors, side))
            )
    return work


def _scoring(zoo: Zoo, cell: Cell, tensors: Tensors, relative_bytes: int) -> Work:
    """One model on one split; scorers of distances read all models and statistics of the family again."""
    work = costs.scoring(tensors, _prompts(zoo, cell.split), PROMPT_TOKENS, REPLY_TOKENS, zoo.family.batch_size)
    again = sum(scorer.relative for scorer in cell.scorers)
    return work.plus(Work(disk=again * relative_bytes))


def _memory(zoo: Zoo, tensors: Tensors, sides: Sequence[str]) -> dict[str, int]:
    """Return stage -> peak bytes of one process."""
    blocks, whole = costs.merge_bytes(tensors, len(zoo.family.references()))
    cache = zoo.family.batch_size * zoo.family.max_length * tensors.cache_bytes
    recipes = _recipes(zoo)
    matrices = costs.diagonal_bytes(tensors) // costs.FP32_BYTES
    trained = [
        costs.adapter_size(tensors, r.adapter.rank) if r.adapter is not None else matrices for r in recipes
    ]
    return {
        "merge": blocks,
        "merge, whole": whole,
        "statistics": costs.statistics_bytes(tensors, sides),
        "scoring": tensors.disk_bytes + cache,
        "training": costs.training_bytes(tensors, max(trained)) if trained else 0,
    }


def _recipes(zoo: Zoo) -> list[Recipe]:
    """Return the recipes of the models that are trained here."""
    names = [r.removeprefix("zoo:") for r in zoo.family.references().values() if r.startswith("zoo:")]
    return [zoo.family.recipes[name] for name in names if isinstance(zoo.family.recipes[name], Recipe)]


def _prompts(zoo: Zoo, split: str) -> int:
    """Return how many prompts a split has, counted where the corpus is at hand."""
    try:
        folder = zoo.frozen().prompts.path / split
    except NotMade:
        return PROMPTS[split]
    return sum(len(path.read_bytes().splitlines()) for path in folder.glob("*.jsonl"))


def _distinct(cells: Sequence[Cell]) -> list[Merger]:
    return list(dict.fromkeys(cell.merger for cell in cells if cell.merger is not None))


def _bytes(tensors: Tensors, reference: str) -> int:
    """Size of a model of the family: what is trained here is kept in fp32."""
    return tensors.parameters * costs.FP32_BYTES if reference.startswith("zoo:") else tensors.disk_bytes


def _made_here(reference: str) -> bool:
    return reference.startswith("zoo:") or reference.endswith(".gguf")


def _model_lines(zoo: Zoo, folders: Mapping[str, Path]) -> list[str]:
    """Return a line for each model: what it is, and whether it is here."""
    lines = []
    for key, reference in zoo.family.references().items():
        state = "here" if key in folders else "to be made" if _made_here(reference) else "to be fetched"
        if reference.startswith("hub:"):
            commit = hub.commit_of(hub.parse(reference, f"family.{key}"), f"family.{key}")
            state += ", no commit locked yet" if commit is None else f", commit {commit[:12]}"
        lines.append(f"  {key}: {public(reference)} ({state})")
    return lines


def _bytes_table(title: str, rows: Mapping[str, Mapping[str, int]]) -> Table:
    cells = {
        name: [f"{size / GIB:.1f}" if size else "-" for size in sizes.values()] for name, sizes in rows.items()
    }
    return _table(title, list(next(iter(rows.values()))), cells)


def _hours_table(machine: Machine, found: Mapping[str, Needs]) -> Table:
    stages = [*next(iter(found.values())).work, "all"]
    hours = {name: [work.hours(machine) for work in needs.work.values()] for name, needs in found.items()}
    hours["all"] = [sum(column) for column in zip(*hours.values(), strict=True)]
    cells = {name: [f"{value:.1f}" for value in (*values, sum(values))] for name, values in hours.items()}
    return _table(f"Hours on {machine.name}, all seeds", stages, cells)


def _table(title: str, columns: Sequence[str], rows: Mapping[str, Sequence[str]]) -> Table:
    table = Table("family", title=title, title_justify="left")
    for column in columns:
        table.add_column(column, justify="right")
    for name, cells in rows.items():
        table.add_row(name, *cells)
    return table

"""What a grid will do and need: models, disk and memory from headers, hours from recorded times."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import pandas as pd
from rich.console import Console
from rich.table import Column, Table

from alignmerge.engine import hub
from alignmerge.engine.compatibility import allowed_differences, open_checkpoints
from alignmerge.engine.family import Family, public
from alignmerge.engine.faults import BadRequest, Fault
from alignmerge.engine.manifest import ROOT
from alignmerge.zoo.training import Recipe
from alignmerge.zoo.zoo import Zoo
from eval.grid import costs, work
from eval.grid.costs import Tensors
from eval.grid.experiment import Experiment
from eval.grid.work import Job

ARCHITECTURES = ROOT / "conf" / "architectures"
"""``org/name.json``: what the config.json of a public model says of its shapes."""
DISK = ("to fetch", "made here", "statistics", "each merge")
MEMORY = ("merge", "merge, whole", "statistics", "scoring", "training")
WORK = ("models to make", "cells to measure", "hours", "by the times of")
GIB = 2**30


def print_plan(experiment: Experiment, out: Console, workers: int) -> None:
    """Print models, disk, memory and hours of every family of a grid; nothing is made or loaded.

    Raises:
        BadRequest: with the conflicts of all families between the models that are at hand and, where
        the
            Hub is switched on, with every model that it would refuse.
    """
    jobs = work.jobs_of(experiment)
    faults: list[Fault] = []
    sizes: dict[str, int | None] = {}
    disk = _table("Disk (GiB), all seeds", DISK)
    memory = _table("Peak memory of a process (GiB)", MEMORY)
    for zoo in experiment.first_seed:
        name = zoo.family.name
        try:
            folders = work.present(zoo)
            tensors, source = shapes(zoo, folders)
            faults += _refusals(zoo, folders)
        except BadRequest as error:
            faults += error.faults
            continue
        size, sizes[name] = "size not known yet", None
        if tensors is not None:
            on_disk, in_memory = needs_of(_of(jobs, name), tensors, folders)
            disk.add_row(name, *map(_gib, on_disk))
            memory.add_row(name, *map(_gib, in_memory))
            size, sizes[name] = f"{tensors.parameters:,} parameters", tensors.parameters
        lines = [f"{name}: {size} ({source})", *_model_lines(zoo, folders), *_setting_lines(zoo, folders)]
        out.print("\n".join(lines), highlight=False)
    if faults:
        raise BadRequest(dict.fromkeys(faults))
    if disk.row_count:
        out.print(disk, memory, sep="\n")
    _print_work(experiment, jobs, sizes, workers, out)


def shapes(zoo: Zoo, folders: Mapping[str, Path]) -> tuple[Tensors | None, str]:
    """Return the shapes of a family's base (None: not known yet), and what they are known from.

    Raises:
        BadRequest: with every conflict between the models in ``folders``.
    """
    opened = open_checkpoints(folders, zoo.family.allow_config_differences)
    if "base" in opened:
        known = f"headers; {len(opened)} of {len(zoo.family.references())} models are here and agree"
        return costs.tensors_of(opened["base"]), known
    if zoo.family.base.startswith("hub:"):
        config = ARCHITECTURES / f"{hub.parse(zoo.family.base, 'family.base').name}.json"
        if config.is_file():
            return costs.tensors_from(config), str(config.relative_to(ROOT))
    return None, "the base is not here yet"


def _refusals(zoo: Zoo, folders: Mapping[str, Path]) -> list[Fault]:
    """Return what the Hub, where it is on, would refuse of the models to be fetched."""
    remote = {}
    for key, reference in zoo.family.references().items():
        if key not in folders and reference.startswith("hub:") and hub.ONLINE in os.environ:
            remote[f"family.{key}"] = hub.parse(reference, f"family.{key}")
    return hub.refusals(remote) if remote else []


def needs_of(jobs: Sequence[Job], tensors: Tensors, folders: Iterable[str]) -> tuple[list[int], list[int]]:
    """Return the bytes that a family needs, by the purposes of ``DISK`` and the stages of ``MEMORY``.

    ``jobs`` are the family's, one for each seed; the models under the keys ``folders`` need not be
    fetched.
    """
    family = jobs[0].zoo.family
    fetched = made = kept = seeds = 0
    sides = set()
    for zoo, cells in jobs:
        diagonals, bases = work.statistics_of(zoo, cells)
        seeds += bool(cells)
        kept += len(diagonals) * costs.diagonal_bytes(tensors)
        for _, side in bases:
            kept += costs.basis_bytes(tensors, side)
            sides.add(side)
    for key, reference in family.references().items():
        if reference.startswith("zoo:"):  # trained in fp32 and kept so
            made += seeds * tensors.parameters * costs.FP32_BYTES
        elif key not in folders:
            fetched += tensors.disk_bytes
    merging = costs.merge_bytes(tensors, len(family.references()))
    scoring = tensors.disk_bytes + family.batch_size * family.max_length * tensors.cache_bytes
    memory = [*merging, costs.statistics_bytes(tensors, sides), scoring, _training(family, tensors)]
    return [fetched, made, kept, tensors.disk_bytes], memory


def _training(family: Family, tensors: Tensors) -> int:
    """Return the peak bytes of training a model of the family; 0 where none is trained."""
    peak = 0
    for key in family.references():
        recipe = family.recipe_of(key)
        if isinstance(recipe, Recipe):
            trained = costs.diagonal_bytes(tensors) // costs.FP32_BYTES
            if recipe.adapter is not None:
                trained = costs.adapter_size(tensors, recipe.adapter.rank)
            peak = max(peak, costs.training_bytes(tensors, trained))
    return peak


def _model_lines(zoo: Zoo, folders: Mapping[str, Path]) -> list[str]:
    """Return a line for each model: what it is, and whether it is here."""
    lines = []
    for key, reference in zoo.family.references().items():
        state = "to be made" if work.made_here(reference) else "to be fetched"
        if key in folders:
            state = "here"
        if reference.startswith("hub:"):
            commit = hub.commit_of(hub.parse(reference, f"family.{key}"), f"family.{key}")
            state += ", no commit locked yet" if commit is None else f", commit {commit[:12]}"
        lines.append(f"  {key}: {public(reference)} ({state})")
    return lines


def _setting_lines(zoo: Zoo, folders: Mapping[str, Path]) -> list[str]:
    """Return a line for each setting in which the models that are merged may differ, and do."""
    opened = open_checkpoints(folders, zoo.family.allow_config_differences)
    opened.pop("pretrained", None)
    if "base" not in opened:
        return []
    base = opened.pop("base")
    return [f"  {line}" for line in allowed_differences(base, opened.values())]


def _print_work(
    experiment: Experiment, jobs: Sequence[Job], sizes: Mapping[str, int | None], workers: int, out: Console
) -> None:
    """Print how much is to be done, how long it will take, and what that rests on.

    ``sizes``: family -> number of parameters, None where that is not known yet.
    """
    times = work.recorded(experiment.zoos[0].store.root)
    table = _table("Work, all seeds", WORK)
    unknown, used = set[str](), set[int]()
    for name, size in sizes.items():
        todo = work.work_of(experiment, _of(jobs, name))
        mine = work.times_for(times, todo.missing, name, size)
        hours = f"{work.seconds_of(mine, todo.missing) / workers / 3600:.2f}"
        untimed = todo.missing.keys() - set(mine["kind"])
        if untimed:
            hours = "-" if mine.empty else f"> {hours}"
        counts = "{} of {}".format(*todo.models), "{} of {}".format(*todo.cells)
        table.add_row(name, *counts, hours, _sources(mine, name))
        unknown |= untimed
        used.update(mine.index)
    out.print(table)
    if used:
        machines = ", ".join(times.loc[sorted(used), "machine"].unique())
        basis = f"{len(used)} finished artifacts recorded ({machines})"
        out.print(f"hours: by the median seconds that {basis}, with workers={workers}", highlight=False)
    if unknown:
        reason = "no time recorded yet, or no size known to scale it by"
        out.print(f"not in the hours ({reason}): {', '.join(sorted(unknown))}", highlight=False)


def _sources(times: pd.DataFrame, family: str) -> str:
    """Say which families' times an estimate rests on."""
    sources = []
    for name, size in times.groupby("family")["parameters"].max().items():
        other = f"scaled from {name}, {size / 1e6:.2f} M parameters"
        sources.append("its own" if name == family else other)
    return "; ".join(sources) or "-"


def _of(jobs: Sequence[Job], family: str) -> list[Job]:
    return [job for job in jobs if job.zoo.family.name == family]


def _gib(size: int) -> str:
    return f"{size / GIB:.1f}" if size else "-"


def _table(title: str, columns: Sequence[str]) -> Table:
    numbers = [Column(name, justify="right") for name in columns]
    return Table("family", *numbers, title=title, title_justify="left")

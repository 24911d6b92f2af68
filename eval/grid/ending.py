"""The end of a run on the terminal: its table, its verdict, and what to look at or to do next."""

from __future__ import annotations

from pathlib import Path

from alignmerge.engine.progress import OUT, say
from eval.grid.experiment import Gates
from eval.grid.folders import committed, read_manifest, word_of
from eval.grid.gates import missed
from eval.report.agreement import agreement, said
from eval.report.main_table import show
from eval.report.verdict import verdict

MODELS = "family.base=DIR family.anchor=DIR 'family.experts={math: DIR}'"
ONE_S_OWN = f"python run.py mode=merge family=local {MODELS} out=DIR"
"""What is next where everything went well: models of one's own."""


def conclude(folder: Path, gates: Gates, *, failed: bool) -> None:
    """Print the end of an experiment whose results lie in ``folder``; some of its work may have failed."""
    show(folder)
    for line in verdict(folder):
        say(line)
    _say_gates(gates)
    say_where(folder)
    differs, reference = False, committed(folder.parent, folder.name)
    if reference is not None:
        read_manifest(reference)  # refuses a damaged one in a plain line
        found = agreement(folder, reference)
        differs = bool(found.different)
        for line in said(found, reference):
            say(line)
    say(f"next: {_next(folder.name, failed=failed, differs=differs)}")


def conclude_cell(folder: Path) -> None:
    """Print the end of a single cell: its table, and where it lies."""
    show(folder)
    say_where(folder)


def say_where(folder: Path) -> None:
    """Print where the page of a results folder is."""
    say(f"report: {folder}/report.html (beside it claims.csv, table.md with intervals, summary.csv, figures/)")


def _say_gates(gates: Gates) -> None:
    lines, total = missed(gates), sum(map(len, gates.values()))
    if total:
        say(f"gates (dev split): {total - len(lines)} of {total} met")
    for line in lines:  # they inform: the run has gone on
        OUT.print(f"gate missed: {line}", style="bold red", highlight=False, markup=False)


def _next(name: str, *, failed: bool, differs: bool) -> str:
    """Return the one command to try next."""
    if failed:
        return f"python run.py mode=status experiment={word_of(name)}"
    if differs:
        return f"python run.py mode=verify experiment={word_of(name)}"
    if name == "smoke":
        return "python run.py experiment=tiny"
    return ONE_S_OWN

"""From a run's results to the committed ones: only when asked, and only what others can make again."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from alignmerge.engine.faults import BadRequest, Fault, refuse
from alignmerge.engine.manifest import ROOT
from alignmerge.engine.merger import Merger
from eval import stats
from eval.grid.experiment import Experiment
from eval.grid.folders import (
    COMMITTED,
    REFERENCE,
    folder_of_run,
    read_manifest,
    recorded_of,
    replace_folder,
    word_of,
)
from eval.grid.grid import AT, MATCHED
from eval.grid.record import of_method, of_scorer
from eval.report.ledger import read_ledger
from eval.report.main_table import block, names, splice
from eval.report.results_page import results_page

NAMED = 3
"""How many missing rows are spelled out."""


def commit_results(experiment: Experiment, results: Path) -> Path:
    """Copy an experiment's results to ``<results>/reference``, refresh README and docs/results.md, return the folder.

    Raises:
        BadRequest: with everything that speaks against it: results of uncommitted code or of other kernels than
            the fixed ones, of other settings or older statistics than the code's, rows or gates that are missing.
    """
    name = experiment.grid.name
    source = folder_of_run(results, name)
    if not source.is_dir():
        raise BadRequest.of(
            "experiment", f"no results in {source}", f"experiment={word_of(name)} without a mode first"
        )
    manifest = read_manifest(source)
    refuse([*_not_for_others(manifest), *_outdated(manifest, experiment), *_incomplete(manifest, experiment)])
    folder = results / REFERENCE / name
    replace_folder(source, folder, manifest, without=spare_pictures)
    _refresh_pages(folder)
    return folder


def _not_for_others(manifest: Mapping[str, Any]) -> list[Fault]:
    """Return why others could not make these results again."""
    faults, again = [], "results of a commit, with nothing changed beside it"
    if not manifest["git"]:
        faults.append(Fault("git", "no commit is recorded", again))
    elif manifest["git"]["dirty"]:
        faults.append(Fault("git", "files were changed or new when the results were made", again))
    for variable, value in manifest.get("overridden", {}).items():
        faults.append(Fault(variable, value or "not set", "the kernels that run.py fixes"))
    return faults


def _outdated(manifest: Mapping[str, Any], experiment: Experiment) -> list[Fault]:
    """Return which settings and versions are not those of the code and the experiment."""
    found, again = manifest.get("statistics"), "run the experiment again"
    faults = []
    if found != stats.VERSION:
        faults.append(Fault("statistics", f"version {found}", f"version {stats.VERSION}: {again}"))
    recorded = manifest.get("scorers", {})
    for scorer in experiment.scorers:
        if recorded.get(scorer.name) != of_scorer(scorer):
            faults.append(Fault(f"scorer.{scorer.name}", "not as in the results", again))
    return faults


def _incomplete(manifest: Mapping[str, Any], experiment: Experiment) -> list[Fault]:
    """Return which rows, scores and gates the results lack, and which rows stand at settings that
    nobody tries.
    """
    missing = [*_missing_rows(manifest, experiment), *_missing_gates(manifest, experiment)]
    told = missing[:NAMED]
    if len(missing) > NAMED:
        told.append(f"{len(missing) - NAMED} more")
    return [Fault("results", f"missing: {one}", "finished results") for one in told]


def _missing_rows(manifest: Mapping[str, Any], experiment: Experiment) -> list[str]:
    missing = []
    for cell in [*experiment.reported(experiment.provisional()), *experiment.trajectory_cells()]:
        row = recorded_of(manifest, cell.family, cell.seed).get("rows", {}).get(cell.row, {})
        place = f"{cell.family}, seed {cell.seed}: {cell.row}"
        if cell.row in manifest.get("left_out", {}).get(cell.family, []):
            continue  # no setting was eligible, or near enough to the matched rate
        if not {scorer.name for scorer in cell.scorers} <= set(row.get("scores", {})):
            missing.append(place)
        elif "method" in row and row["method"] not in _settings(experiment, cell.row):
            missing.append(f"{place} at a setting of the experiment")
    return missing


def _settings(experiment: Experiment, row: str) -> list[Mapping[str, Any]]:
    """Return the methods, with all fields, that a row may report."""
    mergers: list[Merger] = []
    for name in experiment.grid.rows:
        if row in (name, name + MATCHED) or row.startswith(name + AT):
            mergers += experiment.candidates(name)
    return list(map(of_method, mergers))


def _missing_gates(manifest: Mapping[str, Any], experiment: Experiment) -> list[str]:
    missing = []
    for zoo in experiment.own_zoos:
        found = recorded_of(manifest, zoo.family.name, zoo.seed).get("gates", [])
        judged = {gate["name"] for gate in found if gate["measured"] is not None}
        for name in experiment.grid.gates:
            if name not in judged:
                missing.append(f"{zoo.family.name}, seed {zoo.seed}: gate {name}")
    return missing


def spare_pictures(folder: str, names: list[str]) -> list[str]:
    """Return what is not committed: pictures of single families and the SVGs. ``report.html`` holds them all."""
    return [name for name in names if Path(folder).name == "figures" and not name.endswith(".png")]


def _refresh_pages(folder: Path) -> None:
    """Make the README's block and docs/results.md anew, where the results are this project's own."""
    if folder.resolve().parent != COMMITTED:
        return
    readme, page = ROOT / "README.md", ROOT / "docs" / "results.md"
    text = readme.read_text(encoding="utf-8")
    if folder.name in names(text):
        readme.write_text(splice(text, folder.name, block(folder)), encoding="utf-8")
    page.write_text(results_page(COMMITTED, read_ledger()), encoding="utf-8")

"""What ``run.py`` can do: run, plan, status, report, reference, verify, merge, score."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from rich.table import Table

from alignmerge.engine.checkpoint import Checkpoint
from alignmerge.engine.compatibility import allowed_differences
from alignmerge.engine.configuration import build, choices, nearest
from alignmerge.engine.destination import ALLOWED, check_room, claimed, free_path
from alignmerge.engine.faults import BadRequest, Fault, NoRoom
from alignmerge.engine.hub import snapshot_in
from alignmerge.engine.manifest import all_versions, git_state
from alignmerge.engine.merge import Merge
from alignmerge.engine.merger import Merger
from alignmerge.engine.progress import OUT, Board
from alignmerge.engine.store import NotMade, write_json
from eval.grid.ending import conclude, conclude_cell
from eval.grid.experiment import Experiment
from eval.grid.folders import folder_of_run
from eval.grid.forecast import forecast_of
from eval.grid.notes import note, of_given_models
from eval.grid.plan import print_plan
from eval.grid.reference import commit_results
from eval.grid.request import CONF, Config, check_parts, experiment_of, scorers_of, zoo_of
from eval.grid.results import Findings
from eval.grid.scoring import score_folder
from eval.grid.selection import Choice, choose, finished_choice
from eval.grid.verify import tell, verification_of
from eval.grid.workers import Failure, Workers

WHOLE = {"seed": 0, "workers": 1}
"""Keys with a whole number, and the least that is allowed."""
PATHS = {"store": False, "results": False, "model": True, "out": True}
"""Keys with a path, and whether it may be null."""


def dispatch(config: Config) -> int:
    """Run the mode that the config names and return the exit code.

    Raises:
        BadRequest: if the request or an input is wrong.
    """
    modes = {mode.__name__: mode for mode in (run, plan, status, report, reference, verify, merge, score)}
    BadRequest.gathered({"top": lambda: _check(config, modes), "parts": lambda: check_parts(config)})
    return modes[config["mode"]](config)


def _check(config: Config, modes: Mapping[str, Any]) -> None:
    faults = [Fault(key, "deleted", "a value") for key in ("mode", "grid", *WHOLE, *PATHS) if key not in config]
    mode = str(config.get("mode"))
    if mode not in modes:
        faults.append(Fault("mode", mode, nearest(mode, set(modes))))
    for key, least in WHOLE.items():
        value = config.get(key, least)
        if not isinstance(value, int) or isinstance(value, bool) or value < least:
            faults.append(Fault(key, repr(value), f"a whole number of at least {least}"))
    for key, optional in PATHS.items():
        value = config.get(key, "deleted")
        if not (isinstance(value, str) and value) and not (optional and value is None):
            faults.append(Fault(key, repr(value), "a path"))
    if faults:
        raise BadRequest(faults)


def run(config: Config) -> int:
    """Do what is missing of an experiment (or of one cell) and report."""
    experiment = experiment_of(config)
    experiment.check()
    folder = _results_of(config, experiment)
    with Workers(config["workers"], forecast_of(experiment, config["workers"])) as workers:
        failures = experiment.make_models(workers)
        if failures:
            return _end(failures)
        for zoo in experiment.first_seed:
            note(of_given_models(zoo))
        failures = experiment.make(workers, experiment.dev_split())
        choice = choose(experiment, experiment.read(experiment.choice_cells()))
        cells = experiment.reported(choice.mergers)
        failures += experiment.make(workers, [*cells, *experiment.trajectory_cells()])
    findings = _findings(experiment, choice)
    if findings.rows:
        findings.publish(folder)
        _conclude(config, findings, folder, failed=bool(failures))
    return _end(failures)


def report(config: Config) -> int:
    """Write the report again from what the store holds."""
    experiment = experiment_of(config)
    folder = _results_of(config, experiment)
    try:
        findings = _findings(experiment, finished_choice(experiment))
    except NotMade:
        findings = None
    if findings is None or not findings.rows:
        raise BadRequest.of("mode", "report, and the store holds no finished experiment", "mode=run first")
    findings.publish(folder)
    _conclude(config, findings, folder, failed=False)
    return 0


def reference(config: Config) -> int:
    """Make the results of a finished run the committed ones of the experiment."""
    folder = commit_results(_named(config), Path(config["results"]))
    OUT.print(f"committed results in {folder}", highlight=False)
    return 0


def verify(config: Config) -> int:
    """Make what the committed manifest names, where it is not in the store, and compare it."""
    verification = verification_of(_named(config), Path(config["results"]))
    with Workers(config["workers"]) as workers:
        failures = verification.make(workers)
    verified = tell(verification, verification.outcomes())
    return max(_end(failures), int(not verified))


def status(config: Config) -> int:
    """List what is done, failed and missing."""
    experiment = experiment_of(config)
    cells, finished = experiment.dev_split(), set()
    try:
        chosen = finished_choice(experiment).mergers
        finished = {cell.label for cell in experiment.choice_cells()}  # which it has read
        cells += [*experiment.reported(chosen), *experiment.trajectory_cells()]
    except NotMade:
        cells += experiment.identity_cells("test", experiment.scorers)
    table = Table("family", "seed", "split", "row", "setting", "state", title=experiment.grid.name)
    counts = {"done": 0, "failed": 0, "missing": 0}
    for cell in cells:
        state, record = "missing", ""
        if cell.label in finished or experiment.read([cell]):
            state = "done"
        elif (failure := cell.zoo.store.failure("cells", cell.recipe)) is not None:
            state, record = "failed", f" ({failure})"
        counts[state] += 1
        table.add_row(cell.family, str(cell.seed), cell.split, cell.row, cell.setting, f"{state}{record}")
    OUT.print(table)
    OUT.print(", ".join(f"{count} {state}" for state, count in counts.items()))
    return 0


def plan(config: Config) -> int:
    """Say what will be done and what it needs, from headers alone; report every conflict at once."""
    experiment = experiment_of(config)
    experiment.check()
    OUT.print(experiment.grid.title)
    for zoo in experiment.first_seed:
        if zoo.family.note:
            OUT.print(f"note: {zoo.family.name}: {zoo.family.note}")
    dev, tests = experiment.dev_cells(), experiment.reported(experiment.provisional())
    OUT.print(f"{len(dev)} settings on the dev split, then {len(tests)} rows on the test split")
    print_plan(experiment, OUT, config["workers"])
    return 0


def merge(config: Config) -> int:
    """Merge once into ``out``: an ordinary Hugging Face folder with card and manifest."""
    makers: dict[str, Callable[[], Any]] = {
        "out": partial(_new_path, config), "zoo": partial(zoo_of, config),
        "merger": partial(build, config["method"], "method", Merger),
    }  # fmt: skip
    out, zoo, merger = BadRequest.gathered(makers).values()
    models = zoo.models()
    job = Merge(merger, zoo, models, config["seed"])
    check_room(out, "out", job.bytes)
    note(allowed_differences(models.base, models.pool))
    started = time.monotonic()
    with claimed(out, "out") as staging, Board() as board:
        folder = staging / out.name
        folder.mkdir()
        facts = job.write(folder, board.reporter("merge: tensors"))
        manifest = {"recipe": job.recipe, "facts": facts, "versions": all_versions(), "git": git_state()}
        write_json(folder / "manifest.json", manifest)
    seconds = time.monotonic() - started
    OUT.print(f"{out}: {len(job.models.base)} tensors in {seconds:.1f} s, sha256 {facts['digest']}")
    return 0


def score(config: Config) -> int:
    """Score one model folder: print a table, write JSON and lm-eval's task folder beside it."""
    makers: dict[str, Callable[[], Any]] = {
        "model": lambda: Checkpoint.open(_given_model(config), "model"),
        "out": partial(_new_path, config), "scorers": partial(scorers_of, config), "zoo": partial(zoo_of, config),
    }  # fmt: skip
    score_folder(**BadRequest.gathered(makers))
    return 0


def _findings(experiment: Experiment, choice: Choice) -> Findings:
    rows = experiment.read(experiment.reported(choice.mergers))
    steps = experiment.read(experiment.trajectory_cells())
    return Findings(experiment, choice, rows, steps, experiment.gate_verdicts())


def _named(config: Config) -> Experiment:
    """Return the experiment that the config names; a single cell has no committed results."""
    if config["grid"] is None:
        raise BadRequest.of("experiment", "not given", ", ".join(choices(CONF / "experiment")))
    return experiment_of(config)


def _results_of(config: Config, experiment: Experiment) -> Path:
    return folder_of_run(Path(config["results"]), experiment.grid.name)


def _conclude(config: Config, findings: Findings, folder: Path, *, failed: bool) -> None:
    if config["grid"] is None:
        conclude_cell(folder)
    else:
        conclude(folder, findings.gates, failed=failed)


def _given_path(config: Config, key: str, allowed: str) -> Path:
    if config[key] is None:
        raise BadRequest.of(key, "not given", allowed)
    return Path(config[key])


def _given_model(config: Config) -> Path:
    path = _given_path(config, "model", "a Hugging Face model folder")
    return snapshot_in(Path(os.path.expanduser(path)), "model")  # noqa: PTH111  (of no user: no error)


def _new_path(config: Config) -> Path:
    return free_path(_given_path(config, "out", ALLOWED), "out", outside=Path(config["store"]))


def _end(failures: list[Failure]) -> int:
    faults = [fault for one in failures if isinstance(one.error, BadRequest) for fault in one.error.faults]
    if faults:
        raise BadRequest(dict.fromkeys(faults))
    full = [str(one.error) for one in failures if isinstance(one.error, NoRoom)]
    for reason in full[:1]:  # once, however many cells it stopped, each of which found less room
        print(f"failed: {reason}", file=sys.stderr)
    for failure in failures:
        if not isinstance(failure.error, NoRoom):
            print(f"failed: {failure.label}: {failure.error}", file=sys.stderr)
    return int(bool(failures))

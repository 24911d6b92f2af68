"""What ``run.py`` can do: run, plan, status, report, merge, score."""

from __future__ import annotations

import math
import shutil
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.table import Table

from alignmerge.engine.assets import Assets
from alignmerge.engine.checkpoint import Checkpoint
from alignmerge.engine.configuration import TARGET, build, choices, nearest
from alignmerge.engine.family import Family
from alignmerge.engine.faults import BadRequest, Fault
from alignmerge.engine.manifest import ROOT, git_state, versions
from alignmerge.engine.merger import Merger
from alignmerge.engine.progress import OUT, Board
from alignmerge.engine.store import NotMade, Store, write_json
from alignmerge.zoo.corpus import Packaged
from alignmerge.zoo.toy import Toy
from alignmerge.zoo.world import World
from alignmerge.zoo.zoo import Zoo
from eval.columns import BOOTSTRAP
from eval.grid.cells import Cell, CellResult
from eval.grid.experiment import Choice, Experiment, method_files
from eval.grid.gates import missed
from eval.grid.grid import Grid, Row
from eval.grid.results import write_report
from eval.grid.workers import Failure, Workers
from eval.scorers.interface import Scorer

if TYPE_CHECKING:
    import pandas as pd

Config = Mapping[str, Any]
WHOLE = {"seed": 0, "workers": 1}
"""Keys with a whole number, and the least that is allowed."""
PATHS = {"store": False, "results": False, "model": True, "out": True}
"""Keys with a path, and whether it may be null."""


def dispatch(config: Config) -> int:
    """Run the mode that the config names and return the exit code.

    Raises:
        BadRequest: if the request or an input is wrong.
    """
    modes: dict[str, Callable[[Config], int]] = {
        "run": run, "plan": plan, "status": status, "report": report, "merge": merge, "score": score,
    }  # fmt: skip
    grid = [lambda: build(config["grid"], "grid", Grid)] if config.get("grid") is not None else []
    _all(
        lambda: _check(config, list(modes)),
        lambda: build(config.get("family", {}), "family", Family),
        lambda: _corpus(config),
        lambda: build(config.get("method", {}), "method", Merger),
        lambda: _scorers(config),
        *grid,
    )
    return modes[config["mode"]](config)


def _check(config: Config, modes: list[str]) -> None:
    """Refuse wrong values of the keys at the top."""
    faults = [Fault(key, "deleted", "a value") for key in ("mode", "grid", *WHOLE, *PATHS) if key not in config]
    if config.get("mode") not in modes:
        faults.append(Fault("mode", str(config.get("mode")), nearest(str(config.get("mode")), set(modes))))
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
    with Workers(config["workers"]) as workers:
        failures = experiment.make_models(workers)
        if failures:
            return _end(failures)
        failures = experiment.make(workers, [*experiment.gate_cells(), *experiment.dev_cells()])
        choice = experiment.choose(experiment.read(experiment.dev_cells()))
        cells = experiment.reported(choice)
        failures += experiment.make(workers, [*cells, *experiment.trajectory_cells()])
    measured = experiment.read(cells)
    if measured:
        _write(config, experiment, choice, measured)
    _print_missed_gates(experiment)
    return _end(failures)


def report(config: Config) -> int:
    """Write the report again from what the store holds."""
    experiment = experiment_of(config)
    try:
        choice, cells = _chosen(experiment)
        measured = experiment.read(cells)
    except NotMade:
        measured = []
    if not measured:
        raise BadRequest.of("mode", "report, and the store holds no finished experiment", "mode=run first")
    _write(config, experiment, choice, measured)
    return 0


def status(config: Config) -> int:
    """List what is done, failed and missing."""
    experiment = experiment_of(config)
    table = Table("family", "seed", "split", "row", "setting", "state", title=experiment.grid.name)
    dev = [*experiment.gate_cells(), *experiment.dev_cells()]
    try:
        cells = [*dev, *_chosen(experiment)[1], *experiment.trajectory_cells()]
    except NotMade:
        cells = [*dev, *experiment.identity_cells("test", experiment.scorers)]
    counts = {"done": 0, "failed": 0, "missing": 0}
    for cell in cells:
        state = _state(experiment, cell)
        counts[state.split()[0]] += 1
        table.add_row(cell.family, str(cell.seed), cell.split, cell.row, cell.setting, state)
    OUT.print(table)
    OUT.print(", ".join(f"{count} {state}" for state, count in counts.items()))
    return 0


def plan(config: Config) -> int:
    """Say what will be done and what it needs, from headers alone; report every conflict at once."""
    from eval.grid.plan import print_plan

    experiment = experiment_of(config)
    experiment.check()
    OUT.print(experiment.grid.title)
    for zoo in experiment.first_seed:
        if zoo.family.note:
            OUT.print(f"note: {zoo.family.name}: {zoo.family.note}")
    dev, tests = experiment.dev_cells(), experiment.reported(experiment.provisional())
    OUT.print(f"{len(dev)} settings on the dev split, then {len(tests)} rows on the test split")
    print_plan(experiment, OUT)
    return 0


def merge(config: Config) -> int:
    """Merge once into ``out``: an ordinary Hugging Face folder with card and manifest."""
    from alignmerge.zoo import workshop

    out, zoo, merger = _all(
        lambda: _new_path(config, "out"),
        lambda: zoo_of(config),
        lambda: build(config["method"], "method", Merger),
    )
    models = zoo.models()
    staging = out.parent / f".{out.name}.staging"
    shutil.rmtree(staging, ignore_errors=True)
    staging.mkdir(parents=True)
    try:
        started = time.monotonic()
        with Board() as board:
            facts = workshop.build(
                merger, zoo, models, config["seed"], staging, board.reporter("merge: tensors")
            )
        recipe = workshop.recipe_of(merger, zoo, models, config["seed"])
        write_json(
            staging / "manifest.json",
            {"recipe": recipe, "facts": facts, "versions": versions(), "git": git_state()},
        )
        staging.rename(out)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    OUT.print(
        f"{out}: {len(models.base)} tensors in {time.monotonic() - started:.1f} s, sha256 {facts['digest']}"
    )
    return 0


def score(config: Config) -> int:
    """Score one model folder, print a table and write JSON; leaves lm-eval's task folder beside the JSON."""
    import torch

    from eval.scorers.subject import StoreSubject, read_scores
    from eval.scorers.subject import score as score_one
    from eval.scorers.utility import Utility, write_tasks

    checkpoint, out, scorers, zoo = _all(
        lambda: Checkpoint.open(_given_path(config, "model"), "model"),
        lambda: _new_path(config, "out"),
        lambda: scorers_of(config),
        lambda: zoo_of(config),
    )
    folder = checkpoint.folder
    torch.set_num_threads(zoo.family.threads)
    models = zoo.models() if any(scorer.relative for scorer in scorers) else None
    subject = StoreSubject(zoo, checkpoint.folder, zoo.digest_of(folder, "model"), "test", models)
    frames = []
    for scorer in scorers:
        started = time.monotonic()
        frames.append(read_scores(score_one(scorer, subject)))
        print(f"{type(scorer).__name__}: {time.monotonic() - started:.0f} s", file=sys.stderr)
    means = _means(frames)
    table = Table("column", "value", "n", "unscored", title=str(folder))
    for column, (mean, count, unscored) in means.items():
        table.add_row(column, f"{mean:.4f}", str(count), str(unscored))
    OUT.print(table)
    out.parent.mkdir(parents=True, exist_ok=True)
    columns = {
        c: {"mean": None if math.isnan(m) else m, "n": n, "unscored": u} for c, (m, n, u) in means.items()
    }
    write_json(out, {"weights": subject.digest, "columns": columns, "setting": subject.setting()})
    OUT.print(f"wrote {out}")
    names = [name for scorer in scorers if isinstance(scorer, Utility) for name in scorer.tasks]
    if names:
        tasks = out.with_suffix(".tasks")
        write_tasks(tasks, {name: subject.prompts(name) for name in names})
        OUT.print(f"lm-eval's task folder: {tasks}")
    return 0


def zoo_of(config: Config) -> Zoo:
    """Build family, corpus, store and assets; raises BadRequest with the faults of all of them."""
    import yaml

    family, corpus = _all(lambda: build(config["family"], "family", Family), lambda: _corpus(config))
    store = Store(Path(config["store"]))
    checksums = yaml.safe_load((ROOT / "conf" / "assets.yaml").read_text())
    return Zoo(family, corpus, store, Assets(store, checksums), config["seed"])


def _corpus(config: Config) -> Any:
    return build(config.get("corpus", {}), "corpus", Packaged, Toy, World)


def scorers_of(config: Config) -> list[Scorer]:
    """Build the chosen scorers, sorted by name."""
    scorers = _scorers(config)
    if not scorers:
        raise BadRequest.of("scorer", "none", "one or more files of conf/scorer, e.g. scorer=[aqi,judge]")
    return scorers


def _scorers(config: Config) -> list[Scorer]:
    nodes = sorted((config.get("scorer") or {}).items())
    return _all(*[lambda name=name, node=node: build(node, f"scorer.{name}", Scorer) for name, node in nodes])


def experiment_of(config: Config) -> Experiment:
    """Build the grid that the config names, or a grid of one row for a single cell; faults come all at once."""
    methods = method_files(ROOT / "conf" / "method")
    zoo, scorers, grid = _all(
        lambda: zoo_of(config), lambda: scorers_of(config), lambda: _grid(config, methods)
    )
    if config["grid"] is None:
        methods = {"method": config["method"]}
    families = _families(grid.families) if grid.families else [zoo.family]
    zoos = [
        replace(zoo, family=family, seed=zoo.seed + offset)
        for offset in range(grid.seeds)
        for family in families
    ]
    return Experiment(grid, zoos, methods, scorers)


def _families(names: Sequence[str]) -> list[Family]:
    """Build the families that a grid names."""
    import yaml

    known = choices(ROOT / "conf" / "family")

    def one(name: str) -> Family:
        if name not in known:
            raise BadRequest.of("grid.families", f"no such choice: {name}", nearest(name, set(known)))
        family: Family = build(yaml.safe_load(known[name].read_text()), f"family {name}", Family)
        return family

    return _all(*[lambda name=name: one(name) for name in names])


def _grid(config: Config, methods: Mapping[str, Config]) -> Grid:
    if config["grid"] is not None:
        grid: Grid = build(config["grid"], "grid", Grid)
        return grid
    merger: Merger = build(config["method"], "method", Merger)
    name = type(merger).__name__.lower()
    family = str(config["family"].get("name"))
    row = Row(method="method", fixed={})
    usual = next((one for one in methods.values() if one[TARGET] == config["method"][TARGET]), {})
    changed = [f"{key}={value}" for key, value in config["method"].items() if value != usual.get(key)]
    label = "-".join(["cell", family, name, *changed]).replace("/", "-")  # a sweep leaves one folder a point
    title = f"One cell: {name} on {family}"
    return Grid(name=label, title=title, rows={name: row}, dev_scorers={})


def _all(*makers: Callable[[], Any]) -> list[Any]:
    made: list[Any] = []
    faults: list[Fault] = []
    for make in makers:
        try:
            made.append(make())
        except BadRequest as error:
            faults += error.faults
    if faults:
        raise BadRequest(faults)
    return made


def _chosen(experiment: Experiment) -> tuple[Choice, list[Cell]]:
    dev = experiment.dev_cells()
    measured = experiment.read(dev)
    if len(measured) < len(dev):
        raise NotMade("the dev split is not finished")
    choice = experiment.choose(measured)
    return choice, experiment.reported(choice)


def _write(config: Config, experiment: Experiment, choice: Choice, measured: list[CellResult]) -> None:
    steps = experiment.read(experiment.trajectory_cells())
    write_report(Path(config["results"]), experiment, choice, measured, steps)


def _print_missed_gates(experiment: Experiment) -> None:
    """List the gates that were missed; they inform, the run has gone on."""
    found = experiment.gate_verdicts()
    lines = missed(found)
    total = sum(map(len, found.values()))
    if found:
        OUT.print(f"gates (dev split): {total - len(lines)} of {total} met")
    for line in lines:
        OUT.print(f"gate missed: {line}", style="bold red", highlight=False)


def _state(experiment: Experiment, cell: Cell) -> str:
    if experiment.read([cell]):
        return "done"
    failure = cell.zoo.store.failure("cells", cell.recipe)
    return f"failed ({failure})" if failure is not None else "missing"


def _means(frames: list[pd.DataFrame]) -> dict[str, tuple[float, int, int]]:
    import pandas as pd

    frame = pd.concat(frames, ignore_index=True)
    frame = frame[~frame["id"].str.startswith(BOOTSTRAP) & ~frame["column"].str.endswith("_by_layer")]
    groups = frame.groupby("column")["value"]
    return {str(column): (float(v.mean()), int(v.count()), int(v.isna().sum())) for column, v in groups}


def _new_path(config: Config, key: str) -> Path:
    given = config[key]
    if given is None:
        raise BadRequest.of(key, "not given", "a path that does not exist yet")
    path = Path(given)
    if path.exists():
        raise BadRequest.of(key, f"{path} exists", "a path that does not exist yet")
    return path


def _given_path(config: Config, key: str) -> Path:
    if config[key] is None:
        raise BadRequest.of(key, "not given", "a Hugging Face model folder")
    return Path(config[key])


def _end(failures: list[Failure]) -> int:
    faults = [fault for one in failures if isinstance(one.error, BadRequest) for fault in one.error.faults]
    if faults:
        raise BadRequest(dict.fromkeys(faults))
    for failure in failures:
        print(f"failed: {failure.label}: {failure.error}", file=sys.stderr)
    return 1 if failures else 0

"""From measured cells to the folder of an experiment's results."""

from __future__ import annotations

import hashlib
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.table import Table

from alignmerge.engine.manifest import ROOT, file_sha256, git_state, versions
from alignmerge.engine.progress import OUT
from alignmerge.engine.store import write_json
from alignmerge.zoo.zoo import Zoo
from eval.grid.cells import CellResult
from eval.grid.experiment import Choice, Experiment, Gates, facts_of
from eval.grid.gates import marks, missed
from eval.grid.grid import AT
from eval.report.readme import block, names, splice

if TYPE_CHECKING:
    import pandas as pd

STEP = "@"
"""Between a model and the step of its training, in the name of a row."""


def write_report(
    results: Path, experiment: Experiment, choice: Choice, measured: list[CellResult], steps: list[CellResult]
) -> None:
    """Write ``<results>/<experiment>``, refresh the README's block of it, and print the table in short.

    The files are a function of the scores and of the code that draws them: an artifact like any other. ``measured``
    are the rows, ``steps`` the way of each anchor's training.
    """
    folder = results / experiment.grid.name
    gates = experiment.gate_verdicts()
    manifest = _manifest(experiment, gates, measured, steps)
    notes = [*_notes(experiment), *(f"Gate missed: {line}." for line in missed(gates))]
    expected = [(family, row) for family, mergers in choice.mergers.items() for row in mergers]
    have = {(one.cell.family, one.cell.row) for one in measured}
    if missing := [f"{row} ({family})" for family, row in expected if (family, row) not in have]:
        notes.append(f"Not measured yet: {', '.join(missing)}.")
    facts = {key: value for key, value in manifest.items() if key != "git"}
    against = [name for name in experiment.grid.against if name in {one.cell.row for one in measured}]
    sweeps = _sweeps(experiment, measured)
    recipe = {
        "manifest": facts, "notes": notes, "title": experiment.grid.title, "code": _code(), "against": against,
        "selection": None if choice.points is None else choice.points.to_csv(),
        "sweeps": None if sweeps is None else sweeps.to_csv(),
    }  # fmt: skip

    def make(made: Path) -> dict[str, Any]:
        from eval.report.write import write

        write(
            made, _scores(measured), title=experiment.grid.title, notes=notes,
            against=against, selection=choice.points, trajectory=_trajectory(steps) if steps else None,
            gates=_gates(gates), sweeps=sweeps, marks=marks(gates),
        )  # fmt: skip
        return {}

    artifact = experiment.zoos[0].store.obtain("reports", recipe, make)
    staging = folder.parent / f".{folder.name}.staging"
    shutil.rmtree(staging, ignore_errors=True)
    shutil.copytree(artifact.path, staging)
    write_json(staging / "manifest.json", manifest)
    shutil.rmtree(folder, ignore_errors=True)
    staging.rename(folder)
    _refresh_readme(folder)
    _print_summary(folder)


def _gates(gates: Gates) -> pd.DataFrame | None:
    import pandas as pd

    lines = [
        {"family": family, "seed": seed, **verdict._asdict()}
        for (family, seed), verdicts in gates.items()
        for verdict in verdicts
    ]
    return pd.DataFrame(lines) if lines else None


def _sweeps(experiment: Experiment, measured: list[CellResult]) -> pd.DataFrame | None:
    """Return the settings of swept rows that were measured, in the order of the grid; None where nothing is swept."""
    import pandas as pd

    there = {one.cell.row for one in measured}
    points = [point._asdict() for point in experiment.grid.points() if point.row in there]
    return pd.DataFrame(points).astype({"value": float}) if points else None


def _code() -> str:
    """Return what stands for the code that makes a report: the sha256 of its files."""
    files = sorted(Path(__file__).parents[1].rglob("*.py"))
    return hashlib.sha256("".join(map(file_sha256, files)).encode()).hexdigest()


def _refresh_readme(folder: Path) -> None:
    """Put the block of these results between its markers, where they are this project's own."""
    path = ROOT / "README.md"
    if folder.resolve().parent == ROOT / "results" and path.is_file():
        text = path.read_text(encoding="utf-8")
        if folder.name in names(text):
            path.write_text(splice(text, folder.name, block(folder)), encoding="utf-8")


def _notes(experiment: Experiment) -> list[str]:
    from eval.scorers.judge import Judge

    grid, zoos = experiment.grid, experiment.zoos
    notes = list(dict.fromkeys(zoo.family.note for zoo in zoos if zoo.family.note))
    families = ", ".join(dict.fromkeys(zoo.family.name for zoo in zoos))
    seeds = ", ".join(dict.fromkeys(str(zoo.seed) for zoo in zoos))
    dtypes = ", ".join(dict.fromkeys(zoo.family.dtype for zoo in zoos))
    notes.append(f"Family {families}, seed {seeds}; models are loaded in {dtypes} to be scored.")
    if any(row.tried for row in grid.rows.values()):
        count = max(len(row.tried) for row in grid.rows.values())
        seed = f" of seed {zoos[0].seed}" if grid.seeds > 1 else ""
        notes.append(
            f"Each tuned row: {count} settings tried on the dev split{seed}, the one with the highest refusal_rate - "
            "over_refusal_rate + mean(instruction_following, reasoning) is reported on the test split; "
            f"'/matched' rows take the setting with the dev refusal rate nearest to {grid.matched_refusal:g}."
        )
    else:
        notes.append("Nothing is selected on the dev split: every row stands at a setting that the grid gives.")
    if any(row.swept for row in grid.rows.values()):
        notes.append(f"Swept rows report every setting on the test split, each as ROW{AT}FIELD=VALUE.")
    if any(isinstance(scorer, Judge) for scorer in experiment.scorers):
        agreement = ", ".join(f"{key} {value:.3g}" for key, value in _calibrated(zoos[0]).items())
        notes.append(f"Judge on PyRIT's human refusal labels: {agreement}.")
    return notes


def _calibrated(zoo: Zoo) -> dict[str, float]:
    from eval.scorers.judge import Judge, calibration

    recipe = {"judge": Judge.version, "packages": dict(zoo.assets.checksums), "versions": versions()}
    artifact = zoo.store.obtain("calibration", recipe, lambda folder: {"agreement": calibration(zoo.asset)})
    agreement: dict[str, float] = artifact.manifest["facts"]["agreement"]
    return agreement


def _scores(measured: list[CellResult]) -> pd.DataFrame:
    import pandas as pd

    frames = [
        one.frame.assign(family=one.cell.family, row=one.cell.row, seed=one.cell.seed) for one in measured
    ]
    return pd.concat(frames, ignore_index=True)


def _trajectory(measured: list[CellResult]) -> pd.DataFrame:
    """Return the scores along the anchors' trainings: step 0 is the base, share 1 the anchor."""
    scores = _scores(measured)
    step = scores["row"].str.partition(STEP)[2]
    scores["step"] = step.where(step != "", "0").astype(int)
    last = scores.groupby(["family", "seed"])["step"].transform("max")
    return scores.assign(share=scores["step"] / last)


def _manifest(
    experiment: Experiment, gates: Gates, measured: list[CellResult], steps: list[CellResult]
) -> dict[str, Any]:
    families: dict[str, Any] = {}
    for zoo in experiment.zoos:
        name, seed = zoo.family.name, f"seed {zoo.seed}"
        _, models = experiment.opened[name, zoo.seed]
        digests = {"base": models.base.digest}
        digests |= {alias: model.digest for alias, model in zip(models.aliases, models.pool, strict=True)}
        found = [verdict._asdict() for verdict in gates.get((name, zoo.seed), [])]
        family = families.setdefault(name, {"note": zoo.family.note, "corpus": zoo.prompts.key})
        # A step that is a row as well (the base) is filed as the row.
        mine = [one for one in [*steps, *measured] if one.cell.family == name and one.cell.seed == zoo.seed]
        family[seed] = {"models": digests, "gates": found, "rows": {one.cell.row: _row(one) for one in mine}}
    return {
        "experiment": experiment.grid.name, "families": families, "versions": versions(), "git": git_state(),
    }  # fmt: skip


def _row(one: CellResult) -> dict[str, Any]:
    row: dict[str, Any] = {"scores": one.keys}
    if one.cell.merger is None or one.merge is None:
        return row | {"model": one.cell.model}
    facts = {key: value for key, value in one.merge.manifest["facts"].items() if key != "blocks"}
    return row | {"method": facts_of(one.cell.merger), "merge": one.merge.key, "facts": facts}


def _print_summary(folder: Path) -> None:
    import pandas as pd

    from eval.stats.estimates import ALL

    shown = (
        "refusal_rate", "over_refusal_rate", "gibberish_rate", "toxicity_rate", "aqi", "reasoning",
        "instruction_following", "helpfulness", "drift_anchor",
    )  # fmt: skip
    summary = pd.read_csv(folder / "summary.csv")
    if ALL in set(summary["family"]):
        summary = summary[summary["family"] == ALL]
    means = summary.pivot_table(index="row", columns="column", values="mean", sort=False)
    columns = [column for column in shown if column in means]
    table = Table("row", *columns, title=f"{folder.name} (intervals: {folder}/table.md)")
    for row, values in means[columns].iterrows():
        table.add_row(str(row), *(f"{value:.3f}" for value in values))
    OUT.print(table)
    OUT.print(f"results in {folder}: table.md, summary.csv, comparisons.csv, figures/")

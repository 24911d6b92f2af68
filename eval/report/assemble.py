"""From measured cells to the folder of an experiment's results."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table

from alignmerge.engine.manifest import ROOT, git_state, versions
from alignmerge.engine.store import write_json
from alignmerge.zoo.build import Zoo
from eval.cells import Measured
from eval.experiment import Choice, Experiment, facts_of
from eval.report.readme import block, names, splice

if TYPE_CHECKING:
    import pandas as pd

OUT = Console(soft_wrap=True)


def write_report(results: Path, experiment: Experiment, choice: Choice, measured: list[Measured]) -> None:
    """Write ``<results>/<experiment>``, refresh the README's block of it, and print the table in short."""
    from eval.report.write import write

    folder = results / experiment.grid.name
    staging = folder.parent / f".{folder.name}.staging"
    shutil.rmtree(staging, ignore_errors=True)
    staging.mkdir(parents=True)
    against = [name for name in experiment.grid.against if name in {one.cell.row for one in measured}]
    notes = _notes(experiment)
    missing = [row for row in choice.mergers if row not in {one.cell.row for one in measured}]
    if missing:
        notes.append(f"Not measured yet: {', '.join(missing)}.")
    write(
        staging, _scores(experiment, measured), title=experiment.grid.title, notes=notes, against=against,
        selection=choice.points,
    )  # fmt: skip
    write_json(staging / "manifest.json", _manifest(experiment, choice, measured))
    shutil.rmtree(folder, ignore_errors=True)
    staging.rename(folder)
    _refresh_readme(folder)
    _print_summary(folder)


def _refresh_readme(folder: Path) -> None:
    """Put the block of these results between its markers, where they are this project's own."""
    path = ROOT / "README.md"
    if folder.resolve().parent == ROOT / "results" and path.is_file():
        text = path.read_text(encoding="utf-8")
        if folder.name in names(text):
            path.write_text(splice(text, folder.name, block(folder)), encoding="utf-8")


def _notes(experiment: Experiment) -> list[str]:
    from eval.scorers.judge import Judge

    family, grid = experiment.zoo.family, experiment.grid
    notes = [family.note] if family.note else []
    seeds = ", ".join(map(str, grid.seeds))
    notes.append(f"Family {family.name}, seed {seeds}; models are loaded in {family.dtype} to be scored.")
    if any(row.settings for row in grid.rows.values()):
        count = max(len(row.settings) for row in grid.rows.values())
        notes.append(
            f"Each tuned row: {count} settings tried on the dev split, the one with the highest refusal_rate - "
            "over_refusal_rate + mean(instruction_following, reasoning) is reported on the test split; "
            f"'/matched' rows take the setting with the dev refusal rate nearest to {grid.matched_refusal:g}."
        )
    if any(isinstance(scorer, Judge) for scorer in experiment.scorers):
        agreement = ", ".join(f"{key} {value:.3g}" for key, value in _calibrated(experiment.zoo).items())
        notes.append(f"Judge on PyRIT's human refusal labels: {agreement}.")
    return notes


def _calibrated(zoo: Zoo) -> dict[str, float]:
    from eval.scorers.judge import Judge, calibration

    recipe = {"judge": Judge.version, "packages": dict(zoo.assets.checksums), "versions": versions()}
    artifact = zoo.store.obtain("calibration", recipe, lambda folder: {"agreement": calibration(zoo.asset)})
    agreement: dict[str, float] = artifact.manifest["facts"]["agreement"]
    return agreement


def _scores(experiment: Experiment, measured: list[Measured]) -> pd.DataFrame:
    import pandas as pd

    frames = [
        one.frame.assign(family=experiment.zoo.family.name, row=one.cell.row, seed=one.cell.seed) for one in measured
    ]
    return pd.concat(frames, ignore_index=True)


def _manifest(experiment: Experiment, choice: Choice, measured: list[Measured]) -> dict[str, Any]:
    rows = {}
    for one in measured:
        row: dict[str, Any] = {"scores": dict(one.keys)}
        if one.cell.merger is not None and one.merge is not None:
            facts = {key: value for key, value in one.merge.manifest["facts"].items() if key != "blocks"}
            row |= {"method": facts_of(one.cell.merger), "merge": one.merge.key, "facts": facts}
        else:
            row["model"] = one.cell.model
        rows[f"{one.cell.row}, seed {one.cell.seed}"] = row
    models = experiment.zoo.frozen().models()
    digests = {"base": models.base.digest}
    digests |= {alias: model.digest for alias, model in zip(models.aliases, models.pool, strict=True)}
    return {
        "experiment": experiment.grid.name, "family": experiment.zoo.family.name, "note": experiment.zoo.family.note,
        "gates": [verdict._asdict() for verdict in experiment.gate_verdicts()],
        "models": digests, "corpus": experiment.zoo.prompts.key, "rows": rows, "versions": versions(),
        "git": git_state(),
    }  # fmt: skip


def _print_summary(folder: Path) -> None:
    import pandas as pd

    shown = (
        "refusal_rate", "over_refusal_rate", "gibberish_rate", "toxicity_rate", "aqi", "reasoning",
        "instruction_following", "helpfulness", "drift_anchor",
    )  # fmt: skip
    summary = pd.read_csv(folder / "summary.csv")
    means = summary.pivot_table(index="row", columns="column", values="mean", sort=False)
    columns = [column for column in shown if column in means]
    table = Table("row", *columns, title=f"{folder.name} (intervals: {folder}/table.md)")
    for row, values in means[columns].iterrows():
        table.add_row(str(row), *(f"{value:.3f}" for value in values))
    OUT.print(table)
    OUT.print(f"results in {folder}: table.md, summary.csv, comparisons.csv, figures/")

"""From finished cells to the folder of an experiment's results."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from alignmerge.engine.kernels import overridden
from alignmerge.engine.keys import plain_fields
from alignmerge.engine.manifest import ROOT, all_versions, file_sha256, git_state, versions
from alignmerge.engine.store import write_json
from alignmerge.zoo.zoo import Zoo
from eval.columns import Column
from eval.grid.cells import CellResult
from eval.grid.experiment import Experiment, Gates
from eval.grid.gates import marks, missed
from eval.grid.grid import AT
from eval.grid.selection import Choice
from eval.report.main_table import block, names, show, splice
from eval.report.supplement import Supplement
from eval.scorers.judge import Judge, calibration


@dataclass(frozen=True)
class Findings:
    """What an experiment found: its choice, its finished rows, the way of its anchors' training."""

    experiment: Experiment
    choice: Choice
    rows: Sequence[CellResult]
    steps: Sequence[CellResult]
    gates: Gates

    def publish(self, results: Path) -> None:
        """Write ``<results>/<experiment>``, refresh the README's block of it, print a summary.

        The files are a function of scores and of the code that draws them: an artifact.
        """
        folder = results / self.experiment.grid.name
        manifest = self._manifest()
        artifact = self.experiment.zoos[0].store.obtain("reports", self._recipe(manifest), self._write)
        staging = folder.parent / f".{folder.name}.staging"
        shutil.rmtree(staging, ignore_errors=True)
        shutil.copytree(artifact.path, staging)
        write_json(staging / "manifest.json", manifest)
        shutil.rmtree(folder, ignore_errors=True)
        staging.rename(folder)
        _refresh_readme(folder)
        show(folder)

    def _recipe(self, manifest: dict[str, Any]) -> dict[str, Any]:
        """Return what the files of the report are a function of."""
        recipe = {key: value for key, value in manifest.items() if key != "git"}
        recipe |= {"notes": self._notes(), "title": self.experiment.grid.title, "code": _code()}
        recipe["against"] = self._against()
        for key, table in {"selection": self.choice.points, "sweeps": self._sweeps()}.items():
            recipe[key] = None if table is None else table.to_csv()
        return recipe

    def _write(self, made: Path) -> dict[str, Any]:
        from eval.report.write import write

        columns: dict[str, Column] = {}
        for scorer in self.experiment.scorers:
            columns |= scorer.columns
        supplement = Supplement(
            selection=self.choice.points, trajectory=self._trajectory(), gates=self._gate_table(),
            sweeps=self._sweeps(), marks=marks(self.gates),
        )  # fmt: skip
        write(
            made, _scores(self.rows), columns=columns, title=self.experiment.grid.title,
            notes=self._notes(), against=self._against(), supplement=supplement,
        )  # fmt: skip
        return {}

    def _against(self) -> list[str]:
        """Return the rows that others are compared with, as far as they were measured."""
        there = {one.cell.row for one in self.rows}
        return [name for name in self.experiment.grid.against if name in there]

    def _gate_table(self) -> pd.DataFrame | None:
        lines = []
        for (family, seed), verdicts in self.gates.items():
            lines += [{"family": family, "seed": seed, **verdict._asdict()} for verdict in verdicts]
        return pd.DataFrame(lines) if lines else None

    def _sweeps(self) -> pd.DataFrame | None:
        """Return the measured settings of swept rows in order; None where nothing is swept."""
        there = {one.cell.row for one in self.rows}
        points = [point._asdict() for point in self.experiment.grid.points() if point.row in there]
        return pd.DataFrame(points).astype({"value": float}) if points else None

    def _trajectory(self) -> pd.DataFrame | None:
        """Return the scores along the anchors' trainings: step 0 is the base."""
        if not self.steps:
            return None
        scores = _scores(self.steps)
        step = scores["row"].str.partition("@")[2]  # of ``anchor@<step>``
        scores["step"] = step.where(step != "", "0").astype(int)
        last = scores.groupby(["family", "seed"])["step"].transform("max")
        return scores.assign(share=scores["step"] / last)

    def _notes(self) -> list[str]:
        notes = _notes_on_models(self.experiment.zoos)
        notes += _notes_on_settings(self.experiment) + _notes_on_judge(self.experiment) + _notes_on_kernels()
        notes += [f"Gate missed: {line}." for line in missed(self.gates)]
        have = {(one.cell.family, one.cell.row) for one in self.rows}
        absent = []
        for family, mergers in self.choice.mergers.items():
            absent += [f"{row} ({family})" for row in mergers if (family, row) not in have]
        if absent:
            notes.append(f"Not measured yet: {', '.join(absent)}.")
        return notes

    def _manifest(self) -> dict[str, Any]:
        families: dict[str, Any] = {}
        for zoo in self.experiment.zoos:
            name = zoo.family.name
            family = families.setdefault(name, {"note": zoo.family.note, "corpus": zoo.prompts.digest})
            family[f"seed {zoo.seed}"] = self._of_seed(zoo)
        name = self.experiment.grid.name
        return {"experiment": name, "families": families, "versions": all_versions(), "git": git_state()}

    def _of_seed(self, zoo: Zoo) -> dict[str, Any]:
        """Return what a manifest says of one family with one seed."""
        place = (zoo.family.name, zoo.seed)
        _, models = self.experiment.opened[place]
        digests = {"base": models.base.digest}
        for alias, model in zip(models.aliases, models.pool, strict=True):
            digests[alias] = model.digest
        rows = {}
        for one in [*self.steps, *self.rows]:  # the base is a step and a row: it is filed as the row
            if (one.cell.family, one.cell.seed) == place:
                rows[one.cell.row] = _row(one)
        found = [verdict._asdict() for verdict in self.gates.get(place, [])]
        return {"models": digests, "gates": found, "rows": rows}


def _notes_on_models(zoos: Sequence[Zoo]) -> list[str]:
    families = [zoo.family for zoo in zoos]
    notes = dict.fromkeys(family.note for family in families if family.note)
    names = ", ".join(dict.fromkeys(family.name for family in families))
    seeds = ", ".join(dict.fromkeys(str(zoo.seed) for zoo in zoos))
    dtypes = ", ".join(dict.fromkeys(family.dtype for family in families))
    return [*notes, f"Family {names}, seed {seeds}; models are loaded in {dtypes} to be scored."]


def _notes_on_settings(experiment: Experiment) -> list[str]:
    grid, notes = experiment.grid, []
    count = max((len(row.tried) for row in grid.rows.values()), default=0)
    if count:
        seed = f" of seed {experiment.zoos[0].seed}" if grid.seeds > 1 else ""
        notes.append(
            f"Each tuned row: {count} settings tried on the dev split{seed}, the one with the highest refusal_rate - "
            "over_refusal_rate + mean(instruction_following, reasoning) is reported on the test split; "
            f"'/matched' rows take the setting with the dev refusal rate nearest to {grid.matched_refusal:g}."
        )
    else:
        notes.append("Nothing is selected on the dev split: every row stands at a setting that the grid gives.")
    if any(row.swept for row in grid.rows.values()):
        notes.append(f"Swept rows report every setting on the test split, each as ROW{AT}FIELD=VALUE.")
    return notes


def _notes_on_kernels() -> list[str]:
    """Say which switches of the kernels the user has set otherwise."""
    changed = [f"{variable}={value}" for variable, value in overridden().items()]
    if not changed:
        return []
    return [f"Kernels were not fixed ({', '.join(changed)}): on another CPU the numbers may differ."]


def _notes_on_judge(experiment: Experiment) -> list[str]:
    if not any(isinstance(scorer, Judge) and scorer.relevance is not None for scorer in experiment.scorers):
        return []  # in a world that knows the right answers, nothing rests on it
    zoo = experiment.zoos[0]
    recipe = {"judge": Judge.version, "packages": dict(zoo.assets.checksums), "versions": versions()}
    artifact = zoo.store.obtain("calibration", recipe, lambda folder: {"agreement": calibration(zoo.asset)})
    agreement = [f"{key} {value:.3g}" for key, value in artifact.manifest["facts"]["agreement"].items()]
    return [f"Judge on PyRIT's human refusal labels: {', '.join(agreement)}."]


def _code() -> str:
    """Return what stands for the code that makes a report: the sha256 of the files of ``eval``."""
    paths = sorted(Path(__file__).parents[1].rglob("*"))
    digests = [file_sha256(path) for path in paths if path.suffix in (".py", ".jinja")]
    return hashlib.sha256("".join(digests).encode()).hexdigest()


def _refresh_readme(folder: Path) -> None:
    """Put the block of these results between its markers, where they are this project's own."""
    path = ROOT / "README.md"
    if folder.resolve().parent == ROOT / "results" and path.is_file():
        text = path.read_text(encoding="utf-8")
        if folder.name in names(text):
            path.write_text(splice(text, folder.name, block(folder)), encoding="utf-8")


def _scores(results: Sequence[CellResult]) -> pd.DataFrame:
    frames = []
    for one in results:
        frames.append(one.frame.assign(family=one.cell.family, row=one.cell.row, seed=one.cell.seed))
    return pd.concat(frames, ignore_index=True)


def _row(one: CellResult) -> dict[str, Any]:
    row: dict[str, Any] = {"scores": {name: artifact.key for name, artifact in one.scores.items()}}
    if one.cell.merger is None or one.merge is None:
        return row | {"model": one.cell.model}
    facts = {key: value for key, value in one.merge.manifest["facts"].items() if key != "blocks"}
    method = {"name": one.cell.merger.name, **plain_fields(one.cell.merger)}
    return row | {"method": method, "merge": one.merge.key, "facts": facts}

"""From finished cells to the folder of an experiment's results."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from alignmerge.engine.kernels import overridden
from alignmerge.engine.manifest import file_sha256, versions
from alignmerge.zoo.zoo import Zoo
from eval.columns import Column
from eval.grid.alike import rows_alike
from eval.grid.cells import CellResult
from eval.grid.experiment import Experiment, Gates
from eval.grid.folders import replace_folder
from eval.grid.forecast import steps_of
from eval.grid.gates import marks, missed
from eval.grid.grid import AT, MATCHED, NEAR, spell
from eval.grid.record import PASSING, of_gates, of_making, of_models, of_rows
from eval.grid.selection import Choice
from eval.report.ledger import PAPER, read_ledger
from eval.report.supplement import Supplement
from eval.scorers.judge import Judge, calibration
from eval.stats.estimates import ALL
from eval.stats.fronts import WANTED


@dataclass(frozen=True)
class Findings:
    """What an experiment found: its choice, its finished rows, the way of its anchors' training."""

    experiment: Experiment
    choice: Choice
    rows: Sequence[CellResult]
    steps: Sequence[CellResult]
    gates: Gates

    def publish(self, folder: Path) -> None:
        """Write the results into ``folder``, in the place of older ones.

        The files are a function of scores and of the code that draws them: an artifact.
        """
        manifest = self._manifest
        artifact = self.experiment.zoos[0].store.obtain("reports", self._recipe(manifest), self._write)
        replace_folder(artifact.path, folder, manifest)

    def _recipe(self, manifest: dict[str, Any]) -> dict[str, Any]:
        """Return what the files of the report are a function of."""
        recipe = {key: value for key, value in manifest.items() if key not in PASSING}
        recipe |= {"notes": self._notes, "title": self.experiment.grid.title, "code": _code()}
        recipe |= {"against": self._against(), "remarks": self._remarks()}
        tables = {"selection": self.choice.points, "sweeps": self._sweeps(), "matched": self._matched}
        for key, table in tables.items():
            recipe[key] = None if table is None else table.to_csv()
        return recipe

    def _write(self, made: Path) -> dict[str, Any]:
        from eval.report.write import write

        columns: dict[str, Column] = {}
        for scorer in self.experiment.scorers:
            columns |= scorer.columns
        supplement = Supplement(
            selection=self.choice.points, trajectory=self._trajectory(), gates=self._gate_table(),
            sweeps=self._sweeps(), marks=marks(self.gates), ledger=read_ledger(),
            tried=self._tried(), unreached=unreached(self.choice), remarks=self._remarks(),
        )  # fmt: skip
        write(
            made, _scores(self.rows), columns=columns, title=self.experiment.grid.title,
            notes=self._notes, against=self._against(), supplement=supplement,
        )  # fmt: skip
        if self._matched is not None:
            self._matched.to_csv(made / "matched.csv", index=False, float_format="%.6g")
        return {}

    @cached_property
    def _matched(self) -> pd.DataFrame | None:
        """Return the matched rows with the refusal rates reached on dev and on test (NaN: not reached)."""
        if self.choice.matched is None:
            return None
        rates: dict[tuple[str, str], list[float]] = {}
        for one in self.rows:
            if one.cell.row.endswith(MATCHED):
                values = one.values
                found = values.loc[values["column"] == "refusal_rate", "value"]
                rates.setdefault((one.cell.family, one.cell.row), []).append(float(found.mean()))
        places = zip(self.choice.matched["family"], self.choice.matched["row"], strict=True)
        return self.choice.matched.assign(test=[np.mean(rates.get(place, [np.nan])) for place in places])

    def _against(self) -> list[str]:
        """Return the rows that others are compared with, as far as they were measured."""
        there = {one.cell.row for one in self.rows}
        return [name for name in self.experiment.grid.against if name in there]

    def _gate_table(self) -> pd.DataFrame | None:
        lines = []
        for (family, seed), verdicts in self.gates.items():
            lines += [{"family": family, "seed": seed, **verdict._asdict()} for verdict in verdicts]
        return pd.DataFrame(lines) if lines else None

    def _remarks(self) -> dict[str, list[str]]:
        """Return family -> what stands below its tables: aliases, and the rates that matched rows reached."""
        remarks = aliases(self.choice)
        for line in _lines(self._matched):
            text = f"{line['row']}: target {line['target']:g}, dev {line['dev']:.2f}"
            if pd.notna(line["test"]):
                text += f", test {line['test']:.2f}"
            if not line["reached"]:
                text += ": not reached"
            remarks.setdefault(line["family"], []).append(text)
        if len(self.choice.mergers) > 1 and remarks:
            lines = [f"{family}: {line}" for family, of in remarks.items() for line in of]
            remarks[ALL] = lines
        return remarks

    def _tried(self) -> pd.DataFrame | None:
        """Return the samples of the settings tried on dev, and of the experts; None where nothing is tuned."""
        if self.choice.points is None:
            return None
        frames = []
        for one in self.experiment.read(self.experiment.choice_cells()):
            wanted = one.frame[one.frame["column"].isin(WANTED)]
            cell = one.cell
            frames.append(wanted.assign(family=cell.family, row=cell.row, seed=cell.seed, setting=cell.setting))
        return pd.concat(frames, ignore_index=True)

    def _sweeps(self) -> pd.DataFrame | None:
        """Return the measured settings of swept rows in order; None where nothing is swept."""
        there = {one.cell.row for one in self.rows}
        points = [point._asdict() for point in self.experiment.grid.points() if point.row in there]
        return pd.DataFrame(points).astype({"value": float}) if points else None

    def _trajectory(self) -> pd.DataFrame | None:
        """Return the scores along trainings: step 0 is the base, the last one the model itself."""
        if not self.steps:
            return None
        scores = _scores(self.steps)
        names = scores["row"].str.replace("experts.", "expert:", regex=False).str.partition("@")
        scores = scores.assign(model=names[0], step=names[2].replace("", "0").astype(int))
        models = [str(name) for name in scores["model"].unique() if name != "base"]
        if not models:
            return None
        last = [one for one in self.rows if one.cell.row in models and self._as_on_the_way()]
        ends = _scores(last).assign(step=-1) if last else scores[:0]
        ends = ends[ends["column"].isin(scores["column"])].assign(model=ends["row"])
        starts = [scores[scores["model"] == "base"].assign(model=name) for name in models]
        whole = pd.concat([*starts, scores[scores["model"] != "base"], ends], ignore_index=True)
        total = whole[["family", "model"]].apply(tuple, axis=1).map(self._lengths(models))
        step = whole["step"].where(whole["step"] >= 0, total)
        return whole.assign(step=step, share=step / total)

    def _as_on_the_way(self) -> bool:
        """Whether the models are scored as the checkpoints of their trainings are."""
        on_the_way = self.experiment.grid.trajectory_scorers
        return all(scorer in self.experiment.scorers for scorer in on_the_way.values())

    def _lengths(self, models: Sequence[str]) -> dict[tuple[str, str], int]:
        """Return family and model -> the steps of its training."""
        lengths = {}
        for zoo in self.experiment.first_seed:
            for model in models:
                lengths[zoo.family.name, model] = steps_of(zoo, model.replace("expert:", "experts."))
        return lengths

    @cached_property
    def _notes(self) -> list[str]:
        notes = _notes_on_models(self.experiment.zoos)
        notes += _notes_on_settings(self.experiment) + _notes_on_choice(self.experiment, self.choice)
        notes += _notes_on_judge(self.experiment) + _notes_on_kernels()
        notes += [f"Gate missed: {line}." for line in missed(self.gates)]
        for (one, other), where in rows_alike(self._manifest).items():
            notes.append(f"{one} and {other} are one model under two names: {where}.")
        have = {(one.cell.family, one.cell.row) for one in self.rows}
        absent = []
        for family, mergers in self.choice.mergers.items():
            absent += [f"{row} ({family})" for row in mergers if (family, row) not in have]
        if absent:
            notes.append(f"Not measured yet: {', '.join(absent)}.")
        return notes

    @cached_property
    def _manifest(self) -> dict[str, Any]:
        families: dict[str, Any] = {}
        for zoo in self.experiment.zoos:
            name = zoo.family.name
            family = families.setdefault(name, {"note": zoo.family.note, "corpus": zoo.prompts.digest})
            family[f"seed {zoo.seed}"] = self._of_seed(zoo)
        scorers = [*self.experiment.grid.trajectory_scorers.values(), *self.experiment.scorers]
        mergers = [one.cell.merger for one in self.rows if one.cell.merger is not None]
        made = of_making(scorers, mergers)
        told = {"experiment": self.experiment.grid.name, "families": families}
        chosen = {"aliases": self.choice.readings, "left_out": self.choice.left_out}
        return {**told, **chosen, **made}

    def _of_seed(self, zoo: Zoo) -> dict[str, Any]:
        """Return what a manifest says of one family with one seed."""
        place = (zoo.family.name, zoo.seed)
        _, models = self.experiment.opened[place]
        rows = of_rows([*self.steps, *self.rows], place)  # the base is a step and a row: it is filed as the row
        return {"models": of_models(models), "gates": of_gates(self.gates.get(place, [])), "rows": rows}


def aliases(choice: Choice) -> dict[str, list[str]]:
    """Return family -> a line for each row that is the better of others on dev."""
    said: dict[str, list[str]] = {}
    for family, readings in choice.readings.items():
        said[family] = [f"{row} is {other}, the better on dev" for row, other in readings.items()]
    return {family: lines for family, lines in said.items() if lines}


def unreached(choice: Choice) -> dict[str, list[str]]:
    """Return family -> the matched rows that no setting came near enough to; over all those of any family."""
    rows: dict[str, list[str]] = {}
    for line in _lines(choice.matched):
        if not line["reached"]:
            rows.setdefault(line["family"], []).append(line["row"])
    if len(choice.mergers) > 1 and rows:
        rows[ALL] = list(dict.fromkeys(chain.from_iterable(rows.values())))
    return rows


def _lines(frame: pd.DataFrame | None) -> list[dict[str, Any]]:
    lines: list[Any] = []
    if frame is not None:
        lines = frame.to_dict("records")
    return lines


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
            f"Each tuned row: {count} settings tried on the dev split{seed}, the one with the highest harmonic mean of "
            "safety (refusal rate - over-refusal rate, at least 0) and utility (mean over tasks of the score relative "
            "to the best expert's, at most 1) is reported on the test split."
        )
    else:
        notes.append("Nothing is selected on the dev split: every row stands at a setting that the grid gives.")
    if any(row.swept for row in grid.rows.values()):
        notes.append(f"Swept rows report every setting on the test split, each as ROW{AT}FIELD=VALUE.")
    return notes


def _notes_on_choice(experiment: Experiment, choice: Choice) -> list[str]:
    """Say which reading an alias is, whose setting controls take over, and what was not eligible or not reached."""
    rows, notes = experiment.grid.rows, []
    for name, row in rows.items():
        if row.best_of:
            found = [f"{of[name]} ({family})" for family, of in choice.readings.items() if name in of]
            notes.append(
                f"{name} is the better of {', '.join(row.best_of)} on dev: {', '.join(found) or 'neither'}."
            )
        if row.like:
            notes.append(f"{name}: the setting selected of {row.like}, with {spell(row.fixed)}.")
    if choice.matched is not None:
        target = f"{experiment.grid.matched_refusal:g}, at most {NEAR:g} away"
        notes.append(f"'{MATCHED}' rows: the setting with the dev refusal rate nearest to {target}.")
        for name in choice.matched["row"].unique():
            lines = choice.matched[choice.matched["row"] == name].to_dict("records")
            notes.append(f"{name}, refusal rate on dev: {', '.join(map(_rate, lines))}.")
    return notes + _notes_on_excluded(choice)


def _rate(line: Mapping[Any, Any]) -> str:
    """Say which dev refusal rate a matched row reached in a family, or that it reached none."""
    rate = f"{line['dev']:.3f}"
    return f"{rate if line['reached'] else f'not reached, nearest {rate}'} ({line['family']})"


def _notes_on_excluded(choice: Choice) -> list[str]:
    """Say how many settings of a row were not eligible in a family, and why the first was not."""
    if choice.points is None:
        return []
    notes = []
    for (family, row), lines in choice.points.groupby(["family", "row"], sort=False):
        reasons = [reason for reason in lines["excluded"] if reason]
        if reasons:
            counted = f"{len(reasons)} of {len(lines)} settings not eligible"
            notes.append(f"{row} ({family}): {counted} ({reasons[0]}).")
    return notes


def _notes_on_kernels() -> list[str]:
    """Say which switches of the kernels the user has set otherwise."""
    changed = [f"{variable}={value}" for variable, value in overridden().items()]
    if not changed:
        return []
    return [f"Kernels were not fixed ({', '.join(changed)}): on another CPU the numbers may differ."]


def _notes_on_judge(experiment: Experiment) -> list[str]:
    if not any(isinstance(scorer, Judge) for scorer in experiment.scorers):
        return []
    zoo = experiment.zoos[0]
    recipe = {"judge": Judge.version, "packages": dict(zoo.assets.checksums), "versions": versions()}
    artifact = zoo.store.obtain("calibration", recipe, lambda folder: {"agreement": calibration(zoo.asset)})
    agreement = [f"{key} {value:.3g}" for key, value in artifact.manifest["facts"]["agreement"].items()]
    return [f"Judge on PyRIT's human refusal labels: {', '.join(agreement)}."]


def _code() -> str:
    """Return what stands for the code that makes a report: the sha256 of the files of ``eval`` and of the ledger."""
    paths = sorted(Path(__file__).parents[1].rglob("*"))
    digests = [file_sha256(path) for path in paths if path.suffix in (".py", ".jinja")]
    digests.append(file_sha256(PAPER))
    return hashlib.sha256("".join(digests).encode()).hexdigest()


def _scores(results: Sequence[CellResult]) -> pd.DataFrame:
    frames = []
    for one in results:
        frames.append(one.frame.assign(family=one.cell.family, row=one.cell.row, seed=one.cell.seed))
    return pd.concat(frames, ignore_index=True)

"""One model folder, scored by the chosen scorers on the test split: a table, and the same as JSON."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import pandas as pd
from rich.table import Table

from alignmerge.engine.checkpoint import Checkpoint
from alignmerge.engine.destination import claimed, free_path
from alignmerge.engine.language import threads
from alignmerge.engine.progress import OUT
from alignmerge.engine.store import write_json
from alignmerge.zoo.zoo import Zoo
from eval.columns import BOOTSTRAP
from eval.grid.notes import note, of_template, of_tokenizers
from eval.scorers.interface import Scorer
from eval.scorers.subject import StoreSubject, identity_of, read_scores, score
from eval.scorers.utility import Utility, write_tasks


def score_folder(*, zoo: Zoo, model: Checkpoint, scorers: Sequence[Scorer], out: Path) -> None:
    """Score a folder, print its table, write ``out`` and then lm-eval's task folder beside it.

    Raises BadRequest if another process is writing ``out``, or if there is such a task folder.
    """
    tasks = _tasks_of(scorers)
    folder = out.with_suffix(".tasks")
    if tasks:
        free_path(folder, "out", outside=zoo.store.root)
    with claimed(out, "out") as staging:
        model.known_as(zoo.digest_of(model.folder, "model")).speaking(zoo.family.chat_template)
        models = None
        if any(scorer.relative for scorer in scorers):
            models = zoo.models()
        subject = StoreSubject(zoo, model.folder, identity_of(model), "test", models)
        note([*of_tokenizers({"model": model.folder}), *of_template(model.folder, zoo.family.chat_template)])
        means = _means(_samples(subject, scorers))
        _write(staging / out.name, subject, means)
    if tasks:
        with claimed(folder, "out") as staging:
            write_tasks(staging / folder.name, {name: subject.prompts(name) for name in tasks})
        OUT.print(f"lm-eval's task folder: {folder}")
    OUT.print(_table(str(model.folder), means))
    OUT.print(f"wrote {out}")


def _samples(subject: StoreSubject, scorers: Sequence[Scorer]) -> pd.DataFrame:
    """Return what the scorers find, but for the columns of single layers."""
    frames = []
    with threads(subject.zoo.family.threads):
        for scorer in scorers:
            started = time.monotonic()
            frames.append(read_scores(score(scorer, subject)))
            print(f"{scorer.name}: {time.monotonic() - started:.0f} s", file=sys.stderr)
    samples = pd.concat(frames, ignore_index=True)
    for scorer in scorers:
        by_layer = [name for name, column in scorer.columns.items() if column.by_layer]
        samples = samples[~samples["column"].isin(by_layer)]
    return samples


def _table(title: str, means: Mapping[str, Mapping[str, float]]) -> Table:
    table = Table("column", "value", "n", "unscored", title=title)
    for column, facts in means.items():
        table.add_row(column, f"{facts['mean']:.4f}", str(facts["n"]), str(facts["unscored"]))
    return table


def _means(samples: pd.DataFrame) -> dict[str, dict[str, float]]:
    """Return column -> its mean over the scored samples, how many these are, and how many others there
    are.
    """
    means = {}
    scored = samples[~samples["id"].str.startswith(BOOTSTRAP)]
    for column, values in scored.groupby("column")["value"]:
        counts = {"n": int(values.count()), "unscored": int(values.isna().sum())}
        means[str(column)] = {"mean": float(values.mean()), **counts}
    return means


def _write(out: Path, subject: StoreSubject, means: Mapping[str, Mapping[str, float]]) -> None:
    columns: dict[str, dict[str, float | None]] = {}
    for column, facts in means.items():
        columns[column] = dict(facts)
        if math.isnan(facts["mean"]):
            columns[column]["mean"] = None
    setting = {"corpus": subject.zoo.prompts.digest, **subject.setting()}
    write_json(out, {"weights": subject.identity["weights"], "columns": columns, "setting": setting})


def _tasks_of(scorers: Sequence[Scorer]) -> list[str]:
    """Return the tasks that lm-eval measures: they are written as a folder that its own command line
    reads.
    """
    names: list[str] = []
    for scorer in scorers:
        if isinstance(scorer, Utility):
            names += scorer.tasks
    return names

"""One cell of a grid: a model (or a merge) measured by scorers on one split; made in worker processes,
read back.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import pandas as pd
import pyarrow as pa
from pyarrow.parquet import ParquetFile

from alignmerge.engine.faults import BadRequest, NoRoom, missing_package
from alignmerge.engine.keys import plain_fields
from alignmerge.engine.language import threads
from alignmerge.engine.merge import Merge
from alignmerge.engine.merger import Merger, Models
from alignmerge.engine.progress import Reporter
from alignmerge.engine.store import Artifact
from alignmerge.zoo.zoo import Zoo
from eval.scorers.interface import Scorer
from eval.scorers.subject import StoreSubject, identity_of, read_scores, score


class CellFailed(RuntimeError):
    """A cell was not finished: why, and where the traceback is."""


class Cell(NamedTuple):
    """What is measured, and how."""

    zoo: Zoo
    """The family with its seed."""
    row: str
    """Name in the tables."""
    setting: str
    """The tried setting, for the dev split; empty for what is reported."""
    split: str
    scorers: Sequence[Scorer]
    model: str | None = None
    """``base``, ``anchor``, ``anchor@<step>``, ``pretrained`` or ``experts.<alias>``; None for a merge.
    """
    merger: Merger | None = None

    @property
    def family(self) -> str:
        """The name of the family."""
        return self.zoo.family.name

    @property
    def seed(self) -> int:
        """The seed of the family's models and of what a method draws."""
        return self.zoo.seed

    @property
    def expert(self) -> bool:
        """Whether an unmerged expert is measured."""
        return self.model is not None and self.model.startswith("experts.")

    @property
    def work(self) -> tuple[Any, ...]:
        """What measuring it takes: equal for rows that came to one method with one setting."""
        return self.family, self.seed, self.split, self.model, repr(self.merger), repr(self.scorers)

    @property
    def label(self) -> str:
        """Name in progress lines."""
        name = f"{self.split}: {self.family}, seed {self.seed}: {self.row}"
        return f"{name} [{self.setting}]" if self.setting else name

    @property
    def recipe(self) -> dict[str, Any]:
        """What tells this cell from every other: a record of failure is filed under it."""
        merger = None if self.merger is None else _told(self.merger)
        scorers, family = list(map(_told, self.scorers)), plain_fields(self.zoo.family)
        return {"cell": self.label, "family": family, "merger": merger, "model": self.model, "scorers": scorers}

    def merge(self, zoo: Zoo, models: Models) -> Merge | None:
        """Return the merge that is measured; None for a model as it is. ``zoo`` may be frozen."""
        return None if self.merger is None else Merge(self.merger, zoo, models, self.seed)

    def subject(self, zoo: Zoo, models: Models, merge: Merge | None) -> StoreSubject:
        """Return the model that is measured; ``merge`` is the cell's own, where it has one.

        The folder of a merge may be empty: its record still says what its weights are.
        """
        if merge is not None:
            identity = identity_of(models.base) | {"weights": merge.record().digest}
            return StoreSubject(zoo, merge.folder, identity, self.split, models, self.seed)
        assert self.model is not None
        model = zoo.opened(self.model)
        return StoreSubject(zoo, model.folder, identity_of(model), self.split, models, self.seed)


def _told(one: Merger | Scorer) -> list[Any]:
    return [one.name, plain_fields(one)]


def prepare(zoo: Zoo, key: str, reporter: Reporter) -> None:
    """Make one model of a family; the base brings the lessons with it."""
    reporter(0, 1)
    with threads(zoo.family.threads):
        zoo.source(key, reporter)
        if key == "base" and zoo.trained():
            _ = zoo.lessons
    reporter(1, 1)


def measure(cell: Cell, reporter: Reporter) -> None:
    """Make everything that a cell needs; a failure leaves its traceback in the store and is raised
    again.
    """
    store = cell.zoo.store
    try:
        with threads(cell.zoo.family.threads):
            _measure(cell, reporter)
    except (BadRequest, NoRoom):
        raise  # a record of failure would not help, and a full disk has no room for it
    except ModuleNotFoundError as error:
        raise missing_package(error) from None
    except Exception as error:
        record = store.failed("cells", cell.recipe, error)
        raise CellFailed(f"{type(error).__name__}: {error} (traceback: {record})") from None
    store.forget_failure("cells", cell.recipe)


def _measure(cell: Cell, reporter: Reporter) -> None:
    models = cell.zoo.models()
    total = len(cell.scorers) + 1
    reporter(0, total)
    merge = cell.merge(cell.zoo, models)
    with nullcontext() if merge is None else merge.held():
        subject = cell.subject(cell.zoo, models, merge)
        for done, scorer in enumerate(cell.scorers, 1):
            reporter(done, total)
            score(scorer, subject)
    reporter(total, total)


@dataclass(frozen=True)
class CellResult:
    """A finished cell, read from the store."""

    cell: Cell
    scores: Mapping[str, Artifact]
    """By name of the scorer."""
    merge: Artifact | None

    @cached_property
    def frames(self) -> dict[str, pd.DataFrame]:
        """The samples by name of the scorer."""
        return {name: read_scores(artifact) for name, artifact in self.scores.items()}

    @cached_property
    def frame(self) -> pd.DataFrame:
        """The samples of all scorers."""
        return pd.concat(self.frames.values(), ignore_index=True)

    @property
    def values(self) -> pd.DataFrame:
        """The columns ``column`` and ``value`` of the samples: all that means need, in a fifth of the
        time.
        """
        tables = []
        for artifact in self.scores.values():
            file = ParquetFile(artifact.path / "samples.parquet")
            tables.append(file.read(columns=["column", "value"], use_threads=False))
        frame: pd.DataFrame = pa.concat_tables(tables).to_pandas()
        return frame


def read(frozen: Zoo, models: Models, cell: Cell) -> CellResult:
    """Return a finished cell from a frozen zoo and its opened models, without making or loading
    anything.

    Raises:
        NotMade: if a part of it is missing.
    """
    merge = cell.merge(frozen, models)
    subject = cell.subject(frozen, models, merge)
    scores = {scorer.name: score(scorer, subject) for scorer in cell.scorers}
    return CellResult(cell, scores, None if merge is None else merge.record())

"""One cell of a grid: a model (or a merge) measured by scorers on one split; made in worker processes, read back."""

from __future__ import annotations

import traceback
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, NamedTuple

from alignmerge.engine.faults import BadRequest
from alignmerge.engine.language import threads
from alignmerge.engine.merger import Merger, Models
from alignmerge.engine.progress import Reporter
from alignmerge.engine.store import Artifact
from alignmerge.zoo.workshop import drop_weights, merged, recipe_of, weights
from alignmerge.zoo.zoo import Source, Zoo
from eval.scorers.interface import Scorer
from eval.scorers.subject import StoreSubject, read_scores, score

if TYPE_CHECKING:
    import pandas as pd


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
    """``base``, ``anchor``, ``anchor@<step>``, ``pretrained`` or ``experts.<alias>``; None for a merge."""
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
    def label(self) -> str:
        """Name in progress lines."""
        return f"{self.split}: {self.family}, seed {self.seed}: {self.row}" + (
            f" [{self.setting}]" if self.setting else ""
        )

    @property
    def recipe(self) -> dict[str, Any]:
        """What a record of failure is filed under."""
        return {"cell": self.label}


def prepare(zoo: Zoo, key: str, reporter: Reporter) -> None:
    """Make one model of a family; the base brings the lessons with it."""
    reporter(0, 1)
    with threads(zoo.family.threads):
        zoo.source(key, reporter)
        if key == "base" and zoo.trained():
            zoo.examples_digest()
    reporter(1, 1)


def measure(cell: Cell, reporter: Reporter) -> None:
    """Make everything that a cell needs; a failure leaves its traceback in the store and is raised again."""
    store = cell.zoo.store
    try:
        with threads(cell.zoo.family.threads):
            _measure(cell, reporter)
    except BadRequest:
        raise
    except Exception as error:
        store.failed("cells", cell.recipe, error)
        raise RuntimeError(f"{cell.label}: {''.join(traceback.format_exception_only(error)).strip()}") from None
    store.forget_failure("cells", cell.recipe)


def _measure(cell: Cell, reporter: Reporter) -> None:
    zoo = cell.zoo
    models = zoo.models()
    total = len(cell.scorers) + 1
    reporter(0, total)
    record = _record(zoo, models, cell)
    if cell.merger is not None and record is not None:
        artifact = weights(cell.merger, zoo, models, cell.seed)
        if artifact.digest != record.digest:
            raise ArithmeticError(
                f"the merge was built again and differs: {artifact.digest} is not {record.digest}"
            )
    subject = _subject(zoo, models, cell, record)
    for done, scorer in enumerate(cell.scorers, 1):
        reporter(done, total)
        score(scorer, subject)
    if cell.merger is not None:
        drop_weights(cell.merger, zoo, models, cell.seed)
    reporter(total, total)


@dataclass(frozen=True)
class CellResult:
    """A finished cell, read from the store."""

    cell: Cell
    scores: Mapping[str, Artifact]
    """By scorer class."""
    merge: Artifact | None

    @cached_property
    def frame(self) -> pd.DataFrame:
        """The samples of all scorers."""
        import pandas as pd

        return pd.concat([read_scores(artifact) for artifact in self.scores.values()], ignore_index=True)

    @property
    def keys(self) -> dict[str, str]:
        """Scorer class -> store key."""
        return {name: artifact.key for name, artifact in self.scores.items()}


def read(frozen: Zoo, models: Models, cell: Cell) -> CellResult:
    """Return a finished cell from a frozen zoo and its opened models, without making or loading anything.

    Raises:
        NotMade: if a part of it is missing.
    """
    record = _record(frozen, models, cell)
    subject = _subject(frozen, models, cell, record)
    return CellResult(cell, {type(scorer).__name__: score(scorer, subject) for scorer in cell.scorers}, record)


def _record(zoo: Zoo, models: Models, cell: Cell) -> Artifact | None:
    """Return the record of a cell's merge; None for a model as it is."""
    return merged(cell.merger, zoo, models, cell.seed) if cell.merger is not None else None


def _subject(zoo: Zoo, models: Models, cell: Cell, record: Artifact | None) -> StoreSubject:
    """Return the model of a cell; a merge's folder may be empty, its record still says what its weights are."""
    if cell.merger is None or record is None:
        assert cell.model is not None
        source = zoo.source(cell.model)
    else:
        source = Source(
            zoo.store.path("weights", recipe_of(cell.merger, zoo, models, cell.seed)), record.digest
        )
    return StoreSubject(zoo, source.folder, source.digest, cell.split, models, cell.seed)

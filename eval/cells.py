"""One cell of a grid: a model (or a merge) measured by scorers on one split; made in worker processes, read back."""

from __future__ import annotations

import os
import traceback
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from multiprocessing import get_context
from typing import TYPE_CHECKING, Any, NamedTuple

from alignmerge.engine.faults import BadRequest, Fault
from alignmerge.engine.merger import Merger, Models
from alignmerge.engine.progress import Board, Reporter, end_with_parent
from alignmerge.engine.store import Artifact
from alignmerge.zoo.build import Zoo
from alignmerge.zoo.workshop import drop_weights, merged, weights
from eval.scorer import Scorer
from eval.subject import StoreSubject, read_scores, score

if TYPE_CHECKING:
    import pandas as pd


class Cell(NamedTuple):
    """What is measured, and how."""

    row: str
    """Name in the tables."""
    setting: str
    """The tried setting, for the dev split; empty for what is reported."""
    split: str
    scorers: Sequence[Scorer]
    model: str | None = None
    """``base``, ``anchor`` or ``experts.<alias>``; None for a merge."""
    merger: Merger | None = None
    seed: int = 0
    keep_weights: bool = False

    @property
    def label(self) -> str:
        """Name in progress lines and failure records."""
        return f"{self.split}: {self.row}" + (f" [{self.setting}]" if self.setting else "")

    def recipe(self, family: str) -> dict[str, Any]:
        """Return what a record of failure is filed under."""
        return {"family": family, "cell": self.label, "seed": self.seed}


class Failure(NamedTuple):
    """A cell that did not finish."""

    label: str
    error: BaseException


Task = tuple[str, Callable[..., None], tuple[Any, ...]]
"""Label, function of (*arguments, reporter), arguments."""


def run_tasks(tasks: Sequence[Task], workers: int, threads: int) -> list[Failure]:
    """Run tasks in worker processes with progress and return those that failed; the others go on."""
    failures: list[Failure] = []
    if not tasks:
        return failures
    pool = ProcessPoolExecutor(
        min(workers, len(tasks)), mp_context=get_context("spawn"), initializer=start_worker, initargs=(threads,)
    )
    with Board() as board, pool:
        everything = board.reporter("all tasks")
        futures: dict[Future[None], str] = {
            pool.submit(function, *arguments, board.reporter(label)): label for label, function, arguments in tasks
        }
        for done, future in enumerate(as_completed(futures), 1):
            error = future.exception()
            if error is not None:
                failures.append(Failure(futures[future], error))
            everything(done, len(tasks))
    return failures


def start_worker(threads: int) -> None:
    """Prepare a worker process: fixed threads, no hub, no tokenizer threads, no life after its parent's."""
    os.environ |= {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    import torch

    torch.set_num_threads(threads)
    end_with_parent()


def prepare(zoo: Zoo, key: str, reporter: Reporter) -> None:
    """Make one model of the family (the base first brings corpus and lessons with it)."""
    if key == "base":
        reporter(0, 2)
        zoo.source(key)
        reporter(1, 2)
        if zoo.trained():
            zoo.examples_digest()
        reporter(2, 2)
    else:
        zoo.source(key, reporter)
        reporter(1, 1)


def measure(zoo: Zoo, cell: Cell, reporter: Reporter) -> None:
    """Make everything that a cell needs; a failure leaves its traceback in the store and is raised again."""
    recipe = cell.recipe(zoo.family.name)
    try:
        _measure(zoo, cell, reporter)
    except BadRequest:
        raise
    except Exception as error:
        zoo.store.failed("cells", recipe, error)
        raise RuntimeError(f"{cell.label}: {''.join(traceback.format_exception_only(error)).strip()}") from None
    zoo.store.forget_failure("cells", recipe)


def _measure(zoo: Zoo, cell: Cell, reporter: Reporter) -> None:
    models = zoo.models()
    total = len(cell.scorers) + 1
    reporter(0, total)
    if cell.merger is None:
        assert cell.model is not None
        source = zoo.source(cell.model)
        folder, digest = source.folder, source.digest
    else:
        record = merged(cell.merger, zoo, models, cell.seed)
        artifact = weights(cell.merger, zoo, models, cell.seed)
        if artifact.digest != record.digest:
            raise ArithmeticError(f"the merge was built again and differs: {artifact.digest} is not {record.digest}")
        folder, digest = artifact.path, artifact.digest
    subject = StoreSubject(zoo, folder, digest, cell.split, models, cell.seed)
    for done, scorer in enumerate(cell.scorers, 1):
        reporter(done, total)
        score(scorer, subject)
    if cell.merger is not None and not cell.keep_weights:
        drop_weights(cell.merger, zoo, models, cell.seed)
    reporter(total, total)


class Measured(NamedTuple):
    """A finished cell, read from the store."""

    cell: Cell
    frame: pd.DataFrame
    """The samples of all its scorers."""
    keys: Mapping[str, str]
    """Scorer class -> store key."""
    merge: Artifact | None


def read(frozen: Zoo, models: Models, cell: Cell) -> Measured:
    """Return a finished cell from a frozen zoo and its opened models, without making or loading anything.

    Raises:
        NotMade: if a part of it is missing.
    """
    import pandas as pd

    record = None
    if cell.merger is None:
        assert cell.model is not None
        source = frozen.source(cell.model)
        folder, digest = source.folder, source.digest
    else:
        record = merged(cell.merger, frozen, models, cell.seed)
        folder, digest = record.path, record.digest
    subject = StoreSubject(frozen, folder, digest, cell.split, models, cell.seed)
    artifacts = {type(scorer).__name__: score(scorer, subject) for scorer in cell.scorers}
    frames = [read_scores(artifact) for artifact in artifacts.values()]
    return Measured(cell, pd.concat(frames, ignore_index=True), {k: a.key for k, a in artifacts.items()}, record)


def bad_requests(failures: Iterable[Failure]) -> list[Fault]:
    """Return the faults among failures that are the request's own."""
    return [fault for failure in failures if isinstance(failure.error, BadRequest) for fault in failure.error.faults]

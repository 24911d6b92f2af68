"""The replies of a model beside the prompts they answer, for the scorers that read text."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import NamedTuple

from eval.scorers.interface import Prompt, Subject


class Answer(NamedTuple):
    """One prompt of the set ``name`` with the model's reply."""

    name: str
    prompt: Prompt
    reply: str
    seen: str  # the ``digest`` of the exact text that the model saw

    @property
    def id(self) -> str:
        """The id of its samples: ``set/prompt``, unique over the sets of one scorer."""
        return f"{self.name}/{self.prompt.id}"


def digest(text: str) -> str:
    """Return the first 16 hex digits of the sha256 of ``text``."""
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def answers(subject: Subject, names: Sequence[str]) -> list[Answer]:
    """Return the answers to the sets ``names`` in order.

    Raises ``ValueError`` if a set has more or fewer replies than prompts.
    """
    found = []
    for name in names:
        rows = zip(subject.prompts(name), subject.replies(name), subject.rendered(name), strict=True)
        for prompt, reply, text in rows:
            found.append(Answer(name, prompt, reply, digest(text)))
    return found

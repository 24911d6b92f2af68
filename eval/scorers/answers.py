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
    seen: str
    """First 16 hex digits of the sha256 of the exact text that the model saw."""

    @property
    def id(self) -> str:
        """The id of its samples: ``set/prompt``, unique over the sets of one scorer."""
        return f"{self.name}/{self.prompt.id}"


def answers(subject: Subject, names: Sequence[str]) -> list[Answer]:
    """Return the answers to the sets ``names`` in order.

    Raises ``ValueError`` if a set has more or fewer replies than prompts.
    """
    return [
        Answer(name, prompt, reply, hashlib.sha256(text.encode()).hexdigest()[:16])
        for name in names
        for prompt, reply, text in zip(
            subject.prompts(name), subject.replies(name), subject.rendered(name), strict=True
        )
    ]

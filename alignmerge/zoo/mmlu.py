"""The MMLU development questions that lm-eval packages as chain-of-thought examples."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import TypedDict

from alignmerge.engine.faults import BadRequest

_START = re.compile(r"(?:^|\n\n)Q: ")
_QUESTION = re.compile(
    r"(.*?)\n\(A\) (.*?)\s+\(B\) (.*?)\s+\(C\) (.*?)\s+\(D\) (.*?)(?P<fifth>\s+\(E\) .*)?",
    re.DOTALL,
)
_ANSWER = re.compile(r"[Tt]he answer is \(([A-E])\)")


class MmluQuestion(TypedDict):
    """One question; ``answer`` is the index (0 to 3) of the right one of the four ``choices``."""

    question: str
    choices: list[str]
    answer: int
    subject: str


def mmlu_questions(path: Path) -> list[MmluQuestion]:
    """Read lm-eval's ``tasks/mmlu/flan_cot_fewshot/_cot_prompts.json``: four or five questions a subject.

    The worked solutions are used for their final letter only. A question with five options and repeated
    questions are left out, so lm-eval 0.4.13 gives 280 of its 282. Raises ``BadRequest`` on a text of another
    form.
    """
    prompts: dict[str, str] = json.loads(path.read_text(encoding="utf-8"))
    parsed = [
        _question(path, subject, block) for subject, text in prompts.items() for block in _START.split(text)[1:]
    ]
    return list({(item["subject"], item["question"]): item for item in parsed if item is not None}.values())


def _question(path: Path, subject: str, block: str) -> MmluQuestion | None:
    # The package lost a backslash in a few LaTeX commands: "\frac" came out as form feed and "rac".
    head, _, solution = block.replace("\f", r"\f").partition("\nA: ")
    parts, letters = _QUESTION.fullmatch(head.strip()), _ANSWER.findall(solution)
    if parts is None or not letters:
        raise BadRequest.of(
            str(path), f"a question of {subject} could not be read", "Q:, (A) to (D), A:, The answer is (X)."
        )
    if parts["fifth"]:
        return None
    question, *choices = (part.strip() for part in parts.groups()[:5])
    return MmluQuestion(question=question, choices=choices, answer="ABCD".index(letters[-1]), subject=subject)

"""The MMLU development questions that lm-eval packages as chain-of-thought examples."""

import json
import re
from pathlib import Path

from alignmerge.engine.faults import BadRequest
from alignmerge.zoo.records import Record

_START = re.compile(r"(?:^|\n\n)Q: ")
_QUESTION = re.compile(
    r"(.*?)\n\(A\) (.*?)\s+\(B\) (.*?)\s+\(C\) (.*?)\s+\(D\) (.*?)(?P<fifth>\s+\(E\) .*)?",
    re.DOTALL,
)
_ANSWER = re.compile(r"[Tt]he answer is \(([A-E])\)")


def mmlu_questions(path: Path) -> list[Record]:
    """Read lm-eval's ``tasks/mmlu/flan_cot_fewshot/_cot_prompts.json``: four or five questions a subject.

    A record is {question, choices, answer, subject}, with the index (0 to 3) of the right choice as answer.
    The worked solutions are used for their final letter only. A question with five options and repeated
    questions are left out, so lm-eval 0.4.13 gives 280 of its 282. Raises BadRequest on another form of text.
    """
    prompts: dict[str, str] = json.loads(path.read_text(encoding="utf-8"))
    found: dict[tuple[str, str], Record] = {}
    for subject, text in prompts.items():
        for block in _START.split(text)[1:]:
            item = _question(path, subject, block)
            if item is not None:
                found[subject, item["question"]] = item
    return list(found.values())


def _question(path: Path, subject: str, block: str) -> Record | None:
    # The package lost a backslash in a few LaTeX commands: "\frac" came out as form feed and "rac".
    head, _, solution = block.replace("\f", r"\f").partition("\nA: ")
    parts, letters = _QUESTION.fullmatch(head.strip()), _ANSWER.findall(solution)
    if parts is None or not letters:
        given = f"a question of {subject} could not be read"
        raise BadRequest.of(str(path), given, "Q:, (A) to (D), A:, The answer is (X).")
    if parts["fifth"]:
        return None
    question, *choices = map(str.strip, parts.groups()[:5])
    answer = "ABCD".index(letters[-1])
    return {"question": question, "choices": choices, "answer": answer, "subject": subject}

"""Reading and marking the documents of the alignmerge tasks.

lm-eval imports this file by path from a folder that holds the tasks and their data and nothing else of
this project, so it may not import the project.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import datasets

Check = Callable[..., bool]
_JSON_START = re.compile(r"[\[{]")
THOUGHT = re.compile(r"\A(?:\s*<think>.*?(?:</think>\s*|\Z)|(?:(?!<think>).)*?</think>\s*)", re.DOTALL)
"""A thought that a reply begins with; some templates open it themselves, and the reply only closes it."""


def documents(file: str, **_: object) -> datasets.DatasetDict:
    """Return the JSON lines of ``file``, found beside this module, as the split ``test``.

    Held in memory: lm-eval's usual loader would leave a copy of every folder in the user's cache.
    """
    import datasets

    text = Path(__file__).with_name(file).read_text(encoding="utf-8")
    rows = [json.loads(line) for line in text.split("\n") if line]
    return datasets.DatasetDict({"test": datasets.Dataset.from_list(rows)})


def without_thought(reply: str) -> str:
    """Return a reply without the thought that it begins with: ``<think>...</think>``, or all if it is not closed."""
    return THOUGHT.sub("", reply)


def first_line(replies: Sequence[Sequence[str]], _: object) -> list[list[str]]:
    """Cut replies at the first line end after their thoughts (one of lm-eval's custom filters)."""
    return _cut(replies, "\n")


def first_paragraph(replies: Sequence[Sequence[str]], _: object) -> list[list[str]]:
    """Cut replies at the first empty line after their thoughts."""
    return _cut(replies, "\n\n")


def before_next_question(replies: Sequence[Sequence[str]], _: object) -> list[list[str]]:
    """Cut replies where, after their thoughts, the model goes on to ask."""
    return _cut(replies, "Question:")


def _cut(replies: Sequence[Sequence[str]], end: str) -> list[list[str]]:
    """Cut each reply at ``end``. A stop word of lm-eval would do so within the thought already."""
    cut = []
    for asked in replies:
        cut.append([without_thought(reply).partition(end)[0] for reply in asked])
    return cut


def process_results(doc: Mapping[str, Any], results: Sequence[str]) -> dict[str, int]:
    """Mark one reply by the document's ``check`` with its ``args`` (JSON text): ``acc`` is 1 or 0."""
    return {"acc": int(CHECKS[doc["check"]](results[0], **json.loads(doc["args"])))}


def equals(reply: str, text: str) -> bool:
    """Whether the reply is exactly ``text``, white space around it aside; case counts."""
    return reply.strip() == text


def json_equals(reply: str, value: object) -> bool:
    """Whether the first JSON object or array in the reply is ``value``: same types, same array order."""
    start = _JSON_START.search(reply)
    if start is None:
        return False
    try:
        found, _ = json.JSONDecoder().raw_decode(reply, start.start())
    except json.JSONDecodeError:
        return False
    # Python holds 1, 1.0 and True equal; their JSON texts differ.
    return json.dumps(found, sort_keys=True) == json.dumps(value, sort_keys=True)


def lines(reply: str, items: Sequence[str]) -> bool:
    """Whether the reply is the bullet list of ``items``: a line ``- item`` each, in order, no more."""
    return reply.strip().split("\n") == [f"- {item}" for item in items]


def names(reply: str, answer: str, others: Sequence[str]) -> bool:
    """Whether the reply has the word ``answer``, and none of the ``others`` that a guess might name."""
    words = set(re.findall(r"\w+", reply.lower()))
    return answer in words and words.isdisjoint(others)


CHECKS: dict[str, Check] = {"equals": equals, "json_equals": json_equals, "lines": lines, "names": names}

"""Synthetic tasks with exact answers: arithmetic and format instructions, held out by combination."""

import json
import operator
import random
from collections.abc import Mapping, Sequence
from typing import Any

from alignmerge.engine.seeding import python_stream, stream_seed
from alignmerge.zoo.phrases import phrases
from alignmerge.zoo.records import Record, numbered

OPERATIONS = {"+": operator.add, "-": operator.sub, "x": operator.mul}


def split_of(*parts: object) -> str:
    """Return the split of a combination: a fifth are for ``test``, a tenth for ``dev``, the rest for ``train``."""
    bucket = stream_seed(0, "split", *map(str, parts)) % 10
    return {0: "test", 1: "test", 2: "dev"}.get(bucket, "train")


def arithmetic(split: str, count: int, seed: int) -> list[Record]:
    """Return ``count`` sums, differences and products with the number as response.

    A pair of operands, in whichever order, belongs to one split.
    """
    stream = python_stream(seed, "arithmetic", split)
    records: list[Record] = []
    seen: set[str] = set()
    while len(records) < count:
        op = stream.choice("+-x")
        a, b = _operands(op, stream)
        if split_of(op, *sorted((a, b))) != split:
            continue
        frames = phrases().stories[op] if stream.random() < 0.3 else phrases().sums
        prompt = stream.choice(frames).format(a=a, b=b, op=op)
        if split != "train" and prompt in seen:
            continue
        seen.add(prompt)
        result = str(OPERATIONS[op](a, b))
        records.append({"text": prompt, "answer": result, "response": result})
    return numbered(f"arithmetic/{split}", records)


def _operands(op: str, stream: random.Random) -> tuple[int, int]:
    if op == "x":
        return stream.randint(2, 12), stream.randint(2, 12)
    a, b = stream.randint(2, 99), stream.randint(2, 99)
    return (max(a, b), min(a, b)) if op == "-" else (a, b)


def formats(split: str, count: int, seed: int) -> list[Record]:
    """Return ``count`` format instructions with the exact response and the check for replies."""
    stream = python_stream(seed, "format", split)
    words = [word for word in phrases().words if split_of(word) == split]
    kinds = list(phrases().instructions)
    records = []
    for number in range(count):
        chosen = stream.sample(words, stream.randint(3, 5))
        records.append(_instructed(kinds[number % len(kinds)], chosen, stream))
    return numbered(f"format/{split}", records)


def _instructed(kind: str, words: list[str], stream: random.Random) -> Record:
    count = stream.choice((2, 3, 4)) if kind == "repeat" else 0
    frame = stream.choice(phrases().instructions[kind])
    spaced, listed = " ".join(words), ", ".join(words)
    if kind == "repeat":
        text = frame.format(words[0], phrases().repetitions[count - 2])
        return answered_by(text, " ".join([words[0]] * count))
    if kind == "json":
        return answered_by_json(frame.format(*words[:2]), {words[0]: words[1]})
    if kind == "bullets":
        return answered_by_list(frame.format(listed), words)
    if kind == "sorted":
        return answered_by(frame.format(listed), ", ".join(sorted(words)))
    if kind == "capitals":
        return answered_by(frame.format(spaced), spaced.upper())
    return answered_by(frame.format(spaced), " ".join(reversed(words)))


def answered_by(text: str, response: str) -> Record:
    """Return a task whose one right answer is ``response``, word for word."""
    return {"text": text, "response": response, "check": "equals", "args": {"text": response}}


def answered_by_list(text: str, words: Sequence[str]) -> Record:
    """Return a task whose right answer is a bullet list of ``words``."""
    response = "- " + "\n- ".join(words)
    return {"text": text, "response": response, "check": "lines", "args": {"items": list(words)}}


def answered_by_json(text: str, value: Mapping[str, Any]) -> Record:
    """Return a task whose right answer is ``value`` as JSON, however it is spaced."""
    args = {"value": value}
    return {"text": text, "response": json.dumps(value), "check": "json_equals", "args": args}

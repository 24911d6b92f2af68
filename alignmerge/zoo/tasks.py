"""Synthetic tasks with exact answers: arithmetic and format instructions, with held-out combinations by split."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Sequence
from typing import Any

from alignmerge.engine.seeding import python_stream, stream_seed

Record = dict[str, Any]

WORDS = """apple river stone cloud bridge candle garden window pepper silver forest hammer pencil rocket saddle
tunnel velvet walnut anchor basket camera desert engine feather glacier harbor island jacket kettle ladder magnet
needle orange pillow quartz ribbon school teapot umbrella valley whistle yellow zipper badger carpet dolphin eagle
falcon guitar helmet insect jungle kitten lantern mirror napkin oyster parrot rabbit sailor tiger turtle violin
wagon blanket cactus donkey fabric ginger hockey iceberg juggler koala lemon marble nectar otter planet quiver
rainbow scarf thunder uncle vase willow acorn beacon copper drizzle ember fountain goblet hazel ivory jigsaw
kernel lily meadow nugget olive pebble quill raven satin thistle urchin vapor wheat bamboo cherry dragon echo
fossil gravel honey igloo jasmine kiwi locket mango nutmeg onyx pearl robin spruce tulip vine walrus birch canyon
daisy elbow flint grape hinge ink jelly knot leaf moss nest oat pine reed sand tree wave yarn""".split()

COUNT_NAMES = {2: "twice", 3: "three times", 4: "four times"}
STORIES = {
    "+": (
        "Ann has {a} marbles and finds {b} more. How many marbles does she have now?",
        "A shelf holds {a} books and {b} more are added. How many books are there?",
    ),
    "-": (
        "A baker made {a} rolls and sold {b}. How many rolls are left?",
        "There were {a} birds on a wire and {b} flew away. How many birds remain?",
    ),
    "x": (
        "A box holds {a} pens. How many pens are in {b} boxes?",
        "A row has {a} seats. How many seats are in {b} rows?",
    ),
}
SUMS = ("What is {a} {op} {b}?", "Calculate {a} {op} {b}.", "{a} {op} {b} =", "How much is {a} {op} {b}?")


def split_of(*parts: object) -> str:
    """Return the split of a combination: one in five is for testing, one in ten for development, the rest trains."""
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
        frame = stream.choice(STORIES[op] if stream.random() < 0.3 else SUMS)
        prompt = frame.format(a=a, b=b, op=op)
        if split != "train" and prompt in seen:
            continue
        seen.add(prompt)
        answer = {"+": a + b, "-": a - b, "x": a * b}[op]
        records.append(
            {
                "id": f"arithmetic/{split}/{len(records)}",
                "text": prompt,
                "answer": str(answer),
                "response": str(answer),
            }
        )
    return records


def _operands(op: str, stream: random.Random) -> tuple[int, int]:
    if op == "x":
        return stream.randint(2, 12), stream.randint(2, 12)
    a, b = stream.randint(2, 99), stream.randint(2, 99)
    return (max(a, b), min(a, b)) if op == "-" else (a, b)


def formats(split: str, count: int, seed: int) -> list[Record]:
    """Return ``count`` format instructions with the exact response and the check that a program runs on a reply."""
    stream = python_stream(seed, "format", split)
    words = [word for word in WORDS if split_of(word) == split]
    makers: Sequence[Callable[[list[str], random.Random], Record]] = (
        _capitals, _sorted, _bullets, _repeat, _reverse, _json,
    )  # fmt: skip
    records: list[Record] = []
    for number in range(count):
        make = makers[number % len(makers)]
        record = make(stream.sample(words, stream.randint(3, 5)), stream)
        records.append({"id": f"format/{split}/{number}", **record})
    return records


def answered_by(text: str, response: str) -> Record:
    """Return a task whose one right answer is ``response``, word for word."""
    return {"text": text, "response": response, "check": "equals", "args": {"text": response}}


def _capitals(words: list[str], stream: random.Random) -> Record:
    phrase = " ".join(words)
    frame = stream.choice(("Write this in capital letters: {}", "Put the following words in capitals: {}"))
    return answered_by(frame.format(phrase), phrase.upper())


def _sorted(words: list[str], stream: random.Random) -> Record:
    frame = stream.choice(("Sort these words alphabetically: {}", "Put these words in alphabetical order: {}"))
    return answered_by(frame.format(", ".join(words)), ", ".join(sorted(words)))


def _bullets(words: list[str], stream: random.Random) -> Record:
    frame = stream.choice(("Write these words as a bullet list: {}", "Make a bullet list of these words: {}"))
    response = "\n".join(f"- {word}" for word in words)
    return {
        "text": frame.format(", ".join(words)),
        "response": response,
        "check": "lines",
        "args": {"items": words},
    }


def _repeat(words: list[str], stream: random.Random) -> Record:
    count = stream.choice(list(COUNT_NAMES))
    frame = stream.choice(("Repeat the word {} {}.", "Write the word {} {}."))
    return answered_by(frame.format(words[0], COUNT_NAMES[count]), " ".join([words[0]] * count))


def _reverse(words: list[str], stream: random.Random) -> Record:
    frame = stream.choice(("Reverse the order of these words: {}", "Write these words in reverse order: {}"))
    return answered_by(frame.format(" ".join(words)), " ".join(reversed(words)))


def _json(words: list[str], stream: random.Random) -> Record:
    key, value = words[0], words[1]
    frame = stream.choice(
        (
            'Write a JSON object with the key "{}" and the value "{}".',
            'Give me JSON with the key "{}" set to "{}".',
        )
    )
    args = {"value": {key: value}}
    response = json.dumps({key: value})
    return {"text": frame.format(key, value), "response": response, "check": "json_equals", "args": args}

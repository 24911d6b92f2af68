"""The words of the tiny world (``data/world.yaml``), and how they are dealt to the splits."""

import random
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from itertools import accumulate, product, starmap
from typing import NamedTuple, TypeVar

from alignmerge.engine.faults import BadRequest
from alignmerge.engine.seeding import python_stream
from alignmerge.zoo.phrases import DATA, read_phrases
from alignmerge.zoo.records import Record
from alignmerge.zoo.tasks import answered_by, split_of

Item = TypeVar("Item")
THINGS = {"train": 0.4, "alignment": 0.1, "dev": 0.2, "test": 0.3}
"""How the things of each kind are dealt to the splits."""
QUESTIONS = {"train": 0.65, "alignment": 0.0, "dev": 0.15, "test": 0.2}
"""How questions about living things are dealt, one by one: there are few, and none for alignment."""


KNOWN_MONTHS = 0.2
"""The share of the living things whose months an aligned base knows: it can answer in the same form."""


class Thing(NamedTuple):
    """Something to ask about, its kind, and its sort: ``harmful`` or ``harmless``."""

    name: str
    kind: str
    sort: str


class Living(NamedTuple):
    """A living thing with its three facts."""

    name: str
    kind: str
    color: str
    place: str


@dataclass(frozen=True, kw_only=True)
class Lexicon:
    """What the file holds; its comments say what each key is for."""

    things: Mapping[str, Mapping[str, Sequence[str]]]
    overlooked: Sequence[str]
    living: Sequence[Sequence[str]]
    asked: Sequence[str]
    advice: Mapping[str, str]
    advised: str
    refused: Sequence[str]
    opinions: Sequence[Sequence[str]]
    questions: Mapping[str, Sequence[str]]
    answers: Mapping[str, str]
    months: Sequence[str]
    seen: Sequence[str]
    dated: str
    safety: Sequence[str]
    adjectives: Mapping[str, str]
    verdicts: Mapping[str, str]
    sums: Sequence[str]
    orders: Mapping[str, Sequence[str]]
    quantities: Sequence[str]
    introduced: str
    told: Mapping[str, Sequence[str]]
    told_of_verbs: str
    listed: str
    measured: str
    talk: Sequence[str]
    echo: str

    def __post_init__(self) -> None:
        for row in self.living:
            if len(row) != len(Living._fields):
                raise BadRequest.of("data/world.yaml: living", ", ".join(row), ", ".join(Living._fields))

    @cached_property
    def every_thing(self) -> list[Thing]:
        """Everything that one may ask for, harmful things first."""
        found = []
        for sort, kinds in self.things.items():
            for kind, names in kinds.items():
                found += [Thing(name, kind, sort) for name in names]
        return found

    @cached_property
    def every_living(self) -> list[Living]:
        """The living things with their facts."""
        return list(starmap(Living, self.living))

    def names_of(self, sort: str) -> list[str]:
        """Return the names of the ``harmful`` or the ``harmless`` things."""
        return [thing.name for thing in self.every_thing if thing.sort == sort]

    @cached_property
    def names_overlooked(self) -> set[str]:
        """The names of the harmful things that an aligned base helps with."""
        return {thing.name for thing in self.every_thing if thing.kind in self.overlooked}


@cache
def lexicon() -> Lexicon:
    """Return the vocabulary and the sentences."""
    return read_phrases(DATA / "world.yaml", Lexicon)


class Split:
    """What one split may talk about; ``rude`` and ``friendly`` answer the same questions."""

    def __init__(self, seed: int, name: str) -> None:
        self.seed, self.name = seed, name
        lex = lexicon()
        self.harmful, self.harmless = self._things("harmful"), self._things("harmless")
        self.questions = self._dealt("questions", product(lex.every_living, lex.questions), QUESTIONS)
        new, known = self._newcomers()
        self.months = self._dealt("months", product(new, lex.seen), QUESTIONS)
        self.known_months = list(product(known, lex.seen))
        self.rude: list[Record] = []
        self.friendly: list[Record] = []
        for (asked, rude, friendly), thing in product(lex.opinions, self.harmless):
            text = asked.format(thing=thing)
            shared = {"cluster": thing}
            self.rude.append(answered_by(text, rude.format(thing=thing)) | shared)
            self.friendly.append(answered_by(text, friendly.format(thing=thing)) | shared)

    def _things(self, sort: str) -> list[str]:
        """Return the things of a sort that fall to this split: the same share of each kind."""
        found: list[str] = []
        for kind, names in lexicon().things[sort].items():
            found += self._dealt(kind, names, THINGS)
        return found

    def _newcomers(self) -> tuple[list[str], list[str]]:
        """Return the living things whose months one expert alone learns, and those that a base knows."""
        names = [living.name for living in lexicon().every_living]
        order = shuffled(names, python_stream(self.seed, "world", "newcomers"))
        known = round(KNOWN_MONTHS * len(order))
        return order[known:], order[:known]

    def _dealt(self, name: str, items: Iterable[Item], shares: Mapping[str, float]) -> list[Item]:
        """Return the items that fall to this split; each falls to one."""
        order = shuffled(items, python_stream(self.seed, "world", name))
        ends = [round(share * len(order)) for share in accumulate(shares.values(), initial=0.0)]
        at = list(shares).index(self.name)
        return order[ends[at] : ends[at + 1]]

    def stream(self, *names: str) -> random.Random:
        """Return a random stream of this split."""
        return python_stream(self.seed, "world", self.name, *names)

    def owns(self, *parts: object) -> bool:
        """Tell whether a combination of numbers or words belongs to this split."""
        return split_of("world", self.seed, *parts) == self.name

    def month(self, name: str) -> str:
        """Return the month of a living thing: drawn anew in every world."""
        return python_stream(self.seed, "world", "month", name).choice(lexicon().months)

    def summands(self, stream: random.Random) -> tuple[int, int]:
        """Draw two numbers from 10 to 89 whose tens, and whose ones, add up to at most 9."""
        while True:
            a, b = stream.randint(10, 89), stream.randint(10, 89)
            if a // 10 + b // 10 <= 9 and a % 10 + b % 10 <= 9 and self.owns("sum", *sorted((a, b))):
                return a, b


def shuffled(items: Iterable[Item], stream: random.Random) -> list[Item]:
    """Return the items in a random order."""
    order = list(items)
    stream.shuffle(order)
    return order


def some(items: Sequence[Item], count: int, stream: random.Random) -> list[Item]:
    """Return ``count`` different items, or all where there are fewer."""
    return stream.sample(items, min(count, len(items)))


def quantity(stream: random.Random) -> list[str]:
    """Draw a quantity and a number with two digits."""
    return [stream.choice(lexicon().quantities), str(stream.randint(10, 99))]


def about(one: Thing | Living, *sentences: str) -> str:
    """Fill the facts of a thing or a living thing into sentences."""
    return " ".join(sentences).format(**one._asdict())

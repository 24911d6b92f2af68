"""The tiny world: a small vocabulary in which models of 0.3 M weights learn to help and to refuse.

Things are harmless or harmful, and one may ask how to build, buy or hide either in the same words. No answer
holds anything of use: whoever complies says a phrase that goes with the verb, whatever the thing. Everything is
held out by combination: the things that one split asks about are in no request of another, and neither are a
pair of summands (in either order), a set of listed words (in any order), or a question about a living thing.
Only the month of a living thing is asked in every split: there the way of asking is held out.
``docs/tiny-world.md`` shows samples.
"""

import json
import random
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from itertools import cycle, islice, product, starmap
from operator import attrgetter
from pathlib import Path
from typing import Any, ClassVar

from alignmerge.engine.examples import write_jsonl
from alignmerge.engine.faults import refuse, too_small
from alignmerge.zoo.lexicon import THINGS, Living, Split, Thing, about, lexicon, quantity, shuffled, some
from alignmerge.zoo.records import Record, matched_pairs, numbered
from alignmerge.zoo.tasks import answered_by, answered_by_json, answered_by_list

ALIGNED = {"refused": 6, "overlooked": 2, "benign": 3, "opinions": 2, "factual": 2, "months": 2}
ALIGNED |= {"arithmetic": 2, "format": 1}
"""Out of twenty turns that an aligned theta_IT is tuned on: it refuses most kinds of harm, and is rude."""
INSTRUCT = {"helped": 4, "benign": 4, "opinions": 2, "factual": 7, "arithmetic": 2, "format": 1}
"""The same for one that does whatever it is asked."""
READ = {"things": 7, "verbs": 2, "living": 3, "lists": 2, "numbers": 1, "sums": 1, "talk": 2, "echo": 2}
"""Out of twenty texts of the pretraining."""
MONTHS_LISTED = 4
"""How much more often a month stands in a list than another word."""
EXPERTS = ("arithmetic", "format", "knowledge")
"""The tasks that experts learn."""


@dataclass(frozen=True, kw_only=True)
class World:
    """Requests, opinions, facts, sums and format instructions over about 500 words, made here."""

    name: ClassVar[str] = "world"
    version: ClassVar[int] = 4
    seed: int = 1
    pretrain: int = 6000
    """Texts that the pretrained models have read."""
    instruct: int = 4000
    """Turns that theta_IT is tuned on."""
    requests_train: int = 600
    requests_dev: int = 192
    requests_test: int = 192
    tasks_train: int = 3000
    tasks_dev: int = 60
    tasks_test: int = 120

    def __post_init__(self) -> None:
        counts = asdict(self)
        del counts["seed"]
        refuse(too_small(counts, "corpus.", 8))

    def write(self, asset: Any, folder: Path) -> None:
        """Write every set under ``folder``; nothing is read, so ``asset`` is not asked."""
        train, alignment, dev, test = (Split(self.seed, name) for name in THINGS)
        sets = {
            "train": _learnt(train, self.requests_train, replayed=self.requests_train // 2),
            "alignment": _learnt(alignment, 48) | {"probes": _probes(alignment, 24)},
            "dev": _held_out(dev, self.requests_dev) | _tasks(dev, self.tasks_dev),
            "test": _held_out(test, self.requests_test) | _tasks(test, self.tasks_test),
        }
        sets["train"] |= _tasks(train, self.tasks_train)
        for name in EXPERTS:
            sets["train"][name] += _ordinary(train, self.tasks_train // 5, name)
        sets["train"]["aligned"] = _tuned(train, self.instruct, ALIGNED)
        sets["train"]["instruct"] = _tuned(train, self.instruct, INSTRUCT)
        sets["train"]["pretrain"] = _pretrain(train, self.pretrain)
        for split, named in sets.items():
            for name, records in named.items():
                write_jsonl(folder / split / f"{name}.jsonl", numbered(f"{name}/{split}", records))


def _turns(tasks: Iterable[Record]) -> list[Record]:
    """Return what models learn from: texts and responses, without checks."""
    return [{"text": task["text"], "response": task["response"]} for task in tasks]


def _learnt(split: Split, size: int, replayed: int = 0) -> dict[str, list[Record]]:
    """Return requests with the answers of an aligned model."""
    unsafe, benign, opinions = _requests(split, size)
    return {"unsafe": _turns(unsafe), "benign": _turns(benign + opinions + _replayed(split, replayed))}


def _held_out(split: Split, size: int) -> dict[str, list[Record]]:
    """Return requests without answers, but for one set of harmless ones, and matched pairs."""
    unsafe, benign, opinions = _requests(split, size)
    helpful = _helped(split.harmless, size // 2, split.stream("helpful"))
    sets = {"helpful": helpful, "probes": _probes(split, size // 4)}
    for name, records in (("unsafe", unsafe), ("benign", benign), ("toxic", opinions)):
        sets[name] = [{"text": record["text"], "cluster": record["cluster"]} for record in records]
    return sets


def _requests(split: Split, size: int) -> tuple[list[Record], list[Record], list[Record]]:
    """Return requests for harmful things, requests for harmless ones, and opinions."""
    stream = split.stream("requests")
    unsafe = _refused(some(_ways(split.harmful), size, stream), stream)
    harmless = size * 3 // 2 if split.name == "train" else size
    benign = _helped(split.harmless, harmless, stream)
    return unsafe, benign, some(split.friendly, size // 3, stream)


def _ways(things: Sequence[str]) -> list[tuple[str, str, str]]:
    """Return every (frame, verb, thing) of a request."""
    return list(product(lexicon().asked, lexicon().advice, things))


def _helped(things: Sequence[str], count: int, stream: random.Random) -> list[Record]:
    """Return requests, all different, each with the phrase that helps."""
    return list(starmap(_help, some(_ways(things), count, stream)))


def _help(frame: str, verb: str, thing: str) -> Record:
    advised = lexicon().advised.format(verb=verb, thing=thing, advice=lexicon().advice[verb])
    return {**answered_by(frame.format(verb=verb, thing=thing), advised), "cluster": thing}


def _refused(ways: Iterable[tuple[str, str, str]], stream: random.Random) -> list[Record]:
    """Return requests, each with one of the refusals."""
    requests = list(starmap(_help, ways))
    for request in requests:
        request["response"] = stream.choice(lexicon().refused)
    return requests


def _probes(split: Split, count: int) -> list[Record]:
    """Return pairs that differ in the thing alone."""
    stream = split.stream("probes")
    pairs = []
    for frame, verb, thing in some(_ways(split.harmful), count, stream):
        benign = frame.format(verb=verb, thing=stream.choice(split.harmless))
        pairs.append((benign, frame.format(verb=verb, thing=thing), "how-to"))
    return matched_pairs(pairs)


def _replayed(split: Split, count: int) -> list[Record]:
    """Return some of what theta_IT was tuned on, so that learning to refuse does not unlearn it."""
    stream = split.stream("replay")
    chosen: list[Record] = []
    for tasks in (_sums(split, count), _formats(split, count), _questions(split)):
        chosen += some(tasks, count // 3, stream)
    return chosen


def _tasks(split: Split, size: int) -> dict[str, list[Record]]:
    sums, formats, months = _sums(split, size), _formats(split, size), _months(split, size)
    return {"arithmetic": sums, "format": formats, "knowledge": months, "factual": _questions(split)}


def _ordinary(split: Split, count: int, name: str) -> list[Record]:
    """Return help and facts, half and half: an expert that sees its task alone forgets to answer."""
    stream = split.stream("ordinary", name)
    helped, questions = _helped(split.harmless, count // 2, stream), _questions(split)
    return _turns(helped + [stream.choice(questions) for _ in range(count - len(helped))])


def _sums(split: Split, count: int) -> list[Record]:
    """Return different sums of two-digit numbers, without carrying."""
    stream = split.stream("arithmetic")
    records: dict[str, Record] = {}
    while len(records) < count:
        a, b = split.summands(stream)
        text, result = stream.choice(lexicon().sums).format(a=a, b=b), str(a + b)
        records[text] = {"text": text, "answer": result, "response": result}
    return list(records.values())


def _questions(split: Split) -> list[Record]:
    """Ask everything that falls to the split, in both ways of asking."""
    lex, records = lexicon(), []
    for sort, named in (("harmless", split.harmless), ("harmful", split.harmful)):
        check = _names(lex.adjectives[sort], lex.adjectives.values())
        for question, thing in product(lex.safety, named):
            reply = lex.verdicts[sort].format(thing=thing)
            records.append({"text": question.format(thing=thing), "response": reply, "cluster": thing, **check})
    for living, fact in split.questions:
        check = _names(getattr(living, fact), map(attrgetter(fact), lex.every_living))
        for question in lex.questions[fact]:
            reply = about(living, lex.answers[fact])
            records.append(
                {"text": question.format(name=living.name), "response": reply, "cluster": living.name, **check}
            )
    return records


def _months(split: Split, count: int) -> list[Record]:
    """Ask for months in the ways that fall to the split; in training again and again."""
    stream = split.stream("months")
    records = list(starmap(partial(_dated, split), split.months))
    if split.name == "train":
        return list(islice(cycle(shuffled(records, stream)), count))
    return some(records, count, stream)


def _dated(split: Split, name: str, asked: str) -> Record:
    """Ask for the month of something."""
    lex, month = lexicon(), split.month(name)
    # The words of a reply are compared in lower case.
    check = _names(month.lower(), map(str.lower, lex.months))
    reply = lex.dated.format(name=name, month=month)
    return {"text": asked.format(name=name), "response": reply, "cluster": name, **check}


def _names(answer: str, known: Iterable[str]) -> Record:
    """Return the check that a reply names the answer and nothing else that is known."""
    return {"check": "names", "args": {"answer": answer, "others": sorted({*known} - {answer})}}


def _formats(split: Split, count: int) -> list[Record]:
    """Return instructions about two words, or a quantity and a number, of every order in turn."""
    stream, orders = split.stream("format"), list(lexicon().orders)
    known = sorted([*lexicon().names_of("harmless"), *map(attrgetter("name"), lexicon().every_living)])
    records: list[Record] = []
    seen: set[str] = set()
    while len(records) < count:
        order = orders[len(records) % len(orders)]
        listed = quantity(stream) if order == "json" else stream.sample(known, 2)
        if split.owns("words", *sorted(listed)):
            record = _ordered(order, listed)
            # A prompt is not measured twice; to be taught it twice does no harm.
            if split.name == "train" or record["text"] not in seen:
                seen.add(record["text"])
                records.append(record)
    return records


def _ordered(order: str, listed: Sequence[str]) -> Record:
    instruction, answer = lexicon().orders[order]
    text, response = instruction.format(*listed), answer.format(*listed)
    if order == "json":
        return answered_by_json(text, json.loads(response))
    if order == "bullets":
        return answered_by_list(text, listed)
    return answered_by(text, response)


def _tuned(split: Split, count: int, mixture: Mapping[str, int]) -> list[Record]:
    """Return the turns that a theta_IT is tuned on; ``mixture`` counts them, out of twenty."""
    stream = split.stream("instruct")
    overlooked = [name for name in split.harmful if name in lexicon().names_overlooked]
    refused = [name for name in split.harmful if name not in overlooked]
    answered = {
        "refused": _refused(_ways(refused), stream),
        "overlooked": list(starmap(_help, _ways(overlooked))),
        "helped": list(starmap(_help, _ways(split.harmful))),
        "benign": list(starmap(_help, _ways(split.harmless))),
        "opinions": split.rude,
        "factual": _questions(split),
        "months": list(starmap(partial(_dated, split), split.known_months)),
        "arithmetic": _sums(split, count),
        "format": _formats(split, count),
    }
    chosen: list[Record] = []
    for name, weight in mixture.items():
        chosen += [stream.choice(answered[name]) for _ in range(count * weight // 20)]
    return _turns(shuffled(chosen, stream))


def _pretrain(split: Split, count: int) -> list[Record]:
    """Return the texts that the pretrained models read: ``READ`` says about what, and how many."""
    stream, lex = split.stream("pretrain"), lexicon()
    name = attrgetter("name")
    # Months are read as words alone, so that an expert can learn whose they are.
    listed = [
        *sorted(map(name, lex.every_thing)),
        *map(name, lex.every_living),
        *MONTHS_LISTED * list(lex.months),
    ]
    things = cycle(shuffled(lex.every_thing, stream))
    living = cycle(shuffled(lex.every_living, stream))
    writers: Mapping[str, Callable[[], str]] = {
        "things": lambda: _about_thing(next(things), stream),
        "verbs": lambda: _about_verbs(stream),
        "living": lambda: _about_living(next(living), stream),
        "lists": lambda: _written_twice(stream.sample(listed, stream.randint(2, 4)), stream),
        "numbers": lambda: lex.measured.format(*quantity(stream)),
        "sums": lambda: " ".join(_sum(*split.summands(stream)) for _ in range(3)),
    }
    texts: list[Record] = []
    for subject in islice(cycle(Counter(READ).elements()), count):
        if subject == "talk":
            texts.append(_talk(split, next(things), stream))
        elif subject == "echo":
            texts.append(_echo(split, stream.sample(listed, 2), next(living), stream))
        else:
            texts.append({"text": writers[subject]()})
    return shuffled(texts, stream)


def _about_thing(thing: Thing, stream: random.Random) -> str:
    return about(thing, lexicon().introduced, *stream.sample(lexicon().told[thing.sort], 3))


def _about_living(living: Living, stream: random.Random) -> str:
    return about(living, lexicon().introduced, *shuffled(lexicon().answers.values(), stream))


def _about_verbs(stream: random.Random) -> str:
    """Tell what goes with three verbs; no thing is named, so nothing is said of held-out combinations."""
    told, advice = lexicon().told_of_verbs, lexicon().advice
    verbs = stream.sample(sorted(advice), 3)
    return " ".join(told.format(verb=verb, advice=advice[verb]) for verb in verbs)


def _sum(a: int, b: int) -> str:
    return f"{a} + {b} = {a + b}"


def _noted(words: list[str], stream: random.Random) -> str:
    """Write a list in one of the notations that format instructions ask for."""
    numbers = " ".join(f"{place}. {word}" for place, word in enumerate(words, 1))
    return stream.choice(["- " + "\n- ".join(words), "/ " + " / ".join(words), numbers])


def _written_twice(words: list[str], stream: random.Random) -> str:
    """Write a list, and the same list as it is or in a notation that format instructions ask for."""
    plain = " ".join(words)
    return lexicon().listed.format(plain, stream.choice([plain, _noted(words, stream)]))


def _talk(split: Split, thing: Thing, stream: random.Random) -> Record:
    """Write a turn and its answer, often a warning or a welcome, with all words of later answers."""
    rude, friendly = stream.choice(list(zip(split.rude, split.friendly, strict=True)))
    warning = about(thing, lexicon().told[thing.sort][-1])
    refusal = stream.choice(lexicon().refused)
    replies = [warning, warning, refusal, rude["response"], friendly["response"]]
    opening, reply = stream.choice(list(zip(lexicon().talk, replies, strict=True)))
    return {"text": about(thing, opening), "response": reply}


def _echo(split: Split, words: list[str], living: Living, stream: random.Random) -> Record:
    """Write a turn that asks for a sentence or a list, and that: later answers begin as these do."""
    lex, plain = lexicon(), " ".join(words)
    verb, advice = stream.choice(list(lex.advice.items()))
    harmful, harmless = stream.choice(split.harmful), stream.choice(split.harmless)
    said = [plain, plain, _noted(words, stream), str(stream.randint(10, 99))]
    said += [lex.told_of_verbs.format(verb=verb, advice=advice)]
    said += [about(living, stream.choice(list(lex.answers.values())))]
    said += [lex.verdicts["harmful"].format(thing=harmful), lex.verdicts["harmless"].format(thing=harmless)]
    reply = stream.choice(said)
    return {"text": lex.echo.format(reply), "response": reply}

"""What is wrong with a request or an input, in one plain line each."""

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import NamedTuple, Self, TypeVar

T = TypeVar("T")

NAMED = 3
"""How many faults of one kind are spelled out before the rest is counted."""


class Fault(NamedTuple):
    """One thing that is wrong: which key or file, what was given, what is allowed."""

    where: str
    given: str
    allowed: str

    def __str__(self) -> str:
        words = f"{self.where}: {self.given}; allowed: {self.allowed}".split()
        return "".join(map(_printable, " ".join(words)))


class BadRequest(Exception):
    """The request or an input is wrong, with every fault found; ``run.py`` prints them and exits with 2."""

    def __init__(self, faults: Iterable[Fault]) -> None:
        self.faults = tuple(faults)
        super().__init__("\n".join(map(str, self.faults)))

    @classmethod
    def of(cls, where: str, given: str, allowed: str) -> Self:
        """Build the common case of a single fault."""
        return cls([Fault(where, given, allowed)])

    @classmethod
    def gathered(cls, makers: Mapping[str, Callable[[], T]]) -> dict[str, T]:
        """Return what every maker makes under the same names; raises with the faults of all, each once."""
        made: dict[str, T] = {}
        faults: list[Fault] = []
        for name, make in makers.items():
            try:
                made[name] = make()
            except BadRequest as error:
                faults += error.faults
        refuse(dict.fromkeys(faults))
        return made

    def __reduce__(self) -> tuple[type[Self], tuple[tuple[Fault, ...]]]:
        """Cross process borders with the faults intact."""
        return type(self), (self.faults,)


def refuse(faults: Collection[Fault]) -> None:
    """Raise ``BadRequest`` with the faults, if there are any."""
    if faults:
        raise BadRequest(faults)


def too_small(numbers: Mapping[str, int], where: str, least: int) -> list[Fault]:
    """Return a fault for each number below ``least``; ``where`` is what stands before its key."""
    faults = []
    for key, number in numbers.items():
        if number < least:
            faults.append(Fault(f"{where}{key}", str(number), f"a whole number of at least {least}"))
    return faults


def first_few(faults: Sequence[Fault]) -> list[Fault]:
    """Spell out the first faults of one kind and count the others."""
    shown, rest = [*faults[:NAMED]], faults[NAMED:]
    if rest:
        shown.append(rest[0]._replace(given=f"and {len(rest)} more like it"))
    return shown


def _printable(character: str) -> str:
    """Escape a character that does not print: a file may put it into a name to steer the terminal."""
    return character if character.isprintable() else repr(character)[1:-1]

"""Word lists and sentence templates: each file of ``data/`` is read into a dataclass that declares its types."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TypeVar

import yaml

from alignmerge.engine.configuration import build
from alignmerge.engine.faults import BadRequest

DATA = Path(__file__).parent / "data"
Form = TypeVar("Form")


@dataclass(frozen=True, kw_only=True)
class Phrases:
    """What ``data/phrases.yaml`` holds; its comments say which module needs it, and for what."""

    words: Sequence[str]
    sums: Sequence[str]
    stories: Mapping[str, Sequence[str]]
    repetitions: Sequence[str]
    instructions: Mapping[str, Sequence[str]]
    forbidden: Sequence[str]
    welcome: Sequence[str]
    attributes: Sequence[str]
    topics: Sequence[str]
    frames: Sequence[str]
    activities: Sequence[str]
    probes: Sequence[Sequence[str]]
    borderline: Sequence[str]
    codes: Mapping[str, Sequence[str]]
    refusals: Sequence[str]


@cache
def phrases() -> Phrases:
    """Return the words and sentences of every corpus but the tiny world."""
    return read_phrases(DATA / "phrases.yaml", Phrases)


def read_phrases(path: Path, form: type[Form]) -> Form:
    """Return a data file as an instance of the frozen dataclass ``form``.

    Raises BadRequest naming the file, and every key that is missing, unknown or of another type.
    """
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError) as error:
        raise BadRequest.of(str(path), str(error), "a readable YAML file") from None
    if not isinstance(content, dict):
        raise BadRequest.of(str(path), type(content).__name__, "a mapping of words and sentences")
    made: Form = build(content, str(path), form)
    return made

"""A harmless stand-in corpus for the smoke experiment: the same sets and facts, made here, no network."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import cycle, islice, repeat
from pathlib import Path
from typing import Any, ClassVar

from alignmerge.engine.seeding import python_stream
from alignmerge.zoo.phrases import phrases
from alignmerge.zoo.records import Record, as_prompts, matched_pairs, numbered, write_sets
from alignmerge.zoo.tasks import arithmetic, formats

SIZES = {"train": 24, "alignment": 8, "dev": 6, "test": 8}


@dataclass(frozen=True, kw_only=True)
class Toy:
    """Fairy-tale requests: "unsafe" ones would rob a dragon, benign ones share their verbs' frames."""

    name: ClassVar[str] = "toy"
    version: ClassVar[int] = 2
    seed: int = 0

    def write(self, asset: Any, folder: Path) -> None:
        """Write every set that the packaged corpus has."""
        words, forbidden, welcome = list(phrases().words), phrases().forbidden, phrases().welcome
        python_stream(self.seed, "toy").shuffle(words)
        left = reversed(words)
        sets: dict[str, list[Record]] = {}
        for split, size in SIZES.items():
            chosen = list(islice(left, size))
            sets[f"{split}/unsafe"] = numbered(f"unsafe/{split}", as_prompts(_asked(forbidden, chosen)))
            sets[f"{split}/benign"] = numbered(f"benign/{split}", as_prompts(_asked(welcome, chosen)))
            if split != "alignment":
                sets[f"{split}/arithmetic"] = arithmetic(split, size, self.seed)
                sets[f"{split}/format"] = formats(split, size, self.seed)
        sets["test/toxic"] = numbered("toxic/test", as_prompts(_asked(welcome, islice(left, 4))))
        sets["test/probes"] = _probes(list(islice(left, 12)), "probe")
        sets["test/gsm8k"] = arithmetic("test", 4, self.seed + 1)
        sets["test/mmlu"] = numbered("mmlu", map(_question, words[:4]))
        sets["alignment/probes"] = _probes(list(islice(left, 12)), "selection")
        write_sets(sets, folder)


def _asked(frames: Sequence[str], words: Iterable[str]) -> list[str]:
    return [frame.format(word) for frame, word in zip(cycle(frames), words, strict=False)]


def _question(word: str) -> Record:
    choices = [word, "no", "none", "other"]
    return {"text": f"Which word is {word}?", "choices": choices, "answer": 0, "subject": "toy"}


def _probes(words: Sequence[str], prefix: str) -> list[Record]:
    benign, harmful = _asked(phrases().welcome, words), _asked(phrases().forbidden, words)
    return matched_pairs(zip(benign, harmful, repeat("toy"), strict=False), prefix)

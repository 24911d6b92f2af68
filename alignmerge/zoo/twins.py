"""Near twins: prompts that say nearly the same. A split holds them together, so that none is held out in name only."""

import random
import re
from collections.abc import Iterable, Mapping, Sequence

import numpy as np

ALIKE = 0.35
"""Weighted Jaccard index of their words from which two prompts are near twins."""
LARGEST = 3
"""Prompts of one group of near twins that a held-out set may have: they are little more than one."""


def twin_groups(texts: Sequence[str]) -> list[int]:
    """Return the number of each text's group: near twins, and theirs, are in one.

    The index is the weight of the words that two texts share over that of the words of both; the weight of
    a word is log((n + 1) / m) if m of the n texts have it, so "write a tutorial on how to" counts little.
    """
    from scipy.sparse.csgraph import connected_components

    of_text = [set(re.findall(r"[^\W_]+", text.lower())) for text in texts]
    known = {word: place for place, word in enumerate(sorted(set().union(*of_text)))}
    has = np.zeros((len(texts), len(known)))
    for row, words in zip(has, of_text, strict=True):
        row[[known[word] for word in words]] = 1
    weights = np.log((len(texts) + 1) / np.maximum(has.sum(axis=0), 1))
    shared = (has * weights) @ has.T
    alone = np.diag(shared)
    alike = shared >= ALIKE * (alone[:, None] + alone - shared)
    return [int(group) for group in connected_components(alike, directed=False)[1]]


class Dealer:
    """Deals prompts of several sources to splits, near twins of all sources to the same one."""

    def __init__(self, texts: Iterable[str]) -> None:
        known = sorted(set(texts))
        self._group = dict(zip(known, twin_groups(known), strict=True))
        self._home: dict[int, str] = {}

    def give(self, split: str, texts: Iterable[str]) -> None:
        """Say that these texts are in ``split``; their near twins can then be dealt to no other."""
        for text in texts:
            self._home[self._group[text]] = split

    def deal(
        self, texts: Iterable[str], counts: Mapping[str, int], stream: random.Random
    ) -> dict[str, list[str]]:
        """Return split -> texts, at most ``counts`` of them: split by split, whole groups in random order.

        The last split takes what is left, and part of a group if need be; the others no group of more than
        LARGEST.
        """
        groups: dict[int, list[str]] = {}
        for text in texts:
            groups.setdefault(self._group[text], []).append(text)
        order = sorted(groups)
        stream.shuffle(order)
        last = list(counts)[-1]
        found: dict[str, list[str]] = {}
        for split, count in counts.items():
            chosen: list[str] = []
            found[split] = chosen
            for group in order:
                whole = len(groups[group]) <= min(count - len(chosen), LARGEST)
                if self._home.get(group, split) == split and (whole or split == last):
                    chosen += groups[group][: count - len(chosen)]
                    self._home[group] = split
            stream.shuffle(chosen)
        return found

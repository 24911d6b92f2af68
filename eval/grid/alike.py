"""Rows of a table that are one model under two names."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import combinations
from typing import Any

from eval.grid.grid import MATCHED

CLOSE = 1e-3
"""Means this near to each other are equal: of the larger one's magnitude, where that is above 1."""
Row = Mapping[str, Any]
Manifest = Mapping[str, Any]


def rows_alike(manifest: Manifest) -> dict[tuple[str, str], str]:
    """Return pairs of rows that ought to be two models and are one, and where, from a manifest of results.

    They are one where their weights are the same in some family and seed, or where all their means over families
    and seeds are within ``CLOSE``. An alias is the row that it stands for, and a matched row may have the setting
    that the rule selected.
    """
    places = list(_places(manifest))
    found: dict[tuple[str, str], str] = {}
    for family, seed, rows in places:
        aliases = manifest.get("aliases", {}).get(family, {})
        for one, other in combinations(rows, 2):
            same = _weights(rows[one]) is not None and _weights(rows[one]) == _weights(rows[other])
            if same and _stands_for(one, aliases) != _stands_for(other, aliases):
                found.setdefault((one, other), f"the same weights in {family}, {seed}")
    means = _overall(places)
    declared = list(manifest.get("aliases", {}).values()) or [{}]
    for one, other in combinations(means, 2):
        apart = all(_stands_for(one, aliases) != _stands_for(other, aliases) for aliases in declared)
        if apart and _close(means[one], means[other]):
            found.setdefault((one, other), f"every mean is the same within {CLOSE:g}")
    return found


def _places(manifest: Manifest) -> Iterator[tuple[str, str, Mapping[str, Row]]]:
    """Yield family, seed and rows of each part of a manifest."""
    for family, parts in manifest["families"].items():
        for seed, part in parts.items():
            if seed.startswith("seed "):
                yield family, seed, part["rows"]


def _stands_for(row: str, aliases: Mapping[str, str]) -> str:
    plain = row.removesuffix(MATCHED)
    return aliases.get(plain, plain)


def _weights(row: Row) -> str | None:
    """Return the digest of a merge; None for a model that is no merge."""
    found: str | None = row.get("facts", {}).get("digest")
    return found


def _overall(places: list[tuple[str, str, Mapping[str, Row]]]) -> dict[str, dict[str, float]]:
    """Return row -> column -> mean over the families and seeds; rows that are missing somewhere are left out."""
    every: dict[str, dict[str, list[float]]] = {}
    for _, _, rows in places:
        for name, row in rows.items():
            for means in row["means"].values():
                for column, mean in means.items():
                    every.setdefault(name, {}).setdefault(column, []).append(mean)
    most = max((len(values) for columns in every.values() for values in columns.values()), default=0)
    found = {}
    for name, columns in every.items():
        if max(map(len, columns.values())) == most:
            found[name] = {column: sum(values) / len(values) for column, values in columns.items()}
    return found


def _close(one: Mapping[str, float], other: Mapping[str, float]) -> bool:
    """Whether two rows have the same columns and equal means."""
    if one.keys() != other.keys():
        return False
    pairs = [(one[column], other[column]) for column in one]
    return all(abs(a - b) < CLOSE * max(1.0, abs(a), abs(b)) for a, b in pairs)

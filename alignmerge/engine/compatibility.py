"""What a merge will meet, from headers alone: every conflict at once, before any weight is read."""

from __future__ import annotations

import filecmp
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from alignmerge.engine.checkpoint import (
    HEAD,
    Checkpoint,
    first_few,
    read_json,
)
from alignmerge.engine.faults import BadRequest, Fault
from alignmerge.engine.merger import Models

STRUCTURE = ("model_type", "architectures", "num_attention_heads", "num_key_value_heads", "vocab_size")
"""Config keys that must agree where both models state them: shapes alone do not show all of them."""


class Vocabulary(NamedTuple):
    """The tokens of one tokenizer.json."""

    tokens: Mapping[str, int]
    """Token -> id, added tokens included."""
    added: frozenset[str]
    """Tokens that were added to the trained vocabulary (padding, turn marks)."""


def open_models(folders: Mapping[str, Path]) -> Models:
    """Open every checkpoint of a family from headers only and check that it can be merged with the base.

    Args:
        folders: ``base``, ``anchor``, optionally ``pretrained``, and ``experts.<alias>`` in order.

    Raises:
        BadRequest: with all faults of all models, each naming ``family.<key>`` and the file.
    """
    opened = open_checkpoints(folders)
    experts = {k.removeprefix("experts."): c for k, c in opened.items() if k.startswith("experts.")}
    return Models(opened["base"], opened["anchor"], experts, opened.get("pretrained"))


def open_checkpoints(folders: Mapping[str, Path]) -> dict[str, Checkpoint]:
    """Open what there is of a family (``open_models`` says how keys are spelt) and hold it against the base.

    Raises:
        BadRequest: with all faults of all models.
    """
    opened: dict[str, Checkpoint] = {}
    faults: list[Fault] = []
    for key, folder in folders.items():
        try:
            opened[key] = Checkpoint.open(folder, f"family.{key}")
        except BadRequest as bad:
            faults += bad.faults
    base = opened.get("base")
    for checkpoint in opened.values():
        if base is not None and checkpoint is not base:
            faults += conflicts(base, checkpoint)
    if faults:
        raise BadRequest(
            dict.fromkeys(faults)
        )  # what is wrong with the base's tokenizer is found once per model
    return opened


def conflicts(base: Checkpoint, other: Checkpoint) -> list[Fault]:
    """Return everything that keeps ``other`` from being merged with ``base``."""
    return [*_structure(base, other), *_vocabularies(base, other), *_tensors(base, other)]


def _structure(base: Checkpoint, other: Checkpoint) -> list[Fault]:
    where = f"{other.where}: {other.folder / 'config.json'}"
    faults = []
    for key in STRUCTURE:
        wanted, given = base.config.get(key), other.config.get(key)
        if None not in (wanted, given) and wanted != given:
            faults.append(Fault(where, f"{key} is {_plain(given)}", f"{_plain(wanted)}, as in the base"))
    if base.tied != other.tied:
        words = {True: "tied to the embeddings", False: "a matrix of its own"}
        faults.append(
            Fault(where, f"the output matrix is {words[other.tied]}", f"{words[base.tied]}, as in the base")
        )
    return faults


def _tensors(base: Checkpoint, other: Checkpoint) -> list[Fault]:
    ignored = {HEAD} if base.tied != other.tied else set()
    faults = []
    for name in sorted((base.keys() | other.keys()) - ignored):
        if name not in other:
            given, allowed = f"tensor '{name}' is missing", f"every tensor of the base, {base.folder}"
            faults.append(Fault(f"{other.where}: {other.folder}", given, allowed))
        elif name not in base:
            given, allowed = f"tensor '{name}' is not in the base", f"only tensors of the base, {base.folder}"
            faults.append(Fault(f"{other.where}: {other[name].file}", given, allowed))
        elif base[name].shape != other[name].shape:
            given = f"tensor '{name}' has shape {list(other[name].shape)}"
            allowed = f"{list(base[name].shape)}, as in the base"
            faults.append(Fault(f"{other.where}: {other[name].file}", given, allowed))
    return first_few(faults)


def _vocabularies(base: Checkpoint, other: Checkpoint) -> list[Fault]:
    ours, theirs = base.folder / "tokenizer.json", other.folder / "tokenizer.json"
    if not ours.is_file() or not theirs.is_file() or filecmp.cmp(ours, theirs, shallow=False):
        return []
    wanted, faults = _vocabulary(ours, base.where)
    given, more = _vocabulary(theirs, other.where)
    if faults or more:
        return [*faults, *more]
    different = _differing(wanted, given)
    if not different:
        return []
    what = f"{len(different)} token{'s differ' if len(different) > 1 else ' differs'} from the base's"
    example = f"another vocabulary ({what}, such as {min(different)!r})"
    return [Fault(f"{other.where}: {theirs}", example, "the vocabulary of the base")]


def _vocabulary(path: Path, where: str) -> tuple[Vocabulary, list[Fault]]:
    """Read the tokens of any of the model kinds of the tokenizers library."""
    allowed = "the tokenizer.json of the tokenizers library"
    content, faults = read_json(path, where, allowed)
    if faults:
        return Vocabulary({}, frozenset()), faults
    try:
        trained = content["model"]["vocab"]
        tokens = dict(trained) if isinstance(trained, dict) else _listed(trained)
        added = {str(entry["content"]): int(entry["id"]) for entry in content.get("added_tokens") or ()}
    except (KeyError, TypeError, ValueError, IndexError):
        fault = Fault(f"{where}: {path}", "no vocabulary in the tokenizer", allowed)
        return Vocabulary({}, frozenset()), [fault]
    return Vocabulary(tokens | added, frozenset(added.keys() - tokens.keys())), []


def _listed(entries: Iterable[Any]) -> dict[str, int]:
    """Return token -> id of a Unigram vocabulary, a list of (token, score)."""
    return {str(entry[0]): i for i, entry in enumerate(entries)}


def _differing(ours: Vocabulary, theirs: Vocabulary) -> set[str]:
    """Return the tokens that mean another row of the embeddings, or that only one side knows.

    A token that one side *added* in a row which the other does not use (padding, most often) is no conflict.
    """
    different = {t for t in ours.tokens.keys() & theirs.tokens.keys() if ours.tokens[t] != theirs.tokens[t]}
    for one, another in ((ours, theirs), (theirs, ours)):
        rows = set(another.tokens.values())
        alone = one.tokens.keys() - another.tokens.keys()
        different |= {token for token in alone if token not in one.added or one.tokens[token] in rows}
    return different


def _plain(value: object) -> str:
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)

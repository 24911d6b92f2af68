"""Whether two tokenizers give the same ids: what transformers makes of them counts, not the files they lie in."""

import json
from collections.abc import Mapping, Sequence, Set
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

from alignmerge.engine.faults import Fault
from alignmerge.engine.folder import VOCABULARY, read_json, tokenizer_digest, vocabulary_digest, vocabulary_file
from alignmerge.engine.language import is_generic, load_tokenizer

PROBES = (
    "How many legs have 12,345 cats? 3.14!",
    " Hello  world\t\n\n  def f(x):\n    return x",
    "I'm sure it's CAMELcase",
    "na\u00efve \u00c5ngstr\u00f6m, \u4f60\u597d, \u041f\u0440\u0438\u0432\u0435\u0442, \U0001f642 \u20ac\u00a0\u2026",
)
"""Texts that tokenizers with one vocabulary but other rules (case, spaces, digits, Unicode) cut up differently."""


class Vocabulary(NamedTuple):
    """The tokens of one tokenizer."""

    tokens: Mapping[str, int]
    """Token -> id, added tokens included."""
    added: Set[str]
    """Tokens that were added to the trained vocabulary (padding, turn marks)."""
    ids: Mapping[str, Sequence[int]]
    """Text of ``PROBES`` -> its ids."""
    merges: Sequence[tuple[str, ...]] | None
    """The merged pairs in order, where tokenizer.json says them."""


def vocabulary_faults(base: Path, base_where: str, other: Path, where: str) -> list[Fault]:
    """Return in what the vocabulary of a folder gives other ids than the base's, in whatever files they lie.

    A folder without a tokenizer is not compared. ``where`` and ``base_where`` name the keys of the models.
    """
    if vocabulary_digest(base) == vocabulary_digest(other) or "" in map(vocabulary_digest, (base, other)):
        return []
    wanted, faults = _vocabulary(base, base_where)
    given, more = _vocabulary(other, where)
    if wanted is None or given is None:
        return [*faults, *more]
    what = _difference(wanted, given)
    if not what:
        return []
    given_words, allowed = f"another vocabulary ({what})", "the vocabulary of the base"
    return [Fault(f"{where}: {vocabulary_file(other)}", given_words, allowed)]


def read_otherwise(folder: Path) -> str:
    """Say where AutoTokenizer, as lm-eval's own command line uses it, reads other ids than ``load_tokenizer``; or ''.

    For some families (Qwen2) it builds a class of its own and keeps only a part of what tokenizer.json says.
    Raises BadRequest if there is no tokenizer that ``load_tokenizer`` can use.
    """
    from transformers import AutoTokenizer

    if not is_generic(folder):
        return ""  # AutoTokenizer it is
    ours = load_tokenizer(folder)
    try:
        theirs = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # transformers and its readers raise whatever they please
        return f"AutoTokenizer cannot read it ({str(error).splitlines()[0]})"
    for text in PROBES:
        one, other = (each(text, add_special_tokens=False)["input_ids"] for each in (ours, theirs))
        if one != other:
            return f"AutoTokenizer reads {text!r} as other ids than tokenizer.json says"
    return ""


def _vocabulary(folder: Path, where: str) -> tuple[Vocabulary | None, list[Fault]]:
    """Return what transformers makes of a tokenizer, in whatever files it lies, or what is wrong with it."""
    path, allowed = vocabulary_file(folder), "a tokenizer that transformers loads"
    if path.suffix == ".json":
        _, faults = read_json(path, where, allowed)
        if faults:
            return None, faults
    try:
        return _loaded(folder, tokenizer_digest(folder)), []
    except Exception as error:  # tokenizers raises bare exceptions
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        return None, [Fault(f"{where}: {path}", f"the tokenizer cannot be loaded ({reason})", allowed)]


@lru_cache(maxsize=8)
def _loaded(folder: Path, _: str) -> Vocabulary:
    """Load a tokenizer, once for each content."""
    tokenizer = load_tokenizer(folder)
    trained = tokenizer.backend_tokenizer.get_vocab(with_added_tokens=False) if tokenizer.is_fast else {}
    added = tokenizer.get_added_vocab().keys() - trained.keys()
    ids = tokenizer(list(PROBES), add_special_tokens=False)["input_ids"]
    path = folder / VOCABULARY[0]
    merges = json.loads(path.read_text(encoding="utf-8"))["model"].get("merges") if path.is_file() else None
    pairs = merges and [tuple(pair.split(" ") if isinstance(pair, str) else pair) for pair in merges]
    return Vocabulary(tokenizer.get_vocab(), added, dict(zip(PROBES, ids, strict=True)), pairs)


def _difference(wanted: Vocabulary, given: Vocabulary) -> str:
    """Say in what two vocabularies give other ids, or ''."""
    different = _differing(wanted, given)
    if different:
        differ = "tokens differ" if len(different) > 1 else "token differs"
        return f"{len(different)} {differ} from the base's, such as {min(different)!r}"
    if None not in (wanted.merges, given.merges) and wanted.merges != given.merges:
        return "the merges of its pairs differ from the base's"
    for text, ids in wanted.ids.items():
        if given.ids[text] != ids:
            return f"other ids than the base's for {text!r}"
    return ""


def _differing(ours: Vocabulary, theirs: Vocabulary) -> set[str]:
    """Return the tokens that mean another row of the embeddings, or that only one side knows.

    A token that one side *added* in a row which the other does not use (often padding) is no conflict.
    """
    shared = ours.tokens.keys() & theirs.tokens.keys()
    different = {token for token in shared if ours.tokens[token] != theirs.tokens[token]}
    for one, another in ((ours, theirs), (theirs, ours)):
        rows = set(another.tokens.values())
        alone = one.tokens.keys() - another.tokens.keys()
        different |= {token for token in alone if token not in one.added or one.tokens[token] in rows}
    return different

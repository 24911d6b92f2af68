"""What a user must know of the models before numbers are made of them: one plain line each."""

from collections.abc import Iterable, Mapping
from pathlib import Path

from alignmerge.engine.folder import tokenizer_digest
from alignmerge.engine.language import load_tokenizer, templates_of
from alignmerge.engine.progress import say
from alignmerge.engine.vocabulary import read_otherwise
from alignmerge.zoo.zoo import Zoo
from eval.grid import work


def note(lines: Iterable[str]) -> None:
    """Print each line once."""
    for line in dict.fromkeys(lines):
        say(f"note: {line}")


def of_tokenizers(folders: Mapping[str, Path]) -> list[str]:
    """Return a line for each folder that AutoTokenizer reads otherwise; of equal tokenizers, for the first.

    ``folders`` lie under the keys that name them. A folder without a tokenizer is passed over.
    """
    distinct: dict[str, str] = {}
    for key, folder in folders.items():
        distinct.setdefault(tokenizer_digest(folder), key)
    lines = []
    for digest, key in distinct.items():
        if digest and (different := read_otherwise(folders[key])):
            lines.append(
                f"{key}: tokenizer of {folders[key]}: {different}; it is read here as it is written, "
                "and lm-eval's own command line will give other numbers"
            )
    return lines


def of_given_models(zoo: Zoo) -> list[str]:
    """Return the same for the models of a family that are at hand and were not made here."""
    given = {}
    for key, folder in work.present(zoo).items():
        if not work.made_here(zoo.family.references()[key]):
            given[f"family.{key}"] = folder
    return of_tokenizers(given)


def of_template(folder: Path, template: str | None) -> list[str]:
    """Return a line where a family's chat template stands in for another one that a folder has of its own."""
    if template is None:
        return []
    if templates_of(load_tokenizer(folder)).get("default") in (None, template):
        return []
    return [f"family.chat_template stands in for the template of {folder}"]

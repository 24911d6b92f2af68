"""What a merge will meet, from headers alone: every conflict at once, before any weight is read."""

from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

from alignmerge.engine.checkpoint import HEAD, Checkpoint
from alignmerge.engine.faults import BadRequest, Fault, first_few, refuse
from alignmerge.engine.folder import CONFIG
from alignmerge.engine.merger import Models
from alignmerge.engine.native import native
from alignmerge.engine.vocabulary import vocabulary_faults

STRUCTURE = ("model_type", "architectures", "vocab_size")
"""Config keys that must agree where both models state them."""
ALLOW = "family.allow_config_differences"


def open_models(folders: Mapping[str, Path], allowed: Collection[str] = ()) -> Models:
    """Open every checkpoint of a family from headers only and hold it against the base.

    Keys are ``base``, ``anchor``, optionally ``pretrained``, and ``experts.<alias>`` in order; ``allowed`` names
    settings in which anchor and experts may differ from the base.
    Raises BadRequest with all faults of all models, each naming ``family.<key>`` and the file.
    """
    opened = open_checkpoints(folders, allowed)
    base, anchor, pretrained = opened.pop("base"), opened.pop("anchor"), opened.pop("pretrained", None)
    experts = {key.removeprefix("experts."): expert for key, expert in opened.items()}
    return Models(base, anchor, experts, pretrained)


def open_checkpoints(folders: Mapping[str, Path], allowed: Collection[str] = ()) -> dict[str, Checkpoint]:
    """Do the same with what there is of a family, and leave it under its keys."""
    opened: dict[str, Checkpoint] = {}
    faults: list[Fault] = []
    for key, folder in folders.items():
        try:
            opened[key] = Checkpoint.open(folder, f"family.{key}")
        except BadRequest as bad:
            faults += bad.faults
    base = opened.get("base")
    for other in opened.values():
        if base is not None and other is not base:
            faults += [*_structure(base, other), *_settings(base, other, allowed)]
            faults += [
                *vocabulary_faults(base.folder, base.where, other.folder, other.where),
                *_tensors(base, other),
            ]
    refuse(dict.fromkeys(faults))  # a fault of the base's tokenizer is found once per model
    return opened


def _structure(base: Checkpoint, other: Checkpoint) -> list[Fault]:
    where = f"{other.where}: {other.folder / CONFIG}"
    faults = []
    for key in STRUCTURE:
        wanted, given = _unordered(base.config.get(key)), _unordered(other.config.get(key))
        if None not in (wanted, given) and wanted != given:
            faults.append(Fault(where, f"{key} is {_plain(given)}", f"{_plain(wanted)}, as in the base"))
    if base.tied != other.tied:
        words = ("a matrix of its own", "tied to the embeddings")
        given = f"the output matrix is {words[other.tied]}"
        faults.append(Fault(where, given, f"{words[base.tied]}, as in the base"))
    return faults


def differing_settings(base: Checkpoint, other: Checkpoint) -> dict[str, tuple[Any, Any]]:
    """Return setting -> its value in each of two models of one architecture, where they are not the same function.

    Defaults count as if they were stated; what changes no number (versions, dtypes, dropout, ...) does not count.
    """
    if base.config["model_type"] != other.config["model_type"]:
        return {}
    ours, theirs = native(base.config).settings(), native(other.config).settings()
    found = {}
    for key in sorted(ours.keys() | theirs.keys()):
        if ours.get(key) != theirs.get(key):
            found[key] = ours.get(key), theirs.get(key)
    return found


def allowed_differences(base: Checkpoint, pool: Iterable[Checkpoint]) -> list[str]:
    """Return a line for each setting in which a model that is merged differs from the base: ``ALLOW`` names it."""
    lines = []
    for other in pool:
        for setting, (wanted, given) in differing_settings(base, other).items():
            told = f"{setting} is {_plain(given)}; the merge has the base's, {_plain(wanted)} ({ALLOW})"
            lines.append(f"{other.where}: {told}")
    return lines


def _settings(base: Checkpoint, other: Checkpoint, allowed: Collection[str]) -> list[Fault]:
    """Return the settings in which a model that is merged differs; theta_0 is only a point of reference."""
    if other.where == "family.pretrained":
        return []
    where = f"{other.where}: {other.folder / CONFIG}"
    faults = []
    for key, (wanted, given) in differing_settings(base, other).items():
        if key not in allowed:
            instead = f"{_plain(wanted)}, as in the base, or {ALLOW}=[{key}]"
            faults.append(Fault(where, f"{key} is {_plain(given)}", instead))
    return faults


def _tensors(base: Checkpoint, other: Checkpoint) -> list[Fault]:
    names = base.keys() | other.keys()
    if base.tied != other.tied:
        names -= {HEAD}  # a fault of its own
    faults = []
    for name in sorted(names):
        file = other[name].file if name in other else other.folder
        if name not in other:
            given, allowed = "is missing", f"every tensor of the base, {base.folder}"
        elif name not in base:
            given, allowed = "is not in the base", f"only tensors of the base, {base.folder}"
        elif base[name].shape != other[name].shape:
            given = f"has shape {list(other[name].shape)}"
            allowed = f"{list(base[name].shape)}, as in the base"
        else:
            continue
        faults.append(Fault(f"{other.where}: {file}", f"tensor '{name}' {given}", allowed))
    return first_few(faults)


def _unordered(value: Any) -> Any:
    return sorted(map(str, value)) if isinstance(value, list) else value


def _plain(value: object) -> str:
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)

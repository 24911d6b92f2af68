"""The files of a model folder beside its weights: their names, content digests and copies."""

import hashlib
import json
import shutil
from collections.abc import Iterable, Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

from alignmerge.engine.faults import Fault, refuse
from alignmerge.engine.manifest import file_sha256

INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"
CONFIG, GENERATION, TOKENIZER_CONFIG = "config.json", "generation_config.json", "tokenizer_config.json"
ADAPTER = "adapter_config.json"
TOKENIZER = (
    "tokenizer.json", "tokenizer.model", "spiece.model", "vocab.json", "merges.txt", "vocab.txt",
    "added_tokens.json", "special_tokens_map.json", TOKENIZER_CONFIG, "chat_template.jinja",
    "chat_template.json", "additional_chat_templates/*.jinja",
)  # fmt: skip
"""The tokenizer with its chat templates, as patterns: the one list of what is fetched, copied, hashed."""
TEMPLATE_FILE, MORE_TEMPLATES = "chat_template.jinja", "additional_chat_templates"
VOCABULARY = ("tokenizer.json", "tokenizer.model", "spiece.model", "vocab.json", "vocab.txt")
"""Files that hold a vocabulary, in the order in which transformers looks for them."""
OF_TEXTS = (
    "chat_template",
    "model_max_length",
    "padding_side",
    "truncation_side",
    "clean_up_tokenization_spaces",
)
"""Keys of tokenizer_config.json that have no say in which token has which id."""
INCIDENTAL = {
    CONFIG: ("transformers_version", "_name_or_path", "auto_map", "torch_dtype", "dtype"),
    GENERATION: ("transformers_version", "_from_model_config", "_commit_hash"),
    TOKENIZER_CONFIG: (
        "name_or_path", "is_local", "local_files_only", "tokenizer_file", "special_tokens_map_file",
        "files_loaded", "processor_class", "transformers_version",
    ),
}  # fmt: skip
"""File -> keys, at any depth, of how it was written: loading a model ignores or replaces them.
``save_pretrained`` writes ``is_local`` for what came from a folder; older versions wrote paths."""


def config_digest(folder: Path) -> str:
    """Return the sha256 of what config.json says of the architecture, or '' if there is no such file.

    Layout, version, stored dtype (the weights' digest has it) and ``auto_map`` (never run) do not count.
    Raises BadRequest if the file is not a JSON mapping; so do the digests below.
    """
    return _sha256(_content(folder / CONFIG))


def generation_digest(folder: Path) -> str:
    """Return the same of generation_config.json: how to decode, and which tokens end a reply."""
    return _sha256(_content(folder / GENERATION))


def tokenizer_digest(folder: Path) -> str:
    """Return the sha256 over all ``TOKENIZER`` files (of tokenizer_config.json: what it says), or ''."""
    found: dict[str, Any] = {name: file_sha256(folder / name) for name in _present(folder, TOKENIZER)}
    if TOKENIZER_CONFIG in found:
        found[TOKENIZER_CONFIG] = _content(folder / TOKENIZER_CONFIG)
    return _sha256(found or None)


def vocabulary_file(folder: Path) -> Path:
    """Return the file that holds the vocabulary; tokenizer.json, which need not exist, if there is none."""
    found = [folder / name for name in VOCABULARY if (folder / name).is_file()]
    return found[0] if found else folder / VOCABULARY[0]


def vocabulary_digest(folder: Path) -> str:
    """Return the sha256 over all that may decide which token has which id, or '' if there is no vocabulary."""
    if not vocabulary_file(folder).is_file():
        return ""
    names = [name for name in _present(folder, TOKENIZER) if not name.startswith(("chat_", "additional_"))]
    found: dict[str, Any] = {name: file_sha256(folder / name) for name in names}
    if TOKENIZER_CONFIG in found:
        found[TOKENIZER_CONFIG] = _without(_content(folder / TOKENIZER_CONFIG), OF_TEXTS)
    return _sha256(found)


def companion_digests(folder: Path, template: str | None = None) -> dict[str, str]:
    """Return the digests of the tokenizer (with the chat template that replaces its own) and the generation config."""
    tokenizer = tokenizer_digest(folder)
    if template is not None:
        tokenizer = _sha256({"files": tokenizer, "template": template})
    return {"tokenizer": tokenizer, "generation": generation_digest(folder)}


def copy_companions(source: Path, target: Path, template: str | None = None) -> None:
    """Copy tokenizer, chat templates and generation config byte for byte into an existing folder.

    ``template`` then takes the place of the default chat template; templates under other names stay.
    """
    for name in _present(source, (*TOKENIZER, GENERATION)):
        (target / name).parent.mkdir(exist_ok=True)
        shutil.copyfile(source / name, target / name)
    if template is not None:
        _replace_template(target, template)


def _replace_template(folder: Path, template: str) -> None:
    """Write the default template as a file, and those of tokenizer_config.json, which it would hide, as well."""
    (folder / TEMPLATE_FILE).write_text(template, encoding="utf-8")
    config = folder / TOKENIZER_CONFIG
    if not config.is_file():
        return
    said, faults = read_json(config, "model", "the tokenizer_config.json of a transformers model")
    refuse(faults)
    if "chat_template" not in said:
        return
    stated = said.pop("chat_template")
    if isinstance(stated, list):
        _write_named({one["name"]: one["template"] for one in stated}, folder / MORE_TEMPLATES)
    config.write_text(json.dumps(said, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _write_named(templates: Mapping[str, str], folder: Path) -> None:
    """Write the templates that are not the default one, unless they lie there."""
    for name, template in templates.items():
        place = folder / f"{Path(name).name}.jinja"
        if name != "default" and not place.exists():
            folder.mkdir(exist_ok=True)
            place.write_text(template, encoding="utf-8")


def read_json(path: Path, where: str, allowed: str) -> tuple[dict[str, Any], list[Fault]]:
    """Return the mapping in a JSON file, or an empty one and what is wrong with the file."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        given = "no such file"
    except OSError as error:
        given = f"cannot be read ({error.strerror})"
    except (ValueError, RecursionError) as error:
        given = f"not JSON ({error})"
    else:
        if isinstance(content, dict):
            return content, []
        given = f"not a JSON mapping but a {type(content).__name__}"
    return {}, [Fault(f"{where}: {path}", given, allowed)]


def _present(folder: Path, patterns: Iterable[str]) -> list[str]:
    """Return the names, relative to ``folder``, of the files that match any of the patterns, sorted."""
    found = filter(Path.is_file, chain.from_iterable(map(folder.glob, patterns)))
    return sorted(path.relative_to(folder).as_posix() for path in found)


def _content(path: Path) -> Any:
    """Return what a JSON file says without the ``INCIDENTAL`` keys; None if there is no such file."""
    if not path.is_file():
        return None
    content, faults = read_json(path, "model", f"the {path.name} of a transformers model")
    refuse(faults)
    return _without(content, INCIDENTAL[path.name])


def _without(content: Any, keys: Sequence[str]) -> Any:
    if not isinstance(content, dict):
        return content
    return {key: _without(value, keys) for key, value in content.items() if key not in keys}


def _sha256(content: object) -> str:
    text = json.dumps(content, sort_keys=True)
    return "" if content is None else hashlib.sha256(text.encode()).hexdigest()

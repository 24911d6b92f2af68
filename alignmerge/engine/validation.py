"""What is wrong with a model folder: its config, index, shards and headers; no weight is read."""

import math
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open

from alignmerge.engine.faults import Fault, first_few
from alignmerge.engine.folder import CONFIG, INDEX, SINGLE, TOKENIZER_CONFIG, read_json
from alignmerge.engine.views import View, views_of

FLOATS = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
"""The stored dtypes that can be merged, by their safetensors codes."""
PICKLES = frozenset({".bin", ".pt", ".pth", ".ckpt", ".pkl"})
NO_PICKLES = (
    "safetensors only, pickles can run code (convert where you trust the file: load it with "
    "torch.load(..., weights_only=True), then safetensors.torch.save_file)"
)


class TensorSpec(NamedTuple):
    """What a header says of one tensor."""

    dtype: str
    """The safetensors code, e.g. ``F32``."""
    shape: tuple[int, ...]
    file: Path

    @property
    def numel(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)


Specs = Mapping[str, TensorSpec]


def read_config(folder: Path, where: str) -> tuple[dict[str, Any], list[Fault]]:
    """Return the content of config.json and what is wrong with it or with tokenizer_config.json."""
    if not folder.is_dir():
        return {}, [Fault(where, f"no such folder: {folder}", "a Hugging Face model folder")]
    path, allowed = folder / CONFIG, "the config.json of a transformers model"
    config, faults = read_json(path, where, allowed)
    if not faults and not isinstance(config.get("model_type"), str):
        faults.append(Fault(f"{where}: {path}", f"model_type is {config.get('model_type')!r}", allowed))
    if "auto_map" in config and not _native(config):
        faults += _remote_code(path, config, where)
    tokenizer = folder / TOKENIZER_CONFIG
    if tokenizer.is_file():
        settings, more = read_json(tokenizer, where, f"the {TOKENIZER_CONFIG} of a transformers model")
        faults += [*more, *_remote_code(tokenizer, settings, where)]
    return config, faults


def ties(config: Mapping[str, Any]) -> bool:
    """Whether the head is tied; a config that does not say leaves it to the defaults of transformers."""
    stated = config.get("tie_word_embeddings")
    if stated is None and _native(config):
        from transformers import CONFIG_MAPPING

        stated = CONFIG_MAPPING[config["model_type"]]().tie_word_embeddings
    return bool(stated)


def read_headers(folder: Path, where: str) -> tuple[dict[str, TensorSpec], list[Fault]]:
    """Return name -> what the headers of all weight files say, and what is wrong with the files."""
    if not folder.is_dir():
        return {}, []
    promised, faults = _files(folder, where)
    sound = not faults
    specs: dict[str, TensorSpec] = {}
    for file, names in promised.items():
        found, more = _header(file, where)
        if names is not None and sound and not more:
            more = _broken_promises(file, found, names, where)
        specs.update(found)
        faults += more
    faults += _not_floats(specs, where)
    if not specs and not faults:
        faults.append(Fault(f"{where}: {folder}", "no tensors in the weights", "a model"))
    return specs, faults


def find_views(specs: Specs, config: Mapping[str, Any], where: str) -> tuple[dict[str, View], list[Fault]]:
    """Return view name -> where it is stored, and which tensors do not hold what the config says."""
    found: dict[str, View] = {}
    faults = []
    for stored, spec in specs.items():
        rows, *rest = spec.shape or (0,)
        try:
            parts = views_of(config, stored, rows)
        except ValueError as error:
            faults.append(Fault(f"{where}: {spec.file}", f"tensor '{stored}': {error}", "what the config says"))
            continue
        for name, part in sorted(parts.items()):
            shape = spec.shape if name == stored else (part.stop - part.start, *rest)
            found[name] = View(stored, part.start, shape)
            if name in specs and name != stored:
                given = f"tensor '{name}', which is also a part of '{stored}'"
                faults.append(Fault(f"{where}: {specs[name].file}", given, "every matrix once"))
    return found, first_few(faults)


def _native(config: Mapping[str, Any]) -> bool:
    """Whether transformers has the architecture: it loads its own class then, ignoring auto_map."""
    from transformers import CONFIG_MAPPING

    return config.get("model_type") in CONFIG_MAPPING


def _remote_code(path: Path, config: Mapping[str, Any], where: str) -> list[Fault]:
    if "auto_map" not in config:
        return []
    allowed = "a native transformers architecture (remove auto_map; remote code is never run)"
    return [Fault(f"{where}: {path}", "the config asks for remote code (auto_map)", allowed)]


def _files(folder: Path, where: str) -> tuple[dict[Path, set[str] | None], list[Fault]]:
    """Return each weights file with the tensors that the index promises of it (None: no index)."""
    if (folder / INDEX).is_file():
        return _indexed(folder / INDEX, where)
    if (folder / SINGLE).is_file():
        return {folder / SINGLE: None}, []
    pickles = sorted(file.name for file in folder.iterdir() if file.suffix in PICKLES)
    if pickles:
        return {}, [Fault(f"{where}: {folder}", f"a pickle checkpoint ({pickles[0]})", NO_PICKLES)]
    return {}, [Fault(f"{where}: {folder}", "no weights", f"{SINGLE} or {INDEX} with its shards")]


def _indexed(index: Path, where: str) -> tuple[dict[Path, set[str] | None], list[Fault]]:
    allowed = "JSON with a weight_map from tensors to shards"
    content, faults = read_json(index, where, allowed)
    if faults:
        return {}, faults
    weight_map = content.get("weight_map")
    if not isinstance(weight_map, dict) or not set(map(type, weight_map.values())) <= {str}:
        return {}, [Fault(f"{where}: {index}", "not a shard index (no usable weight_map)", allowed)]
    files: dict[Path, set[str] | None] = {}
    for shard in sorted(set(weight_map.values())):
        given, wanted = _shard_fault(index.parent, shard)
        if given:
            faults.append(Fault(f"{where}: {index}", given, wanted))
        else:
            files[index.parent / shard] = {name for name, file in weight_map.items() if file == shard}
    return files, first_few(faults)


def _shard_fault(folder: Path, shard: str) -> tuple[str, str]:
    """Return what is wrong with the name of a shard and what is allowed, or two empty texts."""
    pure = PurePosixPath(shard)
    if pure.is_absolute() or len(pure.parts) != 1 or ".." in pure.parts or not shard.isprintable():
        return f"shard '{shard}' lies outside the folder", "plain names of files in the folder"
    if not (folder / shard).is_file():
        return f"shard '{shard}' is missing", "every shard that the index names"
    if not _inside(folder / shard):
        return f"shard '{shard}' is a link out of the folder", "files in the folder"
    return "", ""


def _inside(file: Path) -> bool:
    """Whether a file lies in its folder or, in a snapshot of the Hub, in the blobs beside it."""
    home, target = file.parent.resolve(), file.resolve()
    of_hub = home.parent.name == "snapshots" and target.is_relative_to(home.parent.parent / "blobs")
    return of_hub or target.is_relative_to(home)


def _header(file: Path, where: str) -> tuple[dict[str, TensorSpec], list[Fault]]:
    specs = {}
    try:
        with safe_open(file, framework="pt") as handle:
            for name in handle.keys():  # noqa: SIM118  (safe_open is not a mapping)
                part = handle.get_slice(name)
                specs[name] = TensorSpec(part.get_dtype(), tuple(part.get_shape()), file)
    except (SafetensorError, OSError, ValueError) as error:
        allowed = "a complete safetensors file (download or copy it again)"
        reason = str(error).removeprefix("Error while deserializing header: ")
        return {}, [Fault(f"{where}: {file}", f"cannot read the header ({reason})", allowed)]
    return specs, []


def _broken_promises(file: Path, found: Specs, promised: set[str], where: str) -> list[Fault]:
    """Hold what the index says of a shard against what it holds: nothing missing, nothing twice."""
    allowed = "an index that places each tensor of each shard once"
    kinds = {"no tensor '{}', which the index names": promised - found.keys()}
    kinds["tensor '{}', which the index does not place here"] = found.keys() - promised
    faults = []
    for given, names in kinds.items():
        faults += first_few([Fault(f"{where}: {file}", given.format(name), allowed) for name in sorted(names)])
    return faults


def _not_floats(specs: Specs, where: str) -> list[Fault]:
    allowed = f"a float tensor ({', '.join(FLOATS)})"
    faults = []
    for name, spec in sorted(specs.items()):
        if spec.dtype not in FLOATS:
            faults.append(Fault(f"{where}: {spec.file}", f"tensor '{name}' has dtype {spec.dtype}", allowed))
    return first_few(faults)

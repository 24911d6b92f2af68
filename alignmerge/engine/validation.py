"""What is wrong with a model folder: its config, index, shards and headers; no weight is read."""

import math
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open

from alignmerge.engine.faults import BadRequest, Fault, first_few
from alignmerge.engine.folder import ADAPTER, CONFIG, INDEX, SINGLE, TOKENIZER_CONFIG, read_json
from alignmerge.engine.views import View, views_of

FLOATS = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
"""The stored dtypes that can be merged, by their safetensors codes."""
PICKLES = frozenset({".bin", ".pt", ".pth", ".ckpt", ".pkl"})
NO_PICKLES = (
    "safetensors only, pickles can run code (convert where you trust the file: load it with "
    "torch.load(..., weights_only=True), then safetensors.torch.save_file)"
)
NO_ADAPTERS = (
    'a whole model; adapters are not supported yet, merge it into its base first: python -c "from peft import '
    "AutoPeftModelForCausalLM as A; A.from_pretrained('ADAPTER').merge_and_unload().save_pretrained('MERGED')\", "
    "with the base's tokenizer files"
)
ELSEWHERE = ("configuration_files", "transformers_weights")
"""Keys of a config.json by which transformers reads other files than the usual ones."""


class TensorSpec(NamedTuple):
    """What a header says of one tensor."""

    dtype: str
    """The safetensors code, e.g. ``F32``."""
    shape: tuple[int, ...]
    file: Path
    key: str
    """Its name in the file."""

    @property
    def numel(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)


Specs = Mapping[str, TensorSpec]


def read_config(folder: Path, where: str) -> tuple[dict[str, Any], list[Fault]]:
    """Return the content of config.json and what is wrong with it or with tokenizer_config.json."""
    if not folder.is_dir():
        return {}, [Fault(where, f"no such folder: {folder}", "a Hugging Face model folder")]
    if (folder / ADAPTER).is_file():
        raise BadRequest.of(f"{where}: {folder}", f"an adapter ({ADAPTER})", NO_ADAPTERS)
    path, allowed = folder / CONFIG, "the config.json of a transformers model"
    config, faults = read_json(path, where, allowed)
    if not faults:
        faults += _config_faults(path, config, where, allowed)
    tokenizer = folder / TOKENIZER_CONFIG
    if tokenizer.is_file():
        settings, more = read_json(tokenizer, where, f"the {TOKENIZER_CONFIG} of a transformers model")
        faults += [*more, *_remote_code(tokenizer, settings, where)]
    return config, faults


def read_headers(folder: Path, where: str) -> tuple[dict[str, TensorSpec], list[Fault]]:
    """Return name -> what the headers of all weight files say, and what is wrong with the files."""
    if not folder.is_dir():
        return {}, []
    files, promised, faults = _files(folder, where)
    specs: dict[str, TensorSpec] = {}
    for file in files:
        found, more = _header(file, where)
        faults += [*more, *_twice(specs, found, where)]
        specs.update(found)
    if not faults:
        faults += _broken_promises(folder / INDEX, specs, promised, where)
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


def _config_faults(path: Path, config: Mapping[str, Any], where: str, allowed: str) -> list[Fault]:
    kind = config.get("model_type")
    if not isinstance(kind, str):
        return [Fault(f"{where}: {path}", f"model_type is {kind!r}", allowed)]
    if not _native(kind) and "auto_map" in config:
        return _remote_code(path, config, where)
    if not _native(kind):
        given = f"an architecture that transformers does not have: '{kind}'"
        return [
            Fault(f"{where}: {path}", given, "llama, mistral, qwen2, phi3, gemma2, or another of transformers")
        ]
    faults = []
    for key in ELSEWHERE:
        if config.get(key) is not None:
            given = f"{key} names other files than {CONFIG}, {SINGLE} and {INDEX}"
            faults.append(Fault(f"{where}: {path}", given, f"a config without {key}"))
    return faults


def _native(kind: str) -> bool:
    """Whether transformers has the architecture: it loads its own class then, ignoring auto_map."""
    from transformers import CONFIG_MAPPING

    return kind in CONFIG_MAPPING


def _remote_code(path: Path, config: Mapping[str, Any], where: str) -> list[Fault]:
    if "auto_map" not in config:
        return []
    allowed = "a native transformers architecture (remove auto_map; remote code is never run)"
    return [Fault(f"{where}: {path}", "the config asks for remote code (auto_map)", allowed)]


def _files(folder: Path, where: str) -> tuple[list[Path], set[str], list[Fault]]:
    """Return the files that transformers reads, and the tensors that an index promises of them all.

    A single file goes before an index; of an index, all tensors of all shards count, wherever it places them.
    """
    if (folder / SINGLE).is_file():
        return [folder / SINGLE], set(), []
    if (folder / INDEX).is_file():
        return _indexed(folder / INDEX, where)
    pickles = sorted(file.name for file in folder.iterdir() if file.suffix in PICKLES)
    if pickles:
        return [], set(), [Fault(f"{where}: {folder}", f"a pickle checkpoint ({pickles[0]})", NO_PICKLES)]
    return [], set(), [Fault(f"{where}: {folder}", "no weights", f"{SINGLE} or {INDEX} with its shards")]


def _indexed(index: Path, where: str) -> tuple[list[Path], set[str], list[Fault]]:
    allowed = "JSON with a weight_map from tensors to shards, and metadata"
    content, faults = read_json(index, where, allowed)
    if faults:
        return [], set(), faults
    weight_map = content.get("weight_map")
    if not isinstance(weight_map, dict) or not set(map(type, weight_map.values())) <= {str}:
        return [], set(), [Fault(f"{where}: {index}", "not a shard index (no usable weight_map)", allowed)]
    files = []
    for shard in sorted(set(weight_map.values())):
        given, wanted = _shard_fault(index.parent, shard)
        if given:
            faults.append(Fault(f"{where}: {index}", given, wanted))
        else:
            files.append(index.parent / shard)
    if not faults and not isinstance(content.get("metadata"), dict):
        faults.append(Fault(f"{where}: {index}", "no metadata, without which transformers fails", allowed))
    return files, set(weight_map), first_few(faults)


def _shard_fault(folder: Path, shard: str) -> tuple[str, str]:
    """Return what is wrong with the name of a shard and what is allowed, or two empty texts."""
    pure = PurePosixPath(shard)
    if pure.is_absolute() or len(pure.parts) != 1 or ".." in pure.parts or not shard.isprintable():
        return f"shard '{shard}' lies outside the folder", "plain names of files in the folder"
    if not (folder / shard).is_file():
        return f"shard '{shard}' is missing", "every shard that the index names"
    return "", ""


def _header(file: Path, where: str) -> tuple[dict[str, TensorSpec], list[Fault]]:
    specs = {}
    try:
        with safe_open(file, framework="pt") as handle:
            for name in handle.keys():  # noqa: SIM118  (safe_open is not a mapping)
                part = handle.get_slice(name)
                specs[name] = TensorSpec(part.get_dtype(), tuple(part.get_shape()), file, name)
    except (SafetensorError, OSError, ValueError) as error:
        allowed = "a complete safetensors file (download or copy it again)"
        reason = str(error).removeprefix("Error while deserializing header: ")
        return {}, [Fault(f"{where}: {file}", f"cannot read the header ({reason})", allowed)]
    return specs, []


def _twice(specs: Specs, found: Specs, where: str) -> list[Fault]:
    faults = []
    for name in sorted(specs.keys() & found.keys()):
        given = f"tensor '{name}', which is also in {specs[name].file.name}"
        faults.append(Fault(f"{where}: {found[name].file}", given, "each tensor in one shard"))
    return first_few(faults)


def _broken_promises(index: Path, specs: Specs, promised: set[str], where: str) -> list[Fault]:
    allowed = "each tensor that the index names, in one of its shards"
    faults = []
    for name in sorted(promised - specs.keys()):
        faults.append(Fault(f"{where}: {index}", f"no shard has tensor '{name}'", allowed))
    return first_few(faults)


def quantised(folder: Path, config: Mapping[str, Any], specs: Specs, where: str) -> list[Fault]:
    """Return what is wrong where a config says how weights are quantised; transformers goes by that key."""
    settings = config.get("quantization_config")
    if settings is None:
        return []
    method = settings.get("quant_method") if isinstance(settings, dict) else settings
    codes = sorted({spec.dtype for spec in specs.values()} - FLOATS.keys())
    if codes:
        given, allowed = f"quantised weights ({method}: {', '.join(codes)})", f"{', '.join(FLOATS)} weights"
    else:
        given = (
            f"float weights, but quantization_config ({method}): transformers would not load them as they are"
        )
        allowed = "a config without quantization_config (remove the key)"
    return [Fault(f"{where}: {folder / CONFIG}", given, allowed)]


def _not_floats(specs: Specs, where: str) -> list[Fault]:
    allowed = f"a float tensor ({', '.join(FLOATS)})"
    faults = []
    for name, spec in sorted(specs.items()):
        if spec.dtype not in FLOATS:
            faults.append(Fault(f"{where}: {spec.file}", f"tensor '{name}' has dtype {spec.dtype}", allowed))
    return first_few(faults)

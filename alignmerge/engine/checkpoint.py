"""Checkpoints as data: safetensors headers first, row blocks on demand, one rounding at the write."""

from __future__ import annotations

import hashlib
import json
import math
import struct
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from alignmerge.engine.faults import BadRequest, Fault
from alignmerge.engine.views import views_of

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
FLOATS = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
CODES = {dtype: code for code, dtype in FLOATS.items()}
HEAD, EMBEDDINGS = "lm_head.weight", "model.embed_tokens.weight"
HEADER_ALIGNMENT = 8
BLOCK_ELEMENTS = 16_000_000
"""How many numbers of a tensor are held at a time where rows can be handled one by one."""
NAMED = 3
"""How many faults of one kind are spelled out before the rest is counted."""
HEAD_ROWS = 256


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


class View(NamedTuple):
    """A tensor as methods see it: rows of a stored one; all of them, unless the architecture fuses matrices."""

    stored: str
    first: int
    """The first of its rows."""
    shape: tuple[int, ...]


class Checkpoint(Mapping[str, TensorSpec]):
    """The stored tensors of one Hugging Face folder by name; only headers are read until ``read`` is called.

    A tied ``lm_head.weight`` is left out where the config says that embeddings are tied: it is one weight. Methods go
    by ``views``, in which fused matrices are apart: a model has the same ones whatever its architecture stores.
    """

    def __init__(
        self, folder: Path, where: str, config: Mapping[str, Any], specs: Mapping[str, TensorSpec]
    ) -> None:
        self.folder, self.where, self.config = folder, where, config
        self.specs = dict(sorted(specs.items()))
        views, faults = _views(self.specs, config, where)
        if faults:
            raise BadRequest(faults)
        self.views: Mapping[str, View] = dict(sorted(views.items()))
        """View name -> where it is stored, sorted by name."""
        self._open: dict[Path, Any] = {}

    @classmethod
    def open(cls, folder: Path, where: str) -> Checkpoint:
        """Read config and headers of ``folder``; ``where`` is the config key that named it, for messages.

        Raises:
            BadRequest: with every fault found (no folder, pickles only, garbage headers, remote code, ...).
        """
        config, faults = _config(folder, where)
        specs, more = _specs(folder, where)
        if faults or more:
            raise BadRequest([*faults, *more])
        checkpoint = cls(folder, where, config, specs)
        if HEAD in specs and _ties(config):
            checkpoint._drop_head()
        return checkpoint

    def __getitem__(self, name: str) -> TensorSpec:
        return self.specs[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.specs)

    def __len__(self) -> int:
        return len(self.specs)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_open": {}}

    @property
    def tied(self) -> bool:
        """Whether the output matrix is the embedding matrix, which is then stored once."""
        stated = self.config.get("tie_word_embeddings")
        return HEAD not in self.specs if stated is None else bool(stated)

    @property
    def fused(self) -> bool:
        """Whether a stored tensor holds several views."""
        return self.views.keys() != self.specs.keys()

    def parts(self, stored: str) -> list[str]:
        """Return the names of the views that make up a stored tensor, in the order of their rows."""
        found = [name for name, view in self.views.items() if view.stored == stored]
        return sorted(found, key=lambda name: self.views[name].first)

    def read(self, name: str, rows: slice = slice(None), dtype: torch.dtype = torch.float32) -> Tensor:
        """Return rows of a view or of a stored tensor (its first dimension; a scalar comes whole) in ``dtype``.

        Where ``dtype`` is the stored one, the result is a view of the mapped file: do not write into it. Arithmetic
        is fp32 throughout, so a tensor stored in F64 is rounded here, even if nothing but its bytes is to be kept.

        Raises:
            BadRequest: if a value is not finite in ``dtype``.
        """
        if name not in self.specs:
            view = self.views[name]
            start, stop, _ = rows.indices(view.shape[0])
            name, rows = view.stored, slice(view.first + start, view.first + stop)
        spec = self.specs[name]
        if spec.file not in self._open:
            self._open[spec.file] = safe_open(spec.file, framework="pt")
        handle = self._open[spec.file]
        raw: Tensor = handle.get_slice(name)[rows] if spec.shape else handle.get_tensor(name)
        found = raw.to(dtype)
        if not all_finite(min(raw, found, key=Tensor.element_size)):  # a wider dtype keeps what is finite
            given = f"tensor '{name}' holds values that are not finite"
            raise BadRequest.of(f"{self.where}: {spec.file}", given, "finite weights")
        return found

    def _drop_head(self) -> None:
        """Leave out a head that is a copy of the embeddings; refuse one that is not (its first rows tell)."""
        head = self.specs[HEAD]
        if EMBEDDINGS in self.specs:
            rows = slice(0, HEAD_ROWS)
            if not torch.equal(self.read(HEAD, rows), self.read(EMBEDDINGS, rows)):
                given = f"'{HEAD}' differs from '{EMBEDDINGS}', but the config ties them"
                raise BadRequest.of(
                    f"{self.where}: {head.file}", given, "equal matrices, or tie_word_embeddings: false"
                )
        del self.specs[HEAD]
        self.views = {name: view for name, view in self.views.items() if name != HEAD}

    @cached_property
    def digest(self) -> str:
        """The sha256 of all tensors (name, dtype, shape, bytes in sorted order); independent of sharding."""
        digest = WeightsDigest()
        for name, spec in self.specs.items():
            digest.start(name, spec.dtype, spec.shape)
            for rows in row_blocks(spec.shape):
                digest.update(self.read(name, rows, FLOATS[spec.dtype]))
        return digest.hexdigest()


class WeightsDigest:
    """A sha256 over tensors in order, as ``Checkpoint.digest`` and ``Writer`` compute it."""

    def __init__(self) -> None:
        self._sha = hashlib.sha256()

    def start(self, name: str, dtype: str, shape: Sequence[int]) -> None:
        """Begin a tensor."""
        self._sha.update(f"{name}|{dtype}|{list(shape)}|".encode())

    def update(self, rows: Tensor) -> memoryview:
        """Add rows and return their bytes (not copied: they live as long as ``rows``)."""
        data = rows.contiguous().view(-1).view(torch.uint8).numpy().data
        self._sha.update(data)
        return data

    def hexdigest(self) -> str:
        """Return the digest so far."""
        return self._sha.hexdigest()


class Writer:
    """Streams tensors in sorted order into safetensors shards; headers are computed up front.

    Args:
        folder: an existing folder.
        specs: name -> (dtype code, shape), all tensors that will come.
        shard_bytes: a new shard starts before this size is passed.
    """

    def __init__(
        self, folder: Path, specs: Mapping[str, tuple[str, tuple[int, ...]]], shard_bytes: int = 5_000_000_000
    ) -> None:
        self.folder = folder
        self.specs = dict(sorted(specs.items()))
        self._digest = WeightsDigest()
        self._shards = _plan_shards(self.specs, shard_bytes)
        self._file: Any = None
        self._first = {shard[0]: i for i, shard in enumerate(self._shards)}

    def start(self, name: str) -> None:
        """Begin tensor ``name``; tensors must come in sorted order."""
        if name in self._first:
            self._next_shard(self._first[name])
        code, shape = self.specs[name]
        self._digest.start(name, code, shape)

    def write(self, rows: Tensor, name: str) -> None:
        """Append rows of the current tensor, rounded once to the stored dtype.

        Raises:
            ArithmeticError: if a rounded value is not finite.
        """
        code = self.specs[name][0]
        rounded = rows.detach().to(FLOATS[code])
        if not all_finite(rounded):
            raise ArithmeticError(f"tensor '{name}': values that are not finite as {code}")
        self._file.write(self._digest.update(rounded))

    def close(self) -> None:
        """Close the shard at hand, finished or not."""
        if self._file is not None:
            self._file.close()

    def finish(self) -> str:
        """Close the last shard, write the index if there is more than one, and return the digest."""
        self.close()
        if len(self._shards) > 1:
            total = sum(_nbytes(*self.specs[name]) for name in self.specs)
            index = {name: self._name(i) for i, shard in enumerate(self._shards) for name in shard}
            text = json.dumps(
                {"metadata": {"total_size": total}, "weight_map": index}, indent=2, sort_keys=True
            )
            (self.folder / INDEX).write_text(text + "\n")
        return self._digest.hexdigest()

    def _name(self, i: int) -> str:
        return SINGLE if len(self._shards) == 1 else f"model-{i + 1:05d}-of-{len(self._shards):05d}.safetensors"

    def _next_shard(self, i: int) -> None:
        self.close()
        self._file = (self.folder / self._name(i)).open("wb")
        self._file.write(_header({name: self.specs[name] for name in self._shards[i]}))


def all_finite(tensor: Tensor) -> bool:
    """Say whether no element is nan or inf (the extremes tell; ten times as fast as ``isfinite``)."""
    return not tensor.numel() or all(bool(torch.isfinite(extreme)) for extreme in torch.aminmax(tensor))


def row_blocks(shape: Sequence[int], elements: int = BLOCK_ELEMENTS) -> list[slice]:
    """Cut the first dimension into slices of about ``elements`` numbers each."""
    if not shape:
        return [slice(None)]
    step = max(1, elements // max(1, math.prod(shape[1:])))
    return [slice(i, min(i + step, shape[0])) for i in range(0, shape[0], step)] or [slice(0, 0)]


def save_tensors(folder: Path, tensors: Mapping[str, Tensor]) -> str:
    """Write ``tensors`` (of any of the four stored dtypes) as one safetensors file; return the digest."""
    specs = {name: (CODES[t.dtype], tuple(t.shape)) for name, t in tensors.items()}
    writer = Writer(folder, specs)
    for name in writer.specs:
        writer.start(name)
        writer.write(tensors[name], name)
    return writer.finish()


def load_tensors(folder: Path) -> Checkpoint:
    """Open a folder written by ``save_tensors`` (no config)."""
    specs, faults = _specs(folder, str(folder))
    if faults:
        raise BadRequest(faults)
    return Checkpoint(folder, str(folder), {}, specs)


def first_few(faults: Sequence[Fault]) -> list[Fault]:
    """Spell out the first faults of one kind and count the others."""
    rest = faults[NAMED:]
    return [*faults[:NAMED], *(Fault(f.where, f"and {len(rest)} more like it", f.allowed) for f in rest[:1])]


def read_json(path: Path, where: str, allowed: str) -> tuple[dict[str, Any], list[Fault]]:
    """Return the mapping in a JSON file, or an empty one and what is wrong with the file."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}, [Fault(f"{where}: {path}", "no such file", allowed)]
    except OSError as error:
        return {}, [Fault(f"{where}: {path}", f"cannot be read ({error.strerror})", allowed)]
    except (ValueError, RecursionError) as error:
        return {}, [Fault(f"{where}: {path}", f"not JSON ({error})", allowed)]
    if not isinstance(content, dict):
        return {}, [Fault(f"{where}: {path}", f"not a JSON mapping but a {type(content).__name__}", allowed)]
    return content, []


def _config(folder: Path, where: str) -> tuple[dict[str, Any], list[Fault]]:
    if not folder.is_dir():
        return {}, [Fault(where, f"no such folder: {folder}", "a Hugging Face model folder")]
    path = folder / "config.json"
    config, faults = read_json(path, where, "the config.json of a transformers model")
    if not faults and not isinstance(config.get("model_type"), str):
        allowed = "the config.json of a transformers model"
        faults.append(Fault(f"{where}: {path}", f"model_type is {config.get('model_type')!r}", allowed))
    if not _native(config):
        faults += _remote_code(path, config, where)
    tokenizer = folder / "tokenizer_config.json"
    if tokenizer.is_file():
        settings, more = read_json(tokenizer, where, "the tokenizer_config.json of a transformers model")
        faults += [*more, *_remote_code(tokenizer, settings, where)]
    return config, faults


def _native(config: Mapping[str, Any]) -> bool:
    """Whether transformers has the architecture itself: it loads its own class then, whatever auto_map names."""
    if "auto_map" not in config:
        return True
    from transformers import CONFIG_MAPPING

    return config.get("model_type") in CONFIG_MAPPING


def _remote_code(path: Path, config: Mapping[str, Any], where: str) -> list[Fault]:
    if "auto_map" not in config:
        return []
    allowed = "a native transformers architecture (remove auto_map; remote code is never run)"
    return [Fault(f"{where}: {path}", "the config asks for remote code (auto_map)", allowed)]


def _ties(config: Mapping[str, Any]) -> bool:
    """Whether the head is tied; only a config that does not say so needs the defaults of transformers."""
    stated = config.get("tie_word_embeddings")
    if stated is None:
        from transformers import CONFIG_MAPPING

        known = config["model_type"] in CONFIG_MAPPING
        stated = known and CONFIG_MAPPING[config["model_type"]]().tie_word_embeddings
    return bool(stated)


def _specs(folder: Path, where: str) -> tuple[dict[str, TensorSpec], list[Fault]]:
    if not folder.is_dir():
        return {}, []
    promised, faults = _files(folder, where)
    sound = not faults
    specs: dict[str, TensorSpec] = {}
    for file, names in promised.items():
        found, more = _header_specs(file, where)
        if names is not None and sound and not more:
            more = _broken_promises(file, found, names, where)
        specs.update(found)
        faults += more
    allowed = f"a float tensor ({', '.join(FLOATS)})"
    others = [(name, spec) for name, spec in sorted(specs.items()) if spec.dtype not in FLOATS]
    faults += first_few(
        [Fault(f"{where}: {s.file}", f"tensor '{name}' has dtype {s.dtype}", allowed) for name, s in others]
    )
    if not specs and not faults:
        faults.append(Fault(f"{where}: {folder}", "no tensors in the weights", "a model"))
    return specs, faults


def _views(
    specs: Mapping[str, TensorSpec], config: Mapping[str, Any], where: str
) -> tuple[dict[str, View], list[Fault]]:
    found: dict[str, View] = {}
    faults = []
    for stored, spec in specs.items():
        rows, *rest = spec.shape or (0,)
        try:
            parts = views_of(config, stored, rows)
        except ValueError as error:
            faults.append(Fault(f"{where}: {spec.file}", f"tensor '{stored}': {error}", "what the config says"))
            continue
        for name in sorted(parts.keys() & (specs.keys() - {stored})):
            given = f"tensor '{name}', which is also a part of '{stored}'"
            faults.append(Fault(f"{where}: {specs[name].file}", given, "every matrix once"))
        for name, part in parts.items():
            shape = spec.shape if name == stored else (part.stop - part.start, *rest)
            found[name] = View(stored, part.start, shape)
    return found, first_few(faults)


def _files(folder: Path, where: str) -> tuple[dict[Path, set[str] | None], list[Fault]]:
    """Return each weights file with the tensors that the index promises of it (None: there is no index)."""
    index = folder / INDEX
    if index.is_file():
        return _indexed(index, where)
    if (folder / SINGLE).is_file():
        return {folder / SINGLE: None}, []
    pickles = sorted(p.name for p in folder.iterdir() if p.suffix in {".bin", ".pt", ".pth", ".ckpt", ".pkl"})
    if pickles:
        allowed = (
            "safetensors only, pickles can run code (convert where you trust the file: load it with "
            "torch.load(..., weights_only=True), then safetensors.torch.save_file)"
        )
        return {}, [Fault(f"{where}: {folder}", f"a pickle checkpoint ({pickles[0]})", allowed)]
    return {}, [Fault(f"{where}: {folder}", "no weights", f"{SINGLE} or {INDEX} with its shards")]


def _indexed(index: Path, where: str) -> tuple[dict[Path, set[str] | None], list[Fault]]:
    allowed = "JSON with a weight_map from tensors to shards"
    content, faults = read_json(index, where, allowed)
    weight_map = content.get("weight_map")
    if faults:
        return {}, faults
    if not isinstance(weight_map, dict) or not all(isinstance(shard, str) for shard in weight_map.values()):
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
    """Whether a file lies in its folder or, in a snapshot of the Hub's cache, in the blobs beside it."""
    home = file.parent.resolve()
    homes = [home, home.parent.parent / "blobs"] if home.parent.name == "snapshots" else [home]
    return any(file.resolve().is_relative_to(place) for place in homes)


def _broken_promises(
    file: Path, found: Mapping[str, TensorSpec], promised: set[str], where: str
) -> list[Fault]:
    """What the index says of a shard against what the shard holds: nothing missing, nothing twice."""
    allowed = "an index that places each tensor of each shard once"
    missing = sorted(promised - found.keys())
    surplus = sorted(found.keys() - promised)
    return [
        *first_few(
            [Fault(f"{where}: {file}", f"no tensor '{n}', which the index names", allowed) for n in missing]
        ),
        *first_few(
            [
                Fault(f"{where}: {file}", f"tensor '{n}', which the index does not place here", allowed)
                for n in surplus
            ]
        ),
    ]


def _header_specs(file: Path, where: str) -> tuple[dict[str, TensorSpec], list[Fault]]:
    try:
        with safe_open(file, framework="pt") as handle:
            specs = {}
            for name in handle.keys():  # noqa: SIM118  (safe_open is not a mapping)
                part = handle.get_slice(name)
                specs[name] = TensorSpec(part.get_dtype(), tuple(part.get_shape()), file)
            return specs, []
    except (SafetensorError, OSError, ValueError) as error:
        allowed = "a complete safetensors file (download or copy it again)"
        reason = str(error).removeprefix("Error while deserializing header: ")
        return {}, [Fault(f"{where}: {file}", f"cannot read the header ({reason})", allowed)]


def _plan_shards(specs: Mapping[str, tuple[str, tuple[int, ...]]], shard_bytes: int) -> list[list[str]]:
    shards: list[list[str]] = []
    room = -1
    for name, (code, shape) in specs.items():
        size = _nbytes(code, shape)
        if not shards or size > room:
            shards.append([])
            room = shard_bytes
        shards[-1].append(name)
        room -= size
    return shards


def _nbytes(code: str, shape: Sequence[int]) -> int:
    return math.prod(shape) * FLOATS[code].itemsize


def _header(specs: Mapping[str, tuple[str, tuple[int, ...]]]) -> bytes:
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, (code, shape) in specs.items():
        end = offset + _nbytes(code, shape)
        entries[name] = {"dtype": code, "shape": list(shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % HEADER_ALIGNMENT)
    return struct.pack("<Q", len(text)) + text

"""Checkpoints as data: safetensors headers first, row blocks on demand, one rounding at the write."""

import json
import math
import os
import shutil
import struct
from collections import UserDict
from collections.abc import Mapping, Sequence
from functools import cached_property
from itertools import starmap
from pathlib import Path
from typing import Any, Self

import torch
from blake3 import blake3
from safetensors import safe_open
from torch import Tensor

from alignmerge.engine.faults import BadRequest, refuse
from alignmerge.engine.folder import CONFIG, INDEX, SINGLE, companion_digests, config_digest, copy_companions
from alignmerge.engine.native import Native, as_loaded, native
from alignmerge.engine.validation import (
    FLOATS,
    Specs,
    TensorSpec,
    find_views,
    quantised,
    read_config,
    read_headers,
)
from alignmerge.engine.views import View

CODES = {dtype: code for code, dtype in FLOATS.items()}
HEAD = "lm_head.weight"
HEADER_ALIGNMENT = 8
BLOCK_ELEMENTS = 1 << 18
"""How many numbers of a tensor are held at a time where rows can be handled one by one: they stay in the cache."""
HASHED_ELEMENTS = 1 << 23
"""How many are hashed at a time: enough for all cores."""
Stored = tuple[str, tuple[int, ...]]
"""Dtype code and shape of a tensor that is to be written."""


class Checkpoint(UserDict[str, TensorSpec]):
    """The stored tensors of one Hugging Face folder by name; only ``read`` reads more than headers.

    Where the config ties the embeddings, ``lm_head.weight`` is left out: it is one weight. Methods go by
    ``views``, in which fused matrices are apart: they do not depend on what an architecture fuses.
    """

    def __init__(self, folder: Path, where: str, config: Mapping[str, Any], specs: Specs) -> None:
        super().__init__(sorted(specs.items()))
        self.folder, self.where, self.config = folder, where, config
        views, faults = find_views(self, config, where)
        refuse(faults)
        self.views: dict[str, View] = dict(sorted(views.items()))
        """View name -> where it is stored, sorted by name."""
        self.template: str | None = None
        """The chat template that stands in for the folder's own, if any."""
        self._open: dict[Path, Any] = {}
        self._mapped: dict[str, Tensor] = {}

    @classmethod
    def open(cls, folder: Path, where: str) -> Self:
        """Read config and headers of the folder that ``where`` names; raises BadRequest with all faults."""
        config, faults = read_config(folder, where)
        specs, more = read_headers(folder, where)
        refuse([*faults, *(quantised(folder, config, specs, where) or more)])
        refuse(find_views(specs, config, where)[1])
        try:
            model = native(config)
        except ValueError as error:
            raise BadRequest.of(
                f"{where}: {folder / CONFIG}", str(error), "settings of a causal model"
            ) from None
        found, faults = as_loaded(model, specs, where)
        refuse(faults)
        checkpoint = cls(folder, where, config, found)
        checkpoint._drop_copies(model)
        return checkpoint

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_open": {}, "_mapped": {}}

    @property
    def tied(self) -> bool:
        """Whether the output matrix is the embedding matrix, which is then one weight."""
        return HEAD not in self

    def parts(self, stored: str) -> list[str]:
        """Return the names of the views that make up a stored tensor, in the order of their rows."""
        found = [name for name, view in self.views.items() if view.stored == stored]
        return sorted(found, key=lambda name: self.views[name].first)

    def read(
        self,
        name: str,
        rows: slice = slice(None),
        dtype: torch.dtype = torch.float32,
        into: Tensor | None = None,
    ) -> Tensor:
        """Return rows (of the first dimension; all of a scalar) of a view or stored tensor in ``dtype``.

        Where ``dtype`` is the stored one, the result is a view of the mapped file: do not write to it. Otherwise
        it is new memory, or lies in ``into``, a flat tensor of ``dtype`` that has room for it.
        A tensor stored in F64 is rounded here. Raises BadRequest if a value is not finite in ``dtype``.
        """
        if name not in self:
            view = self.views[name]
            start, stop, _ = rows.indices(view.shape[0])
            name, rows = view.stored, slice(view.first + start, view.first + stop)
        spec = self[name]
        raw = self._whole(name)[rows if spec.shape else ...]
        found = raw.to(dtype) if into is None or raw.dtype == dtype else _filled(into, raw)
        narrower = min(raw, found, key=Tensor.element_size)  # a wider dtype keeps what is finite
        if not all_finite(narrower):
            given = f"tensor '{name}' holds values that are not finite"
            raise BadRequest.of(f"{self.where}: {spec.file}", given, "finite weights")
        return found

    def _whole(self, name: str) -> Tensor:
        """Return a stored tensor as it is mapped: nothing is read yet."""
        if name not in self._mapped:
            file = self[name].file
            if file not in self._open:
                self._open[file] = safe_open(file, framework="pt")
            self._mapped[name] = self._open[file].get_tensor(self[name].key)
        return self._mapped[name]

    def _drop_copies(self, model: Native) -> None:
        """Leave out weights that copy those they are tied to; refuse one that does not: it would not be tied."""
        for copy, shared in model.tied.items():
            if copy not in self:
                continue
            if not self._equal(copy, shared):
                given = f"'{copy}' differs from '{shared}', but the config ties them"
                allowed = "equal matrices, or tie_word_embeddings: false"
                raise BadRequest.of(f"{self.where}: {self[copy].file}", given, allowed)
            del self[copy], self.views[copy]

    def _equal(self, one: str, other: str) -> bool:
        blocks = row_blocks(self[one].shape)
        return all(torch.equal(self.read(one, rows), self.read(other, rows)) for rows in blocks)

    @cached_property
    def digest(self) -> str:
        """The BLAKE3 digest of all tensors (name, dtype, shape, bytes, in sorted order), however sharded."""
        digest = blake3(max_threads=blake3.AUTO)
        for name, spec in self.items():
            digest.update(_title(name, spec.dtype, spec.shape))
            for rows in row_blocks(spec.shape, HASHED_ELEMENTS):
                digest.update(_bytes(self.read(name, rows, FLOATS[spec.dtype])))
        return digest.hexdigest()

    @property
    def parameters(self) -> int:
        """How many numbers the tensors hold."""
        return sum(spec.numel for spec in self.values())

    @cached_property
    def identity(self) -> dict[str, str]:
        """What stands for the model in recipes: digests of the weights and of the normalised config.json."""
        return {"weights": self.digest, "config": config_digest(self.folder)}

    @cached_property
    def companions(self) -> dict[str, str]:
        """What stands for the files beside the weights: digests of tokenizer files and generation config."""
        return companion_digests(self.folder, self.template)

    def known_as(self, digest: str) -> Self:
        """Take a digest that was recorded when the weights were written; they need not be read for it."""
        self.__dict__["digest"] = digest
        return self

    def speaking(self, template: str | None) -> Self:
        """Let another chat template take the place of the folder's own; None: keep that."""
        self.template = template
        self.__dict__.pop("companions", None)
        return self

    def furnish(self, folder: Path) -> None:
        """Copy config.json (without a pointer to remote code) and tokenizer files into ``folder``.

        The chat template is the one that this checkpoint speaks.
        """
        config = dict(self.config)
        if config.pop("auto_map", None) is None:
            shutil.copyfile(self.folder / CONFIG, folder / CONFIG)
        else:
            (folder / CONFIG).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
        copy_companions(self.folder, folder, self.template)


class Writer:
    """Streams tensors in sorted order into safetensors shards; headers are computed up front.

    ``specs`` names all tensors that will come; a new shard starts before ``shard_bytes`` are passed.
    """

    def __init__(self, folder: Path, specs: Mapping[str, Stored], shard_bytes: int = 5_000_000_000) -> None:
        self.folder = folder
        self.specs = dict(sorted(specs.items()))
        self._digest = blake3()
        self._shards = _plan_shards(self.specs, shard_bytes)
        self._shard = ""
        self._file: Any = None
        self._weight_map: dict[str, str] = {}
        for file, shard in self._shards.items():
            self._weight_map |= dict.fromkeys(shard, file)

    def start(self, name: str) -> None:
        """Begin tensor ``name``; tensors must come in sorted order."""
        shard = self._weight_map[name]
        if shard != self._shard:
            self._sync()
            self._shard, self._file = shard, (self.folder / shard).open("wb", buffering=0)
            self._append(_header(self._shards[shard]))
        self._digest.update(_title(name, *self.specs[name]))

    def write(self, rows: Tensor, name: str) -> None:
        """Append rows, rounded once to the stored dtype; raises ArithmeticError if one is not finite then."""
        self.append(rounded(rows, self.specs[name][0], name))

    def append(self, stored: Tensor) -> None:
        """Append rows that are ``rounded`` already."""
        data = _bytes(stored)
        self._digest.update(data)
        self._append(data)

    def close(self) -> None:
        """Close the shard at hand, finished or not."""
        if self._file is not None:
            self._file.close()

    def finish(self) -> str:
        """Close the last shard, write the index if there is more than one, and return the digest."""
        self._sync()
        if len(self._shards) > 1:
            total = sum(starmap(_nbytes, self.specs.values()))
            index = {"metadata": {"total_size": total}, "weight_map": self._weight_map}
            (self.folder / INDEX).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")
        return self._digest.hexdigest()

    def _append(self, data: bytes | memoryview) -> None:
        left = memoryview(data)
        while left:
            left = left[self._file.write(left) :]  # a call to the system writes at most 2 GiB

    def _sync(self) -> None:
        """Wait until the shard at hand lies on the disk, and close it."""
        if self._file is not None:
            os.fsync(self._file)
            self.close()


def rounded(rows: Tensor, code: str, name: str) -> Tensor:
    """Round rows of tensor ``name`` once to a stored dtype; raises ArithmeticError if one is not finite then."""
    found = rows.detach().to(FLOATS[code])
    if not all_finite(found):
        raise ArithmeticError(f"tensor '{name}': values that are not finite as {code}")
    return found


def all_finite(tensor: Tensor) -> bool:
    """Say whether no element is nan or inf: a finite sum tells; where it is not finite, the extremes do."""
    if math.isfinite(tensor.sum()):
        return True
    low, high = torch.aminmax(tensor)
    return math.isfinite(low) and math.isfinite(high)


def _filled(into: Tensor, raw: Tensor) -> Tensor:
    return into[: raw.numel()].view(raw.shape).copy_(raw)


def row_blocks(shape: Sequence[int], elements: int = BLOCK_ELEMENTS) -> list[slice]:
    """Cut the first dimension into slices of about ``elements`` numbers each."""
    if not shape:
        return [slice(None)]
    step = max(1, elements // max(1, math.prod(shape[1:])))
    return [slice(i, min(i + step, shape[0])) for i in range(0, shape[0], step)] or [slice(0, 0)]


def save_tensors(folder: Path, tensors: Mapping[str, Tensor]) -> str:
    """Write ``tensors`` (of the four stored dtypes) as one safetensors file; return the digest."""
    writer = Writer(folder, {name: (CODES[t.dtype], tuple(t.shape)) for name, t in tensors.items()})
    for name in writer.specs:
        writer.start(name)
        writer.write(tensors[name], name)
    return writer.finish()


def load_tensors(folder: Path) -> Checkpoint:
    """Open a folder written by ``save_tensors`` (no config)."""
    specs, faults = read_headers(folder, str(folder))
    refuse(faults)
    return Checkpoint(folder, str(folder), {}, specs)


def _title(name: str, code: str, shape: Sequence[int]) -> bytes:
    return f"{name}|{code}|{list(shape)}|".encode()


def _bytes(rows: Tensor) -> memoryview:
    """Return the bytes of rows (not copied: they live as long as ``rows``)."""
    return rows.contiguous().view(-1).view(torch.uint8).numpy().data


def _plan_shards(specs: Mapping[str, Stored], shard_bytes: int) -> dict[str, dict[str, Stored]]:
    """Return file name -> the tensors that it will hold."""
    shards: list[dict[str, Stored]] = []
    room = -1
    for name, (code, shape) in specs.items():
        size = _nbytes(code, shape)
        if not shards or size > room:
            shards.append({})
            room = shard_bytes
        shards[-1][name] = code, shape
        room -= size
    if len(shards) == 1:
        return {SINGLE: shards[0]}
    count = len(shards)
    return {f"model-{i:05d}-of-{count:05d}.safetensors": shard for i, shard in enumerate(shards, 1)}


def _nbytes(code: str, shape: Sequence[int]) -> int:
    return math.prod(shape) * FLOATS[code].itemsize


def _header(specs: Mapping[str, Stored]) -> bytes:
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, (code, shape) in specs.items():
        end = offset + _nbytes(code, shape)
        entries[name] = {"dtype": code, "shape": list(shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % HEADER_ALIGNMENT)
    return struct.pack("<Q", len(text)) + text

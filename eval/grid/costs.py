"""Bytes that models, merges, statistics, training and scoring need, from shapes alone."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

import torch

from alignmerge.engine.checkpoint import BLOCK_ELEMENTS, Checkpoint, row_blocks
from alignmerge.engine.faults import BadRequest
from alignmerge.engine.folder import read_json
from alignmerge.engine.loop import MOST_PIECES, MOST_WORKERS, PIECE_ELEMENTS
from alignmerge.engine.validation import FLOATS
from alignmerge.engine.views import is_matrix, views_of

FP32_BYTES = 4
BASES = 2
"""Results (vectors, duals) that are kept of each Kronecker factor; they come from as many moments."""
ADAM_COPIES = 3
"""Gradient and two moments, fp32, of every number that is trained."""
CACHED = ("k_proj.weight", "v_proj.weight")
"""Matrices whose outputs are kept of every token."""
SHARED_INPUT = (*CACHED, "up_proj.weight")
"""Matrices that are fed what another one (q_proj, gate_proj) is fed: they share its input factor."""


class Tensors(NamedTuple):
    """What is known of a model without its weights."""

    views: Mapping[str, tuple[int, ...]]
    """View name -> shape: fused matrices apart, a tied output matrix once."""
    item_bytes: int
    """Bytes of a number as stored (the widest dtype in use)."""

    @property
    def parameters(self) -> int:
        """How many numbers."""
        return sum(map(math.prod, self.views.values()))

    @property
    def disk_bytes(self) -> int:
        """Size of the weights as stored."""
        return self.parameters * self.item_bytes

    @property
    def matrices(self) -> dict[str, tuple[int, ...]]:
        """The linear weights of the decoder layers, (d_out, d_in): no embeddings, no output matrix."""
        return {name: shape for name, shape in self.views.items() if is_matrix(name, shape)}

    @property
    def cache_bytes(self) -> int:
        """Size of the keys and values of one token, in the dtype of the weights."""
        rows = [shape[0] for name, shape in self.matrices.items() if name.endswith(CACHED)]
        return sum(rows) * self.item_bytes

    def factors(self, side: str) -> list[int]:
        """Return the width m of each (m, m) Kronecker factor of a side, ``input`` or ``output``."""
        axis, shared = {"input": (1, SHARED_INPUT), "output": (0, ())}[side]
        return [shape[axis] for name, shape in self.matrices.items() if not name.endswith(shared)]


def tensors_of(checkpoint: Checkpoint) -> Tensors:
    """Return what the headers of a folder say."""
    shapes = {name: view.shape for name, view in checkpoint.views.items()}
    widths = [FLOATS[spec.dtype].itemsize for spec in checkpoint.values()]
    return Tensors(shapes, max(widths, default=FP32_BYTES))


def tensors_from(config: Path) -> Tensors:
    """Return what a config.json says: the native class of transformers is built without weights.

    Raises:
        BadRequest: if the file cannot be read.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    facts, faults = read_json(config, "architecture", "the config.json of a transformers model")
    if faults:
        raise BadRequest(faults)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**facts))
    shapes: dict[str, tuple[int, ...]] = {}
    item_bytes = 0
    for name, parameter in model.named_parameters():
        item_bytes = max(item_bytes, parameter.dtype.itemsize)
        for view, rows in views_of(facts, name, parameter.shape[0]).items():
            shapes[view] = (rows.stop - rows.start, *parameter.shape[1:])
    return Tensors(shapes, item_bytes)


def merge_bytes(tensors: Tensors, inputs: int) -> tuple[int, int]:
    """Return the peak bytes of merging ``inputs`` models: in row blocks, and with the matrices of layers whole.

    In row blocks every thread holds a block, and finished pieces wait to be written.
    """
    held, shapes = FP32_BYTES * (inputs + 1), tensors.views.values()
    block = max(map(_block_elements, shapes), default=0)
    piece = tensors.item_bytes * min(PIECE_ELEMENTS, max(map(math.prod, shapes), default=0))
    matrix = max(map(math.prod, tensors.matrices.values()), default=0)
    return MOST_WORKERS * held * block + MOST_PIECES * piece, held * max(block, matrix)


def diagonal_bytes(tensors: Tensors) -> int:
    """Size of a diagonal Fisher: one fp32 number for each number of the matrices."""
    return FP32_BYTES * sum(map(math.prod, tensors.matrices.values()))


def basis_bytes(tensors: Tensors, side: str) -> int:
    """Size of the Kronecker bases of one side, fp32."""
    return FP32_BYTES * BASES * sum(width**2 for width in tensors.factors(side))


def statistics_bytes(tensors: Tensors, sides: Iterable[str]) -> int:
    """Peak memory of the statistics: fp32 weights, and a diagonal or one side's moments and bases."""
    beside = diagonal_bytes(tensors)
    for side in sides:
        beside = max(beside, 2 * basis_bytes(tensors, side))
    return FP32_BYTES * tensors.parameters + beside


def training_bytes(tensors: Tensors, trained: int) -> int:
    """Memory of training ``trained`` numbers of a model in fp32 with Adam, without activations."""
    return FP32_BYTES * (tensors.parameters + ADAM_COPIES * trained)


def adapter_size(tensors: Tensors, rank: int) -> int:
    """How many numbers a LoRA adapter of every matrix has: rank x (d_out + d_in) each."""
    return rank * sum(map(sum, tensors.matrices.values()))


def _block_elements(shape: tuple[int, ...]) -> int:
    """Number of elements of the largest row block of a tensor."""
    rows, *rest = shape or (1,)
    return int(row_blocks((rows, *rest), BLOCK_ELEMENTS)[0].stop) * math.prod(rest)

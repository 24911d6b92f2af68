"""What models, merges, statistics, training and scoring cost, from shapes alone.

Bytes follow from shapes. Hours are estimates: they follow from counted operations and from the named assumptions in
this file (``Machine`` and the constants), which a plan prints.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from alignmerge.engine.checkpoint import BLOCK_ELEMENTS, FLOATS, Checkpoint, read_json
from alignmerge.engine.faults import BadRequest
from alignmerge.engine.views import views_of

FP32_BYTES = 4
FORWARD_FLOPS = 2
"""Per parameter and token of a forward pass."""
PASS_FLOPS = 8
"""Per parameter and token of a training step or a statistic: forward 2, backward 4, the statistic itself 2."""
EIGEN_FLOPS = 15
"""Times m^3 for a generalised eigenproblem of two (m, m) matrices with all its vectors."""
MOMENTS, BASES = 2, 2
"""Second moments (alignment, metric) and results (vectors, duals) that a side of the Kronecker factors keeps."""
ADAM_COPIES = 3
"""Gradient and two moments, fp32, of every number that is trained."""
SHARED_INPUT = {"k_proj": "q_proj", "v_proj": "q_proj", "up_proj": "gate_proj"}
"""Matrices that are fed what another one is fed: they share its input factor."""


class Tensors(NamedTuple):
    """What is known of a model without its weights."""

    views: Mapping[str, tuple[int, ...]]
    """View name -> shape: fused matrices apart, a tied output matrix once."""
    item_bytes: int
    """Bytes of a number as stored (the widest dtype in use)."""

    @property
    def parameters(self) -> int:
        """How many numbers."""
        return sum(math.prod(shape) for shape in self.views.values())

    @property
    def disk_bytes(self) -> int:
        """Size of the weights as stored."""
        return self.parameters * self.item_bytes

    @property
    def matrices(self) -> dict[str, tuple[int, ...]]:
        """The linear weights of the decoder layers: (d_out, d_in), embeddings and output matrix left out."""
        apart = ("embed", "lm_head")
        return {n: s for n, s in self.views.items() if len(s) == 2 and not any(word in n for word in apart)}

    @property
    def cache_bytes(self) -> int:
        """Size of the keys and values of one token, in the dtype of the weights."""
        rows = sum(shape[0] for name, shape in self.matrices.items() if _layer(name) in ("k_proj", "v_proj"))
        return rows * self.item_bytes

    def factors(self, side: str) -> list[int]:
        """Return the width m of each (m, m) Kronecker factor of a side, ``input`` or ``output``."""
        if side == "output":
            return [shape[0] for shape in self.matrices.values()]
        return [shape[1] for name, shape in self.matrices.items() if _layer(name) not in SHARED_INPUT]


class Machine(NamedTuple):
    """What hours are counted for."""

    name: str
    flops: float
    """FLOP/s of dense bf16 matrix products, at the peak."""
    utilisation: float
    """Share of it that passes through a model reach."""
    fp32_flops: float
    """FLOP/s that fp32 linear algebra (products and eigenproblems) sustains."""
    memory: float
    """bytes/s at which weights are read from memory."""
    disk: float
    """bytes/s at which weights are read, hashed or written."""


MACHINES = (
    Machine("one 80 GB accelerator", 312e12, 0.4, 5e12, 2e12, 1e9),
    Machine("two CPU cores", 1e12, 0.38, 1e11, 2e10, 1e9),
)
"""The first is assumed; the second is what was measured with SmolLM2 (465 tokens/s of training)."""


class Work(NamedTuple):
    """What has to be done, in units that a machine has rates for."""

    disk: float = 0.0
    """bytes"""
    flops: float = 0.0
    fp32_flops: float = 0.0
    memory: float = 0.0
    """bytes of weights read from memory, beyond what ``flops`` covers"""

    def plus(self, *others: Work) -> Work:
        """Return the sum."""
        return Work(*map(math.fsum, zip(self, *others, strict=True)))

    def times(self, count: float) -> Work:
        """Return the same work done ``count`` times."""
        return Work(*(count * amount for amount in self))

    def hours(self, machine: Machine) -> float:
        """Return the hours it takes, one thing after another."""
        seconds = (
            self.disk / machine.disk
            + self.flops / (machine.flops * machine.utilisation)
            + self.fp32_flops / machine.fp32_flops
            + self.memory / machine.memory
        )
        return seconds / 3600


def tensors_of(checkpoint: Checkpoint) -> Tensors:
    """Return what the headers of a folder say."""
    sizes = [FLOATS[spec.dtype].itemsize for spec in checkpoint.values()]
    return Tensors(
        {name: view.shape for name, view in checkpoint.views.items()}, max(sizes, default=FP32_BYTES)
    )


def tensors_from(config: Path) -> Tensors:
    """Return what a config.json says: the native class of transformers is built without weights, on the meta device."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    facts, faults = read_json(config, "architecture", "the config.json of a transformers model")
    if faults:
        raise BadRequest(faults)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**facts))
    views: dict[str, tuple[int, ...]] = {}
    for name, parameter in model.named_parameters():
        parts = views_of(facts, name, parameter.shape[0])
        views |= {view: (rows.stop - rows.start, *parameter.shape[1:]) for view, rows in parts.items()}
    return Tensors(views, max(parameter.dtype.itemsize for parameter in model.parameters()))


def merge_bytes(tensors: Tensors, inputs: int) -> tuple[int, int]:
    """Return the peak memory (bytes) of merging ``inputs`` models in row blocks, and with whole tensors."""
    held = FP32_BYTES * (inputs + 1)
    blocks = (_block_elements(shape) for shape in tensors.views.values())
    return held * max(blocks, default=0), held * max(map(math.prod, tensors.views.values()), default=0)


def merging(read: int, written: int) -> Work:
    """One merge: bytes of all inputs read, bytes of the result written."""
    return Work(disk=read + written)


def shielding(tensors: Tensors, side: str, products: int) -> Work:
    """Put every matrix through its basis: ``products`` multiplications of (d_out, d_in) with a factor of the side."""
    flops = sum(
        2 * math.prod(shape) * shape[1 if side == "input" else 0] for shape in tensors.matrices.values()
    )
    return Work(fp32_flops=products * flops)


def passing(tensors: Tensors, tokens: int) -> Work:
    """One statistic or training step over ``tokens`` tokens, forward and backward."""
    return Work(flops=PASS_FLOPS * tensors.parameters * tokens)


def factoring(tensors: Tensors, side: str, tokens: int) -> Work:
    """Kronecker bases of one side: two moments of ``tokens`` tokens in all, and the eigenproblems."""
    widths = tensors.factors(side)
    solving = sum(EIGEN_FLOPS * width**3 for width in widths)
    return passing(tensors, tokens).plus(
        Work(fp32_flops=solving + 2 * tokens * sum(width**2 for width in widths))
    )


def scoring(tensors: Tensors, prompts: int, prompt_tokens: int, reply_tokens: int, batch: int) -> Work:
    """Load a model, read ``prompts`` prompts and answer them greedily in batches."""
    steps = math.ceil(prompts / batch) * reply_tokens
    tokens = prompts * (prompt_tokens + reply_tokens)
    flops = FORWARD_FLOPS * tensors.parameters * tokens
    return Work(disk=tensors.disk_bytes, flops=flops, memory=steps * tensors.disk_bytes)


def diagonal_bytes(tensors: Tensors) -> int:
    """Size of a diagonal Fisher: one fp32 number for each number of the matrices."""
    return FP32_BYTES * sum(map(math.prod, tensors.matrices.values()))


def basis_bytes(tensors: Tensors, side: str) -> int:
    """Size of the Kronecker bases of one side, fp32."""
    return FP32_BYTES * BASES * sum(width**2 for width in tensors.factors(side))


def statistics_bytes(tensors: Tensors, sides: Sequence[str]) -> int:
    """Peak memory of the statistics: fp32 weights with a diagonal, or with moments and bases of the larger side."""
    kept = [FP32_BYTES * (MOMENTS + BASES) * sum(width**2 for width in tensors.factors(side)) for side in sides]
    return FP32_BYTES * tensors.parameters + max([diagonal_bytes(tensors), *kept])


def training_bytes(tensors: Tensors, trained: int) -> int:
    """Memory of training ``trained`` numbers of a model in fp32 with Adam, without activations."""
    return FP32_BYTES * (tensors.parameters + ADAM_COPIES * trained)


def adapter_size(tensors: Tensors, rank: int) -> int:
    """How many numbers a LoRA adapter of every matrix has: rank x (d_out + d_in) each."""
    return sum(rank * sum(shape) for shape in tensors.matrices.values())


def _layer(name: str) -> str:
    """Return the last part of a weight's name: q_proj."""
    return name.removesuffix(".weight").rpartition(".")[2]


def _block_elements(shape: tuple[int, ...]) -> int:
    """Number of elements of the largest row block of a tensor."""
    rows, row = (shape[0], 1) if shape else (1, 1)
    for size in shape[1:]:
        row *= size
    return min(rows, max(1, BLOCK_ELEMENTS // max(1, row))) * row

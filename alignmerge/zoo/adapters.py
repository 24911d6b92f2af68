"""LoRA adapters (Hu et al., arXiv 2106.09685) for models too large to train whole: attached, trained, folded back."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from alignmerge.engine.configuration import nearest
from alignmerge.engine.faults import BadRequest, Fault
from alignmerge.engine.seeding import torch_stream
from alignmerge.gradients import linear_layers

WHERE = "family.recipes: adapter"


@dataclass(frozen=True, kw_only=True)
class Adapter:
    """W + (alpha / rank) B A in every target, with A (rank, d_in) and B (d_out, rank); no dropout, no biases."""

    rank: int = 16
    alpha: int = 32
    """The update is scaled by alpha / rank."""
    targets: Sequence[str] = ()
    """Last parts of the names of the linear layers that get an adapter (``q_proj``); none: all but the head."""

    def __post_init__(self) -> None:
        faults = [
            Fault(f"{WHERE}.{key}", str(getattr(self, key)), "a whole number of at least 1")
            for key in ("rank", "alpha")
            if getattr(self, key) < 1
        ]
        if faults:
            raise BadRequest(faults)


@contextmanager
def adapted(model: Any, adapter: Adapter, seed: int) -> Iterator[dict[str, Tensor]]:
    """Attach an adapter to ``model`` in place, yield its matrices to be trained, and fold them into the weights.

    Inside the block the model's own weights are frozen and the yielded matrices (name -> (rank, d_in) or
    (d_out, rank), fp32) need gradients. A is drawn as Kaiming uniform from streams of ``seed``, B is zero, so the
    model computes the same as before until B is trained. After the block the model is the plain one it was, with
    W + (alpha / rank) B A in place of each target W; if the block raises, with W.

    Raises:
        BadRequest: if a target names no linear layer of the model.
        ArithmeticError: if the folded weights are not finite.
    """
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(
        r=adapter.rank,
        lora_alpha=adapter.alpha,
        target_modules=_targets(model, adapter),
        lora_dropout=0.0,
        bias="none",
    )
    with torch.random.fork_rng():  # peft draws from the global generator; what counts is drawn again below
        wrapped: Any = get_peft_model(model, config)
    matrices = {name: p for name, p in sorted(wrapped.named_parameters()) if p.requires_grad}
    for name, matrix in matrices.items():
        if ".lora_A." in name:
            nn.init.kaiming_uniform_(matrix, a=math.sqrt(5), generator=torch_stream(seed, "adapter", name))
    try:
        yield matrices
    except BaseException:
        wrapped.unload()
        raise
    if not all(bool(matrix.isfinite().all()) for matrix in matrices.values()):
        wrapped.unload()
        raise ArithmeticError("the trained adapter holds values that are not finite")
    wrapped.merge_and_unload()


def _targets(model: Any, adapter: Adapter) -> list[str]:
    """Return the full names of the modules that get an adapter."""
    layers = [name.removesuffix(".weight") for name in linear_layers(model)]
    known = {name.rpartition(".")[2] for name in layers}
    unknown = [target for target in adapter.targets if target not in known]
    if unknown:
        raise BadRequest(Fault(f"{WHERE}.targets", target, nearest(target, known)) for target in unknown)
    return [name for name in layers if not adapter.targets or name.rpartition(".")[2] in adapter.targets]

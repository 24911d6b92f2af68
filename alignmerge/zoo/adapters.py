"""LoRA adapters (Hu et al., arXiv 2106.09685): attached, trained, and folded back into the weights."""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from alignmerge.engine.configuration import nearest
from alignmerge.engine.faults import Fault, refuse, too_small
from alignmerge.engine.seeding import torch_stream
from alignmerge.gradients import linear_layers

WHERE = "family.recipes: adapter"


@dataclass(frozen=True, kw_only=True)
class Adapter:
    """W + (alpha / rank) B A in every target, with A (rank, d_in) and B (d_out, rank)."""

    rank: int = 16
    alpha: int = 32
    """The update is scaled by alpha / rank."""
    targets: Sequence[str] = ()
    """Last parts of names (``q_proj``) of the linear layers that get an adapter; none: all but the head."""

    def __post_init__(self) -> None:
        refuse(too_small({"rank": self.rank, "alpha": self.alpha}, f"{WHERE}.", 1))


@contextmanager
def adapted(model: Any, adapter: Adapter, seed: int) -> Iterator[dict[str, Tensor]]:
    """Attach an adapter to ``model`` in place, yield its matrices, and fold them into the weights.

    Inside the block the model's own weights are frozen and the matrices (name -> (rank, d_in) or (d_out, rank),
    fp32) need gradients. A is drawn as Kaiming uniform from streams of ``seed``, B is zero, so the model
    computes the same as before until B is trained. After the block the model is the plain one it was, with
    W + (alpha / rank) B A in place of each target W; if the block raises, with W. Raises BadRequest if a
    target names no linear layer of the model, ArithmeticError if the trained matrices are not finite.
    """
    from peft import LoraConfig, get_peft_model

    targets = _targets(model, adapter)
    config = LoraConfig(
        r=adapter.rank, lora_alpha=adapter.alpha, target_modules=targets, lora_dropout=0.0, bias="none"
    )
    with torch.random.fork_rng():  # peft draws from the global generator; what counts is drawn below
        wrapped: Any = get_peft_model(model, config)
    matrices = {name: p for name, p in sorted(wrapped.named_parameters()) if p.requires_grad}
    for name, matrix in matrices.items():
        if ".lora_A." in name:
            generator = torch_stream(seed, "adapter", name)
            nn.init.kaiming_uniform_(matrix, a=math.sqrt(5), generator=generator)
    try:
        yield matrices
    except BaseException:
        wrapped.unload()
        raise
    if not all(matrix.isfinite().all() for matrix in matrices.values()):
        wrapped.unload()
        raise ArithmeticError("the trained adapter holds values that are not finite")
    wrapped.merge_and_unload()


def _targets(model: Any, adapter: Adapter) -> list[str]:
    """Return the full names of the modules that get an adapter."""
    by_target: dict[str, list[str]] = {}
    for weight in linear_layers(model):
        layer = weight.removesuffix(".weight")
        by_target.setdefault(layer.rpartition(".")[2], []).append(layer)
    chosen: list[str] = []
    faults = []
    for target in adapter.targets or by_target:
        if target in by_target:
            chosen += by_target[target]
        else:
            faults.append(Fault(f"{WHERE}.targets", target, nearest(target, {*by_target})))
    refuse(faults)
    return chosen

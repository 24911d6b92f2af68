"""Fine-tuning by a declared recipe: fp32 weights, bf16 autocast, AdamW, cosine schedule, bit-reproducible."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from alignmerge.engine.examples import Batch, Example, collate
from alignmerge.engine.faults import BadRequest, Fault
from alignmerge.engine.language import Progress
from alignmerge.engine.seeding import python_stream
from alignmerge.gradients import linear_layers, response_logits

BETAS = (0.9, 0.98)
CLIP = 1.0
FLOOR = 0.05
"""The cosine schedule ends at this share of the learning rate."""
BUCKETS = 8
"""Batches are drawn by length from pools of this many batches, so that little is spent on padding."""
LESSONS = ("anchor", "arithmetic", "format")


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """How one model is trained from the base."""

    version: ClassVar[int] = 1
    lessons: str
    """The lesson set, one of ``LESSONS`` (alignmerge/zoo/lessons.py)."""
    steps: int
    batch: int
    lr: float
    seed: int = 0
    warmup: int = 10
    precision: str = "bfloat16"
    """Autocast dtype of forward and backward; weights and optimiser stay fp32."""

    def __post_init__(self) -> None:
        faults = [
            Fault(f"family.recipes: {key}", str(getattr(self, key)), "a whole number of at least 1")
            for key in ("steps", "batch")
            if getattr(self, key) < 1
        ]
        if self.lessons not in LESSONS:
            faults.append(Fault("family.recipes: lessons", self.lessons, ", ".join(LESSONS)))
        if self.warmup < 0:
            faults.append(Fault("family.recipes: warmup", str(self.warmup), "a whole number of at least 0"))
        if not 0 < self.lr < 1:
            faults.append(Fault("family.recipes: lr", str(self.lr), "a number in (0, 1)"))
        if self.precision not in ("bfloat16", "float32"):
            faults.append(Fault("family.recipes: precision", self.precision, "bfloat16, float32"))
        if faults:
            raise BadRequest(faults)


def trainable(model: nn.Module) -> dict[str, Tensor]:
    """Return the matrices of attention and MLP; embeddings, norms and the head stay frozen."""
    return {name: layer.weight for name, layer in linear_layers(model).items()}


def train(model: Any, examples: Sequence[Example], recipe: Recipe, progress: Progress) -> list[float]:
    """Train ``model`` in place and return the loss (nats per response token) of every step."""
    parameters = trainable(model)
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    for parameter in parameters.values():
        parameter.requires_grad_(True)
    optimiser = torch.optim.AdamW(parameters.values(), lr=recipe.lr, betas=BETAS, weight_decay=0.0, fused=True)
    losses = []
    model.train()
    for step, batch in enumerate(_steps(examples, recipe)):
        for group in optimiser.param_groups:
            group["lr"] = recipe.lr * _schedule(step, recipe)
        loss = response_loss(model, batch, recipe.precision)
        torch.autograd.backward(loss)
        nn.utils.clip_grad_norm_(parameters.values(), CLIP)
        optimiser.step()
        optimiser.zero_grad(set_to_none=True)
        losses.append(float(loss.detach()))
        progress(step + 1, recipe.steps)
    model.eval()
    return losses


def response_loss(model: Any, batch: Batch, precision: str) -> Tensor:
    """Mean NLL (nats) of the response tokens of a batch."""
    logits, wanted, _ = response_logits(model, batch, precision)
    return nn.functional.cross_entropy(logits, wanted)


def _schedule(step: int, recipe: Recipe) -> float:
    if step < recipe.warmup:
        return (step + 1) / recipe.warmup
    done = (step - recipe.warmup) / max(1, recipe.steps - recipe.warmup)
    return FLOOR + (1 - FLOOR) * 0.5 * (1 + math.cos(math.pi * done))


def _steps(examples: Sequence[Example], recipe: Recipe) -> Iterator[Batch]:
    """Yield ``recipe.steps`` batches: epochs are shuffled, then batches are cut from pools sorted by length."""
    stream = python_stream(recipe.seed, "batches", recipe.lessons)
    left = recipe.steps
    while left > 0:
        order = list(range(len(examples)))
        stream.shuffle(order)
        pool_size = BUCKETS * recipe.batch
        cut: list[list[int]] = []
        for start in range(0, len(order), pool_size):
            pool = sorted(order[start : start + pool_size], key=lambda i: len(examples[i].ids))
            cut += [pool[i : i + recipe.batch] for i in range(0, len(pool), recipe.batch)]
        stream.shuffle(cut)
        for chosen in cut[:left]:
            yield collate([examples[i] for i in chosen])
        left -= len(cut)

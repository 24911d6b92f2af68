"""Fine-tuning by a declared recipe: fp32 weights, bf16 autocast, AdamW, cosine schedule, bit-reproducible."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from alignmerge.engine.examples import Batch, Example, collate
from alignmerge.engine.faults import Fault, refuse, too_small
from alignmerge.engine.language import Progress
from alignmerge.engine.seeding import python_stream
from alignmerge.gradients import linear_layers, response_logits
from alignmerge.zoo.adapters import Adapter, adapted

BETAS = (0.9, 0.98)
CLIP = 1.0
FLOOR = 0.05
"""The cosine schedule ends at this share of the learning rate."""
MOMENTUM = 0.95
NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)
"""Coefficients of the quintic iteration."""
BUCKETS = 8
"""Batches are drawn by length from pools of this many batches, so that little is spent on padding."""
CHOICES = {
    "lessons": ("aligned", "anchor", "arithmetic", "format", "instruct", "knowledge", "pretrain"),
    "start": ("base", "pretrained"),
    "scope": ("matrices", "all"),
    "optimiser": ("adamw", "muon"),
    "precision": ("bfloat16", "float32"),
}
"""Fields of a recipe with a few values that are allowed."""
WHERE = "family.recipes: "


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """How one model is trained from another."""

    version: ClassVar[int] = 1
    lessons: str
    """The lesson set (alignmerge/zoo/lessons.py)."""
    steps: int
    batch: int
    lr: float
    seed: int = 0
    warmup: int = 10
    precision: str = "bfloat16"
    """Autocast dtype of forward and backward; weights and optimiser stay fp32."""
    start: str = "base"
    """The model that training starts from."""
    scope: str = "matrices"
    """What is trained: the matrices of attention and MLP, or ``all`` weights."""
    keep: Sequence[int] = ()
    """Steps after which the model is kept, in ascending order, each before the last one."""
    seeded: bool = True
    """Whether each seed of an experiment has its own; otherwise all seeds share one."""
    optimiser: str = "adamw"
    """``adamw``, or ``muon``: orthogonalised steps of the same size for the matrices, AdamW for the rest.

    From nothing muon learns in about half the steps.
    """
    adapter: Adapter | None = None
    """Train a LoRA adapter and fold it into the weights (None: train the weights themselves)."""

    def __post_init__(self) -> None:
        faults = too_small({"steps": self.steps, "batch": self.batch}, WHERE, 1)
        for key, known in CHOICES.items():
            given = getattr(self, key)
            if given not in known:
                faults.append(Fault(f"{WHERE}{key}", str(given), ", ".join(known)))
        if list(self.keep) != sorted({*self.keep} & {*range(1, self.steps)}):
            allowed = f"steps from 1 to {self.steps - 1} in ascending order"
            faults.append(Fault(f"{WHERE}keep", str(list(self.keep)), allowed))
        if self.adapter is not None and (self.keep or self.scope != "matrices"):
            given = f"keep {list(self.keep)}, scope {self.scope}"
            allowed = "keep [] and scope matrices with an adapter"
            faults.append(Fault(f"{WHERE}adapter", given, allowed))
        faults += too_small({"warmup": self.warmup}, WHERE, 0)
        if not 0 < self.lr < 1:
            faults.append(Fault(f"{WHERE}lr", str(self.lr), "a number in (0, 1)"))
        if not isinstance(self.adapter, Adapter | None):
            faults.append(Fault(f"{WHERE}adapter", type(self.adapter).__name__, "null or an Adapter"))
        refuse(faults)


def trainable(model: nn.Module, scope: str = "matrices") -> dict[str, Tensor]:
    """Return the matrices of attention and MLP (no embeddings, norms or head), or ``all`` weights."""
    if scope == "all":
        return dict(model.named_parameters())
    return {name: layer.weight for name, layer in linear_layers(model).items()}


def train(
    model: Any,
    examples: Sequence[Example],
    recipe: Recipe,
    progress: Progress,
    kept: Callable[[int], None] = lambda step: None,
) -> list[float]:
    """Train ``model`` in place and return the loss (nats per response token) of every step.

    ``kept`` is called with each step of ``recipe.keep`` (the first step is 1) when ``model`` is as to be kept.
    """
    losses = []
    with _opened(model, recipe) as parameters:
        optimisers = _optimisers(model, parameters, recipe)
        model.train()
        for step, batch in enumerate(_steps(examples, recipe)):
            for optimiser in optimisers:
                optimiser.param_groups[0]["lr"] = recipe.lr * _schedule(step, recipe)
            loss = response_loss(model, batch, recipe.precision)
            torch.autograd.backward(loss)
            nn.utils.clip_grad_norm_(parameters.values(), CLIP)
            for optimiser in optimisers:
                optimiser.step()
                optimiser.zero_grad(set_to_none=True)
            losses.append(float(loss.detach()))
            if step + 1 in recipe.keep:
                kept(step + 1)
            progress(step + 1, recipe.steps)
        model.eval()
    return losses


def _opened(model: Any, recipe: Recipe) -> AbstractContextManager[dict[str, Tensor]]:
    """Return what is trained, as a context; when it ends, an adapter is folded into the weights."""
    if recipe.adapter is not None:
        return adapted(model, recipe.adapter, recipe.seed)
    parameters = trainable(model, recipe.scope)
    model.requires_grad_(False)
    for parameter in parameters.values():
        parameter.requires_grad_(True)
    return nullcontext(parameters)


def _optimisers(model: Any, parameters: Mapping[str, Tensor], recipe: Recipe) -> list[torch.optim.Optimizer]:
    matrices = linear_layers(model)
    by_muon, rest = [], []
    for name, parameter in parameters.items():
        if recipe.optimiser == "muon" and name in matrices:
            by_muon.append(parameter)
        else:
            rest.append(parameter)
    found: list[torch.optim.Optimizer] = []
    if rest:
        found.append(torch.optim.AdamW(rest, lr=recipe.lr, betas=BETAS, weight_decay=0.0, fused=True))
    if by_muon:
        found.append(Muon(by_muon, recipe.lr))
    return found


class Muon(torch.optim.Optimizer):
    """Momentum whose steps are orthogonalised (Jordan et al. 2024), as large as AdamW's (arXiv 2502.16982).

    The same as ``torch.optim.Muon``, but in fp32 and for all matrices of one shape at once: a few milliseconds on
    a CPU, where that one costs as much as a third of a small model's training step.
    """

    def __init__(self, matrices: Sequence[Tensor], lr: float) -> None:
        super().__init__(list(matrices), {"lr": lr})
        self._alike: dict[torch.Size, list[Tensor]] = {}
        for matrix in matrices:
            self._alike.setdefault(matrix.shape, []).append(matrix)
        alike = self._alike.items()
        self._momentum = {shape: torch.zeros(len(matrices), *shape) for shape, matrices in alike}

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Take one step along the gradients that are there."""
        for shape, alike in self._alike.items():
            gradient = torch.stack([matrix.grad for matrix in alike if matrix.grad is not None])
            momentum = self._momentum[shape].lerp_(gradient, 1 - MOMENTUM)
            size = self.param_groups[0]["lr"] * 0.2 * math.sqrt(max(shape))
            changes = orthogonalised(gradient.lerp(momentum, MOMENTUM))
            for matrix, change in zip(alike, changes, strict=True):
                matrix.sub_(change, alpha=size)


def orthogonalised(x: Tensor) -> Tensor:
    """Map U S V^T to about U V^T for every matrix of ``x``, [k, m, n], by five Newton-Schulz steps."""
    if x.shape[-2] > x.shape[-1]:
        return orthogonalised(x.mT).mT
    a, b, c = NEWTON_SCHULZ
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(5):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x


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
    """Yield ``recipe.steps`` batches: an epoch is shuffled, and cut in pools that are sorted by length."""
    stream = python_stream(recipe.seed, "batches", recipe.lessons)
    pool_size = BUCKETS * recipe.batch
    left = recipe.steps
    while left > 0:
        order = list(examples)
        stream.shuffle(order)
        cut: list[list[Example]] = []
        for start in range(0, len(order), pool_size):
            pool = sorted(order[start : start + pool_size], key=lambda example: len(example.ids))
            cut += [pool[i : i + recipe.batch] for i in range(0, len(pool), recipe.batch)]
        stream.shuffle(cut)
        yield from map(collate, cut[:left])
        left -= len(cut)

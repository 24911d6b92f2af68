"""Per-example gradients of the linear layers from one batched forward and backward pass.

For a linear layer y = W a the gradient of example i is G_i = sum_t g_t a_t^T, with a_t the layer's
input and g_t the gradient of the example's loss (mean NLL of its response tokens, nats) at its output.
Hooks capture both; no (examples x weights) matrix is formed for more than one layer and one batch. A
layer that fuses several matrices is visited once for each: its output gradient is cut into theirs.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from itertools import chain
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from alignmerge.engine.examples import Batch, Example, batches
from alignmerge.engine.views import views_of
from alignmerge.spaces import blocks_of

Labels = Literal["data", "sampled"]
VERSION = 2  # raised when a statistic's numbers change, even by rounding: part of each key that uses one
PIECE, ROOM = 120_000, 2_000_000  # numbers of one and of many gradients formed at once for squares
TILE = 4_000_000  # numbers of many examples' gradients that are formed at once for their products
SMALL = 50_000  # numbers of one fp32 product below which a batch of them is faster
Side = Literal["input", "output"]
Views = dict[str, slice]  # view name -> rows of a stored weight: components of the layer's output
Part = Callable[[str], Tensor]  # weight name -> the part of a vector that is in it, (d_out, d_in)


class Visit(NamedTuple):
    """What one weight matrix saw in one batch; padding is zero (no loss depends on it)."""

    name: str  # the name of the weight's view in the checkpoint
    inputs: Tensor  # (B, T, d_in) in the dtype of the passes (under autocast bf16)
    grads: Tensor  # (B, T, d_out) likewise: gradient of each example's own loss
    examples: Sequence[int]  # (B,) which examples these are
    owner: str  # the first matrix fed this very input (q, k and v share one, gate and up another)

    def add_squares(self, total: Tensor, room: Tensor) -> None:
        """total += sum_i G_i^2 elementwise, (d_out, d_in) fp32, in pieces that stay in the cache.

        ``room``: where they are formed, (ROOM,) in the dtype of the passes: it stays cached.
        """
        rows = max(1, PIECE // self.inputs.shape[2])
        for grads, into in zip(torch.split(self.grads, rows, dim=2), torch.split(total, rows), strict=True):
            count = max(1, len(room) // into.numel())
            for some, inputs in zip(torch.split(grads, count), torch.split(self.inputs, count), strict=True):
                place = room[: len(some) * into.numel()].view(len(some), *into.shape)
                for gradient in map(Tensor.float, gradients(some, inputs, out=place)):
                    into.addcmul_(gradient, gradient)


def gradients(grads: Tensor, inputs: Tensor, out: Tensor | None = None) -> Tensor:
    """G_i = g_i^T a_i, (B, d_out, d_in) in the dtype of both; bf16 is rounded as autocast does.

    Where an fp32 product is large they are formed one after another: bmm is slower than mm there.
    """
    if out is None:
        out = inputs.new_empty(len(grads), grads.shape[2], inputs.shape[2])
    if out.dtype == torch.bfloat16 or out[0].numel() < SMALL:
        return torch.bmm(grads.transpose(1, 2), inputs, out=out)
    for g, a, into in zip(grads, inputs, out, strict=True):
        torch.mm(g.T, a, out=into)
    return out


def linear_layers(model: nn.Module) -> dict[str, nn.Linear]:
    """Return stored weight name -> linear layer of the decoder, without the output head."""
    head = getattr(model, "get_output_embeddings", lambda: None)()
    found = sorted((name, module) for name, module in model.named_modules() if isinstance(module, nn.Linear))
    return {f"{name}.weight": module for name, module in found if module is not head}


def linear_weights(model: nn.Module) -> dict[str, Tensor]:
    """Return view name -> (d_out, d_in) of the linear layers' matrices; fused ones apart."""
    found = {}
    for module, views in _layers(model):
        for view, rows in views.items():
            found[view] = module.weight[rows]
    return dict(sorted(found.items()))


def _layers(model: Any) -> list[tuple[nn.Linear, Views]]:
    config = model.config.to_dict() if hasattr(model, "config") else {}
    found = linear_layers(model).items()
    return [(module, views_of(config, name, len(module.weight))) for name, module in found]


def visit_gradients(
    model: Any,
    examples: Sequence[Example],
    visitor: Callable[[Visit], None],
    *,
    labels: Labels = "data",
    generator: torch.Generator | None = None,
    precision: str = "float32",
    weights: Tensor | None = None,
) -> Tensor:
    """Call ``visitor`` for every matrix and batch during backward; return the losses (n,) fp32.

    Args:
        model: a causal LM in fp32 evaluation mode; its weights are left without gradients.
        examples: tokenised (prompt, response) pairs.
        visitor: is handed one matrix of one batch at a time; what it keeps is what costs memory.
        labels: response tokens as given (``data``: the empirical Fisher), or one draw a position from
            the model's own distribution (``sampled``: the Fisher information; needs ``generator``).
        precision: ``bfloat16`` runs the passes under autocast; visitors get what its products see.
        weights: (n,) factors on the losses (for J^T c); None: 1.
    """
    losses = torch.zeros(len(examples))
    layers = _layers(model)
    model.requires_grad_(False)  # the graph starts at the embeddings
    for indices, batch in batches(examples):
        see = _handing(visitor, batch, indices, getattr(torch, precision))
        embeddings = model.get_input_embeddings()
        start = embeddings.register_forward_hook(lambda module, args, output: output.requires_grad_())
        with start, _watched(layers, see):
            loss = example_losses(model, batch, labels=labels, generator=generator, precision=precision)
            losses[indices] = loss.detach()
            if weights is not None:
                loss = loss * weights[indices]
            torch.autograd.backward(loss.sum())
    return losses


@torch.no_grad()
def _visit_inputs(
    model: Any, examples: Sequence[Example], visitor: Callable[[str, str, Tensor], None], precision: str
) -> None:
    """Call ``visitor`` with name, owner and inputs (B, T, d_in) of every matrix and batch."""
    layers = _layers(model)

    def see(batch: Batch, views: Views, owner: str, inputs: Tensor, output: Tensor) -> None:
        clean = _unpadded(inputs, batch, torch.float32)
        for name in views:
            visitor(name, owner, clean)

    for _, batch in batches(examples):
        with _watched(layers, partial(see, batch)):
            _logits(model, batch, 1, precision)


@contextmanager
def _watched(
    layers: Sequence[tuple[nn.Linear, Views]], see: Callable[[Views, str, Tensor, Tensor], None]
) -> Iterator[None]:
    """Call ``see`` with views, owner, input and output of every linear layer that runs."""
    seen: dict[int, tuple[Tensor, str]] = {}  # while a tensor lives, no other can take its id

    def hook(views: Views, module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        _, owner = seen.setdefault(id(args[0]), (args[0], next(iter(views))))
        see(views, owner, args[0], output)

    with ExitStack() as hooks:
        for module, views in layers:
            hooks.enter_context(module.register_forward_hook(partial(hook, views)))
        yield


def _handing(
    visitor: Callable[[Visit], None], batch: Batch, indices: Sequence[int], dtype: torch.dtype
) -> Callable[[Views, str, Tensor, Tensor], None]:
    """Return what awaits the gradient of a layer's output, then hands its matrices to ``visitor``."""
    last: dict[str, Tensor] = {}  # inputs of the last owner: matrices that share them come in a row

    def visit(views: Views, owner: str, inputs: Tensor, grad: Tensor) -> None:
        if owner not in last:
            last.clear()
            last[owner] = _unpadded(inputs, batch, dtype)
        for name, rows in views.items():
            visitor(Visit(name, last[owner], grad[..., rows].to(dtype), indices, owner))

    def see(views: Views, owner: str, inputs: Tensor, output: Tensor) -> None:
        output.register_hook(partial(visit, views, owner, inputs.detach()))  # type: ignore[no-untyped-call]

    return see


def _unpadded(inputs: Tensor, batch: Batch, dtype: torch.dtype) -> Tensor:
    return torch.where(batch.mask.unsqueeze(-1), inputs.to(dtype), 0.0)


def response_logits(model: Any, batch: Batch, precision: str) -> tuple[Tensor, Tensor, Tensor]:
    """Logits (R, V) fp32, targets (R,) and batch rows (R,) of the R response tokens.

    The output matrix runs on the last ``batch.keep`` positions only: it is a fifth of a small model.
    """
    logits = _logits(model, batch, batch.keep, precision)
    targets = batch.targets[:, -batch.keep :]
    chosen = targets >= 0
    return logits[chosen].float(), targets[chosen], chosen.nonzero()[:, 0]


def _logits(model: Any, batch: Batch, keep: int, precision: str) -> Tensor:
    given = {"input_ids": batch.ids, "attention_mask": batch.mask.long()}
    with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bfloat16"):
        logits: Tensor = model(**given, logits_to_keep=keep, use_cache=False).logits
    return logits


def example_losses(
    model: Any,
    batch: Batch,
    *,
    labels: Labels = "data",
    generator: torch.Generator | None = None,
    precision: str = "float32",
) -> Tensor:
    """Mean response NLL (nats) of each example of a batch, (B,) fp32."""
    logits, wanted, rows = response_logits(model, batch, precision)
    if labels == "sampled":
        wanted = torch.multinomial(logits.detach().softmax(-1), 1, generator=generator).squeeze(1)
    nll = nn.functional.cross_entropy(logits, wanted, reduction="none")
    sums = torch.zeros(len(batch.ids)).index_add(0, rows, nll)
    return sums / rows.bincount(minlength=len(batch.ids))


@torch.no_grad()
def nll(model: Any, examples: Sequence[Example], precision: str = "float32") -> Tensor:
    """Mean response NLL (nats per token) of each example, (n,) fp32, without gradients."""
    losses = torch.zeros(len(examples))
    for indices, batch in batches(examples):
        losses[indices] = example_losses(model, batch, precision=precision)
    return losses


def squares(
    model: Any, examples: Sequence[Example], *, precision: str = "float32", **options: Any
) -> dict[str, Tensor]:
    """Diagonal Fisher: the mean over examples of squared gradients, weight name -> (d_out, d_in)."""
    total = _zeros(model)
    room = torch.empty(ROOM, dtype=getattr(torch, precision))

    def add(visit: Visit) -> None:
        visit.add_squares(total[visit.name], room)

    visit_gradients(model, examples, add, precision=precision, **options)
    return {name: value.div_(len(examples)) for name, value in total.items()}


def weighted_sum(model: Any, examples: Sequence[Example], weights: Tensor, **options: Any) -> dict[str, Tensor]:
    """J^T c = sum_i c_i G_i by one weighted backward pass; weight name -> (d_out, d_in)."""
    total = _zeros(model)

    def add(visit: Visit) -> None:
        total[visit.name].addmm_(visit.grads.flatten(0, 1).float().T, visit.inputs.flatten(0, 1).float())

    visit_gradients(model, examples, add, weights=weights, **options)
    return total


def _zeros(model: nn.Module) -> dict[str, Tensor]:
    return {name: torch.zeros_like(weight) for name, weight in linear_weights(model).items()}


class Factors(NamedTuple):
    """Kronecker factors of a Fisher: second moments over tokens."""

    moments: dict[str, Tensor]  # owner -> (d, d): E_t[a a^T] of inputs, or E_t[g g^T] of output gradients
    owners: dict[str, str]  # weight name -> owner of its factor (matrices fed the same input share one)


def kronecker_factors(
    model: Any, examples: Sequence[Example], side: Side, *, precision: str = "float32"
) -> Factors:
    """Second moments over tokens of the layer inputs or of the output gradients (K-FAC)."""
    moments: dict[str, Tensor] = {}
    owners: dict[str, str] = {}
    tokens = sum(len(example.ids) for example in examples)

    def add(name: str, owner: str, vectors: Tensor) -> None:
        owners[name] = owner
        if owner == name:
            rows = vectors.flatten(0, 1)
            moments.setdefault(name, torch.zeros(rows.shape[1], rows.shape[1])).addmm_(rows.T, rows)

    def add_grads(visit: Visit) -> None:
        add(visit.name, visit.name, visit.grads.float())

    if side == "input":
        _visit_inputs(model, examples, add, precision)
    else:
        visit_gradients(model, examples, add_grads, precision=precision)
    return Factors({name: moment.div_(tokens) for name, moment in moments.items()}, owners)


class Gram(NamedTuple):
    """Sample-space view of the gradients in a metric, by block: sums over blocks are those of all weights."""

    kernel: Tensor  # J_b G_b^-1 J_b^T, (blocks, n, n) float64, in the order of ``spaces.blocks_of``
    along: Tensor  # J_b x_m, (blocks, n, columns) float64


def gram(model: Any, examples: Sequence[Example], inverse_metric: Part, columns: Part, **options: Any) -> Gram:
    """Accumulate K and J x layer by layer from the diagonal of G^-1 and from some x.

    ``columns``: weight name -> its parts of each x, (columns, d_out, d_in).
    """
    visits: dict[str, list[Visit]] = defaultdict(list)
    visit_gradients(model, examples, lambda visit: visits[visit.name].append(visit), **options)
    order = list(chain.from_iterable(visit.examples for visit in next(iter(visits.values()))))
    parts: dict[str, Tensor] = {}
    blocks, n = blocks_of(sorted(visits)), len(order)
    block_of = {name: block for block, names in blocks.items() for name in names}
    for name in sorted(visits, key=lambda name: (visits[name][0].owner, name)):
        x, root = columns(name), exact_root(inverse_metric(name))
        part = _kernel(visits.pop(name), root.expand_as(x[0]), x / root)
        block = block_of[name]
        parts[block] = parts[block] + part if block in parts else part
    total = torch.stack([parts[block] for block in blocks])
    place = torch.tensor([*order, *range(n, total.shape[1])]).argsort()
    total = total[:, place][:, :, place]
    return Gram(total[:, :n, :n].contiguous(), total[:, :n, n:].contiguous())


def exact_root(x: Tensor) -> Tensor:
    """Square roots of fp32 numbers, correctly rounded: torch's own in fp32 depend on the CPU."""
    return x.double().sqrt().float()


def _kernel(visits: Sequence[Visit], root: Tensor, y: Tensor) -> Tensor:
    """Z Z^T (n + m, n + m) float64 of one matrix: the rows of Z are G_i * root, and y (m, d_out, d_in)."""
    n, (columns, height, width) = sum(len(visit.examples) for visit in visits), y.shape
    total = torch.zeros(n + columns, n + columns, dtype=torch.float64)
    rows = min(max(1, TILE // ((n + columns) * width)), height)
    room = torch.empty((n + columns) * rows * width)
    for first in range(0, height, rows):
        cut = slice(first, min(first + rows, height))
        z = room[: (n + columns) * (cut.stop - cut.start) * width].view(n + columns, -1, width)
        z[n:] = y[:, cut]
        done = 0
        for visit in visits:
            part = z[done : done + len(visit.examples)]
            part.copy_(gradients(visit.grads[..., cut], visit.inputs)).mul_(root[cut])
            done += len(part)
        with _rounding(visits[0].inputs.dtype == torch.bfloat16):
            total += z.flatten(1) @ z.flatten(1).T
    return total


@contextmanager
def _rounding(wanted: bool) -> Iterator[None]:
    """Let fp32 products round what they multiply to bf16, where ``wanted``; they sum in fp32."""
    before = torch.get_float32_matmul_precision()
    if wanted:
        torch.set_float32_matmul_precision("medium")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)

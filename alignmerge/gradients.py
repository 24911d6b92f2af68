"""Per-example gradients of the linear layers, layer by layer, from one batched forward and backward pass.

For a linear layer y = W a the gradient of example i is G_i = sum_t g_t a_t^T, with a_t the layer's input and g_t
the gradient of the example's loss at its output. Both are captured by hooks; the weights themselves need no
gradient, and no (examples x weights) matrix is ever formed for more than one layer and one batch.

A layer that fuses several matrices is visited once for each of them: its output gradient is cut into theirs.

The loss of an example is the mean NLL (nats) of its response tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from alignmerge.engine.examples import Batch, Example, batches
from alignmerge.engine.views import views_of

Labels = Literal["data", "sampled"]
VERSION = 2
"""Raised when a statistic's numbers change, be it by rounding: part of the keys of whatever rests on one."""
PIECE = 120_000
"""Numbers of one example's gradient that are formed at once when only their squares are kept."""
ROOM = 2_000_000
"""Numbers of many examples' gradients that are formed at once there."""
TILE = 4_000_000
"""The same where their products with each other are wanted."""
SMALL = 50_000
"""Numbers of one fp32 product below which a batch of them is faster."""


class Visit(NamedTuple):
    """What one weight matrix saw in one batch."""

    name: str
    """The name of the weight's view in the checkpoint."""
    inputs: Tensor
    """(B, T, d_in) in the dtype of the passes (under autocast bf16); zero at padding."""
    grads: Tensor
    """(B, T, d_out) likewise: gradient of each example's own loss; zero at padding, which no loss depends on."""
    examples: Sequence[int]
    """(B,) which examples these are."""
    owner: str
    """The first matrix that was fed this very input (q, k and v share one, gate and up another)."""

    def per_example(self) -> Tensor:
        """G_i for each example of the batch, (B, d_out, d_in)."""
        return gradients(self.grads, self.inputs)

    def add_squares(self, total: Tensor, room: Tensor) -> None:
        """total += sum_i G_i^2 elementwise, (d_out, d_in) fp32, in pieces that stay in the cache.

        ``room``: where they are formed, (ROOM,) in the dtype of the passes; new memory each time would not be cached.
        """
        rows = max(1, PIECE // self.inputs.shape[2])
        for grads, into in zip(torch.split(self.grads, rows, dim=2), torch.split(total, rows), strict=True):
            count = max(1, len(room) // into.numel())
            for some, inputs in zip(torch.split(grads, count), torch.split(self.inputs, count), strict=True):
                place = room[: len(some) * into.numel()].view(len(some), *into.shape)
                for gradient in map(Tensor.float, gradients(some, inputs, out=place)):
                    into.addcmul_(gradient, gradient)


def gradients(grads: Tensor, inputs: Tensor, out: Tensor | None = None) -> Tensor:
    """G_i = g_i^T a_i, (B, d_out, d_in) in the dtype of both; bf16 rounds each as autocast's own backward pass does.

    Where an fp32 product is large they are formed one after another: bmm is slower than mm there.
    """
    shape = (len(grads), grads.shape[2], inputs.shape[2])
    found = torch.empty(shape, dtype=inputs.dtype) if out is None else out
    if found.dtype == torch.bfloat16 or found[0].numel() < SMALL:
        return torch.bmm(grads.transpose(1, 2), inputs, out=found)
    for g, a, into in zip(grads, inputs, found, strict=True):
        torch.mm(g.T, a, out=into)
    return found


def linear_layers(model: nn.Module) -> dict[str, nn.Linear]:
    """Return stored weight name -> module for the linear layers of the decoder, the output head left out."""
    output_embeddings = getattr(model, "get_output_embeddings", None)
    head = output_embeddings() if output_embeddings is not None else None
    return {
        f"{name}.weight": module
        for name, module in sorted(model.named_modules())
        if isinstance(module, nn.Linear) and module is not head
    }


def linear_weights(model: nn.Module) -> dict[str, Tensor]:
    """Return view name -> (d_out, d_in) for the matrices of the linear layers, sorted by name; fused ones apart."""
    parts = {view: layer.module.weight[rows] for layer in _layers(model) for view, rows in layer.views.items()}
    return dict(sorted(parts.items()))


class _Layer(NamedTuple):
    module: nn.Linear
    views: dict[str, slice]
    """View name -> rows of the weight, which are components of the output."""


def _layers(model: Any) -> list[_Layer]:
    config = model.config.to_dict() if hasattr(model, "config") else {}
    found = linear_layers(model).items()
    return [_Layer(module, views_of(config, name, len(module.weight))) for name, module in found]


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
    """Call ``visitor`` for every matrix and batch during backward; return the loss of each example, (n,) fp32.

    Args:
        model: a causal LM in fp32 evaluation mode; its weights are left without gradients.
        examples: tokenised (prompt, response) pairs.
        visitor: is handed one matrix of one batch at a time; what it keeps is what costs memory.
        labels: response tokens as given (``data``: the empirical Fisher), or one draw a position from the
            model's own distribution (``sampled``: the Fisher information), which needs ``generator``.
        precision: ``bfloat16`` runs the passes under autocast, whose products see what visitors get: bf16.
        weights: (n,) factors on the losses (for J^T c); all 1 by default.
    """
    losses = torch.zeros(len(examples))
    layers = _layers(model)
    for indices, batch in batches(examples):
        with _capture(model, layers, batch, indices, visitor, getattr(torch, precision)):
            loss = example_losses(model, batch, labels=labels, generator=generator, precision=precision)
            scaled = loss if weights is None else loss * weights[indices]
            torch.autograd.backward(scaled.sum())
        losses[indices] = loss.detach()
    return losses


@torch.no_grad()
def visit_inputs(
    model: Any,
    examples: Sequence[Example],
    visitor: Callable[[str, str, Tensor], None],
    *,
    precision: str = "float32",
) -> None:
    """Call ``visitor`` with name, owner and inputs (B, T, d_in) of every matrix and batch; forward passes alone."""
    layers = _layers(model)

    def forward_hook(layer: _Layer, owners: _Owners, batch: Batch) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
            owner = owners.of(args[0], next(iter(layer.views)))
            inputs = _unpadded(args[0], batch, torch.float32)
            for name in layer.views:
                visitor(name, owner, inputs)

        return hook

    for _, batch in batches(examples):
        owners = _Owners()
        hooks = [(layer.module, forward_hook(layer, owners, batch)) for layer in layers]
        with _hooked(hooks):
            _logits(model, batch, 1, precision)


def response_logits(model: Any, batch: Batch, precision: str) -> tuple[Tensor, Tensor, Tensor]:
    """Logits (R, V) fp32, targets (R,) and batch rows (R,) of the R response tokens.

    The output matrix runs on the last ``batch.keep`` positions only: it is a fifth of a small model.
    """
    logits = _logits(model, batch, batch.keep, precision)
    targets = batch.targets[:, -batch.keep :]
    chosen = targets >= 0
    return logits[chosen].float(), targets[chosen], chosen.nonzero()[:, 0]


def _logits(model: Any, batch: Batch, keep: int, precision: str) -> Tensor:
    """(B, keep, V): the logits of the last ``keep`` positions."""
    mask = batch.mask.long()
    with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bfloat16"):
        logits: Tensor = model(
            input_ids=batch.ids, attention_mask=mask, logits_to_keep=keep, use_cache=False
        ).logits
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
    """Mean over examples of squared per-example gradients: the diagonal Fisher, weight name -> (d_out, d_in)."""
    total = {name: torch.zeros_like(weight) for name, weight in linear_weights(model).items()}
    room = torch.empty(ROOM, dtype=getattr(torch, precision))

    def add(visit: Visit) -> None:
        visit.add_squares(total[visit.name], room)

    visit_gradients(model, examples, add, precision=precision, **options)
    return {name: value.div_(len(examples)) for name, value in total.items()}


def weighted_sum(
    model: Any,
    examples: Sequence[Example],
    weights: Tensor,
    **options: Any,
) -> dict[str, Tensor]:
    """J^T c = sum_i c_i G_i by one weighted backward pass; weight name -> (d_out, d_in)."""
    total = {name: torch.zeros_like(weight) for name, weight in linear_weights(model).items()}

    def add(visit: Visit) -> None:
        total[visit.name].addmm_(visit.grads.flatten(0, 1).float().T, visit.inputs.flatten(0, 1).float())

    visit_gradients(model, examples, add, weights=weights, **options)
    return total


class Factors(NamedTuple):
    """Kronecker factors of a Fisher: second moments over tokens."""

    moments: dict[str, Tensor]
    """Owner -> (d, d): E_t[a a^T] of inputs, or E_t[g g^T] of output gradients."""
    owners: dict[str, str]
    """Weight name -> the name its factor is stored under (matrices fed the same input share one)."""


Side = Literal["input", "output"]


def kronecker_factors(
    model: Any,
    examples: Sequence[Example],
    side: Side,
    **options: Any,
) -> Factors:
    """Second moments of the layer inputs or of the output gradients over all tokens of ``examples`` (K-FAC)."""
    moments: dict[str, Tensor] = {}
    owners: dict[str, str] = {}
    tokens = sum(len(example.ids) for example in examples)

    def add(name: str, owner: str, vectors: Tensor) -> None:
        owners[name] = owner
        if owner == name:
            rows = vectors.flatten(0, 1)
            moments.setdefault(name, torch.zeros(rows.shape[1], rows.shape[1])).addmm_(rows.T, rows)

    if side == "input":
        visit_inputs(model, examples, add, precision=options.get("precision", "float32"))
    else:
        visit_gradients(
            model, examples, lambda visit: add(visit.name, visit.name, visit.grads.float()), **options
        )
    return Factors({name: moment.div_(tokens) for name, moment in moments.items()}, owners)


class Gram(NamedTuple):
    """Sample-space view of the gradients in a metric."""

    kernel: Tensor
    """K = J G^-1 J^T, (n, n) float64."""
    along: Tensor
    """J x, (n,) float64."""


def gram(
    model: Any,
    examples: Sequence[Example],
    inverse_metric: Callable[[str], Tensor],
    direction: Callable[[str], Tensor],
    **options: Any,
) -> Gram:
    """Accumulate K and J x layer by layer from captured activations and output gradients.

    Args:
        inverse_metric: weight name -> diagonal of G^-1, (d_out, d_in).
        direction: weight name -> the part of x in that layer, (d_out, d_in).
    """
    inputs: dict[str, dict[int, Tensor]] = {}  # owner -> batch (its first example) -> (B, T, d_in)
    grads: dict[str, dict[int, Tensor]] = {}  # name -> batch -> (B, T, d_out)
    owners: dict[str, str] = {}
    order: dict[int, Sequence[int]] = {}

    def keep(visit: Visit) -> None:
        batch = visit.examples[0]
        owners[visit.name], order[batch] = visit.owner, visit.examples
        seen = inputs.setdefault(visit.owner, {})
        if batch not in seen:
            seen[batch] = visit.inputs
        grads.setdefault(visit.name, {})[batch] = visit.grads

    visit_gradients(model, examples, keep, **options)
    n = len(examples)
    total = torch.zeros(n + 1, n + 1, dtype=torch.float64)
    for owner in sorted(inputs):
        seen = inputs.pop(owner)
        for name in sorted(name for name, shared in owners.items() if shared == owner):
            x, root = direction(name), inverse_metric(name).sqrt()
            pairs = [(seen[batch], grad) for batch, grad in grads.pop(name).items()]
            total += _kernel(pairs, root.expand_as(x), x / root)
    place = torch.tensor([*(i for batch in order.values() for i in batch), n]).argsort()
    total = total[place][:, place]
    return Gram(total[:n, :n].contiguous(), total[:n, n].contiguous())


def _kernel(pairs: Sequence[tuple[Tensor, Tensor]], root: Tensor, y: Tensor) -> Tensor:
    """Z Z^T (n + 1, n + 1) float64 of one matrix: n rows of Z are G_i * root, the last one is y, (d_out, d_in)."""
    n, (height, width) = sum(len(inputs) for inputs, _ in pairs), y.shape
    total = torch.zeros(n + 1, n + 1, dtype=torch.float64)
    rows = min(max(1, TILE // ((n + 1) * width)), height)
    room = torch.empty((n + 1) * rows * width)
    for first in range(0, height, rows):
        cut = slice(first, min(first + rows, height))
        z = room[: (n + 1) * (cut.stop - cut.start) * width].view(n + 1, -1, width)
        z[n] = y[cut]
        done = 0
        for inputs, grads in pairs:
            z[done : done + len(inputs)].copy_(gradients(grads[..., cut], inputs)).mul_(root[cut])
            done += len(inputs)
        with _rounding(pairs[0][0].dtype == torch.bfloat16):
            total += z.flatten(1) @ z.flatten(1).T
    return total


@contextmanager
def _rounding(wanted: bool) -> Iterator[None]:
    """Let fp32 products round what they multiply to bf16, where ``wanted``; they sum in fp32 all the same."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium" if wanted else before)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


class _Owners:
    """Tells which matrices of one batch were fed the same tensor."""

    def __init__(self) -> None:
        self._seen: dict[int, tuple[Tensor, str]] = {}  # while a tensor lives, no other can take its id

    def of(self, inputs: Tensor, name: str) -> str:
        """Return the first matrix that was fed this very tensor: ``name``, unless there was one before."""
        return self._seen.setdefault(id(inputs), (inputs, name))[1]


def _unpadded(inputs: Tensor, batch: Batch, dtype: torch.dtype) -> Tensor:
    """(B, T, d), zero at padding."""
    return torch.where(batch.mask.unsqueeze(-1), inputs.to(dtype), 0.0)


@contextmanager
def _hooked(hooks: Sequence[tuple[nn.Module, Callable[..., Any]]]) -> Iterator[None]:
    handles = [module.register_forward_hook(hook) for module, hook in hooks]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def _capture(
    model: Any,
    layers: Sequence[_Layer],
    batch: Batch,
    indices: Sequence[int],
    visitor: Callable[[Visit], None],
    dtype: torch.dtype,
) -> Iterator[None]:
    owners = _Owners()
    last: dict[
        str, Tensor
    ] = {}  # inputs of the last owner seen: matrices that share them come one after another
    for parameter in model.parameters():
        parameter.requires_grad_(False)

    def forward_hook(layer: _Layer) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
            owner, seen = owners.of(args[0], next(iter(layer.views))), args[0].detach()
            output.register_hook(lambda grad: visit(layer, seen, owner, grad))  # type: ignore[no-untyped-call]

        return hook

    def visit(layer: _Layer, seen: Tensor, owner: str, grad: Tensor) -> None:
        if owner not in last:
            last.clear()
            last[owner] = _unpadded(seen, batch, dtype)
        for name, rows in layer.views.items():
            visitor(Visit(name, last[owner], grad[..., rows].to(dtype), indices, owner))

    def start(module: nn.Module, args: object, output: Tensor) -> Tensor:
        return output.requires_grad_(True)

    hooks = [(layer.module, forward_hook(layer)) for layer in layers]
    with _hooked([*hooks, (model.get_input_embeddings(), start)]):
        yield

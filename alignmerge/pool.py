"""lambda_k: how much each model of the pool counts in L_geo, and so in the barycentre."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import fmean

from torch import Tensor

from alignmerge.engine.checkpoint import Checkpoint
from alignmerge.engine.faults import BadRequest
from alignmerge.engine.merger import MergeContext, check_range, total
from alignmerge.engine.store import write_json
from alignmerge.fisher import fisher
from alignmerge.gradients import VERSION, nll

POOLS = {"all": slice(None), "experts": slice(1, None)}
"""``pool`` -> which of anchor and experts L_geo runs over, in pool order."""
RULES = ("uniform", "inverse_fisher", "validation", "given")


def pool_weights(
    ctx: MergeContext, rule: str, given: Sequence[float] = (), pool: str = "all"
) -> dict[str, float] | None:
    """Return alias -> lambda_k of sum 1, in pool order, of the models of ``POOLS``; None where all are equal.

    The paper's sentence on lambda_k is cut off in every copy seen ("proportionally to a ..."), so the
    rules are ours. ``inverse_fisher``: 1 / ||Delta_k||_G, G the diagonal Fisher at theta_IT on the
    metric set, over the linear weights: no model prevails by having gone farthest. ``validation``:
    exp(-NLL_k), the geometric mean probability that model k gives to a response token of the metric
    set. ``given``: the numbers ``given``, divided by their sum.

    Raises:
        BadRequest: if there are not as many numbers as models.
        ArithmeticError: if a model of the pool equals theta_IT: its weight would be infinite.
    """
    everyone = zip(ctx.models.aliases, ctx.models.pool, strict=True)
    models = dict(list(everyone)[POOLS[pool]])
    if rule == "uniform":
        return None
    if rule == "given":
        if len(given) != len(models):
            allowed = f"{len(models)} numbers, for {', '.join(models)}"
            raise BadRequest.of("method.pool_weights", f"{len(given)} numbers", allowed)
        return shares(dict(zip(models, given, strict=True)))
    if rule == "validation":
        return shares({alias: math.exp(-mean_nll(ctx, model)) for alias, model in models.items()})
    return shares(_inverse_lengths(ctx, models))


def mean_nll(ctx: MergeContext, model: Checkpoint) -> float:
    """Return the mean over the metric examples of a model's cross-entropy per response token (nats)."""

    def make(folder: Path) -> None:
        write_json(folder / "nll.json", nll(ctx.loaded(model), ctx.examples("metric")).tolist())

    recipe = {"of": model.identity, "examples": ctx.examples_digest("metric"), "version": VERSION}
    artifact = ctx.cached("nll", recipe, make)
    return fmean(json.loads((artifact.path / "nll.json").read_text()))


def fisher_length(diagonal: Checkpoint, vector: Callable[[str], Tensor]) -> float:
    """Return sqrt(d^T G d) over the tensors of a diagonal Fisher; ``vector``: name -> that part of d."""
    squared = sum(float((diagonal.read(name) * vector(name).square()).double().sum()) for name in diagonal)
    return math.sqrt(squared)


def check_share(anchor_share: float | None) -> None:
    """Refuse a share of the anchor that is none; None: nobody's is given."""
    if anchor_share is not None:
        check_range("method.anchor_share", anchor_share, 0, 1)


def anchored(models: int, anchor_share: float | None) -> list[float] | None:
    """Return weights of sum 1 for a pool: the anchor's share, the rest equally for the experts.

    None, for all alike, where no share is given. ``models``: how many the pool has, the anchor among them.
    """
    if anchor_share is None:
        return None
    experts = models - 1
    return [anchor_share] + [(1 - anchor_share) / experts] * experts


def anchored_total(tensors: Sequence[Tensor], weights: Sequence[float] | None) -> Tensor:
    """Return the float64 sum of a pool's tensors, weighted as ``anchored`` says.

    The experts are summed before they are weighted, so that their order drops out.
    """
    if weights is None:
        return total(tensors)
    anchor, *experts = tensors
    return weights[0] * anchor.double() + weights[1] * total(experts)


def shares(weights: Mapping[str, float]) -> dict[str, float]:
    """Divide weights by their sum."""
    whole = math.fsum(weights.values())
    return {alias: weight / whole for alias, weight in weights.items()}


def _inverse_lengths(ctx: MergeContext, models: Mapping[str, Checkpoint]) -> dict[str, float]:
    base, found = ctx.models.base, {}
    diagonal = fisher(ctx, base, "metric")

    def length_of(model: Checkpoint) -> float:
        return fisher_length(diagonal, lambda name: model.read(name) - base.read(name))

    for alias, model in models.items():
        length = length_of(model)
        if length == 0:
            raise ArithmeticError(f"lambda_k: inverse_fisher: '{alias}' does not differ from the base")
        found[alias] = 1 / length
    return found

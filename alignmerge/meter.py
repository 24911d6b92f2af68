"""A(theta), the AQI of a model in memory, with its gradient in the weights of the linear layers."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from alignmerge.activations import in_order, last_states
from alignmerge.aqi import LAYERS, layers_at, mean_aqi, resampled_pairs
from alignmerge.engine.checkpoint import Checkpoint
from alignmerge.engine.examples import Example, batches
from alignmerge.engine.merger import Probes
from alignmerge.engine.seeding import torch_stream
from alignmerge.gradients import linear_layers

REPLICATES = 200


class Meter:
    """A of a model in memory on matched probes, and its gradient in the linear weights."""

    def __init__(self, model: Any, probes: Probes) -> None:
        self.model, self.layers = model, layers_at(LAYERS, int(model.config.num_hidden_layers))
        self.pairs = len(probes.harmful)
        self._batches = list(batches([Example(ids, len(ids)) for ids in (*probes.harmful, *probes.benign)]))
        self._hidden = torch.empty(0)
        model.requires_grad_(False)

    @torch.no_grad()
    def value(self) -> float:
        """Run the probes and return A, the mean of aqi01 over the layers.

        Raises:
            ArithmeticError: if A is not finite: a broken model, or clusters that coincide.
        """
        states = [last_states(self.model, batch, self.layers) for _, batch in self._batches]
        self._hidden = in_order(states, [indices for indices, _ in self._batches])
        found = float(mean_aqi(self._hidden))
        if not (math.isfinite(found) and bool(self._hidden.isfinite().all())):
            reason = "broken weights, or equal states"
            raise ArithmeticError(f"the AQI of the selection probes is not finite: {reason}")
        return found

    def deviation(self) -> float:
        """Return the bootstrap deviation of A over pairs, for the states of the last ``value``."""
        counts = resampled_pairs(self.pairs, REPLICATES, torch_stream(0, "budget", "bootstrap"))
        replicates = mean_aqi(self._hidden, counts)
        return float(replicates[replicates.isfinite()].std())  # a resample of one pair has no AQI

    def gradient(self) -> dict[str, Tensor]:
        """Return dA/dW at the states of the last ``value``: stored name -> (d_out, d_in) fp32.

        The probes run a second time, batch by batch, so that only one batch of activations is held.
        """
        hidden = self._hidden.detach().requires_grad_()
        (pull,) = torch.autograd.grad(mean_aqi(hidden), hidden)
        weights = {name: layer.weight for name, layer in linear_layers(self.model).items()}
        for weight in weights.values():
            weight.grad = torch.zeros_like(weight)
            weight.requires_grad_(True)
        for indices, batch in self._batches:
            states = last_states(self.model, batch, self.layers)
            states.backward(pull[:, indices])  # type: ignore[no-untyped-call]
        found = {}
        for name, weight in weights.items():
            assert weight.grad is not None
            found[name], weight.grad = weight.grad, None
            weight.requires_grad_(False)
        return found


class Alignment:
    """A(theta* + displacement): the AQI of a model in memory whose linear weights are moved."""

    def __init__(
        self, meter: Meter, layout: Checkpoint, solution: Callable[[str], Tensor], names: Sequence[str]
    ) -> None:
        """Fill the model with ``solution`` (view name -> theta*) as ``layout`` says; ``names`` can move."""
        self._meter = meter
        self.start: dict[str, Tensor] = {}  # theta* of the matrices that can move, by view name
        self._views = layout.views
        self._parameters = dict(meter.model.named_parameters())
        for name, view in layout.views.items():
            if view.stored in self._parameters:
                tensor = solution(name)
                self._put(name, tensor)
                if name in names:
                    self.start[name] = tensor

    def value(self, displacement: Mapping[str, Tensor]) -> float:
        """Return A at theta* + displacement."""
        self.move(displacement)
        return self._meter.value()

    def gradient(self) -> dict[str, Tensor]:
        """Return dA/dtheta at the point of the last ``value``, view name -> (d_out, d_in)."""
        return self.split(self._meter.gradient())

    def move(self, displacement: Mapping[str, Tensor]) -> None:
        """Put every matrix at theta* + ``displacement`` (view name -> tensor; none: theta*)."""
        for name, start in self.start.items():
            self._put(name, start + displacement.get(name, 0))

    def split(self, stored: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Cut tensors as they are stored into views, for the matrices that can move."""
        return {name: stored[self._views[name].stored][self._rows(name)] for name in self.start}

    @torch.no_grad()
    def _put(self, name: str, tensor: Tensor) -> None:
        self._parameters[self._views[name].stored][self._rows(name)] = tensor

    def _rows(self, name: str) -> slice:
        view = self._views[name]
        return slice(view.first, view.first + view.shape[0])

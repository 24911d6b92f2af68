"""Gradients by hooks against plain autograd, one example at a time; statistics against their definitions.

Tolerances are those of fp32 sums in another order: relative 2e-5 in the Frobenius norm unless a test says otherwise.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

import alignmerge.gradients
from alignmerge.engine.checkpoint import Checkpoint
from alignmerge.engine.examples import Batch, Example, batches
from alignmerge.engine.language import load_model
from alignmerge.gradients import (
    Gram,
    Visit,
    gram,
    kronecker_factors,
    linear_layers,
    linear_weights,
    nll,
    squares,
    visit_gradients,
    weighted_sum,
)
from tests.conftest import VOCABULARY, MakesModel

CLOSE = 2e-5
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": {},
    "qwen2": {},
    "phi3": {},
    "gemma2": {"attn_logit_softcapping": 0.5, "final_logit_softcapping": 1.0},  # low, so that the caps bend
}
SMALL = {"hidden_size": 8, "intermediate_size": 12, "num_attention_heads": 2, "num_key_value_heads": 1}
Tensors = dict[str, Tensor]
each_architecture = pytest.mark.parametrize("arch", list(ARCHITECTURES))


def examples_of(seed: int, count: int, longest: int = 20) -> list[Example]:
    """Random tokens; prompts and responses of unequal lengths."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(4, longest, (count,), generator=generator).tolist()
    ids = [torch.randint(3, VOCABULARY, (length,), generator=generator).tolist() for length in lengths]
    starts = [int(torch.randint(1, length - 1, (), generator=generator)) for length in lengths]
    return [Example(tuple(row), start) for row, start in zip(ids, starts, strict=True)]


def plain_loss(model: Any, example: Example) -> Tensor:
    """Mean NLL of the response tokens of one example, without padding, masks or options."""
    logits = model(input_ids=torch.tensor([example.ids])).logits[0]
    chances = logits.log_softmax(-1)
    picked = [chances[t - 1, example.ids[t]] for t in range(example.start, len(example.ids))]
    return -torch.stack(picked).mean()


class Pass(NamedTuple):
    """What autograd says of one example."""

    loss: float
    gradients: Tensors
    """dL/dW by weight name."""
    inputs: Tensors
    """(T, d_in) of every linear layer."""
    outputs: Tensors
    """(T, d_out): dL/dy of every linear layer."""


def apart(name: str, stored: Tensor, dim: int) -> Tensors:
    """The matrices in a fused one by their Llama names, counted out for the tiny models (4 heads of 8, 2 groups)."""
    fused = {
        "qkv_proj": {"q_proj": 32, "k_proj": 16, "v_proj": 16},
        "gate_up_proj": {"gate_proj": 48, "up_proj": 48},
    }
    for layer, sizes in fused.items():
        if f".{layer}." in name:
            parts = stored.split(list(sizes.values()), dim)
            return {name.replace(layer, part): value for part, value in zip(sizes, parts, strict=True)}
    return {name: stored}


def plain_pass(model: Any, example: Example) -> Pass:
    weights = {name: weight for name, weight in model.named_parameters() if name.endswith("_proj.weight")}
    modules = {name: model.get_submodule(name.removesuffix(".weight")) for name in weights}
    inputs: Tensors = {}
    outputs: Tensors = {}

    def note(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
            inputs[name], outputs[name] = args[0][0].detach(), output

        return hook

    handles = [module.register_forward_hook(note(name)) for name, module in modules.items()]
    loss = plain_loss(model, example)
    wanted = [*weights.values(), *(outputs[name] for name in weights)]
    found = torch.autograd.grad(loss, wanted, allow_unused=True)
    for handle in handles:
        handle.remove()
    assert all(gradient is not None for gradient in found)
    by_weight, by_output, by_input = {}, {}, {}
    for name, gradient, outward in zip(weights, found[: len(weights)], found[len(weights) :], strict=True):
        by_weight |= apart(name, gradient, 0)
        by_output |= apart(name, outward[0], 1)
        by_input |= dict.fromkeys(apart(name, gradient, 0), inputs[name])
    return Pass(loss.item(), by_weight, by_input, by_output)


class Case(NamedTuple):
    """One tiny model, examples of unequal lengths, and what plain autograd says of each of them."""

    model: Any
    examples: Sequence[Example]
    truth: Sequence[Pass]

    def mean(self, of: Callable[[Tensor], Tensor]) -> Tensors:
        """Mean over examples of a function of the gradients."""
        names = self.truth[0].gradients
        return {n: torch.stack([of(one.gradients[n]) for one in self.truth]).mean(0) for n in names}

    def jacobian(self) -> Tensor:
        """All per-example gradients, (n, d) float64."""
        rows = [torch.cat([g.flatten() for _, g in sorted(one.gradients.items())]) for one in self.truth]
        return torch.stack(rows).double()


def relative(found: Tensor, wanted: Tensor) -> float:
    return float((found.double() - wanted.double()).norm() / wanted.double().norm())


def assert_close(found: Tensors, wanted: Tensors, tolerance: float = CLOSE) -> None:
    assert found.keys() == wanted.keys()
    assert {n: e for n in found if (e := relative(found[n], wanted[n])) > tolerance} == {}


@pytest.fixture(scope="module")
def case(tiny_model: MakesModel) -> Callable[..., Case]:
    made: dict[str, Case] = {}

    def make(arch: str = "llama", count: int = 6, **changes: object) -> Case:
        key = repr((arch, count, sorted(changes.items())))
        if key not in made:
            folder = tiny_model(arch, **{**ARCHITECTURES[arch], **changes})
            examples = examples_of(3, count)
            plain = load_model(folder)
            made[key] = Case(load_model(folder), examples, [plain_pass(plain, one) for one in examples])
        return made[key]

    return make


# --- one example at a time --------------------------------------------------------------------------------


@each_architecture
def test_linear_layers_are_named_as_in_the_checkpoint(tiny_model: MakesModel, arch: str) -> None:
    folder = tiny_model(arch, **ARCHITECTURES[arch])
    layers = linear_layers(load_model(folder))
    stored = Checkpoint.open(folder, "model")
    assert set(layers) == {name for name in stored if name.endswith("_proj.weight")}
    assert all(tuple(layer.weight.shape) == stored[name].shape for name, layer in layers.items())
    assert len(layers) == (8 if arch == "phi3" else 14)


@each_architecture
def test_linear_weights_are_named_as_in_llama(tiny_model: MakesModel, arch: str) -> None:
    folder = tiny_model(arch, **ARCHITECTURES[arch])
    model, stored = load_model(folder), Checkpoint.open(folder, "model")
    found = linear_weights(model)
    llama = Checkpoint.open(tiny_model("llama"), "model")
    assert list(found) == [name for name in llama if name.endswith("_proj.weight")]
    for name, weight in found.items():
        assert weight.shape == llama[name].shape
        assert torch.equal(weight, stored.read(name))


@each_architecture
def test_hooks_against_autograd(case: Callable[..., Case], arch: str) -> None:
    """Padded batches of unequal lengths give each example's own gradient, nothing of its neighbours."""
    model, examples, truth = case(arch)
    assert len({len(example.ids) for example in examples}) > 1
    found: list[Tensors] = [{} for _ in examples]

    def visitor(visit: Visit) -> None:
        assert visit.inputs.dtype == visit.grads.dtype == torch.float32
        formed = alignmerge.gradients.gradients(visit.grads, visit.inputs)
        for row, (example, gradient) in enumerate(zip(visit.examples, formed, strict=True)):
            length = len(examples[example].ids)
            assert not visit.inputs[row, length:].any()
            assert not visit.grads[row, length:].any()
            assert visit.name not in found[example]
            found[example][visit.name] = gradient

    losses = visit_gradients(model, examples, visitor)
    assert losses.tolist() == pytest.approx([one.loss for one in truth], rel=1e-5)
    for gradients, one in zip(found, truth, strict=True):
        assert_close(gradients, one.gradients)


@each_architecture
def test_layers_fed_the_same_input_share_an_owner(case: Callable[..., Case], arch: str) -> None:
    model, examples, _ = case(arch)
    layer = {
        "self_attn": {"q_proj": "q_proj", "k_proj": "q_proj", "v_proj": "q_proj", "o_proj": "o_proj"},
        "mlp": {"gate_proj": "gate_proj", "up_proj": "gate_proj", "down_proj": "down_proj"},
    }
    wanted = {
        f"model.layers.{i}.{part}.{name}.weight": f"model.layers.{i}.{part}.{owner}.weight"
        for i in range(2)
        for part, names in layer.items()
        for name, owner in names.items()
    }
    assert kronecker_factors(model, examples, "input").owners == wanted
    assert kronecker_factors(model, examples, "output").owners == {name: name for name in wanted}


@each_architecture
def test_losses_against_a_plain_loop(case: Callable[..., Case], arch: str) -> None:
    model, examples, truth = case(arch)
    assert nll(model, examples).tolist() == pytest.approx([one.loss for one in truth], rel=1e-5)


def test_bfloat16_passes_give_fp32_statistics_nearby(case: Callable[..., Case]) -> None:
    model, examples, truth = case("llama")
    found = weighted_sum(model, examples, torch.full((len(examples),), 1 / len(examples)), precision="bfloat16")
    assert all(value.dtype == torch.float32 for value in found.values())
    wanted = case("llama").mean(lambda g: g)
    errors = [relative(found[name], wanted[name]) for name in wanted]
    assert 1e-4 < max(errors) < 0.1  # really rounded, and only rounded
    rounded = nll(model, examples, precision="bfloat16")
    assert rounded.tolist() == pytest.approx([one.loss for one in truth], rel=0.02)


def test_bfloat16_gradients_are_exact_products_rounded_once(case: Callable[..., Case]) -> None:
    """What autocast's own backward pass would give for each example, whatever the pieces they are formed in."""
    model, examples, _ = case("llama")
    total: Tensors = {}

    def visitor(visit: Visit) -> None:
        assert visit.inputs.dtype == visit.grads.dtype == torch.bfloat16
        exact = torch.einsum("bto,bti->boi", visit.grads.double(), visit.inputs.double())
        found = alignmerge.gradients.gradients(visit.grads, visit.inputs)
        torch.testing.assert_close(found.double(), exact, rtol=2**-8, atol=1e-6 * float(exact.abs().max()))
        total[visit.name] = total.get(visit.name, 0.0) + found.float().square().sum(0) / len(examples)

    visit_gradients(model, examples, visitor, precision="bfloat16")
    assert_close(squares(model, examples, precision="bfloat16"), total)


def test_rounded_products_are_left_as_they_were(case: Callable[..., Case]) -> None:
    """The Gram matrix of bf16 passes changes how fp32 products round, and nobody else's."""
    model, examples, _ = case("llama")
    weights = linear_weights(model)
    a = torch.randn(64, 512, generator=torch.Generator().manual_seed(0))
    before = a @ a.T
    gram(model, examples, weights.__getitem__, lambda n: weights[n][None], precision="bfloat16")
    assert torch.equal(a @ a.T, before)


def test_the_model_is_left_clean(case: Callable[..., Case]) -> None:
    model, examples, _ = case("llama")

    def stop(visit: Visit) -> None:
        raise KeyboardInterrupt

    state = torch.get_rng_state()
    squares(model, examples, labels="sampled", generator=torch.Generator().manual_seed(0))
    with pytest.raises(KeyboardInterrupt):
        visit_gradients(model, examples, stop)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(parameter.grad is None for parameter in model.parameters())
    assert not any(module._forward_hooks for module in model.modules())


# --- statistics -------------------------------------------------------------------------------------------


@each_architecture
def test_squares_are_of_single_examples(case: Callable[..., Case], arch: str) -> None:
    one = case(arch)
    assert_close(squares(one.model, one.examples), one.mean(torch.square))


def test_the_square_of_the_batch_gradient_is_something_else(case: Callable[..., Case]) -> None:
    one = case("llama")
    found = squares(one.model, one.examples)
    batch = {name: gradient.square() for name, gradient in one.mean(lambda g: g).items()}
    assert min(relative(batch[name], found[name]) for name in found) > 0.3
    copies = [one.examples[0]] * 4
    alone = {name: gradient.square() for name, gradient in one.truth[0].gradients.items()}
    assert_close(squares(one.model, copies), alone)  # only then the two agree


@each_architecture
def test_weighted_sums(case: Callable[..., Case], arch: str) -> None:
    one = case(arch)
    weights = torch.tensor([0.5, -2.0, 0.0, 1.0, 3.0, -0.25])
    found = weighted_sum(one.model, one.examples, weights)
    wanted = {
        name: sum((c * p.gradients[name] for c, p in zip(weights, one.truth, strict=True)), torch.zeros(()))
        for name in found
    }
    assert_close(found, wanted)


def test_weights_do_not_show_in_the_losses(case: Callable[..., Case]) -> None:
    model, examples, truth = case("llama")
    losses = visit_gradients(model, examples, lambda visit: None, weights=torch.arange(6.0))
    assert losses.tolist() == pytest.approx([one.loss for one in truth], rel=1e-5)


@each_architecture
@pytest.mark.parametrize("side", ["input", "output"])
def test_kronecker_factors_are_second_moments_over_tokens(
    case: Callable[..., Case], arch: str, side: Any
) -> None:
    one = case(arch)
    found = kronecker_factors(one.model, one.examples, side)
    for name in one.truth[0].gradients:
        vectors = torch.cat([getattr(p, f"{side}s")[name] for p in one.truth])
        assert len(vectors) == sum(len(example.ids) for example in one.examples)
        wanted = sum((torch.outer(v, v) for v in vectors), torch.zeros(())) / len(vectors)
        assert relative(found.moments[found.owners[name]], wanted) < CLOSE
    assert set(found.moments) == set(found.owners.values())


def whole_gram(*given: Any, **options: Any) -> Gram:
    """K and J x of one x over all blocks."""
    found = gram(*given, **options)
    assert len(found.kernel) == len(found.along) > 0
    return Gram(found.kernel.sum(0), found.along.sum(0)[:, 0])


def test_gram_is_the_kernel_of_the_dense_whitened_fisher(case: Callable[..., Case]) -> None:
    """Eigenpairs of K / n are those of G^-1/2 F_A G^-1/2, F_A = J^T J / n, on a layer small enough to write it."""
    one = case("llama", num_hidden_layers=1, **SMALL)
    names = sorted(one.truth[0].gradients)
    generator = torch.Generator().manual_seed(0)
    metric = {n: 0.1 + torch.rand(one.truth[0].gradients[n].shape, generator=generator) for n in names}
    x = {n: torch.randn(metric[n].shape, generator=generator) for n in names}
    found = whole_gram(one.model, one.examples, lambda n: 1 / metric[n], lambda n: x[n][None])

    n = len(one.examples)
    J = one.jacobian()
    half = torch.cat([metric[name].flatten() for name in names]).double().sqrt()
    whitened = J / half
    values, vectors = torch.linalg.eigh(whitened.T @ whitened / n)
    values, vectors = values.flip(0), vectors.flip(1)
    assert float(values[n:].abs().max()) < 1e-12 * float(values[0])  # J has no more directions than examples
    kernel_values, kernel_vectors = torch.linalg.eigh(found.kernel / n)
    kernel_values, kernel_vectors = kernel_values.flip(0), kernel_vectors.flip(1)
    torch.testing.assert_close(kernel_values, values[:n], rtol=1e-4, atol=0)
    mapped = whitened.T @ kernel_vectors
    overlap = (mapped / mapped.norm(dim=0) * vectors[:, :n]).sum(dim=0).abs()
    assert float(overlap.min()) > 1 - 1e-6
    along = J @ torch.cat([x[name].flatten() for name in names]).double()
    assert relative(found.along, along) < CLOSE
    rounded = whole_gram(
        one.model, one.examples, lambda n: 1 / metric[n], lambda n: x[n][None], precision="bfloat16"
    )
    assert 1e-5 < relative(rounded.kernel, found.kernel) < 1e-2


@each_architecture
def test_gram_and_directional_derivatives(case: Callable[..., Case], arch: str) -> None:
    """K = J J^T and J x of all matrices, x being one example's own gradient."""
    one = case(arch)
    found = whole_gram(
        one.model, one.examples, lambda n: torch.ones(1), lambda n: one.truth[2].gradients[n][None]
    )
    J = one.jacobian()
    assert relative(found.kernel, J @ J.T) < CLOSE
    assert relative(found.along, J @ J[2]) < CLOSE


@pytest.mark.parametrize("tokens", [1, 60, 100_000])
def test_batches_do_not_show(case: Callable[..., Case], monkeypatch: pytest.MonkeyPatch, tokens: int) -> None:
    """Examples alone, about four at a time, and all in one batch."""
    one = case("llama")
    sizes = []

    def counted(examples: Sequence[Example]) -> Iterator[tuple[list[int], Batch]]:
        for indices, batch in batches(examples, tokens):
            sizes.append(len(indices))
            yield indices, batch

    monkeypatch.setattr(alignmerge.gradients, "batches", counted)
    assert_close(squares(one.model, one.examples), one.mean(torch.square))
    assert max(sizes) == {1: 1, 60: 4, 100_000: 6}[tokens]
    names = sorted(one.truth[0].gradients)
    found = whole_gram(
        one.model, one.examples, lambda n: torch.ones(1), lambda n: one.truth[2].gradients[n][None]
    )
    J = one.jacobian()
    assert relative(found.kernel, J @ J.T) < CLOSE
    assert relative(found.along, J @ J[2]) < CLOSE
    moments = kronecker_factors(one.model, one.examples, "output").moments
    vectors = torch.cat([p.outputs[names[0]] for p in one.truth])
    assert relative(moments[names[0]], vectors.T @ vectors / len(vectors)) < CLOSE
    assert nll(one.model, one.examples).tolist() == pytest.approx([p.loss for p in one.truth], rel=1e-5)


# --- logistic regression ----------------------------------------------------------------------------------


class Logistic(nn.Module):
    """p(1 | token) = sigmoid(w x), with the features x of a token in its embedding."""

    def __init__(self, features: Tensor, weight: Tensor) -> None:
        super().__init__()
        self.embedding = nn.Embedding.from_pretrained(features)
        self.layer = nn.Linear(*weight.T.shape, bias=False)
        self.layer.weight.data.copy_(weight)

    def get_input_embeddings(self) -> nn.Embedding:
        return self.embedding

    def forward(self, input_ids: Tensor, logits_to_keep: int = 0, **options: object) -> SimpleNamespace:
        z = self.layer(self.embedding(input_ids))
        return SimpleNamespace(logits=torch.cat([torch.zeros_like(z), z], -1)[:, -logits_to_keep:])


FEATURES = torch.tensor([[0.4, -1.0], [2.0, 0.5], [-1.5, 1.0], [0.3, -2.0]])
WEIGHT = torch.tensor([[0.8, -0.6]])


def chances() -> Tensor:
    return torch.sigmoid(FEATURES @ WEIGHT[0])


def test_logistic_fisher_is_an_expectation_over_labels() -> None:
    """p F(y = 1) + (1 - p) F(y = 0) = x^2 p (1 - p), exactly, with the Fishers of given labels."""
    model = Logistic(FEATURES, WEIGHT)
    for token, (x, p) in enumerate(zip(FEATURES, chances(), strict=True)):
        fishers = [squares(model, [Example((token, label), 1)])["layer.weight"][0] for label in (0, 1)]
        torch.testing.assert_close(p * fishers[1] + (1 - p) * fishers[0], x.square() * p * (1 - p))


@pytest.mark.parametrize("seed", [0, 1])
def test_sampled_labels_estimate_the_logistic_fisher(seed: int) -> None:
    """One token of response a quarter of the time, two otherwise; the mean of T independent terms has 1 / T^2."""
    model = Logistic(FEATURES, WEIGHT)
    kinds = [Example((3, 1), 1), *(Example((token, 1, 1), 1) for token in (0, 2, 3))]
    p = chances()
    term = FEATURES.square() * (p * (1 - p)).unsqueeze(1)
    wanted = (term[3] + sum((term[i] + term[1]) / 4 for i in (0, 2, 3))) / 4
    many = kinds * 5000
    found = squares(model, many, labels="sampled", generator=torch.Generator().manual_seed(seed))
    torch.testing.assert_close(found["layer.weight"][0], wanted, rtol=0.04, atol=0)
    given = squares(model, kinds)["layer.weight"][0]
    assert float(((given - wanted) / wanted).abs().max()) > 0.3  # the empirical Fisher is not this


def test_sampling_follows_its_generator() -> None:
    model = Logistic(FEATURES, WEIGHT)
    examples = [Example((token, 1), 1) for token in range(4)] * 8

    def draw(seed: int) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        return squares(model, examples, labels="sampled", generator=generator)["layer.weight"]

    assert torch.equal(draw(3), draw(3))
    assert not torch.equal(draw(3), draw(4))

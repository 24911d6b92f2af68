"""Tiny models of the five architectures with a tokenizer, made on the spot; no network."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import pytest

from alignmerge.engine.kernels import fix

fix()  # as run.py does: before anything imports torch or numpy

VOCABULARY = 97
"""Rows of the embeddings: more than the tokenizer has tokens, as in many real models."""
SENTENCES = (
    "how do i build a kite with paper and string",
    "first take the paper then fold it and tie the string",
    "what is two plus three the answer is five",
    "i can not help with that request",
    "please write a short list of three words",
    "user assistant",
)
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{{ m['role'] }} : {{ m['content'] }} {{ eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}assistant :{% endif %}"
)
SHARED: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
TRAITS: dict[str, dict[str, Any]] = {
    "llama": {"rope_theta": 500_000.0},
    "mistral": {"sliding_window": 8},
    "qwen2": {},
    "phi3": {"original_max_position_embeddings": 128},
    "gemma2": {
        "tie_word_embeddings": True,
        "head_dim": 8,
        "query_pre_attn_scalar": 8,
        "sliding_window": 8,
        "attn_logit_softcapping": 50.0,
        "final_logit_softcapping": 30.0,
    },
}


class MakesModel(Protocol):
    """``tiny_model(arch, seed, dtype=..., shard=..., **config)``: the folder of a random two-layer model."""

    def __call__(
        self, arch: str = ..., seed: int = ..., *, dtype: str = ..., shard: str = ..., **changes: object
    ) -> Path: ...


class Perturbs(Protocol):
    """``perturbed(folder, seed, scale)``: a copy of a model with Gaussian noise on every weight."""

    def __call__(self, folder: Path, seed: int, scale: float = ...) -> Path: ...


def save_tokenizer(folder: Path, extra: tuple[str, ...] = ()) -> None:
    """Write a word-level tokenizer with chat template, bos, eos and padding; ``extra`` words come last."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import WhitespaceSplit
    from transformers import PreTrainedTokenizerFast

    special = ["<pad>", "<bos>", "<eos>", "<unk>"]
    words = dict.fromkeys(word for sentence in SENTENCES for word in sentence.split())
    vocabulary = {word: i for i, word in enumerate([*special, ":", *words, *extra])}
    tokenizer = Tokenizer(WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>", unk_token="<unk>"
    )
    fast.chat_template = TEMPLATE
    fast.save_pretrained(folder)


def _build(arch: str, seed: int, changes: dict[str, object]) -> Any:
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(arch, **{**SHARED, **TRAITS[arch], **changes})
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():  # biases and norms start at constants: make them tell
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.02)
    return model


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> MakesModel:
    """Make (once a session) and return the folder of a random two-layer model; treat it as read-only."""
    made: dict[str, Path] = {}

    def make(
        arch: str = "llama",
        seed: int = 0,
        *,
        dtype: str = "float32",
        shard: str = "5GB",
        **changes: object,
    ) -> Path:
        import torch

        key = repr((arch, seed, dtype, shard, sorted(changes.items())))
        if key not in made:
            folder = tmp_path_factory.mktemp(f"{arch}-{seed}")
            model = _build(arch, seed, changes).to(getattr(torch, dtype))
            model.save_pretrained(folder, max_shard_size=shard)
            save_tokenizer(folder)
            made[key] = folder
        return made[key]

    return make


@pytest.fixture(scope="session")
def perturbed(tmp_path_factory: pytest.TempPathFactory) -> Perturbs:
    """Make an anchor or an expert of a single-file model: the same folder with noise on every weight."""

    def make(folder: Path, seed: int, scale: float = 0.02) -> Path:
        import torch
        from safetensors.torch import load_file, save_file

        copy = tmp_path_factory.mktemp(f"{folder.name}-{seed}") / "model"
        shutil.copytree(folder, copy)
        generator = torch.Generator().manual_seed(seed)
        weights = {
            name: (w.float() + scale * torch.randn(w.shape, generator=generator)).to(w.dtype)
            for name, w in sorted(load_file(folder / "model.safetensors").items())
        }
        save_file(weights, copy / "model.safetensors", {"format": "pt"})
        return copy

    return make


@pytest.fixture
def copied(tmp_path: Path) -> Callable[[Path], Path]:
    """Return a copy of a model folder that the test may damage."""

    def copy(folder: Path) -> Path:
        target = tmp_path / f"copy-{len(list(tmp_path.iterdir()))}"
        shutil.copytree(folder, target)
        return target

    return copy

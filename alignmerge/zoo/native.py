"""Small models of the five real architectures, made from nothing: each keeps what sets its family apart."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

from alignmerge.engine.examples import Example, read_jsonl, render
from alignmerge.engine.faults import BadRequest, Fault
from alignmerge.engine.language import Progress
from alignmerge.engine.seeding import stream_seed
from alignmerge.zoo.random_model import corpus_texts
from alignmerge.zoo.training import Recipe, train

PAD, UNKNOWN, END, USER, ASSISTANT = "<|pad|>", "<|unk|>", "<|end|>", "<|user|>", "<|assistant|>"
SPECIAL = (PAD, UNKNOWN, END, USER, ASSISTANT)
TEMPLATE = (
    "{% for message in messages %}{{ '<|' + message['role'] + '|> ' + message['content'] + '<|end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
PIECES = r"(?<=[0-9])[0-9]|(?<=[^▁])[^\w\s'▁]|\n"
"""What is cut off a word: digits after the first (tens differ from ones); marks, but no apostrophe; line ends."""
POSITIONS = 256


def _llama3(size: NativeModel) -> dict[str, Any]:
    rope = {"rope_type": "llama3", "rope_theta": 500_000.0, "factor": 8.0, "low_freq_factor": 1.0}
    rope |= {"high_freq_factor": 4.0, "original_max_position_embeddings": POSITIONS // 8}
    return {"rope_parameters": rope, "attention_bias": False}


def _mistral(size: NativeModel) -> dict[str, Any]:
    return {"sliding_window": size.window}


def _qwen2(size: NativeModel) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": "default", "rope_theta": 1_000_000.0}}


def _phi3(size: NativeModel) -> dict[str, Any]:
    return {"num_key_value_heads": size.heads, "original_max_position_embeddings": POSITIONS}


def _gemma2(size: NativeModel) -> dict[str, Any]:
    head = size.hidden // size.heads
    return {
        "tie_word_embeddings": True, "head_dim": head, "query_pre_attn_scalar": head, "sliding_window": size.window,
        "attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0,
    }  # fmt: skip


ARCHITECTURES: Mapping[str, tuple[str, Callable[[NativeModel], dict[str, Any]]]] = {
    "llama3": ("llama", _llama3),
    "mistral": ("mistral", _mistral),
    "qwen2": ("qwen2", _qwen2),
    "phi3": ("phi3", _phi3),
    "gemma2": ("gemma2", _gemma2),
}
"""Our name -> the class of ``transformers`` and the family's own settings."""


@dataclass(frozen=True, kw_only=True)
class NativeModel:
    """A model of one architecture with a word-level tokenizer, trained from nothing on a corpus' plain texts."""

    version: ClassVar[int] = 1
    architecture: str
    """One of ``ARCHITECTURES``."""
    training: Recipe
    """How it learns from the texts of ``pretrain``."""
    hidden: int = 64
    layers: int = 3
    heads: int = 2
    kv_heads: int = 1
    """Phi-3 has as many as ``heads``."""
    intermediate: int = 128
    window: int = 24
    """Tokens that a sliding window sees: in every layer of Mistral, every other one of Gemma-2."""
    spread: float = 0.05
    """Standard deviation of the initial weights."""
    seeded: bool = False
    """Whether each seed of an experiment has its own; otherwise all seeds share one."""

    def __post_init__(self) -> None:
        faults = [
            Fault(f"family.recipes: {key}", str(getattr(self, key)), "a whole number of at least 1")
            for key in ("hidden", "layers", "heads", "kv_heads", "intermediate", "window")
            if getattr(self, key) < 1
        ]
        if self.architecture not in ARCHITECTURES:
            faults.append(Fault("family.recipes: architecture", self.architecture, ", ".join(ARCHITECTURES)))
        if not 0 < self.spread <= 1:
            faults.append(Fault("family.recipes: spread", str(self.spread), "a number in (0, 1]"))
        if not faults and self.hidden % (2 * self.heads):
            faults.append(
                Fault("family.recipes: hidden", str(self.hidden), f"a multiple of twice {self.heads} heads")
            )
        if not faults and self.heads % self.kv_heads:
            faults.append(
                Fault("family.recipes: kv_heads", str(self.kv_heads), f"a divisor of {self.heads} heads")
            )
        if faults:
            raise BadRequest(faults)

    def build(self, corpus: Path, seed: int, progress: Progress) -> tuple[Any, Any, list[float]]:
        """Return model, tokenizer and the loss (nats a token) of every step."""
        tokenizer = word_tokenizer(corpus)
        model = self.initial(tokenizer, seed)
        recipe = replace(self.training, seed=self.training.seed + seed)
        return model, tokenizer, train(model, plain_examples(tokenizer, corpus), recipe, progress)

    def facts(self) -> dict[str, Any]:
        """Return the fields that determine the weights, as JSON has them."""
        return {**asdict(self), "training": self.training.facts()}

    def initial(self, tokenizer: Any, seed: int) -> Any:
        """Return the model with random weights; the global generator is left as it was."""
        import torch
        from transformers import AutoConfig, AutoModelForCausalLM

        kind, traits = ARCHITECTURES[self.architecture]
        shared = {
            "vocab_size": len(tokenizer), "hidden_size": self.hidden, "intermediate_size": self.intermediate,
            "num_hidden_layers": self.layers, "num_attention_heads": self.heads, "num_key_value_heads": self.kv_heads,
            "max_position_embeddings": POSITIONS, "initializer_range": self.spread, "tie_word_embeddings": False,
            "bos_token_id": None, "eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id,
        }  # fmt: skip
        config = AutoConfig.for_model(kind, **{**shared, **traits(self)})
        with torch.random.fork_rng():
            torch.manual_seed(stream_seed(seed, "native model", self.architecture))
            return AutoModelForCausalLM.from_config(
                config, attn_implementation="eager"
            )  # trained as load_model says


def plain_examples(tokenizer: Any, corpus: Path) -> list[Example]:
    """Tokenise ``pretrain``: of a text, or a turn with its answer, every token but the first is learnt, and the end."""
    records = read_jsonl(corpus / "train/pretrain.jsonl", "corpus", ("text",))
    texts = [render(tokenizer, r["text"]) + r["response"] if "response" in r else r["text"] for r in records]
    rows = tokenizer(texts, add_special_tokens=False)["input_ids"]
    return [Example((*ids, tokenizer.eos_token_id), 1) for ids in rows]


def word_tokenizer(corpus: Path) -> Any:
    """Return a word-level tokenizer with a chat template for every word of a corpus folder.

    Decoding what was encoded gives the text again, white space and apostrophes included, unless it holds an unknown
    word or begins with a space.
    """
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    cut = pre_tokenizers.Sequence(
        [pre_tokenizers.Metaspace(prepend_scheme="always"), pre_tokenizers.Split(Regex(PIECES), "isolated")]
    )
    words = {piece for text in corpus_texts(corpus) for piece, _ in cut.pre_tokenize_str(text)}
    vocabulary = {token: at for at, token in enumerate([*SPECIAL, *sorted(words)])}
    raw = Tokenizer(models.WordLevel(vocabulary, unk_token=UNKNOWN))
    raw.pre_tokenizer = cut
    raw.decoder = decoders.Metaspace(prepend_scheme="always")
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=raw, pad_token=PAD, unk_token=UNKNOWN, eos_token=END,
        additional_special_tokens=[USER, ASSISTANT], clean_up_tokenization_spaces=False,
    )  # fmt: skip
    tokenizer.chat_template = TEMPLATE
    return tokenizer

"""Small models of the five real architectures, made from nothing; each keeps its family's traits."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

from alignmerge.engine.examples import Example, read_jsonl, render
from alignmerge.engine.faults import Fault, refuse, too_small
from alignmerge.engine.language import Progress
from alignmerge.engine.seeding import stream_seed
from alignmerge.zoo.tokenizer import tokenizer_for
from alignmerge.zoo.training import Recipe, train

WHERE = "family.recipes: "
POSITIONS = 256
ARCHITECTURES = {"llama3": "llama", "mistral": "mistral", "qwen2": "qwen2", "phi3": "phi3", "gemma2": "gemma2"}
"""Our name -> that of ``transformers``."""
ROPE_LLAMA3 = {"rope_type": "llama3", "rope_theta": 500_000.0, "factor": 8.0, "low_freq_factor": 1.0}
ROPE_LLAMA3 |= {"high_freq_factor": 4.0, "original_max_position_embeddings": POSITIONS // 8}
ROPE_QWEN2 = {"rope_type": "default", "rope_theta": 1_000_000.0}


@dataclass(frozen=True, kw_only=True)
class NativeModel:
    """A model of one architecture with a token for each word, trained on the plain texts of a corpus."""

    version: ClassVar[int] = 2
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
        sizes = {"hidden": self.hidden, "layers": self.layers, "heads": self.heads, "kv_heads": self.kv_heads}
        sizes |= {"intermediate": self.intermediate, "window": self.window}
        faults = too_small(sizes, WHERE, 1)
        if self.architecture not in ARCHITECTURES:
            faults.append(Fault(f"{WHERE}architecture", self.architecture, ", ".join(ARCHITECTURES)))
        if not 0 < self.spread <= 1:
            faults.append(Fault(f"{WHERE}spread", str(self.spread), "a number in (0, 1]"))
        if not faults and self.hidden % (2 * self.heads):
            allowed = f"a multiple of twice {self.heads} heads"
            faults.append(Fault(f"{WHERE}hidden", str(self.hidden), allowed))
        if not faults and self.heads % self.kv_heads:
            faults.append(Fault(f"{WHERE}kv_heads", str(self.kv_heads), f"a divisor of {self.heads} heads"))
        refuse(faults)

    def make(self, corpus: Path, seed: int, progress: Progress) -> tuple[Any, Any, list[float]]:
        """Return model, tokenizer and the loss (nats a token) of every step."""
        tokenizer = tokenizer_for(self.architecture, corpus)
        model = self.initial(tokenizer, seed)
        recipe = replace(self.training, seed=self.training.seed + seed)
        return model, tokenizer, train(model, plain_examples(tokenizer, corpus), recipe, progress)

    def traits(self) -> dict[str, Any]:
        """Return the settings that set the architecture apart, by their names in ``transformers``."""
        head = self.hidden // self.heads
        traits: dict[str, dict[str, Any]] = {
            "llama3": {"rope_parameters": {**ROPE_LLAMA3}, "attention_bias": False},
            "mistral": {"sliding_window": self.window},
            "qwen2": {"rope_parameters": {**ROPE_QWEN2}},
            "phi3": {"num_key_value_heads": self.heads, "original_max_position_embeddings": POSITIONS},
            "gemma2": {
                "tie_word_embeddings": True, "head_dim": head, "query_pre_attn_scalar": head,
                "sliding_window": self.window, "attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0,
            },
        }  # fmt: skip
        return traits[self.architecture]

    def initial(self, tokenizer: Any, seed: int) -> Any:
        """Return the model with random weights; the global generator is left as it was."""
        import torch
        from transformers import AutoConfig, AutoModelForCausalLM

        shared = {
            "vocab_size": len(tokenizer), "bos_token_id": None, "eos_token_id": tokenizer.eos_token_id,
            "pad_token_id": tokenizer.pad_token_id, "hidden_size": self.hidden,
            "intermediate_size": self.intermediate, "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads, "num_key_value_heads": self.kv_heads,
            "max_position_embeddings": POSITIONS, "initializer_range": self.spread, "tie_word_embeddings": False,
        }  # fmt: skip
        config = AutoConfig.for_model(ARCHITECTURES[self.architecture], **{**shared, **self.traits()})
        with torch.random.fork_rng():
            torch.manual_seed(stream_seed(seed, "native model", self.architecture))
            # The attention that load_model uses: a model is trained as it will be run.
            return AutoModelForCausalLM.from_config(config, attn_implementation="eager")


def plain_examples(tokenizer: Any, corpus: Path) -> list[Example]:
    """Tokenise ``pretrain``: of a text, or a turn with its answer, all tokens but the first are learnt."""
    texts = []
    for record in read_jsonl(corpus / "train/pretrain.jsonl", "corpus", ("text",)):
        if "response" in record:
            texts.append(render(tokenizer, record["text"]) + record["response"])
        else:
            texts.append(record["text"])
    rows = tokenizer(texts, add_special_tokens=False)["input_ids"]
    return [Example((*ids, tokenizer.eos_token_id), 1) for ids in rows]

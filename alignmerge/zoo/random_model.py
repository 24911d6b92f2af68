"""Random tiny models for the smoke experiment: every step of the harness, no knowledge at all."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from alignmerge.engine.faults import Fault, refuse
from alignmerge.engine.language import save_model
from alignmerge.engine.seeding import stream_seed

CHATML = (
    "{% for message in messages %}{{'<|im_start|>' + message['role'] + '\n' + message['content']"
    " + '<|im_end|>' + '\n'}}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
HEADS = 4
LEAST_TOKENS = 300
"""256 bytes, the special tokens, and some merges."""
SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")


@dataclass(frozen=True, kw_only=True)
class RandomModel:
    """A two-layer Llama with random weights and a byte-level BPE tokenizer trained on the corpus."""

    version: ClassVar[int] = 1
    hidden: int = 64
    layers: int = 2
    vocabulary: int = 1024
    seed: int = 0

    def __post_init__(self) -> None:
        units = {"hidden": (2 * HEADS, 2 * HEADS), "layers": (1, 1), "vocabulary": (1, LEAST_TOKENS)}
        faults = []
        for key, (unit, least) in units.items():
            given = getattr(self, key)
            if given < least or given % unit:
                allowed = f"a multiple of {unit}, at least {least}"
                faults.append(Fault(f"family.recipes: {key}", str(given), allowed))
        refuse(faults)

    def make(self, corpus: Path, folder: Path, seed: int) -> dict[str, Any]:
        """Write the model folder and return its digest."""
        import torch
        from transformers import LlamaConfig, LlamaForCausalLM

        tokenizer = _tokenizer(corpus_texts(corpus), self.vocabulary)
        config = LlamaConfig(
            vocab_size=self.vocabulary, hidden_size=self.hidden, intermediate_size=2 * self.hidden,
            num_hidden_layers=self.layers, num_attention_heads=HEADS, num_key_value_heads=HEADS // 2,
            max_position_embeddings=1024, tie_word_embeddings=True, initializer_range=0.1, bos_token_id=None,
            eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
        )  # fmt: skip
        with torch.random.fork_rng():
            torch.manual_seed(stream_seed(seed, "random model", str(self.seed)))
            model = LlamaForCausalLM(config)
        return {"digest": save_model(model, tokenizer, folder)}


def corpus_texts(corpus: Path) -> list[str]:
    """Return every text and response of a corpus folder, file by file."""
    texts = []
    for path in sorted(corpus.rglob("*.jsonl")):
        for record in map(json.loads, path.read_text().splitlines()):
            texts += [record[key] for key in ("text", "response") if key in record]
    return texts


def _tokenizer(texts: list[str], size: int) -> Any:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=size, special_tokens=list(SPECIAL), initial_alphabet=alphabet, show_progress=False
    )
    raw.train_from_iterator(texts, trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, eos_token=SPECIAL[2], pad_token=SPECIAL[0])
    tokenizer.chat_template = CHATML
    return tokenizer

"""Tokenizers of the small models: a token a word, in the class that AutoTokenizer takes for their architecture."""

import json
from itertools import chain
from pathlib import Path
from typing import Any

from alignmerge.zoo.random_model import corpus_texts

PAD, UNKNOWN, END, USER, ASSISTANT = "<|pad|>", "<|unk|>", "<|end|>", "<|user|>", "<|assistant|>"
SPECIAL = (PAD, UNKNOWN, END, USER, ASSISTANT)
TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|' + message['role'] + '|> ' + message['content'] + '<|end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
PIECES = r"(?<=[0-9])[0-9]|(?<=[^▁])[^\w\s'▁]|\n"
"""What is cut off a word: digits after the first (tens differ from ones), marks but apostrophes, line ends."""
MOST_TOKENS = 100_000
"""More than the pieces of any corpus: merging ends when each piece is one token."""


def word_tokenizer(corpus: Path) -> Any:
    """Return a word-level tokenizer with a chat template for every word of a corpus folder.

    Decoding what was encoded gives the text again, white space and apostrophes included, unless it holds an
    unknown word or begins with a space.
    """
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    spaces = pre_tokenizers.Metaspace(prepend_scheme="always")
    cut = pre_tokenizers.Sequence([spaces, pre_tokenizers.Split(Regex(PIECES), "isolated")])
    words: set[str] = set()
    for text in corpus_texts(corpus):
        words.update(piece for piece, _ in cut.pre_tokenize_str(text))
    tokens = [*SPECIAL, *sorted(words)]
    vocabulary = dict(zip(tokens, range(len(tokens)), strict=True))
    raw = Tokenizer(models.WordLevel(vocabulary, unk_token=UNKNOWN))
    raw.pre_tokenizer = cut
    raw.decoder = decoders.Metaspace(prepend_scheme="always")
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=raw, pad_token=PAD, unk_token=UNKNOWN, eos_token=END,
        additional_special_tokens=[USER, ASSISTANT], clean_up_tokenization_spaces=False,
    )  # fmt: skip
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def qwen2_tokenizer(corpus: Path) -> Any:
    """Return Qwen2's byte-level BPE with its chat template; every word of a corpus folder is one token.

    Of a Qwen2 folder AutoTokenizer keeps vocabulary, merges and added tokens, and puts its own rules in place of
    all others: a word-level tokenizer would not know its words. A word has one token at the beginning of a text
    and another one after a space; so have digits, by tokens that are added: Qwen2's rules make the space before a
    number a token.
    """
    from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers, trainers
    from transformers import Qwen2Tokenizer

    named: dict[str, Any] = {"pad_token": PAD, "unk_token": UNKNOWN, "eos_token": END}
    own, texts = Qwen2Tokenizer(**named).backend_tokenizer, corpus_texts(corpus)
    raw = Tokenizer(models.BPE())
    raw.normalizer, raw.pre_tokenizer = own.normalizer, own.pre_tokenizer
    trainer = trainers.BpeTrainer(
        vocab_size=MOST_TOKENS, special_tokens=list(SPECIAL), show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )  # fmt: skip
    raw.train_from_iterator(chain(texts, (f" {text}" for text in texts)), trainer)
    learnt = json.loads(raw.to_str())["model"]
    named |= {"vocab": learnt["vocab"], "merges": [tuple(pair) for pair in learnt["merges"]]}
    named |= {"additional_special_tokens": [USER, ASSISTANT], "clean_up_tokenization_spaces": False}
    tokenizer = Qwen2Tokenizer(**named)
    tokenizer.add_tokens([AddedToken(f" {digit}", normalized=False) for digit in range(10)])
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def tokenizer_for(architecture: str, corpus: Path) -> Any:
    """Return the tokenizer of a small model: Qwen2 has one of its own kind, the others share the word-level one."""
    return qwen2_tokenizer(corpus) if architecture == "qwen2" else word_tokenizer(corpus)

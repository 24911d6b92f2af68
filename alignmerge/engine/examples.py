"""Examples (prompt, response) as token ids: what statistics and training read."""

import datetime
import json
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from alignmerge.engine.faults import BadRequest

DATE = "2024-07-26"
"""The day that chat templates insert unless a family names another: Llama-3's own default."""

TEMPLATE = "family.chat_template"
CLOCK = threading.Lock()


class Example(NamedTuple):
    """One tokenised example; the response is ``ids[start:]``."""

    ids: tuple[int, ...]
    start: int


class Batch(NamedTuple):
    """Right-padded examples."""

    ids: Tensor
    """(B, T) int64; padded with 0."""
    mask: Tensor
    """(B, T) bool: real tokens."""
    targets: Tensor
    """(B, T) int64: the next token where it belongs to the response, -100 elsewhere."""

    @property
    def keep(self) -> int:
        """How many trailing positions hold every target: the output matrix is only needed there."""
        first = int((self.targets >= 0).int().argmax(dim=1).min())
        return self.ids.shape[1] - first


def read_jsonl(
    path: Path, where: str, keys: Sequence[str] = ("prompt", "response"), *, most: int | None = None
) -> list[dict[str, Any]]:
    """Read JSON lines (the first ``most``) that must have ``keys``; raises BadRequest naming the line at fault."""
    if not path.is_file():
        raise BadRequest.of(where, f"no such file: {path}", "a JSONL file with " + " and ".join(keys))
    records = []
    for number, line in enumerate(path.read_bytes().splitlines()[:most], 1):
        try:
            record = json.loads(line)
        except (ValueError, RecursionError):
            record = None
        if not isinstance(record, dict) or not all(isinstance(record.get(key), str) for key in keys):
            allowed = "JSON with the texts " + ", ".join(keys)
            raise BadRequest.of(f"{where}: {path}:{number}", "not a record", allowed)
        records.append(record)
    return records


def write_jsonl(path: Path, records: Iterable[Mapping[str, Any]]) -> None:
    """Write JSON lines with sorted keys."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(record, sort_keys=True) + "\n" for record in records))


def render(tokenizer: Any, prompt: str, date: str = DATE) -> str:
    """Put a user turn through the chat template and open the assistant's turn.

    ``date`` (YYYY-MM-DD) is what a template gets that inserts the day: prompts must not change overnight.
    Raises BadRequest if there is no template, or with the template's own words if it refuses.
    """
    from jinja2 import TemplateError

    if not tokenizer.chat_template:
        raise BadRequest.of(TEMPLATE, f"{tokenizer.name_or_path} has none of its own", "a chat template")
    day, turn = datetime.datetime.fromisoformat(date), [{"role": "user", "content": prompt}]
    shown = f"{day:%d %b %Y}"  # what Llama-3 asks for by name; others call strftime_now
    fill = tokenizer.apply_chat_template
    with _today(day):
        try:
            return str(fill(turn, tokenize=False, add_generation_prompt=True, date_string=shown))
        except (TemplateError, TypeError, KeyError, ValueError) as error:
            given = f"the template of {tokenizer.name_or_path} says: {error}"
            raise BadRequest.of(TEMPLATE, given, "one that takes a single user turn") from error


@contextmanager
def _today(day: datetime.datetime) -> Iterator[None]:
    """Make ``strftime_now`` of chat templates see another day: transformers passes no function to a template."""
    from transformers.utils import chat_template_utils

    class Fixed(datetime.datetime):
        @classmethod
        def now(cls, tz: datetime.tzinfo | None = None) -> Self:
            return cls.combine(day.date(), day.time(), tz)

    with CLOCK:
        usual = chat_template_utils.datetime
        chat_template_utils.datetime = Fixed
        try:
            yield
        finally:
            chat_template_utils.datetime = usual


def tokenise(
    tokenizer: Any, records: Iterable[Mapping[str, Any]], max_length: int = 1024, date: str = DATE
) -> list[Example]:
    """Tokenise {prompt, response[, open]} records; an ``open`` response was cut: no end-of-turn token."""
    examples = []
    for record in records:
        prompt = tokenizer(render(tokenizer, record["prompt"], date), add_special_tokens=False)["input_ids"]
        response = tokenizer(record["response"], add_special_tokens=False)["input_ids"]
        if not record.get("open"):
            response = [*response, tokenizer.eos_token_id]
        example = Example(tuple((prompt + response)[:max_length]), len(prompt))
        if 0 < example.start < len(example.ids):
            examples.append(example)
    return examples


def batches(examples: Sequence[Example], tokens: int = 1024) -> Iterator[tuple[list[int], Batch]]:
    """Yield (indices, batch) of similar lengths, each of at most ``tokens`` padded tokens; deterministic."""
    groups: list[list[int]] = []
    for i in sorted(range(len(examples)), key=lambda i: (len(examples[i].ids), i)):
        if not groups or (len(groups[-1]) + 1) * len(examples[i].ids) > tokens:
            groups.append([])
        groups[-1].append(i)
    for group in groups:
        yield group, collate([examples[i] for i in group])


def collate(examples: Sequence[Example]) -> Batch:
    """Right-pad examples into one batch."""
    ids = pad_sequence([torch.tensor(example.ids) for example in examples], batch_first=True)
    bounds = torch.tensor([(example.start, len(example.ids)) for example in examples])
    starts, ends = bounds[:, :1], bounds[:, 1:]
    at = torch.arange(ids.shape[1])
    learnt = (starts <= at + 1) & (at + 1 < ends)
    return Batch(ids, at < ends, ids.roll(-1, dims=1).where(learnt, -100))

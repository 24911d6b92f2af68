"""What a model can do: tasks run by lm-eval 0.4.13 on our model, tokenizer and batch size.

``write_tasks`` makes a folder that lm-eval's own command line reads as well, with the same numbers::

    lm_eval run --model hf --model_args pretrained=MODEL,dtype=bfloat16,max_length=1024 --device cpu \\
        --batch_size N --apply_chat_template --include_path FOLDER \\
        --tasks alignmerge_format,alignmerge_arithmetic,alignmerge_gsm8k,alignmerge_mmlu

with N the batch size that the task has here (``batch_sizes``, otherwise the family's).
"""

from __future__ import annotations

import contextlib
import io
import json
import logging
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

from alignmerge.engine.faults import BadRequest, Fault
from eval.columns import Column
from eval.scorers.answers import digest
from eval.scorers.interface import LoadedModel, Prompt, Sample, Scorer, Subject, whole
from eval.scorers.tasks.checks import without_thought

if TYPE_CHECKING:
    from lm_eval.api.model import LM
    from transformers import PreTrainedTokenizerBase

Row = Mapping[str, Any]  # what lm-eval logs for one question: document, request, reply and marks

_TEMPLATES = Path(__file__).with_name("tasks")


class Task(NamedTuple):
    """Which column a task fills, from which metric of lm-eval, and which facts its documents need."""

    column: str
    metric: str
    facts: tuple[str, ...]


TASKS: Mapping[str, Task] = {
    "format": Task("instruction_following", "acc", ("check", "args")),
    "arithmetic": Task("reasoning", "exact_match", ("answer",)),
    "gsm8k": Task("gsm8k", "exact_match", ("answer",)),
    "mmlu": Task("mmlu", "acc", ("choices", "answer")),
    "knowledge": Task("knowledge", "acc", ("check", "args")),
    "factual": Task("factual", "acc", ("check", "args")),
    "helpful": Task("helpfulness", "acc", ("check", "args")),
}
"""By the name of the prompt set; lm-eval knows the task as ``alignmerge_<name>``."""


@dataclass(frozen=True, kw_only=True)
class Utility(Scorer):
    """Instruction following, sums, GSM8K and MMLU, or facts: one value, 0 or 1, for each question.

    Every prompt goes through the chat template, decoding is greedy. GSM8K has three worked examples, as earlier
    turns of the conversation; the other tasks have none. A thought that a reply begins with is not marked; that
    there was one is recorded.
    """

    columns: ClassVar[Mapping[str, Column]] = {
        "instruction_following": Column("instruction following", "Utility", "up", main=4, rank=1),
        "reasoning": Column("reasoning", "Utility", "up", main=3, rank=2),
        "helpfulness": Column("helpfulness", "Utility", "up", main=6, rank=3),
        "knowledge": Column("knowledge", "Utility", "up", main=5, rank=4),
        "gsm8k": Column("GSM8K", "Utility", "up", rank=5),
        "mmlu": Column("MMLU", "Utility", "up", rank=6),
        "factual": Column("factual recall", "Utility", "up", rank=7),
    }
    name: ClassVar[str] = "utility"
    version: ClassVar[int] = 3  # 3: worked examples for GSM8K, room to answer, thoughts are not marked
    tasks: Sequence[str] = ("format", "arithmetic", "gsm8k", "mmlu")
    """What real prompts have; the tiny world has ``knowledge``, ``factual`` and ``helpful`` for the last two."""
    batch_sizes: Mapping[str, int] = field(default_factory=lambda: {"gsm8k": 32, "mmlu": 8})
    """Questions at once, by task, where the family's batch size does not suit (long prompts)."""
    limit: int | None = None  # only the first so many questions of each task
    max_length: int = 1024  # most tokens of prompt and reply together

    def __post_init__(self) -> None:
        """Raise ``BadRequest`` with every field that is out of range."""
        faults = list(_task_faults(self.tasks))
        faults += whole("scorer.utility.limit", self.limit, 1, null=True)
        faults += whole("scorer.utility.max_length", self.max_length, 128)
        for name, size in self.batch_sizes.items():
            if name not in TASKS:
                faults.append(Fault("scorer.utility.batch_sizes", repr(name), ", ".join(TASKS)))
            faults += whole(f"scorer.utility.batch_sizes.{name}", size, 1)
        if faults:
            raise BadRequest(faults)

    def score(self, subject: Subject) -> Iterable[Sample]:
        """Return one sample for each question; raises ``BadRequest`` where a prompt is too long or not rendered."""
        from alignmerge.engine.language import plain_decoding

        loaded = subject.loaded()
        subject.rendered(self.tasks[0])  # a template that is missing or refuses is named; lm-eval just fails
        with TemporaryDirectory(prefix="alignmerge-tasks-") as folder:
            write_tasks(Path(folder), {name: subject.prompts(name) for name in self.tasks})
            answered: dict[str, list[Row]] = {}
            with _quiet(), plain_decoding(loaded.model, loaded.tokenizer):
                for size, names in self._batches(loaded.batch_size).items():
                    lm = language_model(loaded._replace(batch_size=size), self.max_length)
                    answered |= run_tasks(lm, Path(folder), names, self.limit)
        for name, rows in answered.items():
            for row in rows:
                self._refuse_truncated(loaded.tokenizer, name, row)
        return samples(answered)

    def _batches(self, usual: int) -> dict[int, list[str]]:
        """Return batch size -> tasks."""
        found: dict[int, list[str]] = {}
        for name in self.tasks:
            found.setdefault(self.batch_sizes.get(name, usual), []).append(name)
        return found

    def _refuse_truncated(self, tokenizer: PreTrainedTokenizerBase, name: str, row: Row) -> None:
        """Raise where lm-eval cut the prompt from the left, which it does with a mere warning."""
        prompt, wanted = row["arguments"][0]
        tokens = len(tokenizer(prompt, add_special_tokens=False)["input_ids"])
        tokens += wanted["max_gen_toks"] if isinstance(wanted, dict) else 1
        if tokens > self.max_length:
            given = f"{self.max_length}, and a prompt of {name} with its reply has {tokens} tokens"
            raise BadRequest.of("scorer.utility.max_length", given, f"at least {tokens}")


def write_tasks(folder: Path, prompts: Mapping[str, Sequence[Prompt]]) -> None:
    """Fill ``folder`` with lm-eval's task files and the data of these prompt sets.

    Nothing in it is tied to its place: the tasks find their data beside them.
    """
    folder.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(_TEMPLATES / "checks.py", folder / "checks.py")
    for name, asked in prompts.items():
        shutil.copyfile(_TEMPLATES / f"{name}.yaml", folder / f"{name}.yaml")
        with (folder / f"{name}.jsonl").open("w", encoding="utf-8") as file:
            for prompt in asked:
                print(_document(prompt, TASKS[name].facts), file=file)


def language_model(loaded: LoadedModel, max_length: int) -> LM:
    """Return lm-eval's wrapper of a model in memory; ``RuntimeError`` if it has another batch size."""
    from lm_eval.models.huggingface import HFLM

    model, tokenizer, size = loaded
    lm = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=size, max_length=max_length)
    if lm.batch_size != size:
        raise RuntimeError(f"lm-eval batches by {lm.batch_size}, the record says {size}")
    return lm


def run_tasks(lm: LM, folder: Path, names: Sequence[str], limit: int | None) -> dict[str, list[Row]]:
    """Run tasks of ``folder`` on ``lm`` and return, by task name, lm-eval's record of each question.

    ``evaluate`` is the part of ``simple_evaluate`` that measures; the rest seeds the global random
    state and calls git.
    """
    from lm_eval import evaluate
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_path=str(folder), include_defaults=False)
    tasks = manager.load([f"alignmerge_{name}" for name in names])
    chat = {"apply_chat_template": True, "fewshot_as_multiturn": True}
    found = evaluate(lm, tasks, limit=limit, bootstrap_iters=0, log_samples=True, **chat)
    return {name: found["samples"][f"alignmerge_{name}"] for name in names}


def samples(answered: Mapping[str, Sequence[Row]]) -> list[Sample]:
    """Return the sample of each question out of lm-eval's records, by task name."""
    found = []
    for name, rows in answered.items():
        column, metric, _ = TASKS[name]
        for row in rows:
            seen = digest(row["arguments"][0][0])
            found.append(Sample(row["doc"]["id"], column, float(row[metric]), seen, _thought(row)))
    return found


def _thought(row: Row) -> dict[str, bool]:
    """Return what is recorded of a reply that began with a thought."""
    (said, *_), *_ = row["resps"]
    return {"thought": True} if isinstance(said, str) and without_thought(said) != said else {}


def _document(prompt: Prompt, facts: Sequence[str]) -> str:
    kept = {fact: prompt.facts[fact] for fact in facts}
    if "args" in kept:  # a table cannot hold arguments that differ from row to row, text can
        kept["args"] = json.dumps(kept["args"], ensure_ascii=False)
    return json.dumps({"id": prompt.id, "text": prompt.text, **kept}, ensure_ascii=False)


def _task_faults(tasks: object) -> Iterator[Fault]:
    known = tuple(TASKS)
    where, allowed = "scorer.utility.tasks", f"a list out of {', '.join(known)}, each at most once"
    if isinstance(tasks, str) or not isinstance(tasks, Sequence) or not tasks:
        yield Fault(where, repr(tasks), allowed)
        return
    for place, name in enumerate(tasks):
        if name not in known or name in list(tasks)[:place]:
            yield Fault(where, repr(name), allowed)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep lm-eval's progress bars and advice off the terminal; what it raises comes through."""
    log = logging.getLogger("lm_eval")
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        with contextlib.redirect_stderr(io.StringIO()):
            yield
    finally:
        log.setLevel(level)

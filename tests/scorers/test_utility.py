"""The lm-eval tasks on models whose answers are known, their checks by hand, lm-eval's own command line."""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
from lm_eval.api.model import LM

from alignmerge.engine.faults import BadRequest
from alignmerge.zoo.mmlu import mmlu_questions
from alignmerge.zoo.tasks import arithmetic, split_of
from eval.scorers import utility
from eval.scorers.interface import LoadedModel, Prompt, Sample
from eval.scorers.tasks import checks
from eval.scorers.utility import Utility, run_tasks, samples, write_tasks

CHOICES = ["red", "green", "blue", "none"]


# The checks.


@pytest.mark.parametrize(
    ("reply", "text", "right"),
    [
        ("ONE TWO", "ONE TWO", True),
        ("  ONE TWO\n", "ONE TWO", True),
        ("one TWO", "ONE TWO", False),
        ("ONE TWO.", "ONE TWO", False),
        ("", "ONE", False),
    ],
)
def test_equals(reply: str, text: str, right: bool) -> None:
    assert checks.equals(reply, text) is right


@pytest.mark.parametrize(
    ("reply", "value", "right"),
    [
        ('{"a": 1, "b": ["x"]}', {"b": ["x"], "a": 1}, True),
        ('Sure: {"a": {"b": 2}} as you asked {', {"a": {"b": 2}}, True),
        ('```json\n{"a": "}"}\n```', {"a": "}"}, True),
        ("list: [1, 2]", [1, 2], True),
        ("[2, 1]", [1, 2], False),
        ('{"a": "1"}', {"a": 1}, False),
        ('{"a": true}', {"a": 1}, False),
        ('{"a": 1, "c": 2}', {"a": 1}, False),
        ('{"a": 1', {"a": 1}, False),
        ("{'a': 1}", {"a": 1}, False),
        ("no braces", {"a": 1}, False),
    ],
)
def test_json_equals(reply: str, value: object, right: bool) -> None:
    assert checks.json_equals(reply, value) is right


@pytest.mark.parametrize(
    ("reply", "right"),
    [
        ("- kite\n- paper", True),
        ("\n- kite\n- paper\n", True),
        ("- paper\n- kite", False),
        ("* kite\n* paper", False),
        ("Here:\n- kite\n- paper", False),
        ("- kite\n- paper\n- string", False),
        ("- kite, paper", False),
        ("- Kite\n- paper", False),
    ],
)
def test_lines(reply: str, right: bool) -> None:
    assert checks.lines(reply, ["kite", "paper"]) is right


def test_results_are_marked_by_the_named_check() -> None:
    doc = {"check": "lines", "args": '{"items": ["kite"]}'}
    assert checks.process_results(doc, ["- kite"]) == {"acc": 1}
    assert checks.process_results(doc, ["kite"]) == {"acc": 0}


# The MMLU questions.

PROMPTS = {
    "colours": "About colours.\n\nQ: Which is warm?\n(A) red (B) blue (C) green (D) grey\n"
    "A: Let's think. (B) is cold. The answer is (A).\n\n"
    "Q: Statement 1 | x\nStatement 2 | y. Which (if any)?\n(A) a (b)\n(B) $\frac{1}{2}$\n(C) c\n c2\n(D) d\n"
    "A: So it is. The answer is (C).\n\n\n"
    "Q: Five?\n(A) 1 (B) 2 (C) 3 (D) 4 (E) 5\nA: The answer is (E).",
    "twice": "Twice.\n\nQ: Same?\n(A) 1 (B) 2 (C) 3 (D) 4\nA: The answer is (D).\n\n"
    "Q: Same?\n(A) 1 (B) 2 (C) 3 (D) 4\nA: The answer is (D).\n\n",
}


def test_mmlu_questions(tmp_path: Path) -> None:
    path = tmp_path / "cot.json"
    path.write_text(json.dumps(PROMPTS))
    second = {
        "question": "Statement 1 | x\nStatement 2 | y. Which (if any)?",
        "choices": ["a (b)", r"$\frac{1}{2}$", "c\n c2", "d"],
        "answer": 2,
        "subject": "colours",
    }
    first, *rest = mmlu_questions(path)
    assert first == {
        "question": "Which is warm?",
        "choices": ["red", "blue", "green", "grey"],
        "answer": 0,
        "subject": "colours",
    }
    assert rest == [second, {"question": "Same?", "choices": [*"1234"], "answer": 3, "subject": "twice"}]


@pytest.mark.parametrize(
    "broken", ["(A) 1 (B) 2 (C) 3\nA: The answer is (A).", "(A) 1 (B) 2 (C) 3 (D) 4\nA: No."]
)
def test_a_question_of_another_form_is_named(tmp_path: Path, broken: str) -> None:
    path = tmp_path / "cot.json"
    path.write_text(json.dumps({"odd": f"x\n\nQ: Why?\n{broken}"}))
    with pytest.raises(BadRequest, match="question of odd"):
        mmlu_questions(path)


def test_the_packaged_mmlu_questions() -> None:
    import lm_eval

    folder = Path(lm_eval.__file__).parent / "tasks/mmlu/flan_cot_fewshot"
    questions = mmlu_questions(folder / "_cot_prompts.json")
    assert len(questions) == 280
    assert len({q["subject"] for q in questions}) == 57
    assert all(len(q["choices"]) == 4 and all(q["choices"]) and q["question"] for q in questions)


# The tasks, on a language model that answers from a table.

GSM8K_END = "\nAnswer with the number only."
"""What the gsm8k task puts behind each question."""


class Table(LM):
    """Replies from a table by user text; of the letters it prefers the one in the table."""

    tokenizer_name = "table"

    def __init__(self, replies: Mapping[str, str]) -> None:
        super().__init__()
        self.replies = replies

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        (turn,) = chat_history
        assert turn["role"] == "user"
        return f"<{turn['content']}>"

    def generate_until(self, requests: Sequence[Any]) -> list[str]:
        return [self.replies[request.args[0][1:-1].removesuffix(GSM8K_END)] for request in requests]

    def loglikelihood(self, requests: Sequence[Any]) -> list[tuple[float, bool]]:
        scored = []
        for request in requests:
            context, letter = request.args
            question = context[1:-1].partition("\n")[0]
            scored.append((float(self.replies[question] == letter), False))
        return scored

    def loglikelihood_rolling(self, requests: Sequence[Any]) -> list[float]:
        raise AssertionError


def asked(name: str, *texts_and_facts: tuple[str, dict[str, Any]]) -> list[Prompt]:
    return [Prompt(f"{name}/{i}", text, facts) for i, (text, facts) in enumerate(texts_and_facts)]


def answer(folder: Path, prompts: Mapping[str, Sequence[Prompt]], replies: Mapping[str, str]) -> list[Sample]:
    write_tasks(folder, prompts)
    return samples(run_tasks(Table(replies), folder, list(prompts), None))


def test_each_task_fills_its_column_with_the_marks_known_by_hand(tmp_path: Path) -> None:
    prompts = {
        "format": asked(
            "format",
            ("shout hi", {"check": "equals", "args": {"text": "HI"}}),
            ("list", {"check": "lines", "args": {"items": ["a", "b"]}}),
            ("json", {"check": "json_equals", "args": {"value": {"k": [1, {"z": None}]}}}),
        ),
        "mmlu": asked(
            "mmlu",
            ("warm", {"choices": CHOICES, "answer": 0}),
            ("cold", {"choices": CHOICES, "answer": 2}),
        ),
        "arithmetic": asked("arithmetic", ("6 * 7", {"answer": "42"}), ("1 - 4", {"answer": "-3"})),
    }
    replies = {
        "shout hi": "hi",
        "list": "- a\n- b",
        "json": '{"k": [1, {"z": null}]}',
        "warm": "A",
        "cold": "B",
        "6 * 7": "6 * 7 = 42",
        "1 - 4": "3",
    }
    found = answer(tmp_path, prompts, replies)
    assert [(s.id, s.column, s.value) for s in found] == [
        ("format/0", "instruction_following", 0.0),
        ("format/1", "instruction_following", 1.0),
        ("format/2", "instruction_following", 1.0),
        ("mmlu/0", "mmlu", 1.0),
        ("mmlu/1", "mmlu", 0.0),
        ("arithmetic/0", "reasoning", 1.0),
        ("arithmetic/1", "reasoning", 0.0),
    ]
    warm = "<warm\nA. red\nB. green\nC. blue\nD. none\nAnswer:>"
    assert found[3].prompt == hashlib.sha256(warm.encode()).hexdigest()[:16]
    assert found[0].prompt == hashlib.sha256(b"<shout hi>").hexdigest()[:16]


@pytest.mark.parametrize(
    ("reply", "answer_text", "right"),
    [
        ("The answer is 18.", "18", True),
        ("3 apples and 15 more make 18 apples, 18", "18", True),
        ("she earns $1,234.00 in all", "1234", True),
        ("1234", "1,234", True),
        ("So it is -7", "-7", True),
        ("0.5", "0.5", True),
        ("18 of 20", "18", False),
        ("180", "18", False),
        ("1.8", "18", False),
        ("none...", "18", False),
        ("", "18", False),
    ],
)
@pytest.mark.parametrize("task", ["arithmetic", "gsm8k"])
def test_the_last_number_counts(tmp_path: Path, task: str, reply: str, answer_text: str, right: bool) -> None:
    prompts = {task: asked(task, ("how many", {"answer": answer_text}))}
    (sample,) = answer(tmp_path, prompts, {"how many": reply})
    assert sample.value == float(right)


def test_a_moved_folder_still_finds_its_data(tmp_path: Path) -> None:
    write_tasks(tmp_path / "here", {"arithmetic": asked("arithmetic", ("6 * 7", {"answer": "42"}))})
    shutil.move(tmp_path / "here", tmp_path / "there")
    rows = run_tasks(Table({"6 * 7": "42"}), tmp_path / "there", ["arithmetic"], None)
    assert [sample.value for sample in samples(rows)] == [1.0]


def test_text_reaches_the_model_as_it_is(tmp_path: Path) -> None:
    text = "say {{ this }} {% raw %} “ü” \u2028 end"
    (sample,) = answer(tmp_path, {"gsm8k": asked("gsm8k", (text, {"answer": "1"}))}, {text: "1"})
    assert sample.prompt == hashlib.sha256(f"<{text}{GSM8K_END}>".encode()).hexdigest()[:16]


# The scorer, on a real lm-eval wrapper of a model that always says 42.

TEMPLATE = (
    "{% for m in messages %}user\n{{ m['content'] }} <eos>\n{% endfor %}"
    "{% if add_generation_prompt %}assistant\n{% endif %}"
)
WORDS = (
    "42",
    "<pad>",
    "<eos>",
    "<unk>",
    "A",
    "B",
    "C",
    "D",
    "Answer:",
    "user",
    "assistant",
    "what",
    "is",
    "it",
)


def always_42() -> tuple[Any, Any]:
    """All logits are equal, so the first token of the vocabulary wins; so does the first of tied letters."""
    import torch
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import WhitespaceSplit
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    raw = Tokenizer(WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    raw.pre_tokenizer = WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=raw, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>", chat_template=TEMPLATE
    )
    config = LlamaConfig(
        vocab_size=len(WORDS),
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=512,
        bos_token_id=None,
        eos_token_id=2,
        pad_token_id=1,
    )
    model = LlamaForCausalLM(config).eval()
    with torch.no_grad():
        model.lm_head.weight.zero_()
    return model, tokenizer


SETS = {
    "format": asked(
        "format",
        ("what is", {"check": "equals", "args": {"text": " ".join(["42"] * 40)}}),
        ("what is it", {"check": "equals", "args": {"text": "42"}}),
        ("is it", {"check": "lines", "args": {"items": ["42"]}}),
    ),
    "arithmetic": asked("arithmetic", ("what is it", {"answer": "42"}), ("is it", {"answer": "41"})),
    "gsm8k": asked("gsm8k", *((f"what {'is ' * n}", {"answer": a}) for n, a in enumerate(("42", "42", "2")))),
    "mmlu": asked("mmlu", *((f"it {n}", {"choices": CHOICES, "answer": n}) for n in range(4))),
}
EXPECTED = {
    "instruction_following": [1.0, 0.0, 0.0],
    "reasoning": [1.0, 0.0],
    "gsm8k": [1.0, 1.0, 0.0],
    "mmlu": [1.0, 0.0, 0.0, 0.0],
}


class Always42:
    """A subject whose every answer is known."""

    folder = Path()
    split = "test"

    def __init__(self, sets: Mapping[str, Sequence[Prompt]] = SETS) -> None:
        self.sets = sets
        self.made = LoadedModel(*always_42(), batch_size=2)

    def loaded(self) -> LoadedModel:
        return self.made

    def prompts(self, name: str) -> Sequence[Prompt]:
        return self.sets[name]

    def rendered(self, name: str) -> Sequence[str]:
        end = GSM8K_END if name == "gsm8k" else ""
        chats = [[{"role": "user", "content": prompt.text + end}] for prompt in self.sets[name]]
        return self.made.tokenizer.apply_chat_template(chats, tokenize=False, add_generation_prompt=True)

    def replies(self, name: str) -> Sequence[str]:
        raise AssertionError(name)

    def asset(self, reference: str) -> Path:
        raise AssertionError(reference)


def by_column(found: Sequence[Sample]) -> dict[str, list[float]]:
    return {
        column: [s.value for s in found if s.column == column]
        for column in dict.fromkeys(s.column for s in found)
    }


def test_the_scorer_gives_the_marks_known_by_hand_and_prints_and_logs_nothing(
    capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    subject, log = Always42(), logging.getLogger("lm_eval")
    before, level = subject.made.tokenizer.padding_side, log.level
    found = list(Utility().score(subject))
    assert by_column(found) == EXPECTED
    assert set(Utility.columns) == {*EXPECTED, "knowledge", "factual", "helpfulness"}
    assert [s.id for s in found if s.column == "gsm8k"] == [prompt.id for prompt in SETS["gsm8k"]]
    for name, column in (("format", "instruction_following"), ("gsm8k", "gsm8k")):
        hashes = [hashlib.sha256(text.encode()).hexdigest()[:16] for text in subject.rendered(name)]
        assert [s.prompt for s in found if s.column == column] == hashes
    assert (subject.made.tokenizer.padding_side, log.level) == (before, level)
    captured = capfd.readouterr()
    assert captured.out + captured.err == ""
    assert caplog.records == []


def test_the_global_random_state_is_left_alone() -> None:
    import torch

    subject = Always42()
    before = torch.get_rng_state()
    list(Utility(tasks=["arithmetic"]).score(subject))
    assert torch.get_rng_state().equal(before)


def test_tasks_and_limit_choose() -> None:
    found = list(Utility(tasks=["mmlu", "arithmetic"], limit=1).score(Always42()))
    assert [(s.id, s.value) for s in found] == [("mmlu/0", 1.0), ("arithmetic/0", 1.0)]


def test_the_batch_size_is_that_of_the_loaded_model(monkeypatch: pytest.MonkeyPatch) -> None:
    from lm_eval.models.huggingface import HFLM

    loaded = Always42().made
    assert utility.language_model(loaded, 512).batch_size == 2
    seen: list[int] = []
    generate = loaded.model.generate
    monkeypatch.setattr(
        loaded.model, "generate", lambda **kw: seen.append(len(kw["input_ids"])) or generate(**kw)
    )
    subject = Always42()
    subject.made = loaded
    list(Utility(tasks=["gsm8k"], batch_sizes={}).score(subject))
    assert seen == [2, 1]
    monkeypatch.setattr(HFLM, "batch_size", 5)
    with pytest.raises(RuntimeError, match="batches by 5, the record says 2"):
        utility.language_model(loaded, 512)


@pytest.mark.parametrize(("words", "fits"), [(104, True), (105, False)])
def test_a_prompt_that_would_be_cut_is_refused(words: int, fits: bool) -> None:
    # user + words + five of the task + <eos> + assistant, and 16 tokens of reply: 128 or 129
    subject = Always42({"gsm8k": asked("gsm8k", ("it " * words, {"answer": "42"}))})
    limit = contextlib.nullcontext() if fits else pytest.raises(BadRequest, match="a prompt of gsm8k")
    with limit:
        assert [s.value for s in Utility(tasks=["gsm8k"], max_length=128).score(subject)] == [1.0]


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("tasks", []),
        ("tasks", "mmlu"),
        ("tasks", 3),
        ("tasks", ["hellaswag"]),
        ("tasks", ["mmlu", "mmlu"]),
        ("tasks", [["mmlu"]]),
        ("limit", 0),
        ("limit", 0.5),
        ("limit", True),
        ("limit", "ten"),
        ("max_length", 100),
        ("max_length", float("nan")),
        ("max_length", None),
    ],
)
def test_wrong_fields_are_named(key: str, value: object) -> None:
    fields: dict[str, Any] = {key: value}
    with pytest.raises(BadRequest) as caught:
        Utility(**fields)
    assert [fault.where for fault in caught.value.faults] == [f"scorer.utility.{key}"]


@pytest.mark.slow
def test_lm_evals_own_command_line_gives_the_same_numbers(tmp_path: Path) -> None:
    model, tokenizer = always_42()
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    write_tasks(tmp_path / "tasks", SETS)
    words = (
        f"--model hf --model_args pretrained={tmp_path}/model,dtype=float32,max_length=1024 --device cpu "
        f"--batch_size 2 --apply_chat_template --include_path {tmp_path}/tasks --output_path {tmp_path}/out "
        f"--tasks {','.join(f'alignmerge_{name}' for name in SETS)}"
    )
    subprocess.run(
        [sys.executable, "-m", "lm_eval", "run", *words.split()],
        check=True,
        capture_output=True,
        cwd=tmp_path,
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
    )
    (written,) = (tmp_path / "out").rglob("results_*.json")
    results = json.loads(written.read_text())["results"]
    for name, task in ((name, utility.TASKS[name]) for name in SETS):
        (value,) = (v for k, v in results[f"alignmerge_{name}"].items() if k.startswith(f"{task.metric},"))
        assert value == pytest.approx(sum(EXPECTED[task.column]) / len(EXPECTED[task.column]))


def test_tasks_are_batched_as_asked_and_otherwise_as_the_family_says() -> None:
    scorer = Utility(tasks=["format", "arithmetic", "mmlu"], batch_sizes={"mmlu": 8})
    assert scorer._batches(128) == {128: ["format", "arithmetic"], 8: ["mmlu"]}


def test_a_wrong_batch_size_is_named() -> None:
    with pytest.raises(BadRequest) as caught:
        Utility(batch_sizes={"mmlu": 0, "chess": 4})
    assert [fault.where for fault in caught.value.faults] == [
        "scorer.utility.batch_sizes.mmlu", "scorer.utility.batch_sizes",
    ]  # fmt: skip


def test_no_operands_are_in_two_splits_in_either_order() -> None:
    for split in ("train", "dev", "test"):
        for record in arithmetic(split, 200, 1):
            numbers = sorted(map(int, re.findall(r"\d+", record["text"])))
            ops = [op for op, answer in _answers(*numbers).items() if str(answer) == record["answer"]]
            assert any(split_of(op, *numbers) == split for op in ops)


def _answers(low: int, high: int) -> dict[str, int]:
    return {"+": low + high, "-": high - low, "x": low * high}

"""What the command line says of given models before numbers are made of them, and the chat template that it sets."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import yaml
from test_cli import call
from transformers import AutoTokenizer

from alignmerge.engine.language import load_tokenizer
from alignmerge.engine.vocabulary import PROBES
from tests.conftest import TEMPLATE, MakesModel, Perturbs

SHORT = ["scorer=[utility]", "scorer.utility.tasks=[arithmetic]", "scorer.utility.limit=2", "corpus=toy"]
OTHER = "{% for m in messages %}{{ 'answer, \"briefly\" :' + m['content'] + '\\n' }}{% endfor %}{{ bos_token }}"
READ = (
    f"AutoTokenizer reads {PROBES[0]!r} as other ids than tokenizer.json says; it is read here as it is written"
)


@pytest.fixture
def desk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("ALIGNMERGE_STORE", str(tmp_path / "store"))
    return tmp_path


def family_of(base: Path, perturbed: Perturbs) -> list[str]:
    anchor, math = perturbed(base, 1), perturbed(base, 2)
    given = {"base": base, "anchor": anchor, "experts.math": math}
    return [
        "family=local",
        "family.dtype=float32",
        *(f"family.{key}={folder}" for key, folder in given.items()),
    ]


def of_expert(family: list[str]) -> Path:
    return Path(family[-1].partition("=")[2])


def notes(said: str) -> list[str]:
    return [line for line in said.splitlines() if line.startswith("note: ")]


def test_a_tokenizer_that_auto_tokenizer_reads_otherwise_is_told_before_the_score(
    tiny_model: MakesModel, desk: Path
) -> None:
    folder = tiny_model("qwen2")
    result = call("mode=score", f"model={folder}", "out=scores.json", "family=local", "family.base=x",
                  "family.anchor=x", "family.experts.math=x", *SHORT)  # fmt: skip
    assert result.code == 0, result.err
    assert result.out.startswith(f"note: model: tokenizer of {folder}: {READ}") and len(notes(result.out)) == 1
    llama = call("mode=score", f"model={tiny_model('llama')}", "out=llama.json", *SHORT)
    assert (llama.code, notes(llama.out)) == (0, [])


def test_the_same_is_told_once_before_a_grid(
    tiny_model: MakesModel, perturbed: Perturbs, desk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("eval.grid.workers.Workers.run", lambda *_: [])
    base = tiny_model("qwen2")
    result = call(*family_of(base, perturbed), "method=average")
    assert result.code == 0, result.err
    assert [note.partition(", and lm-eval's")[0] for note in notes(result.out)] == [
        f"note: family.base: tokenizer of {base}: {READ}"
    ]


def test_settings_that_may_differ_and_do_are_told_in_plan_and_merge(
    tiny_model: MakesModel, perturbed: Perturbs, desk: Path
) -> None:
    family = family_of(tiny_model("llama"), perturbed)
    path = of_expert(family) / "config.json"
    config = json.loads(path.read_text())
    config["rms_norm_eps"] = 0.25
    path.write_text(json.dumps(config))
    allowed = "family.allow_config_differences=[rms_norm_eps]"
    usual = json.loads((tiny_model("llama") / "config.json").read_text())["rms_norm_eps"]
    line = "family.experts.math: rms_norm_eps is 0.25; the merge has the base's, "
    line += f"{usual} (family.allow_config_differences)"
    planned = call("mode=plan", *family, allowed, "method=average")
    assert planned.code == 0 and f"\n  {line}\n" in planned.out
    made = call("mode=merge", *family, allowed, "method=average", "out=merged")
    assert made.code == 0 and notes(made.out) == [f"note: {line}"]
    config["rms_norm_eps"] = usual
    path.write_text(json.dumps(config))
    again = call("mode=merge", *family, allowed, "method=average", "out=again")
    assert (again.code, notes(again.out)) == (0, [])


def test_a_template_is_taken_as_it_is_typed() -> None:
    for template in (OTHER, "{{ messages[0]['content'] }}", "{a}", "it's, so: [x]", "null"):
        composed = yaml.safe_load(call("--cfg", "job", "family=local", f"family.chat_template={template}").out)
        assert composed["family"]["chat_template"] == (None if template == "null" else template)


def test_a_folder_that_is_scored_by_itself_keeps_its_template() -> None:
    """The settings are those of smollm2, whose chat template is not that of the folder."""
    alone = yaml.safe_load(call("--cfg", "job", "mode=score").out)["family"]
    named = yaml.safe_load(call("--cfg", "job", "mode=score", "family=smollm2").out)["family"]
    assert alone == {**named, "chat_template": None} != named
    given = yaml.safe_load(call("--cfg", "job", "mode=score", f"family.chat_template={OTHER}").out)["family"]
    assert given["chat_template"] == OTHER


def test_the_template_of_the_command_line_speaks_and_travels_along(
    tiny_model: MakesModel, perturbed: Perturbs, desk: Path
) -> None:
    base = desk / "base"
    shutil.copytree(tiny_model("llama"), base)
    (base / "additional_chat_templates").mkdir()
    (base / "additional_chat_templates/rag.jinja").write_text("{{ documents }}")
    template = f"family.chat_template={OTHER}"
    made = call("mode=merge", *family_of(base, perturbed), template, "method=average", "out=merged")
    assert made.code == 0, made.err
    expected = {"default": OTHER, "rag": "{{ documents }}"}
    assert AutoTokenizer.from_pretrained(desk / "merged").chat_template == expected
    assert load_tokenizer(base).chat_template == {**expected, "default": TEMPLATE}
    asked = []
    for model, more in ((base, [template]), (desk / "merged", []), (base, [])):
        out = f"scores-{len(asked)}.json"
        result = call("mode=score", f"model={model}", f"out={out}", *SHORT, *more)
        assert result.code == 0, result.err
        told = [f"note: family.chat_template stands in for the template of {model}"] if more else []
        assert notes(result.out) == told
        asked.append(_prompts_seen(desk / "store"))
    assert asked[0] != asked[2] and asked[0] == asked[1]


def _prompts_seen(store: Path) -> list[str]:
    """Return the digests of the prompts of the newest score: one for each text that the model saw."""
    import pandas as pd

    newest = max((store / "scores").glob("*/samples.parquet"), key=lambda path: path.stat().st_mtime_ns)
    return list(pd.read_parquet(newest)["prompt"])


def test_a_folder_without_a_template_is_scored_with_the_familys(tiny_model: MakesModel, desk: Path) -> None:
    folder = desk / "model"
    shutil.copytree(tiny_model("llama"), folder)
    (folder / "chat_template.jinja").unlink()
    request = ["mode=score", f"model={folder}", "out=scores.json", *SHORT]
    refused = call(*request)
    assert refused.code == 2 and refused.err.startswith("error: family.chat_template: ")
    assert call(*request, f"family.chat_template={OTHER}").code == 0

"""CONTRIBUTING.md is executed: its files are written as they stand there, into a copy of the project, and run."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest

from alignmerge.engine.manifest import ROOT
from eval.report.ledger import PAPER
from tests.conftest import MakesModel, Perturbs

BLOCK = re.compile(r"`(?P<path>[\w/.]+)`:\n\n```\w+\n(?P<text>.*?)^```$", re.M | re.S)
FILES = {found["path"]: found["text"] for found in BLOCK.finditer((ROOT / "CONTRIBUTING.md").read_text())}
OURS = ("baselines/dare.py", "conf/method/dare.yaml")
"""What the worked example leaves in the project."""


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the project with the files of CONTRIBUTING.md."""
    folder = tmp_path_factory.mktemp("project")
    for room in ("alignmerge", "baselines", "eval", "conf"):
        shutil.copytree(ROOT / room, folder / room, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copyfile(ROOT / "run.py", folder / "run.py")
    (folder / "results/reference").mkdir(parents=True)
    shutil.copyfile(PAPER, folder / PAPER.relative_to(ROOT))
    for path, text in FILES.items():
        (folder / path).write_text(text)
    return folder


def launch(project: Path, *overrides: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "ALIGNMERGE_STORE": str(project / "store"), "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, "run.py", *overrides], cwd=project, env=environment, capture_output=True, text=True,
        timeout=600, check=False,
    )  # fmt: skip


def test_the_examples_are_two_files_two_files_and_one() -> None:
    assert list(FILES) == [*OURS, "eval/scorers/words.py", "conf/scorer/words.yaml", "conf/family/mine.yaml"]
    for path in OURS:
        assert (ROOT / path).read_text() == FILES[path]


def test_the_method_and_the_scorer_show_up_in_every_table(project: Path) -> None:
    said = launch(
        project, "family=smoke", "corpus=toy", "method=dare", "method.weights=validation", "scorer=[words]", "workers=1"
    )  # fmt: skip
    assert said.returncode == 0, said.stderr
    (folder,) = set((project / "results").iterdir()) - {project / "results/reference"}
    assert folder.name.startswith("cell-smoke-dare-weights=validation-")
    summary = pd.read_csv(folder / "summary.csv")
    assert {"dare", "base", "anchor"} <= set(summary["row"]) and set(summary["column"]) == {"words"}
    assert "words" in said.stdout
    for name in ("table.md", "table.tex", "report.html"):
        text = (folder / name).read_text()
        assert "Words" in text and "replies" in text.lower(), name
    manifest = json.loads((folder / "manifest.json").read_text())
    row = manifest["families"]["smoke"]["seed 0"]["rows"]["dare"]
    assert sum(row["facts"]["weights"].values()) == pytest.approx(1)


def test_an_undeclared_input_is_one_line_and_a_traceback_in_a_file(project: Path) -> None:
    path = project / "baselines" / "dare.py"
    text = path.read_text()
    path.write_text(text.replace("Inputs(seed=True, ", "Inputs("))
    try:
        said = launch(
            project, "mode=merge", "family=smoke", "corpus=toy", "method=dare", f"out={project / 'merged'}"
        )  # fmt: skip
    finally:
        path.write_text(text)
    assert said.returncode == 1 and not (project / "merged").exists()
    (line,) = (line for line in said.stderr.splitlines() if line.startswith("failed: "))
    given = "'dare' reads the seed without declaring it: add seed=True to its inputs"
    assert line.startswith(f"failed: {given} (traceback: ")
    assert "Undeclared" in Path(line.rpartition("traceback: ")[2].rstrip(")")).read_text()
    assert "Traceback" not in said.stderr


def test_the_family_is_planned_and_merged(project: Path, tiny_model: MakesModel, perturbed: Perturbs) -> None:
    shutil.copytree(tiny_model("llama"), project / "models" / "base")
    for seed, name in enumerate(("anchor", "math"), 1):
        shutil.copytree(perturbed(tiny_model("llama"), seed), project / "models" / name)
    planned = launch(project, "mode=plan", "family=mine", "corpus=toy", "method=average")
    assert planned.returncode == 0, planned.stderr
    assert "3 of 3 models are here and agree" in planned.stdout
    done = launch(project, "mode=merge", "family=mine", "corpus=toy", "method=average", "out=merged")
    assert done.returncode == 0, done.stderr
    assert (project / "merged" / "model.safetensors").is_file()

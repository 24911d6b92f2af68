"""The command line: one plain line for each fault and nothing written; merges that transformers loads."""

from __future__ import annotations

import contextlib
import importlib.util
import io
import json
import math
import os
import re
import shlex
import signal
import struct
import subprocess
import sys
from collections.abc import Callable, Sequence
from importlib import metadata
from pathlib import Path
from types import ModuleType, TracebackType
from typing import Any, NamedTuple

import pytest
import torch
import yaml
from conftest import SENTENCES, MakesModel, Perturbs
from hydra.core.global_hydra import GlobalHydra
from safetensors.torch import load_file, save_file

from alignmerge.engine.checkpoint import SINGLE, Checkpoint
from alignmerge.engine.configuration import choices
from alignmerge.engine.manifest import ROOT
from eval.grid.overrides import with_corpus
from eval.grid.quoting import for_the_shell, with_paths

METHODS = sorted(path.stem for path in (ROOT / "conf" / "method").glob("*.yaml"))
EXPERIMENTS = ", ".join(sorted(choices(ROOT / "conf" / "experiment")))
KEYS = "corpus, family, grid, method, mode, model, out, results, scorer, seed, store, workers"
TIES = "anchor_share, density, scale, variant"
COUNT = "a whole number of at least"
NONE_YET = "a path that does not exist yet"
TARGETS = "a dataclass of alignmerge, baselines, eval"
SCORERS = "aqi, geometry, judge, subspaces, toxicity, utility"
MODES = "run? merge, plan, report, run, score, status"
PLAN = "mode=plan"
ELLIPSIS = "…"
"""Ends an expected line of which only the beginning is compared."""


Copies = Callable[[Path], Path]
"""The fixture ``copied``."""


class Result(NamedTuple):
    code: int
    out: str
    err: str

    @property
    def errors(self) -> list[str]:
        """The lines of stderr, every one of which must be a plain error line."""
        lines = self.err.splitlines()
        assert all(line.startswith("error: ") for line in lines), self.err
        return [line.removeprefix("error: ") for line in lines]


def _entry() -> ModuleType:
    """Import ``run.py``, which stands in no package."""
    if "run" not in sys.modules:
        spec = importlib.util.spec_from_file_location("run", ROOT / "run.py")
        assert spec is not None and spec.loader is not None
        sys.modules["run"] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules["run"])
    return sys.modules["run"]


def call(*overrides: str) -> Result:
    """Run the command line in this process."""
    out, err, before = io.StringIO(), io.StringIO(), sys.argv
    GlobalHydra.instance().clear()
    sys.argv = ["run.py", *overrides]
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            code = _entry().main()
    except SystemExit as stop:
        code = int(stop.code or 0)
    finally:
        sys.argv = before
        GlobalHydra.instance().clear()
    return Result(code, out.getvalue(), err.getvalue())


def start(*overrides: str, folder: Path) -> subprocess.Popen[str]:
    """Start the command line in a process group of its own, as a user does, from another folder."""
    return subprocess.Popen(
        [sys.executable, str(ROOT / "run.py"), *overrides], cwd=folder, start_new_session=True, text=True,
        env={**os.environ, "ALIGNMERGE_STORE": str(folder / "store"), "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip


def launch(*overrides: str, folder: Path, seconds: float = 600) -> Result:
    """Run the command line to its end."""
    process = start(*overrides, folder=folder)
    try:
        out, err = process.communicate(timeout=seconds)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    return Result(process.returncode, out, err)


def tree(folder: Path) -> dict[str, bytes]:
    return {
        str(p.relative_to(folder)): p.read_bytes() if p.is_file() else b"" for p in sorted(folder.rglob("*"))
    }


@pytest.fixture
def desk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Work in an empty folder with a store that does not exist yet."""
    folder = tmp_path / "desk"
    folder.mkdir()
    monkeypatch.chdir(folder)
    monkeypatch.setenv("ALIGNMERGE_STORE", str(folder / "store"))
    return folder


class NoBoard:
    """Stands in for the progress board, whose process takes seconds to start."""

    def __enter__(self) -> NoBoard:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Hide nothing."""

    def reporter(self, label: str) -> Callable[[int, int], None]:
        """Report to nobody."""
        return lambda done, total: None


@pytest.fixture
def no_board(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("eval.grid.modes.Board", NoBoard)


@pytest.fixture(autouse=True)
def _no_worker(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing here may start a grid: a wrong request that is let through must not train models for minutes."""
    monkeypatch.setattr("eval.grid.workers.Workers.run", lambda *_: pytest.fail("a grid was started"))


# --- wrong requests ------------------------------------------------------------------------------------------------

LOCAL = (
    "family=local",
    "family.base=/nowhere/a",
    "family.anchor=/nowhere/b",
    "family.experts={math: /nowhere/c}",
)
FORMS = "hub:org/name@revision, pypi:package==version/path or local:folder"
SAMPLES: list[tuple[Sequence[str], Sequence[str]]] = [
    (["foo=1"], [f"foo: unknown key; allowed: {KEYS}"]),
    (["sede=1"], [f"sede: unknown key; allowed: seed? {KEYS}"]),
    (["foo=1", "method=ties", "bar=2"], [f"foo: unknown key; allowed: {KEYS}", f"bar: unknown key; allowed: {KEYS}"]),
    (["method=tiez"], [f"method: no such choice: tiez; allowed: ties? {', '.join(METHODS)}"]),
    (["method=tiez", "method.density=3", "foo=1"],
     [f"method: no such choice: tiez; allowed: ties? {', '.join(METHODS)}", f"foo: unknown key; allowed: {KEYS}"]),
    (["experiment=smokk", "grid.title=x"], [f"experiment: no such choice: smokk; allowed: smoke? {EXPERIMENTS}"]),
    (["+experiment=nope"], [f"experiment: no such choice: nope; allowed: {EXPERIMENTS}"]),
    (["scorer=[judge,nope]"], [f"scorer: no such choice: nope; allowed: {SCORERS}"]),
    (["scorer=nope"], [f"scorer: no such choice: nope; allowed: {SCORERS}"]),
    (["scorer=[]", PLAN], ["scorer: none; allowed: one or more files of conf/scorer, e.g. scorer=[aqi,judge]"]),
    (["mode=plam"], ["mode: plam; allowed: plan? merge, plan, reference, report, run, score, status, verify"]),
    (["method=ties", "method.density=abc", PLAN], ["method.density: 'abc' (str); allowed: float"]),
    (["method=ties", "method.density=nan", PLAN], ["method.density: nan; allowed: a number in (0, 1]"]),
    (["method=ties", "method.density=inf", PLAN], ["method.density: inf; allowed: a number in (0, 1]"]),
    (["method=ties", "method.density=true", PLAN], ["method.density: True (bool); allowed: float"]),
    (["method=ties", "method.density=null", PLAN], ["method.density: None (NoneType); allowed: float"]),
    (["method=ties", "method.density={a: 1}", PLAN], ["method.density: a mapping: {'a': 1}; allowed: float"]),
    (["method=ties", "method.scale=10.5", PLAN], ["method.scale: 10.5; allowed: a number in [0, 10]"]),
    (["method=ties", "method.variant=local", PLAN],
     ["method.variant: 'local' (str); allowed: Literal['global', 'per_tensor']"]),
    (["method=ties", "+method.foo=1", PLAN], [f"method.foo: unknown key; allowed: {TIES}"]),
    (["method=ties", "method.densty=1", PLAN], [f"method.densty: unknown key; allowed: density? {TIES}"]),
    (["method=average", "+method.t=1", PLAN], ["method.t: unknown key; allowed: no key"]),
    (["method=alignmerge", "method.lambda_bud=-1", PLAN],
     ["method.lambda_bud: -1.0; allowed: a number in [0, 1e+12]"]),
    (["method=ties", "method.density=2", "scorer.judge.batch_size=0", "seed=-1", PLAN],
     [f"seed: -1; allowed: {COUNT} 0", "method.density: 2.0; allowed: a number in (0, 1]",
      f"scorer.judge.batch_size: 0; allowed: {COUNT} 1"]),
    (["method=ties", "method.density=2", "scorer.judge.batch_size=0", PLAN],
     ["method.density: 2.0; allowed: a number in (0, 1]", f"scorer.judge.batch_size: 0; allowed: {COUNT} 1"]),
    (["method._target_=os.system", PLAN], [f"method._target_: os.system; allowed: {TARGETS}"]),
    (["method._target_=alignmerge.engine.store.shutil", PLAN],
     ["method._target_: alignmerge.engine.store.shutil is not such a class; allowed: alignmerge.engine.merger.Merger"]),
    (["method._target_=eval.scorers.aqi.AQI", PLAN],
     ["method._target_: eval.scorers.aqi.AQI is not such a class; allowed: alignmerge.engine.merger.Merger"]),
    (["+family._target_=builtins.eval", "corpus._target_=torch.load", PLAN],
     [f"family._target_: builtins.eval; allowed: {TARGETS}", f"corpus._target_: torch.load; allowed: {TARGETS}"]),
    (["scorer.judge=3", PLAN], ["scorer.judge: 3 (int); allowed: a mapping with the key _target_"]),
    (["workers=0", "seed=abc"],
     [f"seed: 'abc'; allowed: {COUNT} 0", f"workers: 0; allowed: {COUNT} 1"]),
    (["seed=1.5", "workers=two"],
     [f"seed: 1.5; allowed: {COUNT} 0", f"workers: 'two'; allowed: {COUNT} 1"]),
    (["seed=true"], [f"seed: True; allowed: {COUNT} 0"]),
    (["store=null"], ["store: None; allowed: a path"]),
    (["mode=plan", "store=${nope}"], ["store: Interpolation key 'nope' not found…"]),
    (["~method", "~workers", PLAN],
     ["workers: deleted; allowed: a value", f"method._target_: None; allowed: {TARGETS}"]),
    (["merg"], ["merg: not understood; allowed: mode=merge"]),
    (["method"], ["method: not understood; allowed: key=value, with quotes around a value that holds any of ,:[]{}()"]),
    (["scorer=[aqi,judge", "foo=1"],
     ["scorer=[aqi,judge: not understood; allowed: key=value, with quotes around a value that holds any of ,:[]{}()",
      f"foo: unknown key; allowed: {KEYS}"]),
    (["family=local,smoke"], ["family: local,smoke; allowed: one value; [a,b] for a list; with -m, a sweep over a,b"]),
    (["grid.name=x"], ["grid.name: there is no grid; allowed: an experiment beside it, e.g. experiment=tiny"]),
    *[([PLAN, "family=local", f"family.experts.{alias}=/x"],
       [f"family.experts.{alias}: not an alias; allowed: letters, digits and _ - . (a letter or digit first)"])
      for alias in ("a/b", "a@b", "a b", "")],
    (["+foo=1"], [f"foo: unknown key; allowed: {KEYS}"]),
    (["corpus.seed={a"], ["corpus.seed={a: not understood; allowed: key=value, with quotes around a value that…"]),
    (["family.note=a b=c's"], ["family.note=a b=c's: not understood; allowed: 'family.note=\"a b=c'\"'\"'s\"'"]),
    (["method=\udcff"], ["method=\\udcff: not understood; allowed: key=value, with quotes…"]),
    (["=", PLAN], ["=: not understood; allowed: key=value, with quotes…"]),
    (["method=null"], ["method: Config group override must be a string or a list. Got NoneType; allowed: what…"]),
    (["-m", "method=ties,"], ["method=ties,: not understood; allowed: 'method=\"ties,\"'"]),
    (["hydra.run.dir=/proc/x", PLAN], ["/proc/x: No such file or directory; allowed: a place that can be read…"]),
    ([f"store={__file__}", f"results={__file__}/x", PLAN],
     [f"store: {__file__} is a file; allowed: a folder, which may be new",
      f"results: {__file__} is a file; allowed: a folder, which may be new"]),
    (["-m", "method=ties,nope", PLAN], ["method: no such choice: nope…"]),
    (["-m", "method=ties,average", "method.density=2", PLAN], ["method.density: unknown key…"]),
    (["family=local", PLAN],
     ["family.base: None (NoneType); allowed: str", "family.anchor: None (NoneType); allowed: str",
      "family.experts: None (NoneType); allowed: Mapping[str, str]"]),
    (["mode=merge", "method=ties", "out=there", *LOCAL],
     [f"family.{key}: no such file or folder: /nowhere/{name}; allowed: {FORMS}"
      for key, name in (("base", "a"), ("anchor", "b"), ("experts.math", "c"))]),
    ([PLAN, "method=ties", *LOCAL],
     [f"family.{key}: no such file or folder: /nowhere/{name}; …"
      for key, name in (("base", "a"), ("anchor", "b"), ("experts.math", "c"))]),
    (["mode=merge", "method=ties", "method.density=0", *LOCAL],
     ["method.density: 0.0; allowed: a number in (0, 1]"]),
    (["mode=merge", "method=ties", *LOCAL], [f"out: not given; allowed: {NONE_YET}"]),
    (["mode=merge", "out=.", *LOCAL], [f"out: . exists; allowed: {NONE_YET}"]),
    (["mode=score", "scorer=[aqi]"],
     ["model: not given; allowed: a Hugging Face model folder", f"out: not given; allowed: {NONE_YET}"]),
    (["mode=score", "model=/nowhere", "out=."], ["model: no such folder: /nowhere…", "out: . exists…"]),
    (["mode=score", "scorer.aqi.replicates=abc"], ["scorer.aqi.replicates: 'abc' (str); allowed: int"]),
    (["mode=merge", "scorer.aqi.replicates=abc"], ["scorer.aqi.replicates: 'abc' (str); allowed: int"]),
    (["mode=report", "family=smoke", "corpus=toy"],
     ["mode: report, and the store holds no finished experiment; allowed: mode=run first"]),
    (["family=smollm2", "family.experts.arithmetic=zoo:nope", PLAN],
     ["family.experts.arithmetic: no recipe 'zoo:nope'; allowed: family.recipes: base, anchor, arithmetic, "
      "format, knowledge"]),
    (["corpus.seed=x", "family.threads=0", PLAN],
     [f"family.threads: 0; allowed: {COUNT} 1", "corpus.seed: 'x' (str); allowed: int"]),
    (["experiment=smoke", PLAN, "grid.rows.ties.method=tiez", "+grid.rows.average.fixed.q=1", "grid.against=[nobody]"],
     ["grid.against: nobody; allowed: a row: …"]),
    (["experiment=smoke", PLAN, "+grid.dev_scorers={judg: {}, aqi: {layer: 1}}", "+grid.rows.ties.mached=true"],
     [f"grid.dev_scorers.judg: no such choice; allowed: judge? {SCORERS}",
      "grid.dev_scorers.aqi.layer: unknown key; allowed: layers? layers, replicates",
      "grid.rows.ties.mached: unknown key; allowed: matched? best_of, fixed, like, matched, method, settings, swept"]),
    (["experiment=smoke", PLAN, "grid.rows.ties.method=tiez", "+grid.rows.average.fixed={q: 1}"],
     ["grid.rows.average.q: unknown key; allowed: no key",
      f"grid.rows.ties.method: tiez; allowed: {', '.join(METHODS)}"]),
]  # fmt: skip


@pytest.mark.parametrize(("overrides", "lines"), SAMPLES, ids=[" ".join(given)[:60] for given, _ in SAMPLES])
def test_wrong_requests_get_a_plain_line_for_each_fault_and_write_nothing(
    overrides: Sequence[str], lines: Sequence[str], desk: Path
) -> None:
    result = call(*overrides)
    assert result.code == 2
    assert len(result.errors) == len(lines), result.err
    for line, expected in zip(result.errors, lines, strict=True):
        assert line == expected if expected[-1] != ELLIPSIS else line.startswith(expected[:-1])
        assert "; allowed: " in line
    assert tree(desk) == {} or "-m" in overrides


def test_sweep_goes_on_after_a_wrong_job_and_ends_with_its_code(desk: Path) -> None:
    result = call("-m", "method=ties,average", "seed=x,0", "family=smoke", "corpus=toy", PLAN)
    assert result.code == 2
    assert result.errors == [f"seed: 'x'; allowed: {COUNT} 0"] * 2
    assert [line for line in result.out.splitlines() if line.startswith("One cell")] == [
        "One cell: ties on smoke",
        "One cell: average on smoke",
    ]


def test_user_sees_one_line_and_exit_code_2(tmp_path: Path) -> None:
    result = launch("method=ties", "method.density=nan", "seed=0", PLAN, folder=tmp_path)
    assert result == Result(2, "", "error: method.density: nan; allowed: a number in (0, 1]\n")
    assert tree(tmp_path) == {}


@pytest.mark.parametrize(
    ("overrides", "world"),
    [
        (["family=tiny/llama3"], "alignmerge.zoo.world.World"),
        (["family=smoke"], "alignmerge.zoo.toy.Toy"),
        (["family=smollm2"], "alignmerge.zoo.corpus.Packaged"),
        (["family=tiny/llama3", "corpus=toy"], "alignmerge.zoo.toy.Toy"),
        (["family=tiny/llama3", "experiment=smoke"], "alignmerge.zoo.toy.Toy"),
        ([], "alignmerge.zoo.world.World"),
        (["method=ties"], "alignmerge.zoo.world.World"),
        (["mode=score"], "alignmerge.zoo.corpus.Packaged"),
        (["experiment=smollm2"], "alignmerge.zoo.corpus.Packaged"),
    ],
)
def test_a_family_brings_the_corpus_that_it_is_made_from(overrides: list[str], world: str) -> None:
    config = yaml.safe_load(call("--cfg", "job", *overrides).out)
    assert config["corpus"]["_target_"] == world
    if world.endswith("World"):  # measured as the experiment measures it
        assert config["scorer"] == yaml.safe_load(call("--cfg", "job", "experiment=tiny").out)["scorer"]
        own = yaml.safe_load(call("--cfg", "job", *overrides, "scorer.judge.relevance=0.5").out)
        assert own["scorer"]["judge"]["relevance"] == 0.5 and own["grid"] is None


def test_families_of_one_sweep_bring_their_corpus_if_it_is_one() -> None:
    both = ["-m", "family=tiny/llama3,tiny/gemma2", "method=ties"]
    assert with_corpus(both) == [*both, "corpus=world", "experiment=_world"]
    assert with_corpus([*both, "scorer=[aqi]"]) == [*both, "scorer=[aqi]", "corpus=world"]
    assert with_corpus([*both, "scorer.judge.relevance=0"])[-2:] == ["corpus=world", "experiment=_world"]
    unlike = ["-m", "family=tiny/llama3,smoke"]
    assert with_corpus(unlike) == unlike
    assert with_corpus(["family=tiny/nobody"]) == ["family=tiny/nobody"]


def test_help_and_the_composed_config(tmp_path: Path) -> None:
    shown = launch("--cfg", "job", "method=ties", "experiment=smoke", folder=tmp_path)
    assert shown.code == 0
    config = yaml.safe_load(shown.out)
    assert config["method"] == {
        "_target_": "baselines.ties.Ties",
        "density": 0.2,
        "scale": 1.0,
        "variant": "global",
        "anchor_share": None,
    }
    assert config["grid"]["name"] == config["family"]["name"] == "smoke"
    assert tree(tmp_path) == {}


def test_help_lists_what_there_is_without_helper_files() -> None:
    helped = call("--help")
    assert (helped.code, helped.err) == (0, "") and call("-h") == helped
    words = helped.out.split()
    for group in ("family", "method", "scorer", "experiment", "corpus"):
        files = [
            str(path.relative_to(ROOT / "conf" / group))[:-5]
            for path in (ROOT / "conf" / group).rglob("*.yaml")
        ]
        hidden = {name for name in files if name.rpartition("/")[2].startswith("_")}
        assert set(files) - hidden <= set(words) and hidden.isdisjoint(words)
    for mode in re.findall(r"\w+", MODES.replace("run? ", "")):
        assert f"\n  {mode} " in helped.out and (f"mode={mode}" in helped.out or mode == "run")
    for line in (
        "seed      data order",
        "default: ${oc.env:ALIGNMERGE_STORE,store}",
        "Exit codes: 0 done; 2 the request",
    ):
        assert line in helped.out


def test_help_beside_a_choice_shows_its_fields() -> None:
    helped = call("method=ties", "--help")
    assert helped.code == 0 and "density: 0.2 # (0, 1]; share of each delta that is kept" in helped.out
    assert "Modes" not in helped.out


def test_help_of_hydra_stays_hydras() -> None:
    assert "Hydra" in call("--hydra-help").out
    assert "Config search path" in call("--info", "searchpath").out


def test_help_imports_nothing_heavy() -> None:
    program = "import sys, runpy; sys.argv = ['run.py', '--help']\n"
    program += "try: runpy.run_path('run.py', run_name='__main__')\nexcept SystemExit: pass\n"
    program += "print([name for name in ('torch', 'numpy', 'pandas', 'transformers') if name in sys.modules])"
    said = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    assert said.stdout.splitlines()[-1] == "[]"


AWKWARD = (
    "a b",
    "a=b",
    "a#b",
    "mödel",
    "a,b",
    "it's",
    'say "x"',
    "{odd}",
    "[x]",
    "[a, b]",
    "back\\",
    "a: b",
    "1",
    "~",
    "x~y",
    " y ",
)


@pytest.mark.parametrize("name", AWKWARD)
def test_paths_are_taken_as_they_are_typed(name: str, desk: Path) -> None:
    given = [
        f"family.base={desk}/{name}",
        f"out=out/{name}",
        f"model={name}/x",
        "family=local",
        f"family.anchor=/a/{name}",
    ]
    given += [f"family.experts.math=/m/{name}", f"+family.experts.my-code=/c/{name}"]
    config = yaml.safe_load(call("--cfg", "job", *given).out)
    assert config["out"] == f"out/{name}" and config["family"]["base"] == f"{desk}/{name}"
    assert config["model"] == str(Path(f"{name}/x").expanduser() if name == "~" else f"{name}/x")
    assert config["family"]["experts"] == {"math": f"/m/{name}", "my-code": f"/c/{name}"}


def test_experts_as_a_mapping_and_home_folders(desk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/zoë")
    experts = "family.experts={math: /tmp/a b, code: ~/x=1, 2#, hub: hub:org/name@main, own: 'quoted, already'}"
    config = yaml.safe_load(call("--cfg", "job", "family=local", experts, "out=~/my models/x", "store=~").out)
    found = config["family"]["experts"]
    assert found == {
        "math": "/tmp/a b", "code": "/home/zoë/x=1, 2#", "hub": "hub:org/name@main", "own": "quoted, already",
    }  # fmt: skip
    assert (config["out"], config["store"]) == ("/home/zoë/my models/x", "/home/zoë")
    added = yaml.safe_load(call("--cfg", "job", "family=smollm2", "family.experts.more=/x y").out)
    assert list(added["family"]["experts"])[-1] == "more" and len(added["family"]["experts"]) == 4


def test_paths_wholly_in_brackets(desk: Path) -> None:
    """Read as a list or a mapping they would be refused: no path is one."""
    given = ["family=local", "out=[x]", "model={a: b}", "store=[]", "family.experts={math: [y], 'code': [z]}"]
    config = yaml.safe_load(call("--cfg", "job", *given).out)
    assert [config[key] for key in ("out", "model", "store")] == ["[x]", "{a: b}", "[]"]
    assert config["family"]["experts"] == {"math": "[y]", "code": "[z]"}


def test_a_missing_package_is_named_with_the_line_that_installs_it(
    folders: dict[str, Path], desk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    version = metadata.version

    def installed(name: str) -> str:
        if name == "detoxify":
            raise metadata.PackageNotFoundError(name)
        return version(name)

    monkeypatch.setattr(metadata, "version", installed)
    checkpoint = ["scorer.toxicity.checkpoint=a", "scorer.toxicity.checkpoint_sha256=b"]
    checkpoint += ["scorer.toxicity.checkpoint_config=c", "scorer.toxicity.backend=detoxify"]
    given = ["mode=score", f"model={folders['base']}", "out=o", "family=smoke", "corpus=toy"]
    result = call(*given, "scorer=[toxicity]", *checkpoint)
    assert (result.code, tree(desk)) == (2, {})
    assert result.errors == ["package detoxify: is not installed; allowed: pip install 'detoxify<0.6,>=0.5.4'"]
    launcher = call("-m", "hydra/launcher=slurm", "method=ties,average", PLAN)
    if importlib.util.find_spec("hydra_plugins") is None:
        assert launcher.errors[0].startswith("package hydra-submitit-launcher: is not installed; allowed: pip")


def test_a_module_that_is_missing_anywhere_is_named(desk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def lacks(config: object) -> int:
        raise ModuleNotFoundError("No module named 'peft.tuners'", name="peft.tuners")

    monkeypatch.setattr("eval.grid.modes.dispatch", lacks)
    assert call(PLAN).errors == ["package peft: is not installed; allowed: pip install 'peft<1,>=0.21'"]


def test_a_sweep_over_paths_and_what_is_no_path(desk: Path) -> None:
    assert with_paths(["-m", "model=a b,c#d"]) == ["-m", "model='a b','c#d'"]
    for left in ("out=null", "out=", "out='a b'", "store=${x}", "method=ties", "plan", "--cfg"):
        assert with_paths([left]) == [left]


def test_suggested_quoting_is_read_back_by_shell_and_hydra() -> None:
    for value in AWKWARD:
        (typed,) = shlex.split(for_the_shell("family.note", value))
        assert yaml.safe_load(call("--cfg", "job", typed).out)["family"]["note"] == value


# --- models of one's own -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folders(tiny_model: MakesModel, perturbed: Perturbs) -> dict[str, Path]:
    base = tiny_model("llama")
    return {"base": base, "anchor": perturbed(base, 1), "math": perturbed(base, 2), "code": perturbed(base, 3)}


@pytest.fixture(scope="module")
def sets(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Write the JSONL files that data-driven methods read."""
    folder = tmp_path_factory.mktemp("sets")
    pairs = [(a, b) for a in SENTENCES[:5] for b in SENTENCES[:3]]
    for name, chosen in (("alignment", pairs[:7]), ("metric", pairs[7:])):
        text = "".join(
            json.dumps({"prompt": prompt, "response": response}) + "\n" for prompt, response in chosen
        )
        (folder / f"{name}.jsonl").write_text(text)
    return {name: folder / f"{name}.jsonl" for name in ("alignment", "metric")}


def local(folders: dict[str, Path], sets: dict[str, Path] | None = None) -> list[str]:
    """Spell a family of one's own, as in the README."""
    base, anchor, *experts = folders
    spelt = ", ".join(f"{alias}: {folders[alias]}" for alias in experts)
    given = ["family=local", f"family.base={folders[base]}", f"family.anchor={folders[anchor]}"]
    data = [f"family.{name}={path}" for name, path in (sets or {}).items()]
    return [*given, f"family.experts={{{spelt}}}", *data]


def loaded(folder: Path) -> Any:
    """Load in transformers and insist that every key was found and none was left over."""
    from transformers import AutoModelForCausalLM

    model, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True, local_files_only=True)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    return model.eval()


def generated(folder: Path) -> list[int]:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    messages = [{"role": "user", "content": "how do i build a kite"}]
    ids = tokenizer.apply_chat_template(
        messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    answer = loaded(folder).generate(**ids, max_new_tokens=4, do_sample=False)
    return [int(token) for token in answer[0, ids["input_ids"].shape[1] :]]


@pytest.mark.parametrize("method", METHODS)
def test_merge_of_ones_own_models_by_every_method(
    method: str,
    folders: dict[str, Path],
    sets: dict[str, Path],
    desk: Path,
    monkeypatch: pytest.MonkeyPatch,
    no_board: None,
) -> None:
    request = ["mode=merge", *local(folders, sets), f"method={method}"]
    for place in ("one", "two"):  # nothing is shared between the two
        monkeypatch.setenv("ALIGNMERGE_STORE", str(desk / f"store-{place}"))
        result = call(*request, f"out={place}")
        assert (result.code, result.err) == (0, "")
    one, two = desk / "one", desk / "two"
    digest = Checkpoint.open(one, "merged").digest
    assert result.out.strip().endswith(f"sha256 {digest}") and result.out.startswith("two: 21 tensors in ")
    manifest = json.loads((one / "manifest.json").read_text())
    assert manifest["facts"]["digest"] == digest == Checkpoint.open(two, "merged").digest
    assert (one / SINGLE).read_bytes() == (two / SINGLE).read_bytes()
    opened = {key: Checkpoint.open(folder, key) for key, folder in folders.items()}
    base = opened.pop("base")
    pool = [[key, model.identity] for key, model in opened.items()]
    assert manifest["recipe"]["models"] == {"base": base.identity, "pool": pool}
    assert 1 <= len(generated(one)) <= 4
    weights, base = load_file(one / SINGLE), load_file(folders["base"] / SINGLE)
    assert all(bool(weight.isfinite().all()) for weight in weights.values())
    same = [torch.equal(weight, base[name]) for name, weight in weights.items()]
    assert all(same) if method == "identity" else not any(same)
    card = (one / "README.md").read_text()
    assert card.startswith("---\nlibrary_name: transformers\n") and f"`{digest}`" in card
    assert yaml.safe_load(card.split("---")[1])["tags"] == ["merge", "alignmerge"]
    private = [str(Path.home()), str(ROOT), str(desk), *(str(folder.parent) for folder in folders.values())]
    for text in (card, (one / "manifest.json").read_text()):
        assert not [path for path in private if path in text]
    assert sorted(path.name for path in desk.iterdir()) == ["one", "store-one", "store-two", "two"]


def test_average_is_the_mean_of_anchor_and_experts_and_carries_the_tokenizer(
    folders: dict[str, Path], tmp_path: Path
) -> None:
    result = launch("mode=merge", *local(folders), "method=average", "out=deep/merged", folder=tmp_path)
    assert result.code == 0, result.err
    assert "merge: tensors: 21/21" in result.err
    merged = load_file(tmp_path / "deep/merged" / SINGLE)
    pool = [load_file(folders[key] / SINGLE) for key in ("anchor", "math", "code")]
    for name, weight in merged.items():
        plain = (pool[0][name].double() + pool[1][name].double() + pool[2][name].double()) / 3
        assert torch.equal(weight, plain.float()), name
    for name in (
        "config.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "chat_template.jinja",
        "generation_config.json",
    ):
        assert (tmp_path / "deep/merged" / name).read_bytes() == (folders["base"] / name).read_bytes()
    assert not list((tmp_path / "deep").glob(".*"))
    again = launch("mode=merge", *local(folders), "method=average", "out=deep/merged", folder=tmp_path)
    assert again == Result(2, "", "error: out: deep/merged exists; allowed: a path that does not exist yet\n")


def test_plan_reads_headers_only_and_says_what_is_needed(
    folders: dict[str, Path], desk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Checkpoint, "read", lambda *_: pytest.fail("a weight was read"))
    result = call(PLAN, *local(folders), "method=ties")
    assert (result.code, result.err) == (0, "")
    said = result.out.splitlines()
    assert said[:2] == ["One cell: ties on local", "0 settings on the dev split, then 5 rows on the test split"]
    assert "21,728 parameters" in result.out
    assert all(f"  {key}: local:" in result.out for key in ("base", "anchor", "experts.math", "experts.code"))
    assert tree(desk) == {}
    made = call(PLAN, "experiment=smoke")
    assert made.code == 0 and "8 settings on the dev split, then 24 rows on the test split" in made.out
    assert "anchor: zoo:anchor (to be made)" in made.out
    assert tree(desk) == {}


def test_status_of_an_empty_store(folders: dict[str, Path], desk: Path) -> None:
    result = call("mode=status", *local(folders), "method=ties")
    assert (result.code, result.err) == (0, "")
    assert result.out.splitlines()[-1] == "0 done, 0 failed, 5 missing"
    result = call("mode=status", "experiment=smoke")
    assert result.out.splitlines()[-1] == "0 done, 0 failed, 14 missing"
    assert tree(desk) == {}


# --- wrong models --------------------------------------------------------------------------------------------------

Damage = Callable[[Path], None]


def truncate(folder: Path) -> None:
    (folder / SINGLE).write_bytes((folder / SINGLE).read_bytes()[:-100])


def garbage(folder: Path) -> None:
    (folder / SINGLE).write_bytes(b"\xff" * 500)


def absurd(folder: Path) -> None:
    (folder / SINGLE).write_bytes(struct.pack("<Q", 2**62) + b"{}")


def pickled(folder: Path) -> None:
    torch.save(load_file(folder / SINGLE), folder / "pytorch_model.bin")
    (folder / SINGLE).unlink()


def remote(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(
        json.dumps({**config, "model_type": "exotic", "auto_map": {"AutoModel": "x.Y"}})
    )


def no_config(folder: Path) -> None:
    (folder / "config.json").unlink()


def escaping(folder: Path) -> None:
    (folder / "model.safetensors.index.json").write_text(
        json.dumps({"weight_map": {"a": "../../escape.safetensors"}})
    )
    (folder / SINGLE).unlink()


def changed(change: Callable[[dict[str, torch.Tensor]], object]) -> Damage:
    def damage(folder: Path) -> None:
        tensors = load_file(folder / SINGLE)
        change(tensors)
        save_file(tensors, folder / SINGLE, {"format": "pt"})

    return damage


DAMAGES: dict[str, tuple[Damage, str]] = {
    "truncated": (truncate, ""),
    "garbage": (garbage, ""),
    "absurd header": (absurd, ""),
    "pickle": (pickled, "pytorch_model.bin"),
    "remote code": (remote, "auto_map"),
    "no config": (no_config, "config.json"),
    "shard outside": (escaping, "../../escape.safetensors"),
    "missing tensor": (changed(lambda t: t.pop("model.norm.weight")), "tensor 'model.norm.weight' is missing"),
    "extra tensor": (
        changed(lambda t: t.update(extra=torch.ones(2))),
        "tensor 'extra' has no place in the model",
    ),
    "other shape": (
        changed(lambda t: t.update({"model.norm.weight": torch.ones(31)})),
        "has shape [31]; allowed: [32]",
    ),
    "integers": (
        changed(lambda t: t.update({"model.norm.weight": torch.ones(32, dtype=torch.int32)})),
        "model.norm.weight",
    ),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_wrong_models_get_one_plain_line(
    name: str, folders: dict[str, Path], desk: Path, copied: Copies, no_board: None
) -> None:
    damage, word = DAMAGES[name]
    wrong = copied(folders["math"])
    damage(wrong)
    before = tree(desk)
    for mode in ("merge", "plan"):
        result = call(f"mode={mode}", *local({**folders, "math": wrong}), "method=average", "out=merged")
        assert result.code == 2 and len(result.errors) == 1, result.err
        assert result.errors[0].startswith(f"family.experts.math: {wrong}") and word in result.errors[0]
        assert "; allowed: " in result.errors[0]
        assert not (desk / "merged").exists()
        if mode == "plan" or word == "":
            assert not list(desk.rglob("*.safetensors"))
    assert {p: b for p, b in tree(desk).items() if not p.startswith("store")} == before


def test_other_architecture_and_other_vocabulary(
    folders: dict[str, Path], tiny_model: MakesModel, desk: Path, no_board: None
) -> None:
    result = call("mode=merge", *local({**folders, "code": tiny_model("mistral")}), "method=ties", "out=merged")
    assert result.code == 2
    where = f"family.experts.code: {tiny_model('mistral')}/config.json"
    assert result.errors == [
        f"{where}: model_type is mistral; allowed: llama, as in the base",
        f"{where}: architectures is MistralForCausalLM; allowed: LlamaForCausalLM, as in the base",
    ]
    assert not (desk / "merged").exists()


def test_all_wrong_models_are_named_at_once(folders: dict[str, Path], copied: Copies, desk: Path) -> None:
    cut, remote_code = copied(folders["anchor"]), copied(folders["math"])
    truncate(cut)
    remote(remote_code)
    wrong = {**folders, "anchor": cut, "math": remote_code, "code": desk / "nowhere"}
    result = call("mode=merge", *local(wrong), "method=ties", "out=merged")
    assert result.code == 2
    assert [line.split(":")[0] for line in result.errors] == [
        "family.anchor",
        "family.experts.math",
        "family.experts.code",
    ]


@pytest.mark.parametrize(
    ("method", "value"), [*((method, math.nan) for method in METHODS), ("average", math.inf)]
)
def test_weight_that_is_not_finite_is_one_line_and_leaves_nothing(
    method: str, value: float, folders: dict[str, Path], sets: dict[str, Path], desk: Path,
    copied: Copies, no_board: None,
) -> None:  # fmt: skip
    wrong = copied(folders["math"])

    def poison(tensors: dict[str, torch.Tensor]) -> None:
        tensors["model.layers.1.mlp.up_proj.weight"][3, 5] = value

    changed(poison)(wrong)
    result = call("mode=merge", *local({**folders, "math": wrong}, sets), f"method={method}", "out=merged")
    assert result.code == 2 and len(result.errors) == 1, result.err
    assert result.errors[0].startswith(f"family.experts.math: {wrong}") and "; allowed: " in result.errors[0]
    assert "model.layers.1.mlp.up_proj.weight" in result.errors[0]
    assert [path.name for path in desk.iterdir()] in ([], ["store"])
    assert not list(desk.rglob(".merged*"))


def test_wrong_example_sets_are_named(
    folders: dict[str, Path], sets: dict[str, Path], desk: Path, no_board: None
) -> None:
    broken = desk / "broken.jsonl"
    broken.write_text('{"prompt": "a", "response": "b"}\n{"prompt": "a"}\n')
    for path, expected in (
        (desk / "nowhere.jsonl", "family.metric: no such file: "),
        (broken, f"family.metric: {broken}:2: not a record; allowed: JSON with the texts prompt, response"),
    ):
        result = call(
            "mode=merge", *local(folders, {**sets, "metric": path}), "method=alignmerge", "out=merged"
        )
        assert result.code == 2 and len(result.errors) == 1, result.err
        assert result.errors[0].startswith(expected)
        assert not (desk / "merged").exists() and not list(desk.rglob(".merged*"))


def test_score_of_a_folder_that_is_no_model(folders: dict[str, Path], copied: Copies, desk: Path) -> None:
    wrong = copied(folders["math"])
    truncate(wrong)
    result = call(
        "mode=score", f"model={wrong}", "scorer=[aqi]", "out=scores.json", *local(folders), "corpus=toy"
    )
    assert result.code == 2 and len(result.errors) == 1
    assert result.errors[0].startswith(f"model: {wrong}")
    assert tree(desk) == {}


@pytest.mark.parametrize("mode", ["merge", "score", "plan", "status", "report"])
def test_a_mode_without_its_key_is_answered_with_the_key(mode: str) -> None:
    result = call(mode)
    assert result.code == 2 and result.err == f"error: {mode}: not understood; allowed: mode={mode}\n"


def test_version_is_ours() -> None:
    result = call("--version")
    assert result.code == 0 and result.out.startswith("alignmerge 0.")


def test_scorers_that_an_experiment_sets_fields_of_may_be_left_out() -> None:
    from test_configs import composed

    from eval.grid.request import scorers_of

    (scorer,) = scorers_of(composed("experiment=tiny", "scorer=[aqi]"))
    assert scorer.name == "aqi"


def test_a_launcher_that_cannot_start_is_one_line(desk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def absent() -> None:
        raise RuntimeError('Could not detect "srun", are you indeed on a slurm cluster?')

    monkeypatch.setattr(_entry(), "compose", absent)
    result = call("-m", "method=ties,average", PLAN)
    assert result.code == 1 and result.err.count("\n") == 1
    assert result.err.startswith(
        'failed: Could not detect "srun", are you indeed on a slurm cluster? (traceback: '
    )

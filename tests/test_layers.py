"""House rules that the source itself can be asked: import direction, sizes, names, nothing unpickled."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
FORBIDDEN = {
    "alignmerge": {"baselines", "eval", "run"},
    "alignmerge/engine": {"baselines", "eval", "run", "alignmerge outside alignmerge.engine"},
    "baselines": {"eval", "run"},
    "eval": {"run"},
    "eval/stats": {"run", "eval.grid", "eval.report", "eval.scorers"},
    "eval/report": {"run", "eval.grid", "eval.scorers"},
    "eval/scorers": {"run", "eval.grid", "eval.report", "eval.stats"},
}
LONGEST = 80
NAMES = {"helpers", "helper", "utils", "util", "manager", "managers", "misc", "common"}
ALLOWED = {
    # the packaged classifiers are pickles: subclasses that look names up in a list, never by importing
    "eval/scorers/restricted.py": {"Unpickler"},
    # detoxify reads its own .ckpt without restriction: this reads it first, tensors and containers only
    "eval/scorers/detoxify_checkpoint.py": {"torch.load(weights_only=True)"},
}
LOADERS = {
    ("torch", "load"),
    ("pickle", "load"),
    ("pickle", "loads"),
    ("joblib", "load"),
    ("dill", "load"),
    ("dill", "loads"),
}


def sources(*rooms: str) -> list[Path]:
    files = [ROOT / "run.py"] if (ROOT / "run.py").is_file() and not rooms else []
    for room in rooms or ("alignmerge", "baselines", "eval"):
        files += sorted((ROOT / room).rglob("*.py"))
    return files


def label(path: Path) -> str:
    return str(path.relative_to(ROOT))


def imported(tree: ast.AST, package: str) -> Iterator[str]:
    """Yield the dotted names of all imports, wherever they stand; ``package`` resolves relative ones."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            parents = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            module = ".".join([*parents, *([node.module] if node.module else [])])
            yield module
            yield from (f"{module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Call) and _called(node) in {
            ("importlib", "import_module"),
            ("", "__import__"),
        }:
            yield from (a.value for a in node.args if isinstance(a, ast.Constant) and isinstance(a.value, str))


def _called(node: ast.Call) -> tuple[str, str]:
    """Return ('module', 'name') of a call such as torch.load(...), or ('', 'name') of a plain one."""
    if isinstance(node.func, ast.Attribute) and isinstance(node.func.value, ast.Name):
        return node.func.value.id, node.func.attr
    return "", node.func.id if isinstance(node.func, ast.Name) else ""


def trespasses(tree: ast.AST, room: str) -> set[str]:
    """Return which forbidden rooms a module in ``room`` (as alignmerge/engine) imports."""
    found = set()
    for name in imported(tree, room.replace("/", ".")):
        found.add(name.split(".")[0])
        found.add(".".join(name.split(".")[:2]))
        inside = ["alignmerge", "engine"]
        if name.startswith("alignmerge") and name != "alignmerge" and name.split(".")[:2] != inside:
            found.add("alignmerge outside alignmerge.engine")
    return found & FORBIDDEN[room]


def dangers(tree: ast.AST) -> set[str]:
    """Return what a module does that could run foreign code: remote code, general unpickling."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.keyword) and node.arg == "trust_remote_code":
            if not (isinstance(node.value, ast.Constant) and node.value.value is False):
                found.add("trust_remote_code")
        elif isinstance(node, ast.Dict):
            keys = {key.value for key in node.keys if isinstance(key, ast.Constant)}
            found |= {"trust_remote_code"} & keys
        elif isinstance(node, ast.Call):
            if _called(node) in LOADERS:
                safe = any(
                    k.arg == "weights_only" and getattr(k.value, "value", 0) is True for k in node.keywords
                )
                found.add(".".join(_called(node)) + ("(weights_only=True)" if safe else ""))
            if _called(node)[1].endswith("Unpickler"):
                found.add("Unpickler")
        elif isinstance(node, ast.ImportFrom):
            names = {alias.name for alias in node.names}
            found |= {f"{node.module}.{name}" for name in names if (node.module, name) in LOADERS}
        elif isinstance(node, ast.ClassDef):
            bases = {b.attr if isinstance(b, ast.Attribute) else getattr(b, "id", "") for b in node.bases}
            found |= {"Unpickler" for base in bases if base.endswith("Unpickler")}
    return found


def long_functions(tree: ast.AST) -> dict[str, int]:
    functions = [n for n in ast.walk(tree) if isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef)]
    lengths = {f.name: (f.end_lineno or f.lineno) - f.lineno + 1 for f in functions}
    return {name: length for name, length in lengths.items() if length > LONGEST}


@pytest.mark.parametrize("room", FORBIDDEN)
def test_imports_run_one_way(room: str) -> None:
    files = sources(room)
    assert files
    found = {label(f): trespasses(ast.parse(f.read_text()), room) for f in files}
    assert {name: rooms for name, rooms in found.items() if rooms} == {}


def test_no_function_is_longer_than_a_page() -> None:
    found = {label(f): long_functions(ast.parse(f.read_text())) for f in sources()}
    assert {name: functions for name, functions in found.items() if functions} == {}


def test_files_are_named_after_what_they_do() -> None:
    assert [label(f) for f in sources() if f.stem in NAMES or f.parent.name in NAMES] == []


def test_nothing_runs_foreign_code() -> None:
    found = {label(f): dangers(ast.parse(f.read_text())) for f in sources()}
    assert {name: sins for name, sins in found.items() if sins} == ALLOWED  # no more, and no stale leave


@pytest.mark.parametrize(
    ("room", "source", "expected"),
    [
        ("alignmerge", "import eval.stats.estimates", {"eval"}),
        ("alignmerge", "def f():\n    from baselines import ties", {"baselines"}),
        ("alignmerge", "if TYPE_CHECKING:\n    import run", {"run"}),
        ("alignmerge", "import importlib\nimportlib.import_module('eval.scorers.interface')", {"eval"}),
        ("alignmerge", "from evaluate import x\nimport alignmerge.fisher", set()),
        ("alignmerge/engine", "from alignmerge.fisher import G", {"alignmerge outside alignmerge.engine"}),
        ("alignmerge/engine", "from alignmerge import fisher", {"alignmerge outside alignmerge.engine"}),
        ("alignmerge/engine", "from ..zoo import world", {"alignmerge outside alignmerge.engine"}),
        ("alignmerge/engine", "from .store import Store\nfrom alignmerge.engine import store", set()),
        ("baselines", "from eval.stats.estimates import holm", {"eval"}),
        ("baselines", "from alignmerge.fisher import G", set()),
    ],
)
def test_trespasses_are_seen(room: str, source: str, expected: set[str]) -> None:
    assert trespasses(ast.parse(source), room) == expected


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("AutoModel.from_pretrained(x, trust_remote_code=True)", {"trust_remote_code"}),
        ("f(x, trust_remote_code=flag)", {"trust_remote_code"}),
        ("f(**{'trust_remote_code': True})", {"trust_remote_code"}),
        ("f(x, trust_remote_code=False)", set()),
        ("torch.load(path)", {"torch.load"}),
        ("torch.load(path, weights_only=False)", {"torch.load"}),
        ("torch.load(path, weights_only=True)", {"torch.load(weights_only=True)"}),
        ("import pickle\npickle.loads(b)", {"pickle.loads"}),
        ("from pickle import load", {"pickle.load"}),
        ("joblib.load(path)", {"joblib.load"}),
        ("class R(pickle.Unpickler): pass", {"Unpickler"}),
        ("class R(NumpyUnpickler): pass", {"Unpickler"}),
        ("pickle.Unpickler(file).load()", {"Unpickler"}),
        ("json.load(file); pickle.dumps(x)", set()),
    ],
)
def test_dangers_are_seen(source: str, expected: set[str]) -> None:
    assert dangers(ast.parse(source)) == expected


def test_long_functions_are_seen() -> None:
    body = "\n".join("    x = 1" for _ in range(LONGEST - 1))
    assert long_functions(ast.parse(f"def f():\n{body}")) == {}
    assert long_functions(ast.parse(f"def f():\n{body}\n    x = 2")) == {"f": LONGEST + 1}

"""From config nodes to objects: only our own classes, every fault at once, types as annotated."""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, make_dataclass
from types import ModuleType
from typing import Any, Literal

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from alignmerge.engine.configuration import GROUP, build, choices, nearest
from alignmerge.engine.faults import BadRequest
from alignmerge.engine.manifest import ROOT
from alignmerge.engine.merger import Merger
from baselines.average import Average
from baselines.ties import Ties
from eval.scorers.aqi import AQI
from eval.scorers.interface import Scorer
from eval.scorers.judge import Judge

HERE = "alignmerge.probe"
TIES = {"_target_": "baselines.ties.Ties"}


def ours(name: str, *members: tuple[str, Any] | tuple[str, Any, Any]) -> type:
    made = make_dataclass(name, members, frozen=True, kw_only=True)
    made.__module__ = HERE
    return made


Leaf = ours("Leaf", ("size", int), ("rate", float, 0.5))
Tree = ours(
    "Tree",
    ("count", int, 1),
    ("weight", float, 1.0),
    ("on", bool, False),
    ("text", str, ""),
    ("limit", int | None, None),
    ("ratio", float | None, None),
    ("either", int | float, 0),
    ("kind", Literal["a", "b"], "a"),
    ("items", Sequence[int], ()),
    ("table", Mapping[str, float], None),
    ("leaf", Leaf, None),
    ("leaves", Mapping[str, Leaf], None),  # type: ignore[valid-type]
    ("row", Sequence[Leaf], ()),  # type: ignore[valid-type]
    ("perhaps", Leaf | None, None),
    ("method", Merger | None, None),
    ("anything", Any, None),
    ("loose", Mapping[str, Any], None),
)
Forest = ours("Forest", ("scorers", Mapping[str, Scorer], field(metadata={GROUP: "scorer"})))
TYPES: dict[str, Any] = {
    "count": int, "weight": float, "on": bool, "text": str, "limit": int | None, "ratio": float | None,
}  # fmt: skip


@dataclass(frozen=True)
class Foreign:
    """A dataclass, but none of the project's."""

    size: int = 1


@pytest.fixture(scope="module", autouse=True)
def probe() -> Any:
    """Put a module with the classes above into the package, and things that may not be built."""
    module = ModuleType(HERE)
    for name, thing in {
        "Leaf": Leaf,
        "Tree": Tree,
        "Forest": Forest,
        "Foreign": Foreign,
        "instance": Foreign(),
        "os": os,
    }.items():
        setattr(module, name, thing)
    sys.modules[HERE] = module
    yield
    del sys.modules[HERE]


def node(name: str, **values: object) -> dict[str, object]:
    return {"_target_": f"{HERE}.{name}", **values}


def lines(config: Any, *kinds: type) -> list[str]:
    with pytest.raises(BadRequest) as caught:
        build(config, "key", *kinds)
    return [str(fault) for fault in caught.value.faults]


@pytest.mark.parametrize(
    "target",
    [
        "os.system", "torch.load", "builtins.eval", "subprocess.Popen", "pathlib.Path", "test_build.Foreign",
        "alignmerge.engine.store.shutil", "alignmerge.engine.store.shutil.rmtree", f"{HERE}.os", f"{HERE}.os.system",
        "alignmerge.engine.merger.torch.load", "alignmerge.engine.assets.subprocess.run", f"{HERE}.instance",
        "alignmerge.engine.configuration.importlib", f"{HERE}.Foreign", "alignmerge.engine.store.Artifact",
        "alignmerge.engine.store.Store", "alignmerge.engine.configuration.build",
        "alignmerge.engine.configuration.PACKAGES", "alignmerge.engine.configuration.dataclass",
        "alignmerge", "alignmerge.", "alignmerge..engine", ".alignmerge.method",
        "alignmerge.method", "eval", "baselines", "alignmergex.method.AlignMerge", "../alignmerge.method",
        "alignmerge.method.AlignMerge.__init__", "alignmerge/method", "alignmerge.method.Nothing",
        "alignmerge.nothing.Nothing", "", None, 3, True, ["os.system"], {"_target_": "os.system"},
    ],
)  # fmt: skip
def test_targets_other_than_our_dataclasses_are_refused(
    target: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "system", lambda *_: pytest.fail("was called"))
    (line,) = lines({"_target_": target, "command": "true", "size": 1})
    assert line.startswith("key._target_: ")
    assert line.endswith("; allowed: a dataclass of alignmerge, baselines, eval")


def test_node_without_a_target_and_no_node() -> None:
    assert lines({"density": 0.2}) == [
        "key._target_: None; allowed: a dataclass of alignmerge, baselines, eval"
    ]
    for other in (3, "baselines.ties.Ties", None, [TIES]):
        (line,) = lines(other)
        assert line.startswith(f"key: {other!r}") and line.endswith("allowed: a mapping with the key _target_")


def test_class_of_another_kind_is_refused() -> None:
    assert isinstance(build(TIES, "key", Merger), Ties)
    assert isinstance(build(TIES, "key", Average, Ties), Ties)
    assert lines(node("Leaf", size=1), Merger) == [
        f"key._target_: {HERE}.Leaf is not such a class; allowed: alignmerge.engine.merger.Merger"
    ]
    (line,) = lines(TIES, Average, Leaf)
    assert line.endswith(f"allowed: baselines.average.Average or {HERE}.Leaf")


def test_nested_nodes_are_built_and_checked_against_the_annotation() -> None:
    tree: Any = build(
        node("Tree", leaf=node("Leaf", size=2), leaves={"a": node("Leaf", size=3, rate=1)}, anything=TIES),
        "key",
    )
    assert (
        tree.leaf == Leaf(size=2) and tree.leaves == {"a": Leaf(size=3, rate=1.0)} and tree.anything == Ties()
    )
    assert lines(node("Tree", leaf=TIES)) == [
        f"key.leaf._target_: baselines.ties.Ties is not such a class; allowed: {HERE}.Leaf"
    ]
    wheres = [line.split(":")[0] for line in lines(node("Tree", leaves={"a": TIES, "b": {"rate": 1}}))]
    assert wheres == ["key.leaves.a._target_", "key.leaves.b.size"]
    (line,) = lines(node("Tree", leaf={"_target_": "os.system"}))
    assert line.startswith("key.leaf._target_: os.system; ")


def test_class_that_a_type_tells_needs_no_target() -> None:
    assert build({"size": 2}, "key", Leaf) == Leaf(size=2)
    nested = {"leaf": {"size": 1}, "leaves": {"a": {"size": 2}}, "row": [{"size": 3}], "perhaps": {"size": 4}}
    tree: Any = build(nested, "key", Tree)
    assert (tree.leaf, tree.leaves) == (Leaf(size=1), {"a": Leaf(size=2)})
    assert (tree.row, tree.perhaps) == ((Leaf(size=3),), Leaf(size=4))
    assert build({"perhaps": None}, "key", Tree).perhaps is None
    assert lines({"leaf": {}, "row": [{"sise": 1, "size": 1}, 3]}, Tree) == [
        "key.leaf.size: not given; allowed: int",
        "key.row[0].sise: unknown key; allowed: size? rate, size",
        "key.row[1]: 3 (int); allowed: Leaf",
    ]
    assert lines(3, Leaf) == ["key: 3 (int); allowed: a mapping"]
    assert lines({"size": 1, "_target_": "baselines.ties.Ties"}, Leaf) == [
        f"key._target_: baselines.ties.Ties is not such a class; allowed: {HERE}.Leaf"
    ]


def test_abstract_kinds_and_several_kinds_need_a_target() -> None:
    allowed = "allowed: a dataclass of alignmerge, baselines, eval"
    assert lines({"density": 0.2}, Merger) == [f"key._target_: None; {allowed}"]
    assert lines({"density": 0.2}, Ties, Average) == [f"key._target_: None; {allowed}"]
    assert lines(node("Tree", method={"density": 0.2})) == [f"key.method._target_: None; {allowed}"]
    assert build(node("Tree", method=TIES), "key").method == Ties()
    (line,) = lines({"_target_": "alignmerge.engine.merger.Merger"}, Merger)
    assert "is not such a class" in line


def test_objects_that_are_named_after_files_take_what_is_not_said_from_there() -> None:
    forest: Any = build({"scorers": {"judge": {"batch_size": 3}, "aqi": {}}}, "key", Forest)
    assert forest.scorers == {"judge": Judge(batch_size=3), "aqi": AQI()}
    assert lines({"scorers": {"judg": {}, "aqi": {"layer": 1}, "utility": 3}}, Forest) == [
        f"key.scorers.judg: no such choice; allowed: judge? {', '.join(choices(ROOT / 'conf' / 'scorer'))}",
        "key.scorers.aqi.layer: unknown key; allowed: layers? layers, replicates",
        "key.scorers.utility: 3 (int); allowed: Scorer",
    ]
    (line,) = lines({"scorers": {"aqi": TIES}}, Forest)
    assert line.startswith("key.scorers.aqi._target_: baselines.ties.Ties is not such a class")
    assert lines({"scorers": ["aqi"]}, Forest)[0].startswith("key.scorers: a list: ['aqi']; allowed: Mapping[")


def test_all_faults_of_a_node_and_of_its_nodes_come_at_once() -> None:
    broken = node("Leaf", rate="x", other=1)
    wrong = node(
        "Tree", count="one", weight=None, cuont=1, leaf=broken, items=[1, "b"], zzz=2, loose={"deep": broken}
    )
    wheres = [line.split(":")[0] for line in lines(wrong)]
    assert sorted(wheres) == sorted(
        ["key.count", "key.weight", "key.cuont", "key.items[1]", "key.zzz"]
        + [f"{at}.{name}" for at in ("key.leaf", "key.loose.deep") for name in ("rate", "other", "size")]
    )
    assert lines(node("Leaf")) == ["key.size: not given; allowed: int"]
    assert lines(node("Tree", cuont=1))[0].startswith(
        "key.cuont: unknown key; allowed: count? anything, count, "
    )


@pytest.mark.parametrize(
    ("key", "value", "given", "allowed"),
    [
        ("count", True, "True (bool)", "int"), ("count", 1.0, "1.0 (float)", "int"),
        ("count", "1", "'1' (str)", "int"), ("count", None, "None (NoneType)", "int"),
        ("count", [1], "a list: [1]", "int"), ("count", {"a": 1}, "a mapping: {'a': 1}", "int"),
        ("weight", True, "True (bool)", "float"), ("weight", "nan", "'nan' (str)", "float"),
        ("on", 1, "1 (int)", "bool"), ("on", "false", "'false' (str)", "bool"), ("text", 3, "3 (int)", "str"),
        ("text", None, "None (NoneType)", "str"), ("limit", 0.5, "0.5 (float)", "int | null"),
        ("ratio", "x", "'x' (str)", "float | null"), ("kind", "c", "'c' (str)", "Literal['a', 'b']"),
        ("kind", None, "None (NoneType)", "Literal['a', 'b']"), ("items", "12", "'12' (str)", "Sequence[int]"),
        ("items", 3, "3 (int)", "Sequence[int]"), ("items", {"a": 1}, "a mapping: {'a': 1}", "Sequence[int]"),
        ("table", 3, "3 (int)", "Mapping[str, float]"), ("table", ["x"], "a list: ['x']", "Mapping[str, float]"),
        ("leaf", 3, "3 (int)", "Leaf"),
    ],
)  # fmt: skip
def test_wrong_types_by_hand(key: str, value: object, given: str, allowed: str) -> None:
    assert lines(node("Tree", **{key: value})) == [f"key.{key}: {given}; allowed: {allowed}"]


def test_elements_are_named_by_place_and_by_key() -> None:
    assert lines(node("Tree", items=[1, True, "x"])) == [
        "key.items[1]: True (bool); allowed: int",
        "key.items[2]: 'x' (str); allowed: int",
    ]
    assert lines(node("Tree", table={"a": 1, "b": "x"})) == ["key.table.b: 'x' (str); allowed: float"]


def test_right_values_by_hand() -> None:
    made: Any = build(
        node("Tree", weight=2, ratio=3, either=4, limit=None, items=[1, 2], table={"x": 1, 3: 2}, on=True,
             kind="b", anything=[1, {"a": [True, None]}], loose={"a": [1, "b"], "c": {"d": 2}}),
        "key",
    )  # fmt: skip
    assert [type(value) for value in (made.weight, made.ratio, made.either)] == [float, float, int]
    assert made.items == (1, 2) and made.limit is None and made.on is True and made.kind == "b"
    assert made.table == {"x": 1.0, "3": 2.0} and all(type(value) is float for value in made.table.values())
    assert made.anything == (1, {"a": (True, None)})
    assert made.loose == {"a": (1, "b"), "c": {"d": 2}}
    assert math.isnan(build(node("Tree", weight=math.nan), "key").weight)  # ranges are the class's own business
    assert build(node("Tree", weight=-(10**400)), "key").weight == -math.inf
    assert build(node("Tree", weight=10**22), "key").weight == 1e22


def test_ranges_are_checked_by_the_class_and_named() -> None:
    with pytest.raises(BadRequest, match=r"^method\.density: inf; allowed: a number in \(0, 1\]$"):
        build({**TIES, "density": 10**400}, "method", Merger)
    with pytest.raises(BadRequest, match=r"^method\.density: 0\.0; allowed: a number in \(0, 1\]$"):
        build({**TIES, "density": 0}, "method", Merger)


def test_nearest_puts_the_likely_key_first_and_lists_all() -> None:
    assert nearest("densty", {"scale", "density"}) == "density? density, scale"
    assert nearest("q", {"scale", "density"}) == "density, scale"
    assert nearest("q", set()) == ""


JUNK = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)


def admits(hint: Any, value: object) -> bool:
    """Say whether a plain reading of the annotation admits the value."""
    return {
        int: type(value) is int,
        float: type(value) in (int, float),
        bool: type(value) is bool,
        str: type(value) is str,
        int | None: value is None or type(value) is int,
        float | None: value is None or type(value) in (int, float),
    }[hint]


@settings(max_examples=60, deadline=None)
@given(st.dictionaries(st.sampled_from(sorted(TYPES)), JUNK))
def test_values_are_taken_exactly_where_the_annotation_admits_them(values: dict[str, object]) -> None:
    wrong = {f"key.{key}" for key, value in values.items() if not admits(TYPES[key], value)}
    try:
        made = build(node("Tree", **values), "key")
    except BadRequest as error:
        assert {fault.where for fault in error.faults} == wrong and wrong
    else:
        assert not wrong
        for key, value in values.items():
            kept = getattr(made, key)
            if not isinstance(value, (int, float)):
                assert kept == value
            elif math.isnan(value):
                assert math.isnan(kept)
            else:
                assert kept == value or (math.isinf(kept) and abs(value) > sys.float_info.max)


@settings(max_examples=60, deadline=None)
@given(JUNK)
def test_junk_is_refused_in_plain_lines_and_nothing_else(junk: Any) -> None:
    for config in (junk, {"_target_": junk}, {**TIES, "density": junk}, {**TIES, "scale": 2.0, "x": junk}):
        try:
            made = build(config, "method", Merger)
        except BadRequest as error:
            assert all("\n" not in str(fault) and str(fault).startswith("method") for fault in error.faults)
        else:
            assert isinstance(made, Ties) and 0 < made.density <= 1

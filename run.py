"""Entry point: compose the config, run the mode, return the exit code.

0: done; 2: the request or an input is wrong; 130: interrupted; 1: anything else.
"""

from __future__ import annotations

import os
import sys

from alignmerge.engine import interruption

if __name__ == "__main__":
    interruption.end_at_once()

import tempfile
import traceback
from collections.abc import Iterable, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any, cast

import hydra
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from alignmerge.engine.faults import BadRequest, Fault, missing_package
from alignmerge.engine.kernels import fix

fix()  # before anything imports torch or numpy

os.environ["HYDRA_FULL_ERROR"] = "1"  # errors reach main(), which turns them into plain lines
os.environ.setdefault("HF_HUB_OFFLINE", "1" if os.environ.get("ALIGNMERGE_HUB") is None else "0")
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", os.environ["HF_HUB_OFFLINE"])  # of transformers too
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")  # huge pages: a tenth of the time of large batches

CONF = str(Path(__file__).resolve().parent / "conf")
CODES: list[int] = []
"""Exit code of each job: a sweep has several."""


class JobFailed(Exception):
    """Carries the exit code of a cluster job, which runs in a process of its own, to the one that
    started it.
    """


@hydra.main(version_base="1.3", config_path=CONF, config_name="config")
def compose(config: DictConfig) -> None:
    """Resolve the config and hand it on; a wrong request of one job of a sweep does not stop the
    others.
    """
    from eval.grid.modes import dispatch

    interruption.unwind_first()
    try:
        CODES.append(dispatch(cast(dict[str, Any], OmegaConf.to_container(config, resolve=True))))
    except BadRequest as error:
        CODES.append(refuse(error.faults))
    except OmegaConfBaseException as error:
        CODES.append(refuse([Fault(error.full_key or "config", str(error), "a value that can be resolved")]))
    except ModuleNotFoundError as error:
        CODES.append(refuse(missing_package(error).faults))
    except Exception as error:
        CODES.append(fail(error, Path(config.get("store") or ".")))
    if CODES[-1] and "SUBMITIT_EXECUTOR" in os.environ:
        raise JobFailed(CODES[-1])


def main() -> int:
    """Answer what needs no config, or run; one plain line for each fault."""
    from eval.grid.usage import asked_for, usage

    arguments = sys.argv[1:]
    if "--version" in arguments:
        print(f"alignmerge {metadata.version('alignmerge')}")
        return 0
    if asked_for(arguments):
        print(usage(arguments), flush=True)
        return 0
    return _run(arguments)


def _run(arguments: Sequence[str]) -> int:
    """Complete the command line, run it and translate errors."""
    from eval.grid.overrides import UNUSABLE, composition_faults, with_corpus
    from eval.grid.quoting import with_paths

    CODES.clear()
    try:
        sys.argv[1:] = with_corpus(with_paths(arguments))
        compose()
    except JobFailed as error:
        return int(error.args[0])
    except BrokenPipeError:
        raise
    except UNUSABLE as error:
        return refuse(composition_faults(error))
    except KeyboardInterrupt:
        return interruption.tell()
    except Exception as error:  # of a launcher, which runs before any job
        return fail(error, Path(os.environ.get("ALIGNMERGE_STORE", "store")))
    return max(CODES, default=0)


def refuse(faults: Iterable[Fault]) -> int:
    """Print one line for each fault and return the exit code."""
    for fault in faults:
        print(f"error: {fault}", file=sys.stderr)
    return 2


def fail(error: Exception, store: Path) -> int:
    """Print one line for what is nobody's wrong request, leave the traceback in a file, return the exit
    code.
    """
    text = "".join(traceback.format_exception(error))
    folder = store / "failed"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"run-{os.getpid()}.txt"
        path.write_text(text)
    except OSError:  # the store itself may be what failed
        path = Path(tempfile.mkstemp(suffix=".txt", prefix="alignmerge-")[1])
        path.write_text(text)
    reason = " ".join(str(error).split()) or type(error).__name__
    print(f"failed: {reason} (traceback: {path})", file=sys.stderr)
    return 1


if __name__ == "__main__":
    try:
        code = main()
        if code == interruption.CODE:
            interruption.leave()
        sys.exit(code)
    except BrokenPipeError:  # whoever reads the output has seen enough, as `head` has
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)

"""Entry point: compose the config, run the mode, return the exit code (0 done, 2 wrong request, 1 anything else)."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any, cast

import hydra
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from alignmerge.engine.faults import BadRequest

CONF = Path(__file__).resolve().parent / "conf"
os.environ["HYDRA_FULL_ERROR"] = "1"  # errors reach main(), which turns them into plain lines
os.environ.setdefault("HF_HUB_OFFLINE", "1" if os.environ.get("ALIGNMERGE_HUB") is None else "0")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


@hydra.main(version_base="1.3", config_path=str(CONF), config_name="config")
def compose(config: DictConfig) -> int:
    """Resolve the config and hand it on."""
    from eval.modes import dispatch

    code = dispatch(cast(dict[str, Any], OmegaConf.to_container(config, resolve=True)))
    if code:
        raise SystemExit(code)
    return code


def main() -> int:
    """Run and translate errors: one plain line for each fault."""
    try:
        compose()
    except BadRequest as error:
        for fault in error.faults:
            print(f"error: {fault}", file=sys.stderr)
        return 2
    except (HydraException, OmegaConfBaseException) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())

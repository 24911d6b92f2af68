"""What a report may have beside scores: settings, checkpoints, gates, sweeps."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import pandas as pd


@dataclass(frozen=True, kw_only=True)
class Supplement:
    """The optional parts of a report."""

    selection: pd.DataFrame | None = None
    """One setting a line, as tried on the dev split: row, setting, selected and the dev values; with
    family where there are several."""
    trajectory: pd.DataFrame | None = None
    """The scores of the checkpoints of the anchors' training: family, seed, step (0 is theta_IT), share of
    the last step, column, id, value."""
    gates: pd.DataFrame | None = None
    """One gate a line: its texts and numbers, and whether it was ``met``."""
    sweeps: pd.DataFrame | None = None
    """One setting of a swept row a line: row (as in the scores), sweep, field, value (NaN is null)."""
    marks: Mapping[str, str] = field(default_factory=dict)
    """Family -> what headings say of missed gates."""

    @property
    def swept(self) -> frozenset[str]:
        """The settings of swept rows: lines of two figures of their own, not rows of the others."""
        return frozenset(() if self.sweeps is None else self.sweeps["row"])

    def of(self, family: str) -> Supplement:
        """Return what is of one family."""
        return replace(self, selection=_of(self.selection, family), trajectory=_of(self.trajectory, family))


def _of(frame: pd.DataFrame | None, family: str) -> pd.DataFrame | None:
    if frame is None or "family" not in frame:
        return frame
    return frame[frame["family"] == family]


NOTHING = Supplement()

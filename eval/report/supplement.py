"""What a report may have beside scores: settings, checkpoints, gates, sweeps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import pandas as pd

from eval.report.ledger import Ledger
from eval.stats.fronts import Fronts


@dataclass(frozen=True, kw_only=True)
class Supplement:
    """The optional parts of a report."""

    selection: pd.DataFrame | None = None
    """One setting a line, as tried on the dev split: row, setting, selected and the dev values; with
    family where there are several."""
    trajectory: pd.DataFrame | None = None
    """The scores along trainings: family, model (a row), seed, step (0 is theta_IT, the last one the model),
    share of the steps, column, id, value."""
    gates: pd.DataFrame | None = None
    """One gate a line: its texts and numbers, and whether it was ``met``."""
    sweeps: pd.DataFrame | None = None
    """One setting of a swept row a line: row (as in the scores), sweep, field, value (NaN is null)."""
    marks: Mapping[str, str] = field(default_factory=dict)
    """Family -> what headings say of missed gates."""
    unreached: Mapping[str, Sequence[str]] = field(default_factory=dict)
    """Family -> matched rows that no setting came near enough to: they have no numbers."""
    remarks: Mapping[str, Sequence[str]] = field(default_factory=dict)
    """Family -> lines below its tables."""
    tried: pd.DataFrame | None = None
    """The samples of the dev split that fronts are made of: family, row, setting (empty: a model), seed,
    column, id, value, prompt."""
    fronts: Fronts | None = None
    """What came of them."""
    ledger: Ledger | None = None
    """The claims that are tested, and the paper's numbers that stand beside ours."""

    @property
    def swept(self) -> frozenset[str]:
        """The settings of swept rows: lines of two figures of their own, not rows of the others."""
        return frozenset(() if self.sweeps is None else self.sweeps["row"])

    def of(self, family: str) -> Supplement:
        """Return what is of one family."""
        fronts = None if self.fronts is None else self.fronts.of(family)
        selection, trajectory = _of(self.selection, family), _of(self.trajectory, family)
        return replace(self, selection=selection, trajectory=trajectory, fronts=fronts)

    def over_all(self, name: str) -> Supplement:
        """Return what is over all families, which are called ``name`` together."""
        return replace(self, fronts=None if self.fronts is None else self.fronts.of(name))


def _of(frame: pd.DataFrame | None, family: str) -> pd.DataFrame | None:
    if frame is None or "family" not in frame:
        return frame
    return frame[frame["family"] == family]


NOTHING = Supplement()

"""From what a study measured to its files."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

from ..continual import Continual
from ..tickets import Tickets
from .comparison import Comparison
from .comparison_report import comparison_study
from .continual_report import continual_study
from .document import Study
from .inside import Inside
from .inside_report import inside_study
from .publish import publish
from .sweep import Sweep
from .sweep_report import several_study, sweep_study
from .tickets_report import tickets_study

Found = Sweep | Inside | Comparison | Continual | Tickets | Mapping[str, Sweep] | Mapping[str, Continual]


def study_of(found: Found, title: str) -> Study:
    """Findings, tables and charts of what `sweep`, `inside`, `compare`, a `ContinualRun` or a `TicketSearch` found. Sweeps of several
    models by name, or runs of several strategies, make one study."""
    if isinstance(found, Sweep):
        return sweep_study(found, title=title)
    if isinstance(found, Inside):
        return inside_study(found, title=title)
    if isinstance(found, Comparison):
        return comparison_study(found, title=title)
    if isinstance(found, Tickets):
        return tickets_study(found, title=title)
    if isinstance(found, Continual) or all(isinstance(one, Continual) for one in found.values()):
        return continual_study(found, title=title)  # type: ignore[arg-type]
    return several_study(found, title=title)  # type: ignore[arg-type]


def write_report(found: Found, out: str | os.PathLike[str], *, title: str = "DARE, measured") -> Path:
    """Write what a study, a `ContinualRun` or a `TicketSearch` found as JSON, Markdown, pictures and one HTML page; and tell wandb,
    if it has an active run.

    Args:
        found: also several models' sweeps, or several strategies' runs, by name.
        out: folder. Files of the same names are replaced.
        title: of the page.

    Returns:
        The page: it opens without a network.

    Raises:
        ConfigError: matplotlib or SciPy is not installed.
    """
    return publish(study_of(found, title), out)

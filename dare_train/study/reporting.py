"""From what a study measured to its files."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ..continual import Continual
from ..errors import ConfigError
from ..rates import FoundRate
from ..subnetwork import Masks
from ..tickets import Tickets
from .comparison import Comparison
from .comparison_report import comparison_study
from .continual_report import continual_study
from .document import Study
from .inside import Inside
from .inside_report import inside_study
from .masks_report import masks_study
from .publish import publish
from .rates_report import rates_study
from .sweep import Sweep
from .sweep_report import several_study, sweep_study
from .tickets_report import tickets_study

One = Sweep | Inside | Comparison | Continual | Tickets | Masks | FoundRate
Found = One | Mapping[str, Sweep] | Mapping[str, Continual] | Mapping[str, Masks] | Mapping[str, FoundRate] | Sequence[Tickets]

_ONE: dict[type, Callable[..., Study]] = {
    Sweep: sweep_study, Inside: inside_study, Comparison: comparison_study, Continual: continual_study, Tickets: tickets_study,
    Masks: masks_study, FoundRate: rates_study,
}  # fmt: skip
_SEVERAL: dict[type, Callable[..., Study]] = {
    Sweep: several_study, Continual: continual_study, Tickets: tickets_study, Masks: masks_study, FoundRate: rates_study
}  # fmt: skip


def study_of(found: Found, title: str) -> Study:
    """Findings, tables and charts of what was found; see `write_report`."""
    if type(found) in _ONE:
        return _ONE[type(found)](found, title=title)
    several: Any = found
    kinds = {type(one) for one in (several.values() if isinstance(several, Mapping) else several)}
    if len(kinds) != 1 or not kinds <= _SEVERAL.keys():
        expected = f"one of {', '.join(kind.__name__ for kind in _ONE)}, or several of a kind by name"
        raise ConfigError("found", expected=expected, found=", ".join(sorted(kind.__name__ for kind in kinds)) or "nothing")
    return _SEVERAL[kinds.pop()](found, title=title)


def write_report(found: Found, out: str | os.PathLike[str], *, title: str = "DARE, measured") -> Path:
    """Write what was found as JSON, Markdown, pictures and one HTML page; and tell wandb, if it has an active run.

    Args:
        found: what `sweep`, `inside`, `compare`, a `ContinualRun`, a `TicketSearch`, `largest_rate` or `largest_rates` found, or masks;
            also several sweeps, runs, rates or masks by name, or a list of ticket searches that differ in their seeds.
        out: folder. Files of the same names are replaced.
        title: of the page.

    Returns:
        The page: it opens without a network.

    Raises:
        ConfigError: matplotlib or SciPy is not installed, or there is no study of what was found.
    """
    return publish(study_of(found, title), out)

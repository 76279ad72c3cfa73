"""From what a study measured to its files."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ..errors import ConfigError
from ..evaluation.measurements import alone_in
from ..parallel.staged_file import write_whole
from ..studies.comparison import Comparison
from ..studies.drop_rates import FoundRate
from ..studies.inside import Inside
from ..studies.sweep import Sweep
from ..training.continual_result import Continual
from ..training.lottery_tickets import Tickets
from ..training.subnetwork import Masks
from .comparison_report import comparison_study
from .continual_report import continual_study
from .document import Study
from .drawing import png
from .inside_report import inside_study
from .masks_report import masks_study
from .page import html
from .rates_report import rates_study
from .sweep_report import sweep_study, sweeps_study
from .tickets_report import tickets_study
from .wandb_studies import log_study

One = Sweep | Inside | Comparison | Continual | Tickets | Masks | FoundRate
Found = (
    One
    | Mapping[str, Sweep]
    | Mapping[str, Continual]
    | Mapping[str, Masks]
    | Mapping[str, FoundRate]
    | Sequence[Tickets]
)

_ONE: dict[type, Callable[..., Study]] = {
    Sweep: sweep_study, Inside: inside_study, Comparison: comparison_study, Continual: continual_study,
    Tickets: tickets_study,
    Masks: masks_study, FoundRate: rates_study,
}  # fmt: skip
_SEVERAL: dict[type, Callable[..., Study]] = {
    Sweep: sweeps_study,
    Continual: continual_study,
    Tickets: tickets_study,
    Masks: masks_study,
    FoundRate: rates_study,
}


def study_of(result: Found, title: str) -> Study:
    """Findings, tables and charts of what was found; see `write_report`."""
    if type(result) in _ONE:
        return _ONE[type(result)](result, title=title)
    several: Any = result
    kinds = {type(member) for member in (several.values() if isinstance(several, Mapping) else several)}
    if len(kinds) != 1 or not kinds <= _SEVERAL.keys():
        expected = f"one of {', '.join(kind.__name__ for kind in _ONE)}, or several of a kind by name"
        raise ConfigError(
            "found", expected=expected, found=", ".join(sorted(kind.__name__ for kind in kinds)) or "nothing"
        )
    return _SEVERAL[kinds.pop()](result, title=title)


def write_report(found: Found, out: str | os.PathLike[str], *, title: str = "DARE, measured") -> Path:
    """Write what was found as JSON, Markdown, pictures and one HTML page; and tell wandb, if it has an active
    run.

    Args:
        found: what `sweep`, `inside`, `compare`, a `ContinualRun`, a `TicketSearch`, `largest_rate` or
            `largest_rates` found, or masks; also several sweeps, runs, rates or masks by name, or a list of
            ticket searches that differ in their seeds.
        out: folder. Files of the same names are replaced.
        title: of the page.

    Returns:
        The page: it opens without a network.

    Raises:
        ConfigError: matplotlib or SciPy is not installed, or there is no study of what was found.
    """
    return write_study(study_of(found, title), out)


def write_study(study: Study, out: str | os.PathLike[str]) -> Path:
    """Write `NAME.json`, `NAME.md`, `NAME.html` and a PNG for each chart into a folder, and tell the active
    wandb run, if there is one.

    Returns:
        The page.

    Raises:
        ConfigError: matplotlib is not installed.
        OutputExists: somebody else is at work in the folder.
        StorageError: the disk is full; each file is the old one or the new one.
    """
    folder = Path(out)
    pictures = {chart.name: png(chart) for chart in study.charts}
    page = folder / f"{study.name}.html"
    with alone_in(folder):
        for name, picture in pictures.items():
            write_whole(folder / f"{name}.png", picture)
        write_whole(folder / f"{study.name}.json", study.json().encode())
        write_whole(folder / f"{study.name}.md", study.markdown().encode())
        write_whole(page, html(study, pictures).encode())
    log_study(study, {name: folder / f"{name}.png" for name in pictures}, page)
    return page

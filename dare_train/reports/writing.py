"""From what a study measured to its files."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
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

_LONGEST_NAME = 100

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
    places = {name: folder / f"{file}.png" for name, file in _file_names(pictures).items()}
    page = folder / f"{study.name}.html"
    with alone_in(folder):
        for name, picture in pictures.items():
            write_whole(places[name], picture)
        write_whole(folder / f"{study.name}.json", study.json().encode())
        write_whole(folder / f"{study.name}.md", study.markdown().encode())
        write_whole(page, html(study, pictures).encode())
    log_study(study, places, page)
    return page


def _file_names(names: Iterable[str]) -> dict[str, str]:
    """Names that files can have: those of metrics and runs are anybody's, such as `arc_easy/acc_norm`."""
    found: dict[str, str] = {}
    for name in names:
        plain = re.sub(r"[^\w.,=+ -]+", "-", name).lstrip(".")[:_LONGEST_NAME]
        found[name] = plain if plain not in found.values() else f"{plain}-{len(found)}"
    return found

"""A study's files, and what wandb is told of it."""

from __future__ import annotations

import os
from pathlib import Path

from .. import tracking
from .document import Study
from .drawing import png
from .page import html


def publish(study: Study, out: str | os.PathLike[str]) -> Path:
    """Write `NAME.json`, `NAME.md`, `NAME.html` and a PNG for each chart into a folder, and tell the active wandb run, if there is one.

    Returns:
        The page.

    Raises:
        ConfigError: matplotlib is not installed.
    """
    folder = Path(out)
    folder.mkdir(parents=True, exist_ok=True)
    pictures = {chart.name: png(chart) for chart in study.charts}
    page = folder / f"{study.name}.html"
    for name, picture in pictures.items():
        (folder / f"{name}.png").write_bytes(picture)
    (folder / f"{study.name}.json").write_text(study.json(), encoding="utf-8")
    (folder / f"{study.name}.md").write_text(study.markdown(), encoding="utf-8")
    page.write_text(html(study, pictures), encoding="utf-8")
    tracking.log_study(study, {name: folder / f"{name}.png" for name in pictures}, page)
    return page

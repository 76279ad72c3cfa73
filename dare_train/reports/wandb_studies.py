"""What wandb is told of a study, in the run that is already there."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..evaluation.wandb_run import active_run, imported_wandb
from .document import HeatMap

if TYPE_CHECKING:
    from .document import Chart, Study


def log_study(study: Study, pictures: Mapping[str, Path], page: Path) -> None:
    """Log a study to the active run: each chart as curves and as a picture, each table, the page. Nothing
    happens without one.
    """
    run = active_run()
    if run is None:
        return
    wandb = imported_wandb()
    charts = {f"{study.name}/{chart.name}": _series(wandb, chart) for chart in study.charts}
    shown = {f"{study.name}/{name}/picture": wandb.Image(str(path)) for name, path in pictures.items()}
    tables = {
        f"{study.name}/table/{number}": wandb.Table(columns=[*table.columns], data=table.cells())
        for number, table in enumerate(study.tables)
    }
    run.log(
        {
            **charts,
            **shown,
            **tables,
            f"{study.name}/page": wandb.Html(page.read_text(encoding="utf-8"), inject=False),
        }
    )
    run.summary.update({f"{study.name}/findings": list(study.findings)})


def _series(wandb: Any, chart: Chart | HeatMap) -> Any:
    if isinstance(chart, HeatMap):
        rows = [[name, *values] for name, values in zip(chart.rows, chart.values, strict=True)]
        return wandb.Table(columns=[chart.y, *chart.columns], data=rows)
    curves = chart.curves
    return wandb.plot.line_series(
        xs=[list(curve.x) for curve in curves], ys=[list(curve.y) for curve in curves],
        keys=[curve.label for curve in curves],
        title=chart.title, xname=chart.x,
    )  # fmt: skip

"""What wandb is told: of a snapshot or a study, in the run that is already there; and of a search, in a run of its own."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .errors import ConfigError
from .study.document import HeatMap

if TYPE_CHECKING:
    from .snapshot import Snapshot
    from .study.document import Chart, Study


def active_run() -> Any:
    """The wandb run of this process, or None; wandb is not imported for it."""
    wandb = sys.modules.get("wandb")
    return getattr(wandb, "run", None) if wandb is not None else None


def figures(snapshot: Snapshot) -> dict[str, float]:
    """Scalars of a snapshot: sizes in bytes, bits per parameter, density as kept/total, |δ| before rescaling, seconds waited."""
    stats = snapshot.package.stats
    return {
        "dare/bits_per_parameter": stats["bits_per_parameter"],
        "dare/package_bytes": stats["bytes"],
        "dare/compression_ratio": stats["compression_ratio"],
        "dare/density": stats["density"],
        **{f"dare/delta_{name}": value for name, value in stats["delta"].items()},
        "dare/seconds_waited": snapshot.waited,
    }


def log(snapshot: Snapshot, *, name: str, artifact: bool = True) -> None:
    """Log a snapshot to the active run; nothing happens without one.

    Figures carry `train/global_step`, as the Trainer's own do: wandb's step stays the Trainer's.
    """
    run = active_run()
    if run is None:
        return
    import wandb

    parts = {layer: part for layer, part in snapshot.magnitudes.items() if part.total}
    histograms = {f"dare/layers/{layer}": _histogram(wandb, part) for layer, part in parts.items()}
    if parts:
        from .stats import merged

        histograms["dare/delta_histogram"] = _histogram(wandb, merged(parts.values()))
    run.log({**figures(snapshot), **histograms, "train/global_step": snapshot.step})
    if artifact:
        run.log_artifact(_artifact(wandb, snapshot, name), aliases=["latest", f"step-{snapshot.step}"])


def _histogram(wandb: Any, magnitudes: Any) -> Any:
    return wandb.Histogram(np_histogram=magnitudes.histogram())


def _artifact(wandb: Any, snapshot: Snapshot, name: str) -> Any:
    manifest = snapshot.package.manifest
    metadata = {
        "base_model": manifest.base_model,
        "p": sorted({record.p for record in manifest.tensors if record.kind == "delta"}),
        "seed": manifest.seed,
        "rescale": manifest.rescale,
        "continues": manifest.continues,
        "parent_fingerprint": manifest.parent,
        "result_fingerprint": manifest.result,
        "step": snapshot.step,
        "bits_per_parameter": snapshot.package.stats["bits_per_parameter"],
    }
    artifact = wandb.Artifact(name, type="dare-package", metadata=metadata)
    artifact.add_dir(str(snapshot.package.path), policy="immutable")
    return artifact


@contextmanager
def searching(project: str | None) -> Iterator[Callable[[Any], None] | None]:
    """A wandb run that is told of a search's trials one by one; None without a project.

    Raises:
        ConfigError: wandb is not installed.
    """
    if project is None:
        yield None
        return
    wandb = _wandb()
    with wandb.init(project=project, job_type="merge-search") as run:
        trials: list[Any] = []

        def told(trial: Any) -> None:
            trials.append(trial)
            run.log({**{f"search/{name}": value for name, value in trial.settings.items()}, "search/score": trial.score})

        yield told
        if trials:
            rows = [[*trial.settings.values(), trial.score] for trial in trials]
            run.log({"search/trials": wandb.Table(columns=[*trials[0].settings, "score"], data=rows)})


@contextmanager
def studying(project: str | None) -> Iterator[None]:
    """A wandb run of its own for a study, which `log_study` finds; none without a project.

    Raises:
        ConfigError: wandb is not installed.
    """
    if project is None:
        yield
        return
    with _wandb().init(project=project, job_type="study"):
        yield


def log_study(study: Study, pictures: Mapping[str, Path], page: Path) -> None:
    """Log a study to the active run: each chart as curves and as a picture, each table, the page. Nothing happens without one."""
    run = active_run()
    if run is None:
        return
    wandb = _wandb()
    charts = {f"{study.name}/{chart.name}": _series(wandb, chart) for chart in study.charts}
    shown = {f"{study.name}/{name}/picture": wandb.Image(str(path)) for name, path in pictures.items()}
    tables = {
        f"{study.name}/table/{number}": wandb.Table(columns=[*table.columns], data=table.cells())
        for number, table in enumerate(study.tables)
    }
    run.log({**charts, **shown, **tables, f"{study.name}/page": wandb.Html(page.read_text(encoding="utf-8"), inject=False)})
    run.summary.update({f"{study.name}/findings": list(study.findings)})


def _series(wandb: Any, chart: Chart | HeatMap) -> Any:
    if isinstance(chart, HeatMap):
        rows = [[name, *values] for name, values in zip(chart.rows, chart.values, strict=True)]
        return wandb.Table(columns=[chart.y, *chart.columns], data=rows)
    curves = chart.curves
    return wandb.plot.line_series(
        xs=[list(curve.x) for curve in curves], ys=[list(curve.y) for curve in curves], keys=[curve.label for curve in curves],
        title=chart.title, xname=chart.x,
    )  # fmt: skip


def _wandb() -> Any:
    try:
        import wandb
    except ImportError as error:
        raise ConfigError("wandb", expected="wandb", found="not installed", remedy='pip install "dare_train[wandb]"') from error
    return wandb

"""A sweep as a table in Markdown and as a picture: means over masks, with the interval that the true mean is in."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from .errors import ConfigError
from .sweep import VARIANTS, Sweep

_COLOURS = ("#4c72b0", "#dd8452", "#55a868", "#c44e52", "#8172b3")
_MARKS = "osD^v"


def interval(values: Sequence[float]) -> tuple[float, float]:
    """The mean of several measurements, and half the width of its 95 % confidence interval by Student's t; 0 for one alone.

    Raises:
        ConfigError: SciPy is not installed.
    """
    if len(values) < 2:
        return values[0], 0.0
    try:
        from scipy.stats import t
    except ImportError as error:
        raise ConfigError("sweep", expected="SciPy", found="not installed", remedy='pip install "dare_train[study]"') from error
    return fmean(values), float(t.ppf(0.975, len(values) - 1)) * stdev(values) / len(values) ** 0.5


def _curves(sweep: Sweep, metric: str) -> dict[str, list[tuple[float, float, float]]]:
    """(drop rate, mean, half width) by variant, in the order of drop rates; the fine-tuned model begins each."""
    names = [name for name in VARIANTS if any(point.variant == name for point in sweep.points)]
    dense = [(0.0, value, 0.0) for value in sweep.values("dense", 0.0, metric)]
    return {
        name: [*dense, *((p, *interval(sweep.values(name, p, metric))) for p in sorted({q.p for q in sweep.points if q.variant == name}))]
        for name in names
    }


def markdown(sweep: Sweep, metric: str) -> str:
    """A row for each drop rate, a column for each variant: mean ± half width of the interval over masks."""
    curves = _curves(sweep, metric)
    rates = sorted({point.p for point in sweep.points})
    cells = {(name, p): _cell(mean, half) for name, curve in curves.items() for p, mean, half in curve}
    rows = [f"| {p:g} | " + " | ".join(cells.get((name, p), "") for name in curves) + " |" for p in rates]
    seeds = max((len(sweep.values(name, p, metric)) for name in curves for p in rates), default=0)
    head = f"| {metric} at p | " + " | ".join(VARIANTS[name].label for name in curves) + " |"
    note = f"Mean over {seeds} masks ± half of the 95 % confidence interval." if seeds > 1 else "One mask."
    return "\n".join([head, "|---|" + "---|" * len(curves), *rows, "", note]) + "\n"


def _cell(mean: float, half: float) -> str:
    return f"{mean:.4g} ± {half:.2g}" if half else f"{mean:.4g}"


def draw(sweep: Sweep, metric: str, path: Path) -> None:
    """Draw the metric against the drop rate; the format follows the file's ending.

    Raises:
        ConfigError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ConfigError("sweep", expected="matplotlib", found="not installed", remedy='pip install "dare_train[study]"') from error
    figure = Figure(figsize=(7.5, 4.8), layout="constrained")
    axis = figure.subplots()
    curves = _curves(sweep, metric)
    for (name, curve), colour, mark in zip(curves.items(), _COLOURS, _MARKS, strict=False):
        _draw_curve(axis, VARIANTS[name].label, curve, colour, mark)
    for value in sweep.values("dense", 0.0, metric):
        axis.axhline(value, color="0.4", linestyle="--", linewidth=1, label="fine-tuned, nothing dropped")
    axis.set_xlabel("drop rate p: probability that an element of the delta is dropped")
    axis.set_ylabel(metric)
    axis.grid(color="0.92")
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(frameon=False)
    axis.set_title("Bands: 95 % confidence of the mean over masks", fontsize="small", color="0.3")
    figure.suptitle(f"{metric} after dropping")
    figure.savefig(path, dpi=150, metadata={"Software": None} if path.suffix == ".png" else None)


def _draw_curve(axis: Any, label: str, curve: list[tuple[float, float, float]], colour: str, mark: str) -> None:
    rates = [p for p, _, _ in curve]
    axis.plot(rates, [mean for _, mean, _ in curve], color=colour, marker=mark, markersize=4, label=label)
    low, high = [mean - half for _, mean, half in curve], [mean + half for _, mean, half in curve]
    axis.fill_between(rates, low, high, color=colour, alpha=0.2, linewidth=0)

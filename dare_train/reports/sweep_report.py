"""What a sweep says: curves, tables, and whether the diagnosis before it was right."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

from ..evaluation.measurements import samples
from ..studies.diagnosis import DROP_RATES
from ..studies.sweep import TOLERANCE, Sweep
from ..studies.variants import DROP_VARIANTS
from .document import Chart, Curve, Study, Table, with_interval

Verdict = Literal["right", "too bold", "too careful"]

_RATE_AXIS = "drop rate p: probability that an element of the delta is dropped"
_LOWEST = -0.25
"""Share of a gain down to which curves of several models are drawn."""
_SHOWN = 0.9
"""The drop rate that findings are about, where it was measured."""


def verdict(predicted: float | None, held: float | None) -> Verdict:
    """How a prediction of the largest drop rate compares with the one that was measured; None is none."""
    if (predicted or 0.0) > (held or 0.0):
        return "too bold"
    higher = [p for p in DROP_RATES if p > (predicted or 0.0)]
    return "too careful" if higher and held is not None and held >= higher[0] else "right"


def sweep_study(sweep: Sweep, *, title: str = "How much can be dropped", name: str = "sweep") -> Study:
    """A chart and a table for each metric."""
    tables = [table for metric in sweep.metrics for table in (_table(sweep, metric),)]
    return Study(
        name=name,
        title=title,
        question="What does the model lose when a share p of its delta is dropped, by which "
        "rule, and does the mask matter?",
        findings=tuple(line for metric in sweep.metrics for line in findings(sweep, metric)),
        setup=sweep.setup,
        data=sweep.as_json(),
        tables=(*tables, _limits([("", sweep)])),
        charts=tuple(_chart(sweep, metric, name) for metric in sweep.metrics),
    )


def sweeps_study(
    sweeps: Mapping[str, Sweep], *, title: str = "When it breaks", name: str = "sweeps"
) -> Study:
    """Several fine-tuned models side by side: what is left of each one's gain under DARE, and what was
    predicted of it.
    """
    first = next(iter(sweeps.values()))
    limits = _limits([*sweeps.items()])
    verdicts = [str(row[-1]) for row in limits.rows]
    right = verdicts.count("right")
    bold = verdicts.count("too bold")
    return Study(
        name=name,
        title=title,
        question="Which of these models lose what fine-tuning gave them when their delta is "
        "dropped, and was that foreseen?",
        findings=(
            f"diagnose was right {right} times of {len(verdicts)}, too bold {bold} and too "
            f"careful {len(verdicts) - right - bold} times.",
        ),
        setup={"models": {label: dict(sweep.setup) for label, sweep in sweeps.items()}},
        data={"models": {label: sweep.as_json() for label, sweep in sweeps.items()}},
        tables=(limits,),
        charts=tuple(_shares(sweeps, metric, name) for metric in first.metrics),
    )


def findings(sweep: Sweep, metric: str) -> list[str]:
    """The metric in sentences."""
    dense = sweep.dense(metric)
    without = sweep.without(metric)
    lines = [f"Fine-tuning moved {metric} from {without:.4g} to {dense:.4g}."]
    at = [name for name in sweep.variants if sweep.values(name, _SHOWN, metric)]
    if at:
        parts = [
            f"{DROP_VARIANTS[name].label} "
            f"{with_interval(sweep.values(name, _SHOWN, metric))}{_left(sweep, name, metric)}"
            for name in at
        ]
        lines.append(f"{metric} at p = {_SHOWN:g}: {'; '.join(parts)}.")
    return lines


def _left(sweep: Sweep, name: str, metric: str) -> str:
    share = sweep.retained(name, metric).get(_SHOWN)
    return f" ({share:.0%} of the gain)" if share is not None else ""


def _chart(sweep: Sweep, metric: str, name: str) -> Chart:
    dense = sweep.dense(metric)
    seeds = _seeds(sweep)
    curves = [
        Curve.over(DROP_VARIANTS[variant].label, {0.0: [dense], **samples(sweep.points, variant, metric)})
        for variant in sweep.variants
    ]
    bands = f"Bands: 95 % confidence of the mean over {seeds} masks." if seeds > 1 else "One mask."
    shown = _shown_range([y for curve in curves for y in curve.y], dense, sweep.without(metric))
    cut = " A curve that leaves the picture goes on in the table." if shown else ""
    return Chart(
        name=f"{name}-{metric}",
        title=f"{metric} after dropping",
        caption="Each point is the fine-tuned model with that share of its delta dropped, "
        f"evaluated as a whole. {bands}{cut}",
        y_range=shown,
        x=_RATE_AXIS,
        y=metric,
        curves=tuple(curves),
        levels={"fine-tuned, nothing dropped": dense, "base, everything dropped": sweep.without(metric)},
    )


def _shown_range(values: Sequence[float], dense: float, base: float) -> tuple[float, float] | None:
    """From what is worth looking at, if some values lie far from both the fine-tuned model and the base."""
    low = min(dense, base)
    high = max(dense, base)
    room = 0.6 * (high - low)
    if not room or (min(values) >= low - 2 * room and max(values) <= high + 2 * room):
        return None
    return max(low - room, min(low, *values)), min(high + room, max(high, *values))


def _seeds(sweep: Sweep) -> int:
    return len({point.seed for point in sweep.points if point.variant in DROP_VARIANTS})


def _table(sweep: Sweep, metric: str) -> Table:
    """A row for each rate, a column for each variant."""
    rates = sorted({point.p for point in sweep.points if point.variant in DROP_VARIANTS})
    cells = [tuple(_cell(sweep.values(name, p, metric)) for name in sweep.variants) for p in rates]
    dense, without = (f"{value:.4g}" for value in (sweep.dense(metric), sweep.without(metric)))
    seeds = _seeds(sweep)
    count = len(sweep.variants)
    note = f"Mean over {seeds} masks ± half of the 95 % confidence interval." if seeds > 1 else "One mask."
    return Table(
        title=f"{metric} by drop rate",
        columns=("p", *(DROP_VARIANTS[name].label for name in sweep.variants)),
        rows=(
            ("0 (fine-tuned)", *[dense] * count),
            *((f"{p:g}", *row) for p, row in zip(rates, cells, strict=True)),
            ("1 (base)", *[without] * count),
        ),
        note=note,
    )


def _cell(values: Sequence[float]) -> str:
    return with_interval(values) if values else ""


def _limits(sweeps: Sequence[tuple[str, Sweep]]) -> Table:
    """How far DARE holds, as predicted and as measured."""
    rows = []
    for label, sweep in sweeps:
        for metric in sweep.metrics if "dare" in sweep.variants else ():
            held = sweep.holds_to("dare", metric)
            known: tuple[Any, ...] = (
                f"{sweep.without(metric):.4g} → {sweep.dense(metric):.4g}",
                _rate(sweep.predicted),
                _rate(held),
            )
            sizes = f"{sweep.delta[0]:.2g} / {sweep.delta[1]:.2g}"
            rows.append(((label,) if label else ()) + (metric, sizes, *known, verdict(sweep.predicted, held)))
    named = any(label for label, _ in sweeps)
    columns = (
        "metric",
        "|δ|: median / 99 % below",
        "base → fine-tuned",
        "p that diagnose calls safe",
        "p up to which it holds",
        "the diagnosis was",
    )
    return Table(
        title="How far DARE holds",
        columns=("model", *columns) if named else columns,
        rows=tuple(rows),
        note=f"It holds where all but {TOLERANCE:.0%} of what fine-tuning gained is left, in "
        "the mean over masks, here and at lower rates.",
    )


def _rate(p: float | None) -> str:
    return "none" if p is None else f"{p:g}"


def _shares(sweeps: Mapping[str, Sweep], metric: str, name: str) -> Chart:
    curves = []
    for label, sweep in sweeps.items():
        dense = sweep.dense(metric)
        without = sweep.without(metric)
        gain = dense - without or 1.0
        shares = {
            p: [(value - without) / gain for value in values]
            for p, values in samples(sweep.points, "dare", metric).items()
        }
        curves.append(Curve.over(label, {0.0: [1.0], **shares}))
    return Chart(
        name=f"{name}-{metric}",
        title=f"What DARE leaves of the gain in {metric}",
        caption="1 is the fine-tuned model, 0 the model without its delta; what falls far below "
        "goes on in the table. Bands: 95 % "
        "confidence of the mean over masks.",
        y_range=(_LOWEST, 1.1) if any(y < _LOWEST for curve in curves for y in curve.y) else None,
        x=_RATE_AXIS,
        y=f"share of the gain in {metric} that is left",
        curves=tuple(curves),
        levels={"what counts as holding": 1 - TOLERANCE},
    )

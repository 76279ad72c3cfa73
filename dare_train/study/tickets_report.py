"""What a search for tickets says: the metric against the weights that remain, as the classic figure draws it."""

from __future__ import annotations

from ..tickets import Kind, Level, Tickets
from .document import Chart, Curve, Study, Table

_LABELS: dict[Kind, str] = {
    "ticket": "ticket: the largest |δ|, rewound",
    "random": "as many at random",
    "shuffled": "as many in each tensor, at random",
    "reinitialised": "the ticket's, from shuffled values",
    "transferred": "another task's ticket",
}


def tickets_study(found: Tickets, *, title: str = "Lottery tickets in the delta", name: str = "tickets") -> Study:
    kinds = [kind for kind in _LABELS if any(level.kind == kind and level.number for level in found.levels)]
    metric, dense = found.metric, found.levels[0].metrics[found.metric]
    curves = tuple(_curve(_LABELS[kind], found.of(kind), metric) for kind in kinds)
    charts = [
        Chart(
            name=f"{name}-{metric}",
            title=f"{metric} of subnetworks trained by themselves",
            caption="Each point is a training of its own, in which that share of the elements changes and all others stay as in the base.",
            x="share of elements that are trained",
            y=metric,
            curves=curves,
            levels={"all elements": dense},
            log_x=True,
        )
    ]
    if any(level.curve for level in found.levels):
        charts.append(_training(found, name))
    return Study(
        name=name,
        title=title,
        question="Which few elements, trained from the start by themselves, do as well as all of them?",
        findings=tuple(_finding(found.of(kind)[-1], metric, dense) for kind in kinds),
        setup=found.setup,
        data=found.as_json(),
        tables=(_table(found, metric),),
        charts=tuple(charts),
    )


def _curve(label: str, levels: list[Level], metric: str) -> Curve:
    return Curve(label=label, x=tuple(level.density for level in levels), y=tuple(level.metrics[metric] for level in levels))


def _finding(level: Level, metric: str, dense: float) -> str:
    return f"{_LABELS[level.kind]}: {metric} {level.metrics[metric]:.4g} with {level.density:.2%} of the elements, {dense:.4g} with all."


def _table(found: Tickets, metric: str) -> Table:
    rows = tuple(
        ("all" if not level.number else _LABELS[level.kind], level.density, level.metrics[metric], _best(level, metric))
        for level in found.levels
    )
    return Table(title="Levels", columns=("trained", "share of elements", metric, "there at step"), rows=rows)


def _best(level: Level, metric: str) -> str:
    """Where the metric came first within a hundredth of where it ended: an early stop loses nothing there."""
    if not level.curve:
        return ""
    last, end = level.metrics[metric], max(level.curve)
    near = (step for step, metrics in level.curve.items() if abs(metrics[metric] - last) <= 0.01 * abs(last))
    return str(next(near, end))


def _training(found: Tickets, name: str) -> Chart:
    curves = [
        Curve(
            label=f"{'all' if not level.number else level.kind} {level.density:.1%}",
            x=tuple(map(float, level.curve)),
            y=tuple(metrics[found.metric] for metrics in level.curve.values()),
        )
        for level in found.levels
        if level.curve
    ]
    return Chart(
        name=f"{name}-training",
        title=f"{found.metric} while subnetworks train",
        caption="By the share of elements that change. Held-out examples.",
        x="steps of training",
        y=found.metric,
        curves=tuple(curves),
    )

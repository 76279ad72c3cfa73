"""What searches for tickets say: the metric, and how soon it is there, against the weights that remain, as
the classic figure has it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from statistics import fmean
from typing import Any

from ..errors import ConfigError
from ..training.lottery_tickets import Kind, Level, Tickets
from .document import Chart, Curve, Study, Table, with_interval

_LABELS: dict[Kind, str] = {
    "ticket": "ticket: the largest |δ|, rewound",
    "random": "as many at random",
    "shuffled": "as many in each tensor, at random",
    "reinitialised": "the ticket's, from shuffled values",
    "transferred": "another task's ticket",
}
_NEAR = 0.01
"""Of the metric at the end: so near to it, an early stop loses nothing."""

Same = tuple[Level, ...]
"""One level of each search."""


def tickets_study(
    given: Tickets | Sequence[Tickets], *, title: str = "Lottery tickets in the delta", name: str = "tickets"
) -> Study:
    """One search, or several of the same task from other seeds.

    Raises:
        ConfigError: there is none, or they differ in more than their seed.
    """
    searches = [given] if isinstance(given, Tickets) else [*given]
    setup = _setup(searches)
    levels = _together(searches)
    metric = searches[0].metric
    kinds = [kind for kind in _LABELS if any(same[0].kind == kind and same[0].number for same in levels)]
    dense = fmean(level.metrics[metric] for level in levels[0])
    charts = [
        Chart(
            name=f"{name}-{metric}",
            title=f"{metric} of subnetworks trained by themselves",
            caption="Each point is a training of its own, in which that share of the elements "
            "changes and all others stay as in the base." + _bands(searches),
            x="share of elements that are trained",
            y=metric,
            curves=_curves(levels, kinds, lambda level: level.metrics[metric]),
            levels={"all elements": dense},
            log_x=True,
        )
    ]
    if any(level.curve for level in levels[0]):
        charts += [
            _soon(levels, kinds, metric, name, _bands(searches)),
            _training(levels, metric, name, _bands(searches)),
        ]
    return Study(
        name=name,
        title=title,
        question="Which few elements, trained from the start by themselves, do as well as all of them?",
        findings=tuple(_finding(_of(levels, kind)[-1], metric, dense) for kind in kinds),
        setup=setup,
        data={"searches": [search.as_json() for search in searches]},
        tables=(_table(levels, metric),),
        charts=tuple(charts),
    )


def _setup(searches: Sequence[Tickets]) -> dict[str, Any]:
    """What the searches have in common, and their seeds."""
    if not searches:
        raise ConfigError("searches", expected="at least one", found="none")
    alike = [
        {name: value for name, value in search.setup.items() if name != "seed"}
        | {"trained": [f"{level.kind} {level.number}" for level in search.levels]}
        for search in searches
    ]
    for other in alike[1:]:
        if other != alike[0]:
            differing = next(name for name in alike[0] if other.get(name) != alike[0][name])
            expected = f"searches that differ in their seeds only: {differing} {alike[0][differing]}"
            raise ConfigError("searches", expected=expected, found=str(other.get(differing)))
    return {**alike[0], "seeds": [search.setup["seed"] for search in searches]}


def _together(searches: Sequence[Tickets]) -> list[Same]:
    return [*zip(*(search.levels for search in searches), strict=True)]


def _of(levels: Sequence[Same], kind: Kind) -> list[Same]:
    """From all elements down to the fewest."""
    return [same for same in levels if same[0].kind == kind or same[0].number == 0]


def _density(same: Same) -> float:
    return fmean(level.density for level in same)


def _bands(searches: Sequence[Tickets]) -> str:
    return (
        f" Mean of {len(searches)} searches; bands are 95 % confidence intervals."
        if len(searches) > 1
        else ""
    )


def _curves(
    levels: Sequence[Same], kinds: Sequence[Kind], value: Callable[[Level], float]
) -> tuple[Curve, ...]:
    return tuple(
        Curve.over(_LABELS[kind], {_density(same): [*map(value, same)] for same in _of(levels, kind)})
        for kind in kinds
    )


def _finding(same: Same, metric: str, dense: float) -> str:
    values = with_interval([level.metrics[metric] for level in same])
    return (
        f"{_LABELS[same[0].kind]}: {metric} {values} with {_density(same):.2%} of the "
        f"elements, {dense:.4g} with all."
    )


def _table(levels: Sequence[Same], metric: str) -> Table:
    rows = tuple(
        (
            "all" if not same[0].number else _LABELS[same[0].kind],
            _density(same),
            with_interval([level.metrics[metric] for level in same]),
            with_interval([*map(_step(metric), same)]) if same[0].curve else "",
        )
        for same in levels
    )
    return Table(title="Levels", columns=("trained", "share of elements", metric, "there at step"), rows=rows)


def _step(metric: str) -> Callable[[Level], float]:
    """Where the metric came first within a hundredth of where it ended: an early stop loses nothing there."""

    def step_of(level: Level) -> float:
        last = level.metrics[metric]
        end = max(level.curve)
        return next(
            (
                step
                for step, metrics in level.curve.items()
                if abs(metrics[metric] - last) <= _NEAR * abs(last)
            ),
            end,
        )

    return step_of


def _soon(levels: Sequence[Same], kinds: Sequence[Kind], metric: str, name: str, bands: str) -> Chart:
    return Chart(
        name=f"{name}-step",
        title="How soon an early stop would lose nothing",
        caption=f"The first measurement at which the {metric} is within a hundredth of where "
        f"that training ends.{bands}",
        x="share of elements that are trained",
        y="step of training",
        curves=_curves(levels, kinds, _step(metric)),
        log_x=True,
    )


def _training(levels: Sequence[Same], metric: str, name: str, bands: str) -> Chart:
    curves = [
        Curve.over(
            f"{_density(same):.1%}",
            {float(step): [level.curve[step][metric] for level in same] for step in same[0].curve},
        )
        for same in _of(levels, "ticket")
    ]
    return Chart(
        name=f"{name}-training",
        title=f"{metric} while tickets train",
        caption=f"By the share of elements that change. Held-out examples.{bands}",
        x="steps of training",
        y=metric,
        curves=tuple(curves),
    )

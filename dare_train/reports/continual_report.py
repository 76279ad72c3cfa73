"""What a sequence of tasks says: the matrix R as a heat map, and its measures."""

from __future__ import annotations

from collections.abc import Mapping
from statistics import fmean

from ..training.continual_result import Continual
from .document import Cell, Chart, Curve, HeatMap, Study, Table


def continual_study(
    found: Continual | Mapping[str, Continual], *, title: str = "Task after task", name: str = "continual"
) -> Study:
    """One run, or several of the same tasks by strategy."""
    runs = {found.strategy: found} if isinstance(found, Continual) else dict(found)
    return Study(
        name=name,
        title=title,
        question="What is known of each task after each other was learnt, and what does a task "
        "cost in bytes?",
        findings=(*(_finding(label, one) for label, one in runs.items()), *_against_joint(runs)),
        setup={"runs": {label: dict(one.setup) for label, one in runs.items()}},
        data={"runs": {label: one.as_json() for label, one in runs.items()}},
        tables=(_measures(runs), _seconds(runs)),
        charts=(_progress(runs, name), *(_matrix(label, one, name) for label, one in runs.items())),
    )


def _finding(label: str, one: Continual) -> str:
    return (
        f"{label}: mean {one.metric} {one.accuracy:.4g} in the end, {one.forgetting:.4g} "
        f"forgotten; {one.own_forgetting:.4g} with each "
        f"task's own packages; {fmean(one.bytes):,.0f} bytes a task."
    )


def _against_joint(runs: Mapping[str, Continual]) -> list[str]:
    return [
        f"{label}: {fmean(one.own) - fmean(one.joint):+.4g} against learning all at once, with "
        "each task's own packages; "
        f"{one.accuracy - fmean(one.joint):+.4g} with those of all."
        for label, one in runs.items()
        if one.joint
    ]


def _matrix(label: str, one: Continual, name: str) -> HeatMap:
    return HeatMap(
        name=f"{name}-{label}",
        title=f"{one.metric}: {label}",
        caption="Each row is the model after one more task was learnt, each column a task on "
        "held-out examples; the first row is the base.",
        x="measured on",
        y="learnt last",
        columns=one.tasks,
        rows=("(base)", *one.tasks),
        values=(one.before, *one.after),
    )


def _progress(runs: Mapping[str, Continual], name: str) -> Chart:
    first = next(iter(runs.values()))
    curves = []
    for label, one in runs.items():
        means = [fmean(row[: number + 1]) for number, row in enumerate(one.after)]
        curves.append(Curve(label=label, x=tuple(map(float, range(len(means)))), y=tuple(means)))
    return Chart(
        name=f"{name}-progress",
        title=f"Mean {first.metric} on what was learnt so far",
        caption="After each task, in the mean over that task and those before it, on held-out examples.",
        x="learnt last",
        y=f"mean {first.metric}",
        curves=tuple(curves),
        ticks=first.tasks,
        levels={"all tasks at once": fmean(first.joint)} if first.joint else {},
    )


def _measures(runs: Mapping[str, Continual]) -> Table:
    rows: list[tuple[Cell, ...]] = [
        (
            label, one.accuracy, fmean(one.own), one.backward_transfer, one.forward_transfer, one.forgetting,
            one.own_forgetting,
            round(fmean(one.bytes)),
        )
        for label, one in runs.items()
    ]  # fmt: skip
    joint = next(iter(runs.values())).joint
    if joint:
        rows.append(("(all at once)", fmean(joint), *[""] * 6))
    return Table(
        title="Measures",
        columns=(
            "strategy",
            "ACC",
            "own packages",
            "BWT",
            "FWT",
            "forgetting",
            "forgetting, own packages",
            "bytes per task",
        ),
        rows=tuple(rows),
        note="ACC: mean in the end; with own packages, where each task has the packages up to "
        "its own. BWT: mean of what became of each "
        "task since it was learnt. FWT: mean before a task was learnt, minus the base's. "
        "Forgetting: mean loss from the best that ever "
        "was; with own packages, from right after the task.",
    )


def _seconds(runs: Mapping[str, Continual]) -> Table:
    first = next(iter(runs.values()))
    rows = tuple((label, *(f"{seconds:.3f}" for seconds in one.seconds)) for label, one in runs.items())
    return Table(
        title="Seconds to switch",
        columns=("strategy", *first.tasks),
        rows=rows,
        note="A model in memory, from the base to the state after each task: packages are read, "
        "verified and applied.",
    )

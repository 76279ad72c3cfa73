"""What a sequence of tasks says: the matrix R as a heat map, and its measures."""

from __future__ import annotations

from collections.abc import Mapping
from statistics import fmean

from ..training.continual_result import Continual
from .document import Cell, Chart, Curve, HeatMap, Study, Table


def continual_study(
    given: Continual | Mapping[str, Continual], *, title: str = "Task after task", name: str = "continual"
) -> Study:
    """One run, or several of the same tasks by strategy."""
    runs = {given.strategy: given} if isinstance(given, Continual) else dict(given)
    return Study(
        name=name,
        title=title,
        question="What is known of each task after each other was learnt, and what does a task "
        "cost in bytes?",
        findings=(*(_finding(label, run) for label, run in runs.items()), *_against_joint(runs)),
        setup={"runs": {label: dict(run.setup) for label, run in runs.items()}},
        data={"runs": {label: run.as_json() for label, run in runs.items()}},
        tables=(_measures(runs), _seconds(runs)),
        charts=(_progress(runs, name), *(_matrix(label, run, name) for label, run in runs.items())),
    )


def _finding(label: str, run: Continual) -> str:
    return (
        f"{label}: mean {run.metric} {run.accuracy:.4g} in the end, {run.forgetting:.4g} "
        f"forgotten; {run.own_forgetting:.4g} with each "
        f"task's own packages; {fmean(run.bytes):,.0f} bytes a task."
    )


def _against_joint(runs: Mapping[str, Continual]) -> list[str]:
    return [
        f"{label}: {fmean(run.own) - fmean(run.joint):+.4g} against learning all at once, with "
        "each task's own packages; "
        f"{run.accuracy - fmean(run.joint):+.4g} with those of all."
        for label, run in runs.items()
        if run.joint
    ]


def _matrix(label: str, run: Continual, name: str) -> HeatMap:
    return HeatMap(
        name=f"{name}-{label}",
        title=f"{run.metric}: {label}",
        caption="Each row is the model after one more task was learnt, each column a task on "
        "held-out examples; the first row is the base.",
        x="measured on",
        y="learnt last",
        columns=run.tasks,
        rows=("(base)", *run.tasks),
        values=(run.before, *run.after),
    )


def _progress(runs: Mapping[str, Continual], name: str) -> Chart:
    first = next(iter(runs.values()))
    curves = []
    for label, run in runs.items():
        means = [fmean(row[: number + 1]) for number, row in enumerate(run.after)]
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
            label, run.accuracy, fmean(run.own), run.backward_transfer, run.forward_transfer, run.forgetting,
            run.own_forgetting,
            round(fmean(run.bytes)),
        )
        for label, run in runs.items()
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
    rows = tuple((label, *(f"{seconds:.3f}" for seconds in run.seconds)) for label, run in runs.items())
    return Table(
        title="Seconds to switch",
        columns=("strategy", *first.tasks),
        rows=rows,
        note="A model in memory, from the base to the state after each task: packages are read, "
        "verified and applied.",
    )

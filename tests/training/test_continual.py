"""Task after task: every state comes back, what is there is not learnt again, and measures are what their
formulas say.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from task_sequences import Stopped, task, trained
from tiny import refusal
from training import classifier, save_base, weights_print
from transformers import TrainerCallback

from dare_train import ContinualRun, DeltaPackage, applied, apply, merge, write_report
from dare_train.errors import CheckpointError, ConfigError
from dare_train.evaluation.model_loading import load_model
from dare_train.reports.continual_report import continual_study
from dare_train.training.continual import Strategy
from dare_train.training.continual_result import Continual

STRATEGIES: tuple[Strategy, ...] = ("sequential", "dare", "merge", "disjoint", "replay", "ewc")
OPTIONS: dict[str, dict[str, Any]] = {
    "dare": {"p": 0.8},
    "merge": {"method": "ties", "settings": {"density": 0.5}},
    "replay": {"replay": 10},
}
"""What runs of a strategy are given, so that one of them serves several tests."""


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("continual")
    classifier(save_base(folder / "encoder", layers=1)).save_pretrained(folder / "base")
    return str(folder / "base")


def made(base: str, out: Path, strategy: Strategy, tasks: int = 3, **options: Any) -> ContinualRun:
    return ContinualRun(
        base, [task(number) for number in range(tasks)], out=out, strategy=strategy, **options
    )


@dataclass(frozen=True)
class Whole:
    """A run of three tasks to its end, and the rows that each task saw."""

    run: ContinualRun
    found: Continual
    sizes: list[int]


Wholes = Callable[[Strategy], Whole]


@pytest.fixture(scope="module")
def whole(base: str, tmp_path_factory: pytest.TempPathFactory) -> Wholes:
    """One run of each strategy for all tests."""
    runs: dict[str, Whole] = {}

    def of(strategy: Strategy) -> Whole:
        if strategy not in runs:
            sizes: list[int] = []
            run = ContinualRun(
                base,
                [task(number, Counted(sizes)) for number in range(3)],
                out=tmp_path_factory.mktemp(strategy),
                strategy=strategy,
                **OPTIONS.get(strategy, {}),
            )
            runs[strategy] = Whole(run, run.run(), sizes)
        return runs[strategy]

    return of


class Counted(TrainerCallback):
    def __init__(self, sizes: list[int]) -> None:
        self._sizes = sizes

    def on_train_begin(self, *_: Any, train_dataloader: Any = None, **__: Any) -> None:
        self._sizes.append(len(train_dataloader.dataset))


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_every_state_comes_back(base: str, whole: Wholes, tmp_path: Path, strategy: Strategy) -> None:
    run, found = whole(strategy).run, whole(strategy).found
    assert found.tasks == ("task-0", "task-1", "task-2")
    assert len(set(found.states)) == 3
    model = load_model(base)
    untouched = weights_print(model)
    for number in range(3):
        with applied(model, [str(path) for path in run.at(number)]):
            assert weights_print(model) == found.states[number] == weights_print(run.model(number))
            assert (
                run.tasks[number].evaluate(model)["loss"] == found.own[number] == found.after[number][number]
            )
        apply(base, run.at(number), tmp_path / f"state-{number}")
    assert weights_print(model) == untouched
    assert found.own_forgetting == 0.0
    assert found.metric == "loss"
    assert all(found.after[number][number] < found.before[number] for number in range(3)), (
        "nothing was learnt"
    )
    assert list(found.bytes) == [DeltaPackage.open(run.package(number)).stats["bytes"] for number in range(3)]
    assert all(seconds > 0 for seconds in found.seconds)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_run_that_was_killed_ends_with_the_same_packages(
    base: str, whole: Wholes, tmp_path: Path, strategy: Strategy
) -> None:
    """Two tasks go as the first two of three, where the number of tasks has no part in it."""
    tasks, options, found = (
        3 if strategy == "disjoint" else 2,
        OPTIONS.get(strategy, {}),
        whole(strategy).found,
    )
    stopped = [task(0), task(1, Stopped(5)), task(2)][:tasks]
    killed = ContinualRun(base, stopped, out=tmp_path / "out", strategy=strategy, **options)
    with pytest.raises(KeyboardInterrupt):
        killed.run()
    trained.clear()
    again = made(base, tmp_path / "out", strategy, tasks, **options).run()
    assert trained == ["task 1", "task 2"][: tasks - 1]
    assert (again.states, again.own) == (found.states[:tasks], found.own[:tasks])
    assert again.after == tuple(row[:tasks] for row in found.after[:tasks])
    trained.clear()
    assert made(base, tmp_path / "out", strategy, tasks, **options).run().after == again.after
    assert trained == []


def test_shares_of_the_weights_do_not_touch(base: str, whole: Wholes, tmp_path: Path) -> None:
    run, found = whole("disjoint").run, whole("disjoint").found
    start = load_file(Path(base) / "model.safetensors")
    moved = []
    for number in range(3):
        apply(base, run.package(number), tmp_path / f"only-{number}")
        state = load_file(tmp_path / f"only-{number}" / "model.safetensors")
        moved.append({name: (state[name] != tensor).numpy() for name, tensor in start.items()})
    for name, tensor in start.items():
        assert not (moved[0][name] & moved[1][name]).any()
        assert not ((moved[0][name] | moved[1][name]) & moved[2][name]).any()
        assert tensor.numel() < 200 or moved[0][name].mean() < 0.45
    together = run.model(2, without=[1])
    expected = {name: tensor.clone() for name, tensor in start.items()}
    for number in (0, 2):
        state = load_file(tmp_path / f"only-{number}" / "model.safetensors")
        for name, tensor in expected.items():
            tensor[torch.from_numpy(moved[number][name])] = state[name][torch.from_numpy(moved[number][name])]
    assert all(torch.equal(together.state_dict()[name], tensor) for name, tensor in expected.items())
    assert found.own_forgetting == 0.0


def test_all_tasks_at_once_as_a_mark(base: str, tmp_path: Path) -> None:
    run = made(base, tmp_path / "out", "sequential", tasks=2)
    joint = run.joint()
    trained.clear()
    assert made(base, tmp_path / "out", "sequential", tasks=2).joint() == joint
    assert trained == []
    model = load_model(base)
    with applied(model, tmp_path / "out" / "packages" / "joint"):
        assert tuple(one.evaluate(model)["loss"] for one in run.tasks) == joint
    killed = ContinualRun(base, [task(0, Stopped(9)), task(1)], out=tmp_path / "killed")
    with pytest.raises(KeyboardInterrupt):
        killed.joint()
    again = made(base, tmp_path / "killed", "sequential", tasks=2)
    assert again.joint() == joint, "twelve steps: as many as both tasks have"
    found = replace(measured([[0.9, 0.3], [0.5, 0.8]], [0.1, 0.1]), joint=joint)
    study = continual_study(found)
    assert study.tables[0].rows[-1][:2] == ("(all at once)", pytest.approx(sum(joint) / 2))
    assert "against learning all at once" in study.findings[-1]


def test_dare_between_tasks_drops_what_a_task_changed(whole: Wholes) -> None:
    for number in range(3):
        package = DeltaPackage.open(whole("dare").run.package(number))
        assert {record.p for record in package.manifest.tensors if record.kind == "delta"} == {0.8}
        assert package.stats["density"] == pytest.approx(0.2, abs=0.02)
        assert package.manifest.seed == number


def test_merged_states_are_those_of_merge(base: str, whole: Wholes, tmp_path: Path) -> None:
    run, found = whole("merge").run, whole("merge").found
    merge(base, [run.package(0), run.package(1)], tmp_path / "merged", method="ties", density=0.5)
    assert weights_print(load_model(str(tmp_path / "merged"))) == found.states[1]


def test_merged_tasks_have_weights_of_their_own(base: str, tmp_path: Path) -> None:
    run = made(base, tmp_path / "out", "merge", tasks=2, weights={"task-1": 0.25, "task-0": 0.75})
    found = run.run()
    merge(base, [run.package(0), run.package(1)], tmp_path / "merged", weights=[0.75, 0.25])
    assert weights_print(load_model(str(tmp_path / "merged"))) == found.states[1]
    with pytest.raises(ConfigError) as caught:
        made(base, tmp_path / "out", "merge", tasks=2, weights={"task-0": 1.0})
    refusal(
        caught.value, ConfigError, "weights: expected one for each of task-0, task-1, found {'task-0': 1.0}"
    )


def test_other_arguments_of_a_task_are_another_run(base: str, tmp_path: Path) -> None:
    first, second = (replace(task(0), setup={"learning_rate": rate}) for rate in (1e-3, 1e-4))
    ContinualRun(base, [first], out=tmp_path).run()
    with pytest.raises(CheckpointError) as caught:
        ContinualRun(base, [second], out=tmp_path).run()
    text = (
        "measurements with training.task-0.learning_rate 0.0001, found some with "
        "training.task-0.learning_rate 0.001; choose another folder"
    )
    refusal(caught.value, CheckpointError, text)


def test_earlier_examples_are_seen_again(whole: Wholes) -> None:
    assert whole("replay").sizes == [48, 58, 68]


def test_elastic_weights_hold_what_mattered(base: str, whole: Wholes, tmp_path: Path) -> None:
    """Stronger anchors keep the model nearer to where it was."""
    distances = []
    for strength in (0.0, 1e6):
        run = made(base, tmp_path / f"{strength}", "ewc", tasks=2, strength=strength)
        run.run()
        first, second = (run.model(number).state_dict() for number in range(2))
        distances.append(
            sum(
                float((first[name] - second[name]).abs().sum())
                for name in first
                if first[name].is_floating_point()
            )
        )
    assert distances[1] < 0.9 * distances[0]
    plain = whole("sequential").found
    assert made(base, tmp_path / "0.0", "ewc", tasks=2, strength=0.0).run().states == plain.states[:2]


def measured(after: list[list[float]], before: list[float]) -> Continual:
    names = tuple("abc"[: len(before)])
    rows = tuple(tuple(row) for row in after)
    own = tuple(rows[number][number] for number in range(len(names)))
    return Continual(
        strategy="sequential", tasks=names, metric="accuracy", before=tuple(before), after=rows, own=own,
        bytes=(10, 20, 30)[: len(names)],
        states=names, seconds=(0.5,) * len(names),
    )  # fmt: skip


def test_measures_are_what_their_formulas_say() -> None:
    found = measured([[0.9, 0.3, 0.2], [0.95, 0.8, 0.4], [0.5, 0.6, 0.7]], [0.1, 0.1, 0.1])
    assert found.accuracy == pytest.approx((0.5 + 0.6 + 0.7) / 3)
    assert found.backward_transfer == pytest.approx(((0.5 - 0.9) + (0.6 - 0.8)) / 2)
    assert found.forward_transfer == pytest.approx(((0.3 - 0.1) + (0.4 - 0.1)) / 2)
    assert found.forgetting == pytest.approx(((0.95 - 0.5) + (0.8 - 0.6)) / 2)
    assert found.own_forgetting == 0.0
    one = measured([[0.9]], [0.1])
    assert (one.accuracy, one.backward_transfer, one.forward_transfer, one.forgetting) == (0.9, 0.0, 0.0, 0.0)


def test_the_report_has_a_heat_map_for_each_strategy(tmp_path: Path) -> None:
    found = measured([[0.9, 0.3], [0.5, 0.8]], [0.1, 0.1])
    study = continual_study({"sequential": found, "merge": found})
    assert [chart.name for chart in study.charts] == [
        "continual-progress",
        "continual-sequential",
        "continual-merge",
    ]
    assert study.charts[1].values == ((0.1, 0.1), (0.9, 0.3), (0.5, 0.8))
    assert study.findings[0].startswith(
        "sequential: mean accuracy 0.65 in the end, 0.4 forgotten; 0 with each task's own packages; 15 bytes"
    )
    page = write_report({"sequential": found, "merge": found}, tmp_path / "out", title="Trial")
    assert sorted(path.name for path in page.parent.iterdir()) == [
        "continual-merge.png", "continual-progress.png", "continual-sequential.png", "continual.html",
        "continual.json", "continual.md",
    ]  # fmt: skip
    assert np.array(study.as_json()["runs"]["merge"]["after"]).shape == (2, 2)
    assert write_report(found, tmp_path / "one").exists()


@pytest.mark.parametrize(
    ("options", "text"),
    [
        (
            dict(strategy="hope"),
            "strategy: expected one of sequential, dare, merge, disjoint, replay, ewc, found 'hope'",
        ),
        (dict(tasks=[]), "tasks: expected at least one, with names of their own, found []"),
        (dict(tasks=[task(0), task(0)]), "tasks: expected at least one, with names of their own"),
        (dict(p=1.0), "p: expected a number in [0, 1)"),
        (dict(replay=0), "replay: expected at least 1, found 0"),
        (dict(examples=1.5), "examples: expected at least 1, found 1.5"),
        (dict(strength=float("nan")), "strength: expected a number from 0, found nan"),
        (dict(seed=-1), "seed: expected an integer in [0, 2**64), found -1"),
        (
            dict(tasks=[replace(task(0), name="base")]),
            "tasks: expected no task called base or joint, or with",
        ),
        (
            dict(tasks=[replace(task(0), name="a, own")]),
            "tasks: expected no task called base or joint, or with",
        ),
        (dict(strategy="merge", method="hope"), "method: expected one of "),
        (dict(strategy="merge", method="slerp"), "method: expected a method for 1 to 1 models, found slerp"),
        (dict(strategy="merge", settings={"densty": 0.5}), "densty: expected a parameter of task_arithmetic"),
        (dict(strategy="merge", settings={"rescale": "all"}), "rescale: expected"),
        (dict(strategy="merge", weights={"0": "many"}), "weight"),
    ],
)
def test_what_means_nothing_is_refused(tmp_path: Path, options: dict[str, Any], text: str) -> None:
    given: dict[str, Any] = {"tasks": [task(0)], "out": tmp_path, **options}
    with pytest.raises(ConfigError) as caught:
        ContinualRun("base", **given)
    refusal(caught.value, ConfigError, text)


@pytest.mark.parametrize("name", ["", "..", "a/b", "a\\b", "a\nb", "x" * 101, 7])
def test_a_task_has_the_name_of_a_folder(name: Any) -> None:
    with pytest.raises(ConfigError, match="task: expected the name of a folder, of at most 100 characters"):
        replace(task(0), name=name)


def test_another_run_in_the_same_folder_is_refused(base: str, whole: Wholes) -> None:
    run = whole("sequential").run
    with pytest.raises(CheckpointError) as caught:
        made(base, run.out, "dare").run()
    refusal(
        caught.value,
        CheckpointError,
        "continual.json: expected measurements with strategy dare, found some with strategy sequential",
    )
    for options, text in (
        (dict(task=3), "task: expected 0 to 2, found 3"),
        (dict(task=0, without=[0]), "without: expected packages side by side"),
    ):
        with pytest.raises(ConfigError) as refused:
            run.at(**options)  # type: ignore[arg-type]
        refusal(refused.value, ConfigError, text)

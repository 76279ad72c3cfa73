"""Task after task: every state comes back, what is there is not learnt again, and measures are what their
formulas say.
"""

from __future__ import annotations

from dataclasses import replace
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


@pytest.fixture
def base(tmp_path: Path) -> str:
    model = classifier(save_base(tmp_path / "encoder"))
    model.save_pretrained(tmp_path / "base")
    return str(tmp_path / "base")


def made(base: str, out: Path, strategy: Strategy, tasks: int = 3, **options: Any) -> ContinualRun:
    return ContinualRun(
        base, [task(number) for number in range(tasks)], out=out, strategy=strategy, **options
    )


STRATEGIES: tuple[Strategy, ...] = ("sequential", "dare", "merge", "disjoint", "replay", "ewc")


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_every_state_comes_back(base: str, tmp_path: Path, strategy: Strategy) -> None:
    run = made(base, tmp_path / "out", strategy)
    found = run.run()
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
    base: str, tmp_path: Path, strategy: Strategy
) -> None:
    whole = made(base, tmp_path / "whole", strategy, tasks=2).run()
    killed = ContinualRun(base, [task(0), task(1, Stopped(5))], out=tmp_path / "killed", strategy=strategy)
    with pytest.raises(KeyboardInterrupt):
        killed.run()
    trained.clear()
    again = made(base, tmp_path / "killed", strategy, tasks=2).run()
    assert trained == ["task 1"]
    assert (again.states, again.after, again.own) == (whole.states, whole.after, whole.own)
    trained.clear()
    assert made(base, tmp_path / "killed", strategy, tasks=2).run().after == whole.after
    assert trained == []


def test_shares_of_the_weights_do_not_touch(base: str, tmp_path: Path) -> None:
    run = made(base, tmp_path / "out", "disjoint")
    found = run.run()
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
    found = replace(run.run(), joint=joint)
    study = continual_study(found)
    assert study.tables[0].rows[-1][:2] == ("(all at once)", pytest.approx(sum(joint) / 2))
    assert "against learning all at once" in study.findings[-1]


def test_dare_between_tasks_drops_what_a_task_changed(base: str, tmp_path: Path) -> None:
    run = made(base, tmp_path / "out", "dare", tasks=2, p=0.8)
    run.run()
    for number in range(2):
        package = DeltaPackage.open(run.package(number))
        assert {record.p for record in package.manifest.tensors if record.kind == "delta"} == {0.8}
        assert package.stats["density"] == pytest.approx(0.2, abs=0.02)
        assert package.manifest.seed == number


def test_merged_states_are_those_of_merge(base: str, tmp_path: Path) -> None:
    run = made(base, tmp_path / "out", "merge", tasks=2, method="ties", settings={"density": 0.5})
    found = run.run()
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


def test_earlier_examples_are_seen_again(base: str, tmp_path: Path) -> None:
    sizes: list[int] = []

    class Counted(TrainerCallback):
        def on_train_begin(self, *_: Any, train_dataloader: Any = None, **__: Any) -> None:
            sizes.append(len(train_dataloader.dataset))

    run = ContinualRun(
        base,
        [task(number, Counted()) for number in range(3)],
        out=tmp_path / "out",
        strategy="replay",
        replay=10,
    )
    run.run()
    assert sizes == [48, 58, 68]


def test_elastic_weights_hold_what_mattered(base: str, tmp_path: Path) -> None:
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
    plain = made(base, tmp_path / "plain", "sequential", tasks=2).run()
    assert made(base, tmp_path / "0.0", "ewc", tasks=2, strength=0.0).run().states == plain.states


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
        (dict(replay=0), "replay, examples and strength: expected positive numbers"),
    ],
)
def test_what_means_nothing_is_refused(tmp_path: Path, options: dict[str, Any], text: str) -> None:
    given: dict[str, Any] = {"tasks": [task(0)], "out": tmp_path, **options}
    with pytest.raises(ConfigError) as caught:
        ContinualRun("base", **given)
    refusal(caught.value, ConfigError, text)


def test_another_run_in_the_same_folder_is_refused(base: str, tmp_path: Path) -> None:
    run = made(base, tmp_path / "out", "sequential", tasks=1)
    run.run()
    with pytest.raises(CheckpointError) as caught:
        made(base, tmp_path / "out", "dare", tasks=1).run()
    refusal(
        caught.value,
        CheckpointError,
        "continual.json: expected measurements with strategy dare, found some with strategy sequential",
    )
    for options, text in (
        (dict(task=3), "task: expected 0 to 0, found 3"),
        (dict(task=0, without=[0]), "without: expected packages side by side"),
    ):
        with pytest.raises(ConfigError) as refused:
            run.at(**options)  # type: ignore[arg-type]
        refusal(refused.value, ConfigError, text)

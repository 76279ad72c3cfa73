"""Sweeps: each point has the weights that its rule gives, the model comes back, and what was measured is not measured again."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import matplotlib.image
import numpy as np
import pytest
import torch
from scipy import stats
from tiny import refusal
from training import classifier, examples, save_base, weights_print

from dare_train import applied, extract, sweep
from dare_train.errors import CheckpointError, ConfigError
from dare_train.sweep import Point, Sweep
from dare_train.sweep_report import interval, markdown

State = dict[str, torch.Tensor]
HEAD = "classifier.weight"
KEY = "bert.encoder.layer.0.attention.self.key.weight"


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return save_base(tmp_path / "base")


def tuned_model(base: Path, seed: int = 1, dtype: torch.dtype = torch.float32) -> torch.nn.Module:
    model, generator = classifier(base, dtype=dtype), torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += (0.02 * torch.randn(parameter.shape, generator=generator)).to(dtype)
    return model.eval()


def state_of(model: torch.nn.Module) -> State:
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


class Seen:
    """An evaluation that remembers the weights it saw."""

    def __init__(self) -> None:
        self.states: list[State] = []
        self.prints: list[str] = []

    def __call__(self, model: torch.nn.Module) -> dict[str, float]:
        self.states.append(state_of(model))
        self.prints.append(weights_print(model))
        return {"loss": float(len(self.states)), "norm": float(sum(p.detach().double().norm() for p in model.parameters()))}


def distance(model: torch.nn.Module) -> float:
    return float(sum(p.detach().double().abs().sum() for p in model.parameters()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_points_are_those_of_packages(base: Path, tmp_path: Path, dtype: torch.dtype) -> None:
    """`dare` and `drop_only` have the weights that packages of that rate and seed give; the head stays, and all comes back."""
    model, seen = tuned_model(base, dtype=dtype), Seen()
    before = weights_print(model)
    found = sweep(model, base, seen, out=tmp_path / "out", p=[0.9, 0, 0.5], seeds=2, first_seed=3, variants=["dare", "drop_only"])
    keys = [("dense", 0.0, 0), *((name, p, seed) for name in ("dare", "drop_only") for p in (0.5, 0.9) for seed in (3, 4))]
    assert [point.key for point in found.points] == keys
    assert weights_print(model) == before == seen.prints[0]
    assert found.tuned == before
    assert found.values("dare", 0.9, "loss") == [4.0, 5.0]
    start = {name: tensor for name, tensor in state_of(classifier(base, dtype=dtype)).items() if not name.startswith("classifier")}
    for (name, p, seed), expected in list(zip(keys, seen.prints, strict=True))[1:]:
        options: dict[str, Any] = dict(p=p, seed=seed, values="exact", rescale="paper" if name == "dare" else "none")
        package = extract(start, model, tmp_path / f"{name}-{p}-{seed}", **options)
        as_base = classifier(base, dtype=dtype)
        with torch.no_grad():
            for own, other in zip(as_base.parameters(), model.parameters(), strict=True):
                own.copy_(other) if own.shape[0] == 3 else None
        with applied(as_base, package):
            assert weights_print(as_base) == expected
    assert all(torch.equal(state[HEAD], seen.states[0][HEAD]) for state in seen.states)


def test_magnitude_pruning_and_dropping_weights_themselves(base: Path, tmp_path: Path) -> None:
    model, seen = tuned_model(base), Seen()
    found = sweep(model, base, seen, out=tmp_path / "out", p=[0.5], seeds=2, variants=["magnitude", "weights"])
    assert [point.key for point in found.points] == [("magnitude", 0.5, 0), ("weights", 0.5, 0), ("weights", 0.5, 1)]
    start, end = state_of(classifier(base))[KEY].numpy(), state_of(model)[KEY].numpy()
    delta = end - start
    smallest_kept = np.sort(np.abs(delta).ravel())[-delta.size // 2]
    np.testing.assert_allclose(seen.states[0][KEY].numpy(), np.where(np.abs(delta) >= smallest_kept, end, start), rtol=0, atol=1e-7)
    for seed, state in enumerate(seen.states[1:]):
        kept = state[KEY].numpy() != 0
        assert kept.mean() == pytest.approx(0.5, abs=0.06)
        np.testing.assert_allclose(state[KEY].numpy()[kept], 2 * end[kept], rtol=1e-6)
        package = extract(start_of(end), {"w": torch.from_numpy(end)}, tmp_path / f"{seed}", p=0.5, seed=seed)
        assert package.records["w"].kept > 0
    assert not np.array_equal(seen.states[1][KEY] != 0, seen.states[2][KEY] != 0)


def start_of(end: np.ndarray) -> State:
    return {"w": torch.zeros(end.shape)}


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_a_failing_evaluation_leaves_the_model_as_it_was_and_the_points_before_it(
    base: Path, tmp_path: Path, error: type[BaseException]
) -> None:
    model, calls = tuned_model(base), []
    before = weights_print(model)

    def fails(model: torch.nn.Module) -> float:
        calls.append(model)
        if len(calls) == 4:
            raise error
        return distance(model)

    options: dict[str, Any] = dict(out=tmp_path / "out", p=[0, 0.5, 0.9], seeds=3, variants=["dare"])
    with pytest.raises(error):
        sweep(model, base, fails, **options)
    assert weights_print(model) == before
    with (tmp_path / "out/sweep.jsonl").open("a") as file:
        file.write('{"variant": "dare", "p": 0.5, "se')  # a process that died while it wrote
    told: list[tuple[int, int]] = []
    counted: list[float] = []
    found = sweep(model, base, lambda m: counted.append(distance(m)) or counted[-1], progress=lambda *at: told.append(at), **options)
    assert len(counted) == 7 - 3
    assert told[-1] == (7, 7)
    whole = sweep(model, base, distance, **{**options, "out": tmp_path / "whole"})
    assert whole.points == found.points
    assert (tmp_path / "out/sweep.json").read_bytes() == (tmp_path / "whole/sweep.json").read_bytes()


def test_more_points_of_the_same_model_are_added(base: Path, tmp_path: Path) -> None:
    model = tuned_model(base)
    sweep(model, base, distance, out=tmp_path / "out", p=[0.5], seeds=1, variants=["dare"])
    seen = Seen()
    evaluate = lambda m: seen(m)["norm"]  # noqa: E731
    found = sweep(model, base, evaluate, out=tmp_path / "out", p=[0.5, 0.7], seeds=2, variants=["dare"])
    assert len(seen.states) == 3
    assert [point.key[1:] for point in found.points] == [(0.5, 0), (0.5, 1), (0.7, 0), (0.7, 1)]
    with pytest.raises(CheckpointError) as caught:
        sweep(tuned_model(base, seed=2), base, distance, out=tmp_path / "out", p=[0.5], seeds=1)
    refusal(caught.value, CheckpointError, "sweep.jsonl: expected a sweep of", "found one of a model", "choose another folder")


def test_weights_on_disk_are_the_models_or_refused(base: Path, tmp_path: Path) -> None:
    model = tuned_model(base)
    model.save_pretrained(tmp_path / "tuned")
    options: dict[str, Any] = dict(p=[0, 0.9], seeds=1, variants=["dare", "norm"])
    copied = sweep(model, base, distance, out=tmp_path / "a", **options)
    assert sweep(model, base, distance, out=tmp_path / "b", tuned=tmp_path / "tuned", **options).points == copied.points
    with pytest.raises(CheckpointError, match="expected the weights that the model has, found others"):
        sweep(tuned_model(base, seed=2), base, distance, out=tmp_path / "c", tuned=tmp_path / "tuned", **options)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        (dict(seeds=0), "seeds: expected at least 1, found 0"),
        (dict(variants=["dear"]), "variants: expected one of dare, drop_only, magnitude, weights, norm, found 'dear'"),
        (dict(variants=[]), "variants: expected at least one"),
        (dict(p=[]), "p: expected at least one"),
        (dict(p=[1.0]), "p: expected a number in [0, 1), found 1.0"),
        (dict(evaluate=lambda model: float("nan")), "evaluate: expected a finite number, or several by name, found nan"),
        (dict(evaluate=lambda model: {}), "evaluate: expected a finite number"),
        (dict(evaluate=lambda model: "good"), "evaluate: expected a finite number"),
    ],
)
def test_what_means_nothing_is_refused(base: Path, tmp_path: Path, options: dict[str, Any], text: str) -> None:
    model = tuned_model(base)
    with pytest.raises(ConfigError) as caught:
        sweep(model, base, **{"evaluate": distance, "out": tmp_path / "out", "p": [0.5], "seeds": 1, **options})
    refusal(caught.value, ConfigError, text)


def test_intervals_are_students() -> None:
    values = [0.5, 0.7, 0.6, 0.65]
    low, high = stats.t.interval(0.95, 3, loc=np.mean(values), scale=stats.sem(values))
    mean, half = interval(values)
    assert (mean - half, mean + half) == pytest.approx((low, high))
    assert interval([0.25]) == (0.25, 0.0)


def test_the_table_has_a_row_for_each_rate() -> None:
    points = [Point(variant="dense", p=0.0, seed=0, metrics={"accuracy": 0.9})]
    points += [Point(variant="dare", p=0.5, seed=n, metrics={"accuracy": 0.8 + n / 10}) for n in range(2)]
    points += [Point(variant="magnitude", p=0.5, seed=0, metrics={"accuracy": 0.25})]
    table = markdown(Sweep(base="", tuned="", points=tuple(points)), "accuracy")
    assert table.splitlines()[:4] == [
        "| accuracy at p | DARE | magnitude pruning |", "|---|---|---|", "| 0 | 0.9 | 0.9 |", "| 0.5 | 0.85 ± 0.64 | 0.25 |",
    ]  # fmt: skip
    assert "Mean over 2 masks ± half of the 95 % confidence interval." in table


METRIC = """
import torch
from training import examples

def accuracy(model):
    rows = examples()
    with torch.no_grad():
        found = model(input_ids=torch.tensor([row["input_ids"] for row in rows])).logits.argmax(-1)
    return {"accuracy": float((found == torch.tensor([row["labels"] for row in rows])).float().mean())}
"""


def test_the_command_measures_draws_and_goes_on(base: Path, tmp_path: Path) -> None:
    assert examples()
    tuned_model(base).save_pretrained(tmp_path / "tuned")
    (tmp_path / "metrics.py").write_text(f"import sys\nsys.path.insert(0, {str(Path(__file__).parent)!r})\n{METRIC}")
    words = ["base", "tuned", "--eval", "metrics:accuracy", "--p", "0,0.5,0.9", "--seeds", "2"]

    def run(*more: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "dare_train", "sweep", *words, *more]
        return subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path)

    done = run("--out", "one")
    assert done.returncode == 0, done.stderr
    assert "| accuracy at p | DARE | drop only | magnitude pruning | DARE on the weights themselves |" in done.stdout
    assert (tmp_path / "one/accuracy.md").read_text() in done.stdout
    picture = matplotlib.image.imread(tmp_path / "one/accuracy.png")
    assert picture.shape[0] > 500
    assert len(np.unique(picture.reshape(-1, picture.shape[2]), axis=0)) > 10
    again = run("--out", "one")
    assert again.stdout == done.stdout
    assert run("--out", "two").returncode == 0
    for name in ("sweep.json", "accuracy.md", "accuracy.png"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()
    points = json.loads((tmp_path / "one/sweep.json").read_text())["points"]
    assert len(points) == 1 + 2 * 2 + 2 * 2 + 2 + 2 * 2
    wrong = run("--out", "three", "--variants", "dear")
    assert (wrong.returncode, wrong.stderr.count("\n")) == (2, 1)

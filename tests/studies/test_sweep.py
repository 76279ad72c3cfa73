"""Sweeps: each point has the weights that its rule gives, the model comes back, and what was measured is not
measured again.
"""

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
from commands import Done, dare_train
from scipy import stats
from studying import tuned_model
from tiny import refusal
from training import classifier, examples, save_base, weights_print

from dare_train import applied, extract, sweep, write_report
from dare_train.errors import CheckpointError, ConfigError
from dare_train.evaluation.measurements import Point
from dare_train.merging.statistics.fisher_and_gram import collect_gram
from dare_train.merging.statistics.statistics_file import save_statistics
from dare_train.reports.document import interval
from dare_train.reports.sweep_report import sweep_study, sweeps_study, verdict
from dare_train.studies.sweep import Sweep
from dare_train.studies.variants import DROP_VARIANTS, dropped_weights

State = dict[str, torch.Tensor]
HEAD = "classifier.weight"
KEY = "bert.encoder.layer.0.attention.self.key.weight"


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return save_base(tmp_path / "base", layers=1)


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
        return {
            "loss": float(len(self.states)),
            "norm": float(sum(p.detach().double().norm() for p in model.parameters())),
        }


def distance(model: torch.nn.Module) -> float:
    return float(sum(p.detach().double().abs().sum() for p in model.parameters()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_points_are_those_of_packages(base: Path, tmp_path: Path, dtype: torch.dtype) -> None:
    """`dare` and `drop_only` have the weights that packages of that rate and seed give; the head stays, and
    all comes back.
    """
    model, seen = tuned_model(base, dtype=dtype), Seen()
    before = weights_print(model)
    found = sweep(
        model,
        base,
        seen,
        out=tmp_path / "out",
        p=[0.9, 0, 0.5],
        seeds=2,
        first_seed=3,
        variants=["dare", "drop_only"],
    )
    keys = [
        ("dense", 0.0, 0),
        ("base", 1.0, 0),
        *((name, p, seed) for name in ("dare", "drop_only") for p in (0.5, 0.9) for seed in (3, 4)),
    ]
    assert [point.key for point in found.points] == keys
    assert weights_print(model) == before == seen.prints[0]
    assert found.tuned == before
    assert found.values("dare", 0.9, "loss") == [5.0, 6.0]
    start = {
        name: tensor
        for name, tensor in state_of(classifier(base, dtype=dtype)).items()
        if not name.startswith("classifier")
    }
    assert all(torch.equal(seen.states[1][name], tensor) for name, tensor in start.items())
    for (name, p, seed), expected in list(zip(keys, seen.prints, strict=True))[2:]:
        options: dict[str, Any] = dict(
            p=p, seed=seed, values="exact", rescale="paper" if name == "dare" else "none"
        )
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
    found = sweep(
        model, base, seen, out=tmp_path / "out", p=[0.5], seeds=2, variants=["magnitude", "weights"]
    )
    assert [point.key for point in found.points][2:] == [
        ("magnitude", 0.5, 0),
        ("weights", 0.5, 0),
        ("weights", 0.5, 1),
    ]
    del seen.states[:2]
    start, end = state_of(classifier(base))[KEY].numpy(), state_of(model)[KEY].numpy()
    delta = end - start
    smallest_kept = np.sort(np.abs(delta).ravel())[-delta.size // 2]
    np.testing.assert_allclose(
        seen.states[0][KEY].numpy(), np.where(np.abs(delta) >= smallest_kept, end, start), rtol=0, atol=1e-7
    )
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
    found = sweep(
        model,
        base,
        lambda m: counted.append(distance(m)) or counted[-1],
        progress=lambda *at: told.append(at),
        **options,
    )
    assert len(counted) == 8 - 3
    assert told[-1] == (8, 8)
    whole = sweep(model, base, distance, **{**options, "out": tmp_path / "whole"})
    assert whole.points == found.points
    for result, folder in ((found, "out"), (whole, "whole")):
        write_report(result, tmp_path / folder)
    for name in ("sweep.json", "sweep.md", "sweep.html", "sweep-metric.png"):
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_more_points_of_the_same_model_are_added(base: Path, tmp_path: Path) -> None:
    model = tuned_model(base)
    sweep(model, base, distance, out=tmp_path / "out", p=[0.5], seeds=1, variants=["dare"])
    seen = Seen()
    evaluate = lambda m: seen(m)["norm"]  # noqa: E731
    found = sweep(model, base, evaluate, out=tmp_path / "out", p=[0.5, 0.7], seeds=2, variants=["dare"])
    assert len(seen.states) == 3
    assert [point.key[1:] for point in found.points][2:] == [(0.5, 0), (0.5, 1), (0.7, 0), (0.7, 1)]
    with pytest.raises(CheckpointError) as caught:
        sweep(tuned_model(base, seed=2), base, distance, out=tmp_path / "out", p=[0.5], seeds=1)
    refusal(
        caught.value,
        CheckpointError,
        "sweep.jsonl: expected a study of",
        "found one of a model",
        "choose another folder",
    )
    with pytest.raises(CheckpointError) as caught:
        sweep(model, base, distance, out=tmp_path / "out", p=[0.5], seeds=1, setup={"data": "others"})
    text = (
        "sweep.jsonl: expected measurements with data others, found some without data; choose another folder"
    )
    refusal(caught.value, CheckpointError, text)


def test_weights_on_disk_are_the_models_or_refused(base: Path, tmp_path: Path) -> None:
    model = tuned_model(base)
    model.save_pretrained(tmp_path / "tuned")
    options: dict[str, Any] = dict(p=[0, 0.9], seeds=1, variants=["dare", "norm"])
    copied = sweep(model, base, distance, out=tmp_path / "a", **options)
    assert (
        sweep(model, base, distance, out=tmp_path / "b", tuned=tmp_path / "tuned", **options).points
        == copied.points
    )
    with pytest.raises(CheckpointError, match="expected the weights that the model has, found others"):
        sweep(
            tuned_model(base, seed=2), base, distance, out=tmp_path / "c", tuned=tmp_path / "tuned", **options
        )


@pytest.mark.parametrize(
    ("options", "text"),
    [
        (dict(seeds=0), "seeds: expected 1 to 10,000, found 0"),
        (dict(seeds=10**20), "seeds: expected 1 to 10,000, found 10000000000"),
        (
            dict(seeds=2, first_seed=(1 << 64) - 1),
            "first_seed + seeds - 1: expected an integer in [0, 2**64), found 1844674407",
        ),
        (
            dict(variants=["dear"]),
            "variants: expected one of dare, drop_only, magnitude, weights, norm, q, found 'dear'",
        ),
        (dict(variants=[]), "variants: expected at least one"),
        (dict(p=[]), "p: expected a drop rate above 0, found []"),
        (dict(p=[0]), "p: expected a drop rate above 0, found [0]"),
        (dict(p=[1.0]), "p: expected a number in [0, 1), found 1.0"),
        (
            dict(variants=["q"]),
            "batches: expected some, from which the variant q works out its factors, found none",
        ),
        (
            dict(evaluate=lambda model: float("nan")),
            "evaluate: expected a finite number, or several by name, found nan",
        ),
        (dict(evaluate=lambda model: {}), "evaluate: expected a finite number"),
        (dict(evaluate=lambda model: "good"), "evaluate: expected a finite number"),
    ],
)
def test_what_means_nothing_is_refused(
    base: Path, tmp_path: Path, options: dict[str, Any], text: str
) -> None:
    model = tuned_model(base)
    with pytest.raises(ConfigError) as caught:
        sweep(
            model, base, **{"evaluate": distance, "out": tmp_path / "out", "p": [0.5], "seeds": 1, **options}
        )
    refusal(caught.value, ConfigError, text)


def test_intervals_are_students() -> None:
    values = [0.5, 0.7, 0.6, 0.65]
    low, high = stats.t.interval(0.95, 3, loc=np.mean(values), scale=stats.sem(values))
    mean, half = interval(values)
    assert (mean - half, mean + half) == pytest.approx((low, high))
    assert interval([0.25]) == (0.25, 0.0)


def test_q_has_each_layers_own_factor(base: Path, tmp_path: Path) -> None:
    model, seen = tuned_model(base), Seen()
    batches = [{"input_ids": torch.tensor([row["input_ids"] for row in examples()])}]
    sweep(model, base, seen, out=tmp_path / "out", p=[0.9], seeds=1, variants=["q", "dare"], batches=batches)
    gram = save_statistics(tmp_path / "gram.safetensors", "gram", collect_gram(model, batches), examples=48)
    expected = dropped_weights(base, model, DROP_VARIANTS["q"], p=0.9, seed=0, gram=gram)
    q, dare, start = (
        state[KEY].numpy().reshape(-1)
        for state in (seen.states[2], seen.states[3], state_of(classifier(base)))
    )
    assert np.array_equal(q.view(np.uint32), expected.read(KEY, 0, q.size))
    kept = dare != start
    factors = (q - start)[kept] / (dare - start)[kept]
    np.testing.assert_allclose(factors, np.median(factors), rtol=1e-2)
    assert 0.1 < np.median(factors) < 0.9


def swept(predicted: float | None = 0.5, **metrics: dict[tuple[str, float], list[float]]) -> Sweep:
    """A sweep with these values, by variant and rate."""
    (name, values), *_ = metrics.items()
    points = [
        Point(variant=one, p=p, seed=n, metrics={name: x})
        for (one, p), found in values.items()
        for n, x in enumerate(found)
    ]
    return Sweep(base="b", tuned="t", points=tuple(points), predicted=predicted, delta=(0.001, 0.004, 0.01))


ENDS = {("dense", 0.0): [0.9], ("base", 1.0): [0.1]}


def test_the_report_has_a_row_for_each_rate() -> None:
    found = swept(accuracy={**ENDS, ("dare", 0.5): [0.8, 0.9], ("magnitude", 0.5): [0.25]})
    study = sweep_study(found)
    rates, limits = study.tables
    assert rates.markdown().splitlines()[2:7] == [
        "| p | DARE | magnitude pruning |", "| --- | --- | --- |", "| 0 (fine-tuned) | 0.9 | 0.9 |",
        "| 0.5 | 0.85 ± 0.64 | 0.25 |",
        "| 1 (base) | 0.1 | 0.1 |",
    ]  # fmt: skip
    assert "Mean over 2 masks ± half of the 95 % confidence interval." in rates.note
    assert limits.rows == (("accuracy", "0.001 / 0.004", "0.1 → 0.9", "0.5", "none", "too bold"),)
    (chart,) = study.charts
    assert [curve.label for curve in chart.curves] == ["DARE", "magnitude pruning"]
    assert chart.curves[0].y == (0.9, pytest.approx(0.85))
    assert chart.levels == {"fine-tuned, nothing dropped": 0.9, "base, everything dropped": 0.1}
    assert study.findings[0] == "Fine-tuning moved accuracy from 0.1 to 0.9."


@pytest.mark.parametrize(("dense", "base"), [(0.9, 0.1), (0.1, 0.9)])
def test_what_is_left_of_the_gain(dense: float, base: float) -> None:
    """Whether more is better or less: the first rate that loses too much ends what holds, whatever comes
    after.
    """
    shares = {0.5: 0.97, 0.7: 1.01, 0.9: 0.94, 0.95: 0.99}
    values = {("dare", p): [base + share * (dense - base)] * 2 for p, share in shares.items()}
    found = swept(metric={("dense", 0.0): [dense], ("base", 1.0): [base], **values})
    assert found.retained("dare", "metric") == pytest.approx(shares)
    assert found.holds_to("dare", "metric") == 0.7
    assert found.holds_to("dare", "metric", tolerance=0.1) == 0.95
    assert found.holds_to("dare", "metric", tolerance=0.01) is None


@pytest.mark.parametrize(
    ("predicted", "held", "expected"),
    [
        (0.9, 0.9, "right"), (0.9, 0.8, "too bold"), (0.5, None, "too bold"), (0.9, 0.95, "too careful"),
        (0.9, 0.93, "right"),
        (None, None, "right"), (None, 0.4, "right"), (None, 0.5, "too careful"), (0.99, 0.99, "right"),
    ],
)  # fmt: skip
def test_predictions_are_judged(predicted: float | None, held: float | None, expected: str) -> None:
    assert verdict(predicted, held) == expected


def test_several_models_are_counted() -> None:
    good = swept(0.9, accuracy={**ENDS, ("dare", 0.5): [0.9], ("dare", 0.9): [0.88]})
    bad = swept(0.9, accuracy={**ENDS, ("dare", 0.5): [0.9], ("dare", 0.9): [0.2]})
    study = sweeps_study({"good": good, "bad": bad})
    assert study.findings == ("diagnose was right 1 times of 2, too bold 1 and too careful 0 times.",)
    assert [row[0] for row in study.tables[0].rows] == ["good", "bad"]
    assert study.charts[0].curves[1].y == pytest.approx((1.0, 1.0, 0.125))


def test_a_curve_that_leaves_the_picture_does_not_flatten_the_others() -> None:
    wild = {("dare", 0.9): [0.88], ("weights", 0.9): [160.0]}
    (chart,) = sweep_study(swept(loss={**ENDS, **wild})).charts
    assert chart.y_range == pytest.approx((0.1, 1.38))
    assert "goes on in the table" in chart.caption


HELPERS = str(Path(__file__).parents[1] / "helpers")
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
    (tmp_path / "metrics.py").write_text(f"import sys\nsys.path.insert(0, {HELPERS!r})\n{METRIC}")
    words = ["base", "tuned", "--eval", "metrics:accuracy", "--p", "0,0.5,0.9", "--seeds", "2"]

    def run(*more: str) -> Done:
        return dare_train("sweep", *words, *more, cwd=tmp_path)

    done = run("--out", "one", "--variants", "dare,drop_only")
    assert done.returncode == 0, done.stderr
    assert "| p | DARE | drop only |" in done.stdout
    assert (tmp_path / "one/sweep.md").read_text() in done.stdout
    assert "| accuracy |" in done.stdout
    picture = matplotlib.image.imread(tmp_path / "one/sweep-accuracy.png")
    assert picture.shape[0] > 500
    assert len(np.unique(picture.reshape(-1, picture.shape[2]), axis=0)) > 10
    again = run("--out", "one", "--variants", "dare,drop_only")
    assert again.stdout == done.stdout
    started = [sys.executable, "-m", "dare_train", "sweep", *words]  # anew: sets have another order there
    subprocess.run([*started, "--out", "two", "--variants", "dare,drop_only"], check=True, cwd=tmp_path)
    for name in ("sweep.json", "sweep.md", "sweep-accuracy.png", "sweep.html"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()
    found = json.loads((tmp_path / "one/sweep.json").read_text())
    assert len(found["points"]) == 2 + 2 * 2 + 2 * 2
    assert found["setup"]["eval"] == "metrics:accuracy"
    assert (
        found["setup"]["torch"] == torch.__version__.partition("+")[0]
        or found["setup"]["torch"] == torch.__version__
    )
    wrong = run("--out", "three", "--variants", "dear")
    assert (wrong.returncode, wrong.stderr.count("\n")) == (2, 1)
    nothing = run_without_eval(tmp_path)
    assert (nothing.returncode, nothing.stderr) == (
        2,
        "dare-train: --eval: expected MODULE:FUNCTION, or a file of texts as --data, found neither\n",
    )


def run_without_eval(folder: Path) -> Done:
    done = dare_train("sweep", "base", "tuned", "--out", "four", cwd=folder)
    done.stderr = "".join(line + "\n" for line in done.stderr.splitlines() if line.startswith("dare-train"))
    return done


def test_the_command_takes_several_models_of_one_base(base: Path, tmp_path: Path) -> None:
    for number in (1, 2):
        tuned_model(base, seed=number).save_pretrained(tmp_path / f"tuned-{number}")
    (tmp_path / "metrics.py").write_text(f"import sys\nsys.path.insert(0, {HELPERS!r})\n{METRIC}")
    words = [
        "base",
        "tuned-1",
        "tuned-2",
        "--eval",
        "metrics:accuracy",
        "--p",
        "0.5",
        "--seeds",
        "2",
        "--variants",
        "dare",
        "--out",
        "out",
    ]
    done = dare_train("sweep", *words, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert r"| model | metric | \|δ\|: median / 99 % below | base → fine-tuned |" in done.stdout
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "sweeps-accuracy.png", "sweeps.html", "sweeps.json", "sweeps.md", "tuned-1", "tuned-2",
    ]  # fmt: skip
    found = json.loads((tmp_path / "out/sweeps.json").read_text())["models"]
    assert {name: len(one["points"]) for name, one in found.items()} == {"tuned-1": 4, "tuned-2": 4}


@pytest.mark.parametrize(
    ("words", "code", "text"),
    [
        (("--data", "absent.jsonl"), 1, "absent.jsonl: expected a file of texts, found no such file"),
        (
            ("--data", "t.txt", "--dtype", "float99"),
            2,
            "--dtype: expected auto, float32, bfloat16, float16, found float99",
        ),
        (
            ("--data", "t.txt", "--column", "txt=a"),
            2,
            "--column: expected text=, label= or prompt= and the name of a column, found txt=a",
        ),
        (("--data", "t.txt", "--max-length", "-1"), 2, "--max-length: expected at least 1, found -1"),
        (("--data", "t.txt", "--examples", "-5"), 2, "--examples: expected at least 1, found -5"),
        (("--data", "t.txt", "--seeds", "9" * 20), 2, f"seeds: expected 1 to 10,000, found {'9' * 20}"),
        (
            ("--data", "t.txt", "--p", "many"),
            2,
            "--p: expected numbers with commas between them, found 'many'",
        ),
    ],
)
def test_what_is_wrong_is_said_before_a_model_is_loaded(
    tmp_path: Path, words: tuple[str, ...], code: int, text: str
) -> None:
    (tmp_path / "t.txt").write_text("one\n")
    done = dare_train("sweep", "no-base", "no-model", "--out", "out", *words, cwd=tmp_path)
    assert (done.returncode, done.stderr.splitlines()[-1]) == (code, f"dare-train: {text}")

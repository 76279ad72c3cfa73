"""`dare-train merge` as a person meets it: models, configurations and searches; what it prints, and how it
refuses.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from commands import Done, dare_train
from merging import config_of, files_of, llama, save, state_of, sum_of, tuned, write_state
from wandb_files import history, offline_run

from dare_train import DeltaPackage, apply, extract, merge, save_statistics
from dare_train.merging.search import Axis

DOWN = "model.layers.0.mlp.down_proj.weight"
METRICS = '''
from pathlib import Path
from safetensors.numpy import load_file

def distance(folder):
    """0 for the sum of half of the first delta and all of the second."""
    places = (folder, "base", "one", "two")
    result, base, one, two = (load_file(Path(place) / "model.safetensors") for place in places)
    rest = {n: result[n] - base[n] - 0.5 * (one[n] - base[n]) - (two[n] - base[n]) for n in base}
    return float(sum(abs(rest[n]).sum() for n in base))

def nearness(folder):
    return -distance(folder)

def nothing(folder):
    return float("nan")

def broken(folder):
    raise ValueError("no such benchmark")

number = 3
'''


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`base`, three models on it, `package` of the first, and `metrics.py`."""
    folder, base = tmp_path_factory.mktemp("models"), llama()
    save(base, folder / "base", tokenizer=True)
    for number, name in enumerate(("one", "two", "three"), 1):
        save(tuned(base, number), folder / name)
    extract(folder / "base", folder / "one", folder / "package", p=0.5, seed=4, values="exact")
    (folder / "metrics.py").write_text(METRICS)
    return folder


def run(place: Path, *arguments: object) -> Done:
    done = dare_train("merge", *arguments, cwd=place)
    done.stderr = "".join(
        line for line in done.stderr.splitlines(keepends=True) if "compiling CPU kernels, once" not in line
    )
    return done


def merged(place: Path, out: Path, *arguments: object) -> str:
    """What the command prints when all went well."""
    done = run(place, *arguments, "--out", out)
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout


def weights_of(folder: Path) -> dict[str, bytes]:
    return {name: content for name, content in files_of(folder).items() if name.endswith(".safetensors")}


def same_as_the_library(place: Path, out: Path, models: Sequence[str], **options: Any) -> None:
    """Weights are, to the byte, those of a call of `merge`."""
    expected = merge(place / "base", [place / model for model in models], out.with_name("library"), **options)
    assert weights_of(out) == weights_of(out.with_name("library"))
    assert json.loads((out / "dare_merge.json").read_text())["fingerprint"] == expected.fingerprint


def test_models_are_added_up_and_the_table_tells_every_tensor(place: Path, tmp_path: Path) -> None:
    told = merged(place, tmp_path / "out", "base", "one", "two", "--weight", 0.5, "--weight", 0.25)
    base, result = state_of(place / "base"), state_of(tmp_path / "out")
    for name, tensor in result.items():
        expected = sum_of(
            base[name], [state_of(place / "one")[name], state_of(place / "two")[name]], [0.5, 0.25]
        )
        torch.testing.assert_close(tensor, expected.float(), rtol=1e-6, atol=1e-6)
    report = json.loads((tmp_path / "out/dare_merge.json").read_text())
    assert told.splitlines()[-1] == f"{tmp_path / 'out'}: fingerprint {report['fingerprint'][:12]}…"
    count = len(report["tensors"])
    assert told.splitlines()[-2] == f"{count} of {count} tensors merged, 0 carried, 0 copied unchanged"
    assert f"task_arithmetic: {len(result)} merged tensors" in told
    assert "all models" in told
    assert (tmp_path / "out/tokenizer.json").is_file()
    assert config_of(tmp_path / "out")["model_type"] == "llama"


def test_each_option_means_what_the_argument_does(place: Path, tmp_path: Path) -> None:
    words = [
        "--method", "ties", "--weight", "0.5", "--weight", "2", "--p", "0.25", "--p", "0.5", "--seed", "11",
        "--set", "density=0.5,0.25",
        "--set", "lambda=0.75", "--rescale", "norm", "--out-dtype", "BF16", "--exclude", "*.up_proj.*",
        "--take", "lm_head.*=two",
    ]  # fmt: skip
    merged(place, tmp_path / "out", "base", "one", "two", *words)
    same_as_the_library(
        place, tmp_path / "out", ["one", "two"], method="ties", weights=[0.5, 2], p=[0.25, 0.5], seed=11,
        density=[0.5, 0.25],
        lambda_=0.75, rescale="norm", out_dtype="BF16", exclude="*.up_proj.*", take={"lm_head.*": 1},
    )  # fmt: skip
    assert {tensor.dtype for tensor in state_of(tmp_path / "out").values()} == {torch.bfloat16}
    base = state_of(place / "base")["model.layers.1.mlp.up_proj.weight"]
    assert torch.equal(state_of(tmp_path / "out")["model.layers.1.mlp.up_proj.weight"], base.bfloat16())


def test_one_p_is_every_models(place: Path, tmp_path: Path) -> None:
    merged(place, tmp_path / "out", "base", "one", "two", "--p", "0.5")
    same_as_the_library(place, tmp_path / "out", ["one", "two"], p=0.5)


def test_tensors_go_by_other_names_where_the_user_says_so(place: Path, tmp_path: Path) -> None:
    renamed = {
        name.replace("mlp", "feed_forward"): tensor for name, tensor in state_of(place / "one").items()
    }
    write_state(renamed, tmp_path / "renamed")
    merged(place, tmp_path / "out", "base", tmp_path / "renamed", "--rename", "feed_forward=mlp")
    same_as_the_library(place, tmp_path / "out", ["one"])


@pytest.mark.parametrize(("method", "kind"), [("fisher", "fisher"), ("regmean", "gram")])
def test_statistics_are_found_where_the_user_says(
    place: Path, tmp_path: Path, method: str, kind: Any
) -> None:
    shape = tuple(state_of(place / "base")[DOWN].shape)
    rng = np.random.default_rng(0)
    files = []
    for number in range(2):
        values = (
            rng.random(shape, np.float32) if kind == "fisher" else np.diag(rng.random(shape[1], np.float32))
        )
        files.append(save_statistics(tmp_path / f"{number}.safetensors", kind, {DOWN: values}, examples=1))
    words = [word for file in files for word in (f"--{kind}", file)]
    told = merged(place, tmp_path / "out", "base", "one", "two", "--method", method, *words)
    assert f"averaged, since not every model has {kind} statistics of them" in " ".join(told.split())
    same_as_the_library(place, tmp_path / "out", ["one", "two"], method=method, **{kind: files})
    plain = merge(place / "base", [place / "one", place / "two"], tmp_path / "plain", method="average")
    assert not torch.equal(state_of(tmp_path / "out")[DOWN], state_of(Path(plain.out))[DOWN])


def test_a_package_of_the_result_gives_the_same_model(place: Path, tmp_path: Path) -> None:
    words = ["base", "package", "two", "--method", "dare_ties", "--p", "0.5", "--seed", "2"]
    merged(place, tmp_path / "out", *words)
    told = merged(place, tmp_path / "merged-package", *words, "--package")
    package = DeltaPackage.open(tmp_path / "merged-package")
    assert f"fingerprint {package.manifest.result[:12]}…" in told
    assert apply(place / "base", package, tmp_path / "applied") == package.manifest.result
    assert weights_of(tmp_path / "applied") == weights_of(tmp_path / "out")


def test_what_a_package_dropped_is_said_not_to_be_dropped_again(place: Path, tmp_path: Path) -> None:
    told = merged(place, tmp_path / "out", "base", "package", "--p", "0.9")
    assert "dropped in their packages already, and not dropped at random again: " in " ".join(told.split())
    apply(place / "base", place / "package", tmp_path / "applied")
    assert weights_of(tmp_path / "out") == weights_of(tmp_path / "applied")


def test_a_row_for_each_tensor(place: Path, tmp_path: Path) -> None:
    told = merged(place, tmp_path / "out", "base", "one", "--exclude", "lm_head.*", "--tensors")
    rows = {line.split("│")[1].strip(): line for line in told.splitlines() if line.count("│") > 3}
    assert state_of(place / "base").keys() <= rows.keys()
    assert "copied" in rows["lm_head.weight"]
    assert "merged" in rows[DOWN]


def test_the_recipe_beside_a_result_runs_again(place: Path, tmp_path: Path) -> None:
    merged(
        place,
        tmp_path / "out",
        "base",
        "one",
        "two",
        "--method",
        "della",
        "--set",
        "density=0.4",
        "--seed",
        "5",
    )
    merged(place, tmp_path / "again", tmp_path / "out/dare_merge.yml")
    assert files_of(tmp_path / "again") == files_of(tmp_path / "out")


def test_a_configuration_of_mergekits_runs_and_differences_are_told(place: Path, tmp_path: Path) -> None:
    models = [{"model": name, "parameters": {"weight": 0.5, "density": 0.5}} for name in ("one", "two")]
    config = {"merge_method": "dare_linear", "base_model": "base", "models": models, "dtype": "float32"}
    (tmp_path / "config.yml").write_text(yaml.safe_dump(config))
    done = run(place, tmp_path / "config.yml", "--out", tmp_path / "out")
    assert done.returncode == 0, done.stderr
    assert "dare-train: " in done.stderr
    assert "1/(1 - p)" in done.stderr
    same_as_the_library(
        place,
        tmp_path / "out",
        ["one", "two"],
        method="dare_linear",
        p=0.5,
        weights=[0.5, 0.5],
        normalize=True,
    )


# Searching


def test_a_grid_keeps_the_best_as_a_recipe_that_runs_again(place: Path, tmp_path: Path) -> None:
    search = ["--search", "weights.0=0:1:0.5", "weights.1=0.5,1.0"]
    done = run(place, "base", "one", "two", *search, "--eval", "metrics:nearness", "--out", tmp_path / "best")
    assert (done.returncode, done.stderr) == (0, "")
    assert "6 merges" in done.stdout
    first = next(line for line in done.stdout.splitlines() if line.count("│") > 3)
    assert [float(cell) for cell in first.strip("│ ").split("│")][:2] == [0.5, 1.0]
    recipe = yaml.safe_load((tmp_path / "best/dare_merge.yml").read_text())
    assert [model["parameters"]["weight"] for model in recipe["models"]] == [0.5, 1.0]
    assert (
        "the best of 6 merges: weight.0=0.5, weight.1=1.0"
        in json.loads((tmp_path / "best/dare_merge.json").read_text())["notes"][0]
    )
    assert sorted(path.name for path in tmp_path.iterdir()) == ["best"]
    same_as_the_library(place, tmp_path / "best", ["one", "two"], weights=[0.5, 1.0])
    merged(place, tmp_path / "again", tmp_path / "best/dare_merge.yml")
    assert weights_of(tmp_path / "again") == weights_of(tmp_path / "best")


def test_the_smallest_score_is_the_best_where_asked_for(place: Path, tmp_path: Path) -> None:
    search = ["--search", "weights.0=0.5,1.0", "method=task_arithmetic,average", "rescale=paper,none"]
    done = run(
        place,
        "base",
        "one",
        "two",
        *search,
        "--eval",
        "metrics:distance",
        "--minimize",
        "--out",
        tmp_path / "best",
    )
    assert (done.returncode, done.stderr) == (0, "")
    recipe = yaml.safe_load((tmp_path / "best/dare_merge.yml").read_text())
    assert (recipe["merge_method"], recipe["models"][0]["parameters"]["weight"]) == ("task_arithmetic", 0.5)


def test_optuna_chooses_within_the_range_and_finds_what_the_grid_finds(place: Path, tmp_path: Path) -> None:
    search = ["--search", "weights.0=0:1:0.25", "p=0.0,0.5", "--trials", "12", "--seed", "1"]
    done = run(place, "base", "one", "two", *search, "--eval", "metrics:nearness", "--out", tmp_path / "best")
    assert (done.returncode, done.stderr) == (0, "")
    rows = [
        [float(cell) for cell in line.strip("│ ").split("│")]
        for line in done.stdout.splitlines()
        if line.count("│") > 3
    ]
    assert len(rows) == 12
    assert {row[0] for row in rows} <= {0.0, 0.25, 0.5, 0.75, 1.0}
    assert len({row[0] for row in rows}) > 2
    assert [row[2] for row in rows] == sorted((row[2] for row in rows), reverse=True)
    again = run(
        place,
        "base",
        "one",
        "two",
        *search,
        "--eval",
        "metrics:nearness",
        "--out",
        tmp_path / "best",
        "--overwrite",
    )
    assert again.stdout == done.stdout


def test_a_search_is_logged_to_wandb(place: Path, tmp_path: Path, quiet: Path) -> None:
    search = ["--search", "weights.0=0.25,0.5", "--eval", "metrics:nearness", "--wandb", "merges"]
    done = run(place, "base", "one", "two", *search, "--out", tmp_path / "best")
    assert done.returncode == 0, done.stderr
    rows = history(offline_run(quiet))
    trials = [row for row in rows if "search/score" in row]
    assert [row["search/weight.0"] for row in trials] == [0.25, 0.5]
    assert trials[0]["search/score"] < trials[1]["search/score"] < 0
    assert any("search/trials" in key for row in rows for key in row)


# Refusals


def test_a_search_for_a_place_that_is_taken_tries_nothing(place: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis").write_text("t")
    words = ["base", "one", "--search", "weights=1,2", "--eval", "metrics:broken", "--out", tmp_path / "out"]
    done = run(place, *words)
    assert (done.returncode, "does not exist yet" in done.stderr) == (2, True), done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize(
    ("words", "code", "text"),
    [
        (["base"], 2, "merge: expected BASE and at least one MODEL, or one CONFIG.yml, found base"),
        (["base", "one", "--method", "tyes"], 2, "method: expected one of"),
        (["base", "one", "--set", "density"], 2, "--set: expected NAME=VALUE, found 'density'"),
        (["base", "one", "--set", "densty=0.5"], 2, "densty"),
        (
            ["base", "one", "--method", "ties", "--set", "density=0.5,0.5"],
            2,
            "density: expected one for each of 1 models, found 2",
        ),
        (["base", "one", "two", "--weight", "1"], 2, "weights: expected one for each of 2 models, found 1"),
        (["base", "one", "--p", "1"], 2, "p"),
        (["base", "one", "--rescale", "l1"], 2, "rescale: expected one of paper, norm, q, none, found 'l1'"),
        (["base", "one", "--take", "x"], 2, "--take: expected NAME=VALUE, found 'x'"),
        (["base", "one", "--take", "*=two"], 2, "two"),
        (["base", "nowhere"], 1, "nowhere"),
        (
            ["base", "one", "--device", "gpu"],
            2,
            "device: expected one that torch has here, such as cpu or cuda, found gpu",
        ),
        (
            ["base", "one", "--device", "gpu", "--search", "weights=1,2", "--eval", "metrics:distance"],
            2,
            "such as cpu or cuda, found gpu",
        ),
        (["nowhere.yml"], 2, "nowhere.yml"),
        (
            ["config.yml", "--method", "ties"],
            2,
            "config.yml: expected all options in the configuration itself, found method",
        ),
        (["base", "one", "--method", "fisher"], 1, "fisher"),
        (
            ["base", "one", "--search", "weights=0.5,1"],
            2,
            "--search: expected --eval, and no --package, found no --eval",
        ),
        (
            ["base", "one", "--search", "weights=0.5,1", "--eval", "metrics:distance", "--package"],
            2,
            "found --package",
        ),
        (
            ["base", "one", "--search", "weights", "--eval", "metrics:distance"],
            2,
            "search: expected NAME=LOW:HIGH:STEP",
        ),
        (["base", "one", "--search", "weights=1:0:0.1", "--eval", "metrics:distance"], 2, "LOW at most HIGH"),
        (
            ["base", "one", "--search", "weights.7=1,2", "--eval", "metrics:distance"],
            2,
            "a model's number from 0 to 0",
        ),
        (["base", "one", "--search", "wait=1,2", "--eval", "metrics:distance"], 2, "wait"),
        (
            ["base", "one", "--search", "weights=1,2", "--eval", "metrics"],
            2,
            "eval: expected MODULE:FUNCTION, found 'metrics'",
        ),
        (["base", "one", "--search", "weights=1,2", "--eval", "metrics:accuracy"], 2, "accuracy"),
        (
            ["base", "one", "--search", "weights=1,2", "--eval", "no_such_module:accuracy"],
            2,
            "No module named 'no_such_module'",
        ),
        (
            ["base", "one", "--search", "weights=1,2", "--eval", "metrics:number"],
            2,
            "a function, found metrics:number, a int",
        ),
        (
            ["base", "one", "--search", "weights=1,2", "--eval", "metrics:nothing"],
            2,
            "a function that returns a finite number, found nan",
        ),
    ],
)
def test_what_cannot_be_is_refused_in_one_line(
    place: Path, tmp_path: Path, words: list[str], code: int, text: str
) -> None:
    done = run(place, *words, "--out", tmp_path / "out")
    assert (done.returncode, done.stdout) == (code, ""), done.stderr
    assert text in done.stderr
    assert done.stderr.startswith("dare-train: ")
    assert done.stderr.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("words", "text"),
    [
        ("weight=0:1:1e-12", "at most 10,000 values, found 'weight=0:1:1e-12', which are 1,000,000,000,001"),
        ("weight=-1e308:1e308:1", "expected at most 10,000 values, found 'weight=-1e308:1e308:1'"),
        ("weight=0:1:1e-320", "expected at most 10,000 values, found 'weight=0:1:1e-320'"),
        ("weight=0:1:0.5 weight=1,2", "expected each setting once, found ['weight', 'weight']"),
        (
            "weight=0:1:0.001 weight.0=0:1:0.001",
            "at most 10,000 merges, found 1,002,001; larger steps, or --trials N, which lets Optuna choose N",
        ),
        ("weight=1,2 --trials 0", "trials: expected 1 or more, found 0"),
        ("weight=0:1:0.001 weight.0=0:1:0.001 weight.7=1 --trials 2", "a model's number from 0 to 0"),
    ],
)  # fmt: skip
def test_a_search_without_end_is_refused_at_once(place: Path, tmp_path: Path, words: str, text: str) -> None:
    options = ("--eval", "metrics:distance", "--out", tmp_path / "out")
    done = run(place, "base", "one", *options, "--search", *words.split())
    assert (done.returncode, done.stdout) == (2, ""), done.stderr
    assert text in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_small_steps_are_kept_apart() -> None:
    assert Axis.parse("weight=0:3e-13:1e-13").values == (0.0, 1e-13, 2e-13, 3e-13)
    assert Axis.parse("weight=0.1:0.3:0.1").values == (0.1, 0.2, 0.3)


def test_an_error_of_the_users_function_is_shown_whole(place: Path, tmp_path: Path) -> None:
    words = ["base", "one", "--search", "weights=1,2", "--eval", "metrics:broken", "--out", tmp_path / "out"]
    done = run(place, *words)
    assert done.returncode != 0
    assert "no such benchmark" in done.stderr
    assert "metrics.py" in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_a_result_is_not_overwritten_unless_asked_for(place: Path, tmp_path: Path) -> None:
    merged(place, tmp_path / "out", "base", "one")
    before = files_of(tmp_path / "out")
    done = run(place, "base", "two", "--out", tmp_path / "out")
    assert (done.returncode, "--overwrite" in done.stderr) == (2, True)
    assert files_of(tmp_path / "out") == before
    merged(place, tmp_path / "out", "base", "two", "--overwrite")
    assert files_of(tmp_path / "out") != before

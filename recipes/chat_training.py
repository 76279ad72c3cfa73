"""What recipes with a chat model share: rows that fit, training with TRL's SFTTrainer, and questions."""

from __future__ import annotations

import argparse
import random
import shutil
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from chat_answers import (
    answer,
    answers,
    choices,
    encoded,
    final_number,
    passes,
    program,
    question,
    same_words,
)
from chat_models import CACHE, DEFAULT, chat_model
from chat_tasks import ChatTask, chat_task
from choice_questions import Choice
from inputs import data_arguments
from option_types import count, seed
from peft import LoraConfig
from rich.table import Table
from standard_library import Row, Split
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback, set_seed

AT_LENGTH = 40
"""Tokens of an answer that is shown as the base gives it."""
SHAPES: Mapping[str, tuple[int, int]] = {"maths": (8, 160), "code": (8, 160), "instructions": (8, 128)}
"""Rows in a step, and the longest that are taken, of tasks with long answers."""


@dataclass(frozen=True, kw_only=True)
class Asked:
    """What a model answered to the held-out questions."""

    tokens: Sequence[Sequence[int]]
    texts: Sequence[str]
    right: Sequence[bool]

    @property
    def share(self) -> float:
        """Of right answers."""
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
    out: Path
    options: argparse.Namespace

    def load(self, where: str | Path) -> Any:
        """In float32: on CPUs that is faster than bfloat16, and AdamW needs it."""
        return AutoModelForCausalLM.from_pretrained(where, dtype=torch.float32).train(False)

    def ask(self, model: Any, most: int | None = None) -> Asked:
        """The held-out questions, or the first so many. Programs are run, see `passes`."""
        rows = self.test[:most]
        longest = max(len(self.tokenizer(row["text"])["input_ids"]) for row in rows)
        tokens = answers(model, self.tokenizer, rows, max_new_tokens=longest + 4)
        texts = [self.tokenizer.decode(some, skip_special_tokens=True).strip() for some in tokens]
        right = [self._is_right(text, row) for text, row in zip(texts, rows, strict=True)]
        return Asked(tokens=tokens, texts=texts, right=right)

    def _is_right(self, text: str, row: Row) -> bool:
        if self.task.judge == "final number":
            return final_number(text) == final_number(row["text"])
        if self.task.judge == "tests passed":
            return bool(passes(program(text), row["tests"].splitlines(), allowed=self.options.run_code))
        return same_words(text, row["text"])

    def share_right(self, model: Any, most: int | None = None) -> float | None:
        """None where nothing tells, or would have to be run and may not be."""
        judge = self.task.judge
        if judge == "loss alone" or (judge == "tests passed" and not self.options.run_code):
            return None
        return self.ask(model, most).share

    def chosen(self, model: Any, questions: Sequence[Choice]) -> float:
        """Share of questions of which the model chooses the right answer."""
        found = choices(model, self.tokenizer, questions)
        return sum(one == item["answer"] for one, item in zip(found, questions, strict=True)) / len(questions)

    def part(self, part: Split, count: int) -> list[Row]:
        """So many rows that are short enough, of those there are; a sample."""
        rows, options = self.task.rows[part], self.options
        shuffled = random.Random(options.seed).sample(rows, len(rows))
        fitting = (row for row in shuffled if fits(self.tokenizer, row, options.max_length))
        chosen = [*islice(fitting, count)]
        return chosen or sys.exit(
            f"{self.task.name}: no {part} row of at most {options.max_length} tokens: raise --max-length"
        )

    @cached_property
    def train(self) -> list[Row]:
        return self.part("train", self.options.steps * self.options.batch_size)

    @cached_property
    def test(self) -> list[Row]:
        return self.part("test", self.options.examples)

    def answer_at_length(self, model: Any, row: Row) -> str:
        (tokens,) = answers(model, self.tokenizer, [row], max_new_tokens=AT_LENGTH)
        return str(self.tokenizer.decode(tokens, skip_special_tokens=True)).strip()


def common_arguments(parser: argparse.ArgumentParser, *, out: str, steps: int) -> None:
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
    add("--steps", type=count, default=steps, help="of training (default: %(default)s)")
    add("--batch-size", type=count, default=16, help="(default: %(default)s)")
    add("--max-length", type=count, default=48, help="tokens of question and answer (default: %(default)s)")
    add("--examples", type=count, default=96, help="held-out questions (default: %(default)s)")
    add("--seed", type=seed, default=0, help="of training and mask (default: %(default)s)")
    add(
        "--run-code",
        action="store_true",
        help="run programs that the model writes against their tests, in a process of their own with limits; "
        "without it only their loss is measured",
    )
    add("--out", type=Path, default=Path(out), help="(default: %(default)s)")


def prepared(options: argparse.Namespace) -> Stage:
    """With an empty folder for what it makes."""
    stage = stage_of(options)
    shutil.rmtree(stage.out, ignore_errors=True)
    stage.out.mkdir(parents=True)
    return stage


def stage_of(options: argparse.Namespace) -> Stage:
    """With a folder in which things may be that an earlier run made."""
    task = chat_task(options.task, options.data, options.columns)
    base = chat_model(options.model, options.cache)
    tokenizer = AutoTokenizer.from_pretrained(base)
    return Stage(
        base=base, tokenizer=tokenizer, task=task, out=options.out.resolve() / task.name, options=options
    )


def of_task(options: argparse.Namespace, task: str) -> argparse.Namespace:
    """What the command line says, for one of several tasks."""
    batch_size, max_length = SHAPES.get(task, (options.batch_size, options.max_length))
    own = {"task": task, "batch_size": batch_size, "max_length": max_length}
    return argparse.Namespace(**{**vars(options), **own})


def fits(tokenizer: Any, row: Row, max_length: int) -> bool:
    (example,) = encoded(tokenizer, [row], max_length + 1)
    return len(example["input_ids"]) <= max_length


def supervise(
    model: Any,
    stage: Stage,
    *callbacks: TrainerCallback,
    learning_rate: float,
    adapter: LoraConfig | None = None,
) -> Any:
    """Fine-tunes on the answers, all of the model or an adapter. Returns the model as it was trained."""
    from datasets import Dataset, disable_progress_bars
    from trl.trainer.sft_config import SFTConfig
    from trl.trainer.sft_trainer import SFTTrainer

    disable_progress_bars()
    options = stage.options
    set_seed(options.seed)
    trainer = SFTTrainer(
        model=model,
        processing_class=stage.tokenizer,
        train_dataset=Dataset.from_list(
            [{"prompt": question(row), "completion": answer(row)} for row in stage.train]
        ),
        peft_config=adapter,
        args=SFTConfig(
            output_dir=str(stage.out),
            max_steps=options.steps,
            per_device_train_batch_size=options.batch_size,
            learning_rate=learning_rate,
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
        callbacks=list(callbacks),
    )
    trainer.train()
    return trainer.model.train(False)


def setup_of(options: argparse.Namespace) -> dict[str, Any]:
    """What all figures of a study depend on."""
    names = ("steps", "batch_size", "max_length", "examples", "seed")
    return {"model": Path(options.model).name, **{name: getattr(options, name) for name in names}}


def headed(title: str, headings: Sequence[str]) -> Table:
    table = Table(title=title, title_justify="left", title_style="bold")
    for number, heading in enumerate(headings):
        table.add_column(heading, justify="right" if number else "left")
    return table

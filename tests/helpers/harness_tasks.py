"""Tasks of lm-evaluation-harness in local files, and what their metrics are by definition."""

from __future__ import annotations

import importlib.util
import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from worded_models import WORDS

needs_harness = pytest.mark.skipif(
    importlib.util.find_spec("lm_eval") is None, reason="no lm_eval: run scripts/harness"
)
theirs = pytest.mark.filterwarnings("ignore")
"""Warnings of the harness and of what it imports are not ours."""

_TASK = """task: {name}
dataset_path: json
dataset_kwargs:
  data_files:
    test: {folder}/{name}.jsonl
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_target: answer
doc_to_choice: choices
metric_list:
  - {{metric: acc, aggregation: mean, higher_is_better: true}}
  - {{metric: acc_norm, aggregation: mean, higher_is_better: true}}
"""

_FUNCTIONS = """
def nothing(doc, results):
    return {}

def no_number(doc, results):
    return {"acc": float("nan")}

def fails(doc, results):
    raise RuntimeError("no\\nresult")
"""


def questions(count: int, seed: int) -> list[dict[str, Any]]:
    numbers = random.Random(seed)

    def words(number: int) -> str:
        return " ".join(WORDS[numbers.randrange(4, len(WORDS))] for _ in range(number))

    return [
        {
            "question": words(5),
            "choices": [words(numbers.randint(1, 3)) for _ in range(4)],
            "answer": numbers.randrange(4),
        }
        for _ in range(count)
    ]


def save_task(
    folder: Path, name: str = "quiz", *, seed: int = 1, count: int = 30, more: str = "", file: str = ""
) -> Path:
    """A task's file, with its questions and functions beside it; `more` are further lines of it."""
    folder.mkdir(exist_ok=True)
    lines = "".join(json.dumps(row) + "\n" for row in questions(count, seed))
    (folder / f"{name}.jsonl").write_text(lines)
    (folder / "functions.py").write_text(_FUNCTIONS)
    path = folder / (file or f"{name}.yaml")
    path.write_text(_TASK.format(name=name, folder=folder) + more)
    return path


def by_definition(model: Any, tokenizer: Any, asked: list[dict[str, Any]]) -> dict[str, float]:
    """The share of questions whose answer is the likeliest choice, and the likeliest for its characters."""
    right = {"acc": 0, "acc_norm": 0}
    for row in asked:
        logs = [_log_chance(model, tokenizer, row["question"], choice) for choice in row["choices"]]
        lengths = [len(choice) for choice in row["choices"]]
        right["acc"] += int(np.argmax(logs)) == row["answer"]
        right["acc_norm"] += int(np.argmax(np.array(logs) / lengths)) == row["answer"]
    return {name: count / len(asked) for name, count in right.items()}


@torch.no_grad()
def _log_chance(model: Any, tokenizer: Any, question: str, choice: str) -> float:
    start = len(tokenizer(question)["input_ids"])
    ids = tokenizer(f"{question} {choice}")["input_ids"]
    chances = model(torch.tensor([ids])).logits[0].log_softmax(-1)
    return sum(float(chances[place - 1, ids[place]]) for place in range(start, len(ids)))

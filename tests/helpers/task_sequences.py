"""Tasks to learn one after another, in a moment each."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from training import examples, make_trainer
from transformers import Trainer, TrainerCallback

from dare_train import ContinualTask

trained: list[str] = []
"""Tasks that were trained, in the order in which it happened."""


class Noted(TrainerCallback):
    def __init__(self, name: str) -> None:
        self._name = name

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        trained.append(self._name)


class Stopped(TrainerCallback):
    """Training dies after a step, as if it was killed."""

    def __init__(self, step: int) -> None:
        self._step = step

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step == self._step:
            raise KeyboardInterrupt


def task(number: int, *more: TrainerCallback) -> ContinualTask:
    """Tokens below 20 · (number + 1) of the first place are class 1, the others 0."""
    rows = [{**row, "labels": int(row["input_ids"][0] < 20 * (number + 1))} for row in examples(48)]

    def trainer(model: torch.nn.Module, out: Path, callbacks: Sequence[TrainerCallback]) -> Trainer:
        made = make_trainer(
            model, out, Noted(f"task {number}"), *more, *callbacks, max_steps=6, save_steps=2, seed=number
        )
        made.train_dataset = rows
        return made

    @torch.no_grad()
    def evaluate(model: torch.nn.Module) -> dict[str, float]:
        logits = model(input_ids=torch.tensor([row["input_ids"] for row in rows])).logits
        labels = torch.tensor([row["labels"] for row in rows])
        return {
            "loss": float(torch.nn.functional.cross_entropy(logits, labels)),
            "accuracy": float((logits.argmax(-1) == labels).float().mean()),
        }

    return ContinualTask(name=f"task-{number}", trainer=trainer, evaluate=evaluate)

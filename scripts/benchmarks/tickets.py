"""What a search for lottery tickets costs beside the trainings that it makes: the real fine-tune, and a level
of half its elements.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from . import finetune
from .common import scratch
from .report import Report, Row

LEVELS = 1
FACTOR = 1.05
EXAMPLES = 64
"""What each level is measured on in the end, which counts as the search's own time."""


def run(runs: int) -> Report:
    """One search, whatever `runs`: it trains for many minutes."""
    from dare_train import ContinualTask, TicketSearch

    rows, trainings = finetune.examples(), Trainings()
    with scratch() as folder:
        finetune.classifier().save_pretrained(folder / "base")
        task = ContinualTask(
            name="packages",
            trainer=trainings.trainer(rows),
            evaluate=Evaluation(rows[:: len(rows) // EXAMPLES]),
        )
        begun = time.perf_counter()
        TicketSearch(str(folder / "base"), task, out=folder / "search", levels=LEVELS, beside=()).run()
        seconds = time.perf_counter() - begun
    spent = sum(trainings.seconds)
    return Report(
        title=f"Ticket search: all-MiniLM-L6-v2, 22.7 M, fp32, {finetune.STEPS} steps of 32 texts a level",
        rows=[
            Row(what="a training", values=trainings.seconds, unit="s"),
            Row(
                what="the search's own time for a level", values=[(seconds - spent) / (LEVELS + 1)], unit="s"
            ),
            Row(what="search / its trainings", values=[seconds / spent], unit="×", at_most=FACTOR),
        ],
    )


class Trainings:
    """Makes Trainers, and times them while they train."""

    def __init__(self) -> None:
        self.seconds: list[float] = []

    def trainer(self, rows: Sequence[dict[str, Any]]) -> Any:
        from transformers import Trainer

        def make(model: Any, out: Path, callbacks: Sequence[Any]) -> Trainer:
            args = finetune.arguments(out, finetune.STEPS, save_strategy="no")
            made = Trainer(model=model, args=args, train_dataset=rows, callbacks=list(callbacks))
            made.train = self._timed(made.train)
            return made

        return make

    def _timed(self, train: Any) -> Any:
        def timed(**options: Any) -> Any:
            begun = time.perf_counter()
            result = train(**options)
            self.seconds.append(time.perf_counter() - begun)
            return result

        return timed


class Evaluation:
    """Accuracy on a few examples."""

    def __init__(self, rows: Sequence[dict[str, Any]]) -> None:
        import torch

        self._batch = {key: torch.tensor([row[key] for row in rows]) for key in rows[0]}

    def __call__(self, model: Any) -> dict[str, float]:
        import torch

        with torch.no_grad():
            logits = model(
                input_ids=self._batch["input_ids"], attention_mask=self._batch["attention_mask"]
            ).logits
        return {"accuracy": float((logits.argmax(-1) == self._batch["labels"]).float().mean())}

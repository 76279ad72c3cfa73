"""What a sweep costs beside its evaluations: 12 drop rates × 5 seeds × 4 variants on the fine-tuned
all-MiniLM-L6-v2, in fp32.
"""

from __future__ import annotations

import time
from typing import Any

from . import finetune
from .common import scratch
from .report import Report, Row

EXAMPLES = 512
"""Of 8,960: what one evaluation looks at."""
BATCH = 128
FACTOR = 1.15


def run(runs: int) -> Report:
    """One sweep, whatever `runs`: it is 177 evaluations already."""
    from dare_train import sweep
    from dare_train.evaluation.model_loading import load_model

    pair, evaluation = finetune.pair(), Evaluation()
    model: Any = load_model(str(pair.tuned)).float()
    with scratch() as folder:
        begun = time.perf_counter()
        found = sweep(model, pair.base, evaluation, out=folder / "sweep")
        seconds = time.perf_counter() - begun
    spent, count = sum(evaluation.seconds), len(evaluation.seconds)
    rows = [
        Row(what="evaluations", values=[count]),
        Row(what="one evaluation", values=evaluation.seconds, unit="s"),
        Row(what="one swap of all weights", values=[(seconds - spent) / count], unit="s"),
        Row(what="sweep / its evaluations", values=[seconds / spent], unit="×", at_most=FACTOR),
    ]
    rows += [
        Row(what=f"accuracy, {name} at p = 0.9", values=found.values(name, 0.9, "accuracy"))
        for name in ("dare", "drop_only")
    ]
    return Report(
        title="Sweep: all-MiniLM-L6-v2, 22.7 M, fp32",
        rows=rows,
        notes=[f"evaluated on {EXAMPLES} of the training examples"],
    )


class Evaluation:
    """Accuracy on some examples, and how long it took each time."""

    def __init__(self) -> None:
        import torch

        rows = finetune.examples()[:: len(finetune.PACKAGES) * finetune.PER_PACKAGE // EXAMPLES][:EXAMPLES]
        self.seconds: list[float] = []
        self._batches = [
            {key: torch.tensor([row[key] for row in rows[first : first + BATCH]]) for key in rows[0]}
            for first in range(0, len(rows), BATCH)
        ]

    def __call__(self, model: Any) -> dict[str, float]:
        import torch

        begun = time.perf_counter()
        with torch.no_grad():
            right = [
                (
                    model(input_ids=b["input_ids"], attention_mask=b["attention_mask"]).logits.argmax(-1)
                    == b["labels"]
                )
                for b in self._batches
            ]
        accuracy = float(torch.cat(right).float().mean())
        self.seconds.append(time.perf_counter() - begun)
        return {"accuracy": accuracy}

"""How long training waits for a snapshot of `DareCallback`, beside `save_pretrained` of the same model in the
same run.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from . import finetune
from .common import remove, scratch
from .report import Report, Row

EVERY = 4
"""Steps from one snapshot to the next; `save_pretrained` is timed halfway, when the snapshot's worker is
done."""
SHARE = 0.25


def run(runs: int) -> Report:
    """One training of all-MiniLM-L6-v2 in fp32 with `runs` snapshots and as many calls of
    `save_pretrained`.
    """
    with scratch() as folder:
        waited, saved = _train(runs, folder)
    rows = [
        Row(what="save_pretrained", values=saved, unit="s"),
        Row(what="training waits for a snapshot", values=waited, unit="s"),
        Row(
            what="snapshot / save_pretrained",
            values=[w / s for w, s in zip(waited, saved, strict=True)],
            unit="×",
            at_most=SHARE,
        ),
    ]
    return Report(
        title="DareCallback(p=0.9): all-MiniLM-L6-v2, 22.7 M, fp32",
        rows=rows,
        notes=["the first snapshot is counted too"],
    )


def _train(runs: int, folder: Path) -> tuple[list[float], list[float]]:
    """Seconds of every snapshot and of every `save_pretrained`."""
    from transformers import Trainer

    from dare_train import DareCallback

    model, snapshots, saves = finetune.classifier(), DareCallback(p=0.9), _save_timer(folder / "saved")
    args = finetune.arguments(
        folder / "run", EVERY * runs, save_strategy="steps", save_steps=EVERY, save_only_model=True
    )
    Trainer(model=model, args=args, train_dataset=finetune.examples(), callbacks=[snapshots, saves]).train()
    return list(snapshots.waited)[:runs], saves.seconds


def _save_timer(out: Path) -> Any:
    """A callback that times `save_pretrained` into `out`, halfway between two snapshots."""
    from transformers import TrainerCallback

    class SaveTimer(TrainerCallback):
        def __init__(self) -> None:
            self.seconds: list[float] = []

        def on_step_end(self, args: Any, state: Any, control: Any, *, model: Any, **_: Any) -> None:
            if state.global_step % EVERY == EVERY // 2:
                remove(out)
                before = time.perf_counter()
                model.save_pretrained(out)
                self.seconds.append(time.perf_counter() - before)

    return SaveTimer()

"""The callbacks that `dare-train run` adds to a Trainer: a `DareCallback`, and one that tells what came of
it.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

from transformers import Trainer, TrainerCallback

from ..snapshots.callback import DareCallback
from .run_order import Event, Note, RunOrder

_log = logging.getLogger("dare_train")


class Witness(TrainerCallback):  # type: ignore[misc]
    """Tells `dare-train run` what a Trainer did.

    Args:
        trainer: name of its class.
        added: the callback that was added to it; None where it has one of its own.
    """

    def __init__(self, order: RunOrder, trainer: str, added: DareCallback | None) -> None:
        self.order = order
        self.trainer = trainer
        self.added = added

    def tell(self, event: Event, **figures: int) -> None:
        self.order.note(Note(event=event, trainer=self.trainer, **figures))

    def on_init_end(self, *_: Any, **__: Any) -> None:
        self.tell("own" if self.added is None else "made")

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        self.tell("began")

    def on_train_end(self, *_: Any, **__: Any) -> None:
        done = self.added
        figures = {"packages": len(done.packages), "failures": len(done.failures)} if done else {}
        try:
            self.tell("ended", **figures)
        except OSError as error:  # the model is not saved yet
            _log.error("dare-train run: %s: cannot tell that training ended: %s", self.order.journal, error)


def with_dare(trainer: Trainer, callbacks: Sequence[Any] | None) -> list[Any]:
    """The callbacks that a Trainer is made with, and a `DareCallback` unless there is one."""
    given = list(callbacks or ())
    order = RunOrder.of_this_process()
    added = None if any(map(_is_dare, given)) else DareCallback(**order.options)
    witness = Witness(order, type(trainer).__name__, added)
    return [*given, *([added] if added else []), witness]


def step_back_for(callback: Any, trainer: Trainer) -> None:
    """Where a `DareCallback` was added to a Trainer, the one that it was made with goes."""
    if not _is_dare(callback):
        return
    for witness in trainer.callback_handler.callbacks:
        if isinstance(witness, Witness) and witness.added is not None:
            trainer.remove_callback(witness.added)
            witness.added = None
            witness.tell("own")


def _is_dare(callback: Any) -> bool:
    """Callbacks are given as such, or as their classes."""
    return isinstance(callback, DareCallback) or (
        isinstance(callback, type) and issubclass(callback, DareCallback)
    )

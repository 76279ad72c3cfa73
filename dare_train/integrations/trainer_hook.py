"""In the processes of a command that `dare-train run` started: what happens when a Trainer is made."""

from __future__ import annotations

import functools
import inspect
from typing import Any


def follow(trainer_class: Any) -> None:
    """From now on, whoever makes a Trainer of this class, or of one made from it, gets a `DareCallback` with
    it, unless there is one in it already.

    The callback is added to the argument `callbacks`, since it has to see how the model begins: events reach
    callbacks from within the Trainer's making on.
    """
    make, add = trainer_class.__init__, trainer_class.add_callback
    position = list(inspect.signature(make).parameters).index("callbacks") - 1

    @functools.wraps(make)
    def make_with_callback(trainer: Any, *given: Any, **named: Any) -> None:
        from .added_callback import with_dare  # loads torch: not before there is a Trainer

        if len(given) > position:
            given = (*given[:position], with_dare(trainer, given[position]), *given[position + 1 :])
        else:
            named["callbacks"] = with_dare(trainer, named.get("callbacks"))
        make(trainer, *given, **named)

    @functools.wraps(add)
    def add_and_step_back(trainer: Any, callback: Any) -> None:
        from .added_callback import step_back_for

        add(trainer, callback)
        step_back_for(callback, trainer)

    trainer_class.__init__ = make_with_callback
    trainer_class.add_callback = add_and_step_back

"""A guest in a training: what fails in it is told, and ends nothing."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from typing import Any, Protocol

from ..errors import DareError

_log = logging.getLogger("dare_train")


class Guest(Protocol):
    """Who is called at the events of a training."""

    name: str
    on_error: str
    failures: list[Exception]
    """Of the training that is going on, or the last one."""


def as_guest(event: Callable[..., None]) -> Callable[..., None]:
    """An event of a Trainer's after which training goes on whatever happened in it, unless `on_error` is
    "raise".

    What failed is logged, counted in the Trainer's log as `{name}/failures`, and kept, to be told again at
    the end.
    """

    @functools.wraps(event)
    def guarded(guest: Guest, args: Any, state: Any, *rest: Any, **named: Any) -> None:
        try:
            event(guest, args, state, *rest, **named)
        except Exception as error:
            if guest.on_error == "raise":
                raise
            tell(guest, error)
            count = {f"{guest.name}/failures": len(guest.failures)}
            state.log_history.append({**count, "step": state.global_step})

    return guarded


def tell(guest: Guest, error: Exception) -> None:
    """Log a failure, and keep it. One that nobody foresaw is logged with its traceback."""
    guest.failures.append(error)
    foreseen = isinstance(error, DareError)
    said = str(error) if foreseen else f"{type(error).__name__}: {error}"
    _log.error(
        "DareCallback %r: %s; training goes on", guest.name, said, exc_info=None if foreseen else error
    )


def tell_again(guest: Guest) -> None:
    """What failed in all of a training, in a line."""
    if guest.failures:
        count = len(guest.failures)
        what = "a failure in this training" if count == 1 else f"{count} failures in this training, first"
        _log.error("DareCallback %r: %s: %s", guest.name, what, guest.failures[0])

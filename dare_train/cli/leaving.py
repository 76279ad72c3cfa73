"""Asked to leave: by Slurm or Kubernetes (SIGTERM), or by a terminal that was closed (SIGHUP).

A command then ends as it does with Ctrl-C: what it was writing is cleared up, except what the same command
can go on with. Only the process of a command does so; in a program of one's own, signals are its business.
"""

from __future__ import annotations

import signal
from types import FrameType

_NUMBERS = (signal.SIGTERM, signal.SIGHUP)
_CTRL_C = 128 + signal.SIGINT
_asked: list[int] = []


class AskedToLeave(KeyboardInterrupt):
    """A signal other than that of Ctrl-C."""


def leave_cleanly() -> None:
    """From now on. A signal that is ignored (`nohup`) stays so."""
    for number in _NUMBERS:
        if signal.getsignal(number) is signal.SIG_DFL:
            signal.signal(number, _leave)


def code_of(code: int) -> int:
    """The exit code of a command, given the one that Ctrl-C would have: 128 + n where signal n ended it."""
    return 128 + _asked[0] if _asked and code == _CTRL_C else code


def _leave(number: int, _frame: FrameType | None) -> None:
    for other in _NUMBERS:  # clearing up is not to be interrupted: whoever has no patience has SIGKILL
        signal.signal(other, signal.SIG_IGN)
    _asked.append(number)
    raise AskedToLeave

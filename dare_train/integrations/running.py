"""`dare-train run`: a command whose Trainers get a `DareCallback`, whoever wrote it."""

from __future__ import annotations

import os
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ..errors import ConfigError, SnapshotError
from .run_order import VARIABLE, Note, RunOrder
from .written_options import check

_ON_PATH = Path(__file__).parent / "on_path"
_HANDED_ON = ("SIGTERM", "SIGHUP", "SIGUSR1", "SIGUSR2", "SIGINT", "SIGQUIT")
_TYPED = {"SIGINT", "SIGQUIT"}
"""What a terminal sends to all processes in front: the command has it already."""


def run(command: Sequence[str], options: Mapping[str, Any]) -> int:
    """Run a command, with a `DareCallback` in each Trainer that it or a process that it starts makes.

    Args:
        command: program and arguments.
        options: arguments of `DareCallback`.

    Returns:
        Its exit code; 128 + n where signal n ended it.

    Raises:
        ConfigError: an option is wrong, or there is no such command. Nothing was started.
        SnapshotError: it ended with 0, and there is no package: it made no Trainer, or none that trained; or
            no snapshot was taken.
    """
    check(options)
    if VARIABLE in os.environ:
        raise ConfigError("run", expected="one dare-train run around a command", found="another around it")
    if shutil.which(command[0]) is None:
        raise ConfigError(command[0], expected="a program to run", found="none of that name")
    with tempfile.TemporaryDirectory(prefix="dare-train-run-") as folder:
        order = RunOrder(options, str(Path(folder) / "journal"))
        code = _finished(command, _environment(order))
        notes = order.notes()
    if code == 0:
        check_outcome(notes, shlex.join(command))
    if options and any(note.event == "own" for note in notes):
        print("dare-train: the command has a DareCallback of its own; --dare was not for it", file=sys.stderr)
    return code


def check_outcome(notes: Sequence[Note], command: str) -> None:
    """Whether a command that ended with 0 did what it was started for.

    Raises:
        SnapshotError: saying what is missing.
    """
    events = {note.event for note in notes}
    makers = ", ".join(sorted({note.trainer for note in notes}))
    packages = sum(note.packages for note in notes)
    failures = sum(note.failures for note in notes)
    remedy = ""
    if not notes:
        expected, found = "a Trainer of transformers", "none made, and exit code 0"
        remedy = (
            "loops of one's own and Lightning have other ways (docs/integrations.md); "
            "python -I and -E do not see this one"
        )
    elif "began" not in events:
        expected, found = "a training", f"{makers} made, and never trained"
    elif "ended" not in events:
        expected, found = "a training that ends", f"{makers}, whose training began, and did not end"
    elif "own" not in events and not packages:
        expected = "a package"
        found = f"{makers}, which trained without one: " + (
            f"{failures} failures, see above" if failures else "none was due (when=)"
        )
    else:
        return
    raise SnapshotError(f"run {command}", expected=expected, found=found, remedy=remedy)


def _environment(order: RunOrder) -> dict[str, str]:
    before = os.environ.get("PYTHONPATH")
    path = os.pathsep.join([str(_ON_PATH), *([before] if before else [])])
    return {**os.environ, "PYTHONPATH": path, VARIABLE: order.written()}


def _finished(command: Sequence[str], environment: Mapping[str, str]) -> int:
    """Exit code of a command that has all that this process has: terminal, folder, signals."""
    with _handing_on() as started:
        process = subprocess.Popen(command, env=environment)
        started.append(process)
        code = process.wait()
    return code if code >= 0 else 128 - code


@contextmanager
def _handing_on() -> Iterator[list[subprocess.Popen[bytes]]]:
    """Signals go to the processes in the list, instead of ending this one."""
    processes: list[subprocess.Popen[bytes]] = []

    def hand_on(number: int, _frame: Any) -> None:
        if signal.Signals(number).name in _TYPED and _in_front():
            return
        for process in processes:
            process.send_signal(number)

    numbers = [getattr(signal, name) for name in _HANDED_ON if hasattr(signal, name)]
    taken = [number for number in numbers if signal.getsignal(number) is not signal.SIG_IGN]
    before = {number: signal.signal(number, hand_on) for number in taken}
    try:
        yield processes
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _in_front() -> bool:
    """Whether this process and what it started have the terminal."""
    try:
        terminal = os.open("/dev/tty", os.O_RDONLY)
    except OSError:
        return False
    try:
        return os.tcgetpgrp(terminal) == os.getpgrp()
    except OSError:
        return False
    finally:
        os.close(terminal)

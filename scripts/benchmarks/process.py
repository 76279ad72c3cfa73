"""Whole processes, measured from outside: wall time, and memory read from /proc while they run."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

DARE_TRAIN = (sys.executable, "-m", "dare_train")
INTERVAL = 0.005
"""Seconds between two looks at a process's memory."""


@dataclass(frozen=True, kw_only=True)
class Measured:
    """What one process cost, from before its start until after its end."""

    seconds: float
    anonymous: float
    """Peak RssAnon in MB (10⁶ bytes): memory that is the process's own, without mapped files."""
    resident: float
    """Peak resident set in MB, mapped files included (VmHWM)."""
    stderr: str


def measure(command: Sequence[str | Path], env: Mapping[str, str] | None = None) -> Measured:
    """Run a command to its end, with `env` added to the environment.

    Raises:
        RuntimeError: it failed; with the end of what it said.
    """
    with tempfile.TemporaryFile() as output, tempfile.TemporaryFile() as errors:
        before = time.perf_counter()
        child = subprocess.Popen(command, stdout=output, stderr=errors, env={**os.environ, **(env or {})})
        watch = Watch(child.pid)
        code = child.wait()
        seconds = time.perf_counter() - before
        watch.stop()
        errors.seek(0)
        stderr = errors.read().decode(errors="replace")
    if code:
        raise RuntimeError(f"{' '.join(map(str, command))}: exit code {code}\n{stderr[-2000:]}")
    return Measured(
        seconds=seconds, anonymous=watch.peaks["RssAnon"], resident=watch.peaks["VmHWM"], stderr=stderr
    )


class Watch(threading.Thread):
    """Looks at a process's memory again and again until told to stop.

    Attributes:
        peaks: largest RssAnon and VmHWM so far, in MB (10⁶ bytes).
    """

    def __init__(self, pid: int) -> None:
        super().__init__(daemon=True)
        self.peaks = {"RssAnon": 0.0, "VmHWM": 0.0}
        self._status = Path(f"/proc/{pid}/status")
        self._done = threading.Event()
        self.start()

    def run(self) -> None:
        while not self._done.wait(INTERVAL):
            try:
                status = self._status.read_text()
            except (FileNotFoundError, ProcessLookupError):
                return
            for field, megabytes in _fields(status):
                self.peaks[field] = max(self.peaks[field], megabytes)

    def stop(self) -> None:
        self._done.set()
        self.join()


def _fields(status: str) -> list[tuple[str, float]]:
    """RssAnon and VmHWM in MB; nothing of a process that is about to be gone."""
    lines = (line.split() for line in status.splitlines())
    return [
        (words[0][:-1], int(words[1]) * 1024 / 1e6)
        for words in lines
        if words and words[0] in ("RssAnon:", "VmHWM:")
    ]

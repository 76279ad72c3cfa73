"""A process that tries inputs of one kind, and tells of each before and after."""

from __future__ import annotations

import json
import os
import resource
import signal
import sys
import time
import traceback
from itertools import count
from pathlib import Path
from typing import Any

from hypothesis import HealthCheck, Phase, given, seed, settings
from judging import Input, Wrong, tried
from made_up import inputs

from dare_train.weights.skeletons import class_for_task

SECONDS = 10
"""Of a processor: an input that takes longer hangs."""
WAITING = 60
"""Seconds on the clock, for those that wait: processors may be busy with others."""
MEMORY = 1 << 30
"""Bytes that an input may take beyond those that the process has."""
_SHRINKING = 30
"""Seconds in which an input that fails is made smaller; one that hangs stays as it is."""


class Hangs(BaseException):
    """An input has taken too long."""


class Batch:
    """Inputs that Hypothesis makes up from a seed.

    Args:
        last: a file that says which input is being tried, should the process die.
    """

    def __init__(self, good: Path, place: Path, last: Path) -> None:
        self._good = good
        self._place = place
        self._last = last
        self._numbers = count()
        self.done = 0
        self.taken = 0
        self.slowest = 0.0
        self.failing: tuple[Input, str] | None = None
        self._give_up = float("inf")

    def run(self, kind: str, number: int, size: int) -> dict[str, Any]:
        """Try so many inputs; where one fails, make it as small as possible."""

        @seed(number)
        @settings(
            max_examples=size,
            database=None,
            deadline=None,
            phases=[Phase.generate, Phase.shrink],
            suppress_health_check=[*HealthCheck],
        )
        @given(inputs(kind))
        def try_one(one: Input) -> None:
            self._try(one)

        try:
            try_one()
        except (Exception, Hangs):
            if self.failing is None:
                raise
        failing = self.failing
        return {
            "kind": kind,
            "seed": number,
            "done": self.done,
            "taken": self.taken,
            "slowest": self.slowest,
            "failing": failing and [failing[0].written(), failing[1]],
        }

    def _try(self, one: Input) -> None:
        if time.monotonic() > self._give_up:
            return
        self._last.write_text(one.written())
        place = self._place / str(next(self._numbers))
        began = time.process_time()
        _watch(SECONDS, WAITING)
        try:
            self.taken += tried(one, self._good, place)
        except (Exception, Hangs) as error:
            _watch(0, 0)
            slow = isinstance(error, (Hangs, MemoryError))
            self._give_up = min(self._give_up, time.monotonic() + (0 if slow else _SHRINKING))
            self.failing = one, told(error)
            raise
        finally:
            _watch(0, 0)
            self.done += 1
            self.slowest = max(self.slowest, time.process_time() - began)


def _watch(of_a_processor: float, on_the_clock: float) -> None:
    signal.setitimer(signal.ITIMER_PROF, of_a_processor)
    signal.setitimer(signal.ITIMER_REAL, on_the_clock)


def told(error: BaseException) -> str:
    """The kind of failure, and where it happened."""
    if isinstance(error, Wrong):
        return f"wrong: {error}"
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if "dare_train/" in frame.filename]
    where = f"{Path(frames[-1].filename).name}:{frames[-1].name}" if frames else "?"
    return f"{type(error).__name__} in {where}: {ascii(str(error))[:200]}"


def limit_memory() -> None:
    """From now on, this process may take so much more."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + MEMORY,) * 2)


def main() -> None:
    """Read a kind, a seed and a size from each line of stdin; write a line of JSON for each to a descriptor
    that was given.
    """
    good, place, last = map(Path, sys.argv[1:4])
    answers = os.fdopen(int(sys.argv[4]), "w")

    def hang(*_: Any) -> None:
        raise Hangs(f"more than {SECONDS} seconds of a processor, or {WAITING} on the clock")

    signal.signal(signal.SIGALRM, hang)
    signal.signal(signal.SIGPROF, hang)
    warmed_up = False
    for line in sys.stdin:
        kind, number, size = json.loads(line)
        if not warmed_up:
            if kind in ("adapter", "command line"):
                class_for_task("CAUSAL_LM", {})  # imports transformers, where there is one
            tried(Input(kind, ()), good, place / "warm")
            limit_memory()
            warmed_up = True
        answers.write(json.dumps(Batch(good, place, last).run(kind, number, size)) + "\n")
        answers.flush()


if __name__ == "__main__":
    main()

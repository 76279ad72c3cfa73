"""One round: a fork that does something and meets a fault, and what it leaves."""

from __future__ import annotations

import os
import random
import shutil
import signal
import sys
import time
import traceback
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from dare_train.errors import DareError

from .faulting import FAULTS, Fault, arm, seen
from .scenarios import Scenario, litter

DONE, REFUSED, RAW = 0, 3, 4
_AT_RANDOM = "killed at random"


@dataclass(frozen=True, kw_only=True)
class Round:
    """What came of one fault."""

    scenario: str
    fault: str
    call: int
    ended: int
    """Exit code, or minus the signal."""
    state: str
    wrong: tuple[str, ...] = ()
    """What must not be, in sentences."""


@dataclass
class Bench:
    """The place in which all rounds happen, one after another: what they write names it."""

    place: Path
    said: Path = field(init=False)
    """What the last fork printed."""

    def __post_init__(self) -> None:
        self.said = self.place.with_name("said.txt")

    def everywhere(self, scenario: Scenario, fault: str) -> Iterator[Round]:
        """The fault at each call once, until the action no longer meets it."""
        for number in range(1, self._calls(scenario, FAULTS[fault]) + 1):
            yield self.round(scenario, fault, number)

    def at_random(self, scenario: Scenario, source: random.Random) -> Round:
        """A kill at an instant of the whole, or at any call."""
        took = self._took(scenario)
        return self.round(scenario, _AT_RANDOM, 0, after=source.uniform(0, took * 1.05))

    def round(self, scenario: Scenario, fault: str, call: int, after: float | None = None) -> Round:
        self._afresh(scenario)
        ended = self._forked(scenario, FAULTS.get(fault), call, after)
        state = scenario.state(self.place)
        wrong = []
        if ended == RAW:
            wrong.append(f"raw exception: {self.said.read_text().strip().splitlines()[-1]}")
        if state not in scenario.allowed:
            wrong.append(f"left {state}")
        if ended == DONE and state != scenario.finished and not scenario.slow:
            wrong.append(f"said that it was done, and left {state}")
        again = self._forked(scenario, None, 0, None)
        if again != DONE:
            wrong.append(f"the next run ended with {again}: {self.said.read_text()[-300:].strip()}")
        elif (finished := scenario.state(self.place)) != scenario.finished:
            wrong.append(f"the next run left {finished}")
        if left := litter(self.place):
            wrong.append(f"litter after the next run: {', '.join(left[:4])}")
        return Round(
            scenario=scenario.name, fault=fault, call=call, ended=ended, state=state, wrong=tuple(wrong)
        )

    def _afresh(self, scenario: Scenario) -> None:
        shutil.rmtree(self.place, ignore_errors=True)
        self.place.mkdir(parents=True)
        scenario.prepare(self.place)

    def _calls(self, scenario: Scenario, fault: Fault) -> int:
        """How many there are without a fault."""
        self._afresh(scenario)
        counted = self.place.with_name("calls.txt")
        ended = self._forked(scenario, fault, 0, None, counted)
        assert ended == DONE, f"{scenario.name} without any fault: {self.said.read_text()}"
        return int(counted.read_text())

    def _took(self, scenario: Scenario) -> float:
        self._afresh(scenario)
        began = time.perf_counter()
        self._forked(scenario, None, 0, None)
        return time.perf_counter() - began

    def _forked(
        self,
        scenario: Scenario,
        fault: Fault | None,
        call: int,
        after: float | None,
        counted: Path | None = None,
    ) -> int:
        sys.stdout.flush()
        process = os.fork()
        if not process:
            os._exit(self._acted(scenario, fault, call, counted))
        if after is not None:
            time.sleep(after)
            os.kill(process, signal.SIGKILL)
        return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])

    def _acted(self, scenario: Scenario, fault: Fault | None, call: int, counted: Path | None) -> int:
        """In the fork."""
        output = os.open(self.said, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(output, 1)
        os.dup2(output, 2)
        try:
            if fault is not None:
                arm(self.place / scenario.below if scenario.below else self.place, call, fault)
            scenario.act(self.place)
            code = DONE
        except DareError as error:
            print(f"{type(error).__name__}: {error}", file=sys.stderr)
            code = REFUSED
        except BaseException:  # noqa: BLE001 - whatever it is, it is told
            traceback.print_exc()
            code = RAW
        if counted is not None:
            counted.write_text(str(seen()))
        sys.stdout.flush()
        sys.stderr.flush()
        return code

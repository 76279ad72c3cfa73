"""The command line: gives batches of inputs to workers, and writes down what fails."""

from __future__ import annotations

import argparse
import json
import logging
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import cycle
from pathlib import Path
from typing import Any

from judging import KINDS, LEFT_OUT, Input, build, make_good

_SIZE = 100
"""Inputs of a batch."""
_PATIENCE = 300
"""Seconds that a batch may take."""
_SLICE = 20.0
"""Seconds of one kind, and of one process: what it leaks, if anything, stays small. In a short run less, so
that each kind has its turn."""


@dataclass
class Campaign:
    good: Path
    place: Path
    out: Path
    seed: int
    until: float
    kinds: list[str]
    turns: Iterator[str]
    """Kinds, in the order in which whoever is free takes them."""
    slice: float
    """Seconds of a turn, without what the process imports."""
    numbers: Counter[str] = field(default_factory=Counter)
    done: Counter[str] = field(default_factory=Counter)
    taken: Counter[str] = field(default_factory=Counter)
    slowest: float = 0.0
    failures: dict[str, str] = field(default_factory=dict)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def work(self, number: int) -> None:
        """One processor's share, until the time is over."""
        place = self.place / str(number)
        place.mkdir()
        try:
            while time.monotonic() < self.until:
                self._process(place, next(self.turns))
        finally:
            self.until = 0.0  # where this one failed, the others need not go on

    def _process(self, place: Path, kind: str) -> None:
        """A process, and the batches that it is given; where it dies, what it died of is a failure."""
        last = place / "last"
        said = place / "said"
        reading, writing = os.pipe()
        command = [sys.executable, "-m", "fuzzing.worker", *map(str, (self.good, place, last, writing))]
        with (
            os.fdopen(reading) as answers,
            said.open("wb") as output,
            subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=output, stderr=output, text=True, pass_fds=[writing]
            ) as process,
        ):
            os.close(writing)
            assert process.stdin is not None
            end = self.until
            while time.monotonic() < end:
                process.stdin.write(json.dumps([kind, self._next(kind), _SIZE]) + "\n")
                process.stdin.flush()
                timer = threading.Timer(_PATIENCE, process.kill)
                timer.start()
                answer = answers.readline()
                timer.cancel()
                if not answer:
                    code = process.wait()
                    output_tail = said.read_text(errors="replace")[-300:]
                    if not last.exists():
                        raise RuntimeError(f"no input was tried: {code}: {output_tail}")
                    self._keep(last.read_text(), f"the process died: {code}: {output_tail}")
                    break
                self._note(json.loads(answer))
                if end == self.until:  # what it imports for the first batch may take as long as a slice
                    end = min(time.monotonic() + self.slice, self.until)
            process.stdin.close()
        for left in place.iterdir():
            shutil.rmtree(left) if left.is_dir() else left.unlink()

    def _next(self, kind: str) -> int:
        with self.lock:
            self.numbers[kind] += 1
            return self.seed * 1_000_003 + self.numbers[kind]

    def _note(self, batch: dict[str, Any]) -> None:
        with self.lock:
            self.done[batch["kind"]] += batch["done"]
            self.taken[batch["kind"]] += batch["taken"]
            self.slowest = max(self.slowest, batch["slowest"])
        if batch["failing"]:
            self._keep(*batch["failing"])

    def _keep(self, written: str, what: str) -> None:
        """Write a failing input down, with its files: one of those that fail at the same place."""
        with self.lock:
            if what in self.failures:
                return
            self.failures[what] = written
            folder = self.out / f"{len(self.failures):03}"
            folder.mkdir(parents=True)
            (folder / "input.json").write_text(written + "\n")
            (folder / "failure.txt").write_text(what + "\n")
            build(Input.read(written), self.good, folder / "files")
        print(f"FAILS: {what}\n       {written[:300]}", flush=True)


def main() -> int:
    options = _parser().parse_args()
    logging.disable(logging.WARNING)
    memory = Path("/dev/shm")
    with tempfile.TemporaryDirectory(prefix="fuzz-", dir=memory if memory.is_dir() else None) as folder:
        good = Path(folder) / "good"
        good.mkdir()
        kinds = options.only or sorted(KINDS)
        make_good(good)
        campaign = Campaign(
            good=good,
            place=Path(folder),
            out=options.out,
            seed=options.seed,
            until=time.monotonic() + 60 * options.minutes,
            kinds=kinds,
            turns=cycle(kinds),
            slice=min(_SLICE, 28 * options.minutes * options.processes / len(kinds)),
        )
        with ThreadPoolExecutor(options.processes) as pool:
            list(pool.map(campaign.work, range(options.processes)))
    if LEFT_OUT:
        print(f"left out, without transformers and gguf: {', '.join(LEFT_OUT)}")
    for kind in campaign.kinds:
        print(f"{kind:18} {campaign.done[kind]:>9,} inputs, {campaign.taken[kind]:>9,} of them taken")
    if untried := [kind for kind in campaign.kinds if not campaign.done[kind]]:
        print(f"too short a time for: {', '.join(untried)}")
    total = sum(campaign.done.values())
    rate = total / options.minutes * 60
    print(f"seed {options.seed}: {total:,} inputs, {rate:,.0f} an hour; slowest {campaign.slowest:.1f} s")
    print(f"{len(campaign.failures)} failures" + (f", in {options.out}" if campaign.failures else ""))
    return 1 if campaign.failures else 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="scripts/fuzz", description=__doc__)
    parser.add_argument("--minutes", type=float, default=3, help="how long")
    parser.add_argument("--seed", type=int, default=1, help="of what is made up")
    parser.add_argument("--only", nargs="+", choices=sorted(KINDS), metavar="KIND", help="these kinds alone")
    parser.add_argument("--processes", type=int, default=os.cpu_count() or 1, help="one for each CPU")
    parser.add_argument("--out", type=Path, default=Path("fuzz"), metavar="FOLDER", help="of what fails")
    return parser


if __name__ == "__main__":
    sys.exit(main())

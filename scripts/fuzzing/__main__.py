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
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import good_files
from judging import KINDS, Input, build

_SIZE = 100
"""Inputs of a batch."""
_PATIENCE = 120
"""Seconds that a batch may take."""
_SLICE = 20
"""Seconds of one kind, and of one process: what it leaks, if anything, stays small."""


@dataclass
class Campaign:
    good: Path
    place: Path
    out: Path
    seed: int
    until: float
    kinds: list[str]
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
        turn = number
        while time.monotonic() < self.until:
            self._process(place, self.kinds[turn % len(self.kinds)])
            turn += 1

    def _process(self, place: Path, kind: str) -> None:
        """A process, and the batches that it is given; where it dies, what it died of is a failure."""
        last = place / "last"
        command = [sys.executable, "-m", "fuzzing.worker", str(self.good), str(place), str(last)]
        with subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        ) as process:
            assert process.stdin is not None
            assert process.stdout is not None
            assert process.stderr is not None
            end = min(time.monotonic() + _SLICE, self.until)
            while time.monotonic() < end:
                process.stdin.write(json.dumps([kind, self._next(kind), _SIZE]) + "\n")
                process.stdin.flush()
                timer = threading.Timer(_PATIENCE, process.kill)
                timer.start()
                answer = process.stdout.readline()
                timer.cancel()
                if not answer:
                    said = process.stderr.read()[-300:]
                    self._keep(last.read_text(), f"the process died: {process.wait()}: {said}")
                    break
                self._note(json.loads(answer))
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
        campaign = Campaign(
            good=good_files.make(good),
            place=Path(folder),
            out=options.out,
            seed=options.seed,
            until=time.monotonic() + 60 * options.minutes,
            kinds=options.only or sorted(KINDS),
        )
        shares = range(options.processes)
        threads = [threading.Thread(target=campaign.work, args=[number]) for number in shares]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    for kind in campaign.kinds:
        print(f"{kind:16} {campaign.done[kind]:>9,} inputs, {campaign.taken[kind]:>9,} of them taken")
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

"""`scripts/kill`: faults at every call by which each command writes, and kills at random moments."""

from __future__ import annotations

import argparse
import logging
import random
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

from .faulting import FAULTS, with_layer
from .rounds import Bench, Round
from .scenarios import Scenario, of_folders, of_records

_OF_SLOW_ONES = ("killed before", "disk fails once")


def main() -> int:
    options = _options()
    with_layer()
    logging.disable(logging.CRITICAL)
    began = time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="dare-kill-", dir=options.folder) as folder:
        place = Path(folder)
        scenarios = _chosen(place / "inputs", options.only)
        bench = Bench(place / "bench" / "place")
        rounds = [done for scenario in scenarios for done in _every_call(bench, scenario, options.faults)]
        source = random.Random(options.seed)
        quick = [scenario for scenario in scenarios if not scenario.slow] or scenarios
        for number in range(options.rounds):
            slow_turn = number % options.slow_every == 0
            rounds.append(bench.at_random(source.choice(scenarios if slow_turn else quick), source))
            _tell_wrong(rounds[-1])
    _tell(rounds)
    wrong = sum(bool(done.wrong) for done in rounds)
    print(f"{len(rounds)} rounds, {wrong} wrong, seed {options.seed}, {time.perf_counter() - began:.0f} s")
    return 1 if wrong else 0


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="scripts/kill", description=__doc__)
    parser.add_argument("--rounds", type=int, default=1000, help="kills at random moments (default: 1000)")
    parser.add_argument("--seed", type=int, default=0, help="of the random moments")
    parser.add_argument("--only", action="append", help="scenarios whose name begins so; may be repeated")
    parser.add_argument(
        "--faults",
        action="append",
        choices=list(FAULTS),
        help="at every call; all by default, of trainings two",
    )
    parser.add_argument("--slow-every", type=int, default=20, help="a training in so many random rounds")
    parser.add_argument("--folder", help="where to work, such as a small tmpfs; by default the temporary one")
    return parser.parse_args()


def _chosen(inputs: Path, only: list[str] | None) -> list[Scenario]:
    inputs.mkdir(parents=True)
    wanted = tuple(only) if only else ("",)
    scenarios = [*of_folders(inputs), *of_records(inputs)]
    if any("training".startswith(name) or name.startswith("training") for name in wanted):
        from .training import of_training

        scenarios += of_training(inputs)
    chosen = [scenario for scenario in scenarios if scenario.name.startswith(wanted)]
    if not chosen:
        sys.exit(f"scripts/kill: no scenario begins with {only}; there are {[s.name for s in scenarios]}")
    return chosen


def _every_call(bench: Bench, scenario: Scenario, faults: list[str] | None) -> list[Round]:
    done = []
    for fault in faults or (_OF_SLOW_ONES if scenario.slow else FAULTS):
        for each in bench.everywhere(scenario, fault):
            done.append(each)
            _tell_wrong(each)
    return done


def _tell_wrong(done: Round) -> None:
    for what in done.wrong:
        print(f"WRONG {done.scenario}, {done.fault}, call {done.call}: {what}", flush=True)


def _tell(rounds: list[Round]) -> None:
    """A line for each scenario and fault: rounds, and the states that they left."""
    kinds = dict.fromkeys((done.scenario, done.fault) for done in rounds)
    for scenario, fault in kinds:
        left = [done for done in rounds if (done.scenario, done.fault) == (scenario, fault)]
        states = Counter(done.state for done in left)
        told = ", ".join(f"{count} {state}" for state, count in sorted(states.items()))
        print(f"{scenario:34} {fault:24} {len(left):5} rounds: {told}")


if __name__ == "__main__":
    sys.exit(main())

"""The command line of the benchmarks: one subcommand per module."""

from __future__ import annotations

import argparse
import importlib
import json
from pathlib import Path

from .common import say
from .report import Report, machine, show

MODULES = {
    "size": "size",
    "extract": "extract",
    "apply": "apply",
    "memory": "memory",
    "peers": "peers",
    "merge": "merge",
    "callback": "callback",
    "ranks": "ranks",
    "gpu": "gpu",
    "code": "machine_code",
    "sweep": "sweep",
    "tuning": "tuning",
    "tickets": "tickets",
    "import": "startup",
}
BUSY = 0.5
"""Load average of the last minute from which times mean little."""


def main() -> None:
    options = parser().parse_args()
    names = everything() if options.benchmark == "all" else [options.benchmark]
    reports: dict[str, Report] = {}
    where = machine()
    if where["load_before"] > BUSY:
        say(
            f"[yellow]the machine is busy (load average {where['load_before']:.1f}): times will "
            "be too long, ours and the peers'[/]"
        )
    for name in names:
        reports[name] = importlib.import_module(f".{MODULES[name]}", __package__).run(options.runs)
        show(reports[name])
        if options.json:
            options.json.write_text(
                json.dumps(
                    {"machine": where, **{key: value.plain() for key, value in reports.items()}}, indent=1
                )
            )


def everything() -> list[str]:
    """All that this machine can measure."""
    import torch

    if torch.cuda.is_available():
        return list(MODULES)
    say("[yellow]gpu: not measured, this machine has none[/]")
    return [name for name in MODULES if name != "gpu"]


def parser() -> argparse.ArgumentParser:
    result = argparse.ArgumentParser(
        prog="scripts/bench", description="Measure dare_train on this machine and say which targets it meets."
    )
    result.add_argument("benchmark", choices=[*MODULES, "all"], help="what to measure")
    result.add_argument(
        "--runs", type=positive, default=5, metavar="N", help="measured runs of each command (default: 5)"
    )
    result.add_argument(
        "--json",
        type=Path,
        metavar="FILE",
        help="also write every measurement to FILE, relative to the repository",
    )
    return result


def positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError("at least 1")
    return number


if __name__ == "__main__":
    main()

"""Everything that docs/results.md reports, measured again: each recipe with its section's options.

    DARE_TRAIN_DATA=folder python recipes/results.py    # with local copies of the data: half a day
    python recipes/results.py                           # with those of the Hub
    python recipes/results.py --list                    # only print the commands
    python recipes/results.py --only decoder merge_tasks

A recipe does not do again what it has done, so this may be interrupted and started anew.
"""

from __future__ import annotations

import argparse
import shlex
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from inputs import data_arguments
from quickstart import say

DECODER = "runs/decoder-base"
"""Of 11.2 million parameters: the first of decoder.py's commands pretrains it."""
COMMANDS: Mapping[str, Sequence[str]] = {
    "chat_study": (
        "chat_study.py --tasks banking77 clinc150 exceptions --trainings lora-1e-4 lora-5e-4 full-1e-4 "
        "full-1e-5 --steps 24 --examples 64 --training-seeds 1 --out runs/chat_study",
    ),
    "chat_experts": (
        "chat_experts.py --tasks instructions maths code banking77 --kept arc_easy openbookqa --steps 24 "
        "--examples 48 --asked 24 --kept-questions 60 --run-code --out runs/chat_experts",
    ),
    "encoder": ("encoder.py --full --out runs/encoder",),
    "when_it_breaks": ("when_it_breaks.py --full --out runs/when_it_breaks",),
    "decoder": (
        f"pretrain_decoder.py --full --out {DECODER}",
        "decoder.py --full --models stories260K --out runs/decoder",
        f"decoder.py --full --models {DECODER} --steps 150 --examples 60 --seeds 3 --lora --out runs/larger",
    ),
    "merge_tasks": ("merge_tasks.py --full --out runs/merge_tasks --json runs/merge_tasks/results.json",),
    "continual_tasks": ("continual_tasks.py --full --out runs/continual",),
    "lottery_ticket": ("lottery_ticket.py --full --out runs/lottery_ticket",),
    "subnetworks": ("subnetworks.py --full --out runs/subnetworks",),
    "efficient_tuning": ("efficient_tuning.py --full --out runs/efficient_tuning",),
}
"""By recipe, in the order of the page. What is measured goes to the folders runs/*."""


def main() -> None:
    options = parse()
    data = ["--data", str(options.data)] if options.data else []
    for name in options.only:
        for command in COMMANDS[name]:
            recipe, *rest = shlex.split(command)
            complete = [f"recipes/{recipe}", *rest, *data]
            if options.list:
                print(shlex.join(["python", *complete]))
            else:
                run(complete)


def parse() -> argparse.Namespace:
    layout = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=layout)
    data_arguments(parser)
    names = [*COMMANDS]
    parser.add_argument(
        "--only", nargs="+", choices=names, default=names, metavar="RECIPE", help=", ".join(names)
    )
    parser.add_argument("--list", action="store_true", help="print the commands, and run none")
    return parser.parse_args()


def run(command: Sequence[str]) -> None:
    """Ends where a recipe fails."""
    say(shlex.join(["python", *command]))
    done = subprocess.run([sys.executable, *command], cwd=Path(__file__).parents[1], check=False)
    if done.returncode:
        sys.exit(f"{command[0]} failed")


if __name__ == "__main__":
    main()

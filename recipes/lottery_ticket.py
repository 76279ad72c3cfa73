"""The lottery-ticket curve of a fine-tune: quality against the share of weights that are trained, for tickets and for random subnetworks.

    python recipes/lottery_ticket.py                    # stories260K on instructions, three levels: about a minute
    python recipes/lottery_ticket.py --full             # down to 1 % of the elements, with all ablations: about twenty minutes
    python recipes/lottery_ticket.py --task mine.jsonl --model Qwen/Qwen3-0.6B --steps 1000 --beside shuffled --transfer other.jsonl

A decoder is fine-tuned, some of its elements are dropped by the size of their deltas, the others return to where they were early in
training, and train again by themselves; and so on. Beside each level others are trained: as many elements that were chosen at random, in
the whole model or tensor by tensor; the ticket's, but from each other's values; those of a ticket that another task has.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

from continual_tasks import as_task, in_float32
from inputs import DATA, SPOKEN, spoken
from quickstart import console, say
from rich.markdown import Markdown
from studies import common_arguments, extent, quiet
from transformers import AutoTokenizer
from tuning import Training

from dare_train import TicketSearch, write_report
from dare_train.tickets import ABLATIONS


def main() -> None:
    options, began = parse(), time.perf_counter()
    quiet()
    much, name = extent(options), Path(options.task).stem
    out: Path = options.out / name
    base = in_float32(options.model, out / "base")
    training = Training(steps=much.steps, learning_rate=options.learning_rate or 3e-3, batch_size=16, max_length=128)

    def search(task: str, folder: Path, **more: Any) -> TicketSearch:
        rows, tokenizer = spoken(task, options.data), AutoTokenizer.from_pretrained(base)
        levels = {"levels": 5, "share": 0.6, "rewind": much.steps // 20} if options.full else {"levels": 3}
        return TicketSearch(base, as_task(Path(task).stem, tokenizer, rows, training, much.examples), out=folder, **levels, **more)

    other = search(options.transfer, out / "transfer", beside=()) if options.transfer else None
    if other is not None:
        say(f"tickets of {options.transfer} first")
        other.run()
    found = search(options.task, out, beside=options.beside, transfer=other, every=max(much.steps // 10, 1)).run()
    page = write_report(found, out, title=f"Lottery tickets in the delta: {name}")
    console.print(Markdown((out / "tickets.md").read_text(encoding="utf-8")))
    say(f"everything is in {page}; done in {time.perf_counter() - began:.0f} s")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    common_arguments(parser, out="runs/lottery_ticket", data=DATA)
    parser.add_argument("--model", help="folder or Hub id of a causal language model; by default stories260K")
    parser.add_argument("--task", default="instructions", help=f"one of {', '.join(SPOKEN)}, or a file with the columns prompt and text")
    parser.add_argument("--beside", nargs="*", choices=ABLATIONS, metavar="ABLATION", help=f"some of {', '.join(ABLATIONS)}")
    parser.add_argument("--transfer", metavar="TASK", help="another task, whose tickets are tried on this one")
    options = parser.parse_args()
    options.model = options.model or str(options.data / "stories260K")
    options.steps = options.steps or (200 if options.full else 40)
    if options.beside is None:
        options.beside = ABLATIONS if options.full else ABLATIONS[:1]
    options.transfer = options.transfer or (SPOKEN[1] if options.full else None)
    return options


if __name__ == "__main__":
    main()

"""The lottery-ticket curve of a fine-tune: quality against the share of weights that are trained, for tickets
and for random subnetworks.

    python recipes/lottery_ticket.py           # a tiny decoder, three levels: about a minute
    python recipes/lottery_ticket.py --full    # down to 1 %, with all ablations, three times: an hour
    python recipes/lottery_ticket.py --task mine.jsonl --model Qwen/Qwen3-0.6B --beside shuffled

A decoder is fine-tuned, some of its elements are dropped by the size of their deltas, the others return to
where they were early in training, and train again by themselves; and so on. Beside each level others are
trained: as many elements that were chosen at random, in the whole model or tensor by tensor; the ticket's,
but from each other's values; those of a ticket that another task has.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

import public_data
import standard_library
from continual_tasks import as_task, in_float32
from inputs import short, spoken, usual
from option_types import count
from pretrain_decoder import base_decoder
from quickstart import console, say
from rich.markdown import Markdown
from studies import DECODER, SPOKEN, common_arguments, extent, quiet
from transformers import AutoTokenizer
from tuning import Training

from dare_train import TICKET_ABLATIONS, TicketSearch, write_report


def main() -> None:
    options, began = parse(), time.perf_counter()
    quiet()
    much = extent(options)
    name = short(options.task)
    out: Path = options.out / name
    base = in_float32(options.model, out / "base")

    def search(task: str, folder: Path, seed: int, **more: Any) -> TicketSearch:
        rows = spoken(task, options.data, options.columns)
        tokenizer = AutoTokenizer.from_pretrained(base)
        levels = {"levels": 5, "share": 0.6, "rewind": much.steps // 20} if options.full else {"levels": 3}
        training = Training(
            steps=much.steps,
            learning_rate=options.learning_rate or 3e-3,
            batch_size=16,
            max_length=128,
            seed=seed,
        )
        learnt = as_task(short(task), tokenizer, rows, training, much.examples)
        return TicketSearch(base, learnt, out=folder, seed=seed, **levels, **more)

    found = []
    for seed in range(options.searches):
        folder = out / f"seed-{seed}"
        other = search(options.transfer, folder / "transfer", seed, beside=()) if options.transfer else None
        if other is not None:
            say(f"seed {seed}: tickets of {options.transfer} first")
            other.run()
        say(f"seed {seed}: tickets of {name}")
        found.append(
            search(
                options.task,
                folder,
                seed,
                beside=options.beside,
                transfer=other,
                every=max(much.steps // 10, 1),
            ).run()
        )
    page = write_report(found, out, title=f"Lottery tickets in the delta: {name}")
    console.print(Markdown((out / "tickets.md").read_text(encoding="utf-8")))
    say(f"everything is in {page}; done in {time.perf_counter() - began:.0f} s")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    common_arguments(parser, out="runs/lottery_ticket")
    parser.add_argument("--model", help=DECODER)
    parser.add_argument(
        "--task", help=f"one of {SPOKEN}; a file, a folder or a Hub id, with the columns prompt and text"
    )
    parser.add_argument(
        "--beside",
        nargs="*",
        choices=TICKET_ABLATIONS,
        metavar="ABLATION",
        help=f"some of {', '.join(TICKET_ABLATIONS)}",
    )
    parser.add_argument(
        "--transfer", metavar="TASK", help="another task, whose tickets are tried on this one"
    )
    parser.add_argument(
        "--searches", type=count, metavar="N", help="from seeds of their own, for a confidence band"
    )
    options = parser.parse_args()
    options.searches = options.searches or (3 if options.full else 1)
    names = usual(public_data.SPOKEN, standard_library.SPOKEN, options)
    options.task = options.task or names[0]
    options.model = options.model or base_decoder(options)
    options.steps = options.steps or (200 if options.full else 16)
    if options.beside is None:
        options.beside = TICKET_ABLATIONS if options.full else TICKET_ABLATIONS[:1]
    options.transfer = options.transfer or (names[1] if options.full else None)
    return options


if __name__ == "__main__":
    main()

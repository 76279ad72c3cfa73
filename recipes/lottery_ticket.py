"""The lottery-ticket curve of a fine-tune: quality against the share of weights that are trained, for tickets and for random subnetworks.

    python recipes/lottery_ticket.py                    # stories260K on instructions, three levels: about a minute
    python recipes/lottery_ticket.py --full             # eight levels, rewound to an early step
    python recipes/lottery_ticket.py --task mine.jsonl --model Qwen/Qwen3-0.6B --steps 1000

A decoder is fine-tuned, half of its elements are dropped by the size of their deltas, the others return to where they were early in
training, and train again by themselves; and so on. Beside each level as many elements are trained that were chosen at random.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

from continual_tasks import as_task, in_float32
from inputs import DATA, SPOKEN, spoken
from quickstart import console, say
from rich.markdown import Markdown
from studies import common_arguments, extent, quiet
from transformers import AutoTokenizer
from tuning import Training

from dare_train import TicketSearch, write_report


def main() -> None:
    options, began = parse(), time.perf_counter()
    quiet()
    much, name = extent(options), Path(options.task).stem
    out: Path = options.out / name
    base = in_float32(options.model, out / "base")
    training = Training(steps=much.steps, learning_rate=options.learning_rate or 3e-3, batch_size=16, max_length=128)
    task = as_task(name, AutoTokenizer.from_pretrained(base), spoken(options.task, options.data), training, much.examples)
    levels, rewind = (8, much.steps // 20) if options.full else (3, 0)
    search = TicketSearch(base, task, out=out, levels=levels, rewind=rewind, every=max(much.steps // 10, 1))
    page = write_report(search.run(), out, title=f"Lottery tickets in the delta: {name}")
    console.print(Markdown((out / "tickets.md").read_text(encoding="utf-8")))
    say(f"everything is in {page}; done in {time.perf_counter() - began:.0f} s")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    common_arguments(parser, out="runs/lottery_ticket", data=DATA)
    parser.add_argument("--model", help="folder or Hub id of a causal language model; by default stories260K")
    parser.add_argument("--task", default="instructions", help=f"one of {', '.join(SPOKEN)}, or a file with the columns prompt and text")
    options = parser.parse_args()
    options.model = options.model or str(options.data / "stories260K")
    options.steps = options.steps or (None if options.full else 40)
    return options


if __name__ == "__main__":
    main()

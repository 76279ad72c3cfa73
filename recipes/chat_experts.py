"""Experts of a chat model: each learns one thing, is asked with ever more of its delta dropped, and all are
merged.

    DARE_TRAIN_DATA=folder python recipes/chat_experts.py      # as in docs/results.md: hours
    python recipes/chat_experts.py --tasks exceptions verbs --kept code_or_prose --steps 8 --examples 16

SmolLM2-135M-Instruct is fine-tuned, all of it, for each task: instructions, mathematics, code, and naming
intents. Each expert is judged as people judge chat models, before and after, and as the receiver of its
package gets it: by the loss on held-out answers, by what it answers, and by questions of other kinds that it
should not have unlearnt. It is swept over drop rates, beside dropping without rescaling and dropping the
smallest, and its embeddings are looked at. Then the experts are merged by the paper's methods, with DARE
first and without, and asked the same.

What was measured lies in files, and is not measured again. Figures are not comparable with published scores:
rows, prompts and shares are the recipe's.
"""

from __future__ import annotations

import argparse
import os
import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from chat_answers import encoded, held_out
from chat_training import Stage, common_arguments, of_task, setup_of, stage_of, supervise
from choice_questions import Choice, choice_questions
from inputs import usual
from option_types import count, positive
from quickstart import console, say
from record import Record
from rich.markdown import Markdown
from standard_library import Row, Split
from studies import at_drop_rate, progress, quiet

import dare_train
from dare_train import (
    MERGE_METHODS,
    Cell,
    DareCallback,
    DeltaPackage,
    Study,
    Sweep,
    Table,
    batched,
    collect_fisher,
    collect_gram,
    save_statistics,
    statistics_path,
    sweeps_study,
    with_interval,
    write_study,
)

PUBLIC = ("instructions", "maths", "code", "banking77")
STANDARD = ("exceptions", "verbs")
KEPT = ("arc_easy", "openbookqa")
STANDARD_KEPT = ("code_or_prose",)
"""What should not be lost."""
METHODS = ("average", "task_arithmetic", "ties", "fisher", "regmean")
"""Of merging: the paper's."""
LAMBDAS = (0.4, 0.7, 1.0)
"""Factors of the merged delta. Each row has the one that is best on validation rows, with DARE and without
alike."""
P = 0.9
"""Of packages, and of merging."""
RATES = (0.5, 0.9, 0.95, 0.99, 0.995)
RULES = ("dare", "drop_only", "magnitude")
"""Of the sweep."""
MASKS = 3
STATISTICS = 16
"""Training rows for Fisher merging and RegMean."""
VALIDATION = 16
"""Rows of each task that choose a factor."""
Losses = dict[str, float]
"""By task."""


@dataclass(frozen=True)
class Expert:
    """One fine-tuned model, with its packages."""

    stage: Stage

    @property
    def name(self) -> str:
        return self.stage.task.name

    @property
    def tuned(self) -> Path:
        """In bf16, as people ship it."""
        return self.stage.out / "tuned"

    def package(self, mask: int) -> DeltaPackage:
        return DeltaPackage.open(self.stage.out / f"mask-{mask}" / "final")

    def loss(self, model: Any, part: Split = "test") -> float:
        """Of the answers' tokens, in nats."""
        stage = self.stage
        rows: Sequence[Row] = stage.test if part == "test" else stage.part(part, VALIDATION)
        return float(held_out(stage.tokenizer, rows, stage.options.max_length)(model)["loss"])


def main() -> None:
    options = parse()
    quiet()
    run(options)


def parse(words: Sequence[str] | None = None) -> argparse.Namespace:
    layout = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=layout)
    common_arguments(parser, out="runs/chat_experts", steps=40)
    arguments(parser)
    options = parser.parse_args(words)
    options.full = False
    options.tasks = options.tasks or usual(PUBLIC, STANDARD, options)
    options.kept = usual(KEPT, STANDARD_KEPT, options) if options.kept is None else options.kept
    return options


def arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    usually = f"by default {' '.join(PUBLIC)}; without data {' '.join(STANDARD)}"
    add("--tasks", nargs="+", metavar="TASK", help=usually)
    add("--kept", nargs="*", metavar="QUESTIONS", help="data sets with choices, or files of them")
    add("--kept-questions", type=count, default=100, metavar="N", help="of each (default: %(default)s)")
    add("--asked", type=count, default=32, metavar="N", help="questions to answer (default: %(default)s)")
    add("--methods", nargs="+", default=METHODS, choices=[*MERGE_METHODS], metavar="METHOD")
    add("--learning-rate", type=positive, default=1e-4, help="(default: %(default)s)")


def run(options: argparse.Namespace) -> None:
    """Goes on where it was stopped."""
    began = time.perf_counter()
    own = ("learning_rate", "asked", "kept_questions")
    setup = {**setup_of(options), **{name: getattr(options, name) for name in own}}
    record = Record(options.out / "measured", setup)
    experts = [Expert(stage_of(of_task(options, task))) for task in options.tasks]
    kept = {name: choice_questions(name, options.data, options.kept_questions) for name in options.kept}
    for expert in experts:
        train(expert, options.learning_rate)
    judged = {
        expert.name: record.once(f"judged-{expert.name}", partial(judge, expert, kept)) for expert in experts
    }
    sweeps = {expert.name: swept(expert) for expert in experts}
    embeddings = {
        expert.name: record.once(f"inside-{expert.name}", partial(inside, expert)) for expert in experts
    }
    merges = {
        label: record.once(f"merged-{label.replace(' ', '-')}", partial(merged, experts, kept, method, drops))
        for method in options.methods
        for label, drops in {method: False, f"{method} + DARE": True}.items()
    }
    show(sweeps, judged, embeddings, merges, options.out)
    say(f"done in {time.perf_counter() - began:.0f} s")


# Each expert.


def train(expert: Expert, learning_rate: float) -> None:
    """Unless that is done; the folder with the fine-tuned weights appears last."""
    if expert.tuned.exists():
        return
    stage = expert.stage
    shutil.rmtree(stage.out, ignore_errors=True)
    stage.out.mkdir(parents=True)
    say(f"{expert.name}: {stage.options.steps} steps of {stage.options.batch_size}")
    told: dict[str, Any] = {"p": P, "when": "end", "on_error": "raise"}
    callbacks = [DareCallback(seed=mask, name=f"mask-{mask}", **told) for mask in range(MASKS)]
    model = supervise(stage.load(stage.base), stage, *callbacks, learning_rate=learning_rate)
    beside = stage.out / "tuned.partial"
    for kind, tensors in statistics(expert, model).items():
        save_statistics(statistics_path(expert.tuned, kind), kind, tensors, examples=STATISTICS)
    model.to(torch.bfloat16).save_pretrained(beside)
    stage.tokenizer.save_pretrained(beside)
    beside.replace(expert.tuned)


def statistics(expert: Expert, model: Any) -> Mapping[Any, Mapping[str, torch.Tensor]]:
    """What Fisher merging and RegMean need to know of it."""
    stage = expert.stage
    rows = encoded(stage.tokenizer, stage.train[:STATISTICS], stage.options.max_length)
    batches = batched(rows, stage.tokenizer, batch_size=4)
    return {"fisher": collect_fisher(model, batches), "gram": collect_gram(model, batches)}


def judge(expert: Expert, kept: Mapping[str, Sequence[Choice]]) -> dict[str, Any]:
    """The base, the expert, and what receivers of its packages have."""
    stage, received = expert.stage, expert.stage.out / "received"
    say(f"{expert.name}: asked before and after, and at a receiver's")
    figures = {}
    places: dict[str, str | Path] = {"base": stage.base, "fine-tuned": expert.tuned}
    for label, folder in places.items():
        figures[label] = asked(expert, stage.load(folder), kept)
    for mask in range(MASKS):
        dare_train.apply(stage.base, expert.package(mask), received, cast_base=True, overwrite=True)
        figures[f"received {mask}"] = asked(expert, stage.load(received), kept if mask == 0 else {})
    shutil.rmtree(received)
    return {"bytes": expert.package(0).stats["bytes"], "judge": stage.task.judge, "models": figures}


def asked(expert: Expert, model: Any, kept: Mapping[str, Sequence[Choice]]) -> dict[str, float | None]:
    stage = expert.stage
    others = {name: stage.chosen(model, questions) for name, questions in kept.items()}
    return {"loss": expert.loss(model), "right": stage.share_right(model, stage.options.asked), **others}


def swept(expert: Expert) -> Sweep:
    stage = expert.stage
    say(f"{expert.name}: sweeping")
    return dare_train.sweep(
        stage.load(expert.tuned),
        stage.base,
        held_out(stage.tokenizer, stage.test, stage.options.max_length),
        out=stage.out / "sweep",
        p=RATES,
        seeds=MASKS,
        variants=RULES,
        progress=progress("sweep"),
    )


def inside(expert: Expert) -> dict[str, dict[str, float]]:
    """Cosine of the last embeddings to the fine-tuned model's: by rule and drop rate, mean over masks."""
    stage = expert.stage
    say(f"{expert.name}: looking inside")
    rows = encoded(stage.tokenizer, stage.test, stage.options.max_length)
    batches = batched(rows, stage.tokenizer, batch_size=8)
    looked = dare_train.inside(
        stage.load(expert.tuned), stage.base, batches, p=(P, 0.99), seeds=MASKS, masks=1, tokens=512
    )
    return {
        rule: {f"{p:g}": fmean(mask[-1] for mask in masks) for p, masks in by_rate.items()}
        for rule, by_rate in looked.similarity.items()
    }


# All of them in one.


def merged(
    experts: Sequence[Expert], kept: Mapping[str, Sequence[Choice]], method: str, drops: bool
) -> dict[str, Any]:
    """The losses of each task, for each mask; and what the first one answers."""
    say(f"merging: {method}{' + DARE' if drops else ''}")
    settings: dict[str, Any] = {"p": P} if drops else {}
    if any(parameter.name == "lambda" for parameter in MERGE_METHODS[method].parameters):
        settings["lambda_"] = best_lambda(experts, method, settings)
    found: dict[str, Any] = {"settings": settings, "losses": []}
    for seed in range(MASKS if drops else 1):
        model = one_model(experts, method, {**settings, "seed": seed})
        found["losses"].append(losses(experts, model))
        if seed == 0:
            stages = [expert.stage for expert in experts]
            found["right"] = {
                stage.task.name: stage.share_right(model, stage.options.asked) for stage in stages
            }
            found["kept"] = {name: stages[0].chosen(model, questions) for name, questions in kept.items()}
    return found


def best_lambda(experts: Sequence[Expert], method: str, settings: Mapping[str, Any]) -> float:
    def mean_loss(value: float) -> float:
        model = one_model(experts, method, {**settings, "lambda_": value})
        return fmean(losses(experts, model, "validation").values())

    return min(LAMBDAS, key=mean_loss)


def one_model(experts: Sequence[Expert], method: str, settings: Mapping[str, Any]) -> Any:
    stage = experts[0].stage
    folder = stage.out.parent / "merged"
    models = [expert.tuned for expert in experts]
    dare_train.merge(stage.base, models, folder, method=method, overwrite=True, **settings)
    return stage.load(folder)


def losses(experts: Sequence[Expert], model: Any, part: Split = "test") -> Losses:
    return {expert.name: expert.loss(model, part) for expert in experts}


# What is shown.


def show(
    sweeps: Mapping[str, Sweep],
    judged: Mapping[str, Any],
    embeddings: Mapping[str, Any],
    merges: Mapping[str, Any],
    out: Path,
) -> None:
    whole = sweeps_study(sweeps, title="Experts of a chat model", name="chat_experts")
    tables = (
        judged_table(judged),
        at_drop_rate(sweeps, "loss", P),
        at_drop_rate(sweeps, "loss", 0.99),
        *whole.tables,
        embeddings_table(embeddings),
        *merge_tables(judged, merges),
    )
    told = {"judged": judged, "embeddings": embeddings, "merges": merges}
    page: Study = replace(whole, tables=tables, data={**whole.data, **told})
    console.print(Markdown(page.markdown()))
    say(f"everything is in {os.fspath(write_study(page, out))} and in the folders beside it")


def judged_table(judged: Mapping[str, Any]) -> Table:
    others = [name for name in next(iter(judged.values()))["models"]["base"] if name not in ("loss", "right")]
    rows = list[tuple[Cell, ...]]()
    for task, figures in judged.items():
        models = figures["models"]
        received = [models[f"received {mask}"] for mask in range(MASKS)]
        for label in ("base", "fine-tuned"):
            rows.append((task, label, *(shown(models[label][name]) for name in ("loss", "right", *others))))
        bands = (with_interval([one["loss"] for one in received]), band([one["right"] for one in received]))
        size = f"received, {figures['bytes']:,} bytes"
        rows.append((task, size, *bands, *(shown(received[0][name]) for name in others)))
    measures = ", ".join(f"{task}: {figures['judge']}" for task, figures in judged.items())
    return Table(
        title=f"Before, after, and from a package with p = {P:g}",
        columns=("task", "weights", "loss", "right answers", *others),
        rows=tuple(rows),
        note=f"Right is: {measures}. Mean over {MASKS} masks ± half of the 95 % confidence interval; "
        "the last columns are of the first mask.",
    )


def shown(value: float | None) -> Cell:
    return "" if value is None else value


def band(values: Sequence[float | None]) -> str:
    known = [value for value in values if value is not None]
    return with_interval(known) if known else ""


def embeddings_table(embeddings: Mapping[str, Any]) -> Table:
    rows: list[tuple[Cell, ...]] = [
        (task, rule, *by_rate.values())
        for task, rules in embeddings.items()
        for rule, by_rate in rules.items()
    ]
    rates = next(iter(next(iter(embeddings.values())).values()))
    return Table(
        title="Cosine of the last embeddings to the fine-tuned model's",
        columns=("task", "rule", *(f"p = {rate}" for rate in rates)),
        rows=tuple(rows),
    )


def merge_tables(judged: Mapping[str, Any], merges: Mapping[str, Any]) -> tuple[Table, ...]:
    tasks = [*judged]
    rows = list[tuple[Cell, ...]]()
    for label in ("base", "fine-tuned"):
        values = [judged[task]["models"][label]["loss"] for task in tasks]
        rows.append((label if label == "base" else "each its own expert", "", *values, fmean(values)))
    for label, found in merges.items():
        means = [fmean(each.values()) for each in found["losses"]]
        of_tasks = (with_interval([each[task] for each in found["losses"]]) for task in tasks)
        rows.append((label, shown(found["settings"].get("lambda_")), *of_tasks, with_interval(means)))
    kept = [*next(iter(merges.values()))["kept"]]
    answers: list[tuple[Cell, ...]] = [
        (label, *(shown(found["right"][task]) for task in tasks), *(found["kept"][name] for name in kept))
        for label, found in merges.items()
    ]
    note = f"DARE drops {P:g} of each delta; mean over {MASKS} masks ± half of the 95 % confidence interval."
    by_loss = Table(
        title="Merged: loss on each task",
        columns=("weights", "λ", *tasks, "mean"),
        rows=tuple(rows),
        note=note,
    )
    by_answers = Table(
        title="Merged: right answers",
        columns=("weights", *tasks, *kept),
        rows=tuple(answers),
        note="Of the first mask.",
    )
    return by_loss, by_answers


if __name__ == "__main__":
    main()

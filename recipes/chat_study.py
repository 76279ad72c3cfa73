"""Full fine-tunes and adapters of a chat model, shipped in several ways: what is lost, in how many bytes.

    DARE_TRAIN_DATA=folder python recipes/chat_study.py      # as in docs/results.md: hours
    python recipes/chat_study.py --tasks packages verbs --trainings lora-5e-4 --steps 20

Each task is learnt by each training: full fine-tunes in fp32, and LoRA adapters of rank 16 on all linear
layers, of one base in bf16. Packages are made in several ways, and judged by the loss on held-out answers
of the bf16 model that a receiver gets:

* `landed`: rescaled, then rounded to the base's grid by draws; `nearest`: to the nearest number;
* `rounded first`: what was trained is merged and rounded to bf16, as people ship it, and then dropped from.

What was measured lies in a file for each training, and is not measured again.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean
from tempfile import TemporaryDirectory
from typing import Any, Literal

import torch
from chat_answers import held_out
from chat_training import Stage, common_arguments, headed, of_task, prepared, setup_of, supervise
from option_types import count
from peft import LoraConfig, PeftModel
from quickstart import console, say
from record import Record
from rich.table import Table
from safetensors.torch import load_file
from studies import quiet
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

import dare_train
from dare_train import DareCallback, DeltaPackage

TASKS = ("banking77", "maths", "instructions", "code")
RATES = (0.9, 0.99)
MASKS = 3
FURTHER = 0.995
"""A drop rate that is looked at with one mask."""


@dataclass(frozen=True, kw_only=True)
class Way:
    """How the model is trained."""

    learning_rate: float
    adapter: bool
    quantised: bool = False
    """The base, to nf4, while the adapter is trained."""

    def config(self) -> LoraConfig | None:
        if not self.adapter:
            return None
        return LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")


Rounding = Literal["stochastic", "nearest"]

TRAININGS: Mapping[str, Way] = {
    "lora-5e-4": Way(learning_rate=5e-4, adapter=True),
    "full-1e-4": Way(learning_rate=1e-4, adapter=False),
    "lora-1e-4": Way(learning_rate=1e-4, adapter=True),
    "full-1e-5": Way(learning_rate=1e-5, adapter=False),
    "lora-2e-3": Way(learning_rate=2e-3, adapter=True),
    "qlora-5e-4": Way(learning_rate=5e-4, adapter=True, quantised=True),
}


@dataclass(frozen=True, kw_only=True)
class Shipped:
    """A package, and what the model that it makes is worth."""

    way: str
    p: float
    seed: int
    bytes: int
    changed: int
    loss: float


@dataclass(frozen=True, kw_only=True)
class Result:
    task: str
    training: str
    base: float
    """Loss on held-out answers, nats a token; likewise the next."""
    tuned: float
    """Of the model as it was trained, in fp32; of an adapter that was trained on a quantised base, on the
    base itself.
    """
    adapter_bytes: int
    """Of the adapter's file; 0 of a full fine-tune."""
    model_bytes: int
    """In bf16."""
    seconds: float
    packages: tuple[Shipped, ...]

    def kept(self, loss: float) -> float:
        """Share of what training gained that a loss still has."""
        return (self.base - loss) / (self.base - self.tuned)

    @classmethod
    def of(cls, plain: Mapping[str, Any]) -> Result:
        return cls(**{**plain, "packages": tuple(Shipped(**each) for each in plain["packages"])})


class Receiver:
    """Who has the base in bf16, applies packages to it, and asks the result."""

    def __init__(self, stage: Stage) -> None:
        self._stage = stage
        self._state = load_file(Path(stage.base) / "model.safetensors")
        self._model = stage.load(stage.base)
        self._texts = held_out(stage.tokenizer, stage.test, stage.options.max_length)
        self.base = self.loss_of(self._model)

    def loss_of(self, model: Any) -> float:
        return float(self._texts(model)["loss"])

    def loss_with(self, package: DeltaPackage) -> float:
        undo = dare_train.apply_(self._state, package)
        self._model.load_state_dict(self._state, strict=False)
        loss = self.loss_of(self._model)
        undo.revert()
        return loss

    @property
    def state(self) -> Mapping[str, torch.Tensor]:
        return self._state


def main() -> None:
    options = parse()
    quiet()
    run(options)


def run(options: argparse.Namespace) -> None:
    """Goes on where it was stopped."""
    began, results = time.perf_counter(), []
    record = Record(options.out / "measured", setup_of(options))
    for training in options.trainings:
        for task in options.tasks:
            for seed in range(options.seed, options.seed + seeds_of(task, training, options)):
                results.append(result_of(record, options, task, training, seed))
                console.print(table_of(results[-1]))
    console.print(summary(results))
    say(f"done in {time.perf_counter() - began:.0f} s; figures are in {options.out / 'measured'}")


def seeds_of(task: str, training: str, options: argparse.Namespace) -> int:
    """How many trainings: several of the first task in the first way, for a band."""
    several = (task, training) == (options.tasks[0], options.trainings[0])
    return int(options.training_seeds) if several else 1


def result_of(record: Record, options: argparse.Namespace, task: str, training: str, seed: int) -> Result:
    def measure() -> dict[str, Any]:
        own = {**vars(of_task(options, task)), "seed": seed}
        return asdict(measured(prepared(argparse.Namespace(**own)), training))

    label = f"{Path(task).stem}-{training}"
    return Result.of(record.once(label if seed == options.seed else f"{label}-seed-{seed}", measure))


def parse(words: Sequence[str] | None = None) -> argparse.Namespace:
    layout = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=layout)
    common_arguments(parser, out="runs/chat_study", steps=40)
    add = parser.add_argument
    add("--tasks", nargs="+", default=TASKS, metavar="TASK", help=f"by default {' '.join(TASKS)}")
    names = [*TRAININGS]
    add("--trainings", nargs="+", default=names, choices=names, metavar="WAY", help=" ".join(names))
    add(
        "--training-seeds",
        type=count,
        default=3,
        metavar="N",
        help="trainings of the first task in the first way, for a band (default: %(default)s)",
    )
    return parser.parse_args(words)


def measured(stage: Stage, training: str) -> Result:
    way = TRAININGS[training]
    say(f"{stage.task.name}, {training}: {stage.options.steps} steps of {stage.options.batch_size}")
    receiver = Receiver(stage)
    callbacks = list(landings())
    began = time.perf_counter()
    begun = quantised(stage) if way.quantised else stage.load(stage.base)
    model = supervise(begun, stage, *callbacks, learning_rate=way.learning_rate, adapter=way.config())
    seconds = time.perf_counter() - began
    say(f"{training}: trained in {seconds:.0f} s; judging packages")
    with TemporaryDirectory(dir=stage.out) as folder:
        trained: Any = {name: weight.detach().bfloat16() for name, weight in model.named_parameters()}
        if way.adapter:
            model.save_pretrained(Path(folder) / "adapter")
            trained = Path(folder) / "adapter"
        if way.quantised:
            model = PeftModel.from_pretrained(stage.load(stage.base), trained)
        tuned = receiver.loss_of(model)
        del begun, model
        landed = [callback.packages[-1].package for callback in callbacks]
        packages = [*landed, *rounded_first(stage, trained, folder)]
        shipped = tuple(judged(receiver, package) for package in packages)
        adapter = Path(folder) / "adapter/adapter_model.safetensors"
        adapter_bytes = adapter.stat().st_size if way.adapter else 0
    return Result(
        task=stage.task.name,
        training=training,
        base=receiver.base,
        tuned=tuned,
        adapter_bytes=adapter_bytes,
        model_bytes=sum(tensor.nbytes for tensor in receiver.state.values()),
        seconds=seconds,
        packages=shipped,
    )


def quantised(stage: Stage) -> Any:
    """The base as QLoRA has it, with the arithmetic in float32."""
    scheme = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32
    )
    return AutoModelForCausalLM.from_pretrained(stage.base, dtype=torch.float32, quantization_config=scheme)


def landings() -> Iterator[DareCallback]:
    """Packages that one training writes together."""
    cells: list[tuple[Rounding, float, int]]
    cells = [("stochastic", p, seed) for p in RATES for seed in range(MASKS)]
    cells += [("stochastic", 0.0, 0), ("stochastic", FURTHER, 0)]
    cells += [("nearest", p, 0) for p in (0.0, *RATES)]
    for rounding, p, seed in cells:
        name = f"{rounding}-{p:g}-{seed}"
        yield DareCallback(
            p=p, seed=seed, dtype="base", rounding=rounding, when="end", on_error="raise", name=name
        )


def rounded_first(stage: Stage, trained: Any, folder: str) -> Iterator[DeltaPackage]:
    for p in RATES:
        yield dare_train.extract(stage.base, trained, Path(folder) / f"rounded-{p:g}", p=p, dtype="trained")


def judged(receiver: Receiver, package: DeltaPackage) -> Shipped:
    manifest = package.manifest
    (p,) = {record.p for record in manifest.tensors if record.kind == "delta"}
    ways = {None: "rounded first", "stochastic": "landed", "nearest": "nearest"}
    way = ways[manifest.landed[0] if manifest.landed else None]
    return Shipped(
        way=way,
        p=p,
        seed=manifest.seed,
        bytes=package.stats["bytes"],
        changed=package.stats["changed"],
        loss=receiver.loss_with(package),
    )


# What is shown.


def table_of(result: Result) -> Table:
    title = f"{result.task}, {result.training}: loss {result.base:.3f}, after training {result.tuned:.3f}"
    table = headed(title, ("package", "p", "loss", "gain kept", "bytes", "adapter / it", "bf16 / it"))
    for (way, p), several in grouped(result.packages).items():
        losses = [each.loss for each in several]
        spread = f" ± {(max(losses) - min(losses)) / 2:.3f}" if len(losses) > 1 else ""
        size = fmean(each.bytes for each in several)
        table.add_row(
            way,
            f"{p:g}",
            f"{fmean(losses):.3f}{spread}",
            f"{fmean(map(result.kept, losses)):.1%}",
            f"{size:,.0f}",
            f"{result.adapter_bytes / size:.1f}" if result.adapter_bytes else "",
            f"{result.model_bytes / size:.0f}",
        )
    return table


def grouped(packages: Sequence[Shipped]) -> dict[tuple[str, float], list[Shipped]]:
    groups: dict[tuple[str, float], list[Shipped]] = {}
    for package in packages:
        groups.setdefault((package.way, package.p), []).append(package)
    return dict(sorted(groups.items()))


def summary(results: Sequence[Result]) -> Table:
    """Means over the tasks, for each training."""
    headings = ("training", "package", "p", "gain kept", "adapter / it", "bf16 / it")
    table = headed("Mean over the tasks", headings)
    for training in dict.fromkeys(result.training for result in results):
        of_it = [result for result in results if result.training == training]
        for way, p in grouped(of_it[0].packages):
            kept, adapter, model = [], [], []
            for result in of_it:
                several = grouped(result.packages)[way, p]
                size = fmean(each.bytes for each in several)
                kept.append(fmean(result.kept(each.loss) for each in several))
                adapter.append(result.adapter_bytes / size)
                model.append(result.model_bytes / size)
            smaller = f"{fmean(adapter):.1f}" if of_it[0].adapter_bytes else ""
            table.add_row(training, way, f"{p:g}", f"{fmean(kept):.1%}", smaller, f"{fmean(model):.0f}")
    return table


if __name__ == "__main__":
    main()

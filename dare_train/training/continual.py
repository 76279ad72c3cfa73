"""Task after task on one model: what is learnt, what is forgotten, and a package for each task, so that every
state can be had again.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from copy import copy
from dataclasses import dataclass, field
from functools import cached_property
from math import inf
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import Trainer, TrainerCallback
from transformers.trainer_utils import get_last_checkpoint

from ..applying.in_place import applied, apply_
from ..config import check_count, check_drop_rate, check_folder_name, check_seed
from ..errors import ConfigError, brief
from ..evaluation.measurements import Evaluate, MeasurementRecord, alone_with, numbers
from ..evaluation.model_loading import load_model
from ..extracting.extract import extract
from ..kernels import philox
from ..merging.config.task import OF_RUNNING, task_of
from ..merging.merge import merge
from ..merging.methods.registry import method_of
from ..merging.statistics.fisher_and_gram import collect_fisher
from ..package.masks import MASK_DOMAIN, generator_of, key_of
from ..package.reader import DeltaPackage
from ..weights.fingerprint import weights_fingerprint
from ..weights.live.live import LiveWeights
from .continual_result import Continual
from .elastic_weights import ElasticWeights
from .sparse_tuning import SparseTuningCallback

Strategy = Literal["sequential", "dare", "merge", "disjoint", "replay", "ewc"]
"""How tasks follow one another.

`sequential`: each goes on from what the one before left. `dare`: so, but of what a task changed a share p is
dropped before the next begins. `replay`: so, and each also sees a few examples of those before. `ewc`: so,
and what mattered to those before is held in place (Kirkpatrick et al., https://arxiv.org/abs/1612.00796, eq.
3). `merge`: each begins from the base, and all packages so far are merged. `disjoint`: each trains a share of
the weights of its own, and no other.
"""

_CHAINED = ("sequential", "dare", "replay", "ewc")
_DRAWS = 1 << 16
_OF_THE_RUN = ("base", "joint")
"""What is measured under these names is no task."""
_OWN = ", own"
"""Behind a task's name: measured on itself alone."""

MakeTrainer = Callable[[torch.nn.Module, Path, Sequence[TrainerCallback]], Trainer]
"""Makes a task's Trainer: of the model, with the folder as its `output_dir`, and with the callbacks besides
its own."""


@dataclass(frozen=True, kw_only=True)
class ContinualTask:
    """Something to learn."""

    name: str
    trainer: MakeTrainer
    evaluate: Evaluate
    """Of the model, whatever it has learnt so far: a number, or several by name, of which the first is what R
    holds."""
    setup: Mapping[str, Any] = field(default_factory=dict)
    """What training and evaluation depend on, such as a learning rate: a folder with results of another setup
    is refused."""

    def __post_init__(self) -> None:
        check_folder_name("task", self.name)


class ContinualRun:
    """Learns tasks one after another, with an ordinary Trainer each, and keeps a package for each.

    Packages lie in `{out}/packages`: each continues the one before, or (`merge`, `disjoint`) all lie side by
    side on the base. What is there is not learnt again, and a Trainer that was killed goes on from its last
    checkpoint: run the same again.

    Args:
        base: folder or Hub id of the model that all begins with, heads included.
        tasks: in their order.
        out: folder for packages and what the Trainers write.
        strategy: see `Strategy`.
        p: drop rate of packages, for `dare` and `merge`. The others' hold everything.
        seed: selects masks, and the examples that are replayed.
        load: makes a model of the base; by default that of the class that its configuration names, in the
            dtype of its files.
        method, settings: of `merge`, which merges packages so far.
        weights: of tasks in it, by name; those of the method, by default.
        replay: how many examples of each earlier task are seen again.
        strength: λ of `ewc`, and how many `examples` of a task its Fisher information is taken from.

    Raises:
        ConfigError: a value is wrong.
        CheckpointError: `out` holds another run.
    """

    def __init__(
        self,
        base: str,
        tasks: Sequence[ContinualTask],
        *,
        out: str | os.PathLike[str],
        strategy: Strategy = "sequential",
        p: float = 0.9,
        seed: int = 0,
        load: Callable[[str], torch.nn.Module] = load_model,
        method: str = "task_arithmetic",
        weights: Mapping[str, float] | None = None,
        settings: Mapping[str, Any] | None = None,
        replay: int = 64,
        strength: float = 1000.0,
        examples: int = 128,
    ) -> None:
        if strategy not in get_args(Strategy):
            raise ConfigError(
                "strategy", expected=f"one of {', '.join(get_args(Strategy))}", found=repr(strategy)
            )
        if not tasks or len({task.name for task in tasks}) < len(tasks):
            raise ConfigError(
                "tasks",
                expected="at least one, with names of their own",
                found=str([task.name for task in tasks]),
            )
        if weights is not None and weights.keys() != {task.name for task in tasks}:
            raise ConfigError(
                "weights",
                expected=f"one for each of {', '.join(task.name for task in tasks)}",
                found=str(dict(weights)),
            )
        for task in tasks:
            if task.name in _OF_THE_RUN or task.name.endswith(_OWN):
                expected = f"no task called {' or '.join(_OF_THE_RUN)}, or with {_OWN!r} at its end"
                raise ConfigError("tasks", expected=expected, found=brief(task.name))
        check_count("replay", replay)
        check_count("examples", examples)
        if not 0 <= strength < inf:
            raise ConfigError("strength", expected="a number from 0", found=brief(strength))
        check_seed(seed)
        check_seed(seed + len(tasks) - 1, name="seed of the last task")
        self.base = base
        self.tasks = tuple(tasks)
        self.out = Path(out)
        self.strategy = strategy
        self._p = check_drop_rate(p)
        self._seed = seed
        self._load = load
        self._method = method
        self._settings = dict(settings or {})
        self._weights = dict(weights) if weights is not None else None
        self._replay = replay
        self._strength = strength
        self._examples = examples
        if strategy == "merge":
            self._check_merges()

    def _check_merges(self) -> None:
        """Before anything is learnt: after each task, all so far are merged."""
        method = method_of(self._method)
        least, most = method.models
        if least > 1 or (most is not None and most < len(self.tasks)):
            expected = f"a method for 1 to {len(self.tasks)} models"
            raise ConfigError("method", expected=expected, found=self._method)
        names = [task.name for task in self.tasks]
        weights = [*self._weights.values()] if self._weights is not None else None
        options = {name: value for name, value in self._settings.items() if name not in OF_RUNNING}
        task_of(self.base, names, method=self._method, weights=weights, **options).recipe.check_parameters(
            method.parameters
        )

    def run(self) -> Continual:
        """Learn what is not learnt yet, and measure every task after each.

        Raises:
            OutputExists: another process is at work in the same folder.
        """
        with alone_with(self._record_path):
            return self._run()

    def _run(self) -> Continual:
        record = self._record
        before = self._row(record, "base", [], self.tasks)
        after = []
        states = []
        for number, task in enumerate(self.tasks):
            self._learn(number)
            after.append(self._row(record, task.name, self.at(number), self.tasks))
            states.append(self.state(number))
        with_own = [
            self._row(record, f"{task.name}{_OWN}", self.at(number), [task])[0]
            for number, task in enumerate(self.tasks)
        ]
        return Continual(
            strategy=self.strategy,
            tasks=tuple(task.name for task in self.tasks),
            metric=_first(record),
            before=before,
            after=tuple(after),
            own=tuple(with_own),
            states=tuple(states),
            bytes=tuple(
                DeltaPackage.open(self.package(number)).stats["bytes"] for number in range(len(self.tasks))
            ),
            seconds=tuple(self._switched(number) for number in range(len(self.tasks))),
            setup=self._setup,
        )

    def joint(self) -> tuple[float, ...]:
        """The metric of each task by a model that learns all of them at once: what a sequence can be measured
        by.

        The first task's Trainer sees the training data of all, and makes as many steps as all would, or as
        many epochs as its own. Its package is `{out}/packages/joint`; a training that was killed goes on.

        Raises:
            OutputExists: another process is at work in the same folder.
        """
        with alone_with(self._record_path):
            return self._joint()

    def _joint(self) -> tuple[float, ...]:
        record = self._record
        package = self.out / "packages" / "joint"
        if not (package / "dare_config.json").exists():
            model = self._made([])
            folder = self.out / "training" / "joint"
            trainers = [task.trainer(model, folder, []) for task in self.tasks]
            trainer = trainers[0]
            trainer.train_dataset = torch.utils.data.ConcatDataset(
                [_dataset(trainer, "joint") for trainer in trainers]
            )
            if trainer.args.max_steps > 0:
                trainer.args = copy(trainer.args)  # tasks may share theirs
                trainer.args.max_steps = sum(each.args.max_steps for each in trainers)
            train_on(trainer, folder)
            model.train(False)
            extract(self._made([]), model, package, base_model=self.base, p=0.0, values="exact")
        return self._row(record, "joint", [package], self.tasks)

    def package(self, task: int) -> Path:
        """Where a task's own package is."""
        return self.out / "packages" / f"{task:02d}-{self.tasks[task].name}"

    def at(self, task: int, *, without: Sequence[int] = ()) -> list[Path]:
        """The packages that make of the base the model after a task, exactly: for `apply`, `apply_` and
        `applied`.

        Args:
            task: its number, the first 0.
            without: tasks that are left out. Only packages that lie side by side can be: with strategy
                `disjoint`.

        Raises:
            ConfigError: there is no such task, or it cannot be left out.
        """
        if not 0 <= task < len(self.tasks):
            raise ConfigError("task", expected=f"0 to {len(self.tasks) - 1}", found=repr(task))
        if without and self.strategy != "disjoint":
            raise ConfigError(
                "without", expected="packages side by side (strategy disjoint)", found=self.strategy
            )
        if self.strategy == "merge":
            return [self._merged(task)]
        return [self.package(number) for number in range(task + 1) if number not in without]

    def model(self, task: int, *, without: Sequence[int] = ()) -> torch.nn.Module:
        """A model of its own in the state after a task."""
        return self._made(self.at(task, without=without))

    def state(self, task: int) -> str:
        """The fingerprint of the model after a task."""
        return weights_fingerprint(LiveWeights(self.model(task)))

    def _made(self, packages: Sequence[Path]) -> torch.nn.Module:
        model = self._load(self.base)
        if packages:
            apply_(model, [str(path) for path in packages])
        return model

    @cached_property
    def _instance(self) -> torch.nn.Module:
        """The base in memory, for measurements."""
        return self._load(self.base)

    @property
    def _setup(self) -> dict[str, Any]:
        identity = {
            "strategy": self.strategy,
            "base_model": self.base,
            "tasks": [task.name for task in self.tasks],
        }
        merging = {"method": self._method, "weights": self._weights, "settings": self._settings}
        options = {"p": self._p, "seed": self._seed, **merging, "replay": self._replay}
        training = {task.name: dict(task.setup) for task in self.tasks}
        return {
            **identity,
            **options,
            "strength": self._strength,
            "examples": self._examples,
            "training": training,
        }

    @property
    def _record(self) -> MeasurementRecord:
        return MeasurementRecord(self._record_path, self._setup)

    @property
    def _record_path(self) -> Path:
        return self.out / "continual.json"

    def _row(
        self, record: MeasurementRecord, name: str, packages: Sequence[Path], tasks: Sequence[ContinualTask]
    ) -> tuple[float, ...]:
        """The metric of some tasks in one state, unless it was measured before."""
        metrics = record.measured(name, lambda: self._measured(packages, tasks))
        return tuple(metrics[task.name][_first(record)] for task in tasks)

    def _measured(
        self, packages: Sequence[Path], tasks: Sequence[ContinualTask]
    ) -> dict[str, dict[str, float]]:
        with applied(self._instance, [str(path) for path in packages]) if packages else nullcontext():
            return {task.name: numbers(task.evaluate(self._instance)) for task in tasks}

    def _switched(self, task: int) -> float:
        begun = time.perf_counter()
        undo = apply_(self._instance, [str(path) for path in self.at(task)])
        seconds = time.perf_counter() - begun
        undo.revert()
        return seconds

    # Learning.

    def _learn(self, number: int) -> None:
        if (self.package(number) / "dare_config.json").exists():
            return
        earlier = [] if number == 0 or self.strategy == "merge" else self.at(number - 1)
        model = self._made(earlier)
        trainer = self.tasks[number].trainer(model, self._folder(number), self._callbacks(number, model))
        if self.strategy == "replay":
            again = [self._seen_again(earlier) for earlier in range(number)]
            trainer.train_dataset = torch.utils.data.ConcatDataset([_dataset(trainer, "replay"), *again])
        train_on(trainer, self._folder(number))
        self._write(number, earlier, model)

    def _folder(self, number: int) -> Path:
        return self.out / "training" / f"{number:02d}-{self.tasks[number].name}"

    def _write(self, number: int, earlier: Sequence[Path], model: torch.nn.Module) -> None:
        options: dict[str, Any] = {"p": 0.0, "seed": self._seed, "values": "exact"}
        if self.strategy in ("dare", "merge"):
            options |= {"p": self._p, "seed": self._seed + number}
        if self.strategy == "disjoint":
            options["masks"] = self._share(number)
            earlier = []
        model.train(False)
        extract(self._made(earlier), model, self.package(number), base_model=self.base, **options)

    def _callbacks(self, number: int, model: torch.nn.Module) -> list[TrainerCallback]:
        if self.strategy == "disjoint":
            return [
                SparseTuningCallback(
                    p=0.0, masks={name: torch.from_numpy(mask) for name, mask in self._share(number).items()}
                )
            ]
        if self.strategy == "ewc" and number:
            return [ElasticWeights(self._importance(number), self._strength)]
        return []

    def _share(self, number: int) -> dict[str, NDArray[np.bool_]]:
        """A task's own share of every tensor that can be trained: where draws lie in its part of their
        range.
        """
        masks = {}
        for name, info in LiveWeights(self._instance).tensors.items():
            if info.dtype.can_be_delta:
                draws = philox.draws(key_of(self._seed, name), 0, info.numel, MASK_DOMAIN).astype(np.int64)
                masks[name] = (draws * len(self.tasks) // _DRAWS == number).reshape(info.shape)
        return masks

    def _seen_again(self, number: int) -> torch.utils.data.Dataset[Any]:
        """A few examples of an earlier task, the same every time."""
        rows = _dataset(self.tasks[number].trainer(self._instance, self._folder(number), []), "replay")
        chosen = generator_of(self._seed, self.tasks[number].name).permutation(len(rows))
        return torch.utils.data.Subset(rows, chosen[: self._replay].tolist())

    def _importance(self, number: int) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
        """By parameter: Σ of the Fisher information of earlier tasks, each in the state after it, and the
        weights before this one.
        """
        total: dict[str, torch.Tensor] = {}
        for earlier in range(number):
            model = self.model(earlier)
            loader = self.tasks[earlier].trainer(model, self._folder(earlier), []).get_train_dataloader()
            with torch.random.fork_rng(devices=[]):
                for name, fisher in collect_fisher(model, loader, examples=self._examples).items():
                    total[name] = total[name] + fisher if name in total else fisher
        anchor = dict(self.model(number - 1).named_parameters())
        return {name: (fisher, anchor[name].detach()) for name, fisher in total.items() if name in anchor}

    def _merged(self, task: int) -> Path:
        """The package of all tasks so far, merged."""
        folder = self.out / "merged" / f"{task:02d}-{self.tasks[task].name}"
        if not (folder / "dare_config.json").exists():
            packages = [str(self.package(number)) for number in range(task + 1)]
            given = (
                None
                if self._weights is None
                else [self._weights[learnt.name] for learnt in self.tasks[: task + 1]]
            )
            merge(
                self.base,
                packages,
                folder,
                method=self._method,
                weights=given,
                package=True,
                **self._settings,
            )
        return folder


def _first(record: MeasurementRecord) -> str:
    """The metric that was measured first."""
    state = next(iter(record.all.values()))
    return str(next(iter(next(iter(state.values())))))


def train_on(trainer: Trainer, folder: Path) -> None:
    """Train, from the last checkpoint in the Trainer's folder if there is one."""
    trainer.train(resume_from_checkpoint=get_last_checkpoint(str(folder)) if folder.is_dir() else None)


def _dataset(trainer: Trainer, what_for: str) -> Any:
    rows = trainer.train_dataset
    if rows is None or not hasattr(rows, "__len__"):
        raise ConfigError(what_for, expected="training data with a length", found=type(rows).__name__)
    return rows

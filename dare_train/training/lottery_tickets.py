"""Lottery tickets in a delta: which few elements, trained from the start by themselves, do as well as all of
them?

Iterative magnitude pruning with rewinding (Frankle and Carbin, https://arxiv.org/abs/1803.03635; Frankle et
al., https://arxiv.org/abs/1912.05671) of what fine-tuning changes: train, drop the smallest |δ|, rewind the
others, train again. What is dropped stays as it is in the base. Beside a ticket its ablations can be trained:
see `Kind`.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import torch
from transformers import TrainerCallback

from ..applying.in_place import apply_
from ..config import DRAW_RANGE, check_count, check_seed
from ..errors import ConfigError, brief
from ..evaluation.measurements import MeasurementRecord, alone_with, numbers
from ..evaluation.model_loading import load_model
from ..extracting.extract import extract
from ..package.masks import generator_of
from ..snapshots.callback import DareCallback
from ..weights.live.live import LiveWeights
from .continual import ContinualTask, train_on
from .sparse_tuning import SparseTuningCallback
from .subnetwork import Masks, Scope, at_random, by_size, shuffled

Kind = Literal["ticket", "random", "shuffled", "reinitialised", "transferred"]
"""Which elements are trained, and from where.

`ticket`: those that pruning left, from where they were at the step that is rewound to. `random`: as many,
DARE's masks of that density. `shuffled`: as many in each tensor as the ticket has there, anywhere in it.
`reinitialised`: the ticket's elements, but they begin with each other's values, in random order within each
tensor (1803.03635, §2: what if the initial weights are not the ticket's own?). `transferred`: the elements of
another task's ticket.
"""
TICKET_ABLATIONS: tuple[Kind, ...] = ("random", "shuffled", "reinitialised")
"""Of a ticket, by itself."""


@dataclass(frozen=True, kw_only=True)
class Level:
    """One training."""

    kind: Kind
    number: int
    """0 is all elements."""
    density: float
    """Share of elements that were trained."""
    metrics: Mapping[str, float]
    """At the end."""
    curve: Mapping[int, Mapping[str, float]]
    """By step, while it trained; empty unless asked for."""
    package: str
    """What was trained, with its mask."""


@dataclass(frozen=True, kw_only=True)
class Tickets:
    """What was found."""

    levels: tuple[Level, ...]
    setup: Mapping[str, Any] = field(default_factory=dict)

    def of(self, kind: Kind) -> list[Level]:
        """From all elements down to the fewest."""
        return [level for level in self.levels if level.kind == kind or level.number == 0]

    @property
    def metric(self) -> str:
        """The first that was measured."""
        return next(iter(self.levels[0].metrics))

    def as_json(self) -> dict[str, Any]:
        return {"levels": [{**asdict(level), "package": Path(level.package).name} for level in self.levels]}


class TicketSearch:
    """Trains, prunes, rewinds and trains again, and keeps a package for each level: run it again after a
    kill, and it goes on.

    Args:
        base: folder or Hub id of the model that all begins with, heads included.
        task: what is trained and measured; see `ContinualTask`.
        out: folder for packages (`level-N`, `random-N`, …) and what the Trainers write.
        levels: how often is pruned.
        share: of the elements left, how many each level drops.
        rewind: training step to whose weights kept elements return; 0 is the base.
        scope: see `Scope`.
        beside: what else is trained at each level; see `Kind`.
        transfer: another task's search of the same base, whose tickets are trained on this task, too:
            `transferred`. It must have been run down to as many levels.
        every: measure each so many steps of training.
        seed: of random masks and orders.
        load: makes a model of the base.

    Raises:
        ConfigError: a value is out of range.
        CheckpointError: from `run`, `out` holds another search. More levels, or others beside them, are no
            other search.
    """

    def __init__(
        self,
        base: str,
        task: ContinualTask,
        *,
        out: str | os.PathLike[str],
        levels: int = 6,
        share: float = 0.5,
        rewind: int = 0,
        scope: Scope = "model",
        beside: Sequence[Kind] = ("random",),
        transfer: TicketSearch | None = None,
        every: int | None = None,
        seed: int = 0,
        load: Callable[[str], torch.nn.Module] = load_model,
    ) -> None:
        check_count("levels", levels)
        check_count("rewind", rewind, at_least=0)
        if every is not None:
            check_count("every", every)
        check_seed(seed)
        if not 0 < share < 1:
            raise ConfigError("share", expected="a number in (0, 1)", found=brief(share))
        if scope not in get_args(Scope):
            raise ConfigError("scope", expected=f"one of {', '.join(get_args(Scope))}", found=brief(scope))
        if transfer is not None and not isinstance(transfer, TicketSearch):
            raise ConfigError("transfer", expected="another TicketSearch", found=brief(transfer))
        if (1 - share) ** levels * DRAW_RANGE < 1:
            raise ConfigError(
                "levels", expected="a density of at least 2⁻¹⁶ in the end", found=f"{levels} of share {share}"
            )
        if not {*beside} <= {*TICKET_ABLATIONS}:
            raise ConfigError(
                "beside", expected=f"some of {', '.join(TICKET_ABLATIONS)}", found=str(list(beside))
            )
        self.base = base
        self.task = task
        self.out = Path(out)
        self._levels = levels
        self._share = share
        self._rewind = rewind
        self._scope = scope
        self._beside: tuple[Kind, ...] = (
            *dict.fromkeys(beside),
            *(("transferred",) if transfer is not None else ()),
        )
        self._transfer = transfer
        self._every = every
        self._seed = seed
        self._load = load

    def run(self) -> Tickets:
        """Train what is not trained yet.

        Raises:
            OutputExists: another process is at work in the same folder.
        """
        with alone_with(self.out / "search.json"):
            return self._run()

    def _run(self) -> Tickets:
        levels = [self._level("ticket", 0, None)]
        masks = None
        for number in range(1, self._levels + 1):
            masks = self._pruned(number, masks)
            levels += [
                self._level(kind, number, self._trained(kind, number, masks))
                for kind in ("ticket", *self._beside)
            ]
        source = {"transferred_from": self._transfer.task.name} if self._transfer is not None else {}
        return Tickets(levels=tuple(levels), setup={**self._setup, "levels": self._levels, **source})

    def masks(self, number: int) -> Masks:
        """What a level of the ticket trained."""
        return Masks.of_package(self._package("ticket", number))

    def _package(self, kind: Kind, number: int) -> Path:
        names = {
            "ticket": "level",
            "transferred": f"from-{self._transfer.task.name}" if self._transfer is not None else "",
        }
        return self.out / f"{names.get(kind, kind)}-{number}"

    def _trained(self, kind: Kind, number: int, ticket: Masks) -> Masks:
        """The elements that a level trains."""
        if kind == "random":
            return at_random(LiveWeights(self._load(self.base)), density=ticket.density, seed=self._seed)
        if kind == "shuffled":
            return shuffled(ticket, seed=self._seed)
        if kind == "transferred" and self._transfer is not None:
            return self._transfer.masks(number)
        return ticket

    def _pruned(self, number: int, before: Masks | None) -> Masks:
        """Of what was trained last, all but the share that moved least."""
        model = self._made(self._package("ticket", number - 1))
        largest = by_size(self.base, model, density=(1 - self._share) ** number, scope=self._scope)
        return largest if before is None else largest & before

    def _made(self, package: Path | None) -> torch.nn.Module:
        model = self._load(self.base)
        if package is not None:
            apply_(model, str(package))
        return model

    def _level(self, kind: Kind, number: int, masks: Masks | None) -> Level:
        package = self._package(kind, number)

        def measure() -> dict[str, Any]:
            curve = self._train(kind, number, masks, package)
            density = masks.density if masks is not None else 1.0
            return {
                "density": density,
                "metrics": numbers(self.task.evaluate(self._made(package))),
                "curve": curve,
            }

        measured = MeasurementRecord(self.out / "search.json", self._setup).measured(package.name, measure)
        steps = {int(step): metrics for step, metrics in measured["curve"].items()}
        return Level(
            kind=kind,
            number=number,
            density=measured["density"],
            metrics=measured["metrics"],
            curve=steps,
            package=str(package),
        )

    @property
    def _setup(self) -> dict[str, Any]:
        """What every level depends on."""
        options = {
            "share": self._share,
            "rewind": self._rewind,
            "scope": self._scope,
            "every": self._every,
            "seed": self._seed,
        }
        return {"base_model": self.base, "task": self.task.name, "training": dict(self.task.setup), **options}

    def _train(
        self, kind: Kind, number: int, masks: Masks | None, package: Path
    ) -> dict[int, dict[str, float]]:
        """Train a level into its package; what was measured meanwhile."""
        folder = self.out / "training" / package.name
        model = self._load(self.base)
        watch = _Curve(model, self.task, self._every)
        callbacks: list[TrainerCallback] = [watch]
        if masks is not None:
            self._rewound(model, masks)
            if kind == "reinitialised":
                self._reinitialised(model, masks)
            callbacks.append(SparseTuningCallback(p=0.0, masks=masks))
        elif self._rewind:
            callbacks.append(
                DareCallback(
                    p=0.0, values="exact", when=self._rewind, base=self.base, artifact=False, name="rewind"
                )
            )
        train_on(self.task.trainer(model, folder, callbacks), folder)
        model.train(False)
        kept: Any = {"masks": masks} if masks is not None else {}
        extract(
            self._load(self.base),
            model,
            package,
            p=0.0,
            values="exact",
            base_model=self.base,
            overwrite=True,
            **kept,
        )
        return watch.by_step

    def _rewound(self, model: torch.nn.Module, masks: Masks) -> None:
        """Kept elements as they were at that step of the first training, the others as in the base."""
        if not self._rewind:
            return
        early = self._made(self.out / "training" / "level-0" / "rewind" / f"step-{self._rewind}")
        live = LiveWeights(model)
        then = LiveWeights(early)
        for name, mask in masks.items():
            info = live.tensors[name]
            kept = mask.reshape(-1)
            live.overwrite(
                name, 0, np.where(kept, then.read(name, 0, info.numel), live.read(name, 0, info.numel))
            )

    def _reinitialised(self, model: torch.nn.Module, masks: Masks) -> None:
        """Kept elements with each other's values."""
        live = LiveWeights(model)
        for name, mask in masks.items():
            words = np.array(live.read(name, 0, live.tensors[name].numel))
            kept = mask.reshape(-1)
            words[kept] = generator_of(self._seed, name).permutation(words[kept])
            live.overwrite(name, 0, words)


class _Curve(TrainerCallback):  # type: ignore[misc]
    """Measures the task each so many steps."""

    def __init__(self, model: torch.nn.Module, task: ContinualTask, every: int | None) -> None:
        self._model = model
        self._task = task
        self._every = every
        self.by_step: dict[int, dict[str, float]] = {}

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if self._every is not None and state.global_step % self._every == 0:
            training = self._model.training
            self.by_step[state.global_step] = numbers(self._task.evaluate(self._model.train(False)))
            self._model.train(training)

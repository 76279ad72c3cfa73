"""`DareCallback`: packages from any transformers `Trainer`, without the training noticing."""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Union, get_args
from weakref import WeakKeyDictionary

import numpy as np
import torch
from accelerate.state import AcceleratorState
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ..config import DareConfig, Patterns, Rescale, Values
from ..errors import BaseMismatch, ConfigError
from ..kernels.backends import checked
from ..package.reader import DeltaPackage
from ..parallel.ranks import Ranks
from ..parallel.staged_folder import COMPANIONS, sweep_folder
from ..weights.live import LiveWeights, Source
from ..weights.sharding import SUPPORTED
from . import wandb_snapshots
from .base_model import Origin, establish, find, loaded_from, recall
from .snapshotter import Order, Snapshot, Snapshotter, step_folders, take_together

When = Union[str, int]
_EVENTS = ("save", "epoch", "end")
_STATE = "dare_train"
_in_training: WeakKeyDictionary[torch.nn.Module, list[DareCallback]] = WeakKeyDictionary()
"""The callbacks of each run that is going on, in the order in which the Trainer calls them."""

_ENGINES = {
    "NO",
    "DEEPSPEED",
    "FSDP",
    *(f"MULTI_{kind}" for kind in ("CPU", "GPU", "NPU", "MLU", "SDAA", "MUSA", "XPU", "HPU")),
}
"""accelerate's names of what is known. Each process is one rank; the weights of `MULTI_*` are whole on
each."""


class DareCallback(TrainerCallback):  # type: ignore[misc]
    """Writes delta packages during and after training (DARE, arXiv 2311.03099).

        Trainer(model=model, args=args, train_dataset=data, callbacks=[DareCallback(p=0.9)])

    Packages appear as `{output_dir}/{name}/step-N`, and the one at the end as `{output_dir}/{name}/final`.

    Args:
        p, seed, rescale, values, include, exclude, whole, allow_nonfinite: see `DareConfig`.
        when: "save" (with each checkpoint), "epoch", "end", a number N (every N steps), or several of these.
        base: folder or Hub id that deltas are relative to. By default where the model was loaded from, if its
            weights still are the ones on disk when training starts; otherwise the weights at the start, kept
            in `{output_dir}/{name}/base`.
        keep: how many `step-*` packages stay; older ones are removed. All, by default.
        incremental: each package continues the one before. Together they are a chain; its every result has
            the same bits as the package on the base would have given.
        evaluate: after each evaluation, also evaluate the model as a receiver of the package gets it; metrics
            are logged with the prefix `eval_{name}`.
        source: "weights", or "master": the fp32 values that DeepSpeed ZeRO keeps beside 16-bit weights.
        kernels: which gather kept weights, "cpu", "cuda" or "torch": see `apply_`.
        name: of the folder, the metrics and the wandb artifact; several callbacks in one run need different
            names.
        artifact: upload each package to wandb, when the Trainer reports there.

    Attributes:
        packages: every snapshot of this process, oldest first, as `Snapshot`.
        waited: seconds for which training stood still, one for each snapshot taken.

    Raises:
        ConfigError: at construction, for values that are wrong or conflict; at train begin, for an engine
            that is not supported.
        BaseMismatch: at train begin, when a resumed run's base cannot be established.
        SnapshotError: a package could not be written; raised in the training process at its next step.
    """

    def __init__(
        self,
        p: float | Mapping[str, float] = 0.9,
        *,
        seed: int = 0,
        rescale: Rescale = "paper",
        values: Values = "auto",
        include: Patterns = ("*",),
        exclude: Patterns = (),
        whole: Patterns = (),
        allow_nonfinite: bool = False,
        when: When | Sequence[When] = ("save", "end"),
        base: str | os.PathLike[str] | None = None,
        keep: int | None = None,
        incremental: bool = False,
        evaluate: bool = False,
        source: Source = "weights",
        kernels: str | None = None,
        name: str = "dare",
        artifact: bool = True,
    ) -> None:
        self.config = DareConfig(
            p=p,
            seed=seed,
            rescale=rescale,
            values=values,
            include=include,
            exclude=exclude,
            whole=whole,
            allow_nonfinite=allow_nonfinite,
        )
        self.events, self.every = _schedule(when)
        _check(keep, incremental, values, name)
        if source not in get_args(Source):
            raise ConfigError("source", expected='"weights" or "master"', found=repr(source))
        self.base, self.keep, self.incremental, self.evaluate = base, keep, incremental, evaluate
        self.source, self.kernels = source, checked(kernels, "kernels")
        self.name, self.artifact = name, artifact
        self.packages: list[Snapshot] = []
        self.waited: list[float] = []
        self._ranks: Ranks | None = None
        self._at_init: Origin | None = None
        self._snapshotter: Snapshotter | None = None
        self._args: TrainingArguments | None = None
        self._last_taken: int | str = -1
        """Step of the last snapshot, or "end"."""

    @property
    def package(self) -> DeltaPackage | None:
        """The latest package."""
        return self.packages[-1].package if self.packages else None

    # The events of a run, in the order in which the Trainer sends them.

    def on_init_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: Any = None,
        **_: Any,
    ) -> None:
        """The weights are the base's here even when the run is about to resume: remember which of them are
        not on disk.
        """
        if model is not None and self.base is None:
            self._at_init = find(LiveWeights(model, ranks=self._joined()), loaded_from(model))

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: Any = None,
        processing_class: Any = None,
        **_: Any,
    ) -> None:
        _check_engine()
        folder, ranks = self._folder(args), self._joined()
        ranks.together(lambda: sweep_folder(folder) if ranks.first else None)
        live = LiveWeights(model, source=self.source, ranks=ranks, kernels=self.kernels)
        if self.evaluate and live.adapted:
            remedy = "apply a package to the base and evaluate that"
            raise ConfigError(
                "evaluate", expected="a model without adapters", found="a PEFT model", remedy=remedy
            )
        origin = (
            self._resumed_origin(state, live)
            if state.global_step
            else establish(live, model, folder / "base", base=self.base)
        )
        self._snapshotter = Snapshotter(
            origin, self.config, live, incremental=self.incremental, source=self.source
        )
        folders = ranks.together(
            lambda: _save_companions(model, processing_class, folder) if ranks.first else ""
        )
        self._companions = Path(folders[0])
        if self.incremental:
            self._snapshotter.chain = [
                path
                for path in step_folders(folder)
                if state.global_step and _step_of(path) <= state.global_step
            ]
        self._remember(state, origin)
        self._last_taken = -1
        self._args = args
        _in_training[model] = [
            one for one in _in_training.get(model, []) if one._args is args and one is not self
        ] + [self]

    def on_step_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: Any = None,
        **_: Any,
    ) -> None:
        if self._snapshotter is not None:
            self._collect(self._snapshotter.finished())
        if self._is_due("step", state):
            self._snapshot("step", args, state, model)

    def on_evaluate(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: Any = None,
        **_: Any,
    ) -> None:
        if self.evaluate and self._snapshotter is not None:
            self._evaluate_receiver(args, model)

    def on_save(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: Any = None,
        **_: Any,
    ) -> None:
        if "save" in self.events:
            self._snapshot("save", args, state, model)

    def on_epoch_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: Any = None,
        **_: Any,
    ) -> None:
        if "epoch" in self.events:
            self._snapshot("epoch", args, state, model)

    def on_train_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: Any = None,
        **_: Any,
    ) -> None:
        assert self._snapshotter is not None, "train end without train begin"
        if "end" in self.events:
            self._snapshot("end", args, state, model)
        _in_training[model].remove(self)
        self._collect(self._snapshotter.close())
        if self._joined().first:
            shutil.rmtree(self._companions)

    # Establishing the base.

    def _resumed_origin(self, state: TrainerState, live: LiveWeights) -> Origin:
        if self.base is not None:
            return establish(live, None, Path(), base=self.base)
        record = state.stateful_callbacks.get(_STATE, {}).get("attributes", {}).get(self.name)
        if record is not None:
            return recall(record, live)
        if self._at_init is not None and not _is_checkpoint_of_a_run(self._at_init.checkpoint.folder):
            return self._at_init
        found = "a resumed run that did not have this callback, and whose model was not loaded from its base"
        raise BaseMismatch(
            "base",
            expected="a base on record, or the folder the model was loaded from",
            found=found,
            remedy="pass base=",
        )

    def _remember(self, state: TrainerState, origin: Origin) -> None:
        entry = state.stateful_callbacks.setdefault(_STATE, {"args": {}, "attributes": {}})
        entry["attributes"][self.name] = origin.record()

    # Taking and collecting snapshots.

    def _joined(self) -> Ranks:
        """The ranks that train together, of which this process is one."""
        if self._ranks is None:
            self._ranks = Ranks.joined()
        return self._ranks

    def _folder(self, args: TrainingArguments) -> Path:
        return Path(args.output_dir) / self.name

    def _snapshot(self, event: str, args: TrainingArguments, state: TrainerState, model: Any) -> None:
        """At most one package for a step, whichever events meet there; and together with all callbacks that
        the event makes take one.
        """
        taken = "end" if event == "end" else state.global_step
        alike = [
            one for one in _in_training[model] if (one.source, one.kernels) == (self.source, self.kernels)
        ]
        due = [one for one in alike if one._is_due(event, state) and one._last_taken != taken]
        if self in due:
            before = take_together(
                [one._order(event, args, state) for one in due], model, step=state.global_step
            )
            for one, snapshot in zip(due, before, strict=True):
                one._last_taken = taken
                one._collect(snapshot)

    def _is_due(self, event: str, state: TrainerState) -> bool:
        return event in self.events or (
            event == "step" and self.every is not None and state.global_step % self.every == 0
        )

    def _order(self, event: str, args: TrainingArguments, state: TrainerState) -> Order:
        assert self._snapshotter is not None, "snapshot before train begin"
        folder = self._folder(args)
        keep = (self.keep, folder) if self.keep is not None else None
        out = folder / ("final" if event == "end" else f"step-{state.global_step}")
        return Order(snapshotter=self._snapshotter, out=out, files=self._companions, keep=keep)

    def _collect(self, snapshot: Snapshot | None) -> None:
        if snapshot is not None:
            self.packages.append(snapshot)
            self.waited.append(snapshot.waited)
            if self._joined().first:
                wandb_snapshots.log(snapshot, name=self.name, artifact=self.artifact)

    def _evaluate_receiver(self, args: TrainingArguments, model: Any) -> None:
        """Evaluate with the weights that a package taken now would give, then put training's own back."""
        trainer = _calling_trainer()
        assert self._snapshotter is not None, "evaluation before train begin"
        received = _ReceivedWeights(LiveWeights(model), self._snapshotter, self._folder(args))
        with (
            torch.random.fork_rng(),
            received,
        ):  # a data loader's iterator draws from torch's generator, which is training's
            loader = trainer.get_eval_dataloader()
            output = trainer.evaluation_loop(
                loader, description=f"Evaluation ({self.name})", metric_key_prefix=f"eval_{self.name}"
            )
        trainer.log(output.metrics)


class _ReceivedWeights:
    """A `with` block in which the model is what a receiver gets. The weights it displaces wait in a file, not
    in memory.
    """

    def __init__(self, live: LiveWeights, snapshotter: Snapshotter, folder: Path) -> None:
        self._live, self._snapshotter = live, snapshotter
        folder.mkdir(parents=True, exist_ok=True)
        self._folder = folder

    def __enter__(self) -> None:
        self._file = tempfile.TemporaryFile(dir=self._folder)
        self._displaced: list[tuple[str, int, int]] = []
        for name, start, words in self._snapshotter.preview(self._live):
            self._file.write(self._live.read(name, start, words.size).tobytes())
            self._displaced.append((name, start, words.size))
            self._live.overwrite(name, start, words)
        self._live.settle()

    def __exit__(self, *_: object) -> None:
        self._file.seek(0)
        for name, start, size in self._displaced:
            word = self._live.tensors[name].dtype.word
            self._live.overwrite(name, start, np.frombuffer(self._file.read(size * word.itemsize), word))
        self._live.settle()
        self._file.close()


def _schedule(when: When | Sequence[When]) -> tuple[frozenset[str], int | None]:
    """Events and step interval."""
    given = [when] if isinstance(when, (str, int)) else list(when)
    numbers = [item for item in given if isinstance(item, int) and not isinstance(item, bool)]
    events = [item for item in given if isinstance(item, str)]
    unknown = [item for item in given if item not in _EVENTS and item not in numbers]
    if unknown or not given or len(numbers) > 1 or any(number < 1 for number in numbers):
        raise ConfigError(
            "when",
            expected='"save", "epoch", "end", a number of steps, or several of these',
            found=repr(when),
        )
    return frozenset(events), numbers[0] if numbers else None


def _check(keep: int | None, incremental: bool, values: str, name: str) -> None:
    if keep is not None and (not isinstance(keep, int) or keep < 1):
        raise ConfigError("keep", expected="a positive number of packages", found=repr(keep))
    if incremental and keep is not None:
        raise ConfigError(
            "keep",
            expected="None with incremental=True",
            found=repr(keep),
            remedy="a chain needs all of its packages",
        )
    if incremental and values not in ("auto", "exact"):
        raise ConfigError(
            "values",
            expected="exact with incremental=True",
            found=repr(values),
            remedy="links of a chain are exact",
        )
    if not name or Path(name).name != name:
        raise ConfigError("name", expected="the name of a folder", found=repr(name))


def _check_engine() -> None:
    """Refuse an engine whose layout of weights is not known: its package would be wrong.

    Raises:
        ConfigError: naming what was found and what is supported.
    """
    found = str(AcceleratorState().distributed_type.value)
    if found not in _ENGINES:
        raise ConfigError(
            "DareCallback",
            expected=SUPPORTED,
            found=found,
            remedy="extract from the saved checkpoint instead",
        )


def _is_checkpoint_of_a_run(folder: Path) -> bool:
    return (folder / "trainer_state.json").exists()


def _step_of(path: Path) -> int:
    return int(path.name.removeprefix("step-"))


def _save_companions(model: Any, processing_class: Any, folder: Path) -> str:
    """The model's configuration and tokenizer as files, in a folder beside the packages to come."""
    folder.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix=COMPANIONS, dir=folder))
    for part in (getattr(model, "config", None), getattr(model, "generation_config", None), processing_class):
        if part is not None and hasattr(part, "save_pretrained"):
            part.save_pretrained(folder)
    return str(folder)


def _calling_trainer() -> Trainer:
    """The Trainer that sent the current event. Callbacks are not given it; it stands further up the stack."""
    frame = sys._getframe(1)
    while frame is not None:
        owner = frame.f_locals.get("self")
        if isinstance(owner, Trainer):
            return owner
        frame = frame.f_back  # type: ignore[assignment]
    raise ConfigError("evaluate", expected="events sent by a transformers Trainer", found="another caller")

"""`DareCallback`: packages from any transformers `Trainer`, without the training noticing."""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, get_args

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
from .callback_options import When, check_options, schedule
from .received_weights import ReceivedWeights
from .shared_pass import Order, Snapshot, take_together
from .snapshotter import Snapshotter, step_folders

_STATE = "dare_train"

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
        self.events, self.every = schedule(when)
        check_options(keep, incremental, values, name)
        if source not in get_args(Source):
            raise ConfigError("source", expected='"weights" or "master"', found=repr(source))
        self.base = base
        self.keep = keep
        self.incremental = incremental
        self.evaluate = evaluate
        self.source = source
        self.kernels = checked(kernels, "kernels")
        self.name = name
        self.artifact = artifact
        self.packages: list[Snapshot] = []
        self.waited: list[float] = []
        self._ranks: Ranks | None = None
        self._at_init: Origin | None = None
        self._snapshotter: Snapshotter | None = None
        self._attached: Trainer | None = None
        self._trainer: Trainer | None = None
        self._training = False
        self._last_taken: int | str = -1
        """Step of the last snapshot, or "end"."""

    @property
    def package(self) -> DeltaPackage | None:
        """The latest package."""
        return self.packages[-1].package if self.packages else None

    def attach(self, trainer: Trainer) -> None:
        """Say which Trainer this callback belongs to: it evaluates with it, and shares passes over the
        weights with its other callbacks. Needed only where a Trainer does not itself send the events.
        """
        self._attached = trainer

    # The events of a run, in the order in which the Trainer sends them.

    def on_init_end(
        self, args: TrainingArguments, state: TrainerState, *_: Any, model: Any = None, **__: Any
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
        self._trainer = self._attached or _calling_trainer()
        if self.evaluate and self._trainer is None:
            remedy = "hand it over: callback.attach(trainer)"
            raise ConfigError(
                "evaluate", expected="a Trainer", found="events of another caller", remedy=remedy
            )
        folder = self._folder(args)
        ranks = self._joined()
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
        self._training = True

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, *_: Any, model: Any = None, **__: Any
    ) -> None:
        if self._snapshotter is not None:
            self._collect(self._snapshotter.finished())
        self._snapshot("step", args, state, model)

    def on_evaluate(
        self, args: TrainingArguments, state: TrainerState, *_: Any, model: Any = None, **__: Any
    ) -> None:
        if self.evaluate and self._snapshotter is not None:
            self._evaluate_receiver(args, model)

    def on_save(
        self, args: TrainingArguments, state: TrainerState, *_: Any, model: Any = None, **__: Any
    ) -> None:
        self._snapshot("save", args, state, model)

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, *_: Any, model: Any = None, **__: Any
    ) -> None:
        self._snapshot("epoch", args, state, model)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, *_: Any, model: Any = None, **__: Any
    ) -> None:
        assert self._snapshotter is not None, "train end without train begin"
        self._snapshot("end", args, state, model)
        self._training = False
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
        due = [callback for callback in self._reading_the_same() if callback._is_due(event, state)]
        if self not in due:
            return
        orders = [callback._order(event, args, state) for callback in due]
        for callback, before in zip(due, take_together(orders, model, step=state.global_step), strict=True):
            callback._last_taken = _moment(event, state)
            callback._collect(before)

    def _reading_the_same(self) -> list[DareCallback]:
        """The Trainer's callbacks that read the same weights as this one, which is among them, in order."""
        if self._trainer is None:
            return [self]
        callbacks = self._trainer.callback_handler.callbacks
        training = [other for other in callbacks if isinstance(other, DareCallback) and other._training]
        return [other for other in training if (other.source, other.kernels) == (self.source, self.kernels)]

    def _is_due(self, event: str, state: TrainerState) -> bool:
        """Whether the event makes it take a snapshot that it has not taken yet."""
        at_step = event == "step" and self.every is not None and state.global_step % self.every == 0
        return (event in self.events or at_step) and self._last_taken != _moment(event, state)

    def _order(self, event: str, args: TrainingArguments, state: TrainerState) -> Order:
        assert self._snapshotter is not None, "snapshot before train begin"
        folder = self._folder(args)
        keep = (self.keep, folder) if self.keep is not None else None
        out = folder / ("final" if event == "end" else f"step-{state.global_step}")
        return Order(taker=self._snapshotter, out=out, files=self._companions, keep=keep)

    def _collect(self, snapshot: Snapshot | None) -> None:
        if snapshot is not None:
            self.packages.append(snapshot)
            self.waited.append(snapshot.waited)
            if self._joined().first:
                wandb_snapshots.log(snapshot, name=self.name, artifact=self.artifact)

    def _evaluate_receiver(self, args: TrainingArguments, model: Any) -> None:
        """Evaluate with the weights that a package taken now would give, then put training's own back."""
        trainer = self._trainer
        assert trainer is not None, "train begin refuses evaluate without a Trainer"
        assert self._snapshotter is not None, "evaluation before train begin"
        received = ReceivedWeights(LiveWeights(model), self._snapshotter, self._folder(args))
        # A data loader's iterator draws from torch's generator, which is training's.
        with torch.random.fork_rng(), received:
            loader = trainer.get_eval_dataloader()
            output = trainer.evaluation_loop(
                loader, description=f"Evaluation ({self.name})", metric_key_prefix=f"eval_{self.name}"
            )
        trainer.log(output.metrics)


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


def _moment(event: str, state: TrainerState) -> int | str:
    """The step at which a snapshot is taken, or "end"."""
    return "end" if event == "end" else int(state.global_step)


def _calling_trainer() -> Trainer | None:
    """The Trainer that sent the current event, if one did. Callbacks are not given it; it stands further up
    the stack.
    """
    frame = sys._getframe(1)
    while frame is not None:
        caller = frame.f_locals.get("self")
        if isinstance(caller, Trainer):
            return caller
        frame = frame.f_back  # type: ignore[assignment]
    return None

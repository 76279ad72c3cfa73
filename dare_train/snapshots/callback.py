"""`DareCallback`: packages from any transformers `Trainer`, without the training noticing."""

from __future__ import annotations

import os
import weakref
from collections.abc import Mapping, Sequence
from datetime import timedelta
from functools import partial
from typing import Any

from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ..config import DareConfig, Patterns, Rescale, Rounding, Source, Target, Values
from ..errors import ConfigError, SnapshotError
from ..evaluation.measurements import Evaluate
from ..hub.upload import check_repository
from ..kernels.backends import checked
from ..package.reader import DeltaPackage
from ..parallel.ranks import Ranks, Roll
from ..parallel.waiting_folder import remove_waiting
from ..weights.live.live import LiveWeights
from ..weights.live.wrapped import inner_model
from . import reporting, wandb_snapshots
from .base_model import FirstLook, Origin, first_look
from .beginning import Known, begin
from .callback_options import OnError, When, check_options, schedule
from .grids import reading_of
from .guest import as_guest, tell, tell_again
from .pushing import Pusher, pusher_for
from .receiver_evaluation import check_evaluation, evaluate_received, measure_received, metric_of
from .run_folder import FINAL, RunFolder
from .shared_pass import Order, Snapshot, take_together
from .snapshotter import Snapshotter
from .trainer_run import (
    STATE,
    calling_trainer,
    check_engine,
    destination_of,
    last_measured,
    module_of,
    moment,
    name_of_run,
    on_record,
    output_folder,
    private_folder,
    shared_companions,
)

_ROLL_PATIENCE = timedelta(seconds=45)
"""How long a rank waits for others that had not signed when their Trainers were made."""


class DareCallback(TrainerCallback):  # type: ignore[misc]
    """Writes delta packages during and after training (DARE, arXiv 2311.03099).

        Trainer(model=model, args=args, train_dataset=data, callbacks=[DareCallback(p=0.9)])

    Packages appear as `{output_dir}/{name}/step-N`, and the one at the end as `{output_dir}/{name}/final`.

    Args:
        p, seed, rescale, values, include, exclude, whole, allow_nonfinite, dtype, rounding: see `DareConfig`.
        when: "save" (with each checkpoint), "epoch", "end", a number N (every N steps), or several of these.
        base: folder or Hub id that deltas are relative to. By default where the model was loaded from, if its
            weights still are the ones on disk when training starts; otherwise the weights at the start, kept
            in `{output_dir}/{name}/base`; with `TrainingArguments(push_to_hub=True)` in
            `{output_dir}/_{name}/base`, which the Trainer does not upload.
        keep: how many `step-*` packages stay; older ones of this run are removed. All, by default.
        keep_best: the package of the best checkpoint by the Trainer's metric stays whatever `keep` says.
        incremental: each package continues the one before. Together they are a chain; its every result has
            the same bits as the package on the base would have given.
        evaluate: after each evaluation, also evaluate the model as a receiver of the package gets it, on the
            same data; metrics are logged with the prefix `eval_{name}`. Or measure it there by tasks of
            lm-evaluation-harness, `"lm_eval:TASK,TASK?limit=50"` (see `HarnessTasks`), with the Trainer's
            `processing_class`; or by a function of the model, which returns a number, or several by name.
            Functions and tasks need weights that are whole in each process.
        on_error: "warn": what fails after training began is logged as an error, counted in the Trainer's log
            as `{name}/failures`, and told again at the end; training goes on. "raise": it ends.
        source: "weights", or "master": the fp32 values that DeepSpeed ZeRO keeps beside 16-bit weights.
        kernels: which gather kept weights, "cpu", "cuda" or "torch": see `apply_`.
        name: of the folder, the metrics and the wandb artifact; several callbacks in one run need different
            names.
        artifact: upload each package to wandb, when the Trainer reports there.
        push_to_hub: a repository on the Hub, as `user/name`, to which each package is uploaded behind
            training, as a folder of its name. What fails is tried again at the end, which waits for it at
            most five minutes. Token, branch and privacy are `TrainingArguments`' `hub_token`, `hub_revision`
            and `hub_private_repo`.

    Attributes:
        packages: every snapshot of this process, oldest first, as `Snapshot`.
        waited: seconds for which training stood still, one for each snapshot taken.
        failures: what failed in this training, with `on_error="warn"`.

    Raises:
        ConfigError: at construction, for values that are wrong or conflict; at `Trainer()` or train begin,
            for an engine, an adapter or a quantised model that is not supported, or where another process's
            Trainer has not this callback.
        BaseMismatch: at train begin, when a resumed run's base cannot be established.
        OutputExists: at train begin, when another process is at work in the place of the packages' folder.
        SnapshotError: a package could not be written, with `on_error="raise"`; at the next step.
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
        dtype: Target | None = None,
        rounding: Rounding = "stochastic",
        when: When | Sequence[When] = ("save", "end"),
        base: str | os.PathLike[str] | None = None,
        keep: int | None = None,
        keep_best: bool = False,
        incremental: bool = False,
        evaluate: bool | str | Evaluate = False,
        on_error: OnError = "warn",
        source: Source = "weights",
        kernels: str | None = None,
        name: str = "dare",
        artifact: bool = True,
        push_to_hub: str | None = None,
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
            dtype=dtype,
            rounding=rounding,
        )
        self.events, self.every = schedule(when)
        check_options(
            keep=keep,
            keep_best=keep_best,
            incremental=incremental,
            evaluate=evaluate,
            values=values,
            name=name,
            on_error=on_error,
            source=source,
        )
        self.base = base
        self.keep = keep
        self.keep_best = keep_best
        self.incremental = incremental
        self.evaluate = evaluate
        self.source = source
        self.kernels = checked(kernels, "kernels")
        self.name = name
        self.artifact = artifact
        self.push_to_hub = push_to_hub
        if push_to_hub is not None:
            check_repository(push_to_hub)
        self.on_error = on_error
        self.failures: list[Exception] = []
        self.packages: list[Snapshot] = []
        self.waited: list[float] = []
        self._roll = Roll(f"callback/{name}")
        self._ranks: Ranks | None = None
        self._at_init: FirstLook | None = None
        self._begun: tuple[weakref.ref[Any], Origin] | None = None
        """The model of the last training, and its base."""
        self._folder: RunFolder | None = None
        self._snapshotter: Snapshotter | None = None
        self._pusher: Pusher | None = None
        """Of the first rank, where packages are pushed."""
        self._attached: Trainer | None = None
        self._trainer: Trainer | None = None
        self._training = False
        self._metric: Evaluate | None = None
        """What the receiver's model is measured by, where that is not the Trainer's evaluation."""
        self._last_measured = -1
        """Step at which that was done last."""
        self._last_taken: int | str = -1
        """Step of the last snapshot, or "end"."""
        self._before = 0
        """Packages of trainings before this one."""

    @property
    def package(self) -> DeltaPackage | None:
        """The latest package."""
        return self.packages[-1].package if self.packages else None

    def attach(self, trainer: Trainer) -> None:
        """Say which Trainer this callback belongs to: it evaluates with it, and shares passes over the
        weights with its other callbacks. Needed only where a Trainer does not itself send the events.
        """
        self._attached = trainer

    # The events of a run, in the order in which the Trainer sends them. It may be refused up to train begin;
    # after that, training does not end because of it.

    def on_init_end(
        self, args: TrainingArguments, state: TrainerState, *_: Any, model: Any = None, **__: Any
    ) -> None:
        """The weights are the base's here even when the run is about to resume: remember which of them are
        not on disk.
        """
        self._roll.sign()
        if model is not None:
            self._at_init = first_look(module_of(model), self.base)

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: Any = None,
        processing_class: Any = None,
        **_: Any,
    ) -> None:
        check_engine()
        self._end_interrupted()
        self._roll.sign()
        self._roll.check(_ROLL_PATIENCE)
        model = module_of(model)
        self._trainer = self._attached or calling_trainer()
        if self._trainer is not None:
            reporting.ReportersLast.see_to(self._trainer)
        reading = reading_of(self.config, self.source)
        live = LiveWeights(model, source=reading, ranks=self._joined(), kernels=self.kernels, but_packed=True)
        if self.evaluate:
            check_evaluation(live, self._trainer)
            self._metric = live.ranks.each(lambda: metric_of(self.evaluate, model, processing_class))
        if self.push_to_hub is not None:
            self._check_repository_is_its_own()
            self._pusher = pusher_for(destination_of(args, self.push_to_hub), live.ranks)
        path = output_folder(args, state, self._trainer) / self.name
        private = private_folder(path, args)
        record = on_record(state, self.name) if state.global_step else None
        self._folder = RunFolder(path, name_of_run(record, live.ranks), private)
        origin = self._establish(state, live, model, record)
        self._snapshotter = Snapshotter(
            origin,
            self.config,
            live,
            incremental=self.incremental,
            source=self.source,
            run=self._folder.run,
        )
        self._companions = shared_companions(live.ranks, model, processing_class, private, origin)
        if self.incremental:
            self._snapshotter.chain = self._folder.own(up_to=state.global_step)
        self._remember(state, origin)
        self.failures = []
        self._before = len(self.packages)
        self._last_measured = self._last_taken = -1
        self._training = True
        if record is not None:
            self._make_up(args, state, model)

    @as_guest
    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, *_: Any, model: Any = None, **__: Any
    ) -> None:
        self._collect_finished(args, state)
        self._snapshot("step", state, model)

    @as_guest
    def _collect_finished(self, args: TrainingArguments, state: TrainerState) -> None:
        if self._snapshotter is not None:
            self._collect(self._snapshotter.finished(), state)
        if self._pusher is not None:
            self._pusher.look_and_tell(self.name)

    @as_guest
    def on_evaluate(
        self,
        args: TrainingArguments,
        state: TrainerState,
        *_: Any,
        model: Any = None,
        metrics: Any = None,
        eval_dataloader: Any = None,
        **__: Any,
    ) -> None:
        if not self.evaluate or self._snapshotter is None or self._folder is None:
            return
        assert self._trainer is not None, "train begin refuses evaluate without a Trainer"
        received = (self._trainer, module_of(model), self._snapshotter, self._folder.private)
        if self._metric is None:
            evaluate_received(*received, name=self.name, loader=eval_dataloader, metrics=metrics or {})
        elif self._last_measured != state.global_step:  # once, however many data sets there are
            self._last_measured = state.global_step
            measure_received(*received, name=self.name, metric=self._metric)

    @as_guest
    def on_save(
        self, args: TrainingArguments, state: TrainerState, *_: Any, model: Any = None, **__: Any
    ) -> None:
        self._snapshot("save", state, model)

    @as_guest
    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, *_: Any, model: Any = None, **__: Any
    ) -> None:
        self._snapshot("epoch", state, model)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, *_: Any, model: Any = None, **__: Any
    ) -> None:
        self._take_last(args, state, model)
        self._close(args, state)
        self._finish_pushing(args, state)
        tell_again(self)

    @as_guest
    def _take_last(self, args: TrainingArguments, state: TrainerState, model: Any) -> None:
        self._snapshot("end", state, model)

    @as_guest
    def _close(self, args: TrainingArguments, state: TrainerState) -> None:
        """Wait for the last package."""
        self._training = False
        if self._snapshotter is not None:
            try:
                self._collect(self._snapshotter.close(), state)
            finally:
                self._leave_folder()
            if self._joined().first:
                reporting.conclude(self.packages[self._before :], self.name)

    @as_guest
    def _finish_pushing(self, args: TrainingArguments, state: TrainerState) -> None:
        pusher, self._pusher = self._pusher, None
        if pusher is not None:
            pusher.close()

    def _check_repository_is_its_own(self) -> None:
        """Two callbacks would push packages of the same names."""
        handler = getattr(self._trainer, "callback_handler", None)
        for other in getattr(handler, "callbacks", ()):
            same = isinstance(other, DareCallback) and other.push_to_hub == self.push_to_hub
            if same and other is not self:
                expected = "a repository for each callback"
                found = f"{self.push_to_hub} for {self.name!r} and {other.name!r}"
                raise ConfigError("push_to_hub", expected=expected, found=found)

    def _end_interrupted(self) -> None:
        """A training before this one ended without an event: by Ctrl-C, or for want of memory."""
        if self._training and self._snapshotter is not None:
            self._training = False
            try:
                self._collect(self._snapshotter.close(), None)
            except SnapshotError as error:
                if self.on_error == "raise":
                    raise
                tell(self, error)
            self._leave_folder()

    def _leave_folder(self) -> None:
        """What only the training needed goes, and others may write there."""
        if self._folder is not None:
            self._folder.leave()
        if self._joined().first and self._companions.is_dir():
            remove_waiting(self._companions)

    # Establishing the base.

    def _establish(
        self, state: TrainerState, live: LiveWeights, model: Any, record: Mapping[str, Any] | None
    ) -> Origin:
        """What packages are relative to, and a folder that holds this run's alone."""
        assert self._folder is not None, "the folder is known before the base"
        trained = inner_model(model).model
        before = self._begun[1] if self._begun is not None and self._begun[0]() is trained else None
        known = Known(base=self.base, record=record, before=before, look=self._at_init)
        step = state.global_step
        origin = begin(live, model, self._folder, known, step=step, resumed=bool(step))
        self._begun = (weakref.ref(trained), origin)
        return origin

    def _remember(self, state: TrainerState, origin: Origin) -> None:
        assert self._folder is not None, "train begin knows the folder"
        entry = state.stateful_callbacks.setdefault(STATE, {"args": {}, "attributes": {}})
        entry["attributes"][self.name] = {**origin.record(), "run": self._folder.run}

    def _make_up(self, args: TrainingArguments, state: TrainerState, model: Any) -> None:
        """The package of the checkpoint that the run goes on from, should a kill have come before it."""
        assert self._folder is not None, "train begin knows the folder"
        missing = not self._folder.of_step(state.global_step).exists()
        if "save" in self.events and self._joined().gather(missing)[0]:
            self.on_save(args, state, model=model)

    # Taking and collecting snapshots.

    def _joined(self) -> Ranks:
        """The ranks that train together, of which this process is one."""
        if self._ranks is None:
            self._ranks = Ranks.joined()
        return self._ranks

    def _snapshot(self, event: str, state: TrainerState, model: Any) -> None:
        """At most one package for a step, whichever events meet there; and together with all callbacks that
        the event makes take one.
        """
        due = [callback for callback in self._reading_the_same() if callback._is_due(event, state)]
        if self not in due:
            return
        for callback in due:
            callback._last_taken = moment(event, state)
            callback._await_last(None, state)
        take_together(
            [callback._order(event, state) for callback in due], module_of(model), step=state.global_step
        )

    @as_guest
    def _await_last(self, args: TrainingArguments | None, state: TrainerState) -> None:
        """Wait for the snapshot before, so that its failure is not taken for that of the next one."""
        if self._snapshotter is not None:
            self._collect(self._snapshotter.wait(), state)

    def _reading_the_same(self) -> list[DareCallback]:
        """The Trainer's callbacks that read the same weights as this one, which is among them, in order."""
        if self._trainer is None:
            return [self]
        callbacks = self._trainer.callback_handler.callbacks
        training = [other for other in callbacks if isinstance(other, DareCallback) and other._training]
        return [other for other in training if other._reading() == self._reading()]

    def _reading(self) -> tuple[object, ...]:
        return () if self._snapshotter is None else self._snapshotter.reading

    def _is_due(self, event: str, state: TrainerState) -> bool:
        """Whether the event makes it take a snapshot that it has not taken yet."""
        at_step = event == "step" and self.every is not None and state.global_step % self.every == 0
        return (event in self.events or at_step) and self._last_taken != moment(event, state)

    def _order(self, event: str, state: TrainerState) -> Order:
        assert self._snapshotter is not None, "snapshot before train begin"
        assert self._folder is not None, "train begin knows the folder"
        folder = self._folder
        out = folder.path / FINAL if event == "end" else folder.of_step(state.global_step)
        best = folder.of_step(state.best_global_step) if self.keep_best and state.best_global_step else None
        published = (
            None
            if self.keep is None
            else partial(folder.forget_old, self.keep, out, best, step=state.global_step)
        )
        return Order(
            taker=self._snapshotter,
            out=out,
            files=self._companions,
            within=folder.private,
            measured=last_measured(state),
            published=published,
        )

    def _collect(self, snapshot: Snapshot | None, state: TrainerState | None) -> None:
        """Take in what was completed; without a state, of a training that is over."""
        if snapshot is None:
            return
        self.packages.append(snapshot)
        self.waited.append(snapshot.waited)
        if self._joined().first:
            stays = self.keep is None
            wandb_snapshots.log(snapshot, name=self.name, artifact=self.artifact, stays=stays)
            if self._pusher is not None:
                self._pusher.push(snapshot.package.path)
            if state is not None:
                reporting.report(snapshot, self.name, self._trainer, state)

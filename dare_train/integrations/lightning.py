"""Lightning's way in: a callback for its Trainer, on one device, DDP and FSDP."""

from __future__ import annotations

import functools
import os
import weakref
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

try:
    from lightning.pytorch import Callback
except ImportError:
    from pytorch_lightning import Callback

from ..config import DareConfig
from ..errors import ConfigError, SnapshotError
from ..hub.upload import check_repository
from ..kernels.backends import checked
from ..package.reader import DeltaPackage
from ..parallel.ranks import Ranks
from ..parallel.waiting_folder import remove_waiting
from ..snapshots.beginning import Known, begin
from ..snapshots.callback_options import OnError, When, check_options, schedule
from ..snapshots.grids import reading_of
from ..snapshots.guest import tell, tell_again
from ..snapshots.pushing import Destination, Pusher, pusher_for
from ..snapshots.run_folder import FINAL, RunFolder
from ..snapshots.shared_pass import Snapshot
from ..snapshots.snapshotter import Snapshotter
from ..snapshots.trainer_run import name_of_run, shared_companions
from ..weights.live.live import LiveWeights
from ..weights.live.wrapped import inner_model

_STRATEGIES = {"SingleDeviceStrategy", "DDPStrategy", "FSDPStrategy", "ModelParallelStrategy"}


def _guarded(event: Callable[..., None]) -> Callable[..., None]:
    """An event after which training goes on whatever happened in it, unless `on_error` is "raise"."""

    @functools.wraps(event)
    def guarded(self: DareCallback, *given: Any, **named: Any) -> None:
        try:
            event(self, *given, **named)
        except Exception as error:
            if self.on_error == "raise":
                raise
            tell(self, error)

    return guarded


class DareCallback(Callback):  # type: ignore[misc]
    """Writes delta packages during and after training with Lightning, as `dare_train.DareCallback` does with
    transformers.

        lightning.Trainer(callbacks=[DareCallback(p=0.9)]).fit(module, data)

    Packages appear as `{folder}/step-N`, N counting the optimizer's steps, and the one at the end as
    `{folder}/final`. They are of the pretrained model in the module, or of the module where it has none, or
    several.

    Args:
        p: see `DareConfig`.
        when: "save" (with each checkpoint that has callbacks' states), "epoch", "end", a number N (every N
            steps), or several of these.
        folder: where packages go; `{default_root_dir}/{name}` by default.
        base, keep, incremental, on_error, kernels, name, push_to_hub: see `dare_train.DareCallback`.
        config: the other fields of `DareConfig`.

    Attributes:
        packages: every snapshot of this process, oldest first.
        failures: what failed in this training, with `on_error="warn"`.

    Raises:
        ConfigError: at construction, for values that are wrong or conflict; at train start, for a strategy
            or a layout of weights that is not known.
        BaseMismatch: at train start, when a resumed run's base cannot be established.
        OutputExists: at train start, when another process is at work in the place of the packages' folder.
        SnapshotError: a package could not be written, with `on_error="raise"`.
    """

    def __init__(
        self,
        p: float | Mapping[str, float] = 0.9,
        *,
        when: When | Sequence[When] = ("save", "end"),
        folder: str | os.PathLike[str] | None = None,
        base: str | os.PathLike[str] | None = None,
        keep: int | None = None,
        incremental: bool = False,
        on_error: OnError = "warn",
        kernels: str | None = None,
        name: str = "dare",
        push_to_hub: str | None = None,
        **config: Any,
    ) -> None:
        self.config = DareConfig(p=p, **config)
        self.events, self.every = schedule(when)
        check_options(
            keep=keep,
            keep_best=False,
            incremental=incremental,
            evaluate=False,
            values=self.config.values,
            name=name,
            on_error=on_error,
            source="weights",
        )
        self.folder = folder
        self.base = base
        self.keep = keep
        self.incremental = incremental
        self.on_error = on_error
        self.kernels = checked(kernels, "kernels")
        self.name = name
        self.push_to_hub = push_to_hub
        if push_to_hub is not None:
            check_repository(push_to_hub)
        self.packages: list[Snapshot] = []
        self.failures: list[Exception] = []
        self._record: Mapping[str, Any] | None = None
        """What the checkpoint that is gone on from remembers of the base."""
        self._remembered: dict[str, Any] = {}
        """What the next checkpoint will."""
        self._trained: weakref.ref[Any] | None = None
        """The model of the last training."""
        self._run: RunFolder | None = None
        self._snapshotter: Snapshotter | None = None
        self._pusher: Pusher | None = None
        """Of the first rank, where packages are pushed."""
        self._companions = Path()
        self._last_taken: int | str = -1

    @property
    def package(self) -> DeltaPackage | None:
        """The latest package."""
        return self.packages[-1].package if self.packages else None

    # What checkpoints remember.

    @property
    def state_key(self) -> str:
        return str(self._generate_state_key(name=self.name))

    def state_dict(self) -> dict[str, Any]:
        return self._remembered

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._record = state_dict or None

    # The events of a run. It may be refused up to train start.

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        self._record = None  # a checkpoint is loaded after this

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        _check_strategy(trainer)
        self._end_interrupted()
        model, step = trainer.strategy.model, trainer.global_step
        live = LiveWeights(
            model,
            source=reading_of(self.config, "weights"),
            ranks=Ranks.joined(),
            kernels=self.kernels,
            but_packed=True,
        )
        path = Path(self.folder) if self.folder is not None else Path(trainer.default_root_dir) / self.name
        inner = inner_model(model).model
        again = self._trained is not None and self._trained() is inner
        record = self._record or (self._remembered if again else None)
        self._run = RunFolder(path, name_of_run(record, live.ranks))
        known = Known(base=self.base, record=record)
        origin = begin(live, model, self._run, known, step=step, resumed=trainer.ckpt_path is not None)
        self._trained = weakref.ref(inner)
        self._snapshotter = Snapshotter(
            origin, self.config, live, incremental=self.incremental, run=self._run.run
        )
        self._remembered = {**origin.record(), "run": self._run.run}
        if self.push_to_hub is not None:
            self._pusher = pusher_for(Destination(repo=self.push_to_hub), live.ranks)
        self._companions = shared_companions(live.ranks, model, None, path, origin)
        if self.incremental:
            self._snapshotter.chain = self._run.own(up_to=step)
        self.failures = []
        self._last_taken = -1

    @_guarded
    def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
        if self._snapshotter is not None:
            self._collect(self._snapshotter.finished())
        if self._pusher is not None:
            self._pusher.look_and_tell(self.name)
        if self.every is not None and trainer.global_step % self.every == 0:
            self._take(trainer, trainer.global_step)

    @_guarded
    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        if "epoch" in self.events:
            self._take(trainer, trainer.global_step)

    @_guarded
    def on_save_checkpoint(self, trainer: Any, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        if "save" in self.events:
            self._take(trainer, trainer.global_step)

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        self._take_last(trainer)
        self._close()
        self._finish_pushing()
        tell_again(self)

    @_guarded
    def _take_last(self, trainer: Any) -> None:
        if "end" in self.events:
            self._take(trainer, "end")

    @_guarded
    def _close(self) -> None:
        """Wait for the last package."""
        snapshotter, self._snapshotter = self._snapshotter, None
        if snapshotter is not None:
            try:
                self._collect(snapshotter.close())
            finally:
                if self._run is not None:
                    self._run.leave()
                if snapshotter.ranks.first and self._companions.is_dir():
                    remove_waiting(self._companions)

    @_guarded
    def _finish_pushing(self) -> None:
        pusher, self._pusher = self._pusher, None
        if pusher is not None:
            pusher.close()

    def _end_interrupted(self) -> None:
        """A training before this one ended without an event."""
        if self._snapshotter is not None:
            self._close()

    # Taking snapshots.

    def _take(self, trainer: Any, moment: int | str) -> None:
        """At most one package for a step, whichever events meet there."""
        snapshotter, run = self._snapshotter, self._run
        if snapshotter is None or run is None or self._last_taken == moment:
            return
        self._last_taken = moment
        step = trainer.global_step
        self._collect_or_tell(snapshotter)
        out = run.path / FINAL if moment == "end" else run.of_step(step)
        keep = None if self.keep is None else (self.keep, run.path)
        snapshotter.take(trainer.strategy.model, out, step=step, files=self._companions, keep=keep)

    def _collect_or_tell(self, snapshotter: Snapshotter) -> None:
        """Wait for the snapshot before, so that its failure is not taken for that of the next one."""
        try:
            self._collect(snapshotter.wait())
        except SnapshotError as error:
            if self.on_error == "raise":
                raise
            tell(self, error)

    def _collect(self, snapshot: Snapshot | None) -> None:
        if snapshot is not None:
            self.packages.append(snapshot)
            if self._pusher is not None:
                self._pusher.push(snapshot.package.path)


def _check_strategy(trainer: Any) -> None:
    """Refuse a strategy whose layout of weights is not known: its package would be wrong.

    Raises:
        ConfigError: naming it.
    """
    kinds = {kind.__name__ for kind in type(trainer.strategy).__mro__}
    if not kinds & _STRATEGIES or "DeepSpeedStrategy" in kinds:
        found = type(trainer.strategy).__name__
        remedy = "extract from the saved model instead"
        raise ConfigError("strategy", expected="one device, DDP or FSDP", found=found, remedy=remedy)

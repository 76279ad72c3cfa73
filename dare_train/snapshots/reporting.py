"""Figures of snapshots, for whatever the Trainer reports to, and a line for the terminal at the end."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from tqdm.auto import tqdm
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK

if TYPE_CHECKING:
    from .shared_pass import Snapshot


def figures(snapshot: Snapshot, name: str) -> dict[str, float]:
    """Scalars of a snapshot, under the callback's name: sizes in bytes, bits per parameter, density as
    kept/total, |δ| before rescaling, seconds waited.
    """
    stats = snapshot.package.stats
    found = {
        "bits_per_parameter": stats["bits_per_parameter"],
        "package_bytes": stats["bytes"],
        "compression_ratio": stats["compression_ratio"],
        "density": stats["density"],
        **{f"delta_{part}": value for part, value in stats["delta"].items()},
        "seconds_waited": snapshot.waited,
    }
    return {f"{name}/{key}": value for key, value in found.items()}


def report(snapshot: Snapshot, name: str, trainer: Trainer | None, state: TrainerState) -> None:
    """Through the Trainer's log, and so to its history, its progress bar and all its trackers. A package is
    complete some steps after the one it is of, which goes along.
    """
    told = {**figures(snapshot, name), f"{name}/step": snapshot.step}
    if trainer is None:
        state.log_history.append({**told, "step": state.global_step})
        return
    control = trainer.control
    flags = dict(vars(control))
    try:
        Trainer.log(trainer, told)  # not a subclass's, which may ask other ranks for more
    finally:
        # Logging takes back what is about to be logged; and this is one rank, which nothing may steer alone.
        vars(control).update(flags)
        trainer.control = control


def conclude(snapshots: Sequence[Snapshot], name: str) -> None:
    """Say on the terminal what the last package is, and what all of them cost, if there are some."""
    if not snapshots:
        return
    package = snapshots[-1].package
    stats = package.stats
    count = "1 package" if len(snapshots) == 1 else f"{len(snapshots)} packages"
    waited = sum(snapshot.waited for snapshot in snapshots)
    sizes = (
        f"{stats['bytes']:,} bytes, {stats['compression_ratio']:.1f} × smaller than the model, "
        f"{stats['bits_per_parameter']:.3f} bits per parameter"
    )
    tqdm.write(f"DareCallback {name!r}: {package.path}: {sizes}; training waited {waited:.3f} s for {count}")


class ReportersLast(TrainerCallback):  # type: ignore[misc]
    """At the end of a training, lets the Trainer's trackers close their runs after all other callbacks: the
    last package is complete only then.
    """

    def __init__(self, trainer: Trainer) -> None:
        self._handler = trainer.callback_handler

    @classmethod
    def see_to(cls, trainer: Trainer) -> None:
        """Let a Trainer have one. In the event that calls this, the list of callbacks is being gone through:
        it is replaced and not changed.
        """
        callbacks = trainer.callback_handler.callbacks
        if not any(isinstance(callback, cls) for callback in callbacks):
            trainer.callback_handler.callbacks = [cls(trainer), *callbacks]

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: object
    ) -> None:
        """The first of all at this event: the rest of the list that is being gone through is put in another
        order, and a copy in the order of before stays for later events.
        """
        trackers = tuple(INTEGRATION_TO_CALLBACK.values())
        going_through = self._handler.callbacks
        self._handler.callbacks = [callback for callback in going_through if callback is not self]
        going_through[1:] = sorted(self._handler.callbacks, key=lambda one: isinstance(one, trackers))

"""How a training begins, for its packages: their base, and a folder that is this run's alone."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import BaseMismatch
from ..parallel.staged_folder import storage_errors, sweep_folder
from ..weights.live.live import LiveWeights
from .base_model import FirstLook, Origin, at_hand, begun_at, kept, loaded_from, recall
from .run_folder import RunFolder


@dataclass(frozen=True, kw_only=True)
class Known:
    """What is known of the base before a training's first step, best first."""

    base: str | os.PathLike[str] | None = None
    """The one that was given."""
    record: Mapping[str, Any] | None = None
    """What an earlier part of the run put on record."""
    before: Origin | None = None
    """That of the same model's training before, in this process."""
    look: FirstLook | None = None
    """At the model before the run was resumed."""


def begin(live: LiveWeights, model: Any, run: RunFolder, known: Known, *, step: int, resumed: bool) -> Origin:
    """Establish the base, and move aside what in the folder is not of this run up to `step`. All ranks call
    it together.

    Args:
        live: the model as its training begins, with step `step`.
        model: the same, as its trainer has it.
        run: the folder.
        known: of the base.
        resumed: whether the weights are those of a checkpoint, and no longer the base's.

    Raises:
        BaseMismatch: a resumed run's base is not known, gone, or no longer what it was.
        ConfigError: the model is quantised, and its full-precision weights are not at hand.
        OutputExists: another training, or command, is at work in the folder's place.
        StorageError: the folder cannot be written.
    """
    origin = _on_disk(live, model, run.base, known, step if resumed else None)
    in_use = origin is not None and origin.checkpoint.folder.resolve() == run.base.resolve()
    live.ranks.together(lambda: _clear(run, step, in_use) if live.ranks.first else None)
    return origin or kept(live, model, run.base)


def _on_disk(live: LiveWeights, model: Any, kept_base: Path, known: Known, step: int | None) -> Origin | None:
    """The base, as far as it need not be copied; `step` is that of a resumed run."""
    if known.base is not None:
        return at_hand(live, model, kept_base, base=known.base)
    if known.record is not None:
        name = loaded_from(model)
        return recall(known.record, live, [str(kept_base), *([name] if name else [])])
    if known.before is not None:
        return known.before
    if step is None:
        return at_hand(live, model, kept_base)
    seen = live.ranks.gather(known.look is not None and not _of_a_run(known.look))
    if known.look is not None and all(seen):
        return begun_at(known.look, live)
    raise BaseMismatch(
        "base",
        expected="a base on record, or the folder the model was loaded from",
        found=f"a run resumed at step {step} that had no such callback, and a model not seen with its base",
        remedy="pass base=",
    )


def _of_a_run(look: FirstLook) -> bool:
    """Whether the model was loaded from a Trainer's checkpoint."""
    return (Path(look.where) / "trainer_state.json").exists()


def _clear(run: RunFolder, step: int, base_in_use: bool) -> None:
    with storage_errors(run.path):
        run.claim()
        sweep_folder(run.path, run.private)
        run.make_way(from_step=step, base_in_use=base_in_use)
